"""The sections of a MindFormers configuration other than the model, in keys of this launcher.

`eager` translates the style of 2026 (`training:`, `parallelism:`, ...) into the sections of the
older styles; the other files then own one group of sections each. They run before the configuration
is typed, on a `launcher.config.draft.Draft`, and import nothing heavy.
"""
