"""Assembly: a checked configuration becomes a model, data and a run, out of what the rooms offer.

Every function here is called on all ranks; `launcher.modes` tells the stories.
"""
