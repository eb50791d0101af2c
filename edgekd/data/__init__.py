"""Data: sources, checks, splits, fingerprints, calibration sets, and (in `batches`, with torch) training batches.

Everything but `edgekd.data.batches` works without torch.
"""

from edgekd.data.dataset import Dataset, Domain, Part, RawData, Shape, Split
from edgekd.data.loading import fingerprint, load, with_target

__all__ = ["Dataset", "Domain", "Part", "RawData", "Shape", "Split", "fingerprint", "load", "with_target"]
