"""What a run costs as its population grows: ``python -m fedcl.experiments.bench.population``.

Real digits; a cohort of 100 clients with 50 images each in every round, whatever the population. Every run has a
process of its own. Results go to ``experiments/results/population.json`` and ``.md`` of the checkout.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fedcl.records.environment import cpu_model, source_revision, usable_cpus, versions

RESULTS = Path(__file__).resolve().parents[1] / "results" / "population.json"
POPULATIONS = (10**3, 10**4, 10**5, 10**6)
STACKS = ("finetune", "fedewc+replay")
SETTINGS: dict[str, Any] = {
    "seed": 0, "data.name": "digits", "scenario.tasks": 2, "model.name": "mlp", "engine.device": "cpu",
    "partition.name": "dirichlet", "partition.alpha": 0.5, "partition.size": 50, "federation.cohort": 100,
    "federation.rounds": 5, "federation.epochs": 1, "federation.batch_size": 10, "output.plots": False,
}  # fmt: skip


def measure(stack: str, clients: int) -> dict[str, Any]:
    """One run in this process.

    Returns:
        ``start_seconds``: from the settings to the end of the first round; ``round_seconds``: median of the other
        rounds; ``task_end_seconds``: median of what stands between two rounds of different tasks (exchanges, test,
        checkpoint) or the last round and the end; ``peak_mib``: most memory of the process; ``stored_clients`` and
        ``checkpoint_kib`` at the end. Seconds of the processor, ``*_cpu_seconds``, depend least on what else the
        machine does.
    """
    begun = time.perf_counter()
    from fedcl.bridges.avalanche_import import quiet_avalanche
    from fedcl.config import load_config
    from fedcl.run import execute
    from fedcl.tell.progress import QuietProgress, Standing

    quiet_avalanche()
    ready = time.perf_counter()
    rounds: list[float] = []
    ends: list[float] = []
    spent: list[float] = [time.process_time()]

    class Clock(QuietProgress):
        def round(self, task: int, round: int, standing: Standing) -> None:
            rounds.append(time.perf_counter())
            spent.append(time.process_time())

        def task_done(self, task: int, standing: Standing) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        overrides = {**SETTINGS, "strategy": stack.split("+"), "federation.clients": clients, "output.dir": folder}
        result = execute(load_config(None, overrides), progress=Clock())
        stored = len(list((result.folder / "clients").glob("*/*")))
        newest = max((result.folder / "checkpoints").iterdir())
        size = sum(file.stat().st_size for file in newest.iterdir())
    each = SETTINGS["federation.rounds"]
    later = [i for i in range(1, len(rounds)) if i % each]
    closing = [end - rounds[(task + 1) * each - 1] for task, end in enumerate(ends)]
    return {
        "clients": clients, "import_seconds": ready - begun,
        "start_seconds": rounds[0] - ready, "start_cpu_seconds": spent[1] - spent[0],
        "round_seconds": statistics.median(rounds[i] - rounds[i - 1] for i in later),
        "round_cpu_seconds": statistics.median(spent[i + 1] - spent[i] for i in later),
        "task_end_seconds": statistics.median(closing),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "stored_clients": stored, "checkpoint_kib": size / 1024,
    }  # fmt: skip


def page(recorded: dict[str, Any]) -> str:
    """The results as a Markdown page."""
    machine = recorded["machine"]
    lines = [
        "# What a run costs as its population grows",
        "",
        f"Real digits, two tasks of {SETTINGS['federation.rounds']} rounds; {SETTINGS['federation.cohort']} clients a",
        f"round with {SETTINGS['partition.size']} images each (`partition.size`), Dirichlet "
        f"{SETTINGS['partition.alpha']}, batches of {SETTINGS['federation.batch_size']}.",
        "Start: from the settings to the end of the first round, without the import of the libraries. Each run in a",
        "process of its own.",
        "",
        f"Measured with `{recorded['command']}` on {machine['cpus']} processors ({machine['cpu']}), torch",
        f"{machine['versions']['torch']}, flwr {machine['versions']['flwr']}; revision {recorded['revision']}.",
        recorded["note"],
    ]
    for stack, found in recorded["stacks"].items():
        lines += [
            "",
            f"## {stack}",
            "",
            "| clients | start (s; of the processor) | round (s; of the processor) | end of a task (s) | "
            "peak memory (MiB) | checkpoint (KiB) |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {f['clients']:,} | {f['start_seconds']:.2f}; {f['start_cpu_seconds']:.2f} | {f['round_seconds']:.3f}; "
            f"{f['round_cpu_seconds']:.3f} | {f['task_end_seconds']:.2f} | {f['peak_mib']:.0f} | "
            f"{f['checkpoint_kib']:.0f} |"
            for f in found
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures every population and stack and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("STACK", "CLIENTS"), help="one run in this process, as JSON")
    parser.add_argument("--note", default="Nothing else ran on the machine.", help="what else the machine did")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write; a .md stands beside it")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]))))
        return
    stacks: dict[str, list[dict[str, Any]]] = {stack: [] for stack in STACKS}
    for clients in POPULATIONS:
        for stack in STACKS:
            command = [sys.executable, "-m", "fedcl.experiments.bench.population", "--one", stack, str(clients)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            stacks[stack].append(json.loads(done.stdout.splitlines()[-1]))
            print(stack, json.dumps(stacks[stack][-1]), flush=True)
    recorded = {
        "command": "python -m fedcl.experiments.bench.population", "note": arguments.note, "settings": SETTINGS,
        "seed": SETTINGS["seed"], "revision": source_revision(),
        "machine": {"cpu": cpu_model(), "cpus": usable_cpus(), "versions": versions()}, "stacks": stacks,
    }  # fmt: skip
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(recorded, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(page(recorded))


if __name__ == "__main__":
    main()
