"""The bench of methods: ``fedcl sweep experiments/methods.yaml``, then ``python -m fedcl.experiments.methods``."""
