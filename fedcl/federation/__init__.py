"""The federation: what travels between server and clients, how it is reduced, and what it costs."""
