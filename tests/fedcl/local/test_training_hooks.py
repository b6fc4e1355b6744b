"""Hooks act: on gradients, parameters, uploads, exchanges, states and broadcasts, seen through small strategies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
Moved = Callable[["RunResult"], set[str]]


def test_edited_gradients_and_edited_parameters_take_effect(tiny: Tiny, plugin: Any, moved: Moved) -> None:
    still = tiny(plugin("def edit_gradients(self, step, grads):\n    return {n: g * 0 for n, g in grads.items()}"))
    assert moved(still) == set()
    head = tiny(
        plugin(
            "def edit_gradients(self, step, grads):\n    return {n: g if n == 'head.bias' else g * 0 for n, g "
            "in grads.items()}"
        )
    )
    assert moved(head) == {"head.bias"}
    ones = tiny(
        plugin("def after_step(self, step, params):\n    return {n: p.clamp(-0.01, 0.01) for n, p in params.items()}")
    )
    assert max(p.abs().max().item() for p in ones.model.parameters()) < 0.010001


def test_end_round_uploads_reach_after_aggregate(tiny: Tiny, plugin: Any) -> None:
    settings = plugin(
        """
        reductions = {"images": "sum", "steps": "max", "each": "stack"}
        def end_round(self, ctx, trained, steps):
            n = torch.tensor(len(ctx.ids))
            rounds = ctx.state.get("rounds", torch.tensor(0)) + 1
            return {"images": n, "steps": torch.tensor(steps), "each": n}, {"rounds": rounds}
        def after_aggregate(self, server):
            up = server.uploads
            SEEN.append((int(up["images"]), int(up["steps"]), up["each"].tolist(), server.rounds_done))
            return server.arrays, {"total": server.state.get("total", torch.tensor(0)) + up["images"]}
        def ask(self, ctx):
            SEEN.append(("rounds", ctx.client, int(ctx.state["rounds"]), float(ctx.down["word"])))
            return {}, ctx.state
        def finish_task(self, server):
            server.exchange(self.ask, "all", {"word": torch.tensor(2.5)})
            return Finished(server.arrays), server.state
        """
    )
    tiny(settings)
    notes = plugin.seen(settings)
    rounds = [n for n in notes if n[0] != "rounds"]
    assert [n[3] for n in rounds] == [0, 1, 2, 3]
    assert all(total == sum(each) == 60 and len(each) == 3 for total, _, each, _ in rounds)
    assert all(steps == -(-max(each) // 8) for _, steps, each, _ in rounds)
    assert [n[1:] for n in notes if n[0] == "rounds"] == [(k, 2 * t, 2.5) for t in (1, 2) for k in range(3)]


def test_an_exchange_within_broadcast_is_counted_and_numbered(tiny: Tiny, plugin: Any) -> None:
    settings = plugin(
        """
        reductions = {"n": "sum"}
        def count(self, ctx):
            SEEN.append((ctx.client, int(ctx.state.get("asked", torch.tensor(0)))))
            return {"n": torch.tensor(1)}, {"asked": ctx.state.get("asked", torch.tensor(0)) + 1}
        def broadcast(self, server):
            return Broadcast({"n": server.exchange(self.count)["n"]})
        def end_round(self, ctx, trained, steps):
            assert int(ctx.down["n"]) == 3
            return {}, ctx.state
        """
    )
    result = tiny(settings)
    assert plugin.seen(settings) == [(k, asked) for asked in range(4) for k in range(3)]
    plain = tiny({"name": "plain"})
    assert result.summary["bytes_up"] - plain.summary["bytes_up"] == 4 * 3 * 8


def test_a_state_that_is_emptied_stays_empty(tiny: Tiny, plugin: Any) -> None:
    settings = plugin(
        """
        def end_round(self, ctx, trained, steps):
            SEEN.append((ctx.client, sorted(ctx.state)))
            return {}, ({} if ctx.state else {"a": torch.ones(1)})
        """
    )
    tiny(settings)
    assert [names for client, names in plugin.seen(settings) if client == 0] == [[], ["a"], [], ["a"]]


def test_broadcast_arrays_are_seen_by_their_own_strategy_only(tiny: Tiny, plugin: Any) -> None:
    body = """
        def broadcast(self, server):
            return Broadcast({"a": torch.tensor(VALUE)})
        def loss(self, step):
            assert step.down["a"].item() == VALUE and len(step.down) == 1
            return {}
        """
    one, two = plugin(body.replace("VALUE", "1.0")), plugin(body.replace("VALUE", "2.0"))
    tiny({"strategy": one["strategy"] + two["strategy"], "plugins": one["plugins"] + two["plugins"]})
