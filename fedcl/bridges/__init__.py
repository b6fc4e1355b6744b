"""Bridges to the neighbouring libraries: Flower's server strategies and Avalanche's plugins."""
