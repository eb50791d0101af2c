"""What edgekd writes into ONNX files for its own later stages to read."""

from __future__ import annotations

# Metadata of a node: the LMA layer that it is a part of, by the layer's module path.
LMA_MARK = "edgekd.lma"
