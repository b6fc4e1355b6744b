"""Clients whose data differ: aggregation, learning rates, heads and normalisation made for it."""
