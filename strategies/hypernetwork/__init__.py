"""Strategies in which a network at the server makes the models of the clients."""
