"""Compare this project with hardware limits and peers: `python -m benchmarks NAME`."""
