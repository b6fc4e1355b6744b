"""Novelty scores against scikit-learn's ROC curve and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from fedcl.metrics.novelty import auroc, fpr_at_tpr, max_softmax, negative_energy

scores = st.lists(st.integers(-4, 4), min_size=1, max_size=40)


@hypothesis_settings(max_examples=100, deadline=None)
@given(known=scores, unknown=scores)
def test_auroc_is_scikit_learns(known: list[int], unknown: list[int]) -> None:
    """With many ties."""
    labels = [1] * len(known) + [0] * len(unknown)
    ours = auroc(torch.tensor(known, dtype=torch.float64), torch.tensor(unknown, dtype=torch.float64))
    assert ours == pytest.approx(roc_auc_score(labels, known + unknown), abs=1e-12)


@hypothesis_settings(max_examples=100, deadline=None)
@given(known=scores, unknown=scores, tpr=st.sampled_from([0.05, 0.5, 0.8, 0.95, 1.0]))
def test_fpr_is_that_of_scikit_learns_curve(known: list[int], unknown: list[int], tpr: float) -> None:
    labels = [1] * len(known) + [0] * len(unknown)
    false, true, _ = roc_curve(labels, known + unknown, drop_intermediate=False)
    expected = min(f for f, t in zip(false, true, strict=True) if t >= tpr - 1e-12)
    ours = fpr_at_tpr(torch.tensor(known, dtype=torch.float64), torch.tensor(unknown, dtype=torch.float64), tpr)
    assert ours == pytest.approx(expected, abs=1e-12)


def test_what_is_missing_is_undefined() -> None:
    some, none = torch.tensor([1.0, 2.0]), torch.zeros(0)
    for known, unknown in ((some, none), (none, some), (none, none)):
        assert auroc(known, unknown) is None
        assert fpr_at_tpr(known, unknown) is None


def test_scores_look_at_known_classes_only() -> None:
    logits = torch.tensor([[1.0, 3.0, 50.0], [2.0, 2.0, -7.0]], dtype=torch.float64)
    known = torch.tensor([True, True, False])
    e = np.exp
    expected = [e(3) / (e(1) + e(3)), 0.5]
    assert max_softmax(logits, known).tolist() == pytest.approx(expected, abs=1e-12)
    assert negative_energy(logits, known).tolist() == pytest.approx([np.log(e(1) + e(3)), np.log(2 * e(2))], abs=1e-12)
    hot = [2 * np.log(e(0.5) + e(1.5)), 2 * np.log(2 * e(1))]
    assert negative_energy(logits, known, 2.0).tolist() == pytest.approx(hot, abs=1e-12)
