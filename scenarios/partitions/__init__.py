"""Built-in rules that split a task over the clients. Found through the entry points ``fedcl.partitions``."""
