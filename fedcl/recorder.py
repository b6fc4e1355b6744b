"""What a run writes down while it goes: events, rows of the accuracy matrix, rounds, the summary."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint import pack_tensors
from .federation.server import State
from .metrics.clients import summarise_client_matrices, temporal_forgetting
from .metrics.matrix import forgetting, mean_or_none, summary_metrics
from .metrics.streams import stream_metrics
from .probing import PROBES_CSV, Probing, probes_csv
from .protocols import label

if TYPE_CHECKING:
    from .build import Experiment
    from .evaluation import Evaluator
    from .progress import Progress
    from .runfolder import RunFolder

ROUND_COLUMNS = (
    "task",
    "round",
    "accuracy_seen",
    "loss",
    "clients",
    "samples",
    "steps",
    "bytes_up",
    "bytes_down",
)
METRICS = (
    "average_accuracy", "average_incremental_accuracy", "forgetting", "forgetting_first_last", "backward_transfer",
    "forward_transfer",
)  # fmt: skip

Table = list[list[float | None]]


def ratio(correct: int, total: int) -> float | None:
    """An accuracy in [0, 1], None when there was nothing to test."""
    return correct / total if total else None


class Recorder:
    """Turns the states of a run into files.

    Everything measured stands in ``state.records``, so that a resumed run goes on with it.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, progress: Progress, evaluator: Evaluator) -> None:
        self.experiment, self.folder, self.progress, self.evaluator = experiment, folder, progress, evaluator
        self.config = experiment.config
        self.probing = Probing(evaluator, folder)

    @property
    def title(self) -> str:
        """One line that says what runs."""
        c = self.config
        centralised = any(s.centralised for s in self.experiment.node.stack)
        who = "centralised" if centralised else f"{self.experiment.split.clients} clients"
        return (
            f"{c.name}: {' + '.join(c.strategy)} on {self.experiment.dataset}, {c.scenario.name}, {who}, seed {c.seed}"
        )

    def say_warnings(self) -> None:
        """Tells what is odd about the split."""
        for text in self.experiment.warnings:
            self.progress.message(f"note: {text}")
            self.folder.log({"event": "warning", "message": text})

    def begin(self, state: State) -> State:
        """Measures the untrained model where forward transfer is defined: every class can be scored early."""
        stream = self.experiment.stream
        baseline: list[float | None] | None = None
        if stream.num_tasks > 1 and self.scores_unseen():
            known = self.evaluator.known(0)
            grown = {n: self.evaluator.node.grown(n, a, len(known), "initial") for n, a in state.model.items()}
            mask = torch.ones_like(known) if self.config.model.head_allocate == "all" else known
            predictor = self.evaluator.predictor(grown, {}, mask)
            baseline = [ratio(*pair) for pair in zip(*self.evaluator.row(predictor), strict=True)]
        records = {"correct": [], "total": [], "validation": [], "personal": [], "baseline": baseline, "rounds": [],
                   "bytes": [], "spatial": [], "empty_rounds": 0, "dropped": 0}  # fmt: skip
        return replace(state, records=records)

    def scores_unseen(self) -> bool:
        """Whether the classes of every task can be predicted one task earlier."""
        stream = self.experiment.stream
        if self.experiment.node.stack.owners["predict"] is not None:
            return False
        return all(not stage.classes for stage in stream.stages[1:])

    def round_done(self, state: State, measured: dict[str, Any]) -> State:
        """Logs a round; evaluates it when asked to."""
        task, round_ = state.task, state.round - 1
        samples = measured["samples"]
        losses = {n: v / samples for n, v in measured["losses"].items()} if samples else {}
        event = {
            "event": "round", "task": task, "round": round_, "clients": measured["cohort"], "samples": samples,
            "steps": measured["steps"], "losses": losses, "bytes_up": measured["bytes_up"],
            "bytes_down": measured["bytes_down"], "empty_clients": measured["empty"], "idle_clients": measured["idle"],
            "dropped_images": measured["dropped"],
        }  # fmt: skip
        records = dict(state.records)
        records["dropped"] += measured["dropped"]
        for change in measured["engine"]:
            what = f"{change['chunk']} clients at a time" if "chunk" in change else "clients one by one"
            self.progress.message(f"note: from task {task + 1}, round {round_ + 1} on, {what}: {change['why']}")
            self.folder.log({"event": "engine", "task": task, "round": round_, **change})
        if not samples:
            records["empty_rounds"] += 1
            self.progress.message(f"note: task {task + 1}, round {round_ + 1}: no client of the cohort could train")
        if measured["own"]:
            records["spatial"] = [*records["spatial"], self.spatial(state, measured["own"])]
        every = self.config.evaluate.every
        if every and state.round % every == 0:
            correct, total = self.evaluator.row(
                self.evaluator.predictor(state.model, state.strategies, self.evaluator.known(task))
            )
            seen = ratio(sum(correct[: task + 1]), sum(total[: task + 1]))
            loss = sum(losses.values()) if losses else None
            row = [task, round_, seen, loss, measured["cohort"], samples, measured["steps"], measured["bytes_up"],
                   measured["bytes_down"]]  # fmt: skip
            records["rounds"] = [*records["rounds"], row]
            self.folder.write_rounds(ROUND_COLUMNS, records["rounds"])
            event["accuracy_seen"] = seen
        self.folder.log(event)
        state = replace(state, records=records)
        self.progress.round(task, round_, self.standing(state))
        return state

    def spatial(self, state: State, own: dict[str, list[int]]) -> list[list[int]]:
        """[client, correct of its own model, correct of the aggregated one, total] on its own test images."""
        node, known, rows = self.evaluator.node, self.evaluator.known(state.task), []
        for client, (correct, total) in own.items():
            stored = node.clients.get(int(client), state.sequence)
            model = {**state.model, **node.private_arrays(stored, len(known))}
            shared = self.evaluator.by_head(model, known, state.task, int(client))
            rows.append([int(client), correct, shared[0] if shared else 0, total])
        return rows

    def task_done(self, state: State) -> State:
        """Evaluates the model after a task: a row of the matrix, validation, each client."""
        task = state.task
        arrays = state.evaluated or state.model
        predictor = self.evaluator.predictor(arrays, state.strategies, self.evaluator.known(task))
        correct, total = self.evaluator.row(predictor)
        records = dict(state.records)
        records["correct"] = [*records["correct"], correct]
        records["total"] = total
        records["validation"] = [*records["validation"], list(self.evaluator.validation(predictor, task))]
        personal = self.evaluator.personal(arrays, state.strategies, self.evaluator.known(task), state.sequence)
        if personal is not None:
            records["personal"] = [*records["personal"], personal]
        newcomers = self.evaluator.newcomers(predictor)
        if newcomers is not None:
            records["newcomers"] = [*records.get("newcomers", []), newcomers]
        records["bytes"] = [*records["bytes"], [state.meter["up"], state.meter["down"]]]
        if self.config.evaluate.probes:
            earlier = records.get("probes", [])
            records["probes"] = [*earlier, self.probing.measure(arrays, task, earlier)]
            self.folder.write(PROBES_CSV, probes_csv(records["probes"]))
        state = replace(state, records=records)
        self.folder.write_matrix(self.matrix(state))
        if task == 0:
            self.folder.write("base.safetensors", pack_tensors(state.model))
        standing = self.standing(state)
        self.folder.log({
            "event": "task", "task": task, "round": None, "accuracy": self.matrix(state)[task],
            "accuracy_seen": standing.accuracy, "forgetting": standing.forgetting,
        })  # fmt: skip
        self.progress.task_done(task, standing)
        return state

    def matrix(self, state: State) -> Table:
        """The rows measured so far, square once the run is done."""
        total = state.records["total"]
        return [[ratio(c, n) for c, n in zip(row, total, strict=True)] for row in state.records["correct"]]

    def standing(self, state: State) -> Any:
        """Where the run stands, for the progress display."""
        from .progress import Standing

        records = state.records
        done = len(records["correct"])
        # The mean over the tasks, as in the summary: with tasks of unequal size the mean over images is another number.
        seen = mean_or_none(self.matrix(state)[-1][:done]) if done else None
        if records["rounds"] and records["rounds"][-1][0] == state.task and done == state.task:
            seen = records["rounds"][-1][2]
        lost = forgetting([row[:done] for row in self.matrix(state)]) if done > 1 else None
        return Standing(seen, lost, state.meter["up"] + state.meter["down"])

    def finish(self, state: State, hashes: dict[str, str]) -> dict[str, Any]:
        """Writes matrix, summary and plots; returns the summary."""
        from .plots import write_run_plots

        config, experiment, records = self.config, self.experiment, state.records
        matrix = self.matrix(state)
        metrics, undefined = summary_metrics(matrix, records["baseline"], records["total"])
        of_stream, missing = stream_metrics(matrix, records["total"])
        metrics, undefined = metrics | of_stream, undefined + missing
        probes = records["probes"][-1] if records.get("probes") else {}
        undefined += [f"probes.{p}.{n}" for p, values in probes.items() for n, v in values.items() if v is None]
        centralised = any(s.centralised for s in experiment.node.stack)
        up, down = (None, None) if centralised else (state.meter["up"], state.meter["down"])
        validation = ratio(*records["validation"][-1])
        metrics["spatial_forgetting"] = spatial_mean(records["spatial"])
        metrics["temporal_forgetting"] = mean_or_none(temporal_forgetting(matrix)) if len(matrix) > 1 else None
        undefined += [n for n in ("spatial_forgetting", "temporal_forgetting") if metrics[n] is None]
        undefined += [
            n for n, v in (("bytes_up", up), ("bytes_down", down), ("validation_accuracy", validation)) if v is None
        ]
        summary: dict[str, Any] = {
            **self.identity(), "dataset": experiment.dataset,
            "num_tasks": experiment.stream.num_tasks, "num_clients": experiment.split.clients,
            "rounds": config.federation.rounds * experiment.stream.num_tasks,
            "test_counts": records["total"], **metrics,
            "validation_accuracy": validation, "personal": by_client(records["personal"]),
            "newcomers": by_client(records.get("newcomers", [])),
            "probes": probes, "bytes_up": up, "bytes_down": down,
            "bytes_per_task": None if centralised else per_task(records["bytes"]),
            "empty_rounds": records["empty_rounds"], "dropped_images": records["dropped"],
            "wall_seconds": state.wall_seconds, **hashes, "split_sha256": experiment.split_sha256,
            "status": "done", "undefined": sorted(set(undefined)),
        }  # fmt: skip
        self.folder.write_matrix(matrix)
        if probes:
            self.folder.write(PROBES_CSV, probes_csv(records["probes"]))
        if config.output.plots:
            self.folder.write_summary(summary)
            write_run_plots(self.folder.path)
        self.folder.log({"event": "run_end", "status": "done"})
        self.folder.write_summary(summary)
        return summary

    def identity(self) -> dict[str, Any]:
        """What tells this run from others."""
        config = self.config
        return {
            "name": config.name, "seed": config.seed, "strategy": list(config.strategy),
            "scenario": config.scenario.name, "protocol": label(config),
        }  # fmt: skip

    def stop(self, status: str, cause: str | None) -> None:
        """Says in the folder that the run did not end; nothing that was measured is changed into a number."""
        summary = {
            **self.identity(), "status": status, "cause": cause, **dict.fromkeys(METRICS), "undefined": sorted(METRICS),
        }  # fmt: skip
        self.folder.log({"event": status, "cause": cause})
        self.folder.write_summary(summary)


