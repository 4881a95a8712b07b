"""The tensors of the soak test's problems. Those of a problem depend on the seed, its group and its number alone."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from benchmarks.soak.settings import Setting
from benchmarks.solver import random_cost

Tensors = dict[str, Tensor]

LEAST_SHARE = 1e-25
"""Of a mass that is not 0; a share below 1e-30 counts as none in float32, and not in float64."""
JUNK = 7e5
"""What stands where a mask leaves a point out."""
SENT = 0.45
"""Of a partial problem, where that is a number: less than any total."""


def _points(s: Setting, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    d = s.d or 2
    x, y = (torch.randn(k, d, generator=rng, dtype=torch.float64) for k in (s.n, s.m))
    if s.content == "relu":  # some rows are zero, many entries are
        x, y = (t.relu() * (torch.rand(len(t), 1, generator=rng) < 0.8) for t in (x, y))
    elif s.content == "equal":
        x, y = x[:1].expand(s.n, d), x[:1].expand(s.m, d)
    elif s.content == "same":
        y = x[torch.arange(s.m) % s.n]
    elif s.content == "repeated":
        x = x[torch.randint(max(1, s.n // 3), (s.n,), generator=rng)]
    if s.kind == "sqeuclidean" or s.kind == "dense":
        x, y = x / (2 * d) ** 0.5, y / (2 * d) ** 0.5
    elif s.kind == "dot":
        x, y = x / d**0.25, y / d**0.25
    size = {"tiny": 1e-12, "far": 1.0}.get(s.content, 1.0) * (1.0 if s.kind == "dense" else s.scale**0.5)
    away = 1000 * s.scale**0.5 if s.content == "far" else 0.0
    return size * x + away, size * y + away


def _matrix(s: Setting, rng: torch.Generator) -> Tensor:
    if s.content == "constant":
        return torch.full((s.n, s.m), s.scale * float(torch.rand((), generator=rng)), dtype=torch.float64)
    if s.content in ("far rows", "negative"):
        cost, rows = random_cost("uniform", s.n, s.m, rng), torch.rand(s.n, 1, generator=rng, dtype=torch.float64)
        return s.scale * (cost + 1e4 * (1 + rows) if s.content == "far rows" else cost - 2)
    return s.scale * random_cost(s.content, s.n, s.m, rng)


def _shares(s: Setting, count: int, live: Tensor, rng: torch.Generator) -> Tensor:
    logits = s.spread * torch.randn(count, generator=rng, dtype=torch.float64)
    if s.zeros:
        live = live & (torch.rand(count, generator=rng) < 0.8)
        live[0] = True
    share = logits.softmax(-1).clamp_min(LEAST_SHARE) * live
    return share / share.sum()


def _problem(s: Setting, index: int) -> Tensors:
    """The tensors of one problem, in float64. The first point of each side always takes part and has mass."""
    rng = torch.Generator().manual_seed(random.Random(f"{s.seed}:{s.group}:{index}").getrandbits(60))
    left = torch.Generator().manual_seed(random.Random(f"{s.seed}:{s.group}").getrandbits(60)) if s.shared else rng
    t: Tensors = {}
    if s.kind == "dense" and not s.divergence:
        t["cost"] = _matrix(s, left)
    else:
        t["x"], t["y"] = _points(s, left)
    masks = {}
    for name, count in (("mask_x", s.n), ("mask_y", s.m)):
        kept = torch.rand(count, generator=rng) < 0.7
        if s.masked == "ragged":
            kept = torch.arange(count) < torch.randint(1, count + 1, (), generator=rng)
        kept[0] = True
        masks[name] = kept if s.masked else torch.ones_like(kept)
    if s.forbidden:
        allowed = torch.rand(s.n, s.m, generator=rng) < 0.6
        allowed[0] = allowed[:, 0] = True
        t["cost"] = t["cost"].masked_fill(~allowed, torch.inf)
        plan = 0.1 + torch.rand(s.n, s.m, generator=rng, dtype=torch.float64)
        plan = plan * allowed * masks["mask_x"][:, None] * masks["mask_y"]
        shares = {"a": plan.sum(-1) / plan.sum(), "b": plan.sum(-2) / plan.sum()}
    else:
        shares = {"a": _shares(s, s.n, masks["mask_x"], rng), "b": _shares(s, s.m, masks["mask_y"], rng)}
    totals = 0.5 + 1.5 * torch.rand(2, generator=rng, dtype=torch.float64)
    if not (s.relaxed or s.partial) or s.forbidden:
        totals[1] = totals[0]
    for side, form, total in zip("ab", s.masses, totals, strict=True):
        given = torch.where(masks["mask_x" if side == "a" else "mask_y"], total * shares[side], 0.3)  # 0.3 is left out
        if form != "uniform":
            t["log_" * (form == "logs") + side] = given.log() if form == "logs" else given
    if s.masked:
        t |= masks
        for name, kept in (("x", masks["mask_x"]), ("y", masks["mask_y"])):
            if name in t and s.verb != "SinkhornLoss":
                t[name] = t[name].masked_fill(~kept[:, None], JUNK)
        if "cost" in t:
            t["cost"] = t["cost"].masked_fill(~(masks["mask_x"][:, None] & masks["mask_y"]), JUNK)
    vary = 0.8 + 0.4 * torch.rand(4, generator=rng, dtype=torch.float64)
    if s.tensor_eps:
        t["eps"] = s.eps * vary[0]
    for k, side in enumerate("ab"):
        if s.rho[k] == "tensor":
            t[f"rho_{side}"] = s.rho_size * vary[1 + k]
    if s.partial:
        least = min(1.0 if form == "uniform" else float(total) for form, total in zip(s.masses, totals, strict=True))
        sent = least * (0.05 + 0.9 * torch.rand((), generator=rng, dtype=torch.float64))
        t["partial"] = sent if s.partial == "tensor" else torch.tensor(SENT, dtype=torch.float64)
    if s.init:
        size = s.scale * (0.1 if s.init == "near" else 10.0)
        t["f"], t["g"] = (size * torch.randn(k, generator=rng, dtype=torch.float64) for k in (s.n, s.m))
    shapes = {"plan": [(s.n, s.m)], "log_plan": [(s.n, s.m)], "potentials": [(s.n,), (s.m,)], "barycentric": [(s.n, 3)]}
    for k, shape in enumerate(shapes.get(s.output, [()])):
        t[f"weight {k}"] = torch.randn(shape, generator=rng, dtype=torch.float64)
    if s.output == "barycentric":
        t["points"] = torch.randn(s.m, 3, generator=rng, dtype=torch.float64)
    if s.verb == "SinkhornLoss":
        x, y = t.pop("x"), t.pop("y")
        for name, p, q in (("cost", x, y), ("cost_xx", x, x), ("cost_yy", y, y)):
            t[name] = s.scale * torch.cdist(p, q, compute_mode="donot_use_mm_for_euclid_dist").square()
    return t


def tensors(s: Setting) -> Tensors:
    """The tensors of all problems of a setting, in its dtype."""
    each = [_problem(s, index) for index in range(s.first, s.first + s.count)]
    dtype, found = s.torch_dtype, {}
    for name in each[0]:
        stacked = torch.stack([t[name] for t in each])
        stacked = stacked if stacked.dtype == torch.bool else stacked.to(dtype)
        if s.strided and stacked.dim() == 3:
            stacked = stacked.mT.contiguous().mT
        if s.shared and name in ("cost", "x", "y") and s.masked != "ragged":
            same = (stacked == stacked[:1]).flatten().all()
            stacked = stacked[0].contiguous().expand_as(stacked) if same else stacked
        found[name] = stacked
    return found
