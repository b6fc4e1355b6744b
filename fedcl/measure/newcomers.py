"""The models of clients that never train, where the strategies make them one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..local.training import blame
from ..strategy import Arrays, Predictor

if TYPE_CHECKING:
    from .evaluation import Evaluator


@torch.no_grad()
def model_of_newcomer(
    evaluator: Evaluator, predictor: Predictor, strategies: dict[str, Arrays], last: int, client: int
) -> Arrays | None:
    """The model that the stack makes for a client that never trains; None: it is tested with the global one.

    None too for a client without test images of its own, whose labels would otherwise decide about themselves, and
    before it has a labelled image.

    Args:
        predictor: that of the global model.
        strategies: the strategies' states at the server.
        last: the task that has just ended.
        client: its place among those clients.
    """
    node, never = evaluator.node, evaluator.split.held_out
    owner, store = node.stack.owners["newcomer"], node.store
    if owner is None or never is None or never.test is None:
        return None
    held = (never.rows[task][client] for task in range(last, -1, -1))
    rows = next((ids for ids in held if (store.labels[ids] >= 0).any()), None)
    if rows is None:
        return None
    ids = torch.from_numpy(rows[store.labels[rows] >= 0]).to(store.device)
    parts = torch.split(ids, node.config.evaluate.batch_size)
    images = ((store.batch(part, node.dtype), store.label_tensor[part]) for part in parts)
    own = replace(predictor, state=strategies.get(owner.name, {}), strategy=owner.name)
    with node.autocast(), blame(owner, "newcomer"):
        return owner.newcomer(own, images)
