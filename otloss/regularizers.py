"""VICReg's variance and covariance terms, which keep embeddings from collapsing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from otloss.checks import check_number, check_tensor, no_autocast, wide

__all__ = ["CovarianceLoss", "VarianceLoss"]


class VarianceLoss(nn.Module):
    r"""Hinge on the standard deviation of every dimension of an embedding over the batch.

    .. math:: v(Z) = \frac{1}{D} \sum_{j=1}^{D} \max\Big(0,\; \gamma - \sqrt{\mathrm{Var}(z^{j}) + \epsilon}\Big)

    The variance is the unbiased one (divisor B - 1). This is VICReg's printed formula for one branch. A loss over two
    views adds ``v(q_s) + v(q_t)``, as OPTiML's Eq. 3 does. VICReg's published code halves that sum, so a weight of 25
    in that code equals a weight of 12.5 here.

    Args:
        gamma: the wanted standard deviation.
        eps: added to the variance, so that the square root has a finite gradient at variance zero.
        gather: first collect the batch from all processes of ``torch.distributed``, with gradients. Every process then
            has the value of the whole batch. The gradient on a process is W times its share, where W is the number of
            processes. ``DistributedDataParallel`` averages over the processes, so the parameters get exactly the
            gradient that one process with the whole batch would compute. All processes must hold equally many rows
            (``drop_last=True``). Without an initialised process group this option does nothing.

    Source: Bardes, Ponce and LeCun, *VICReg*, ICLR 2022 (arXiv:2105.04906), Eq. 1.

    Example:
        >>> import torch, otloss
        >>> z = torch.tensor([[0.0, 5.0], [0.0, -5.0]])     # one dead dimension, one with enough variance
        >>> round(otloss.VarianceLoss()(z).item(), 4)       # (1 - sqrt(1e-4)) / 2
        0.495
    """

    def __init__(self, gamma: float = 1.0, eps: float = 1e-4, *, gather: bool = False) -> None:
        super().__init__()
        check_number("gamma", gamma, positive=True)
        check_number("eps", eps, positive=True)
        self.gamma, self.eps, self.gather = gamma, eps, gather

    def forward(self, z: Tensor) -> Tensor:
        """v(Z) of ``z (B, D)``, a scalar. It is float64 for float64 input and float32 otherwise, also under autocast.

        Raises:
            TypeError: ``z`` is no floating-point tensor.
            ValueError: ``z`` is not of shape ``(B, D)`` with at least two rows (after gathering) and one column.
        """
        z = whole_batch("z", z, self.gather)
        with no_autocast(z):
            return torch.relu(self.gamma - (z.var(dim=0) + self.eps).sqrt()).mean()

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, eps={self.eps}, gather={self.gather}"


class CovarianceLoss(nn.Module):
    r"""Sum of squared covariances between different dimensions of an embedding, divided by the number of dimensions.

    .. math:: c(Z) = \frac{1}{D} \sum_{i \neq j} \mathrm{Cov}(Z)_{ij}^2, \qquad
        \mathrm{Cov}(Z) = \frac{1}{B-1} \sum_{b=1}^{B} (z_b - \bar z)(z_b - \bar z)^\top

    This is the value for one branch, as VICReg prints and computes it. A loss over two views adds
    ``c(q_s) + c(q_t)``.

    Let X hold the centred rows. The sum over all pairs, with i = j included, also equals
    :math:`\lVert X X^\top \rVert_F^2 / (B-1)^2`. That product is B×B instead of D×D, and it is taken when 2B ≤ D. For a
    batch of 64 with 2048 dimensions it is 32 times less work.

    Args:
        gather: as in `VarianceLoss`.

    Source: Bardes, Ponce and LeCun, *VICReg*, ICLR 2022 (arXiv:2105.04906), Eq. 3 and 4.

    Example:
        >>> import torch, otloss
        >>> z = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])    # covariance 2 in both off-diagonal cells
        >>> otloss.CovarianceLoss()(z).item()               # (2**2 + 2**2) / 2
        4.0
    """

    def __init__(self, *, gather: bool = False) -> None:
        super().__init__()
        self.gather = gather

    def forward(self, z: Tensor) -> Tensor:
        """c(Z) of ``z (B, D)``, a scalar. Its dtype and errors are those of `VarianceLoss`."""
        z = whole_batch("z", z, self.gather)
        with no_autocast(z):
            (batch, dim), dtype = z.shape, z.dtype
            z = (z - z.mean(dim=0)) / (batch - 1) ** 0.5
            if 2 * batch <= dim:
                z = wide(z)  # with one large dimension, the two sums below agree to seven digits
                squares = ((z @ z.T).square().sum() - z.square().sum(dim=0).square().sum()).to(dtype)
            else:
                cov = z.T @ z
                squares = (cov - torch.diag(cov.diagonal())).square().sum()
            return squares / dim

    def extra_repr(self) -> str:
        return f"gather={self.gather}"


def whole_batch(name: str, z: Tensor, gather: bool) -> Tensor:
    """Check ``z (B, D)``, collect it from all processes if asked, and widen half precision."""
    check_tensor(name, z, 2, "(B, D)")
    if z.dim() != 2 or z.shape[1] == 0:
        raise ValueError(f"{name} must have shape (B, D) with D at least 1, got {tuple(z.shape)}")
    z = z if z.dtype == torch.float64 else z.float()
    if gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        z = _Gather.apply(z)
    if len(z) < 2:
        raise ValueError(f"{name} must have at least 2 rows, since a variance needs two samples, got {tuple(z.shape)}")
    return z


class _Gather(torch.autograd.Function):
    """The rows of all processes, by rank. Backward sums, over all processes, the gradients by this one's rows."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()  # all_reduce works in place
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]
