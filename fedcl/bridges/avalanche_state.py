"""What Avalanche's plugins know between two rounds, as named arrays of a client's state and back.

An adapter for each plugin that has one; the others live in the process that made them and cannot be resumed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import UsageError
from ..strategy import Arrays
from .avalanche_import import quiet_avalanche, sealed
from .losses import build, find_class

PREFIX = "net."
"""Before the names of the model's parameters, as plugins see them."""


def loops() -> Any:
    """The module :mod:`fedcl.bridges.avalanche_loop`; importing Avalanche takes seconds, once."""
    quiet_avalanche()
    with sealed():
        return importlib.import_module("fedcl.bridges.avalanche_loop")


def models() -> Any:
    """The module :mod:`fedcl.bridges.avalanche_model`."""
    loops()
    return importlib.import_module("fedcl.bridges.avalanche_model")


@contextlib.contextmanager
def inside(seed: int, dtype: torch.dtype) -> Iterator[None]:
    """Runs Avalanche's code with generators of its own; what it makes anew has the type of the run's numbers."""
    before = torch.get_default_dtype()
    with sealed(seed), torch.enable_grad():
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def make_plugin(name: str, arguments: Mapping[str, Any], key: str) -> Any:
    """A plugin of Avalanche's by dotted name.

    Args:
        key: the setting to blame.

    Raises:
        UsageError: there is none of this name, it refuses the arguments, or it is no plugin of training.
    """
    quiet_avalanche()
    with sealed():
        base = importlib.import_module("avalanche.core").BasePlugin
    cls = find_class(name, key)
    if not issubclass(cls, base):
        raise UsageError(key, name, "is no plugin of Avalanche's; it must be a class of avalanche.training.plugins")
    with sealed(0):
        return build(name, arguments, key)


def adapter_of(plugin: Any) -> Adapter | None:
    """How the plugin's state is read and written; None: it cannot be."""
    return ADAPTERS.get(f"{type(plugin).__module__}.{type(plugin).__qualname__}")


class Adapter:
    """Base: how a plugin's state becomes arrays and back.

    Attributes:
        each_round: whether the start of an experience is told to the plugin in each round: it makes a data loader then.
        housed: see :class:`fedcl.bridges.avalanche_loop.Loop`.
    """

    each_round = False
    housed = False

    def save(self, loop: Any) -> Arrays:
        """The state of ``loop.plugin``; what is shaped like parameters has their names."""
        raise NotImplementedError

    def load(self, loop: Any, state: Arrays) -> None:
        """The inverse of :meth:`save`, into a new plugin of the same settings; {} before the first round."""
        raise NotImplementedError


def param_data(name: str, array: Tensor) -> Any:
    """An array as the plugins keep it."""
    made = importlib.import_module("avalanche.training.utils").ParamData
    return made(name, init_tensor=array.clone(), device=array.device)


def told(held: Mapping[str, Any], kind: str) -> Arrays:
    """``KIND/PARAMETER`` of what a plugin keeps by parameter."""
    return {f"{kind}/{n.removeprefix(PREFIX)}": p.data.clone() for n, p in held.items()}


def under(state: Arrays, kind: str) -> Arrays:
    """By parameter, as the plugins name them, what stands under ``KIND/``."""
    start = f"{kind}/"
    return {f"{PREFIX}{n.removeprefix(start)}": a for n, a in state.items() if n.startswith(start)}


def kept(state: Arrays, kind: str) -> dict[str, Any]:
    """The same as the plugins keep it."""
    return {n: param_data(n, a) for n, a in under(state, kind).items()}


class EWC(Adapter):
    """Anchor and importance of each experience that the plugin remembers; it lets them grow with the head itself."""

    def save(self, loop: Any) -> Arrays:
        held = {"anchor": loop.plugin.saved_params, "importance": loop.plugin.importances}
        pairs = [(f"{kind}{t}", of) for kind, by in held.items() for t, of in by.items()]
        return {n: a for kind, of in pairs for n, a in told(of, kind).items()}

    def load(self, loop: Any, state: Arrays) -> None:
        for kind, held in (("anchor", loop.plugin.saved_params), ("importance", loop.plugin.importances)):
            places = {n.partition("/")[0].removeprefix(kind) for n in state if n.startswith(kind)}
            for t in sorted(map(int, places)):
                held[t] = kept(state, f"{kind}{t}")


