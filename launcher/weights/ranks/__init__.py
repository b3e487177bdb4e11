"""Rank files: what each rank of a save holds, and which files belong together."""
