"""Hooks of a client's round beside its losses: phases, what is carried through the steps, rates, uploads, weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fedcl.errors import RunFailed

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
Arrays = Mapping[str, torch.Tensor]

ONE_ROUND = {"scenario.tasks": 1, "federation.rounds": 1, "engine.dtype": "float64", "optimiser.momentum": 0.0}
BOTH = pytest.mark.parametrize("path", ["sequential", "stacked"])


def arrays_of(result: RunResult) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in result.model.named_parameters()}


def off(one: Arrays, other: Arrays) -> float:
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max()) for n in one)


@BOTH
def test_phases_train_what_they_say_for_as_long_as_they_say(tiny: Tiny, plugin: Any, path: str) -> None:
    settings = plugin(
        """
        def phases(self, ctx):
            head = Phase("head", lambda n: n.startswith("head."), epochs=3)
            return [head, Phase("body", lambda n: not n.startswith("head."), steps=2, lr_scale=0.5)]

        def end_round(self, ctx, trained, steps):
            SEEN.append((ctx.client, steps, ctx.counts.sum(), ctx.received, ctx.outcomes, trained))
            return {}, ctx.state
        """,
        **ONE_ROUND,
    )
    result = tiny({**settings, "engine.path": path})
    noted = plugin.seen(settings)
    assert len(noted) == 3
    for _, steps, images, received, outcomes, trained in noted:
        assert steps == 3 * -(-int(images) // 8) + 2
        assert list(outcomes) == ["head", "body"]
        head, body = outcomes["head"], outcomes["body"]
        assert torch.equal(head["encoder.1.weight"], received["encoder.1.weight"])
        assert not torch.equal(head["head.weight"], received["head.weight"])
        assert torch.equal(body["head.weight"], head["head.weight"])
        assert not torch.equal(body["encoder.1.weight"], head["encoder.1.weight"])
        assert off(body, trained) == 0.0
    rows = (result.folder / "costs.csv").read_text().splitlines()
    assert int(rows[1].split(",")[3]) == sum(n[1] for n in noted)


def test_phases_of_the_whole_are_the_default_round(tiny: Tiny, plugin: Any) -> None:
    plain = tiny({**ONE_ROUND, "federation.epochs": 2, "engine.path": "sequential"})
    body = "def phases(self, ctx):\n    return [Phase('all', epochs=2)]"
    assert off(arrays_of(tiny(plugin(body, **ONE_ROUND))), arrays_of(plain)) == 0.0


@BOTH
def test_a_side_phase_has_its_own_start_and_leaves_the_model_alone(tiny: Tiny, plugin: Any, path: str) -> None:
    settings = plugin(
        """
        def phases(self, ctx):
            zero = {n: torch.zeros_like(a) for n, a in ctx.received.items()}
            return [Phase("aside", start=zero, side=True, steps=1), Phase("main")]

        def loss(self, step):
            return {"aside": step.params["head.bias"].sum()} if step.phase == "aside" else {}

        def end_round(self, ctx, trained, steps):
            SEEN.append((steps, ctx.outcomes))
            return {}, ctx.state
        """,
        **ONE_ROUND,
    )
    result = tiny({**settings, "engine.path": path})
    for _, outcomes in plugin.seen(settings):
        bias, weight = outcomes["aside"]["head.bias"], outcomes["aside"]["encoder.1.weight"]
        assert not weight.any()  # no gradient passes a head of zeros
        assert float(bias.sum()) == pytest.approx(-0.1 * len(bias))  # lr times the gradient of the sum; CE's sums to 0
    assert result.summary["status"] == "done"


@pytest.mark.parametrize(
    ("phases", "says"),
    [
        ("[]", "one that is no side phase"),
        ("[Phase('a'), Phase('a')]", "different names"),
        ("[Phase('a', side=True)]", "one that is no side phase"),
        ("[Phase('a', lambda n: False)]", "trains no parameter"),
        ("[Phase('a', start={})]", "must start from all arrays"),
        ("[Phase('a', epochs=1 + ctx.client % 2)]", "differ between clients"),
    ],
)
def test_phases_that_cannot_be_are_said(tiny: Tiny, plugin: Any, phases: str, says: str) -> None:
    settings = plugin(f"stackable = True\n\ndef phases(self, ctx):\n    return {phases}", **ONE_ROUND)
    with pytest.raises(RunFailed, match=says):
        tiny({**settings, "engine.path": "stacked"})


@BOTH
def test_carried_arrays_go_from_step_to_step_and_to_the_end_of_the_round(tiny: Tiny, plugin: Any, path: str) -> None:
    settings = plugin(
        """
        def begin_round(self, ctx):
            bias = ctx.received["head.bias"]
            return {"path": torch.zeros_like(bias), "steps": torch.zeros((), dtype=torch.int64), "last": bias.clone()}

        def carry(self, step, grads, params):
            moved = params["head.bias"] - step.params["head.bias"]
            # Plain SGD: what moved is -lr times the gradient that every hook sees.
            path = step.carried["path"] - moved
            same = torch.where((moved + 0.1 * grads["head.bias"]).abs().max() < 1e-12, 1, -1000)
            return {"path": path, "steps": step.carried["steps"] + same, "last": params["head.bias"].clone()}

        def end_round(self, ctx, trained, steps):
            SEEN.append((steps, ctx.received["head.bias"], trained["head.bias"], dict(ctx.carried)))
            return {}, ctx.state
        """,
        **ONE_ROUND,
        **{"optimiser.lr": 0.1},
    )
    tiny({**settings, "engine.path": path})
    noted = plugin.seen(settings)
    assert noted
    for steps, received, trained, carried in noted:
        assert int(carried["steps"]) == steps
        assert torch.allclose(carried["path"], received - trained, atol=1e-12)
        assert torch.equal(carried["last"], trained)


def test_carry_keeps_names_and_shapes(tiny: Tiny, plugin: Any) -> None:
    body = """
    def begin_round(self, ctx):
        return {"a": torch.zeros(2)}

    def carry(self, step, grads, params):
        return {}
    """
    with pytest.raises(RunFailed, match="names and shapes of begin_round"):
        tiny(plugin(body, **ONE_ROUND))


@BOTH
def test_a_rate_scales_the_learning_rate_of_single_steps(tiny: Tiny, plugin: Any, path: str) -> None:
    body = "def rate(self, step):\n    return torch.where(step.index < {}, 0.5, {}).to(step.x.dtype)"
    slow = tiny({**ONE_ROUND, "optimiser.lr": 0.05, "engine.path": path})
    half = tiny({**plugin(body.format(10**6, 0.5), **ONE_ROUND), "optimiser.lr": 0.1, "engine.path": path})
    assert off(arrays_of(half), arrays_of(slow)) < 1e-12
    two = tiny({**plugin(body.format(2, 0.0), **ONE_ROUND), "optimiser.lr": 0.1, "engine.path": path})
    stopped = tiny({**ONE_ROUND, "optimiser.lr": 0.05, "federation.epochs": None, "federation.steps": 2})
    assert off(arrays_of(two), arrays_of(stopped)) < 1e-12


@BOTH
def test_uploads_and_weights_decide_the_mean(tiny: Tiny, plugin: Any, path: str) -> None:
    settings = plugin(
        """
        def upload(self, ctx, trained):
            return {n: 2 * a - ctx.received[n] for n, a in trained.items()}

        def weight(self, ctx, samples, steps):
            return 1.0 + ctx.client

        def end_round(self, ctx, trained, steps):
            SEEN.append((1.0 + ctx.client, ctx.received, trained))
            return {}, ctx.state
        """,
        **ONE_ROUND,
    )
    result = tiny({**settings, "engine.path": path})
    noted = plugin.seen(settings)
    for name, array in arrays_of(result).items():
        total = sum(weight for weight, *_ in noted)
        wanted = sum(weight * (2 * trained[name] - received[name]) for weight, received, trained in noted) / total
        assert torch.allclose(array, wanted, atol=1e-12)


def test_a_weight_of_nothing_and_an_upload_of_something_else_are_said(tiny: Tiny, plugin: Any) -> None:
    with pytest.raises(RunFailed, match="not above 0"):
        tiny(plugin("def weight(self, ctx, samples, steps):\n    return 0.0", **ONE_ROUND))
    with pytest.raises(RunFailed, match="names and shapes it was given"):
        tiny(plugin("def upload(self, ctx, trained):\n    return {}", **ONE_ROUND))


def test_a_failed_training_does_not_pass_for_an_entry_that_is_not_sent(tiny: Tiny, plugin: Any) -> None:
    body = """
        model_reduction = "masked_mean"

        def after_step(self, step, params):
            return {**params, "head.bias": params["head.bias"] * torch.nan}
        """
    one_step = {"federation.epochs": None, "federation.steps": 1}
    with pytest.raises(RunFailed, match=r"'head\.bias' is not finite"):
        tiny(plugin(body, **ONE_ROUND, **one_step))


@BOTH
def test_sources_bring_images_and_payloads_of_their_own(tiny: Tiny, plugin: Any, path: str) -> None:
    settings = plugin(
        """
        def sources(self, ctx):
            count = 9
            images = torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1).expand(count, 1, 8, 8).contiguous()
            numbers = torch.arange(count)
            dark = Source(numbers, 4, images=images, labels=numbers % 2, payload={"double": 2.0 * numbers}, name="dark")
            mine = Source(ctx.ids[:6], 3, payload={"row": ctx.ids[:6]})
            return [dark, mine]

        def loss(self, step):
            dark, own = step.batch.rows("dark"), step.batch.rows(self.name)
            level = step.batch.pixels[dark].to(step.x.dtype).amax(dim=(1, 2, 3))
            right = ((2 * level - step.batch.payload["dark/double"]).abs().max() < 1e-9)
            right = right & (step.y[dark] == step.batch.ids[dark] % 2).all()
            right = right & (step.batch.ids[own] == step.batch.payload[f"{self.name}/row"]).all()
            right = right & torch.tensor(len(step.batch.rows("stream")) == len(step.y) - 7)
            return {"wrong": torch.where(right, 0.0, 1.0).to(step.x.dtype) + 0 * step.output.logits.sum()}
        """,
        **ONE_ROUND,
    )
    result = tiny({**settings, "engine.path": path})
    events = (result.folder / "events.jsonl").read_text()
    import json

    rounds = [json.loads(line) for line in events.splitlines() if '"round"' in line]
    losses = [e["losses"] for e in rounds if "losses" in e]
    assert losses
    assert all(v == 0.0 for loss in losses for n, v in loss.items() if n.endswith(".wrong"))
    if path == "stacked":
        alone = tiny({**settings, "engine.path": "sequential"})
        assert off(arrays_of(result), arrays_of(alone)) < 1e-12
