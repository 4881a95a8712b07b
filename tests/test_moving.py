"""The page ``docs/moving.md``: each line of its tables is a test, which evaluates what one wrote and what one writes.

The peers are told to stop late, so that what is left is the tolerance of otloss.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import otloss

PAGE = (Path(__file__).parent.parent / "docs" / "moving.md").read_text()
LINE = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \|$", re.MULTILINE)
#: The largest error, as a share of the largest number: our tolerance of 1e-5 in the marginals, with room for what it
#: does to costs and potentials. geomloss stops where its schedule ends, whatever is left.
ERRORS = {"POT": 1e-4, "geomloss": 1e-3, "OTT-JAX": 1e-4}
#: Of the two lines that agree as eps goes to 0, at the eps that they name.
EXACT = 1e-2


def lines() -> list[tuple[str, str, str]]:
    """The library, what one wrote and what one writes, for each line of a table."""
    parts = re.split(r"^## From (.*)$", PAGE, flags=re.MULTILINE)[1:]
    sections = zip(parts[::2], parts[1::2], strict=True)
    return [(name, wrote, write) for name, text in sections for wrote, write in LINE.findall(text)]


def names() -> dict[str, Any]:
    """What the page's own block defines."""
    block = re.search(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert block is not None
    found: dict[str, Any] = {}
    exec(block[1], found)
    return found


def pot(ours: dict[str, Any]) -> Iterator[dict[str, Any]]:
    ot = pytest.importorskip("ot", reason="POT is not installed")
    pytest.importorskip("ot.batch", reason="this POT has no ot.batch")
    batch = SimpleNamespace(solve_batch=functools.partial(ot.batch.solve_batch, tol=1e-12, method="log_sinkhorn"))
    late = {
        "sinkhorn": functools.partial(ot.sinkhorn, stopThr=1e-12, numItermax=10_000),
        "sinkhorn2": functools.partial(ot.sinkhorn2, stopThr=1e-12, numItermax=10_000),
        "solve": functools.partial(ot.solve, tol=1e-12, max_iter=10_000),
        "solve_sample": functools.partial(ot.solve_sample, tol=1e-12, max_iter=10_000),
    }
    untouched = {name: getattr(ot, name) for name in ("dist", "emd2", "unbalanced", "partial", "da")}
    yield {**ours, "ot": SimpleNamespace(batch=batch, **late, **untouched)}


def geomloss(ours: dict[str, Any]) -> Iterator[dict[str, Any]]:
    library = pytest.importorskip("geomloss", reason="geomloss is not installed")
    pytest.importorskip("geomloss.ot", reason="this geomloss has no geomloss.ot")
    samples = functools.partial(library.SamplesLoss, scaling=0.999, backend="tensorized")
    solve_batch = functools.partial(library.ot.solve_batch, max_iter=2000)
    yield {**ours, "SamplesLoss": samples, "geomloss": SimpleNamespace(ot=SimpleNamespace(solve_batch=solve_batch))}


def ott(ours: dict[str, Any]) -> Iterator[dict[str, Any]]:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    pytest.importorskip("ott", reason="OTT-JAX is not installed")
    from ott.geometry import costs
    from ott.geometry.geometry import Geometry
    from ott.geometry.pointcloud import PointCloud
    from ott.solvers import linear
    from ott.tools.sinkhorn_divergence import sinkhorn_divergence

    late = {"threshold": 1e-11, "max_iterations": 10_000}
    with jax.enable_x64(True):
        arrays = {name: jax.numpy.asarray(t.numpy()) for name, t in ours.items() if isinstance(t, Tensor)}
        yield {
            **ours,
            **arrays,
            "jax": jax,
            "costs": costs,
            "Geometry": Geometry,
            "PointCloud": PointCloud,
            "linear": SimpleNamespace(solve=functools.partial(linear.solve, **late)),
            "sinkhorn_divergence": functools.partial(sinkhorn_divergence, solve_kwargs=late),
        }


Names = dict[str, Any]
PEERS: dict[str, Callable[[Names], Iterator[Names]]] = {"POT": pot, "geomloss": geomloss, "OTT-JAX": ott}


def as_tensor(value: Any) -> Tensor:
    """A number or an array of any library."""
    if isinstance(value, Tensor):
        return value.detach().double().squeeze()
    return torch.tensor(value.tolist() if hasattr(value, "tolist") else value, dtype=torch.float64).squeeze()


@pytest.mark.parametrize(
    "library, wrote, write", [pytest.param(*line, id=f"{line[0]}: {line[1]}") for line in lines() if line[0] in PEERS]
)
def test_a_line(library: str, wrote: str, write: str) -> None:
    ours = names()
    here = as_tensor(eval(write, ours))
    for theirs in PEERS[library](ours):
        there = as_tensor(eval(wrote, theirs))
    if re.search(r"\.f\b", write):  # a constant is free
        here, there = here - here.mean(), there - there.mean()
    assert here.shape == there.shape
    error = float((here - there).abs().max() / there.abs().max())
    assert error < (EXACT if "eps=0.001" in write else ERRORS[library])


@pytest.mark.parametrize(
    "wrote, write",
    [pytest.param(wrote, write, id=wrote) for library, wrote, write in lines() if library == "flash-sinkhorn"],
)
def test_a_line_of_flash_sinkhorn(wrote: str, write: str) -> None:
    """It needs a CUDA device, so its side is not run: its arguments are those that it has."""
    assert as_tensor(eval(write, names())).isfinite()
    library = pytest.importorskip("flash_sinkhorn", reason="flash-sinkhorn is not installed")
    call = ast.parse(wrote, mode="eval").body
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Call)
    keywords = {word.arg: None for word in call.func.keywords if word.arg}
    inspect.signature(library.SamplesLoss).bind(*call.func.args, **keywords)
    assert len(call.args) == 4


def test_every_line_is_read() -> None:
    """No line of a table escapes the pattern, and no library has too few."""
    found = lines()
    rows = [row for row in PAGE.splitlines() if row.startswith("| ") and not row.startswith("| you wrote")]
    assert len(found) == len(rows)
    libraries = [library for library, _, _ in found]
    assert set(libraries) == {*PEERS, "flash-sinkhorn"} and all(libraries.count(name) >= 4 for name in libraries)


def test_totals_that_differ_from_1() -> None:
    """geomloss's unbalanced divergence agrees also where the totals of the masses differ."""
    ours = names()
    x, y, a, b, rho = ours["x"], ours["y"], 3 * ours["a"], ours["b"], 2 * 0.8**2
    for theirs in geomloss(ours):
        there = float(theirs["SamplesLoss"]("sinkhorn", p=2, blur=0.3, reach=0.8)(a, x, b, y))
    loss = otloss.FeatureSinkhornLoss("sqeuclidean", 2 * 0.3**2, objective="divergence", rho_a=rho, rho_b=rho, tol=1e-9)
    assert float(loss(x, y, a, b)) / 2 == pytest.approx(there, rel=ERRORS["geomloss"])
