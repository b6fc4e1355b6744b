"""What a run writes down while it goes: events, rows of the accuracy matrix, rounds, the summary."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..federation.server import State
from ..measure import costs
from ..measure.breakdown import CLASSES_CSV, CLIENTS_CSV, class_csv, client_csv
from ..measure.costs import COSTS_CSV, Held, costs_csv
from ..measure.evaluation import counted
from ..measure.feature_log import keep_features
from ..measure.judging import told
from ..measure.own_matrices import CLIENT_MATRICES, own_matrices
from ..measure.probing import PROBES_CSV, Probing, probes_csv
from ..measure.tallies import Table, by_client, per_task, ratio, spatial_mean
from ..metrics.clients import temporal_forgetting
from ..metrics.matrix import forgetting, mean_or_none, summary_metrics
from ..metrics.of_run import class_summary, run_metrics
from ..metrics.streams import session_accuracy, stream_metrics
from ..settings.protocols import label
from .checkpoint import pack_tensors

if TYPE_CHECKING:
    from ..build import Experiment
    from ..measure.evaluation import Evaluator
    from ..tell.progress import Progress
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


class Recorder:
    """Turns the states of a run into files.

    Everything measured stands in ``state.records``, so that a resumed run goes on with it.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, progress: Progress, evaluator: Evaluator) -> None:
        self.experiment, self.folder, self.progress, self.evaluator = experiment, folder, progress, evaluator
        self.config = experiment.config
        self.probing = Probing(evaluator, folder)
        self.own = own_matrices(evaluator)

    @property
    def centralised(self) -> bool:
        """Whether a bound of the stack pools the data, so that nothing travels."""
        return any(s.centralised for s in self.experiment.node.stack)

    @property
    def title(self) -> str:
        """One line that says what runs."""
        c = self.config
        who = "centralised" if self.centralised else f"{self.experiment.split.clients} clients"
        return (
            f"{c.name}: {' + '.join(c.strategy)} on {self.experiment.dataset}, {c.scenario.name}, {who}, seed {c.seed}"
        )

    def say_warnings(self) -> None:
        """Tells in short what is odd about the split; the details go to the events."""
        for text in self.experiment.notes:
            self.progress.message(f"note: {text}")
        for text in self.experiment.warnings:
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
            baseline = baseline if self.own is None else self.own.baseline(predictor)
        records = {"correct": [], "total": [], "validation": [], "personal": [], "baseline": baseline, "rounds": [],
                   "bytes": [], "spatial": [], "empty_rounds": 0, "dropped": 0, "costs": costs.begin()}  # fmt: skip
        return replace(state, records=records)

    def scores_unseen(self) -> bool:
        """Whether the classes of every task can be predicted one task earlier."""
        stream = self.experiment.stream
        if self.experiment.node.stack.owners["predict"] is not None or self.evaluator.judged:
            return False
        return stream.task_known or all(not stage.classes for stage in stream.stages[1:])

    def round_done(self, state: State, measured: dict[str, Any]) -> State:
        """Logs a round; evaluates it when asked to."""
        task, round_ = state.task, state.round - 1
        samples = measured["samples"]
        # A term counts for the clients that have it: without labels there is no task loss.
        losses = {n: v / measured["terms"][n] for n, v in measured["losses"].items()} if samples else {}
        event = {
            "event": "round", "task": task, "round": round_, "clients": measured["cohort"], "samples": samples,
            "steps": measured["steps"], "losses": losses, "bytes_up": measured["bytes_up"],
            "bytes_down": measured["bytes_down"], "empty_clients": measured["empty"], "idle_clients": measured["idle"],
            "dropped_images": measured["dropped"], "floats_up": measured["floats_up"],
            "floats_down": measured["floats_down"], "simulated_seconds": measured["simulated_seconds"],
            "stragglers": [[client, steps] for client, steps in measured["stragglers"].items()],
        }  # fmt: skip
        records = dict(state.records)
        records["costs"], did = costs.add_round(records.get("costs"), task, round_, measured)
        self.folder.log({"event": "costs", "task": task, "round": round_, **did})
        for text in costs.uncounted(measured):
            self.folder.log({"event": "warning", "message": text})
        records["dropped"] += measured["dropped"]
        records["simulated"] = records.get("simulated", 0.0) + measured["simulated_seconds"]
        records["seen"] = records.get("seen", 0) + samples
        for change in measured["engine"]:
            what = f"{change['chunk']} clients at a time" if "chunk" in change else "clients one by one"
            self.progress.message(f"note: from task {task + 1}, round {round_ + 1} on, {what}: {change['why']}")
            self.folder.log({"event": "engine", "task": task, "round": round_, **change})
        if not samples:
            records["empty_rounds"] += 1
            why = "every update came too late" if 0 in measured["stragglers"].values() else "no client could train"
            self.progress.message(f"note: task {task + 1}, round {round_ + 1}: nothing learned, {why}")
        if measured["own"]:
            records["spatial"] = [*records["spatial"], self.spatial(state, measured["own"])]
        every = self.config.evaluate.every
        if every and state.round % every == 0:
            seen = self.seen(state)
            loss = sum(losses.values()) if losses else None
            row = [task, round_, seen, loss, measured["cohort"], samples, measured["steps"], measured["bytes_up"],
                   measured["bytes_down"]]  # fmt: skip
            records["rounds"] = [*records["rounds"], row]
            records["curve"] = [*records.get("curve", []), [records["seen"], seen]]
            self.folder.write_rounds(ROUND_COLUMNS, records["rounds"])
            event["accuracy_seen"] = seen
        self.folder.log(event)
        state = replace(state, records=records)
        self.progress.round(task, round_, self.standing(state))
        return state

    def seen(self, state: State) -> float | None:
        """Accuracy of the global model within a task, on the images of the tasks so far."""
        task = state.task
        predictor = self.evaluator.predictor(state.model, state.strategies, self.evaluator.known(task), task)
        if self.own is not None:
            return self.own.seen(self.own.measure(predictor, task)[0], task)
        correct, total = self.evaluator.row(predictor)
        return ratio(sum(correct[: task + 1]), sum(total[: task + 1]))

    def spatial(self, state: State, own: dict[str, list[int]]) -> list[list[int]]:
        """[client, correct of its own model, correct of the aggregated one, total] on its own test images."""
        node, rows = self.evaluator.node, []
        for client, (correct, total) in own.items():
            known = self.evaluator.known_to(state.task, int(client))
            stored = node.clients.get(int(client), state.sequence)
            model = {**state.model, **node.private_arrays(stored, len(known))}
            shared = self.evaluator.by_head(model, known, state.task, int(client))
            rows.append([int(client), correct, shared[0] if shared else 0, total])
        return rows

    def task_done(self, state: State) -> State:
        """Evaluates the model after a task: a row of the matrix, validation, each client."""
        task = state.task
        arrays = state.evaluated or state.model
        predictor = self.evaluator.predictor(arrays, state.strategies, self.evaluator.known(task), task)
        records = dict(state.records)
        if self.own is None:
            hits = self.evaluator.hits(predictor)
        else:
            found, hits = self.own.measure(predictor, task)
            records["own_tasks"] = [*records.get("own_tasks", []), found]
        correct, total = counted(hits)
        records["by_class"] = [*records.get("by_class", []), [task, *self.evaluator.by_class(hits, task)]]
        records["correct"] = [*records["correct"], correct]
        records["total"] = total if self.own is None else self.own.total
        records["validation"] = [*records["validation"], list(self.evaluator.validation(predictor, task))]
        personal = self.evaluator.personal(arrays, state.strategies, state.sequence, task)
        if personal is not None:
            records["personal"] = [*records["personal"], personal]
        newcomers = self.evaluator.newcomers(predictor, state.strategies, task)
        if newcomers is not None:
            records["newcomers"] = [*records.get("newcomers", []), newcomers]
        records["bytes"] = [*records["bytes"], [state.meter["up"], state.meter["down"]]]
        records["costs"] = costs.add_task(records.get("costs"), state.meter)
        self.folder.write(COSTS_CSV, costs_csv(records["costs"], self.centralised))
        if self.config.evaluate.probes:
            earlier = records.get("probes", [])
            records["probes"] = [*earlier, self.probing.measure(arrays, task, earlier)]
            self.folder.write(PROBES_CSV, probes_csv(records["probes"]))
        if self.config.evaluate.features:
            keep_features(self.probing, arrays, task, self.config.evaluate.features)
        self.folder.write(CLASSES_CSV, class_csv(records["by_class"], self.experiment.classes))
        if personal is not None:
            self.folder.write(CLIENTS_CSV, client_csv(records["personal"]))
        state = replace(state, records=records)
        self.folder.write_matrix(self.matrix(state))
        if task == 0:
            self.folder.write("base.safetensors", pack_tensors(state.model))
        standing = self.standing(state)
        self.folder.log({
            "event": "task", "task": task, "round": None, "accuracy": self.matrix(state)[-1],
            "accuracy_seen": standing.accuracy, "forgetting": standing.forgetting,
        })  # fmt: skip
        self.progress.task_done(task, standing)
        return state

    def matrix(self, state: State) -> Table:
        """The rows measured so far, square once the run is done; by clocks of the clients' own, the mean of theirs."""
        if self.own is not None:
            return self.own.matrix(state.records.get("own_tasks", []))
        total = state.records["total"]
        return [[ratio(c, n) for c, n in zip(row, total, strict=True)] for row in state.records["correct"]]

    def standing(self, state: State) -> Any:
        """Where the run stands, for the progress display."""
        from ..tell.progress import Standing

        records = state.records
        done, matrix = len(records["correct"]), self.matrix(state)
        # The mean over the tasks, as in the summary: with tasks of unequal size the mean over images is another number.
        seen = mean_or_none(matrix[-1][: len(matrix)]) if done else None
        if records["rounds"] and records["rounds"][-1][0] == state.task and done == state.task:
            seen = records["rounds"][-1][2]
        lost = forgetting([row[: len(matrix)] for row in matrix]) if len(matrix) > 1 else None
        return Standing(seen, lost, state.meter["up"] + state.meter["down"])

    def finish(self, state: State, hashes: dict[str, str], held: Held) -> dict[str, Any]:
        """Writes matrix, summary and plots; returns the summary."""
        from ..plots import write_run_plots

        config, experiment, records = self.config, self.experiment, state.records
        matrix = self.matrix(state)
        metrics, undefined = summary_metrics(matrix, records["baseline"], records["total"])
        for found, missing in (stream_metrics(matrix, records["total"]), run_metrics(records)):
            metrics, undefined = metrics | found, undefined + missing
        probes = records["probes"][-1] if records.get("probes") else {}
        undefined += [f"probes.{p}.{n}" for p, values in probes.items() for n, v in values.items() if v is None]
        up, down = (None, None) if self.centralised else (state.meter["up"], state.meter["down"])
        spent, measured, unspent = costs.sections(records.get("costs"), held, self.centralised, experiment.node)
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
            "test_counts": records["total"], "untested_tasks": [t for t, n in enumerate(records["total"]) if not n],
            **metrics, "session_accuracy": session_accuracy(matrix, records["total"]),
            "by_class": class_summary(records["by_class"]),
            "validation_accuracy": validation, "personal": by_client(records["personal"]),
            "newcomers": by_client(records.get("newcomers", [])),
            "own_tasks": None if self.own is None else self.own.summary(records["own_tasks"]),
            "probes": probes, "accuracy_of": told(self.evaluator), "bytes_up": up, "bytes_down": down,
            "bytes_per_task": None if self.centralised else per_task(records["bytes"]),
            "costs": spent, "measured": measured,
            "empty_rounds": records["empty_rounds"], "dropped_images": records["dropped"],
            "simulated_seconds": records["simulated"],
            "wall_seconds": state.wall_seconds, **hashes, "split_sha256": experiment.split_sha256,
            "status": "done", "undefined": sorted({*undefined, *unspent}),
        }  # fmt: skip
        self.folder.write_matrix(matrix)
        if self.own is not None:
            self.folder.write(CLIENT_MATRICES, self.own.written(records["own_tasks"]))
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

    def stop(self, status: str, cause: str | None) -> dict[str, Any]:
        """Says in the folder that the run did not end, and returns the summary; no measurement becomes a number."""
        summary = {
            **self.identity(), "status": status, "cause": cause, **dict.fromkeys(METRICS), "undefined": sorted(METRICS),
        }  # fmt: skip
        self.folder.log({"event": status, "cause": cause})
        self.folder.write_summary(summary)
        return summary
