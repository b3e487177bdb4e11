"""Checkpoint: all ranks or nothing, which one is the newest, and what comes back."""
