"""Representation metrics against literal loops in float64, and against scikit-learn and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from fedcl import random
from fedcl.metrics import compatibility, geometry, probes
from fedcl.metrics.calibration import CalibrationBins
from fedcl.metrics.moments import ClassMoments
from fedcl.metrics.retrieval import recall_at_1, retrieve
from fedcl.metrics.similarity import linear_cka

Floats = npt.NDArray[np.float64]


def normal(count: int, width: int, *name: object) -> Floats:
    u = random.uniform(2 * count * width, *name).reshape(2, count, width)
    found: Floats = np.sqrt(-2 * np.log1p(-u[0])) * np.cos(2 * np.pi * u[1])
    return found


def blobs(count: int, classes: int, width: int, name: str) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Overlapping classes of unequal sizes."""
    labels = (random.words(count, name, "labels") % np.uint64(classes * 2)).astype(np.int64) % classes
    labels[:classes] = np.arange(classes)
    labels[labels == 1] = np.where(np.arange((labels == 1).sum()) % 2, 0, 1)
    return normal(count, width, name) + 1.2 * normal(classes, width, "centres")[labels], labels


def tensors(*found: npt.NDArray[np.generic]) -> list[torch.Tensor]:
    return [torch.from_numpy(a) for a in found]


def test_nearest_mean_is_scikit_learns_nearest_centroid() -> None:
    x, y = blobs(120, 4, 6, "train")
    q, _ = blobs(90, 4, 6, "test")
    tx, ty, tq = tensors(x, y, q)
    found = probes.nearest_mean_scores(tq, ClassMoments.of(tx, ty, 5))
    assert found[:, 4].eq(-torch.inf).all()
    assert found.argmax(1).tolist() == NearestCentroid().fit(x, y).predict(q).tolist()
    mean = x[y == 2].mean(0)
    assert found[7, 2].item() == pytest.approx(-np.linalg.norm(q[7] - mean), abs=1e-12)


@pytest.mark.parametrize("k", [1, 7, 120])
def test_knn_is_scikit_learns_with_these_weights(k: int) -> None:
    x, y = blobs(120, 4, 6, "train")
    q, _ = blobs(90, 4, 6, "test")
    unit, asked = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, q))

    def weights(distance: Floats) -> Floats:  # of unit vectors: s = 1 - distance² / 2
        found: Floats = np.exp((1 - distance**2 / 2) / 0.07)
        return found

    judge = KNeighborsClassifier(k, weights=weights).fit(unit, y)
    tx, ty, tq = tensors(x, y, q)
    found = probes.knn_scores(tq, tx, ty, 6, k)
    assert found[:, 4:].eq(-torch.inf).all()
    shares = found[:, :4] / found[:, :4].sum(1, keepdim=True)
    assert np.allclose(shares.numpy(), judge.predict_proba(asked), atol=1e-9)


def test_knn_refuses_more_neighbours_than_there_are() -> None:
    x, y = torch.eye(3), torch.arange(3)
    for k in (0, 4):
        with pytest.raises(ValueError, match=r"\[1, 3\]"):
            probes.knn_scores(x, x, y, 3, k)


def test_the_linear_probe_is_scikit_learns_logistic_regression() -> None:
    x, y = blobs(200, 4, 6, "train")
    x[:, 5] = 3.0  # constant
    labels = np.where(y == 3, 5, y)  # classes 3 and 4 of 7 are absent
    q, _ = blobs(90, 4, 6, "test")
    probe = probes.fit_linear(*tensors(x, labels), 7, strength=0.5, tolerance=1e-8)
    scale = np.where(x.std(0) > 0, x.std(0), 1.0)
    judge = LogisticRegression(C=0.5, tol=1e-10, max_iter=5000).fit((x - x.mean(0)) / scale, labels)
    found = probe.scores(torch.from_numpy(q)).softmax(1).numpy()
    assert found[:, [3, 4, 6]].max() == 0.0
    assert np.allclose(found[:, [0, 1, 2, 5]], judge.predict_proba((q - x.mean(0)) / scale), atol=1e-6)
    assert np.allclose(probe.weight[[0, 1, 2, 5]].numpy(), judge.coef_, atol=1e-5)


