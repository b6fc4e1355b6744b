"""Probes of a run: against literal evaluations of its final model, in its files, and across a resumed run."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fedcl.errors import UsageError
from fedcl.measure.probe_values import HISTORY, PROBES
from fedcl.metrics.matrix import forgetting
from fedcl.settings.validation import PROBES as NAMED

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
Settings = Callable[[Mapping[str, Any]], "Config"]
EVERY = {"evaluate.probes": list(NAMED), "scenario.tasks": 3}


def table(folder: Path) -> dict[tuple[int, str, str], float | None]:
    rows = list(csv.DictReader((folder / "probes.csv").open()))
    assert len({(r["task"], r["probe"], r["name"]) for r in rows}) == len(rows)
    return {(int(r["task"]), r["probe"], r["name"]): float(r["value"]) if r["value"] else None for r in rows}


def test_every_name_has_a_probe() -> None:
    assert list(PROBES) == list(NAMED)
    assert set(NAMED) >= HISTORY


def test_files_agree_and_probes_change_nothing(tiny: Tiny) -> None:
    plain, probed = tiny({"scenario.tasks": 3}), tiny(EVERY)
    for key in ("model_sha256", "state_sha256", "average_accuracy", "split_sha256"):
        assert plain.summary[key] == probed.summary[key]
    assert plain.summary["probes"] == {}
    assert not (plain.folder / "probes.csv").exists()
    found, last = table(probed.folder), probed.summary["probes"]
    assert set(last) == set(NAMED)
    assert {(p, n): v for p, values in last.items() for n, v in values.items()} == {
        (p, n): v for (task, p, n), v in found.items() if task == 2
    }
    events = [json.loads(line) for line in (probed.folder / "events.jsonl").read_text().splitlines()]
    events = [e for e in events if e["event"] == "probes"]
    assert [e["task"] for e in events] == [0, 1, 2]
    assert events[2]["values"] == last
    null = {f"probes.{p}.{n}" for p, values in last.items() for n, v in values.items() if v is None}
    assert null == {n for n in probed.summary["undefined"] if n.startswith("probes.")}


def test_what_compares_tasks_is_undefined_after_the_first(tiny: Tiny) -> None:
    result = tiny({**EVERY, "scenario.tasks": 1})
    undefined = {n for n in result.summary["undefined"] if n.startswith("probes.")}
    assert undefined == {
        "probes.nearest_mean.forgetting", "probes.knn.forgetting", "probes.linear.forgetting",
        "probes.compatibility.ac", "probes.compatibility.bc", "probes.compatibility.fc", "probes.cka.old",
        "probes.drift.distance", "probes.drift.cosine", "probes.prototypes.error", "probes.prototypes.relative",
        "probes.clustering.new", "probes.novelty.auroc_softmax", "probes.novelty.fpr95_softmax",
        "probes.novelty.auroc_energy", "probes.novelty.fpr95_energy",
    }  # fmt: skip


def test_values_by_hand_from_the_final_model(tiny: Tiny, tiny_config: Settings) -> None:
    from fedcl.build import build

    settings = {**EVERY, "evaluate.probe_samples": 0}
    result = tiny(settings)
    experiment = build(tiny_config(settings))
    stages, stream = experiment.stream.stages, experiment.stream

    def features(store: Any, rows: Any) -> tuple[Any, Any]:
        out = result.model(store.batch(torch.from_numpy(rows), torch.float64))
        return out.features.detach().numpy(), out.logits.detach().softmax(dim=1).numpy()

    train_rows = np.concatenate([s.train_ids for s in stages])
    test_rows = np.concatenate([s.test_ids for s in stages])
    x, _ = features(experiment.node.store, train_rows)
    q, shares = features(experiment.test, test_rows)
    y, truth = stream.train_labels[train_rows], stream.test_labels[test_rows]
    x, unit = (a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-12) for a in (x, q))
    votes = np.zeros((len(q), stream.num_classes))
    for i, similarity in enumerate(unit @ x.T):
        for j in np.argsort(-similarity, kind="stable")[:20]:
            votes[i, y[j]] += np.exp(similarity[j] / 0.07)
    means = np.array([x[y == c].mean(0) for c in range(stream.num_classes)])
    nearest = np.linalg.norm(unit[:, None] - means[None], axis=2).argmin(1)
    alike = unit @ unit.T - 9 * np.eye(len(q))
    probes = result.summary["probes"]
    assert probes["knn"]["accuracy"] == pytest.approx((votes.argmax(1) == truth).mean(), abs=1e-12)
    assert probes["nearest_mean"]["accuracy"] == pytest.approx((nearest == truth).mean(), abs=1e-12)
    assert probes["retrieval"]["recall_at_1"] == pytest.approx((truth[alike.argmax(1)] == truth).mean(), abs=1e-12)
    assert probes["compatibility"]["task_2"] == probes["retrieval"]["recall_at_1"]
    last = np.isin(test_rows, stages[2].test_ids)
    assert probes["nearest_mean"]["task_2"] == pytest.approx((nearest == truth)[last].mean(), abs=1e-12)
    assert probes["dormant"]["dead"] == (np.abs(q).sum(0) == 0).mean()
    assert probes["calibration"]["accuracy"] == pytest.approx((shares.argmax(1) == truth).mean(), abs=1e-12)
    assert probes["calibration"]["confidence"] == pytest.approx(shares.max(1).mean(), abs=1e-6)
    assert probes["calibration"]["accuracy"] == pytest.approx(
        sum((r or 0.0) * n for r, n in zip(result.matrix[2], result.summary["test_counts"], strict=True)) / len(q)
    )


def test_history_is_compared_with_the_models_that_were(tiny: Tiny) -> None:
    from fedcl.records.checkpoint import unpack_tensors

    result = tiny(EVERY)
    kept = [
        unpack_tensors((result.folder / f"probes/task-{t:03d}.safetensors").read_bytes())["features"] for t in range(3)
    ]
    assert len({len(k) for k in kept}) == 1
    found, probes = table(result.folder), result.summary["probes"]
    from fedcl.build import build
    from fedcl.config import load_config
    from fedcl.measure.probing import panel_rows

    experiment = build(load_config(result.folder / "config.yaml"))
    stages, labels = experiment.stream.stages, experiment.stream.test_labels
    rows, tasks = panel_rows([s.test_ids for s in stages], labels, 20, 0, "probe", "test")
    total = 0.0
    for task in (0, 1):
        own = torch.from_numpy(tasks == task)
        gaps = (kept[2][own] - kept[task][own]).norm(dim=1)
        assert probes["drift"][f"task_{task}"] == pytest.approx(float(gaps.mean()), rel=1e-12)
        total += float(gaps.sum())
    assert probes["drift"]["distance"] == pytest.approx(total / int((tasks < 2).sum()), rel=1e-12)
    assert probes["drift"]["distance"] > 0
    now, old = (torch.nn.functional.normalize(kept[t], dim=1) for t in (2, 0))
    nearest = (now @ old.T).fill_diagonal_(-9).argmax(dim=1)
    panel = torch.from_numpy(labels[rows])
    assert probes["compatibility"]["task_0"] == pytest.approx(float((panel[nearest] == panel).double().mean()))
    triangle = [[found.get((i, "knn", f"task_{j}")) for j in range(3)] for i in range(3)]
    assert probes["knn"]["forgetting"] == forgetting(triangle)
    square = [[found.get((i, "compatibility", f"task_{j}")) or 0.0 for j in range(3)] for i in range(3)]
    assert probes["compatibility"]["bc"] == pytest.approx(
        (square[2][0] - square[0][0] + square[2][1] - square[1][1]) / 2, abs=1e-15
    )


def test_the_panel_is_balanced_and_lasting() -> None:
    from fedcl.measure.probing import panel_rows

    labels = np.array([0] * 50 + [1] * 3 + [2] * 9)
    ids = [np.arange(53), np.arange(45, 62)]
    rows, tasks = panel_rows(ids, labels, 4, 0, "x")
    pairs = list(zip(tasks.tolist(), labels[rows].tolist(), strict=True))
    assert {pair: pairs.count(pair) for pair in pairs} == {(0, 0): 4, (0, 1): 3, (1, 0): 4, (1, 1): 3, (1, 2): 4}
    earlier, _ = panel_rows(ids[:1], labels, 4, 0, "x")
    assert rows[tasks == 0].tolist() == earlier.tolist()
    assert sorted(panel_rows(ids[:1], labels, 0, 0, "x")[0].tolist()) == list(range(53))
    assert panel_rows([], labels, 4)[0].tolist() == []


@pytest.mark.parametrize("chosen", [["compatibility"], ["drift", "cka"], ["prototypes"], ["linear"]])
def test_a_probe_alone_gives_what_it_gives_among_all(tiny: Tiny, chosen: list[str]) -> None:
    everything = tiny(EVERY).summary["probes"]
    alone = tiny({**EVERY, "evaluate.probes": chosen})
    assert alone.summary["probes"] == {name: everything[name] for name in chosen}
    assert (alone.folder / "probes").exists() == bool(HISTORY & set(chosen))


def stop_at(task: int) -> Callable[..., Any]:
    from fedcl.errors import RunFailed
    from fedcl.measure.probing import Probing

    original = Probing.measure

    def measure(self: Probing, arrays: Any, at: int, earlier: Any) -> Any:
        if at == task:
            raise RunFailed("stopped for the test")
        return original(self, arrays, at, earlier)

    return measure


@pytest.mark.parametrize("damaged", [False, True])
def test_a_resumed_run_has_the_values_of_a_whole_one(tiny: Tiny, tiny_config: Settings, damaged: bool) -> None:
    from fedcl.errors import RunFailed
    from fedcl.measure.probing import Probing
    from fedcl.run import execute, resume
    from fedcl.tell.progress import QuietProgress

    whole, config = tiny(EVERY), tiny_config(EVERY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probing, "measure", stop_at(2))
        with pytest.raises(RunFailed, match="stopped"):
            execute(config, progress=QuietProgress())
    folder = Path(config.output.dir) / config.name / "seed-0"
    if damaged:
        (folder / "probes/task-000.safetensors").write_bytes(b"x")
    again = resume(folder, progress=QuietProgress())
    if not damaged:
        assert again.summary["probes"] == whole.summary["probes"]
        assert (folder / "probes.csv").read_text() == (whole.folder / "probes.csv").read_text()
        return
    probes = again.summary["probes"]
    assert probes["knn"] == whole.summary["probes"]["knn"]
    assert probes["cka"]["task_1"] == whole.summary["probes"]["cka"]["task_1"]
    assert (probes["cka"]["task_0"], probes["cka"]["old"], probes["drift"]["distance"]) == (None, None, None)
    assert {"probes.cka.old", "probes.compatibility.ac"} <= set(again.summary["undefined"])
    warned = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert any(e["event"] == "warning" and "task 1 is undefined" in e["message"] for e in warned)


def test_wrong_names_are_refused(tiny_config: Settings) -> None:
    with pytest.raises(UsageError, match=r"evaluate.probes='nearest-mean'.*Did you mean 'nearest_mean'"):
        tiny_config({"evaluate.probes": ["nearest-mean"]})
    with pytest.raises(UsageError, match="twice"):
        tiny_config({"evaluate.probes": ["knn", "knn"]})
    with pytest.raises(UsageError, match=r"evaluate.probe_samples=-1"):
        tiny_config({"evaluate.probe_samples": -1})


def test_probes_are_listed() -> None:
    from fedcl.commands.listing import rows

    assert [row.name for row in rows("probes")] == list(NAMED)


def test_probes_at_the_edge_of_what_works(tiny: Tiny, hard: dict[str, Any]) -> None:
    result = tiny({"evaluate.probes": list(NAMED), **hard})
    assert result.summary["status"] == "done"
    assert set(result.summary["probes"]) == set(NAMED)
