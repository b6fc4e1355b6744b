"""Avalanche's continual learning plugins at the clients: Avalanche's loop trains, the engine averages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fedcl import random as counter
from fedcl import registry
from fedcl.bridges import avalanche_state as avalanche
from fedcl.cards import Card, option
from fedcl.errors import RunFailed, UsageError
from fedcl.strategy import Arrays, ClientContext, Finished, Server, Strategy

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream

PLUGINS = "avalanche.training.plugins."
TRAINING = (
    "task_loss", "loss", "prepare", "sources", "begin_round", "phases", "rate", "edit_gradients", "after_step", "carry",
    "upload", "weight", "end_round", "aggregate",
)  # fmt: skip
LEAVES = (
    ("images", "of the model", "weighted_mean", "each round, in place of the model"),
    ("clients", "of the model", "mean", "the same with federation.weighting=uniform"),
)
COST = (
    "Avalanche's loop trains the clients one by one, which is slower than the engine; on the wire as plain averaging."
)
NOTES = (
    "An experience is a client's task: it begins in the first round in which the client trains and ends after the "
    "task's last round, at the global model, for the clients that trained. Only the steps see augmented images. "
    "Strategies that change local training cannot be stacked with it."
)


class Avalanche(Strategy):
    """Trains each client by Avalanche's supervised loop with a plugin of Avalanche's, then averages as usual."""

    name = "avalanche"
    family = "bridges"
    reductions = {"images/": "weighted_mean", "clients/": "mean"}
    revisits = "for its plugin, at the end of the task"
    common_clock = "ends the task of all clients at once"
    exemplars: ClassVar[tuple[str, ...]] = ("ids",)
    tried_with: ClassVar[Mapping[str, Any]] = {
        "options.avalanche.plugin": f"{PLUGINS}EWCPlugin", "options.avalanche.arguments": {"ewc_lambda": 1.0}
    }  # fmt: skip
    card = Card(
        title="Avalanche: an End-to-End Library for Continual Learning",
        authors="Lomonaco, Pellegrini, Cossu, Carta and others",
        venue="CVPR Workshops",
        year=2021,
        bibtex="""@inproceedings{lomonaco2021avalanche,
  title = {Avalanche: an End-to-End Library for Continual Learning},
  author = {Lomonaco, Vincenzo and Pellegrini, Lorenzo and Cossu, Andrea and Carta, Antonio and others},
  booktitle = {CVPR Workshops},
  year = {2021}
}""",
        certainty="The plugin is Avalanche's own (avalanche-lib 0.6). What an experience is in a federation is ours.",
        leaves_client=LEAVES,
        client_state="that of the plugin, by its adapter",
        cost=COST,
        notes=f"{NOTES} EWCPlugin, SynapticIntelligencePlugin, MASPlugin, LwFPlugin, AGEMPlugin and ReplayPlugin have "
        "adapters: their state is written with the checkpoints. Any other plugin lives in the process, with a model "
        "for each client: such a run is not resumable and needs engine.runtime=local. Data sets show plugins pixels, "
        "uint8, which the model takes too.",
    )

    @dataclass(frozen=True)
    class Options:
        plugin: str = option(f"{PLUGINS}EWCPlugin", "dotted name of the plugin")
        arguments: dict[str, Any] = field(
            default_factory=lambda: {"ewc_lambda": 1.0},
            metadata={"help": "keyword arguments of the plugin; {class: NAME, ...} is an object"},
        )

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._living: dict[int, Any] = {}  # the loops of plugins without an adapter, by client

    def wanted(self) -> tuple[str, Mapping[str, Any]]:
        """The dotted name of the plugin, and its arguments."""
        return self.options.plugin, self.options.arguments

    def made(self) -> Any:
        """A new plugin; wrong options are refused."""
        return avalanche.make_plugin(*self.wanted(), f"options.{self.name}")

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        plugin = self.made()
        if avalanche.adapter_of(plugin) is None and config.engine.runtime != "local":
            allowed = f"local: nothing carries the state of {type(plugin).__name__} to other processes"
            raise UsageError("engine.runtime", config.engine.runtime, allowed)
        if config.model.batch_norm == "local":
            raise UsageError(
                "model.batch_norm", "local", f"average or frozen with {self.name}, which shares all arrays"
            )
        if config.engine.dtype == "bf16":
            raise UsageError("engine.dtype", "bf16", f"float32 or float64: {self.name} trains by Avalanche's loop")
        for other in config.strategy:
            cls = registry.load("strategies", other)
            hooks = [hook for hook in TRAINING if getattr(cls, hook) is not getattr(Strategy, hook)]
            if hooks:
                allowed = f"without {other} (its {hooks[0]}): {self.name} trains by Avalanche's loop"
                raise UsageError("strategy", list(config.strategy), allowed)

    # client

    def local(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """A round of local training: the trained arrays that leave the client, and the plugin's state."""
        plugin = self.made()
        adapter = avalanche.adapter_of(plugin)
        client = avalanche.models().client_of(ctx)
        federation = client.node.config.federation
        if not len(ctx.ids):
            return {}, ctx.state
        with avalanche.inside(counter.fold(*ctx.key, self.name), client.node.dtype):
            loop, known, goes_on = self.entered(ctx, plugin, adapter)
            if not loop.batches:
                return {}, ctx.state
            if adapter is not None or not goes_on:
                loop.begin(not goes_on or (adapter is not None and adapter.each_round), federation.drop_last)
            loop.run()
            state = {} if adapter is None else adapter.save(loop)
        kind = "images" if federation.weighting == "samples" else "clients"
        arrays = {f"{kind}/{n}": a for n, a in loop.model.arrays().items() if client.node.leaves(n)}
        return arrays, {**state, "clock": torch.tensor([known, ctx.task + 1])}

    def close(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """The end of the experience, for a client that has begun it."""
        clock = ctx.state.get("clock")
        if clock is None or int(clock[1]) != ctx.task + 1 or not len(ctx.ids):
            return {}, ctx.state
        plugin = self.made()
        adapter = avalanche.adapter_of(plugin)
        with avalanche.inside(counter.fold(*ctx.key, self.name, "end"), avalanche.models().client_of(ctx).node.dtype):
            loop, known, _ = self.entered(ctx, plugin, adapter)
            loop.end()
            state = {} if adapter is None else adapter.save(loop)
        return {}, {**state, "clock": torch.tensor([known + 1, 0])}

    def entered(self, ctx: ClientContext, plugin: Any, adapter: avalanche.Adapter | None) -> tuple[Any, int, bool]:
        """The client's loop, how many experiences it has ended, and whether the present one goes on.

        Raises:
            RunFailed: the plugin's state is gone with the process that had it.
        """
        known, begun = ctx.state["clock"].tolist() if "clock" in ctx.state else (0, 0)
        loop = self._living.get(ctx.client)
        if adapter is None and "clock" in ctx.state and loop is None:
            raise RunFailed(
                f"strategy {self.name!r}: {type(plugin).__name__} has no state adapter, so that a run with it cannot "
                "be resumed; begin anew"
            )
        if loop is None:
            loop = avalanche.loops().Loop(ctx, plugin, adapter is not None and adapter.housed)
        if adapter is None:
            self._living[ctx.client] = loop
        loop.enter(ctx, known)
        if adapter is not None:
            adapter.load(loop, {n: a for n, a in ctx.state.items() if n != "clock"})
        return loop, known, begun == ctx.task + 1

    # server

    def round(self, server: Server) -> tuple[Arrays, Arrays]:
        found = server.exchange(self.local, server.cohort)
        return {**server.arrays, **{n.partition("/")[2]: a for n, a in found.items()}}, server.state

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        server.exchange(self.close)
        return Finished(server.arrays), server.state