def test_a_linear_probe_of_one_class() -> None:
    probe = probes.fit_linear(torch.ones(3, 2), torch.full((3,), 1), 2)
    assert probe.scores(torch.zeros(1, 2)).argmax(1).tolist() == [1]
    with pytest.raises(ValueError, match="at least one"):
        probes.fit_linear(torch.ones(0, 2), torch.zeros(0, dtype=torch.int64), 2)


def slow_retrieval(q: Floats, ql: Floats, g: Floats, gl: Floats, same: bool, k: int) -> tuple[float, float]:
    recalls, precisions = [], []
    for i in range(len(q)):
        order = sorted(
            (j for j in range(len(g)) if not (same and i == j)),
            key=lambda j: -float(q[i] @ g[j] / np.linalg.norm(q[i]) / np.linalg.norm(g[j])),
        )
        hits = [gl[j] == ql[i] for j in order]
        r = sum(hits)
        if not r:
            continue
        recalls.append(any(hits[:k]))
        precisions.append(sum(sum(hits[: p + 1]) / (p + 1) for p in range(r) if hits[p]) / r)
    return float(np.mean(recalls)), float(np.mean(precisions))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_retrieval(k: int) -> None:
    x, y = blobs(60, 5, 4, "test")
    y[0] = 9  # alone in its class: cannot be found, is not counted
    tx, ty = tensors(x, y)
    found = retrieve(tx, ty, tx, ty, torch.arange(60), (k,))
    recall, precision = slow_retrieval(x, y, x, y, True, k)
    assert found.queries == 59
    assert found.recall(k) == pytest.approx(recall, abs=1e-12)
    assert found.map_at_r() == pytest.approx(precision, abs=1e-12)
    g, gl = blobs(25, 3, 4, "gallery")
    tg, tgl = tensors(g, gl)
    found = retrieve(tx, ty, tg, tgl, None, (k,))
    recall, precision = slow_retrieval(x, y, g, gl, False, k)
    assert (found.recall(k), found.map_at_r()) == pytest.approx((recall, precision), abs=1e-12)
    assert retrieve(tx, ty, tg, tgl, None).recall(1) == recall_at_1(tx, ty, tg, tgl)
    assert retrieve(tx, ty, tx, ty, torch.arange(60)).recall(1) == recall_at_1(tx, ty, tx, ty, torch.arange(60))


@pytest.mark.parametrize("k", [1, 4])
def test_recall_is_torchmetrics_hit_rate(k: int) -> None:
    functional = pytest.importorskip("torchmetrics.functional.retrieval")
    x, y = tensors(*blobs(60, 5, 4, "test"))
    unit = torch.nn.functional.normalize(x, dim=1)
    rates = []
    for i in range(60):
        others = torch.arange(60) != i
        hits = y[others] == y[i]
        if bool(hits.any()):
            rates.append(float(functional.retrieval_hit_rate(unit[others] @ unit[i], hits, top_k=k)))
    assert retrieve(x, y, x, y, torch.arange(60), (k,)).recall(k) == pytest.approx(np.mean(rates), abs=1e-12)


def test_nothing_to_retrieve_is_undefined() -> None:
    x, y = torch.eye(3), torch.arange(3)
    found = retrieve(x, y, x, y, torch.arange(3))
    assert (found.queries, found.recall(1), found.map_at_r()) == (0, None, None)
    assert recall_at_1(x, y, x, y, torch.arange(3)) is None
    assert recall_at_1(x[:1], y[:1], x[:1], y[:1], torch.arange(1)) is None


