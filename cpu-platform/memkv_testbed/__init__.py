"""Real components on one machine for demo, tests and benchmarks: MinIO, proxies, faults."""
