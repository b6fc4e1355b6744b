"""What each probe of :mod:`fedcl.measure.probing` measures, by its names; formulas and sources are in the metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..metrics import compatibility, geometry
from ..metrics.calibration import CalibrationBins
from ..metrics.clustering import clustering_accuracy, k_means
from ..metrics.matrix import mean_or_none
from ..metrics.moments import ClassMoments, rounding
from ..metrics.novelty import auroc, fpr_at_tpr, max_softmax, negative_energy
from ..metrics.probes import NEIGHBOURS, fit_linear, knn_scores, nearest_mean_scores
from ..metrics.retrieval import recall_at_1, retrieve
from ..metrics.similarity import FeatureDrift, linear_cka, prototype_error

if TYPE_CHECKING:
    from .probing import Measurement

Values = dict[str, float | None]
DORMANT = 0.025
"""The threshold that Sokar et al. use for dormant units."""


def _nearest_mean(m: Measurement) -> Values:
    queries = F.normalize(m.test.features, dim=1)
    return m.with_forgetting(
        "nearest_mean", nearest_mean_scores(queries, m.unit_moments) if len(m.train.labels) else None
    )


def _knn(m: Measurement) -> Values:
    train = m.train
    if not len(train.labels):
        return m.with_forgetting("knn", None)
    k = min(NEIGHBOURS, len(train.labels))
    return m.with_forgetting("knn", knn_scores(m.test.features, train.features, train.labels, m.classes, k))


def _linear(m: Measurement) -> Values:
    if not len(m.train.labels):
        return m.with_forgetting("linear", None)
    return m.with_forgetting("linear", fit_linear(m.train.features, m.train.labels, m.classes).scores(m.test.features))


def _retrieval(m: Measurement) -> Values:
    x, y = m.seen_panel.features, m.seen_panel.labels
    found = retrieve(x, y, x, y, torch.arange(len(y), device=y.device), (1, 5))
    return {"recall_at_1": found.recall(1), "recall_at_5": found.recall(5), "map_at_r": found.map_at_r()}


def _compatibility(m: Measurement) -> Values:
    now, labels = m.panel.features, m.panel.labels
    own = torch.arange(len(labels), device=labels.device)
    found: Values = {}
    for task in range(m.task + 1):
        kept = {"features": now} if task == m.task else m.past(task)
        found[f"task_{task}"] = None if kept is None else recall_at_1(now, labels, kept["features"], labels, own)
    table = m.triangle("compatibility", found)
    return {
        **found,
        "ac": compatibility.average_compatibility(table),
        "am": compatibility.average_compatibility_score(table),
        "bc": compatibility.backward_compatibility(table),
        "fc": compatibility.forward_compatibility(table),
    }


def _pairs(m: Measurement) -> list[tuple[int, Tensor, Tensor | None]]:
    """(task, features now, features when it was learned) of the panel's images of each earlier task."""
    pairs = []
    for task in range(m.task):
        own, kept = m.panel.tasks == task, m.past(task)
        pairs.append((task, m.panel.features[own], None if kept is None else kept["features"][own]))
    return pairs


def _cka(m: Measurement) -> Values:
    found = {f"task_{j}": None if then is None else linear_cka(now, then) for j, now, then in _pairs(m)}
    return {**found, "old": mean_or_none(list(found.values()))}


def _drift(m: Measurement) -> Values:
    found: Values = {}
    total: FeatureDrift | None = FeatureDrift(0, 0.0, 0.0)
    for task, now, then in _pairs(m):
        one = None if then is None else FeatureDrift.of(now, then)
        found[f"task_{task}"] = None if one is None else one.mean_distance()
        total = None if one is None or total is None else total + one
    ends = (None, None) if total is None else (total.mean_distance(), total.mean_cosine())
    return {**found, "distance": ends[0], "cosine": ends[1]}


