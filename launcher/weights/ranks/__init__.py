"""Rank files: what each rank of a save holds, ours and MindSpore's, and which belong together."""
