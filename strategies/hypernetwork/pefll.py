"""PeFLL: clients describe themselves by a few images, and a hypernetwork makes each a model from its description."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fedcl import random as counter
from fedcl.blocks.updates import change, named, under
from fedcl.cards import Card, option
from fedcl.errors import RunFailed, UsageError
from fedcl.local.optim import SGD, Adam, clip_by_norm
from fedcl.models.arrays import buffer_names, frozen_names, parameter_names
from fedcl.strategy import Arrays, ClientContext, Finished, Phase, Predictor, Server, Sharing, Strategy

from ._networks import Embedding, drawn_hypernetwork, generated, pulled_back

if TYPE_CHECKING:
    from fedcl.models.model import FedModel

PHI = "extra.pefll.embedding."
NETWORK = ("hidden", "slope", "base")
MOMENTS = ("exp_avg", "exp_avg_sq")


def targets(model: FedModel) -> list[str]:
    """Names of the arrays that the hypernetwork makes: all that training changes but the embedding network's own."""
    fixed = frozen_names(model)
    return [n for n in parameter_names(model) if n not in fixed and not n.startswith(PHI)]


def by_client(found: Arrays) -> tuple[list[int], Arrays]:
    """The clients that answered, ascending, and what they sent, in this order: (K, ...) each.

    >>> by_client({"client": torch.tensor([4, 1]), "descriptor": torch.tensor([[0.5], [2.0]])})
    ([1, 4], {'descriptor': tensor([[2.0000],
            [0.5000]])})
    """
    order = found["client"].argsort()
    return found["client"][order].tolist(), {n: a[order] for n, a in found.items() if n != "client"}


