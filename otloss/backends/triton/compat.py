"""What differs between the versions of Triton, 3.3 (PyTorch 2.7) to 3.8 (PyTorch 2.14), that the kernels serve.

Everything else is written so that all of them take it:

* no function returns a tuple that holds None, and no ``while`` loop carries both a row's and a column's vector;
* a product in Triton is at least 16 deep, the least before 3.8, and of float32; PyTorch multiplies float64;
* scalars that matter to 53 bits are annotated ``tl.float64``, see :func:`jit`.
"""

# mypy: ignore-errors
import triton
import triton.language as tl


def jit(do_not_specialize=(), do_not_specialize_on_alignment=()):
    """``triton.jit``; a scalar that is annotated ``tl.float64`` stays float64.

    Triton 3.3 ignores that annotation and passes a Python float in 32 bits. It reads the type of a scalar from the
    parameter's ``annotation_type``, which is set here for the kernel's own parameters.
    """

    def decorate(function):
        kernel = triton.jit(
            function,
            do_not_specialize=list(do_not_specialize),
            do_not_specialize_on_alignment=list(do_not_specialize_on_alignment),
        )
        for parameter in getattr(kernel, "params", ()):  # the interpreter's kernels have none, and keep 64 bits
            if function.__annotations__.get(parameter.name) is tl.float64:
                parameter.__dict__["annotation_type"] = "fp64"
        return kernel

    return decorate
