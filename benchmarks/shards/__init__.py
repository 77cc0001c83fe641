"""Compare placements of pages on shards, by throughput and by what survives a failure."""