class PeFLL(Strategy):
    """The server makes each client's model from a descriptor of its data, and learns how from the clients' progress."""

    name = "pefll"
    family = "hypernetwork"
    stackable = True
    unlabelled = "sees"
    reductions = {"client": "stack", "descriptor": "stack", "change/": "stack", "gradient/": "mean"}
    like_parameters = {
        "base": "initial", "own": "initial",
        **{f"{moment}-{part}": "zero" for moment in MOMENTS for part in ("base", "phi")},
    }  # fmt: skip
    tried_with = {"model.norm": "none", "options.pefll.inner_steps": 2, "options.pefll.hidden": 8}
    card = Card(
        title="PeFLL: Personalized Federated Learning by Learning to Learn",
        authors="Scott, Zakerinia, Lampert",
        venue="ICLR",
        year=2024,
        bibtex="""@inproceedings{scott2024pefll,
  title = {{PeFLL}: Personalized Federated Learning by Learning to Learn},
  author = {Scott, Jonathan and Zakerinia, Hossein and Lampert, Christoph H.},
  booktitle = {ICLR},
  year = {2024}
}""",
        certainty="Protocol, networks, steps and rates read in the released code; the paper was not available. Ours: "
        "what the hypernetwork starts from, the growth with tasks, and the global model.",
        leaves_client=(
            ("client", "1, its id", "stack", "with each descriptor and change"),
            ("descriptor", "(descriptor)", "stack", "each round, and after each task"),
            ("change", "of the model", "stack", "each round, in place of the model"),
            ("gradient", "of the embedding network", "mean", "each round"),
        ),
        client_state="its model, made after the last round of a task",
        server_state="the hypernetwork (hidden + 1 numbers for each of the model) and the moments of its optimiser; "
        "mean and deviation of the first descriptor",
        cost="Three exchanges a round: model, descriptor and embedding network travel once each way, and the model "
        "itself is not broadcast. Server memory: 3 (hidden + 1) models with Adam; that is much for large networks.",
        notes="Read the personal accuracies (partition.test=same_mix or holdout(p)). The global model is made from the "
        "mean descriptor: of the cohort after a round, of all in reach after a task. partition.held_out clients with "
        "test images of their own are tested with a model from all their training images of the latest task of which "
        "they hold any, without training; else with the global one. After a task's last round every client in reach "
        "gets a model from all its images, also one that was never in a cohort; a client without images of the task "
        "keeps the one it has, before its first the initial one. As published: 5 clients of 100 a round, 5000 rounds, "
        "batches of 32, optimiser.lr=0.002, weight_decay=5e-5, clip=50. federation.epochs is not read, clients train "
        "one by one. Models with buffers, as BatchNorm has, are refused: nothing would make these. New classes: their "
        "rows start as they do without the hypernetwork. Descriptors tell something of a client's images and labels, "
        "and the server sees each client's.",
        deviations="A descriptor is the mean over images; the released code divides by a constant 2. The descriptor's "
        "length does not follow the number of clients (there 1 + clients / 4). Convolutions of the embedding network "
        "are padded, so that small images work. The released code's spectral norm and its masking of classes that a "
        "client does not hold in tests are not here. Norms of hypernetwork and embedding gradients are clipped apart.",
    )

    @dataclass(frozen=True)
    class Options:
        descriptor: int = option(26, "l, length of a descriptor; published: 1 + clients / 4, for 100 clients")
        kernels: int = option(16, "kernels of the embedding network's first convolution; the second has twice as many")
        embed_batches: int = option(1, "batches of images in a descriptor during training", unit="batches")
        hidden: int = option(100, "units of a hidden layer of the hypernetwork")
        layers: int = option(3, "hidden layers of the hypernetwork")
        inner_steps: int = option(50, "local steps of a client a round", unit="steps")
        optimiser: Literal["adam", "sgd"] = option("adam", "of the server, for both networks")
        lr: float = option(2e-4, "learning rate of the server")
        decay: float = option(1e-3, "weight decay of the server's sgd; adam has none, as released")
        clip: float = option(50.0, "norm of the server's gradients")

        def __post_init__(self) -> None:
            if self.descriptor < 2:
                raise ValueError(f"descriptor must be at least 2, as its deviation is needed, not {self.descriptor}")
            for name in ("kernels", "embed_batches", "hidden", "layers", "inner_steps"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
            for name in ("lr", "clip"):
                if not 0 < getattr(self, name) < float("inf"):
                    raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
            if not 0 <= self.decay < float("inf"):
                raise ValueError(f"decay must be at least 0, not {self.decay}")

    def share(self, name: str, model: FedModel) -> Sharing:
        if name.startswith(PHI):
            return "shared"
        return "private" if name in targets(model) else "frozen"

    def modules(self, model: FedModel) -> Mapping[str, nn.Module]:
        self.refuse_buffers(model)
        return {"embedding": Embedding(model.image_shape, self.options.descriptor, self.options.kernels)}

    def refuse_buffers(self, model: FedModel) -> None:
        """Raises UsageError for a model with arrays that are neither made by the hypernetwork nor constant."""
        if set(buffer_names(model)) - frozen_names(model):
            allowed = "a model without statistics of BatchNorm, for example model.norm=group or none"
            raise UsageError("strategy", self.name, allowed)

    # client

    def embedded(self, ctx: ClientContext, phi: Arrays) -> Tensor:
        """``v = 1/n sum_i phi(x_i, y_i)``, (l,), over the images of a round, which the client draws anew each round."""
        order = counter.permutation(len(ctx.ids), *ctx.key, self.name, "descriptor")
        rows = ctx.ids[torch.from_numpy(order[: self.options.embed_batches * ctx.batch_size]).to(ctx.ids.device)]
        x, y = ctx.store.batch(rows, next(iter(phi.values())).dtype), ctx.store.label_tensor[rows]
        mean: Tensor = ctx.apply("embedding", x, y, which={**ctx.received, **phi}).mean(dim=0)
        return mean

    def describe(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """The descriptor of some images; nothing from a client without any."""
        if not len(ctx.ids):
            return {}, ctx.state
        with torch.no_grad():
            found = self.embedded(ctx, phi_of(ctx.received))
        return {"client": torch.tensor(ctx.client), "descriptor": found}, ctx.state

    def describe_all(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """The descriptor of all images; nothing from a client without any."""
        if not len(ctx.ids):
            return {}, ctx.state
        return {"client": torch.tensor(ctx.client), "descriptor": descriptor(ctx.apply, ctx.batches())}, ctx.state

    def progress(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """``d = theta - theta~`` after local steps from the model that the server made."""
        made = dict(ctx.down)
        start = {**ctx.received, **made}
        trained = ctx.train(Phase(trains=lambda name: name in made, steps=self.options.inner_steps, start=start))
        return {"client": torch.tensor(ctx.client), **named(change(made, trained, made), "change")}, ctx.state

    def backward(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """The gradient of ``<dv, v(phi)>``, with dv from the server."""
        with torch.enable_grad():
            phi = {n: a.detach().requires_grad_() for n, a in phi_of(ctx.received).items()}
            found = torch.autograd.grad(self.embedded(ctx, phi), list(phi.values()), ctx.down["slope"])
        return named(dict(zip(phi, found, strict=True)), "gradient"), ctx.state

    def keep(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """The client keeps the model that the server made for it."""
        return {}, named(dict(ctx.down), "own")

    def personal(self, arrays: Arrays, state: Arrays) -> Arrays:
        return {**arrays, **under(state, "own")}

    def newcomer(self, predictor: Predictor, images: Iterable[tuple[Tensor, Tensor]]) -> Arrays:
        if "deviation" not in predictor.state:  # nobody has had an image yet
            return predictor.arrays
        return {**predictor.arrays, **mean_model(predictor.state, descriptor(predictor.apply, images)[None])}

    # server

    def begin_task(self, server: Server) -> Arrays:
        self.refuse_buffers(server.model)
        start = {n: server.arrays[n] for n in targets(server.model)}
        if server.state:
            ends = ("slope", *(f"{moment}-slope" for moment in MOMENTS))
            return {
                n: widened(a, start[n.partition("/")[2]].shape) if n.partition("/")[0] in ends else a
                for n, a in server.state.items()
            }
        options = self.options
        return drawn_hypernetwork(start, options.descriptor, options.hidden, options.layers, *server.key, self.name)

    def round(self, server: Server) -> tuple[Arrays, Arrays]:
        told = server.exchange(self.describe, server.cohort)
        if not told:
            return server.arrays, server.state
        clients, sent = by_client(told)
        state = with_scale(server.state, sent["descriptor"])
        v, network, phi = scaled(state, sent["descriptor"]), network_of(state), phi_of(server.arrays)

        made = generated(network, v)
        _, moved = by_client(server.exchange(self.progress, clients, each=rows_of(made, clients)))
        slopes, back = pulled_back(network, v, under(moved, "change"))
        down = rows_of({"slope": back / state["deviation"]}, clients)
        gradient = under(server.exchange(self.backward, clients, each=down), "gradient")

        grads = clip_by_norm({n: g / len(clients) for n, g in slopes.items()}, self.options.clip)
        grads |= named(clip_by_norm(gradient, self.options.clip), "phi")
        params, state = self.stepped({**network, **named(phi, "phi")}, grads, state)
        arrays = {**server.arrays, **under(params, "phi")}
        return {**arrays, **mean_model(state, sent["descriptor"])}, state

    def stepped(self, params: Arrays, grads: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
        """Both networks after the server's step, and the server state with the hypernetwork and the moments."""
        optimiser = Adam() if self.options.optimiser == "adam" else SGD(weight_decay=self.options.decay)
        # Stored as MOMENT-PART/PARAMETER, so that moments of rows of the head grow with it.
        kept = {n.replace("-", "/", 1): a for n, a in state.items() if n.startswith(tuple(f"{m}-" for m in MOMENTS))}
        kept = {**kept, "step": state["step"].cpu()} if kept else optimiser.init(params)
        new, kept = optimiser.update(params, grads, kept, self.options.lr)
        moments = {n.replace("/", "-", 1): a for n, a in kept.items()}
        return new, {**state, **network_of(new), **moments}

    def adopted(self, server: Server) -> tuple[Arrays, Arrays]:
        """Every client in reach that has images gets a model; the global model is that of their mean descriptor."""
        told = server.exchange(self.describe_all, "all")
        if not told:
            return server.arrays, server.state
        clients, sent = by_client(told)
        state = with_scale(server.state, sent["descriptor"])
        made = generated(network_of(state), scaled(state, sent["descriptor"]))
        server.exchange(self.keep, clients, each=rows_of(made, clients))
        return {**server.arrays, **mean_model(state, sent["descriptor"])}, state

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        last = server.online and server.round + 1 == server.rounds  # afterwards the images have passed
        return self.adopted(server) if last else (server.arrays, server.state)

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        arrays, state = (server.arrays, server.state) if server.online else self.adopted(server)
        return Finished(arrays), state


def phi_of(arrays: Arrays) -> Arrays:
    """The embedding network's arrays."""
    return {n: a for n, a in arrays.items() if n.startswith(PHI)}


@torch.no_grad()
def descriptor(apply: Callable[..., Tensor], images: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """``1/n sum_i phi(x_i, y_i)``, (l,), over batches (images, labels); ``apply`` calls the embedding network."""
    sums, sizes = zip(*((apply("embedding", x, y).sum(dim=0), len(y)) for x, y in images), strict=True)
    mean: Tensor = torch.stack(sums).sum(dim=0) / sum(sizes)
    return mean


def network_of(arrays: Arrays) -> Arrays:
    """The hypernetwork's arrays."""
    return {n: a for n, a in arrays.items() if n.split("/", 1)[0] in NETWORK}


def widened(slope: Tensor, shape: torch.Size) -> Tensor:
    """A slope (units, s) with zeros for new classes, (units, ``shape``).

    >>> widened(torch.ones(1, 1), torch.Size([2]))
    tensor([[1., 0.]])
    """
    wide = slope.new_zeros(len(slope), *shape)
    wide[tuple(slice(size) for size in slope.shape)] = slope
    return wide


def rows_of(arrays: Arrays, clients: list[int]) -> dict[int, Arrays]:
    """By client its rows of arrays (K, ...)."""
    return {client: {n: a[place] for n, a in arrays.items()} for place, client in enumerate(clients)}


def with_scale(state: Arrays, descriptors: Tensor) -> Arrays:
    """The state with mean and deviation of the entries of the very first descriptor, which stay from then on.

    Raises:
        RunFailed: the first descriptor's entries do not differ.
    """
    if "deviation" in state:
        return state
    deviation, mean = torch.std_mean(descriptors[0])
    if not float(deviation) > 0:
        raise RunFailed("pefll: the entries of the first descriptor are all the same, and cannot be standardised")
    return {**state, "mean": mean, "deviation": deviation}


def scaled(state: Arrays, descriptors: Tensor) -> Tensor:
    """Standardised descriptors (K, l), as the hypernetwork sees them."""
    return (descriptors - state["mean"]) / state["deviation"]


def mean_model(state: Arrays, descriptors: Tensor) -> Arrays:
    """What the hypernetwork makes of the mean of descriptors (K, l)."""
    made = generated(network_of(state), scaled(state, descriptors.mean(dim=0, keepdim=True)))
    return {n: a[0] for n, a in made.items()}
