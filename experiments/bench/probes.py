"""What the probes cost: ``python -m fedcl.experiments.bench.probes``.

First on given features: 100 classes, 10,000 test images, after the last of ten tasks, where they cost most. Then in a
run of the default preset with all of them. Results go to ``experiments/results/probes.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcl import random
from fedcl.measure.probe_values import PROBES, Values
from fedcl.measure.probing import Frozen, Measurement
from fedcl.records.environment import cpu_model, source_revision, usable_cpus, versions

RESULTS = Path(__file__).resolve().parents[1] / "results" / "probes.json"
CLASSES, IMAGES, TASKS = 100, 10_000, 10
MEASURED = [name for name in PROBES if name not in ("novelty", "clustering")]
"""Those of every stream; the two others are for streams with classes that nobody names."""

CASES = ((128, 20), (512, 20))
REPEATS = 3


def normal(count: int, width: int, *name: object) -> Tensor:
    """(count, width) standard normal numbers."""
    u = random.uniform(2 * count * width, "bench", *name).reshape(2, count, width)
    return torch.from_numpy(np.sqrt(-2 * np.log1p(-u[0])) * np.cos(2 * np.pi * u[1])).float()


@dataclass(frozen=True)
class Stage:
    """A task with its classes."""

    index: int
    classes: list[int]


@dataclass
class Features:
    """Stands in for model, images and run folder: the features of ten models are given.

    Attributes:
        width: dimensions of a feature.
        most: images of each class that the panels hold.
    """

    width: int
    most: int
    num_classes: int = CLASSES
    names: list[str] = field(default_factory=lambda: list(MEASURED))

    def __post_init__(self) -> None:
        self.evaluator = self.stream = self
        self.heads = None
        self.stages = [Stage(t, list(range(t * CLASSES // TASKS, (t + 1) * CLASSES // TASKS))) for t in range(TASKS)]
        self.weight = normal(CLASSES, self.width, "head") / self.width**0.5
        self.test, self.train = self.frozen(IMAGES, "test"), self.frozen(CLASSES * self.most, "train")
        rows = [torch.nonzero(self.test.labels == label).flatten()[: self.most] for label in range(CLASSES)]
        self.panel = self.test.where(torch.cat(rows))
        moved = [0.5 * normal(len(self.panel.labels), self.width, "past", t) for t in range(TASKS)]
        self.kept = [
            {"features": (self.panel.features + away).relu(), "means": normal(CLASSES, self.width, "means").double()}
            for away in moved
        ]

    def frozen(self, count: int, name: str) -> Frozen:
        """Features of ``count`` images, as after a ReLU, in overlapping classes of equal size, sorted by class."""
        labels = torch.arange(count) * CLASSES // count
        features = (normal(CLASSES, self.width, "centres")[labels] + 3 * normal(count, self.width, name)).relu()
        return Frozen(features, features @ self.weight.T, labels, labels * TASKS // CLASSES)

    def known(self, task: int) -> Tensor:
        """All classes."""
        return torch.ones(CLASSES, dtype=torch.bool)

    def past(self, task: int) -> dict[str, Tensor]:
        """What the model of an earlier task gave."""
        return self.kept[task]

    def measure(self) -> dict[str, tuple[float, float, Values]]:
        """(seconds of the clock, seconds of the processor, values) of each probe after the last task."""
        earlier: list[dict[str, Values]] = [
            {probe: {f"task_{j}": 0.5 for j in range(task + 1)} for probe in MEASURED} for task in range(TASKS - 1)
        ]
        taken = Measurement(self, {"head.weight": self.weight}, TASKS - 1, earlier)  # type: ignore[arg-type]
        vars(taken).update(train=self.train, test=self.test, panel=self.panel)
        found = {}
        with torch.no_grad():
            for name in MEASURED:
                begun, spent = time.perf_counter(), time.process_time()
                values = PROBES[name](taken)
                found[name] = time.perf_counter() - begun, time.process_time() - spent, values
        return found


def on_features(width: int, most: int, threads: int) -> dict[str, Any]:
    """Seconds of each probe and of all, the least of several repeats: what else the machine does only adds to them."""
    torch.set_num_threads(threads)
    features = Features(width, most)
    features.measure()
    runs = [features.measure() for _ in range(REPEATS)]
    probes = {name: min(run[name][0] for run in runs) for name in MEASURED}
    processor = min(sum(spent for _, spent, _ in run.values()) for run in runs)
    together = min(sum(seconds for seconds, *_ in run.values()) for run in runs)
    return {
        "width": width, "per_class": most, "threads": threads, "seconds": together, "processor_seconds": processor,
        "probes": probes,
    }  # fmt: skip


def in_a_run(threads: int) -> dict[str, Any]:
    """Seconds of the default preset and of the probes after every task."""
    from fedcl.config import load_config
    from fedcl.run import execute
    from fedcl.tell.progress import QuietProgress

    settings: dict[str, Any] = {
        "evaluate.probes": MEASURED, "engine.device": "cpu", "engine.threads": threads, "output.plots": False,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        result = execute(load_config(None, {**settings, "output.dir": folder}), progress=QuietProgress())
        lines = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    probes = sum(line["seconds"] for line in lines if line["event"] == "probes")
    trained = result.summary["measured"]["client_seconds"]
    return {"threads": threads, "probes": probes, "training": trained, "run": result.summary["wall_seconds"]}


def page(recorded: dict[str, Any]) -> str:
    """The results as a Markdown page."""
    machine, cases = recorded["machine"], recorded["features"]
    heads = [f"d={c['width']}, {c['per_class']} a class, {c['threads']} threads" for c in cases]
    lines = [
        "# What the probes cost",
        "",
        f"{CLASSES} classes, {IMAGES:,} test images, after the last of {TASKS} tasks; panels of so many images a",
        f"class; the least of {REPEATS} repeats, seconds.",
        "",
        f"Measured with `{recorded['command']}` on {machine['cpus']} processors ({machine['cpu']}), torch",
        f"{machine['versions']['torch']}; revision {recorded['revision']}.",
        recorded["note"],
        "",
        "| probe | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(cases),
    ]
    lines += [f"| {name} | " + " | ".join(f"{c['probes'][name]:.3f}" for c in cases) + " |" for name in MEASURED]
    lines += [
        "| **all** | " + " | ".join(f"**{c['seconds']:.2f}**" for c in cases) + " |",
        "| of the processor | " + " | ".join(f"{c['processor_seconds']:.2f}" for c in cases) + " |",
        "",
        "The default preset with all probes after every task:",
        "",
        "| threads | probes (s) | local training (s) | whole run (s) | probes over training |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['threads']} | {r['probes']:.2f} | {r['training']:.2f} | {r['run']:.2f} | "
        f"{100 * r['probes'] / r['training']:.1f} % |"
        for r in recorded["runs"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--note", default="Nothing else ran on the machine.", help="what else the machine did")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write; a .md stands beside it")
    arguments = parser.parse_args()
    most = min(2, usable_cpus())
    features = [on_features(width, per_class, threads) for width, per_class in CASES for threads in sorted({1, most})]
    recorded = {
        "command": "python -m fedcl.experiments.bench.probes", "note": arguments.note, "revision": source_revision(),
        "machine": {"cpu": cpu_model(), "cpus": usable_cpus(), "versions": versions()},
        "features": features, "runs": [in_a_run(threads) for threads in sorted({1, most})],
    }  # fmt: skip
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(recorded, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(page(recorded))
    print(page(recorded))


if __name__ == "__main__":
    main()
