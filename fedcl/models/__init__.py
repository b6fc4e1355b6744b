"""Networks, heads and the growth of everything shaped like their parameters.

Import from the submodules: this file stays free of torch, so that names can be listed quickly.
"""
