"""Local training: one client at a time, or many as one stacked model."""
