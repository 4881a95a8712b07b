"""``otloss.plot``: what is drawn is what was solved, and matplotlib is needed for nothing else."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

import otloss

matplotlib.use("Agg")
from matplotlib import pyplot


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent.parent
    )


def test_import_leaves_matplotlib_alone() -> None:
    done = run("import sys, otloss; otloss.plot.plan; sys.exit('matplotlib' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_without_matplotlib_it_says_what_to_install() -> None:
    code = (
        "import sys, torch\n"
        "sys.modules['matplotlib'] = None\n"
        "import otloss\n"
        "cost = torch.rand(3, 4)\n"
        "for draw in (lambda: otloss.plot.plan(otloss.sinkhorn(cost)),\n"
        "             lambda: otloss.plot.convergence(otloss.sinkhorn, cost)):\n"
        "    try: draw()\n"
        "    except ImportError as error: assert 'pip install matplotlib' in str(error), error\n"
        "    else: sys.exit('drawn')"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_a_plan_is_drawn_as_it_is(tmp_path: Path) -> None:
    cost = torch.rand(2, 3, 6, 5, requires_grad=True)
    out = otloss.sinkhorn(cost)
    ax = otloss.plot.plan(out, problem=4)
    assert np.array_equal(ax.images[0].get_array(), out.plan[1, 1].detach().numpy())
    figure, given = pyplot.subplots()
    assert otloss.plot.plan(out, log=True, ax=given) is given
    want = out.log_plan[0, 0].detach().numpy() / math.log(10)
    assert np.allclose(given.images[0].get_array(), want, rtol=1e-6)
    figure.savefig(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000
    with pytest.raises(IndexError):
        otloss.plot.plan(out, problem=6)
    pyplot.close("all")


def test_points_without_mass_and_long_plans_are_drawn(tmp_path: Path) -> None:
    out = otloss.sinkhorn(torch.rand(3, 40), torch.tensor([0.5, 0.0, 0.5]))
    ax = otloss.plot.plan(out, log=True)
    assert ax.get_aspect() == "auto"
    ax.figure.savefig(tmp_path / "plan.png")
    pyplot.close("all")


def test_convergence_shows_the_errors_of_both_solvers() -> None:
    cost = torch.rand(5, 12, 9, dtype=torch.double)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = otloss.plot.convergence(otloss.sinkhorn, cost, eps=0.02, tol=1e-8, max_iter=5000)
    lines = {line.get_label(): line for line in ax.lines}
    assert {"auto", "plain"} <= set(lines)
    for solver in ("auto", "plain"):
        steps, errors = (list(part) for part in lines[solver].get_data())
        assert steps == sorted(steps) and errors[-1] < 1e-8 < errors[0]
        want = otloss.sinkhorn(cost, eps=0.02, tol=1e-8, max_iter=int(steps[-1]), solver=solver)
        assert want.converged.all() and errors[-1] == float(want.marginal_error.median())
    assert any(list(line.get_ydata()) == [1e-8, 1e-8] for line in ax.lines)
    pyplot.close("all")


def test_convergence_of_features_up_to_a_limit() -> None:
    x, y = torch.randn(10, 3), torch.randn(8, 3)
    ax = otloss.plot.convergence(otloss.cosine_sinkhorn, x, y, eps=0.005, max_iter=7, solvers=("plain",))
    steps, errors = ax.lines[0].get_data()
    assert list(steps) == [1, 2, 3, 4, 6, 7] and len(errors) == 6
    pyplot.close("all")
    with pytest.raises(ValueError, match="solvers must be one of 'auto', 'plain', got 'newton'"):
        otloss.plot.convergence(otloss.sinkhorn, x, solvers=("newton",))
