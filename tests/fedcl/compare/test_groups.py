"""Which runs are seeds of one method, and what a method is called."""

import pytest

from fedcl.compare.groups import group
from fedcl.errors import UsageError
from fedcl.records.runs import find_runs


def labels(path, **arguments):
    return [method.label for method in group(find_runs([path]).runs, **arguments)[0]]


def test_runs_that_differ_by_seed_name_output_engine_are_one_method(runs):
    runs("a", [0.5])
    runs("b", [0.6], {"engine.dtype": "float64", "output.plots": False, "data.root": "x"}, seeds=[1])
    path = runs("c", [0.7], {"strategy": ["fedavg"], "evaluate.every": 1}, seeds=[2])  # another name of finetune
    methods, again = group(find_runs([path]).runs)
    assert [method.label for method in methods] == ["finetune"]
    assert methods[0].seeds == (0, 1, 2)
    assert again == []


def test_labels_say_what_the_stack_does_not(runs):
    runs("a", [0.5], {"strategy": ["fedprox"]})
    runs("b", [0.5], {"strategy": ["fedprox"], "options.fedprox.mu": 1})
    runs("c", [0.5], {"strategy": ["fedprox"], "options.fedprox.mu": 1, "optimiser.lr": 0.5})
    path = runs("d", [0.5], {"strategy": ["replay", "fedprox"], "optimiser.lr": 0.5})
    assert labels(path) == [
        "fedprox (optimiser.lr=0.05, mu=0.01)",
        "fedprox (optimiser.lr=0.05, mu=1)",
        "fedprox (optimiser.lr=0.5, mu=1)",
        "replay + fedprox",
    ]


def test_an_option_at_its_default_is_the_option_not_given(runs):
    runs("a", [0.5], {"strategy": ["fedprox"]})
    path = runs("b", [0.5], {"strategy": ["fedprox"], "options.fedprox.mu": 0.01}, seeds=[1])
    assert labels(path) == ["fedprox"]


def test_a_seeds_own_base_session_is_one_method(runs):
    for seed in (0, 1):
        path = runs("a", [0.5], {"init": f"base/seed-{seed}@task0"}, seeds=[seed])
    assert labels(path) == ["finetune"]


def test_by_names_what_tells_methods_apart(runs):
    runs("a", [0.5, 0.6])
    path = runs("b", [0.5, 0.7], {"engine.dtype": "float64"})
    assert labels(path, by=["engine.dtype"]) == ["engine.dtype=float32", "engine.dtype=float64"]
    assert labels(path, by=["strategy", "engine"]) == [
        "finetune (engine.dtype=float32)",
        "finetune (engine.dtype=float64)",
    ]
    assert labels(path, by=["name"]) == ["a", "b"]
    with pytest.raises(UsageError, match=r"engine.dtipe.*Did you mean 'engine.dtype'"):
        labels(path, by=["engine.dtipe"])


def test_by_may_not_mix_settings(runs):
    runs("a", [0.5], {"strategy": ["fedprox"]})
    path = runs("b", [0.6], {"strategy": ["fedprox"], "options.fedprox.mu": 1}, seeds=[1])
    with pytest.raises(UsageError, match=r"options\.fedprox\.mu"):
        labels(path, by=["strategy"])
    assert labels(path, by=["options"]) == ["mu=0.01", "mu=1"]
