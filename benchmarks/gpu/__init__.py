"""Everything that a few minutes on one GPU can show: `python -m benchmarks.gpu`."""
