"""edgekd: from a big teacher network to a small student measured on your own board."""

import os

__version__ = "0.1.0"

# Read by ONNX Runtime when it is imported: without it, the import leaves a device id and a data base of its telemetry
# client in the user's home. edgekd reports to nobody.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
