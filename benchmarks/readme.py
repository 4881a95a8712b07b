"""The parts of the pages that are written from results files: each stands between two markers of its page.

``python -m benchmarks readme`` writes all of them and measures nothing. A page keeps whatever is outside its markers.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import capabilities, overview, report, results, solver, tolerance

ROOT = Path(__file__).parent.parent
README, BENCHMARKS, GPU = ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "gpu.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
ALL_ROWS, ALL_CAPABILITIES = results.FOLDER / "cpu.md", results.FOLDER / "capabilities.md"


def sections() -> dict[tuple[Path, str], str]:
    """The text of each written part, by page and by the name in its markers.

    Raises:
        SystemExit: the CPU results have no workload yet.
    """
    cpu = results.load(results.FULL)
    if not cpu.get("workloads"):
        raise SystemExit(f"{results.FULL} has no workloads yet; run `python -m benchmarks all`")
    plots = [name for name in report.PLOTS if (results.FOLDER / name).exists()]
    return {
        (README, "peers"): report.gradients(results.load(results.CORRECTNESS)),
        (README, "bench"): report.readme(cpu),
        (README, "capabilities"): capabilities.readme(results.load(results.CAPABILITIES)),
        (BENCHMARKS, "bench"): report.details(cpu, plots),
        (GPU, "static"): report.static(results.load(results.STATIC)),
        (PERFORMANCE, "fixed"): overview.fixed(cpu),
        (PERFORMANCE, "tolerance"): overview.to_tolerance(results.load(tolerance.RESULTS)),
        (PERFORMANCE, "sweeps"): overview.sweeps(results.load(solver.RESULTS)),
    }


def write_pages() -> None:
    """Write every part into its page, and all rows into ``results/cpu.md`` and ``results/capabilities.md``."""
    for (page, name), text in sections().items():
        head, _, tail = _split(page, name)
        page.write_text(f"{head}\n{text}\n{tail}")
    ALL_ROWS.write_text(report.full(results.load(results.FULL)))
    ALL_CAPABILITIES.write_text(capabilities.page(results.load(results.CAPABILITIES)))


def section(page: Path, name: str) -> str:
    """What a page has between the markers of that name."""
    return _split(page, name)[1].strip("\n")


def _split(page: Path, name: str) -> tuple[str, str, str]:
    """A page up to and with the first marker, what is between the two, and the rest from the second marker on."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{page} must have {begin} once, and {end} once after it")
    head, _, rest = text.partition(begin)
    inside, _, tail = rest.partition(end)
    return head + begin, inside, end + tail
