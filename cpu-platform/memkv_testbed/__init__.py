"""Real components on one machine, for the demo, tests and benchmarks: MinIO, proxies, faults."""
