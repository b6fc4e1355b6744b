"""Flower's own server strategies as aggregation rules, unmodified, through the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fedcl.bridges.flower import FlowerAggregator
from fedcl.cards import Card, option
from fedcl.federation.cohort import cohort_there
from fedcl.strategy import Arrays, Server, Strategy
from fedcl.streams.arrival import size_at_hand
from fedcl.streams.stragglers import round_pace

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.stream import Split, Stream


class FlowerStrategy(Strategy):
    """Base: the cohort's parameters are aggregated by ``flower_name``, BatchNorm buffers averaged by the engine."""

    flower_name = ""
    family = "federated"
    stackable = True
    model_reduction = "stack"

    def adapter(self) -> FlowerAggregator:
        """The aggregation rule with this strategy's options; wrong ones are refused."""
        return FlowerAggregator(self.flower_name, asdict(self.options), prefix=f"options.{self.name}")

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        sizes = [size for size in cohort_sizes(config, split) if size]
        self.adapter().check_cohort(min(sizes, default=split.clients))

    def aggregate(self, server: Server, models: list[Arrays], weights: list[float]) -> tuple[Arrays, Arrays]:
        current = {n: server.arrays[n] for n in models[0]}
        return self.adapter().aggregate(current, models, weights, server.state, server.rounds_done + 1)


def cohort_sizes(config: Config, split: Split) -> Iterator[int]:
    """How many clients of each round's cohort can train; the others have no batch of the least size allowed.

    Those upload nothing, so a rule that needs a number of models has to leave them out, before the run.
    """
    federation = config.federation
    least = max(federation.batch_min, federation.batch_size if federation.drop_last else 1)
    for task in range(len(split.train)):
        for round_ in range(federation.rounds):
            chosen = cohort_there(config, split, task, round_)
            sizes = {client: size_at_hand(config, split, task, round_, client) for client in chosen}
            late = round_pace(config, split, chosen, task, round_).limits
            yield sum(size >= least for client, size in sizes.items() if late.get(client) != 0)


def flower_card(title: str, authors: str, venue: str, year: int, key: str, state: str, notes: str = "") -> Card:
    """The card of a strategy of Flower's: the paper, what the server keeps, and what to know."""
    return Card(
        title=title,
        authors=authors,
        venue=venue,
        year=year,
        bibtex=f"@inproceedings{{{key},\n  title = {{{title}}},\n  author = {{{authors.replace(', ', ' and ')}}},\n"
        f"  booktitle = {{{venue}}},\n  year = {{{year}}}\n}}",
        certainty="Flower's implementation (flwr 1.41) as it is; its formulas are checked against a literal oracle.",
        server_state=state,
        cost="As federated averaging on the wire; the server holds every model of the cohort at once.",
        notes=notes or "Trainable parameters only; BatchNorm buffers are averaged plainly.",
    )


class FlowerFedAvg(FlowerStrategy):
    """Flower's FedAvg: the same mean as finetune's, through the adapter."""

    name = "flower_fedavg"
    flower_name = "fedavg"
    card = flower_card(
        "Communication-Efficient Learning of Deep Networks from Decentralized Data",
        "McMahan, Moore, Ramage, Hampson, Aguera y Arcas",
        "AISTATS",
        2017,
        "mcmahan2017fedavg",
        "none",
    )


_ADAPTIVE = flower_card(
    "Adaptive Federated Optimization",
    "Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan",
    "ICLR",
    2021,
    "reddi2021adaptive",
    "two moments, two models",
    "Flower adds a bias correction and starts v at 0; the paper has none and starts at tau^2.",
)


@dataclass(frozen=True)
class _Adaptive:
    eta: float = option(0.1, "server learning rate")
    beta_1: float = option(0.9, "decay of the first moment")
    beta_2: float = option(0.99, "decay of the second moment")
    tau: float = option(1e-3, "degree of adaptivity")


class FedAdam(FlowerStrategy):
    """Adam at the server on the mean update of the clients."""

    name = flower_name = "fedadam"
    Options = _Adaptive
    like_parameters = {"m_t": "zero", "v_t": "zero"}
    card = _ADAPTIVE


class FedYogi(FlowerStrategy):
    """Yogi at the server on the mean update of the clients."""

    name = flower_name = "fedyogi"

    @dataclass(frozen=True)
    class Options(_Adaptive):
        eta: float = option(0.01, "server learning rate; Flower's default")

    like_parameters = {"m_t": "zero", "v_t": "zero"}
    card = _ADAPTIVE


