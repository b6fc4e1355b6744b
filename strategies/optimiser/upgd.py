"""UPGD: useful weights are protected from the update, useless ones are perturbed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.strategy import Arrays, ClientContext, Step, Strategy, cross_entropy

LARGEST = 20_000
"""Most parameters whose exact second derivatives are taken: each costs a pass."""


def utility(weights: Tensor, gradient: Tensor, curvature: Tensor | None = None) -> Tensor:
    """The loss's increase if a weight were 0: ``-g w``, to second order ``-g w + h w^2 / 2``; elementwise.

    >>> utility(torch.tensor([2.0]), torch.tensor([-3.0]), torch.tensor([1.0])).item()
    8.0
    """
    first = -gradient * weights
    return first if curvature is None else first + 0.5 * curvature * weights.square()


def trace(before: Tensor, now: Tensor, decay: float) -> Tensor:
    """``beta U + (1 - beta) u``."""
    return decay * before + (1.0 - decay) * now


def protection(traces: Arrays, scaling: Literal["global", "local"]) -> Arrays:
    """How much each weight is protected, in (0, 1): the sigmoid of its scaled utility.

    Args:
        traces: bias-corrected utilities by parameter.
        scaling: by the largest utility of all weights, or by the norm of a unit's row of weights. Where no weight
            has a utility above 0, none is protected.
    """
    if scaling == "global":
        largest = torch.stack([u.max() for u in traces.values() if u.numel()]).max()
        scale = largest.clamp(min=torch.finfo(largest.dtype).tiny)
        return {n: torch.sigmoid((u / scale).clamp(min=-60.0)) for n, u in traces.items()}
    found = {}
    for name, u in traces.items():
        rows = u.reshape(u.shape[0], -1) if u.dim() > 1 else u.reshape(1, -1)
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=torch.finfo(u.dtype).tiny)
        found[name] = torch.sigmoid(rows / norm).reshape(u.shape)
    return found


class UPGD(Strategy):
    """The gradient with noise, times 1 - S: S is near 1 for useful weights."""

    name = "upgd"
    family = "optimiser"
    stackable = True
    like_parameters = {"utility": "zero"}
    card = Card(
        title="Addressing Loss of Plasticity and Catastrophic Forgetting in Continual Learning",
        authors="Elsayed, Mahmood",
        venue="ICLR",
        year=2024,
        bibtex="""@inproceedings{elsayed2024addressing,
  title = {Addressing Loss of Plasticity and Catastrophic Forgetting in Continual Learning},
  author = {Elsayed, Mohamed and Mahmood, A. Rupam},
  booktitle = {ICLR},
  year = {2024}
}""",
        certainty="Update, utilities and scalings read in the released code, whose global scaling divides "
        "by the largest uncorrected trace; here it is the corrected one. order=second takes the exact "
        "diagonal of the Hessian of the task loss by double backward on small networks, where the paper "
        "estimates it (HesScale): ours. The place in federated learning, a trace a client, is ours.",
        client_state="the trace of utilities, one number a parameter, and its steps",
        cost="One more array a parameter at the client; order=second one pass a parameter and step.",
        notes="scale=2 is the release's, as S is 0.5 on average. weight decay is optimiser.weight_decay "
        "(the release's is 0.001), its learning rate 1e-5 for streams of a million single images. "
        "optimiser.name=sgd without momentum is what the paper has; others see the edited gradient.",
    )

    @dataclass(frozen=True)
    class Options:
        order: Literal["first", "second"] = option("first", "utility by the gradient, or with exact second derivatives")
        scaling: Literal["global", "local"] = option("global", "utilities over the largest one, or over a row's norm")
        protect: Literal["both", "noise"] = option("both", "1 - S scales gradient and noise, or the noise alone")
        decay: float = option(0.999, "beta of the trace of utilities")
        noise: float = option(0.001, "standard deviation of the perturbation")
        scale: float = option(2.0, "factor on the step, with protect=both")

        def __post_init__(self) -> None:
            if not 0 <= self.decay < 1:
                raise ValueError(f"decay must be at least 0 and below 1, not {self.decay}")
            if self.noise < 0 or not 0 < self.scale < float("inf"):
                raise ValueError("noise must be at least 0 and scale above 0")

    def begin_round(self, ctx: ClientContext) -> Arrays:
        names = [n for n, _ in ctx.model.named_parameters()]
        if self.options.order == "second" and sum(ctx.received[n].numel() for n in names) > LARGEST:
            allowed = f"first: second derivatives are taken of at most {LARGEST:,} parameters"
            raise UsageError("options.upgd.order", "second", allowed, ("first",))
        traces = {n: ctx.state.get(f"utility/{n}", torch.zeros_like(ctx.received[n])) for n in names}
        return {**traces, "steps": ctx.state.get("steps", torch.zeros((), dtype=torch.int64, device=ctx.ids.device))}

    def traces(self, step: Step, grads: Arrays) -> Arrays:
        """The traces of utilities with this step's."""
        curvature = curvatures(step, list(grads)) if self.options.order == "second" else {}
        return {
            n: trace(step.carried[n], utility(step.params[n].detach(), g, curvature.get(n)), self.options.decay)
            for n, g in grads.items()
        }

    def edit_gradients(self, step: Step, grads: Arrays) -> Arrays:
        grown = 1.0 - self.options.decay ** (step.carried["steps"] + 1).to(step.x.dtype)
        shields = protection({n: u / grown for n, u in self.traces(step, grads).items()}, self.options.scaling)
        edited = {}
        for name, g in grads.items():
            free = 1.0 - shields[name]
            noise = self.options.noise * step.normal(tuple(g.shape), f"upgd {name}")
            both = self.options.scale * (g + noise) * free
            edited[name] = both if self.options.protect == "both" else g + noise * free
        return edited

    def carry(self, step: Step, grads: Arrays, params: Arrays) -> Arrays:
        return {**step.carried, **self.traces(step, grads), "steps": step.carried["steps"] + 1}

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        kept = {f"utility/{n}": a for n, a in ctx.carried.items() if n != "steps"}
        return {}, {**kept, "steps": ctx.carried["steps"]}


def curvatures(step: Step, names: list[str]) -> Arrays:
    """The exact diagonal of the Hessian of the cross entropy on the step's images, by parameter."""
    sizes = [step.params[n].numel() for n in names]
    rest = {n: a for n, a in {**step.params, **step.buffers}.items() if n not in names}

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, sizes)
        arrays = {n: p.view(step.params[n].shape) for n, p in zip(names, parts, strict=True)}
        logits = step.forward(step.x, {**rest, **arrays}, "eval").logits
        return cross_entropy(logits, step.y, step.among(step.known))

    at = torch.cat([step.params[n].detach().reshape(-1) for n in names])

    def one(direction: Tensor) -> Tensor:
        moved: Tensor = torch.func.jvp(torch.func.grad(loss), (at,), (direction,))[1]
        return (moved * direction).sum()

    found = torch.func.vmap(one, chunk_size=256)(torch.eye(len(at), dtype=at.dtype, device=at.device))
    parts = torch.split(found, sizes)
    return {n: p.view(step.params[n].shape).detach() for n, p in zip(names, parts, strict=True)}
