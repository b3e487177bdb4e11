"""Measurements against the tools people would use instead. Results: benchmarks/RESULTS.md."""
