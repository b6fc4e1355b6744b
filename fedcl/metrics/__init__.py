"""Accuracy counts, metrics of the accuracy matrix, and metrics over clients."""

from fedcl.metrics.accuracy import AccuracyState
from fedcl.metrics.clients import (
    ClientSummary,
    client_metrics,
    spatial_forgetting,
    summarise_client_matrices,
    summarise_clients,
    temporal_forgetting,
)
from fedcl.metrics.io import read_matrix, write_matrix
from fedcl.metrics.matrix import summary_metrics

__all__ = [
    "AccuracyState",
    "ClientSummary",
    "client_metrics",
    "read_matrix",
    "spatial_forgetting",
    "summarise_client_matrices",
    "summarise_clients",
    "summary_metrics",
    "temporal_forgetting",
    "write_matrix",
]
