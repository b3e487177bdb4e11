"""TokenFileDataLoader: files that hold token ids and nothing else.

Nothing is imported here: `header` and `checks` are used before anything heavy is.
"""
