"""The first thing a newcomer runs: two strategies on one stream of real digits, compared, drawn and reported."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .. import config as settings
from ..compare import Comparison, compare
from ..plots import plot_comparison
from ..report import Written, write_report
from ..run import RunResult, execute
from ..tell.progress import Progress, percent, size

METRICS = ("average_accuracy", "forgetting")
"""What the demo compares."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        summary: ``runs`` (the ``summary.json`` of each), ``comparison`` (as ``fedcl compare --json`` prints it),
            ``picture``, ``report`` and ``folder``.
        text: for a terminal: table, comparison, picture, report, what to try next.
    """

    summary: dict[str, Any]
    text: str


def fresh(folder: Path) -> Path:
    """``folder``, or ``folder-2``, ``folder-3``, ... if it exists: every demo is kept."""
    number, path = 1, folder
    while path.exists():
        number += 1
        path = folder.with_name(f"{folder.name}-{number}")
    return path


def demo(config: settings.Config, *, progress: Progress) -> DemoResult:
    """Runs finetune and the stack of ``config`` on the same stream, compares them, draws and writes the report.

    Args:
        config: the default preset, with the user's seed, device and output directory.
        progress: who is told.

    Raises:
        UsageError, RunFailed, Interrupted: see :mod:`fedcl.errors`.
    """
    folder = fresh(Path(config.output.dir) / "demo")
    output = replace(config.output, dir=str(folder))
    floor = replace(config, name="finetune", strategy=["finetune"], options={}, output=output)
    stack = replace(config, name="default", output=output)
    results = {"finetune": execute(floor, progress=progress), "default": execute(stack, progress=progress)}
    picture = folder / "demo.png"
    first = results["default"].summary
    who = f"{config.data.name}, {first['num_tasks']} tasks, {first['num_clients']} clients, seed {config.seed}"
    shown = {"finetune": results["finetune"].matrix, "default stack": results["default"].matrix}
    plot_comparison(shown, picture, f"What a new task takes away ({who})", first["test_counts"])
    compared = compare([folder], METRICS, by=["name"])
    report = write_report([folder])
    summary = {
        "runs": {name: result.summary for name, result in results.items()},
        "comparison": compared.as_object(),
        "picture": str(picture),
        "report": str(report.path),
        "folder": str(folder),
    }
    return DemoResult(summary, story(config, results, compared, picture, report, who))


def story(
    config: settings.Config,
    results: dict[str, RunResult],
    compared: Comparison,
    picture: Path,
    report: Written,
    who: str,
) -> str:
    """The demo's text for a terminal."""
    folder = picture.parent
    return "\n".join(
        [
            table_of(results, who),
            "",
            f"Five clients learned the digits task by task ({config.federation.rounds} rounds each). "
            "Forgetting is what accuracy on a task loses",
            "from its best to the end.",
            "",
            f"fedcl compare {folder} --by name --metric {','.join(METRICS)}",
            *(f"  {pair.metric.replace('_', ' ')}: {pair.words}" for pair in compared.pairs),
            "  That is all that one seed can say: how large a difference may be, not that another seed has it.",
            "  The sweep below runs seven seeds, and the comparison then has intervals and tests.",
            "",
            f"picture   {picture}",
            f"report    {report.path}  (one page with everything; opens in a browser, needs no network)",
            f"results   {results['default'].folder}  (config.yaml, summary.json, accuracy_matrix.csv, plots/)",
            "",
            "next      fedcl sweep --seeds 0-6 name=methods strategy=finetune,fedlwf,replay  21 runs, two minutes",
            "          fedcl compare runs/methods --baseline finetune                        what these show",
            "          fedcl report runs/methods                                             the same as a page",
            "          fedcl list strategies                                                 'fedcl show NAME': a card",
        ]
    )


def table_of(results: dict[str, RunResult], who: str) -> str:
    """A line for each run, for a terminal."""
    table = Table(box=SIMPLE_HEAD, title=who, title_justify="left")
    table.add_column("name")
    table.add_column("strategy")
    columns = ("accuracy, all classes", "mean over the tasks", "forgetting", "sent", "seconds")
    for column in columns:
        table.add_column(column, justify="right")
    for name, result in results.items():
        s = result.summary
        table.add_row(
            name,
            " + ".join(s["strategy"]),
            percent(s["average_accuracy"]),
            percent(s["average_incremental_accuracy"]),
            percent(s["forgetting"]),
            size(s["bytes_up"] + s["bytes_down"]),
            f"{s['wall_seconds']:.1f}",
        )
    out = io.StringIO()
    Console(file=out, width=118).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
