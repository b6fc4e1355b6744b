"""apple/pfl-research (the package pfl) with its own FederatedAveraging.

Usage: python -m fedcl.experiments.bench.peer_pfl WORKLOAD ROUNDS [KEY=VALUE]...
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from fedcl.bench.turns import Turns

from .work import threads_of, work_of

NEVER = 10**6  # rounds between evaluations


class Classifier(nn.Module):
    """A network with the two methods that pfl asks of a model."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.network(x)
        return logits

    def loss(self, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
        """Mean cross entropy; pfl calls it for training and for testing."""
        self.train(not eval)
        return F.cross_entropy(self(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor, eval: bool = True) -> dict[str, Any]:
        """What pfl reports where it tests."""
        return {"loss": Weighted(F.cross_entropy(self(x), y, reduction="sum").item(), len(y))}


class Gate(TrainingProcessCallback):  # type: ignore[misc]  # pfl is not followed by the type checker
    """Holds pfl up between its rounds."""

    def __init__(self, turns: Turns, rounds: int) -> None:
        self._turns, self._left = turns, rounds

    def after_central_iteration(
        self, aggregate_metrics: Any, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """A round is over and the model updated."""
        self._turns.done()
        self._left -= 1
        if self._left:
            self._turns.wait()
        return False, Metrics()


def main(workload: str, rounds: int, overrides: list[str]) -> None:
    """Takes its turns."""
    turns = Turns()
    torch.set_num_threads(threads_of(workload))
    work = work_of(workload, overrides)
    module = Classifier(work.make())
    users = FederatedDataset(
        lambda user: Dataset([work.images[user], work.labels[user]], user_id=user),
        get_user_sampler("minimize_reuse", list(range(work.clients))),
    )
    turns.ready(work.facts)
    turns.wait()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=NEVER,
            train_cohort_size=work.clients,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=users, val_data=users, postprocessors=[WeightByUser()]),
        model=PyTorchModel(
            module,
            local_optimizer_create=torch.optim.SGD,
            # A rate of one makes the mean of the clients' models the new model.
            central_optimizer=torch.optim.SGD(module.parameters(), 1.0),
        ),
        model_train_params=NNTrainHyperParams(
            local_learning_rate=work.lr, local_num_epochs=1, local_batch_size=work.batch
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=work.batch),
        callbacks=[Gate(turns, rounds)],
    )
    turns.finish({})


if __name__ == "__main__":
    # pfl draws from NumPy's global generator.
    np.random.seed(0)  # noqa: NPY002
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