class SI(Adapter):
    """Anchor, importance, and the path of the present and of all experiences; the plugin keeps them flat."""

    housed = True
    paths = {"trajectory": "trajectory", "path": "cum_trajectory"}

    def save(self, loop: Any) -> Arrays:
        plugin = loop.plugin
        shapes = {n: p.shape for n, p in loop.model.named_parameters()}
        held = {"anchor": plugin.ewc_data[0], "importance": plugin.ewc_data[1]}
        held |= {kind: plugin.syn_data[name] for kind, name in self.paths.items()}
        return {
            f"{kind}/{n.removeprefix(PREFIX)}": p.data.clone().reshape(shapes[n])
            for kind, of in held.items()
            for n, p in of.items()
        }

    def load(self, loop: Any, state: Arrays) -> None:
        data = loop.plugin.ewc_data, loop.plugin.syn_data
        flat = {
            kind: {n: a.flatten().cpu() for n, a in under(state, kind).items()}
            for kind in ("anchor", "importance", *self.paths)
        }
        for place, kind in enumerate(("anchor", "importance")):
            data[0][place].update({n: param_data(n, a) for n, a in flat[kind].items()})
        for kind, name in self.paths.items():
            data[1][name].update({n: param_data(n, a) for n, a in flat[kind].items()})
        for name in ("old_theta", "new_theta", "grad"):  # written anew in each step
            data[1][name].update({n: param_data(n, torch.zeros_like(a)) for n, a in flat["anchor"].items()})


class MAS(Adapter):
    """The parameters at the end of the last experience, and their importance."""

    def save(self, loop: Any) -> Arrays:
        return told(loop.plugin.params or {}, "anchor") | told(loop.plugin.importance or {}, "importance")

    def load(self, loop: Any, state: Arrays) -> None:
        if state:
            loop.plugin.params, loop.plugin.importance = kept(state, "anchor"), kept(state, "importance")


class LwF(Adapter):
    """The previous model, with the statistics of BatchNorm that training changes, and the classes it knew."""

    def save(self, loop: Any) -> Arrays:
        lwf = loop.plugin.lwf
        if lwf.prev_model is None:
            return {}
        known = torch.tensor(sorted(lwf.prev_classes_by_task[0]), dtype=torch.int64)
        previous = {f"previous/{n}": a for n, a in lwf.prev_model.arrays().items()}
        return {**previous, "known": known, "count": torch.tensor(lwf.expcount)}

    def load(self, loop: Any, state: Arrays) -> None:
        if not state:
            return
        lwf = loop.plugin.lwf
        lwf.prev_model = copy.deepcopy(loop.model)
        lwf.prev_model.put({n.removeprefix(PREFIX): a for n, a in under(state, "previous").items()})
        lwf.prev_classes_by_task[0] = set(state["known"].tolist())
        lwf.expcount = int(state["count"])


def groups(state: Arrays) -> list[Tensor]:
    """The rows of the store that each experience's memory holds."""
    return list(torch.split(state["ids"], state["sizes"].tolist())) if state else []


def memory(loop: Any, buffers: list[Any]) -> Arrays:
    """The inverse: rows of the store, and how many are of each experience."""
    rows = [models().rows_of(buffer) for buffer in buffers]
    device = loop.ctx.ids.device
    ids = torch.tensor([row for some in rows for row in some], dtype=torch.int64, device=device)
    return {"ids": ids, "sizes": torch.tensor([len(some) for some in rows], dtype=torch.int64, device=device)}


class AGEM(Adapter):
    """The memory of each experience; the order in which it is drawn from begins anew in each round."""

    def save(self, loop: Any) -> Arrays:
        return memory(loop, loop.plugin.buffers) if loop.plugin.buffers else {}

    def load(self, loop: Any, state: Arrays) -> None:
        held = [models().data_set(loop.ctx.store, ids) for ids in groups(state)]
        if held:
            loop.plugin.buffers = held[:-1]
            loop.plugin.update_memory(held[-1])


class Replay(Adapter):
    """The memory of each experience and the random weights that decide who stays."""

    each_round = True

    def save(self, loop: Any) -> Arrays:
        held = list(loop.plugin.storage_policy.buffer_groups.values())
        if not held:
            return {}
        weights = torch.cat([group._buffer_weights for group in held])
        return {**memory(loop, [group.buffer for group in held]), "weights": weights.to(loop.ctx.ids.device)}

    def load(self, loop: Any, state: Arrays) -> None:
        policy, made = loop.plugin.storage_policy, importlib.import_module("avalanche.training.storage_policy")
        weights = torch.split(state["weights"].cpu(), state["sizes"].tolist()) if state else []
        for place, (ids, weight) in enumerate(zip(groups(state), weights, strict=True)):
            group = policy.buffer_groups[place] = made.ReservoirSamplingBuffer(len(ids))
            group._buffer_weights = weight
            if len(ids):
                group.buffer = models().data_set(loop.ctx.store, ids)
        policy._num_exps = len(policy.buffer_groups)


PLUGINS = "avalanche.training.plugins."
ADAPTERS: Final[Mapping[str, Adapter]] = {
    f"{PLUGINS}ewc.EWCPlugin": EWC(),
    f"{PLUGINS}synaptic_intelligence.SynapticIntelligencePlugin": SI(),
    f"{PLUGINS}mas.MASPlugin": MAS(),
    f"{PLUGINS}lwf.LwFPlugin": LwF(),
    f"{PLUGINS}agem.AGEMPlugin": AGEM(),
    f"{PLUGINS}replay.ReplayPlugin": Replay(),
}
