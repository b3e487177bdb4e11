"""Weights under the names of MindFormers' models as weights under Hugging Face names, and back."""
