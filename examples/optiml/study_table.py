"""The README's table, from the result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

BEGIN, END = "<!-- results: begin (written by the study command, do not edit) -->", "<!-- results: end -->"
DIM = {"channel": 512}


def write_report(results: Path, readme: Path) -> None:
    """Replace what stands between the markers of ``readme``."""
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{readme} lacks the markers {BEGIN!r} and {END!r}")
    body = report(results)
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}")


def report(results: Path) -> str:
    """Markdown of all result files: AUCs, paired differences, and whether training was alive."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    runs: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if "seed" in record:
            runs.setdefault(record["arm"], []).append(record)
    if not runs:
        return "\n_No results yet._\n"
    order = sorted(runs, key=lambda name: (name != "untrained", name != "vicreg", name))
    special = {record["arm"]: record for record in records if "seed" not in record}
    parts = [_aucs(order, runs, special.get("metadata")), _alive(order, runs)]
    if "differences" in special:
        parts.insert(1, _differences(special["differences"]))
    return "\n\n".join(["", *(part for part in parts if part), _made(runs), ""])


def _aucs(order: list[str], runs: dict[str, list[dict[str, Any]]], metadata: dict[str, Any] | None) -> str:
    """Mean over seeds; the bracket is the mean of the runs' bootstrap intervals' ends, the last column the seeds."""
    lines = [
        "| features | within-source AUC [95 %] | raw AUC [95 %] | within-source, each seed |",
        "| --- | --- | --- | --- |",
    ]

    def cell(rows: list[dict[str, Any]], kind: str) -> str:
        if any(kind not in row for row in rows):
            return "–"
        value, low, high = (np.mean([row[kind]["macro"][key] for row in rows]) for key in ("value", "low", "high"))
        return f"{value:.3f} [{low:.3f}, {high:.3f}]"

    for name in order:
        rows = sorted(runs[name], key=lambda row: row["seed"])
        seeds = ", ".join(f"{row['within_source']['macro']['value']:.3f}" for row in rows if "within_source" in row)
        lines.append(f"| {name} | {cell(rows, 'within_source')} | {cell(rows, 'raw')} | {seeds} |")
    if metadata:
        lines.append(f"| source alone, no pixels | {cell([metadata], 'within_source')} | {cell([metadata], 'raw')} | |")
    return "\n".join(lines)


def _differences(record: dict[str, Any]) -> str:
    lines = ["| paired difference | within-source [95 %] | raw [95 %] |", "| --- | --- | --- |"]
    for row in record["rows"]:
        cells = [
            "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row[kind]) if kind in row else "–"
            for kind in ("within_source", "raw")
        ]
        lines.append(f"| {row['arm']} − {row['minus']} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _alive(order: list[str], runs: dict[str, list[dict[str, Any]]]) -> str:
    """Last epoch, mean over seeds: marginals, transport against no matching, and the gradient of CV-SIM."""
    lines = [
        "| last epoch | perplexity of μ | ⟨T,M⟩ | ⟨μν',M⟩ | gradient of CV-SIM | std of q | s / step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in order:
        rows = [row["training"] for row in runs[name] if "training" in row]
        if not rows:
            continue

        def mean(key: str, rows: list[dict[str, Any]] = rows) -> float:
            return float(np.mean([row["last_epoch"].get(key, np.nan) for row in rows]))

        seconds = float(np.mean([row["step_seconds"] for row in rows]))
        options = runs[name][0]["config"]["options"]
        points = DIM.get(options.get("match", ""))
        share = f"{mean('perplexity'):.1f}" + (f" ({mean('perplexity') / points:.0%} of {points})" if points else "")
        if np.isnan(mean("perplexity")):
            cells = ["–"] * 4
        else:
            cells = [
                share,
                f"{mean('transport_cost'):.4f}",
                f"{mean('independent_cost'):.4f}",
                f"{mean('grad_cvsim'):.2e}",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} | {mean('std_q'):.3f} | {seconds:.2f} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _made(runs: dict[str, list[dict[str, Any]]]) -> str:
    rows = [row for group in runs.values() for row in group]
    commits = sorted({str(row["made"]["commit"])[:10] for row in rows})
    days = sorted({row["made"]["time"][:10] for row in rows})
    trained = [row["config"] for row in rows if "training" in row]
    setting = ""
    if trained:
        c = trained[0]
        setting = f"{c['epochs']} epochs at {c['image_size']} px, batch {c['batch_size']}. "
    return (
        f"{setting}{rows[0]['images']} test images. Made {', '.join(days)} at commit {', '.join(commits)}; "
        "one file per run in `results/`."
    )
