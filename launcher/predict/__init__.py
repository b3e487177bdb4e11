"""Prediction: from prompts to text and result files."""
