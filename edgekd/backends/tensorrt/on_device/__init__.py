"""The half of the TensorRT backend that is copied to the device: Python 3.8, numpy, and TensorRT's own module.

It imports nothing of edgekd. `python3 -m on_device FOLDER` makes the engine in a folder, with TensorRT on a board
and with TensorRT-RTX where there is no GPU.
"""