def by_client(found: list[dict[str, list[list[int]]]]) -> dict[str, Any] | None:
    """Metrics of clients on images of their own: weighted mean, deviation, worst tenth; None without any.

    Args:
        found: after each task, each client's numbers of correct and of all images by task.
    """
    if not found:
        return None
    matrices = [
        [[ratio(c, n) for c, n in zip(step["correct"][k], step["total"][k], strict=True)] for step in found]
        for k in range(len(found[0]["total"]))
    ]
    return {n: asdict(s) for n, s in summarise_client_matrices(matrices, found[0]["total"]).items()}


def spatial_mean(tasks: list[list[list[int]]]) -> float | None:
    """Mean over tasks of what aggregation takes from the clients' own models, weighted by their test images.

    Args:
        tasks: for each task rows of (client, correct alone, correct aggregated, total).

    >>> spatial_mean([[[0, 9, 5, 10], [1, 10, 10, 10]]])
    0.2
    """
    return mean_or_none([(sum(r[1] for r in t) - sum(r[2] for r in t)) / sum(r[3] for r in t) for t in tasks])


def per_task(totals: list[list[int]]) -> list[list[int]]:
    """[up, down] of each task from the running totals after each."""
    before = [[0, 0], *totals]
    return [[b[0] - a[0], b[1] - a[1]] for a, b in zip(before, totals, strict=False)]
