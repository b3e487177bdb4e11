"""Build a model, data and a run from a checked configuration. Every function is called on all
ranks."""
