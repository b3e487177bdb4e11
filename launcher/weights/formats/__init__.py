"""File formats of weights, one module each."""
