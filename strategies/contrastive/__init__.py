"""Losses on embeddings."""
