"""Flower's server strategies as aggregation rules: an unmodified strategy joins one cohort's parameters.

The adapter hands a strategy exactly one array record of each client of the cohort, made of trainable
parameters only: FedAdam's arithmetic turns a running variance negative, so buffers stay with the engine.
Nothing is sampled and no node is waited for. Arrays are read as float64 and go back to their own type.

Left out: bagging and cyclic XGBoost join trees, which are no parameters. The two wrappers for clipping at the client
rely on a mod of Flower's ClientApp; the same clipping at the server is here. Adaptive clipping follows the share of
clipped updates where Andrew et al. (2021) follow that of the others, so its norm runs away from the quantile aimed at.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from fedcl.bridges.avalanche_import import sealed
from fedcl.bridges.flower_options import checked
from fedcl.errors import RunFailed, UsageError
from fedcl.federation import flower_internals as flower

if TYPE_CHECKING:
    from flwr.serverapp.strategy import FedAvg, Strategy

CLASSES: Final[Mapping[str, str]] = {
    "fedavg": "FedAvg",
    "fedavgm": "FedAvgM",
    "fedadam": "FedAdam",
    "fedadagrad": "FedAdagrad",
    "fedyogi": "FedYogi",
    "fedmedian": "FedMedian",
    "fedtrimmedavg": "FedTrimmedAvg",
    "krum": "Krum",
    "multikrum": "MultiKrum",
    "bulyan": "Bulyan",
    "qfedavg": "QFedAvg",
    "fedprox": "FedProx",
    "dp_fedavg": "DifferentialPrivacyServerSideFixedClipping",
}
"""Names of the strategies and their classes in ``flwr.serverapp.strategy``."""

_MINIMA: Final = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
# Flower keeps moments as a dict by name, FedAvgM's momentum as a list in the record's order.
_DICT_STATE: Final = ("m_t", "v_t")
_LIST_STATE: Final = ("momentum_vector",)
_CURRENT: Final = "current_arrays"

_log = logging.getLogger(__name__)


class FlowerAggregator:
    """One of Flower's server strategies as a function of a cohort's parameters.

    Each call builds the strategy anew and gives it the state of the call before, so all that it remembers is
    in the returned state: ``m_t/NAME``, ``v_t/NAME`` (FedAdam, FedAdagrad, FedYogi) and
    ``momentum_vector/NAME`` (FedAvgM with momentum), float64, in the shape of parameter ``NAME``.

    Args:
        strategy: a key of :data:`CLASSES`, or a class derived from Flower's ``FedAvg`` that keeps its state
            under these names only.
        options: arguments of its constructor, without those that concern nodes, sampling and record keys.
        prefix: how the options are called in errors, for example ``options.krum``.

    Raises:
        UsageError: unknown strategy or option, or a value out of range.
    """

    def __init__(
        self,
        strategy: str | type[FedAvg],
        options: Mapping[str, Any] | None = None,
        prefix: str = "options",
    ) -> None:
        from flwr.serverapp import strategy as strategies

        if isinstance(strategy, str):
            if strategy not in CLASSES:
                raise UsageError("strategy", strategy, f"one of {', '.join(CLASSES)}", CLASSES)
            strategy = getattr(strategies, CLASSES[strategy])
        private = strategies.DifferentialPrivacyServerSideFixedClipping
        if not (isinstance(strategy, type) and issubclass(strategy, (strategies.FedAvg, private))):
            raise UsageError("strategy", strategy, "a class derived from flwr.serverapp.strategy.FedAvg")
        self._class = strategy
        self._prefix = prefix
        self._private = issubclass(strategy, private)
        self._fair = issubclass(strategy, strategies.QFedAvg)
        self._inner = strategies.FedAvg
        self._krum = issubclass(strategy, strategies.MultiKrum)
        self._bulyan = issubclass(strategy, strategies.Bulyan)
        self._trimmed = issubclass(strategy, strategies.FedTrimmedAvg)
        self.options = checked(strategy, options or {}, prefix)
        self._sample = self._build()

    @property
    def name(self) -> str:
        """Flower's name of the class."""
        return str(self._class.__name__)

    def _build(self, clients: int = 1) -> Strategy:
        accepted = inspect.signature(self._class.__init__).parameters
        minima = {name: value for name, value in _MINIMA.items() if name in accepted}
        if self._private:
            inner = self._inner(**_MINIMA)
            inner.fraction_train = 0.0
            # As NumPy's float: Flower divides it by the norm of an update, which is 0 where a client learnt nothing.
            options = {**self.options, "clipping_norm": np.float64(self.options["clipping_norm"])}
            return self._class(inner, num_sampled_clients=clients, **options)
        strategy = self._class(**minima, **self.options)
        # FedAvg.configure_train then returns before it samples, and a subclass's has kept the current arrays.
        strategy.fraction_train = 0.0
        return strategy

    def check_cohort(self, clients: int) -> None:
        """Whether the rule is defined for this many clients with training data.

        Bulyan needs 4 f + 3 clients (El Mhamdi et al. 2018); Krum more than 2 f + 2 (Blanchard et al. 2017),
        asked for only where it has to withstand f > 0 of them. A trimmed mean drops ``floor(beta n)`` clients
        on either side, which may be none: that is logged.

        Raises:
            UsageError: too few clients; names the option and what is needed.
        """
        if self._bulyan or self._krum:
            liars = self._sample.num_malicious_nodes
            need = 4 * liars + 3 if self._bulyan else 2 * liars + 3 if liars else 1
            if clients < need:
                rule = "4 f + 3" if self._bulyan else "2 f + 3"
                raise UsageError(
                    f"{self._prefix}.num_malicious_nodes",
                    liars,
                    f"{self.name} with f={liars} needs at least {rule} = {need} clients with data in each "
                    f"round, not {clients}",
                )
            if self._krum and self._sample.num_nodes_to_select > clients:
                raise UsageError(
                    f"{self._prefix}.num_nodes_to_select",
                    self._sample.num_nodes_to_select,
                    f"at most the {clients} clients with data in a round",
                )
        if self._trimmed and 0 < self._sample.beta * clients < 1:
            _log.warning("%s trims floor(beta * %d) = 0 clients: a plain mean", self.name, clients)

    def aggregate(
        self,
        current: Mapping[str, Tensor],
        updates: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        state: Mapping[str, Tensor],
        server_round: int,
        losses: Sequence[float] | None = None,
        seed: int | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The next global parameters and the strategy's next state.

        Args:
            current: the floating-point trainable parameters that the cohort started from.
            updates: each client's parameters after training: the names and shapes of ``current``.
            weights: each client's weight (num-examples), 0 for a client without data, which is left out.
            state: what the call before returned; empty at first. Entries whose parameter has grown get zeros
                for what is new; entries of other parameters are passed on.
            server_round: from 1 over the whole run, as Flower counts; FedAdam's bias correction uses it.
            losses: each client's loss of ``current``, 0 or more; only q-FedAvg needs them.
            seed: of the noise, which only the differentially private mean needs.

        Returns:
            Parameters in the order, type and device of ``current``, and the state. Without a client that has
            data, copies of ``current`` and ``state``.

        Raises:
            UsageError: see :meth:`check_cohort`.
            RunFailed: arrays do not match, a weight or loss is negative, the losses or the seed that the strategy
                needs are missing, or it gave no result.
        """
        self._check_arrays(current, updates, weights)
        if self._fair and (losses is None or not all(math.isfinite(v) and v >= 0 for v in losses)):
            raise RunFailed(f"{self.name} needs each client's loss, a number of 0 or more, not {losses}")
        if self._private and seed is None:
            raise RunFailed(f"{self.name} needs a seed for its noise")
        told: Sequence[float | None] = [None] * len(updates) if losses is None else losses
        cohort = [client for client in zip(updates, weights, told, strict=True) if client[1] > 0]
        if not cohort or not current:
            return dict(current), dict(state)
        self.check_cohort(len(cohort))
        strategy = self._build(len(cohort))
        replies = [self._reply(node, current, *client) for node, client in enumerate(cohort, start=2)]
        try:
            strategy.configure_train(server_round, self._pack(current), flower.ConfigRecord(), None)
            self._restore(strategy, current, state)
            before = dict(vars(strategy))
            # The noise comes from NumPy's global generator.
            with sealed(seed % 2**32) if self._private and seed is not None else nullcontext():
                record, _ = strategy.aggregate_train(server_round, replies)
        except flower.FlowerFailure as failure:
            raise RunFailed(f"Flower's {self.name} failed in round {server_round}: {failure}") from failure
        if record is None:
            raise RunFailed(f"Flower's {self.name} gave no parameters in round {server_round}")
        return self._parameters_of(record, current), {**state, **self._state_of(strategy, before, current)}

    def _check_arrays(
        self, current: Mapping[str, Tensor], updates: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
    ) -> None:
        for name, tensor in current.items():
            if not tensor.is_floating_point():
                raise RunFailed(f"{self.name} averages floating-point parameters; {name!r} is {tensor.dtype}")
        if len(weights) != len(updates):
            raise RunFailed(f"{self.name} got {len(updates)} updates and {len(weights)} weights")
        for client, (update, weight) in enumerate(zip(updates, weights, strict=True)):
            if not (math.isfinite(weight) and weight >= 0):
                raise RunFailed(f"{self.name}: update {client} has the weight {weight!r}")
            if weight == 0:
                continue
            if update.keys() != current.keys():
                odd = sorted(update.keys() ^ current.keys())
                raise RunFailed(f"{self.name}: update {client} and the model differ in {', '.join(odd)}")
            for name, tensor in current.items():
                if update[name].shape != tensor.shape:
                    shapes = f"{tuple(update[name].shape)}, not {tuple(tensor.shape)}"
                    raise RunFailed(f"{self.name}: {name!r} of update {client} has the shape {shapes}")

    def _pack(self, arrays: Mapping[str, Tensor]) -> flower.ArrayRecord:
        # Flower's clipping works in place, which passes over a single number without an axis.
        return flower.pack_wide({n: a.reshape(1) if self._private and not a.ndim else a for n, a in arrays.items()})

    def _reply(
        self,
        node: int,
        current: Mapping[str, Tensor],
        update: Mapping[str, Tensor],
        weight: float,
        loss: float | None,
    ) -> flower.Message:
        # Flower matches some arrays by position, so every record has the order of the current one.
        arrays = self._pack({name: update[name] for name in current})
        measured = {"num-examples": float(weight)} | ({} if loss is None else {"train_loss": float(loss)})
        return flower.make_reply(flower.RecordDict({"arrays": arrays, "metrics": flower.MetricRecord(measured)}), node)

    def _restore(self, strategy: Strategy, current: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        for attribute in (*_DICT_STATE, *_LIST_STATE):
            held = {name: state.get(f"{attribute}/{name}") for name in current}
            if not hasattr(strategy, attribute) or all(value is None for value in held.values()):
                continue
            arrays = {name: _grown(attribute, name, held[name], current[name]) for name in current}
            setattr(strategy, attribute, arrays if attribute in _DICT_STATE else list(arrays.values()))

    def _state_of(
        self, strategy: Strategy, before: Mapping[str, Any], current: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for attribute, value in vars(strategy).items():
            if attribute in _DICT_STATE or attribute in _LIST_STATE:
                if value is not None:
                    arrays = value if attribute in _DICT_STATE else dict(zip(current, value, strict=True))
                    for name in current:
                        values = torch.from_numpy(np.array(arrays[name], np.float64))
                        state[f"{attribute}/{name}"] = values.to(current[name].device)
            elif attribute != _CURRENT and before.get(attribute) is not value:
                raise RunFailed(f"Flower's {self.name} keeps state in {attribute!r}, which cannot be saved")
        return state

    def _parameters_of(self, record: flower.ArrayRecord, current: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arrays = flower.unpack(record, "cpu")
        if arrays.keys() != current.keys():
            odd = sorted(arrays.keys() ^ current.keys())
            raise RunFailed(f"Flower's {self.name} changed the names of the parameters: {', '.join(odd)}")
        return {name: arrays[name].reshape(old.shape).to(old.device, old.dtype) for name, old in current.items()}


def _grown(attribute: str, name: str, held: Tensor | None, current: Tensor) -> np.ndarray[Any, Any]:
    """State in the shape of its parameter, as float64, zero where the parameter is new."""
    grown = np.zeros(tuple(current.shape), np.float64)
    if held is None:
        return grown
    old = held.detach().double().cpu().numpy()
    fits = old.ndim == grown.ndim and all(a <= b for a, b in zip(old.shape, grown.shape, strict=True))
    if not fits:
        shapes = f"{old.shape}, its parameter {grown.shape}"
        raise RunFailed(f"state {attribute}/{name} has the shape {shapes}; parameters only grow")
    grown[tuple(slice(size) for size in old.shape)] = old
    return grown
