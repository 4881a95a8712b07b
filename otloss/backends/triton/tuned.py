"""Tiles of a streaming pass that were timed on a device; ``python -m benchmarks.gpu --stage 5`` adds those of one more.

The key of a tile is ``config.bucket``: the powers of two that hold n, m and d (0 for a stored cost), whether the
numbers are float64, and the compute capability. Its value holds the fields of ``config.Tile``.
"""

from __future__ import annotations

Bucket = tuple[int, int, int, bool, "tuple[int, int] | None"]

TILES: dict[Bucket, tuple[int, ...]] = {}
