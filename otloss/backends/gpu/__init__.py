"""Triton kernels of the ``triton`` backend, and their launches.

=============  ======================================================================================================
``tiles``      what the kernels share: a tile of cost, the kernel on it, half-steps
``small``      n, m up to 128: one program per problem, every iteration in one launch
``rows``       n, m up to 1024: blocks of whole rows, one launch and one pass over the cost per iteration
``stream``     any size: tiles of a streaming pass, columns split where rows are few
``adjoint``    conjugate gradients between those passes
``contract``   gradients of the cost, contracted to those of features
``features``   unit rows and the way back
``config``     which kernel for which size, and its tile
``launch``     a problem's views and how kernels are launched; ``solve`` and ``gradient`` order the launches
=============  ======================================================================================================

Each module states its equations and its roofline: operations per unit at the sustained rates of one H100 (A100):
495 (156) TFLOP/s of dense TF32, 132 (108) SMs at 1.7 (1.4) GHz with 128 (64) float32 instructions and 16
exponentials per clock, 3.35 (1.55) TB/s of memory. These are predictions: nothing here has run on a GPU yet
(README).
"""