def _prototypes(m: Measurement) -> Values:
    then, now = [], []
    stages = m.probing.evaluator.stream.stages
    for task in range(m.task):
        kept, means = m.past(task), m.means(task)
        if kept is None:
            return {"error": None, "relative": None}
        own = torch.bincount(m.train.labels[m.train.tasks == task], minlength=m.classes) > 0
        classes = [c for c in stages[task].classes if bool(own[c])]
        then.append(kept["means"][classes])
        now.append(means[classes])
    error = prototype_error(torch.cat(then), torch.cat(now)) if then else None
    moments = m.train_moments
    inside = float(moments.within.trace()) / max(moments.total, 1)
    varies = inside > (rounding(moments.total) * float(moments.means.norm())) ** 2
    return {"error": error, "relative": error / math.sqrt(inside) if error is not None and varies else None}


def _hypersphere(m: Measurement) -> Values:
    x, y = m.seen_panel.features, m.seen_panel.labels
    close = geometry.tolerance(ClassMoments.of(F.normalize(x, dim=1), y, m.classes))
    aligned = None if close is None else 2.0 - 2.0 * close
    return {"alignment": aligned, "uniformity": geometry.uniformity(x), "tolerance": close}


def _collapse(m: Measurement) -> Values:
    moments, weight = m.train_moments, m.arrays.get("head.weight")
    if weight is not None:
        # Classes beyond the head's width have no images yet: their rows are not read.
        weight = torch.cat([weight, weight.new_zeros(m.classes - len(weight), weight.shape[1])])
    nearest = m.own_task(m.train, nearest_mean_scores(m.train.features, moments)).argmax(dim=1)
    apart = geometry.disagreement(m.heads(m.train).argmax(dim=1), nearest)
    return {**geometry.neural_collapse(moments, weight), "nc4": apart}


def _spectrum(m: Measurement) -> Values:
    moments = ClassMoments.of(m.test.features, m.test.labels, m.classes)
    scatter = moments.scatter()
    return geometry.spectrum_metrics(geometry.spectrum(torch.zeros_like(scatter) if moments.constant else scatter))


def _dormant(m: Measurement) -> Values:
    activity = geometry.UnitActivity.of(m.test.features)
    return {"dead": activity.dormant(), "dormant": activity.dormant(DORMANT)}


def _calibration(m: Measurement) -> Values:
    bins = CalibrationBins.of(m.heads(m.test).to(torch.float64).softmax(dim=1), m.test.labels)
    count = int(bins.counts.sum())
    confidence, accuracy = (float(t.sum()) / count if count else None for t in (bins.confidence, bins.correct))
    return {"ece": bins.ece(), "confidence": confidence, "accuracy": accuracy}


def _novelty(m: Measurement) -> Values:
    found: Values = {}
    for name, score in (("softmax", max_softmax), ("energy", negative_energy)):
        if not m.named:  # a head that has never seen a label knows no class
            found |= {f"auroc_{name}": None, f"fpr95_{name}": None}
            continue
        inside, outside = (score(images.logits, m.known) for images in (m.test, m.unknown))
        found |= {f"auroc_{name}": auroc(inside, outside), f"fpr95_{name}": fpr_at_tpr(inside, outside)}
    return found


def _clustering(m: Measurement) -> Values:
    images = m.shown
    labels = images.labels.cpu().numpy()
    count = min(len(m.shown_classes), len(labels))
    features = F.normalize(images.features, dim=1).to(torch.float64).cpu().numpy()
    clusters = k_means(features, count, m.probing.evaluator.node.config.seed)
    old = torch.nonzero(m.known).flatten().cpu().numpy() if m.named else labels[:0]
    return {**clustering_accuracy(labels, clusters, old), "clusters": float(count)}


PROBES: dict[str, Callable[[Measurement], Values]] = {
    "nearest_mean": _nearest_mean, "knn": _knn, "linear": _linear, "retrieval": _retrieval,
    "compatibility": _compatibility, "cka": _cka, "drift": _drift, "prototypes": _prototypes,
    "hypersphere": _hypersphere, "collapse": _collapse, "spectrum": _spectrum, "dormant": _dormant,
    "calibration": _calibration, "novelty": _novelty, "clustering": _clustering,
}  # fmt: skip
HISTORY = frozenset({"compatibility", "cka", "drift", "prototypes"})
"""Probes that compare with the features of earlier models."""