class FedAdagrad(FlowerStrategy):
    """Adagrad at the server on the mean update of the clients, without momentum."""

    name = flower_name = "fedadagrad"

    @dataclass(frozen=True)
    class Options:
        eta: float = option(0.1, "server learning rate")
        tau: float = option(1e-3, "degree of adaptivity")

    like_parameters = {"m_t": "zero", "v_t": "zero"}
    card = flower_card(
        "Adaptive Federated Optimization",
        "Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan",
        "ICLR",
        2021,
        "reddi2021adaptive",
        "the last update and the sum of squares, two models",
        "Flower starts v at 0, where the paper asks for at least tau^2, and leaves no beta_1 to be set: it is 0. "
        "Squares add up over the whole run, so that later tasks take smaller steps.",
    )


class FedAvgM(FlowerStrategy):
    """The mean update of the clients with momentum at the server."""

    name = flower_name = "fedavgm"
    like_parameters = {"momentum_vector": "zero"}
    card = flower_card(
        "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
        "Hsu, Qi, Brown",
        "arXiv",
        2019,
        "hsu2019measuring",
        "the momentum, one model; none where server_momentum is 0",
        "v = momentum v + (w - mean), w = w - rate v, not Nesterov's. Flower's default momentum is 0; the paper's 0.9. "
        "With momentum 0 and rate 1 it is plain averaging. The momentum of a task goes on into the next.",
    )

    @dataclass(frozen=True)
    class Options:
        server_learning_rate: float = option(1.0, "server learning rate")
        server_momentum: float = option(0.9, "momentum at the server")


class FedMedian(FlowerStrategy):
    """Coordinate-wise median of the clients' parameters."""

    name = flower_name = "fedmedian"
    card = flower_card(
        "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
        "Yin, Chen, Ramchandran, Bartlett",
        "ICML",
        2018,
        "yin2018byzantine",
        "none",
        "Unweighted. Parameters only; BatchNorm buffers are averaged.",
    )


class FedTrimmedAvg(FlowerStrategy):
    """Coordinate-wise mean without the largest and smallest share of values."""

    name = flower_name = "fedtrimmedavg"
    card = flower_card(
        "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
        "Yin, Chen, Ramchandran, Bartlett",
        "ICML",
        2018,
        "yin2018byzantine",
        "none",
        "Unweighted. Parameters only; BatchNorm buffers are averaged.",
    )

    @dataclass(frozen=True)
    class Options:
        beta: float = option(0.2, "share that is cut on either side")


class Krum(FlowerStrategy):
    """The one client's model that is nearest to its neighbours."""

    name = flower_name = "krum"
    card = flower_card(
        "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
        "Blanchard, El Mhamdi, Guerraoui, Stainer",
        "NeurIPS",
        2017,
        "blanchard2017krum",
        "none",
    )

    @dataclass(frozen=True)
    class Options:
        num_malicious_nodes: int = option(0, "clients that may be malicious")


class MultiKrum(FlowerStrategy):
    """The mean of the clients' models that are nearest to their neighbours."""

    name = flower_name = "multikrum"
    card = flower_card(
        "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
        "Blanchard, El Mhamdi, Guerraoui, Stainer",
        "NeurIPS",
        2017,
        "blanchard2017krum",
        "none",
        "Flower weighs the chosen models as federation.weighting says; the paper takes their plain mean. With one "
        "chosen model it is krum, with all of them plain averaging. Parameters only; BatchNorm buffers are averaged.",
    )

    @dataclass(frozen=True)
    class Options:
        num_malicious_nodes: int = option(0, "clients that may be malicious, f")
        num_nodes_to_select: int = option(2, "models that are averaged, at most the clients of a round")


class Bulyan(FlowerStrategy):
    """Clients chosen by Krum's scores, then a trimmed mean around their median."""

    name = flower_name = "bulyan"
    card = flower_card(
        "The Hidden Vulnerability of Distributed Learning in Byzantium",
        "El Mhamdi, Guerraoui, Rouault",
        "ICML",
        2018,
        "elmhamdi2018bulyan",
        "none",
        "Needs at least 4 f + 3 clients in each round for f malicious ones. "
        "Flower ranks once by Krum's score; the paper repeats Krum after each choice.",
    )

    @dataclass(frozen=True)
    class Options:
        num_malicious_nodes: int = option(0, "clients that may be malicious, f")


ALL: tuple[type[Any], ...] = (
    FlowerFedAvg,
    FedAdam,
    FedYogi,
    FedAdagrad,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
    Bulyan,
)
