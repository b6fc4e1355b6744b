"""The benchmark's workloads are as stated, and all contestants do the same work."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedcl.bench.measure import measure
from fedcl.bench.workloads import STANDARD, of_cohort, settings


@pytest.mark.parametrize("workload", STANDARD)
def test_peers_train_the_network_that_we_train(workload: str) -> None:
    from fedcl.data.sources import load_dataset
    from fedcl.experiments.bench.work import network
    from fedcl.models.zoo import build_encoder

    config = settings(workload, [("data.limit", 5)])
    store = load_dataset(config.data).train
    encoder, features = build_encoder(config.model, store.shape)
    ours = nn.Sequential(encoder, nn.Linear(features, 10))
    peers = network(config.model, store.shape, 10)
    with torch.no_grad():
        for mine, theirs in zip(ours.parameters(), peers.parameters(), strict=True):
            mine.copy_(theirs)
    rates = [[m.p for m in net.modules() if isinstance(m, nn.Dropout)] for net in (ours, peers)]
    assert rates[0] == rates[1]
    x = store.batch(torch.arange(4))
    assert torch.equal(ours.eval()(x), peers.eval()(x))


@pytest.mark.parametrize(("workload", "clients"), [("mlp-100", 100), ("lenet-100", 100), ("cnn-50", 50)])
def test_workloads_are_as_stated(workload: str, clients: int) -> None:
    config = settings(workload)
    per_client = (config.data.limit or 0) * 10 / config.federation.clients
    assert (config.federation.clients, per_client, config.federation.batch_size) == (clients, 50, 10)
    assert (config.optimiser.name, config.optimiser.lr, config.optimiser.momentum) == ("sgd", 0.1, 0.0)
    assert (config.federation.epochs, config.federation.weighting) == (1, "uniform")
    assert (config.evaluate.every, config.checkpoint.every, config.data.augment) == (0, 0, [])


@pytest.mark.parametrize("path", ["sequential", "stacked"])
def test_a_round_of_ours_is_a_round_of_the_loop(path: str, tmp_path: Path) -> None:
    from fedcl.build import build
    from fedcl.experiments.bench.peer_loop import federated_round
    from fedcl.experiments.bench.work import network
    from fedcl.local.order import plan
    from fedcl.run import execute
    from fedcl.tell.progress import QuietProgress

    engine = [("engine.path", path), ("engine.dtype", "float64"), ("engine.threads", 1), ("engine.device", "cpu")]
    config = settings("mlp-100", [*of_cohort(4), ("federation.rounds", 1), ("output.dir", str(tmp_path)), *engine])
    result = execute(config, progress=QuietProgress())

    experiment = build(config)
    node, split = experiment.node, experiment.split
    images, labels = [], []
    for client in range(4):
        batches, dropped = plan(50, config, (config.seed, "client", client, 0, 0))
        assert [len(b) for b in batches] == [10] * 5
        assert dropped == 0
        ids = torch.as_tensor(split.train[0][client])[np.concatenate(batches)]
        images.append(node.store.batch(ids, torch.float64))
        labels.append(node.store.label_tensor[ids])
    server, local = (network(config.model, node.store.shape, 10).double() for _ in range(2))
    start = [node.grown(n, node.initial[n], 10, "initial") for n in node.parameters]
    with torch.no_grad():
        for mine, array in zip(server.parameters(), start, strict=True):
            mine.copy_(array)
    federated_round(server, local, torch.optim.SGD(local.parameters(), lr=0.1), images, labels, 10)

    ours, theirs = dict(result.model.named_parameters()), [p.detach() for p in server.parameters()]
    moved = [float((a - b).norm()) for a, b in zip(theirs, start, strict=True)]
    apart = [float((a - ours[n].detach()).norm()) for a, n in zip(theirs, node.parameters, strict=True)]
    assert min(moved) > 1e-3
    assert max(apart) < 1e-6


def test_a_round_of_pfl_is_a_round_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pfl")
    from fedcl.experiments.bench import peer_pfl
    from fedcl.experiments.bench.peer_loop import federated_round
    from fedcl.experiments.bench.work import work_of

    work = work_of("mlp-100", [*of_cohort(10), ("engine.device", "cpu")])
    server, local, theirs = (work.make() for _ in range(3))
    theirs.load_state_dict(server.state_dict())
    before = [p.detach().clone() for p in server.parameters()]
    said: list[str] = []

    class Heard:
        """Takes every turn at once and notes what was said."""

        def __getattr__(self, name: str) -> Any:
            return lambda *facts: said.append(name)

    monkeypatch.setattr(peer_pfl, "Turns", Heard)
    monkeypatch.setattr(peer_pfl, "work_of", lambda *arguments: replace(work, make=lambda: theirs))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    peer_pfl.main("mlp-100", 2, [])
    assert said == ["ready", "wait", "done", "wait", "done", "finish"]

    optimiser = torch.optim.SGD(local.parameters(), lr=work.lr)
    for _ in range(2):
        federated_round(server, local, optimiser, work.images, work.labels, work.batch)
    for mine, other, start in zip(server.parameters(), theirs.parameters(), before, strict=True):
        assert float((mine - other).norm().detach()) < 1e-5 < 1e-3 < float((mine - start).norm().detach())


@pytest.mark.slow
def test_real_contestants_take_their_turns() -> None:
    names = ["fedcl", "loop"] + (["pfl"] if importlib.util.find_spec("pfl") else [])
    result = measure("mlp-100", of_cohort(10), 2, names, ["engine.threads=1"], "cpu", lambda line: None)
    reasons = {n: r for n, r in result["reasons"].items() if n in names}
    assert reasons == {}
    assert all(len(result["seconds"][name]) == 2 for name in names)
    assert all(min(result["seconds"][name]) > 0 for name in names)
    assert result["engine"]["threads"] == 1
    assert result["engine"]["path"] in ("stacked", "sequential")
    assert result["device"] == "cpu"
    if sys.platform == "linux":
        assert all(50 < result["peak_memory_mb"][name] < 5000 for name in names)
