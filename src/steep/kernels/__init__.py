"""Triton kernels. Each has a plain-torch reference and its autograd in the module of the same name in `steep.ops`."""
