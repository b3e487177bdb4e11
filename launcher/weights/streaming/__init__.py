"""Streaming: from disk to disk a portion at a time, and files that appear whole. Torch-free."""
