"""scikit-learn's digits: 1797 grey images of 8x8 pixels in 10 classes, embedded in the installed package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from edgekd.data.dataset import Part, RawData
from edgekd.errors import MissingError
from edgekd.registry import register


@register("dataset")
class digits:
    """Handwritten digits, 1797 grey images of 8x8 pixels, 10 classes; comes with scikit-learn, needs no download.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998 (its test part).
    """

    def files(self) -> list[Path]:
        """The one file, found without importing scikit-learn. Raises MissingError when that is not installed."""
        spec = importlib.util.find_spec("sklearn")
        if spec is None or not spec.submodule_search_locations:
            raise MissingError(
                'dataset "digits" is a file of the Python package scikit-learn, which is not installed',
                allowed="it is read from that package, nothing is downloaded",
                fix="pip install 'edgekd[train]'",
            )
        return [Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"]

    def read(self) -> RawData:
        """Values 0..16 are spread over 0..255. There is no test part: `load` carves one."""
        [file] = self.files()
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
        images = np.rint(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
        return RawData(Part(images, table[:, 64], file, lambda i: f"{file}: row {i}"))