def test_cka_is_the_same_from_images_and_from_dimensions() -> None:
    x, y = normal(7, 20, "a"), normal(7, 30, "b")
    a, b = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(b.T @ a) ** 2 / np.linalg.norm(a.T @ a) / np.linalg.norm(b.T @ b)
    assert linear_cka(*tensors(x, y)) == pytest.approx(expected, abs=1e-12)
    wide, narrow = normal(50, 4, "a"), normal(50, 3, "b")
    a, b = wide - wide.mean(0), narrow - narrow.mean(0)
    expected = np.linalg.norm(b.T @ a) ** 2 / np.linalg.norm(a.T @ a) / np.linalg.norm(b.T @ b)
    assert linear_cka(*tensors(wide, narrow)) == pytest.approx(expected, abs=1e-12)
    assert linear_cka(torch.ones(5, 2), torch.rand(5, 2, generator=torch.Generator().manual_seed(0))) is None


def test_uniformity_and_alignment_by_loops() -> None:
    x, y = normal(30, 4, "u"), normal(30, 4, "v")
    a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    pairs = [math.exp(-2 * ((a[i] - a[j]) ** 2).sum()) for i in range(30) for j in range(30) if i != j]
    assert geometry.uniformity(torch.from_numpy(x)) == pytest.approx(math.log(np.mean(pairs)), abs=1e-12)
    expected = np.mean([((p - q) ** 2).sum() for p, q in zip(a, b, strict=True)])
    assert geometry.alignment(*tensors(x, y)) == pytest.approx(expected, abs=1e-12)
    assert geometry.uniformity(torch.ones(1, 3)) is None


def test_neural_collapse_by_loops() -> None:
    x, y = blobs(80, 4, 6, "nc")
    weight = normal(4, 6, "w")
    found = geometry.neural_collapse(ClassMoments.of(*tensors(x, y), 4), torch.from_numpy(weight))
    means = np.array([x[y == c].mean(0) for c in range(4)])
    centre = means.mean(0)
    m = means - centre
    within = sum(np.outer(h - means[c], h - means[c]) for h, c in zip(x, y, strict=True)) / len(x)
    between = sum(np.outer(r, r) for r in m) / 4
    simplex = (np.eye(4) - 0.25) / math.sqrt(3)
    sizes = [np.linalg.norm(r) for r in m]
    angles = [abs(m[i] @ m[j] / sizes[i] / sizes[j] + 1 / 3) for i in range(4) for j in range(4) if i != j]
    variance = [((x[y == c] - means[c]) ** 2).sum(1).mean() for c in range(4)]
    cdnv = [
        (variance[i] + variance[j]) / 2 / ((means[i] - means[j]) ** 2).sum()
        for i in range(4) for j in range(4) if i != j
    ]  # fmt: skip
    expected = {
        "nc1": np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / 4,
        "nc2_norms": np.std(sizes) / np.mean(sizes),
        "nc2_angles": np.mean(angles),
        "nc2_weight": np.linalg.norm(weight @ weight.T / np.linalg.norm(weight @ weight.T) - simplex),
        "nc3": np.linalg.norm(weight @ m.T / np.linalg.norm(weight @ m.T) - simplex),
        "cdnv": np.mean(cdnv),
    }
    assert found == pytest.approx(expected, abs=1e-10)


def test_complete_collapse_is_zero_and_no_classes_undefined() -> None:
    vertices = torch.eye(4, dtype=torch.float64)
    moments = ClassMoments.of(vertices.repeat(3, 1), torch.arange(4).repeat(3), 4)
    assert max(abs(v or 0.0) for v in geometry.neural_collapse(moments, vertices - 0.25).values()) < 1e-7
    one = ClassMoments.of(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64), 2)
    assert set(geometry.neural_collapse(one).values()) == {None}
    equal = ClassMoments.of(torch.ones(3, 2), torch.arange(3), 3)
    assert set(geometry.neural_collapse(equal).values()) == {None}
    headless = geometry.neural_collapse(moments)
    assert headless["nc3"] is None
    assert headless["nc1"] is not None


