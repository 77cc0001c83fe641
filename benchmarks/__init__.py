"""What bounds the project, and how close it comes: `python -m benchmarks NAME`."""
