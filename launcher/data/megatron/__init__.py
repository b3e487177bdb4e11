"""Megatron's indexed datasets (`.bin`/`.idx`): files, the order of samples, blends, rows.

Nothing is imported here: `header` and `checks` are used before anything heavy is.
"""
