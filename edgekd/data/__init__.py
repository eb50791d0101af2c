"""Data: sources, checks, splits, fingerprints, calibration sets, and (in `batches`, with torch) training batches.

Everything but `edgekd.data.batches` works without torch.
"""

from edgekd.data.dataset import Dataset, Part, RawData, Shape, Split
from edgekd.data.loading import fingerprint, load

__all__ = ["Dataset", "Part", "RawData", "Shape", "Split", "fingerprint", "load"]
