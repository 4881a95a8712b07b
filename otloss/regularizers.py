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

    with the unbiased variance (divisor B - 1). This is VICReg's printed formula for one branch; a loss over two views
    adds ``v(q_s) + v(q_t)``, as OPTiML's Eq. 3 does. VICReg's published code halves that sum, so that a weight of 25
    there is 12.5 here.

    Args:
        gamma: the wanted standard deviation.
        eps: added to the variance, so that the root has a gradient at zero.
        gather: collect the batch from all processes of ``torch.distributed`` first, with gradients. Every process then
            has the value of the whole batch. The gradient on a process is W times its share, W the number of processes,
            so that after the averaging of ``DistributedDataParallel`` parameters get exactly the gradient of the
            whole batch in one process. All processes must hold equally many rows (``drop_last=True``). Without an
            initialised process group it does nothing.

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
        """v(Z) of ``z (B, D)``: a scalar, float64 for float64 input, else float32, also under autocast.

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
    r"""Sum of the squared covariances between different dimensions of an embedding, over their number.

    .. math:: c(Z) = \frac{1}{D} \sum_{i \neq j} \mathrm{Cov}(Z)_{ij}^2, \qquad
        \mathrm{Cov}(Z) = \frac{1}{B-1} \sum_{b=1}^{B} (z_b - \bar z)(z_b - \bar z)^\top

    for one branch, as VICReg prints and computes it; a loss over two views adds ``c(q_s) + c(q_t)``. With centred
    rows X the sum over all pairs is also :math:`\lVert X X^\top \rVert_F^2 / (B-1)^2`, a B×B product instead of a D×D
    one; it is taken where it is the smaller (a batch of 64 and 2048 dimensions: 32 times less work).

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
        """c(Z) of ``z (B, D)``: a scalar; dtype and errors as in `VarianceLoss`."""
        z = whole_batch("z", z, self.gather)
        with no_autocast(z):
            (batch, dim), dtype = z.shape, z.dtype
            z = (z - z.mean(dim=0)) / (batch - 1) ** 0.5
            if 2 * batch <= dim:
                z = wide(z)  # one large dimension, and the two sums below are equal to seven digits
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
    """All processes' rows, in the order of their ranks; backward sums what all processes want of this one's rows."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()  # all_reduce works in place
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]
