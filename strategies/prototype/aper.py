"""APER: cosine prototypes on the features of the initial encoder beside those of the one adapted in session 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedcl.strategy import Arrays, Models, Predictor, Server

from ._pooled import STATISTICS, Adapt, FrozenAfter, by_cosine
from .simplecil import CARD

INITIAL = "initial/"
"""Prefix of the arrays of the encoder before the first task."""


class APER(FrozenAfter):
    """Adapts the encoder in the first task; mean features of the initial and the adapted encoder, side by side."""

    name = "aper"
    family = "prototype"
    copies = 2
    card = replace(
        CARD,
        certainty="Rule read in the released code: prototypes are means of both embeddings one after the other, "
        "neither normalised, compared by cosine. Adaptation by federated averaging is ours; the pooled prototypes are "
        "exact.",
        leaves_client=STATISTICS,
        server_state="the initial encoder; sums and counts of all classes so far",
        cost="Two forward passes over the task's images at the end of a task, and two for each prediction. The "
        "initial encoder is sent with that call, once a task and client; a client that keeps it would save that.",
        notes="The variant that fine-tunes the whole encoder. Those of the paper that insert adapters, prompts or "
        "scales and shifts, or only run BatchNorm, are not here. For a pre-trained encoder (init=, model.checkpoint): "
        "without, the initial one is random. After the first task rounds train the head alone, which no prediction "
        "uses any more. Where images are seen once (federation.passes=once), those of a round are counted by the "
        "model of that round. Counts of images a class leave the client.",
    )

    @property
    def adapt(self) -> Adapt:
        return "first"

    def embedded(self, models: Models, arrays: Arrays, kept: Mapping[str, Tensor], x: Tensor) -> Tensor:
        initial = {n.removeprefix(INITIAL): a for n, a in kept.items() if n.startswith(INITIAL)}
        before = models(x, {**arrays, **initial}, "eval").features
        return torch.cat([before, models(x, arrays, "eval").features], dim=1)

    # server

    def begin_task(self, server: Server) -> Arrays:
        return server.state or {f"{INITIAL}{n}": a for n, a in server.arrays.items() if n.startswith("encoder.")}

    def sent(self, server: Server) -> Arrays:
        return {n: a for n, a in server.state.items() if n.startswith(INITIAL)}

    def scores(self, predictor: Predictor, features: Tensor) -> Tensor:
        return by_cosine(predictor, features)
