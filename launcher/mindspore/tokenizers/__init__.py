"""Tokenizers by the files that MindFormers names: one builder for each of its types.

Invariant: a builder reads the named files and nothing else, runs nothing from them, and raises
`UserError` for whatever they hold.
"""
