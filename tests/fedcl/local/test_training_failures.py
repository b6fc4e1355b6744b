"""Failures in local training and in hooks: one clear line that names who and where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from fedcl.errors import RunFailed

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]


def test_a_loss_that_is_not_finite_names_client_and_term(tiny: Tiny, plugin: Any) -> None:
    settings = plugin(
        """
        def loss(self, step):
            bad = step.task == 1 and step.round == 1
            return {"good": step.x.sum() * 0, "odd": step.output.logits.sum() * (float("nan") if bad else 0.0)}
        """
    )
    with pytest.raises(RunFailed, match=r"^task 2, round 2, client 0: the loss is not finite \(probe_\d+.odd = nan\)"):
        tiny(settings)


def test_a_rate_that_is_too_high_is_a_clear_failure(tiny: Tiny) -> None:
    with pytest.raises(RunFailed, match=r"not finite"):
        tiny({"optimiser.lr": 1e200})


@pytest.mark.parametrize(
    ("hook", "arguments"),
    [
        ("share", "name, model"), ("modules", "model"), ("groups", ""), ("begin_round", "ctx"), ("phases", "ctx"),
        ("rate", "step"), ("carry", "step, grads, params"), ("upload", "ctx, trained"),
        ("weight", "ctx, samples, steps"), ("round", "server"),
        ("sources", "ctx"), ("prepare", "batch"), ("task_loss", "step"), ("loss", "step"),
        ("edit_gradients", "step, grads"), ("after_step", "step, params"), ("end_round", "ctx, trained, steps"),
        ("begin_task", "server"), ("broadcast", "server"), ("after_aggregate", "server"), ("finish_task", "server"),
        ("predict", "predictor, x"),
    ],
)  # fmt: skip
def test_a_hook_that_raises_is_named_with_its_line(tiny: Tiny, plugin: Any, hook: str, arguments: str) -> None:
    settings = plugin(f"def {hook}(self, {arguments}):\n    raise LookupError('broken')")
    line = plugin.first_line + 1
    name = settings["strategy"][0]
    with pytest.raises(RunFailed) as caught:
        tiny(settings)
    assert str(caught.value) == f"strategy '{name}' failed in {hook}: LookupError: broken ({name}.py:{line})"


@pytest.mark.parametrize("path", ["sequential", "stacked"])
@pytest.mark.parametrize(
    ("hook", "body"),
    [
        ("edit_gradients", "def edit_gradients(self, step, grads):\n    return {'head.weight': grads['head.weight']}"),
        ("after_step", "def after_step(self, step, params):\n    return {n: p.flatten() for n, p in params.items()}"),
    ],
)  # fmt: skip
def test_a_hook_that_drops_or_reshapes_arrays_is_named(
    tiny: Tiny, plugin: Any, hook: str, body: str, path: str
) -> None:
    settings = plugin(f"stackable = True\n{body}")
    with pytest.raises(RunFailed, match=f"{hook} must return the names and shapes of what it is given"):
        tiny({**settings, "engine.path": path})


def test_an_exchanged_function_that_raises_is_named(tiny: Tiny, plugin: Any) -> None:
    settings = plugin(
        """
        def count(self, ctx):
            raise LookupError("broken")
        def finish_task(self, server):
            server.exchange(self.count)
        """
    )
    with pytest.raises(RunFailed, match=r"failed in count: LookupError: broken \(probe_\d+.py:\d+\)"):
        tiny(settings)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def begin_task(self, server):\n    return None", r"failed in begin_task"),
        ("def after_aggregate(self, server):\n    return server.arrays", r"failed in after_aggregate"),
        ("def after_aggregate(self, server):\n    return {}, {}", r"the new global model has no 'encoder"),
        (
            "def after_aggregate(self, server):\n    return {**server.arrays, 'x': torch.ones(1)}, {}",
            r"'x' has another",
        ),
        ("def finish_task(self, server):\n    return server.arrays, {}", r"failed in finish_task"),
        ("def end_round(self, ctx, trained, steps):\n    return {}", r"failed in end_round"),
        ("def loss(self, step):\n    return None", r"loss must return a mapping of names to scalar tensors"),
        (
            "def after_aggregate(self, server):\n    return {n: a / 0 for n, a in server.arrays.items()}, {}",
            r"the global model is not finite after task 1, round 1",
        ),
    ],
)
def test_a_hook_that_returns_something_else_is_one_line(tiny: Tiny, plugin: Any, body: str, words: str) -> None:
    with pytest.raises(RunFailed, match=words):
        tiny(plugin(body))


def test_a_term_that_is_no_scalar_is_refused(tiny: Tiny, plugin: Any) -> None:
    settings = plugin("def loss(self, step):\n    return {'wide': step.output.logits.sum(dim=1)}")
    with pytest.raises(RunFailed, match=r"loss term 'wide' has shape \(8,\), not a scalar"):
        tiny(settings)


def test_an_undeclared_upload_is_refused(tiny: Tiny, plugin: Any) -> None:
    settings = plugin("def end_round(self, ctx, trained, steps):\n    return {'images': ctx.ids}, ctx.state")
    with pytest.raises(RunFailed, match=r"'probe_\d+/images' leaves a client without a declared reduction"):
        tiny(settings)


def test_an_unknown_model_name_lists_the_known(tiny: Tiny, plugin: Any) -> None:
    settings = plugin("def loss(self, step):\n    step.forward(step.x, 'teacher')\n    return {}")
    with pytest.raises(RunFailed, match=r"no model is named 'teacher' here; there are received, stage:previous"):
        tiny(settings)


def test_batches_of_one_image_under_batch_norm_say_what_to_set(tiny: Tiny) -> None:
    with pytest.raises(RunFailed, match=r"set federation.batch_min=2 or model.norm=group"):
        tiny({"model.norm": "batch", "federation.batch_size": 1})
