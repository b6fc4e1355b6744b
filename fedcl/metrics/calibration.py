"""Calibration: whether a confidence of 0.8 is right four times in five."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CalibrationBins:
    """Predictions sorted into equal bins of confidence, (m-1)/M < confidence <= m/M; merged with ``+``.

    Attributes:
        counts: predictions in each bin, (M,) int64.
        correct: correct ones, (M,) int64.
        confidence: sum of their confidences, (M,) float64.

    >>> bins = CalibrationBins.of(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 0]))
    >>> bins.ece()
    0.25
    """

    counts: Tensor
    correct: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, probabilities: Tensor, labels: Tensor, bins: int = 15) -> CalibrationBins:
        """Of probabilities (N, C), rows summing to 1, and labels (N,) int64; N may be 0.

        Raises:
            ValueError: different lengths, no bin, or a number outside [0, 1].
        """
        if probabilities.dim() != 2 or labels.shape != probabilities.shape[:1] or bins < 1:
            raise ValueError(
                f"probabilities are (N, C), labels (N,) and bins at least 1; got {tuple(probabilities.shape)}, "
                f"{tuple(labels.shape)}, {bins}"
            )
        confidence, predicted = probabilities.to(torch.float64).max(dim=1)
        if not bool(((confidence >= 0) & (confidence <= 1 + 1e-6)).all()):
            raise ValueError("probabilities lie in [0, 1]")
        place = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
        right = (predicted == labels).long()
        zeros = torch.zeros(bins, dtype=torch.int64, device=labels.device)
        return cls(
            torch.bincount(place, minlength=bins),
            zeros.index_add(0, place, right),
            zeros.to(torch.float64).index_add(0, place, confidence),
        )

    def __add__(self, other: CalibrationBins) -> CalibrationBins:
        """Bins of the predictions of both.

        Raises:
            ValueError: different numbers of bins.
        """
        if self.counts.shape != other.counts.shape:
            raise ValueError(f"cannot add {len(other.counts)} bins to {len(self.counts)}")
        return CalibrationBins(
            self.counts + other.counts, self.correct + other.correct, self.confidence + other.confidence
        )

    def ece(self) -> float | None:
        """Expected calibration error, ``sum_m |correct_m - confidence_m| / N``, in [0, 1]; None without predictions.

        Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
        """
        count = int(self.counts.sum())
        return float((self.correct - self.confidence).abs().sum()) / count if count else None
