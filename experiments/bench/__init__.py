"""The benchmark's workloads as settings, and the programs that do their work: ours and the peers'."""
