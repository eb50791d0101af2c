"""Smaller than float32: one Q/DQ graph for every runtime, and an account of what it cost.

`quantizers` is what a recipe names; `ptq`, `dialects`, `rules`, `account` and `mixed` work on ONNX models.
"""
