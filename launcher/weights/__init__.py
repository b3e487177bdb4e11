"""Weights: what is on disk becomes what each rank needs, and back, box by box."""
