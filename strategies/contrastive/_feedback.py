"""Adaptive prototypical feedback of OnPro: which images of a replay batch are mixed, by how close their classes are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedcl.blocks.mixup import beta_quantile
from fedcl.strategy import Step

NEAREST = 0.01
"""Distance of two prototypes below which they count as that far, so that 1 / d stays finite."""


class Mixture(NamedTuple):
    """Replayed images as pairs: ``(1 - share) first + share second``, each (R,); first and second are places."""

    first: Tensor
    second: Tensor
    share: Tensor


def confusable(prototypes: Tensor, present: Tensor) -> Tensor:
    """(C, C) scores of pairs of classes c < c', ``1 / |m_c - m_c'|``; -inf for all others.

    Their softmax is how often the adaptive feedback mixes images of both.

    Args:
        prototypes: (C, p).
        present: (C,) bool.

    >>> confusable(torch.tensor([[0.0], [2.0]]), torch.tensor([True, True])).tolist()
    [[-inf, 0.5], [-inf, -inf]]
    """
    distance = torch.cdist(prototypes, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
    pair = torch.ones_like(distance, dtype=torch.bool).triu(1) & present[:, None] & present[None, :]
    return torch.where(pair, 1 / distance.clamp(min=NEAREST), -torch.inf)


def mixture(
    step: Step,
    labels: Tensor,
    prototypes: Tensor,
    present: Tensor,
    base: float,
    chance: float,
    most: float,
    alpha: float,
) -> Mixture:
    """Which images of the replay batch are mixed, and how (adaptive prototypical feedback).

    The first ``base`` of them are mixed with others at random, the rest are replaced by pairs of confusable classes.
    Without a prototype nothing is mixed; with one alone the rest stays as it is.

    Args:
        labels: (R,) int64 of the replay batch.
        prototypes, present: (C, p), (C,) bool of the step before.
        base: share of the batch that is mixed at random.
        chance: probability of mixing.
        most: largest share of the second image in a random mixture.
        alpha: of the Beta distribution of the share in a confusable pair.
    """
    count, classes = len(labels), len(present)
    plain, split = torch.arange(count, device=labels.device), int(count * base)
    partner = torch.argsort(step.uniform((split,), "onpro partner"))
    mixes = step.uniform((1,), "onpro mixes") < chance
    share = torch.where(mixes, most * step.uniform((split,), "onpro share"), 0.0)
    rest = count - split
    # The largest of log-probabilities plus Gumbel noise is a draw from them.
    scores = confusable(prototypes, present).flatten()
    noise = -torch.log(-torch.log(step.uniform((rest, classes * classes), "onpro pair")))
    drawn = torch.argmax(scores + noise, dim=1)
    places = []
    for side, wanted in (("first", drawn // classes), ("second", drawn % classes)):
        # A random image of the class; of any class where the batch has none of it.
        rank = step.uniform((rest, count), f"onpro {side}") + (labels[None, :] == wanted[:, None])
        places.append(torch.argmax(rank, dim=1))
    confused = beta_quantile(step.uniform((rest,), "onpro beta"), alpha)
    confused = torch.where(step.uniform((rest,), "onpro confused") <= chance, confused, 0.0)
    paired, ready = present.sum() > 1, present.any()
    first = torch.cat([plain[:split], torch.where(paired, places[0], plain[split:])])
    second = torch.cat([partner, torch.where(paired, places[1], plain[split:])])
    share = torch.where(ready, torch.cat([share, torch.where(paired, confused, 0.0)]), 0.0)
    return Mixture(torch.where(ready, first, plain), torch.where(ready, second, plain), share)


def mixed_labels(first: Tensor, second: Tensor, share: Tensor, classes: int) -> Tensor:
    """(R,) int64: the class of an image of one class, and above them a label of its own for every mixture of two.

    >>> mixed_labels(torch.tensor([1, 1, 1]), torch.tensor([1, 0, 0]), torch.tensor([0.5, 0.0, 0.5]), 2).tolist()
    [1, 1, 4]
    """
    own = classes + torch.arange(len(first), device=first.device)
    return torch.where((first == second) | (share == 0), first, own)
