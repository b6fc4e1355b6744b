"""Who holds which images when: tasks, partitions, populations, arrival, clocks, labels."""
