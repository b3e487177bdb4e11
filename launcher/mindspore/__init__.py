"""What exists only because MindSpore and MindFormers exist."""
