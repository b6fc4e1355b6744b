"""``fedcl sweep``: a grid of settings times seeds, run in parallel, resumed, skipped where it is done, or searched."""
