"""What is measured: predictions, matrices, probes, costs."""
