"""Built-in scenarios: how a dataset becomes a stream of tasks. Found through the entry points
``fedcl.scenarios``.
"""
