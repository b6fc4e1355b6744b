"""Runs the effects of `list.yaml` and records them: ``python -m fedcl.experiments.effects [NAME ...]``.

Results go to ``experiments/results/effects.json`` of the checkout, with machine, versions, revision and seeds; the
table of ``--table`` is Markdown. Run folders are temporary.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedcl import registry
from fedcl.build import BASE
from fedcl.config import load_config, to_yaml
from fedcl.metrics.paired import paired_difference
from fedcl.records.environment import cpu_model, source_revision, usable_cpus, versions
from fedcl.run import execute
from fedcl.tell.progress import QuietProgress

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "effects.json"
SEEDS = range(5)
METRIC = "average_accuracy"
Memo = dict[str, dict[str, Any]]


def measure(stack: list[str], settings: dict[str, Any], seed: int, memo: Memo) -> dict[str, Any]:
    """The summary of one run; equal runs of one call are run once."""
    kept = {k: v for k, v in settings.items() if not k.startswith("options.") or k.split(".")[1] in stack}
    name = json.dumps([stack, kept, seed], sort_keys=True)
    if name not in memo:
        with tempfile.TemporaryDirectory() as folder:
            overrides = {"strategy": stack, **kept, "seed": seed, "output.dir": folder, "output.plots": False}
            memo[name] = execute(load_config(None, overrides), progress=QuietProgress()).summary
    return memo[name]


@cache
def pretrained(preset: str) -> str:
    """The ``init`` of the encoder that a preset trains: once for all effects, in the folder that the preset says."""
    config = load_config(preset, {"output.plots": False})
    digest = hashlib.sha256(to_yaml(replace(config, output=replace(config.output, dir=""))).encode()).hexdigest()
    config = replace(config, name=f"{config.name}-{digest[:12]}")
    runs = sorted((Path(config.output.dir) / config.name).glob("*/summary.json"))
    whole = [run.parent for run in runs if (run.parent / BASE).is_file()]
    folder = whole[0] if whole else execute(config, progress=QuietProgress()).folder
    return f"{folder}@task0"


def effect(entry: dict[str, Any], memo: Memo) -> dict[str, Any]:
    """One entry of the list, measured over all seeds."""
    common = entry.get("set", {}) | ({"init": pretrained(entry["init"])} if "init" in entry else {})
    without = {**common, **entry.get("ablation_set", {})}
    metric, seeds = entry.get("metric", METRIC), entry.get("seeds", list(SEEDS))
    first = [value_of(measure(entry["method"], common, s, memo), metric) for s in seeds]
    other = [value_of(measure(entry["ablation"], without, s, memo), metric) for s in seeds]
    found = paired_difference(first, other) if not lower_is_better(entry) else paired_difference(other, first)
    return {**entry, "seeds": seeds, "metric": metric, "method_values": first, "ablation_values": other,
            "mean": found.mean, "low": found.low, "high": found.high, "verdict": found.verdict,
            "sources": sources_of(entry)}  # fmt: skip


def lower_is_better(entry: dict[str, Any]) -> bool:
    """Whether a smaller number of the effect's metric is the better one."""
    return bool(entry.get("better", "higher") == "lower")


def value_of(summary: Any, metric: str) -> float:
    """A number of a summary by its dotted name."""
    for part in metric.split("."):
        summary = summary[part]
    return float(summary)


def sources_of(entry: dict[str, Any]) -> dict[str, str]:
    """A digest of the code in the file of each strategy of an effect."""
    names = sorted({*entry["method"], *entry["ablation"]})
    files = {name: inspect.getsourcefile(registry.load("strategies", name)) for name in names}
    return {name: code_digest(Path(str(file)).read_text()) for name, file in files.items()}


def code_digest(source: str) -> str:
    """The first half of the SHA-256 of what a file does: comments, docstrings, layout and imports do not count."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            rest = node.body[1:] if ast.get_docstring(node) is not None else node.body
            node.body = [line for line in rest if not isinstance(line, ast.Import | ast.ImportFrom)]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:32]


def points(value: float | None) -> str:
    """An accuracy difference in points."""
    return "-" if value is None else f"{100 * value:+.1f}"


def table(results: dict[str, Any]) -> str:
    """Markdown, one row an effect."""
    rows = [
        "| effect | method | ablation | change (points) | 95 % interval | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for name, e in results.items():
        a, b = (sum(e[k]) / len(e[k]) for k in ("method_values", "ablation_values"))
        interval = f"{points(e['low'])} to {points(e['high'])}"
        rows.append(
            f"| {name}: {e['why']} | {100 * a:.1f} % | {100 * b:.1f} % | {points(e['mean'])} | {interval} | "
            f"{e['verdict']}{', stale' if e.get('sources') != sources_of(e) else ''} |"
        )
    return "\n".join(rows)


def page(recorded: dict[str, Any]) -> str:
    """The results as a Markdown page."""
    machine = recorded["machine"]
    found = machine["versions"]
    named = ", ".join(f"{name} {found[name]}" for name in ("torch", "flwr", "avalanche-lib", "numpy"))
    revisions = sorted({str(e["revision"]) for e in recorded["effects"].values()})
    return f"""# What each method adds over its ablation

Average accuracy over all classes after the last task of the default stream (digits, 5 tasks, 5 clients,
Dirichlet 0.5), in percent; the same seeds ({", ".join(map(str, SEEDS))}) with and without, 95 % paired t interval of
the difference. Methods for pre-trained encoders start from that of a preset (`init` in the list) and are judged on
images that it has not seen. Personalised methods are judged by the clients' mean accuracy, each on test images of its
own, and temperature scaling by the calibration error, of which less is better; [the list](../effects/list.yaml) says
so. Settings of some entries were chosen after a look at small runs: those were then measured on other seeds (5-9 or
10-14) or carry the look in their words. *gained*: the interval is above zero; *lost*: below; *not shown*: it covers
zero; *stale*: the code of a strategy's file has changed since. These runs are small and short: they show that a method
does what it says, not how methods rank.

Measured with `{recorded["command"]}` on {machine["cpus"]} processors ({machine["cpu"]}),
{named}; revision {", ".join(revisions)}.

{table(recorded["effects"])}
"""


def main() -> None:
    """Measures the named effects (default: all) and merges them into the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--table", action="store_true", help="print the recorded results and stop")
    arguments = parser.parse_args()
    recorded = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"effects": {}}
    if arguments.table:
        print(page(recorded))
        return
    entries: Any = OmegaConf.to_container(OmegaConf.load(HERE / "list.yaml"))
    memo: Memo = {}
    for name in arguments.names or entries:
        found = effect(entries[name], memo)
        recorded["effects"][name] = {**found, "revision": source_revision()}
        print(f"{name}: {points(found['mean'])} points, {found['verdict']}", flush=True)
    recorded["effects"] = {name: recorded["effects"][name] for name in entries if name in recorded["effects"]}
    recorded["machine"] = {"cpu": cpu_model(), "cpus": usable_cpus(), "versions": versions()}
    recorded["command"] = "python -m fedcl.experiments.effects"
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(recorded, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(recorded))


if __name__ == "__main__":
    main()
