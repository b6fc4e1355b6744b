"""Classifiers on frozen features: nearest mean, k nearest neighbours, a linear layer.

Each has its own small rule and none of the model's head, so that a drop of its accuracy is a change of the encoder. All
return scores (N, C); a class without training features scores ``-inf``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl.metrics.moments import ClassMoments, check_labels, rounding

NEIGHBOURS, TEMPERATURE = 20, 0.07
_ROWS = 1024


def nearest_mean_scores(queries: Tensor, moments: ClassMoments) -> Tensor:
    """``-||q - μ_c||``, (N, C): the nearest class mean wins.

    Source: Rebuffi et al., iCaRL, CVPR 2017, with means of all samples in place of exemplars. Give it features
    of unit length and their moments for the paper's rule.

    >>> found = ClassMoments.of(torch.tensor([[0.0], [4.0]]), torch.tensor([0, 1]), 2)
    >>> nearest_mean_scores(torch.tensor([[1.0]]), found).tolist()
    [[-1.0, -3.0]]
    """
    # By ||q||² + ||μ||² - 2 qμ, in float64: that costs half of the digits where means are close together.
    q, means = queries.to(torch.float64), moments.means
    squares = q.square().sum(1, keepdim=True) + means.square().sum(1) - 2.0 * (q @ means.T)
    return (-squares.clamp(min=0.0).sqrt()).masked_fill(~moments.present, -torch.inf)


def knn_scores(
    queries: Tensor,
    gallery: Tensor,
    labels: Tensor,
    num_classes: int,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Votes of the k most similar training features by cosine s, each with weight ``exp(s / τ)``: (N, C).

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018.

    Args:
        queries: (N, d).
        gallery: training features, (M, d), with labels (M,) int64 in [0, C).
        k: neighbours, in [1, M].
        temperature: τ, above 0.

    Raises:
        ValueError: k or a label out of range.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> knn_scores(torch.tensor([[2.0, 0.1]]), x, torch.tensor([1, 0]), 3, k=1).argmax(dim=1).tolist()
    [1]
    """
    check_labels(gallery, labels, num_classes)
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k lies in [1, {len(gallery)}], the size of the gallery; got {k}")
    unit = F.normalize(gallery, dim=1)
    scores = []
    for part in torch.split(F.normalize(queries, dim=1), _ROWS):
        similarity, place = (part @ unit.T).topk(k, dim=1)
        # Relative to the nearest: the same winner, and no overflow at small temperatures.
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        scores.append(votes.new_zeros(len(part), num_classes).scatter_add(1, labels[place], votes))
    found = torch.cat(scores) if scores else unit.new_zeros(0, num_classes)
    return found.masked_fill(torch.bincount(labels, minlength=num_classes) == 0, -torch.inf)


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier of standardised features; float64.

    Attributes:
        weight, bias: (C, d) and (C,); the bias of a class without training features is ``-inf``.
        mean, scale: of each dimension of the training features, (d,).
        loss: the objective where the search ended.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    loss: float

    def scores(self, queries: Tensor) -> Tensor:
        """(N, d) -> (N, C)."""
        return F.linear((queries.to(torch.float64) - self.mean) / self.scale, self.weight, self.bias)


def fit_linear(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    strength: float = 1.0,
    steps: int = 200,
    tolerance: float = 1e-4,
) -> LinearProbe:
    """Multinomial logistic regression of frozen features by L-BFGS: ``min sum_i CE_i + ||W||² / (2 strength)``.

    The objective is that of scikit-learn's ``LogisticRegression(C=strength)``; features are standardised first (a
    constant dimension is only centred), and the bias is not penalised. It is convex: any start ends at the same place.

    Args:
        features: (N, d), N at least 1.
        labels: (N,) int64 in [0, C).
        steps: most L-BFGS steps.
        tolerance: it ends where no slope of the mean loss is larger; the default is scikit-learn's.

    Raises:
        ValueError: no features, or a label out of range.

    >>> probe = fit_linear(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 2]), 3)
    >>> probe.scores(torch.tensor([[0.5], [2.9]])).argmax(dim=1).tolist()
    [0, 2]
    """
    from scipy.optimize import minimize

    check_labels(features, labels, num_classes)
    if not len(features):
        raise ValueError("a linear probe needs at least one training feature")
    x = features.detach().to(torch.float64)
    mean = x.mean(0)
    scale = x.std(0, correction=0)
    scale = torch.where(scale > rounding(len(x)) * mean.abs(), scale, torch.ones_like(scale))
    x = (x - mean) / scale
    present, target = torch.unique(labels, return_inverse=True)
    shape = (len(present), x.shape[1] + 1)
    wanted = F.one_hot(target, len(present)).to(torch.float64)
    decay = 1.0 / (strength * len(x))

    def objective(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        both = torch.from_numpy(flat).to(x.device).reshape(shape)
        weight = both[:, :-1]
        logs = F.linear(x, weight, both[:, -1]).log_softmax(dim=1)
        value = -(logs * wanted).sum() / len(x) + 0.5 * decay * weight.square().sum()
        error = (logs.exp() - wanted) / len(x)
        slope = torch.cat([error.T @ x + decay * weight, error.sum(0)[:, None]], dim=1)
        return float(value), slope.flatten().cpu().numpy()

    # SciPy's: the first optimiser of torch.optim in a process costs seconds of imports.
    end = minimize(
        objective, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B",
        options={"maxiter": steps, "gtol": tolerance, "ftol": 0.0, "maxcor": 20},
    )  # fmt: skip
    found = torch.from_numpy(end.x).to(x.device).reshape(shape)
    loss = float(end.fun) * len(x)
    weight = found.new_zeros(num_classes, x.shape[1]).index_copy(0, present, found[:, :-1])
    bias = found.new_full((num_classes,), -torch.inf).index_copy(0, present, found[:, -1])
    return LinearProbe(weight, bias, mean, scale, loss)
