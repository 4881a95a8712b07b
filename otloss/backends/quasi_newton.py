r"""The accelerated solve of the reference backend: a quasi-Newton method on the dual with a guard.

With :math:`q` the sums of the plan's columns relative to b, where the rows are exact, the dual
:math:`D(g) = \langle a, f(g) \rangle + \langle b, g \rangle` has the gradient :math:`b (1 - q)`, and a plain iteration
is the step :math:`-\varepsilon \log q`. Limited-memory BFGS, on the changes of that step, proposes a better one. It is
kept only if it raises :math:`D / \varepsilon` by half the square of the marginal error, which Pinsker's inequality
promises of a plain iteration; else a plain one follows. ``csrc/course.hpp`` derives the test and says when which step
is tried. It holds the same constants.

Where plain iterations crawl, the problem is solved roughly at larger eps first. Every stage ends with a plain
half-step. A set with itself takes mixed steps for plain ones. Each problem of the batch has a course of its own; the
batch advances in lockstep.

Source: Liu and Nocedal 1989 for the quasi-Newton step; Schmitzer 2019 (arXiv 1610.06519) for the stages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from otloss.backends.protocol import Problem
from otloss.backends.steps import Opened

MEMORY, PATIENCE, FACTOR, STAGE_SWEEPS = 8, 20, 4.0, 50
MOST_RANGE, MOST_PLAIN_RANGE, COARSE_GOAL = 6.0, 3.0, 0.05


def start(g: Tensor, minima: Tensor, eps: float) -> Tensor:
    """Where to start instead of at g: at the minima of the columns, where kernels would lose the sum of a column."""
    lost_beyond = 40 if g.dtype == torch.float32 else 200
    return torch.where(minima.amax(-1, keepdim=True) > lost_beyond * eps, g + minima, g)


def is_symmetric(problem: Problem) -> Tensor:
    """Which problems ``(B, 1)`` are those of a set with itself: the same masses, and the same features or C = C'."""
    left, right, a, b = problem.left, problem.right, problem.a, problem.b
    other = left.mT if right is None else right
    if a.shape != b.shape or left.shape != other.shape:
        return torch.zeros_like(a[:, :1], dtype=torch.bool)
    return (a == b).all(-1, keepdim=True) & (left == other).flatten(1).all(-1, keepdim=True)


