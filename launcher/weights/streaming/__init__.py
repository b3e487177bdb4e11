"""Streaming: from disk to disk a portion at a time, and folders that appear complete."""
