"""Operations over tensors: each with a plain-torch reference, explicit forward and backward, and an autograd function.

`X_forward` and `X_backward` are what a block is put together from: they run the kernel on a GPU, and the reference on a
CPU. No module of a model is known here.
"""