class Courses:
    """The courses of a batch from this g; what has one number per problem has shape ``(B, 1)``.

    ``same (B, 1)`` says which problems are those of a set with itself; ``apart (B, m)`` is f - g at their solution.
    """

    def __init__(self, steps: Opened, g: Tensor, max_iter: int, tol: float, same: Tensor, apart: Tensor) -> None:
        a, b, log_a, log_b, eps = steps.a, steps.b, steps.log_a, steps.log_b, steps.eps
        self.same, self.apart = same, apart
        self.cost, self.log_a, self.log_b = steps.cost, log_a, log_b
        self.base, self.tol, self.max_iter = eps, tol, max_iter
        self.live = log_b > -torch.inf
        self.a, self.root = torch.where(log_a > -torch.inf, a, 0.0), torch.where(self.live, b, 0.0).sqrt()
        self.unroot = torch.where(self.live, 1 / torch.where(self.live, self.root, 1.0), 0.0)
        number, whole, flag = (
            a.new_zeros(len(a), 1),
            a.new_zeros(len(a), 1, dtype=torch.int64),
            b.new_ones(len(a), 1) > 0,
        )
        self.watching = flag & (max_iter >= 4 * PATIENCE)
        self.eps, self.goal, self.cap = number + eps, number + tol, whole + max_iter
        self.sweeps, self.first, self.wasted, self.level = whole, whole, whole, whole
        self.error, self.rate, self.slope, self.range, self.plain_range = number, number, number, number, number
        self.way = number - 1
        self.active, self.fresh = flag, flag
        self.newton, self.going, self.waiting = ~flag, ~flag, ~flag  # waiting: its last pair is added to the next
        self.f, self.g, self.plain = torch.zeros_like(a), torch.where(self.live, g, 0.0), torch.zeros_like(b)
        self.residual = self.gradient = self.step = torch.zeros_like(b)
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # steps, changes of the residual, 1 / <step, change>

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """f, g and the number of sweeps of each problem; points without mass keep g = 0."""
        point = self.g
        while self.active.any():
            f, plain = self._sweep(point)
            # Steps are in units of eps times sqrt(b), gradients divided by sqrt(b): inner products are plain.
            log_scaling = torch.where(self.live, (plain - point) / self.eps, 0.0)
            residual, gradient = self.root * log_scaling, -self.root * torch.expm1((-log_scaling).clamp(max=60))
            error = (self.root * gradient.abs()).sum(-1, keepdim=True)
            self.sweeps = self.sweeps + self.active
            kept = self._judge(error, _inner(gradient, self.step), f)
            self._remember(kept, residual)
            self.rate = torch.where(kept & ~self.newton & ~self.fresh, error / self.error, self.rate)
            self.fresh = self.fresh & ~kept
            self.error, self.plain_range = (
                torch.where(kept, new, old)
                for new, old in ((error, self.error), (_range(log_scaling), self.plain_range))
            )
            self.f, self.g, self.plain, self.residual, self.gradient = (
                torch.where(kept, new, old)
                for new, old in (
                    (f, self.f),
                    (point, self.g),
                    (plain, self.plain),
                    (residual, self.residual),
                    (gradient, self.gradient),
                )
            )
            self._find_the_way(kept)
            moving = self._end_stages()
            point = self._next_point(moving)
        return self.f, self.g, self.sweeps.squeeze(-1)

    def _sweep(self, g: Tensor) -> tuple[Tensor, Tensor]:
        eps = self.eps.unsqueeze(-1)
        f = -self.eps * torch.logsumexp((g.unsqueeze(-2) - self.cost) / eps + self.log_b.unsqueeze(-2), -1)
        columns = (f.unsqueeze(-1) - self.cost) / eps + self.log_a.unsqueeze(-1)
        return f, torch.where(self.live, -self.eps * torch.logsumexp(columns, -2), 0.0)

    def _judge(self, error: Tensor, slope: Tensor, f: Tensor) -> Tensor:
        """Which problems keep the point of this sweep."""
        enough = self.error**2 / 2
        c = 0.5 - self.range / 12
        by_slopes = c * self.slope + (1 - c) * slope >= enough
        change = torch.where(self.a > 0, self.a * (f - self.f), 0.0).sum(-1, keepdim=True) / self.eps
        raised = (enough > 16 * torch.finfo(f.dtype).eps) & (change + _inner(self.root, self.step) >= enough)
        rejected = self.active & self.newton & ~by_slopes & ~raised
        self.wasted = self.wasted + rejected
        self._forget(rejected)
        return self.active & ~rejected

    def _remember(self, kept: Tensor, residual: Tensor) -> None:
        some = kept & ~self.fresh
        step, change = torch.where(some, self.step, 0.0), torch.where(some, self.residual - residual, 0.0)
        if self.pairs:
            last_step, last_change, _ = self.pairs[-1]
            step = step + torch.where(self.waiting, last_step, 0.0)
            change = change + torch.where(self.waiting, last_change, 0.0)
        along, size = _inner(step, change), _inner(change, change)
        rounding = size <= (8 * torch.finfo(step.dtype).eps) ** 2
        tells = (along > 0) & (along**2 > 1e-10 * _inner(step, step) * size) & ~rounding
        self.pairs = [*self.pairs, (step, change, torch.where(tells, 1 / along, 0.0))][-MEMORY:]
        self.waiting = some & rounding

    def _forget(self, where: Tensor) -> None:
        self.waiting = self.waiting & ~where
        self.pairs = [(step, change, torch.where(where, 0.0, weight)) for step, change, weight in self.pairs]

    def _crawls(self) -> Tensor:
        slow = (self.error > COARSE_GOAL) & (self.rate > 0.7) & ~self._soon(80)
        return self.watching & (self.sweeps - self.first >= PATIENCE) & slow

    def _find_the_way(self, kept: Tensor) -> None:
        """The way that crawling problems have to go: the mean of (C - f - g) / eps under a b', where it is allowed."""
        asks = kept & (self.way < 0) & self._crawls()
        if not asks.any():
            return
        weights = self.a.unsqueeze(-1) * (self.root**2).unsqueeze(-2)
        counts = (weights > 0) & (self.cost < torch.inf)
        left = torch.where(counts, self.cost - self.f.unsqueeze(-1) - self.g.unsqueeze(-2), 0.0)
        way = ((weights * left).sum((-1, -2)).unsqueeze(-1) / self.eps).clamp(min=0)
        self.way = torch.where(asks, way, self.way)
        for count in range(16):
            self.level = self.level + (asks & (way / 2 >= FACTOR ** (count + 1)))
        self.watching = self.watching & ~(asks & (self.level == 0))

    def _end_stages(self) -> Tensor:
        """Ends the stages that are over; returns which problems have a next one."""
        early = self._crawls() & (self.way >= 0) & (20 * self.plain_range <= self.way)
        over = self.active & ((self.error < self.goal) | (self.sweeps >= self.cap) | early)
        self.g = torch.where(over, self.plain, self.g)
        moving = over & torch.where(self.watching, early, self.level > 0)
        self.active = self.active & (moving | ~over)
        self.level = self.level - (moving & ~self.watching).long()
        self.watching, self.going = self.watching & ~moving, self.going & ~moving
        self.newton, self.fresh = self.newton & ~moving, self.fresh | moving
        self.rate = torch.where(moving, 0.0, self.rate)
        self.first = torch.where(moving, self.sweeps, self.first)
        coarse = self.level > 0
        self.goal = torch.where(moving & coarse, max(self.tol, COARSE_GOAL), torch.where(moving, self.tol, self.goal))
        short = (self.sweeps + STAGE_SWEEPS).clamp(max=self.max_iter // 2)
        self.cap = torch.where(moving, torch.where(coarse, short, self.max_iter), self.cap)
        self.eps = torch.where(moving, self.base * FACTOR ** self.level.to(self.eps.dtype), self.eps)
        self._forget(moving)
        return moving

    def _soon(self, sweeps: int) -> Tensor:
        """Whether so many plain iterations will do, at the rate of the last one."""
        return (self.rate < 1) & (self.error * self.rate**sweeps <= self.goal)

    def _next_point(self, moving: Tensor) -> Tensor:
        wanted = self.active & ~moving & (self.plain_range <= MOST_PLAIN_RANGE) & (self.rate > 0.3)
        wanted = wanted & (10 * self.wasted + 7 <= self.sweeps) & (self.going | ~self._soon(8))
        wanted = wanted & torch.stack([weight > 0 for _, _, weight in self.pairs]).any(0)
        step = self._direction()
        slope, log_scaling = _inner(self.gradient, step), step * self.unroot
        newton = wanted & (slope > 0)
        self._forget(wanted & ~newton)
        spread = _range(log_scaling)
        shorter = (MOST_RANGE / spread).clamp(max=1)
        self.newton, self.going = newton, self.going | newton
        self.slope, self.range = slope * shorter, spread.clamp(max=MOST_RANGE)
        by_newton = self.g + self.eps * log_scaling * shorter
        mixed, by_plain = self._mixed()
        mixing = self.same & ~self.going & ((self.sweeps - self.first < 5) | (self.rate <= 0.5))
        by_plain = torch.where(mixing, by_plain, self.residual)
        point = torch.where(self.active & ~moving, torch.where(mixing, mixed, self.plain), self.g)
        point = torch.where(newton, by_newton, point)
        self.step = torch.where(newton, step * shorter, torch.where(self.active & ~moving, by_plain, 0.0))
        return point

    def _mixed(self) -> tuple[Tensor, Tensor]:
        """The point and the step that a set with itself takes for a plain one; csrc/quasi_newton.hpp says why."""
        if not self.same.any():
            return self.plain, self.residual
        change = ((self.f - self.apart - self.g) + (self.plain - self.g)) * 8 / 17
        change = torch.where(self.live & self.same, change, 0.0)
        return self.g + change, self.root * change / self.eps

    def _direction(self) -> Tensor:
        """The two loops of limited-memory BFGS; a pair of weight 0 does nothing."""
        direction, factors = self.residual, []
        for step, change, weight in reversed(self.pairs):
            factors.append(weight * _inner(step, direction))
            direction = direction - factors[-1] * change
        for (step, change, weight), factor in zip(self.pairs, reversed(factors), strict=True):
            direction = direction + (factor - weight * _inner(change, direction)) * step
        return direction


def _range(log_scaling: Tensor) -> Tensor:
    """How far log-scalings reach, 0 among them."""
    top, bottom = log_scaling.amax(-1, keepdim=True), log_scaling.amin(-1, keepdim=True)
    return top.clamp(min=0) - bottom.clamp(max=0)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)
