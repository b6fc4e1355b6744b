"""FedSelect: the weights that change most at a client become its own, entry by entry; the others stay shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcl.cards import Card, option
from fedcl.strategy import Arrays, ClientContext, Phase, Step, Strategy

PERSONAL, SHARED = "personal", "shared"


def more_personal(mask: Tensor, moved: Tensor, share: float, limit: float) -> Tensor:
    """A mask of personal entries with those shared ones added that moved most (the inverse lottery ticket).

    Args:
        mask: bool, True where an entry is personal.
        moved: |w - w at the last update|, of the same shape.
        share: of the shared entries, how many become personal.
        limit: a mask with a larger personal fraction stays as it is.

    >>> mask = torch.tensor([True, False, False, False, False])
    >>> more_personal(mask, torch.tensor([9.0, 1.0, 3.0, 2.0, 0.0]), 0.5, 0.8).tolist()
    [True, False, True, True, False]
    """
    if mask.numel() == 0 or float(mask.double().mean()) > limit:
        return mask
    count = round(share * int((~mask).sum()))
    ranked = torch.where(mask, -torch.inf, moved).flatten().argsort(descending=True, stable=True)
    more = mask.flatten().clone()
    more[ranked[:count]] = True
    return more.view(mask.shape)


def selectable(name: str, array: Tensor) -> bool:
    """Whether entries of an array may become personal: weights, not biases."""
    return "weight" in name.rpartition(".")[2] and array.is_floating_point()


class FedSelect(Strategy):
    """Local training alternates between a client's personal entries and the shared ones; masks grow over rounds."""

    name = "fedselect"
    family = "personalised"
    stackable = True
    unlabelled = "sees"
    model_reduction = "masked_mean"
    like_parameters = {"mask": "zero", "own": "initial", "last": "initial"}
    card = Card(
        title="FedSelect: Personalized Federated Learning with Customized Selection of Parameters for Fine-Tuning",
        authors="Tamirisa, Xie, Bao, Zhou, Arel, Shamsian",
        venue="CVPR",
        year=2024,
        bibtex="""@inproceedings{tamirisa2024fedselect,
  title = {{FedSelect}: Personalized Federated Learning with Customized Selection of Parameters for Fine-Tuning},
  author = {Tamirisa, Rishub and Xie, Chulin and Bao, Wenxuan and Zhou, Andy and Arel, Ron and Shamsian, Aviv},
  booktitle = {CVPR},
  year = {2024}
}""",
        certainty="Read in the released code. The released loop broadcasts with the masks from before a "
        "round's update, as here: an update counts from the next round on. Its few rounds (4) are a setting "
        "of federation.rounds.",
        client_state="a mask, the client's weights, and its weights at the last update of the mask",
        cost="2 x alternations passes over the client's images a round; uploads shrink as masks grow "
        "(shared entries and one bit an entry). The download is counted whole.",
        notes="The mean of an entry is over the clients that share it, unweighted; an entry that nobody "
        "shares keeps the server's value. Masks leave a client by what it does not send. federation.epochs "
        "is not read. Until a client's first update of its mask this is federated averaging with uniform "
        "weights. New rows of the head start shared. With federation.passes=once each of the 2 x alternations passes "
        "goes through the images of a round.",
    )

    @dataclass(frozen=True)
    class Options:
        alternations: int = option(15, "times one pass on the personal and one on the shared entries", unit="passes")
        interval: int = option(3, "rounds between updates of the masks", unit="rounds")
        share: float = option(0.25, "part of a tensor's shared entries that becomes personal in an update")
        limit: float = option(0.8, "a tensor with a larger personal part stays as it is")

        def __post_init__(self) -> None:
            if self.alternations < 1 or self.interval < 1:
                raise ValueError("alternations and interval must be at least 1")
            if not 0 <= self.share <= 1 or not 0 <= self.limit <= 1:
                raise ValueError("share and limit must be between 0 and 1")

    # client

    def masks(self, ctx: ClientContext) -> Arrays:
        """The client's mask of each tensor: what it has, or nothing personal yet."""
        names = [n for n, _ in ctx.model.named_parameters() if selectable(n, ctx.received[n])]
        return {n: ctx.state.get(f"mask/{n}", torch.zeros_like(ctx.received[n], dtype=torch.bool)) for n in names}

    def begin_round(self, ctx: ClientContext) -> Arrays:
        return self.masks(ctx)

    def phases(self, ctx: ClientContext) -> Sequence[Phase]:
        start = self.personal(ctx.received, ctx.state)
        turns = range(self.options.alternations)
        if (ctx.task == 0 and ctx.round < self.options.interval) or not self.options.share:
            # No client can have a personal entry yet: passes that change nothing are left out.
            passes = [f"{SHARED} {turn}" for turn in turns]
        else:
            passes = [f"{kind} {turn}" for turn in turns for kind in (PERSONAL, SHARED)]
        return [Phase(name, epochs=1, start=None if place else start) for place, name in enumerate(passes)]

    def after_step(self, step: Step, params: Arrays) -> Arrays:
        # The optimiser's momentum and decay must not move the entries that a pass leaves alone either.
        own = step.phase.startswith(PERSONAL)
        kept = {}
        for name, new in params.items():
            mask = step.carried.get(name)
            if mask is None:
                kept[name] = step.params[name] if own else new
            else:
                kept[name] = torch.where(mask if own else ~mask, new, step.params[name])
        return kept

    def upload(self, ctx: ClientContext, trained: Arrays) -> Arrays:
        masks = self.masks(ctx)
        return {n: torch.where(masks[n], torch.nan, a) if n in masks else a for n, a in trained.items()}

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        masks = self.masks(ctx)
        last = {n: ctx.state.get(f"last/{n}", ctx.received[n]) for n in masks}
        if ctx.round % self.options.interval == 0 and not (ctx.task == 0 and ctx.round == 0):
            share, limit = self.options.share, self.options.limit
            masks = {n: more_personal(m, (trained[n] - last[n]).abs(), share, limit) for n, m in masks.items()}
            last = {n: trained[n] for n in masks}
        parts = {"mask": masks, "own": {n: trained[n] for n in masks}, "last": last}
        return {}, {f"{part}/{n}": a for part, arrays in parts.items() for n, a in arrays.items()}

    def personal(self, arrays: Arrays, state: Arrays) -> Arrays:
        return {
            n: torch.where(state[f"mask/{n}"], state[f"own/{n}"], a) if f"mask/{n}" in state else a
            for n, a in arrays.items()
        }
