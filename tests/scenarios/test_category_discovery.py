"""Category discovery: nothing but the base session is labelled, and clusters are judged over all classes shown."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from fedcl import config as settings
from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.metrics.clustering import k_means
from fedcl.scenarios.category_discovery import CategoryDiscovery
from fedcl.stream import DatasetLabels


def built(**options):
    data = DatasetLabels(np.arange(120) % 6, np.arange(30) % 6, 6)
    return CategoryDiscovery().build(data, settings.Scenario(name="category_discovery", **options), 0.0, 0)


def test_only_the_base_session_has_labels():
    stream = built(base=3, increment=1, mixed=0.4)
    named = np.setdiff1d(np.concatenate([s.train_ids for s in stream.stages]), stream.unlabelled)
    assert set(named.tolist()) == set(stream.stages[0].train_ids.tolist())
    for session, stage in enumerate(stream.stages[1:], 1):
        assert set(stream.train_labels[stage.train_ids].tolist()) == set(range(3 + session))


def test_labelled_is_not_read():
    with pytest.raises(UsageError, match=r"scenario\.labelled=0\.2"):
        built(base=3, increment=1, labelled=0.2)


def test_clusters_of_all_classes_shown_so_far(tiny, tiny_config):
    world = {"scenario.name": "category_discovery", "scenario.base": 2, "scenario.increment": 1, "scenario.first": 3}
    result = tiny(world)
    experiment = build(tiny_config(world))
    stream = experiment.stream
    tested = np.concatenate([*(stage.test_ids for stage in stream.stages), stream.unnamed[0]])
    rows = np.sort(tested[stream.test_labels[tested] < 4])
    features = result.model(experiment.test.batch(torch.from_numpy(rows), torch.float64)).features.detach()
    unit = torch.nn.functional.normalize(features, dim=1).numpy()
    labels = stream.test_labels[rows]
    clusters = k_means(unit, 4, 0)
    best = max(np.mean(np.array(named)[clusters] == labels) for named in permutations(range(4)))
    found = result.summary["probes"]["clustering"]
    assert found["all"] == pytest.approx(best)
    assert found["clusters"] == 4
    share = (labels < 2).mean()
    assert found["all"] == pytest.approx(share * found["old"] + (1 - share) * found["new"])


def test_a_stack_of_labels_trains_the_base_session_only(tiny):
    world = {"scenario.name": "category_discovery", "scenario.base": 6, "scenario.tasks": 3}
    frozen = tiny({"strategy": ["finetune"], **world})
    assert frozen.summary["empty_rounds"] == 4
    notes = [line for line in (frozen.folder / "events.jsonl").read_text().splitlines() if "do not train" in line]
    assert len(notes) == 2
    assert tiny({"strategy": ["finetune", "simclr"], **world}).summary["empty_rounds"] == 0


def test_without_new_classes_new_is_undefined(tiny):
    summary = tiny({"evaluate.probes": ["clustering"]}).summary
    assert summary["probes"]["clustering"]["new"] is None
    assert summary["probes"]["clustering"]["old"] == summary["probes"]["clustering"]["all"]
    assert "probes.clustering.new" in summary["undefined"]
