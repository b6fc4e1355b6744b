"""The Flower app of fedcl, for ``flwr run``: what runs is the fedcl that is installed there."""

from fedcl.app import client, server

__all__ = ["client", "server"]
