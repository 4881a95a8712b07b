"""A problem as the kernels see it, and how they are launched."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otloss.backends.massless import live
from otloss.backends.protocol import Problem, Shift, is_relaxed
from otloss.backends.relaxed import penalties
from otloss.backends.steps import without_forbidden
from otloss.backends.triton import config, features, mixed, product, stream
from otloss.compat import cuda_event

MOST_BLOCKS = 65535  # of a grid's second and third dimension
BURST = 8  # steps between two looks at the device


class View(NamedTuple):
    """A problem seen from its rows or from its columns; see ``tiles.py``."""

    left: Tensor
    right: Tensor | None
    min_i: Tensor | None
    min_j: Tensor | None
    n: int
    m: int
    d: int
    si: int
    sj: int
    kind: str


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, tile: config.Tile, **options: Any) -> None:
    """Launch a kernel on a grid, with the warps, stages and registers of a tile; an empty grid does nothing.

    Raises:
        ValueError: CUDA has no grid of that many blocks; only the first dimension may have more than 65535.
    """
    if max(grid[1:], default=0) > MOST_BLOCKS:
        raise ValueError(
            f"the triton backend takes fewer points, about two million a side: CUDA has no grid of {grid} blocks; "
            "give backend='reference'"
        )
    if min(grid) > 0:
        kernel[grid](*args, **options, num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers)


class DeviceProblem:
    """Inputs made contiguous, what the cost takes of features, both views; half precision is read as it is.

    The cost of features is stored in ``cost``, or in ``kept`` if that is given, which holds it already if it is
    ``made``. ``cost`` is None where it would be too large (``config.STORED_BYTES``): then both views are of features.
    The views are of the cost less ``shift``, if one is given or taken out. ``penalties`` and ``soft`` (count, 2), which
    is eps/rho and 0 for a constraint, are None unless a marginal has a penalty.
    """

    x: Tensor
    y: Tensor
    of_x: Tensor | None
    """A number of each row: 1/|x| for "cosine", |x|^2 for "sqeuclidean"."""
    of_y: Tensor | None

    def __init__(
        self, problem: Problem, kept: Tensor | None = None, made: bool = False, shift: Shift | None = None
    ) -> None:
        left, right, a, b, eps = problem.left, problem.right, problem.a, problem.b, problem.eps
        if a.dtype not in (torch.float32, torch.float64) or b.dtype != a.dtype:
            raise TypeError(
                f"the triton backend takes float32 or float64 masses of one dtype, not {a.dtype}, {b.dtype}"
            )
        self.left, self.a, self.b, self.eps = left.contiguous(), a.contiguous(), b.contiguous(), eps
        self.right = None if right is None else right.contiguous()
        self.count, self.n, last = left.shape
        self.m, self.d = (last, 0) if right is None else (right.shape[1], last)
        self.dtype, self.double = a.dtype, a.dtype == torch.float64
        self.kind = problem.kind
        self.rhos, self.penalties, self.soft = (problem.rho_a, problem.rho_b), None, None
        if is_relaxed(problem):
            self.penalties, rhos = penalties(problem), self.rhos
            self.soft = torch.stack([self.zeros(self.count) if rho is None else eps / rho for rho in rhos], -1)
        self.cost = self.left if self.right is None else kept
        if self.right is not None:
            self._make_of_features(self.left, self.right)
            if not made and (kept is not None or config.groups(1, self.n, self.m, self.double)):
                constant = 1.0 if self.kind == "cosine" else 0.0
                self.cost = self.product(self.x, self.y.mT, constant, self._squares(), kept)
        self._set_views(shift)
        self.regime = "large" if self.cost is None else config.regime(self.n, self.m, self.double)
        if os.environ.get("OTLOSS_TRITON_AUTOTUNE") == "1" and self.count:
            for view in (self.rows, self.columns):
                self._tune(view, timed)

    def _set_views(self, shift: Shift | None) -> None:
        self.shift = None if shift is None else Shift(shift.rows.contiguous(), shift.columns.contiguous())
        by_rows, by_columns = self.shift or (None, None)
        if self.cost is None:
            of_x, of_y = self._squares() or (None, None)
            self.rows = View(self.x, self.y, of_x, of_y, self.n, self.m, self.d, 0, 0, self.kind)
            self.columns = View(self.y, self.x, of_y, of_x, self.m, self.n, self.d, 0, 0, self.kind)
        else:
            self.rows = View(self.cost, None, by_rows, by_columns, self.n, self.m, 0, self.m, 1, "stored")
            self.columns = View(self.cost, None, by_columns, by_rows, self.m, self.n, 0, 1, self.m, "stored")

    def with_masses(self, a: Tensor, b: Tensor) -> DeviceProblem:
        """The same cost with other masses."""
        other = copy.copy(self)
        other.a, other.b = a.contiguous(), b.contiguous()
        return other

    def comparable(self) -> tuple[Tensor | None, Tensor | None, int]:
        """What tells whether a problem is that of a set with itself (``mixed.are_same``), and the length of its rows.

        That is both sides' features, or the cost and None; nothing where shapes or penalties exclude it.
        """
        one_sided = (self.rhos[0] is None) != (self.rhos[1] is None)
        if self.n != self.m or self.n == 1 or one_sided:
            return None, None, 0
        return self.left, self.right, self.n if self.right is None else self.d

    def same_sets(self) -> Tensor | None:
        """Which problems ``(B,)`` are those of a set with itself, 1 or 0; None where all are excluded."""
        one, other, width = self.comparable()
        if one is None:
            return None
        same = self.a.new_ones(self.count, dtype=torch.int32)
        rows, cols = config.COMPARED
        launch(
            mixed.find_same, (self.count, -(-self.n // rows)), one, other, self.a, self.b, self.soft, same, self.n,
            width, I=rows, J=cols, tile=config.VECTORS,
        )  # fmt: skip
        return same

    def take_minima_out(self) -> None:
        """Take the minima of rows, then of columns, out of a dense cost: two launches, each reads the cost once."""
        if self.right is None:
            by_rows = self._minima(self.rows, None, self.b)
            self._set_views(Shift(by_rows, self._minima(self.columns, by_rows, self.a)))

    def _minima(self, view: View, min_j: Tensor | None, mass: Tensor) -> Tensor:
        tile = config.stream(view.n, view.m, 0, self.double)
        splits = self.split(view, tile)
        part = self.empty(splits, self.count, view.n)
        launch(
            stream.minima, (self.count, -(-view.n // tile.rows), splits),
            view.left, min_j, mass, part, self.count, view.n, view.m, view.si, view.sj, splits,
            I=tile.rows, J=tile.cols, tile=tile,
        )  # fmt: skip
        return without_forbidden(part[0] if splits == 1 else part.amin(0))

    def _tune(self, view: View, timer: Callable[[Callable[[], None]], float]) -> None:
        """Remember the fastest tile of a half-step, unless its bucket is known or the caller captures a graph."""
        key = config.bucket(view.n, view.m, view.d, self.double)
        on_gpu = self.a.device.type == "cuda"
        if key in config.TUNED or (on_gpu and torch.cuda.is_current_stream_capturing()):
            return
        g, mass, out = (
            self.zeros(self.count, view.m),
            self.zeros(self.count, view.m) + 1,
            self.empty(self.count, view.n),
        )
        times: dict[config.Tile, float] = {}
        fitting = (tile for tile in config.STREAM_CANDIDATES if tile.rows <= key[0] and tile.cols <= key[1])
        for tile in dict.fromkeys((config.stream(view.n, view.m, view.d, self.double), *fitting)):  # the default first
            config.TUNED[key] = tile
            times[tile] = timer(lambda: self.half_step(view, g, mass, out, None, 0, 1))
        config.TUNED[key] = min(times, key=times.__getitem__)

    def _make_of_features(self, left: Tensor, right: Tensor) -> None:
        """``x`` and ``y``, whose products the cost is made of; see ``features.py``."""
        if self.kind == "dot":
            self.x, self.y, self.of_x, self.of_y = left.to(self.dtype), right.to(self.dtype), None, None
            return
        centre = None
        if self.kind == "sqeuclidean":
            centre = (_mean(left, self.a) + _mean(right, self.b)) / 2
        self.x, self.of_x = self._rows_of(left, centre)
        self.y, self.of_y = self._rows_of(right, centre)

    def _rows_of(self, x: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor]:
        made, number = x.new_empty(x.shape, dtype=self.dtype), x.new_empty(x.shape[:2], dtype=self.dtype)
        if centre is None:
            self._launch_on_rows(features.unit_rows, x, x, made, number)
        else:
            self._launch_on_rows(features.centred_rows, x, x, centre, made, number, x.shape[1])
        return made, number

    def _launch_on_rows(self, kernel: Any, x: Tensor, *args: Any) -> None:
        """A kernel of ``features.py`` on all rows of ``x``."""
        block, count = config.FEATURE_ROWS, x.shape[0] * x.shape[1]
        launch(
            kernel, (-(-count // block),), *args, count, self.d, I=block, K=config.feature_depth(self.d),
            tile=config.VECTORS,
        )  # fmt: skip

    def _squares(self) -> tuple[Tensor, Tensor] | None:
        """Squares of the lengths of both sides' points, where the cost is made of them."""
        if self.kind != "sqeuclidean" or self.of_x is None or self.of_y is None:
            return None
        return self.of_x, self.of_y

    def features_back(
        self, x: Tensor, made: Tensor, number: Tensor | None, grad: Tensor, weight: Tensor | None
    ) -> Tensor:
        """The gradient of ``x`` from that of what was made of it; ``weight`` holds the sums of dC over its rows."""
        if self.kind == "dot":
            return grad.to(x.dtype)
        out = torch.empty_like(x)
        if self.kind == "cosine":
            self._launch_on_rows(features.unit_rows_back, x, made, number, grad, out)
        else:
            self._launch_on_rows(features.centred_rows_back, x, made, weight, grad, out)
        return out

    def product(
        self, left: Tensor, right: Tensor, shift: float, squares: tuple[Tensor, Tensor] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``shift`` - left right of each problem, or a squared distance; an operand may be transposed."""
        (_, rows, depth), cols = left.shape, right.shape[2]
        of_left, of_right = squares or (None, None)
        if self.double:  # Triton multiplies no float64 before 3.6, and PyTorch has no lower precision for it
            made = left @ right
            if of_left is None or of_right is None:
                made.neg_().add_(shift)
            else:
                made.mul_(-2).add_(of_left.unsqueeze(2)).add_(of_right.unsqueeze(1)).clamp_(min=0)
            return made if out is None else out.copy_(made)
        out = self.empty(self.count, rows, cols) if out is None else out
        tile = config.product(rows, cols)
        launch(
            product.product, (self.count, -(-rows // tile.rows), -(-cols // tile.cols)),
            left, right, of_left, of_right, out, rows, cols, depth, *left.stride()[1:], *right.stride()[1:],
            SHIFT=shift, I=tile.rows, J=tile.cols, K=tile.depth,
            tile=tile,
        )  # fmt: skip
        return out

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.a.new_empty(shape, dtype=dtype or self.dtype)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.a.new_zeros(shape, dtype=dtype or self.dtype)

    def scalars(self, weight: Tensor | None) -> Tensor:
        """A weight per problem; None is zero."""
        return self.zeros(self.count) if weight is None else weight.contiguous()

    def split(self, view: View, tile: config.Tile) -> int:
        """How many programs share the columns of a view."""
        programs = self.count * -(-view.n // tile.rows)
        return config.splits(programs, -(-view.m // tile.cols), processors(self.a.device))

    def row_blocks(self) -> tuple[config.Tile, int, int]:
        """The tile of a medium problem, how many programs share its rows, and how many tiles each takes."""
        tile = config.medium(self.m, self.double)
        return tile, *config.row_blocks(self.count, self.n, tile.rows, tile.programs * processors(self.a.device))

    def half_step(
        self, view: View, g: Tensor, mass: Tensor, out: Tensor, gate: Tensor | None, least: int, splits: int
    ) -> None:
        """``stream.half_step`` of a view; ``out`` holds ``splits`` parts."""
        tile = config.stream(view.n, view.m, view.d, self.double)
        launch(
            stream.half_step, (self.count, -(-view.n // tile.rows), splits),
            *view[:4], g, mass, out, gate, least, self.count, *view[4:9], self.eps, splits,
            KIND=view.kind, I=tile.rows, J=tile.cols, K=tile.depth, tile=tile,
        )  # fmt: skip

    def potential(self, view: View, g: Tensor, mass: Tensor) -> Tensor:
        """One half-step in the log-domain of every row of a view, dead or not; 0 where all with mass is forbidden."""
        splits = self.split(view, config.stream(view.n, view.m, view.d, self.double))
        part = self.empty(splits, self.count, view.n)
        self.half_step(view, g, mass, part, None, 0, splits)
        potential = part[0] if splits == 1 else -self.eps * torch.logsumexp(part / -self.eps, 0)
        return potential if self.right is not None else without_forbidden(potential)

    def sums(
        self, view: View, f: Tensor, g: Tensor, alpha: Tensor, beta: Tensor | None = None, gamma: Tensor | None = None,
        *, reduced: bool = False,
    ) -> Tensor:  # fmt: skip
        """``stream.sums`` of a view: one row per channel."""
        tile = config.stream(view.n, view.m, view.d, self.double)
        splits = self.split(view, tile)
        out = self.empty(splits, 1 + (beta is not None) + (gamma is not None), self.count, view.n)
        self.launch_sums(view, f, g, alpha, None, 1, beta, gamma, out, None, splits, reduced)
        return out.sum(0)

    def launch_sums(
        self, view: View, f: Tensor, g: Tensor, alpha: Tensor, scale: Tensor | None, parts: int, beta: Tensor | None,
        gamma: Tensor | None, out: Tensor, gate: Tensor | None, splits: int, reduced: bool = False,
    ) -> None:  # fmt: skip
        tile = config.stream(view.n, view.m, view.d, self.double)
        launch(
            stream.sums, (self.count, -(-view.n // tile.rows), splits),
            *view[:4], f, g, alpha, scale, parts, beta, gamma, out, gate, self.count, *view[4:9], self.eps, splits,
            REDUCED=reduced, KIND=view.kind, I=tile.rows, J=tile.cols, K=tile.depth,
            tile=tile,
        )  # fmt: skip


def _mean(x: Tensor, mass: Tensor) -> Tensor:
    """The mean ``(B, d)`` of the points with mass; a mask has moved the others to 0."""
    alive = live(mass)
    total = torch.where(alive.unsqueeze(-1), x, 0.0).sum(1, dtype=mass.dtype)
    return total / alive.sum(1, keepdim=True).clamp(min=1)


def timed(run: Callable[[], None]) -> float:
    """Milliseconds of a launch, warm."""
    import triton.testing

    return float(triton.testing.do_bench(run))


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; off a GPU a number that makes splits appear on small problems."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def iterate(step: Callable[[], None], most: int, running: Tensor, captured: int | None = None) -> None:
    """Run ``step`` until no problem is running, at most ``most`` times.

    The steps decide on the device, and steps beyond the last change nothing. The host launches eight at a time. Then
    it waits for the eight before, not for these: the device always has work. While a caller captures a CUDA graph
    nobody can look: the graph holds all ``most`` steps, or ``captured`` if that is given, and a replay pays a few
    microseconds for each that has nothing left to do.
    """
    on_gpu = running.device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        for _ in range(min(most, captured or most)):
            step()
        return
    before: Callable[[], bool] | None = None
    for done in range(0, most, BURST):
        for _ in range(min(BURST, most - done)):
            step()
        if before is not None and not before():
            return
        before = _look(running)


def _look(running: Tensor) -> Callable[[], bool]:
    """Ask the device now whether a problem is running; the function that is returned waits for the answer."""
    if running.device.type != "cuda":
        answer_now = bool(running.any())
        return lambda: answer_now
    answer = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(running.any(), non_blocking=True)
    event = cuda_event()
    event.record()

    def wait() -> bool:
        event.synchronize()
        return bool(answer)

    return wait
