"""Which kernel serves which size, and the default tile of each; ``benchmarks/gpu_static.py`` compiles every one.

Sizes are rounded up to powers of two, so that a handful of variants serves all shapes. The first call of a size
compiles its variants, about half a second of a processor for each. The defaults were chosen without a GPU, so that no
register spills to memory. With ``OTLOSS_TRITON_AUTOTUNE=1`` the streaming passes time ``STREAM_CANDIDATES`` instead,
once for each bucket of sizes and each process; ``tuned.py`` keeps what was found so on a device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from otloss.backends.triton.tuned import TILES, Bucket
from otloss.compat import cuda_is_initialized

# The largest n and m of each regime; beyond them problems are streamed. Tests lower them.
LIMITS = {"small": 64, "medium": 1024}  # of float32; float64 takes two registers a number
BLOCKS = 32  # of rows in a medium problem: each adds the shares of all
MIN_SIDE = 16  # the least side and depth of a product's tile; from Triton 3.8 on it may be lower
# Bytes of the cost of features that are stored at a time, and of its gradient: what the second-level caches of A100 (40
# MB) and H100 (50 MB) hold beside the rest. A larger batch is solved in groups of problems; the cost of one problem
# that is larger is not stored.
STORED_BYTES = 32 << 20
CAPTURED_STEPS = 256  # of conjugate gradients in a caller's CUDA graph, where nobody sees that all are done


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth (features per product) of a tile, and how many warps and pipeline stages serve it."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int = 2
    programs: int = 1
    """How many run on a multiprocessor at once, so that one computes while another waits."""

    @property
    def registers(self) -> int:
        """The most that a thread may have. Without a bound of ours the assembler may choose a lower one and spill."""
        return min(255, 65536 // (32 * self.warps * self.programs))


def power(size: int, least: int = MIN_SIDE) -> int:
    """The least power of two that is not below ``size`` (nor ``least``)."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def regime(n: int, m: int, double: bool) -> str:
    """ "small", "medium" or "large"."""
    size = max(n, m) * (2 if double else 1)
    return next((name for name, limit in LIMITS.items() if size <= limit), "large")


def small(n: int, m: int, double: bool, relaxed: bool = False) -> Tile:
    """The whole problem in one tile. The iterations under penalties keep more vectors beside it."""
    rows, cols = power(n), power(m)
    held = rows * cols * (2 if double else 1)
    return Tile(rows, cols, 16, 8 if held > (1024 if relaxed else 2048) else 4, 1)


def medium(m: int, double: bool) -> Tile:
    """Blocks of whole rows; two programs run on a multiprocessor, one of them in float64."""
    cols = power(m)
    return Tile(8 if cols > 128 else 16, cols, MIN_SIDE, 8, 1, 1 if double else 2)


def product(rows: int, cols: int) -> Tile:
    """Tiles of a batched product."""
    rows, cols = min(power(rows), 64), min(power(cols), 64)
    return Tile(rows, cols, MIN_SIDE, _warps(rows * cols), 2)


def groups(count: int, n: int, m: int, double: bool) -> int:
    """In how many groups a batch of features is solved, so that the cost of each may be stored; 0: it is not stored.

    In float64 that of one problem always is: the compilers before Triton 3.6 cannot multiply float64.
    """
    most = max(STORED_BYTES // (n * m * (8 if double else 4)), 1 if double else 0)
    return -(-max(count, 1) // most) if most else 0


def row_blocks(count: int, n: int, rows: int, places: int) -> tuple[int, int]:
    """Programs per problem and tiles of rows per program, for the least time if ``places`` programs run at once.

    A program costs its tiles, a sixteenth of one for each share that it adds, and half a tile to begin.
    """
    tiles = -(-n // rows)

    def time(each: int) -> tuple[float, int]:
        blocks = -(-tiles // each)
        return -(-count * blocks // places) * (each + blocks / 16 + 0.5), blocks

    each = min(range(-(-tiles // BLOCKS), tiles + 1), key=time)
    return -(-tiles // each), each


def stream(n: int, m: int, d: int, double: bool) -> Tile:
    """Tiles of a streaming pass: what was timed for the bucket, here or once before, else the default."""
    key = bucket(n, m, d, double)
    if key in TUNED:
        return TUNED[key]
    if key in TILES:
        return Tile(*TILES[key])
    side = 32 if double else 64
    rows, cols = min(power(n), side), min(power(m), side)
    return Tile(rows, cols, 16, _warps(rows * cols), 2)


def _warps(held: int) -> int:
    """Warps that keep so many numbers in registers: four hold 64 x 64 on sm_80 and sm_90, but spill on sm_100."""
    return 8 if held >= 4096 else 4


def bucket(n: int, m: int, d: int, double: bool) -> Bucket:
    """The key under which the tile of a timing is stored."""
    return power(n), power(m), power(d) if d else 0, double, capability()


def capability() -> tuple[int, int] | None:
    """Compute capability of the current device, which is the problem's in a call; None where CUDA is not in use."""
    return _capability(torch.cuda.current_device()) if cuda_is_initialized() else None


_capability = functools.cache(torch.cuda.get_device_capability)

# Tiles found by timing, by bucket, and what is timed (a side that is longer than the problem's is left out).
TUNED: dict[Bucket, Tile] = {}
STREAM_CANDIDATES = [
    Tile(rows, cols, depth, warps, 2)
    for rows, cols, depth, warps in (
        (64, 64, 16, 4),
        (64, 32, 16, 4),
        (32, 64, 16, 4),
        (128, 32, 16, 8),
        (32, 128, 16, 4),
    )
]


def contract(n: int, m: int, d: int, double: bool) -> tuple[Tile, int]:
    """Tiles of the gradient by the cost, and how many features a program holds that contracts it."""
    side = 32 if double else 64
    rows, features = min(power(n), side), min(power(d), 64)
    return Tile(rows, min(power(m), 32), 16, _warps(rows * features), 1), features


# Rows per program where no cost is touched: normalising features, adding up splits, conjugate gradients.
FEATURE_ROWS = 16
VECTOR = 1024
VECTORS = Tile(FEATURE_ROWS, VECTOR, MIN_SIDE, 8, 3)
COMPARED = (32, 64)  # rows and columns at a time, where two sets are compared


def feature_depth(d: int) -> int:
    """How many entries of each row ``features.py`` reads at once."""
    return min(power(d), 256)


def splits(programs: int, tiles: int, processors: int) -> int:
    """How many programs share a row of ``tiles`` tiles, so that about two programs wait on each processor."""
    return max(1, min(tiles // 4, 2 * processors // max(programs, 1), 16))
