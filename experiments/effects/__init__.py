"""What each method adds over its ablation, measured: ``python -m fedcl.experiments.effects``."""
