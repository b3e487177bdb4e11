"""Adapters on disk: their description and tensors, in the form of PEFT and in rank files."""