def test_spectrum_by_singular_values() -> None:
    x = normal(40, 6, "s") * [5, 3, 1, 1, 0.1, 0.0]
    found = geometry.spectrum_metrics(
        geometry.spectrum(ClassMoments.of(torch.from_numpy(x), torch.zeros(40, dtype=torch.int64), 1).scatter())
    )
    singular = np.linalg.svd(x - x.mean(0), compute_uv=False)
    p, shares = singular / singular.sum(), singular**2 / (singular**2).sum()
    p = p[p > 1e-12]
    assert found["effective_rank"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), abs=1e-5)
    assert found["participation_ratio"] == pytest.approx(1 / (shares**2).sum(), abs=1e-10)
    assert found["stable_rank"] == pytest.approx(1 / shares[0], abs=1e-10)
    assert found["top_5"] == pytest.approx(shares[:5].sum(), abs=1e-10)
    assert set(geometry.spectrum_metrics(geometry.spectrum(torch.zeros(3, 3))).values()) == {None}


def test_dormant_units() -> None:
    x = torch.tensor([[0.0, 1.0, -0.01, 3.0], [0.0, 1.0, 0.03, 3.0]])
    units = geometry.UnitActivity.of(x)
    assert units.scores().tolist() == pytest.approx([0.0, 1 / 1.005, 0.02 / 1.005, 3 / 1.005])
    assert (units.dormant(), units.dormant(0.025)) == (0.25, 0.5)
    maps = x[:, :, None, None].abs() * torch.tensor([[0.5, 1.5]])
    assert torch.allclose(geometry.UnitActivity.of(maps).total, units.total)
    assert geometry.UnitActivity.of(torch.zeros(2, 3)).dormant() == 1.0
    assert geometry.UnitActivity.of(torch.zeros(0, 3)).dormant() is None


def test_calibration_is_that_of_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = torch.from_numpy(normal(300, 5, "logits")), torch.arange(300) % 5
    shares = (2 * logits).softmax(dim=1)
    expected = functional.multiclass_calibration_error(shares, labels, 5, n_bins=15, norm="l1")
    assert CalibrationBins.of(shares, labels).ece() == pytest.approx(float(expected), abs=1e-6)
    assert CalibrationBins.of(shares[:0], labels[:0]).ece() is None
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        CalibrationBins.of(logits * 9, labels)


def test_calibration_by_hand() -> None:
    shares = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8], [1.0, 0.0]], dtype=torch.float64)
    bins = CalibrationBins.of(shares, torch.tensor([0, 1, 1, 0]), bins=2)
    assert bins.counts.tolist() == [1, 3]  # 0.5 belongs to the lower bin
    assert bins.ece() == pytest.approx((abs(1 - 0.5) + abs(2 - 2.7)) / 4, abs=1e-12)


def test_compatibility_by_hand() -> None:
    c = [[0.5, None, None], [0.6, 0.8, None], [0.4, 0.7, 0.9]]
    assert compatibility.average_compatibility(c) == pytest.approx(1 / 3)
    assert compatibility.average_compatibility_score(c) == pytest.approx(3.9 / 6)
    assert compatibility.backward_compatibility(c) == pytest.approx((-0.1 - 0.1) / 2)
    assert compatibility.forward_compatibility(c) == pytest.approx((-0.2 - 0.2) / 2)
    alone = [[0.5]]
    assert compatibility.average_compatibility(alone) is None
    assert compatibility.backward_compatibility(alone) is None
    assert compatibility.forward_compatibility(alone) is None
    assert compatibility.average_compatibility_score(alone) == 0.5
    gap = [[0.5, None], [None, 0.5]]
    assert compatibility.average_compatibility(gap) is None
