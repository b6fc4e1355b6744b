"""Federated optimisation."""
