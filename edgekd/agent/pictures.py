"""From a picture as it is stored to what a network takes.

Pixels (`.npy`) need numpy alone; whatever else a picture is stored as is decoded by Pillow, where this machine has it.
"""

from __future__ import annotations

import io
from typing import Any

from .errors import AgentError

PIXELS = b"\x93NUMPY"


class Pictures:
    """How stored pictures become inputs [1, C, H, W]; `decoder` says by what."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import numpy as np

        self.shape = tuple(spec["shape"])
        self.mean, self.std = (np.array(spec[name], np.float32).reshape(-1, 1, 1) for name in ("mean", "std"))
        self.stored = []  # type: list[bytes]
        for name in spec["files"]:
            with open(name, "rb") as file:
                self.stored.append(file.read())
        self.decoder = "none: they are stored as pixels"
        if not all(data.startswith(PIXELS) for data in self.stored):
            self.decoder = self._pillow()

    def _pillow(self) -> str:
        try:
            import PIL
            import PIL.ImageOps
        except ImportError:
            stored = "benchmark.end_to_end: the images are stored in an image format"
            raise AgentError(f"{stored}, and Pillow, which decodes it, is not installed here") from None
        return f"Pillow {PIL.__version__}"

    def decode(self, data: bytes) -> Any:
        """uint8 [C, H, W] of pixels; a decoded picture of Pillow's else."""
        import numpy as np

        if data.startswith(PIXELS):
            return np.load(io.BytesIO(data), allow_pickle=False)
        from PIL import Image, ImageOps

        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened) if "exif" in opened.info else opened
            return upright.convert("L" if self.shape[0] == 1 else "RGB")

    def resize(self, picture: Any) -> Any:
        """uint8 [C, H, W]: the shorter side scaled to the network's, the middle cut out."""
        import numpy as np

        if isinstance(picture, np.ndarray):
            return picture
        from PIL import Image, ImageOps

        _, height, width = self.shape
        if picture.size != (width, height):
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(picture)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def normalise(self, pixels: Any) -> Any:
        """float32 [1, C, H, W]."""
        import numpy as np

        x = pixels.astype(np.float32)
        x /= np.float32(255)
        x -= self.mean
        x /= self.std
        return np.ascontiguousarray(x[None])
