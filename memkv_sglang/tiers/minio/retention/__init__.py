"""What stays in the bucket: access times, pins, and the collector with its lease."""
