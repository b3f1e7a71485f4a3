"""Triton kernels. Each has a plain-torch reference and its autograd in the module of the same name in `steep.ops`."""

OLDEST_CARD = (7, 5)  # compute capability; ptxas of CUDA 13 knows nothing older
OLDEST_FP8_CARD = (8, 9)  # the first that converts to e4m3, and multiplies in it
