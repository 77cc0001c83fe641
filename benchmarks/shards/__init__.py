"""Compare placements of pages on shards: throughput, and what is left after a shard has failed."""
