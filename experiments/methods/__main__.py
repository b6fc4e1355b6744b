"""Ranks the finished runs of sweeps and records the table: ``python -m fedcl.experiments.methods RESULT FOLDER...``.

Every folder below which all runs share a protocol is a stream; its methods are told apart by the variants of the sweep.
Results go to ``experiments/results/RESULT.json`` of the checkout, with machine, versions, revision and seeds, and as
Markdown to ``RESULT.md``, in front of which stands the text of ``RESULT.txt`` beside this file, written by people.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcl import registry
from fedcl.compare.compute import compare_runs
from fedcl.compare.results import Comparison
from fedcl.errors import RunFailed
from fedcl.metrics.inference import mean_of
from fedcl.records.environment import cpu_model, usable_cpus, versions
from fedcl.records.runs import Run, find_runs

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
METRICS = ("average_accuracy", "average_incremental_accuracy", "forgetting")
COSTS = ("bytes_up", "bytes_down", "wall_seconds")


def streams(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each protocol, by the name of their data."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.protocol_key, []).append(run)
    named = {str(group[0].settings["data.name"]): group for group in found.values()}
    if len(named) < len(found):
        raise RunFailed(f"runs of {len(found)} protocols on {len(named)} datasets: give one folder for each stream")
    return named


def variant(run: Run) -> str:
    """The method's name in the sweep, without the stream's."""
    return run.name.partition(",")[0]


def revision(run: Run) -> str:
    """Of the source that the run was made with."""
    return str(json.loads((run.folder / "environment.json").read_text())["source_revision"])


def keeps(stack: Sequence[str]) -> str:
    """What of the past a stack has: everything (a bound), images, made images, or none."""
    found = [registry.load("strategies", name) for name in stack]
    if any(strategy.repeats or strategy.centralised for strategy in found):
        return "all images (bound)"
    holders = [strategy for strategy in found if strategy.exemplars]
    if not holders:
        return "no images"
    # Images that no client keeps are nobody's: the server made them.
    return "made images" if all(strategy.card.client_state == "none" for strategy in holders) else "images"


def measured(runs: Sequence[Run], baseline: str) -> dict[str, Any]:
    """One stream: its methods best first, each with its numbers.

    Raises:
        RunFailed: no method or several are called ``baseline``, or runs that cannot take part.
    """
    names = {run.name for run in runs if variant(run) == baseline}
    if len(names) != 1:
        raise RunFailed(f"{len(names)} methods are called {baseline!r}, of {', '.join(sorted(map(variant, runs)))}")
    compared = compare_runs(runs, METRICS, by=("name",), baseline=names.pop())
    if compared.left_out:
        raise RunFailed(f"{compared.left_out[0].folder}: {compared.left_out[0].why}")
    by_name = {method.label: list(method.runs.values()) for method in compared.methods}
    against = {pair.first: pair for pair in compared.pairs_of(METRICS[0])}
    rows = []
    for method in compared.methods:
        mine = by_name[method.label]
        pair = against.get(method.label)
        rows.append({
            "method": variant(mine[0]), "stack": list(mine[0].strategy), "keeps": keeps(mine[0].strategy),
            **{key: numbers(compared, key, method.label) for key in METRICS},
            "against": None if pair is None else
            {"mean": pair.mean, "low": pair.low, "high": pair.high, "verdict": pair.verdict},
            **{key: cost(mine, key) for key in COSTS},
        })  # fmt: skip
    return {"protocol": dict(compared.protocol), "seeds": sorted({run.seed for run in runs}), "rows": rows}


def cost(runs: Sequence[Run], key: str) -> float | None:
    """The mean of a number of the summaries; None where it is undefined, as a bound's bytes are."""
    found = [run.summary[key] for run in runs]
    return None if None in found else mean_of([float(value) for value in found])


def numbers(compared: Comparison, key: str, label: str) -> dict[str, Any]:
    """Mean, interval, rank and the seeds where a metric is undefined."""
    found = compared.estimates[key][label]
    return {"mean": found.mean, "low": found.low, "high": found.high, "rank": found.rank,
            "undefined": list(found.undefined)}  # fmt: skip


def percent(value: float | None) -> str:
    """A number of a summary in percent."""
    return "-" if value is None else f"{100 * value:.1f}"


def table(rows: Sequence[Mapping[str, Any]], baseline: str) -> str:
    """Markdown, best first; the place counts every method, bounds too."""
    lines = [
        f"| | method | keeps | accuracy | 95 % t | mean rank | against {baseline} | over tasks | forgetting | MB | s |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for place, row in enumerate(rows, 1):
        acc, pair = row["average_accuracy"], row["against"]
        rank = "-" if acc["rank"] is None else f"{acc['rank']:.1f}"
        ahead = "-" if pair is None else f"{100 * pair['mean']:+.1f} {shown(pair)}"
        sent = "-" if row["bytes_up"] is None else f"{(row['bytes_up'] + row['bytes_down']) / 1e6:.1f}"
        lines.append(
            f"| {place} | {row['method']} | {row['keeps']} | {percent(acc['mean'])} | {percent(acc['low'])} to "
            f"{percent(acc['high'])} | {rank} | {ahead} | {percent(row['average_incremental_accuracy']['mean'])} | "
            f"{percent(row['forgetting']['mean'])} | {sent} | {row['wall_seconds']:.1f} |"
        )
    return "\n".join(lines)


def shown(pair: Mapping[str, Any]) -> str:
    """The interval of a difference in points, or why there is none."""
    if pair["low"] is None:
        return f"({pair['verdict']})"
    return f"({100 * pair['low']:+.1f} to {100 * pair['high']:+.1f})"


def page(recorded: Mapping[str, Any], text: str) -> str:
    """The results as a Markdown page."""
    machine = recorded["machine"]
    named = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "flwr", "avalanche-lib", "numpy"))
    parts = [text.strip(), ""]
    parts += [f"Measured with `{recorded['command']}` on {machine['cpus']} processors ({machine['cpu']}), {named};",
              f"revision {recorded['revision']}."]  # fmt: skip
    for name, stream in recorded["streams"].items():
        seeds = ", ".join(map(str, stream["seeds"]))
        parts += ["", f"## {name}: seeds {seeds}", "", table(stream["rows"], recorded["baseline"])]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Reads the runs and writes the record and its page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", help="name of the result, as of the text beside this file")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--baseline", default="finetune", help="the method that the others are tested against")
    parser.add_argument("--command", required=True, help="the command that made the runs, to be written down")
    arguments = parser.parse_args()
    found = find_runs(arguments.folders)
    if found.broken:
        raise SystemExit(f"{found.broken[0].folder}: {found.broken[0].why}")
    recorded = {
        "command": arguments.command,
        "baseline": arguments.baseline,
        "revision": ", ".join(sorted({revision(run) for run in found.runs})),
        "machine": {"cpu": cpu_model(), "cpus": usable_cpus(), "versions": versions()},
        "streams": {name: measured(runs, arguments.baseline) for name, runs in streams(found.runs).items()},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.result}.json").write_text(json.dumps(recorded, indent=1) + "\n")
    text = (HERE / f"{arguments.result}.txt").read_text()
    (RESULTS / f"{arguments.result}.md").write_text(page(recorded, text))


if __name__ == "__main__":
    main()
