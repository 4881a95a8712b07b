"""CV-SIM, OPTiML's cross-view attention, and a softmax of given perplexity, which turns its output into masses."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otloss.checks import check_choice, check_count, check_number, check_tensor, has_autocast, no_autocast, wide
from otloss.compat import one_operator

__all__ = ["CVSIM", "log_softmax_with_perplexity"]

TOKENS = ("channel", "batch")


def check_cvsim(dim: int, num_heads: int, tokens: str) -> None:
    """Check the options of `CVSIM`."""
    check_count("dim", dim)
    check_count("num_heads", num_heads)
    check_choice("tokens", tokens, TOKENS)
    if dim % num_heads:
        raise ValueError(f"num_heads must divide dim, got dim={dim} and num_heads={num_heads}")


class CVSIM(nn.Module):
    r"""Cross-Viewpoint Semantics Infusion Module: multi-head attention from one view's pooled features to the other's.

    .. math::
        q = W_q\, g_\text{query} + b_q, \quad k = W_k\, g_\text{context} + b_k, \quad v = W_v\, g_\text{context} + b_v,
        \quad r = W_o \big[\, \mathrm{softmax}(q k^\top / \sqrt{\dim})\, v \,\big]_\text{heads} + b_o

    The paper prints this for pooled vectors :math:`g \in \mathbb{R}^d`, one per image. Taken literally, attention then
    has one key per image. Its softmax is the constant 1, :math:`r = W_o v`, and the gradient of :math:`W_q` and
    :math:`W_k` is exactly zero. Two other readings give the formulas a meaning:

    * ``tokens="channel"``: within a head the d/heads features are the tokens, each with an embedding of length 1.
      :math:`q k^\top` is a (d/heads, d/heads) matrix over features. It is scaled by ``(d/heads)**-0.5``, where d/heads
      is the dimensionality of the query vector, as the paper names it. Every image is treated by itself.
    * ``tokens="batch"``: the images of the batch are the tokens, as in ``torch.nn.MultiheadAttention`` called on a
      ``(B, d)`` input. The result for one image depends on the other images of the batch. Under distributed training
      these are the images of this process only.

    The output projection :math:`W_o` is part of multi-head attention, though the paper does not print it. Without it,
    channels of different heads would never meet. Attention also averages, so the weights of the channels within one
    head would hardly differ. There is no residual and no normalisation, since the paper prints none. Weights start as
    in ``torch.nn.MultiheadAttention`` (Xavier uniform, biases zero).

    Args:
        dim: number of features d.
        num_heads: number of heads. It must divide ``dim``. The paper does not give it.
        tokens: ``"channel"`` or ``"batch"``, see above.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or value, or the heads do not divide ``dim``.

    Source: Singh, Gorade and Mishra, arXiv:2404.11868, section III.

    Example:
        >>> import torch, otloss
        >>> cvsim = otloss.CVSIM(dim=32, num_heads=4)
        >>> g_s, g_t = torch.rand(8, 32), torch.rand(8, 32)
        >>> mu = cvsim(g_s, g_t).softmax(-1)
        >>> mu.shape
        torch.Size([8, 32])
    """

    def __init__(self, dim: int, num_heads: int = 8, tokens: str = "channel") -> None:
        super().__init__()
        check_cvsim(dim, num_heads, tokens)
        self.dim, self.num_heads, self.tokens = dim, num_heads, tokens
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, g_query: Tensor, g_context: Tensor) -> Tensor:
        """Attend from ``g_query (B, d)`` to ``g_context (B, d)``.

        Returns:
            ``r (B, d)``, which a softmax turns into masses. Its dtype is that of the module's weights, or autocast's
            under autocast.

        Raises:
            TypeError, ValueError: an input is no floating-point tensor of shape ``(B, d)``, or the two differ in shape.
        """
        for name, g in (("g_query", g_query), ("g_context", g_context)):
            check_tensor(name, g, 2, f"(B, {self.dim})")
            if g.dim() != 2 or g.shape[1] != self.dim:
                raise ValueError(f"{name} must have shape (B, {self.dim}), got {tuple(g.shape)}")
            weight = self.query.weight.dtype
            kind = g.device.type
            if g.dtype != weight and not (has_autocast(kind) and torch.is_autocast_enabled(kind)):
                raise TypeError(f"{name} must have the dtype of the module's weights, {weight}, got {g.dtype}")
        if g_query.shape != g_context.shape:
            raise ValueError(
                f"g_query and g_context must have one shape, got {tuple(g_query.shape)} and {tuple(g_context.shape)}"
            )
        batch, size = len(g_query), self.dim // self.num_heads
        if self.tokens == "channel":
            shape, scale = (batch, self.num_heads, size, 1), size**-0.5  # batch: images and heads; token: feature
        else:
            shape, scale = (1, batch, self.num_heads, size), size**-0.5  # batch: heads; token: image
        q, k, v = (
            layer(g).view(shape) for layer, g in ((self.query, g_query), (self.key, g_context), (self.value, g_context))
        )
        if self.tokens == "batch":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (1, heads, B, size)
        attended = F.scaled_dot_product_attention(q, k, v, scale=scale)
        if self.tokens == "batch":
            attended = attended.transpose(1, 2)
        r: Tensor = self.out(attended.reshape(batch, self.dim))
        return r

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, tokens={self.tokens!r}"


def log_softmax_with_perplexity(r: Tensor, perplexity: float) -> Tensor:
    r"""Log-softmax over the last dimension, with the temperature that gives each row the wanted perplexity.

    .. math:: \log p = \log \mathrm{softmax}(\beta\, r), \qquad
        \beta > 0 \text{ such that } \exp\Big(-\sum_i p_i \log p_i\Big) = \text{perplexity}

    This is how t-SNE calibrates its neighbourhoods. The result does not change when r is shifted, or scaled by a
    positive factor. So r says where the mass goes, not how strongly it concentrates. The gradient includes that of
    :math:`\beta`, by the implicit function theorem:

    .. math:: d\log p = (I - \mathbf{1} p^\top)\, \beta\,
        \Big(dr - r\, \frac{\mathrm{Cov}_p(r, dr)}{\mathrm{Var}_p(r)}\Big),

    The bracket is dr less its regression on r. The gradient grows like 1/spread(r), as that of a normalisation layer
    does. It can be differentiated again.

    A row that is constant up to rounding gives the uniform distribution and gradient zero. If ties make the perplexity
    unreachable, the nearest reachable one is taken, and the gradient treats :math:`\beta` as a constant.

    Args:
        r: scores ``(..., n)``. The computation runs in float64 where the device has it.
        perplexity: the wanted exp(entropy), between 1 and n. A value outside is moved to the nearer of the two.

    Returns:
        ``(..., n)``, float64 for float64 scores and float32 otherwise.

    Raises:
        TypeError, ValueError: ``r`` is no floating-point tensor with a dimension, or ``perplexity`` is not positive.

    Source: van der Maaten and Hinton, *Visualizing data using t-SNE*, JMLR 2008, for the calibration.

    Example:
        >>> import torch
        >>> from otloss.cvsim import log_softmax_with_perplexity
        >>> p = log_softmax_with_perplexity(torch.randn(3, 100), perplexity=25).exp()
        >>> torch.special.entr(p).sum(-1).exp().round(decimals=2).tolist()
        [25.0, 25.0, 25.0]
    """
    check_tensor("r", r, 1, "(..., n)")
    check_number("perplexity", perplexity, positive=True)
    n = r.shape[-1]
    result_dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    if perplexity >= n:
        return (0.0 * r.to(result_dtype)).log_softmax(-1)  # uniform, and still part of the graph
    target = math.log(max(perplexity, 1.0))

    with no_autocast(r):
        # Bring each row to mean 0 and spread 1. The wanted inverse temperature is then of order 1. The result does not
        # depend on the mean and the spread, so the gradient treats them as constants.
        work = wide(r)
        center = work.detach().mean(-1, keepdim=True)
        spread = (work.detach() - center).square().mean(-1, keepdim=True).sqrt()
        rounding = 8 * torch.finfo(r.dtype).eps * work.detach().abs().amax(-1, keepdim=True)
        flat = spread <= rounding
        z = (work - center) / torch.where(flat, 1.0, spread)

        with torch.no_grad():
            t, reached = _solve_log_beta(z, target)
            ready = reached & ~flat
        # A Newton step that starts at the root keeps the root's value and gives it a derivative. One step makes the
        # derivatives exact to first order, two steps to third order.
        for _ in range(2):
            gap, slope = _entropy_gap(z, t, target)
            t = t - torch.where(ready, gap / torch.where(ready, slope, 1.0), 0.0)
        beta = torch.where(flat, 0.0, t.exp())
        return (beta * z).log_softmax(-1).to(result_dtype)


def _entropy_gap(z: Tensor, t: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """Entropy of softmax(exp(t) z) less ``target``, and its derivative by t, which is -Var_p(exp(t) z)."""
    logits = t.exp() * z
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    mean = (p * logits).sum(-1, keepdim=True)
    variance = (p * (logits - mean).square()).sum(-1, keepdim=True)
    return -(p * log_p).sum(-1, keepdim=True) - target, -variance


def _fake_log_beta(z: Tensor, target: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z[..., :1]), torch.empty_like(z[..., :1], dtype=torch.bool)


@one_operator("solve_log_beta", _fake_log_beta)
def _solve_log_beta(z: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """The root t of `_entropy_gap`, and whether it was found.

    Bisection narrows t to an interval of length 22/2^12 = 0.005. Newton's method follows. Each score enters through
    exp(-exp(t) distance), so the entropy changes only over lengths of t of 0.1 and more. From an interval this short,
    Newton's method therefore converges quadratically. The number of steps is fixed, so nothing waits for the device.
    """
    z = z - z.amax(-1, keepdim=True)
    low, high = torch.full_like(z[..., :1], -12.0), torch.full_like(z[..., :1], 10.0)
    for _ in range(12):
        t = 0.5 * (low + high)
        above = _shifted_gap(z, t, target)[0] > 0
        low, high = torch.where(above, t, low), torch.where(above, high, t)
    t = 0.5 * (low + high)
    for _ in range(4):
        gap, slope = _shifted_gap(z, t, target)
        t = torch.clamp(t - gap / slope.clamp(max=-1e-30), low, high)
    gap, slope = _entropy_gap(z, t, target)
    return t, (gap.abs() < 1e-6) & (slope < -1e-10)


def _shifted_gap(z: Tensor, t: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """`_entropy_gap` for rows with maximum 0. It takes one exponential per score; its slope is less accurate."""
    beta = t.exp()
    e = (beta * z).exp()
    ez = e * z
    total = e.sum(-1, keepdim=True)
    mean = ez.sum(-1, keepdim=True) / total
    variance = (ez * z).sum(-1, keepdim=True) / total - mean.square()
    return total.log() - beta * mean - target, -beta.square() * variance
