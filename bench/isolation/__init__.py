"""What decoding in a child process costs, in time and in memory: `python -m ppllava_edge.bench.isolation`."""
