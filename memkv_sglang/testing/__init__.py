"""What tests and benchmarks of this project, and of tiers built elsewhere, share."""
