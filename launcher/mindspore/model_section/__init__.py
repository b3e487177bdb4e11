"""The model of a MindFormers configuration, in keys of Hugging Face's config.json.

`section` owns the order of the steps; each other file owns one kind of key. They run before the
configuration is typed, on a `launcher.config.draft.Draft`, and need neither torch nor transformers.
"""
