"""Comparing finished runs: methods, intervals over seeds, paired tests, the verdict in words."""

from .compute import compare, compare_runs
from .groups import Method
from .results import Comparison, Estimate, Pair

__all__ = ["Comparison", "Estimate", "Method", "Pair", "compare", "compare_runs"]
