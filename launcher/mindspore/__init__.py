"""Everything that exists only for MindSpore and MindFormers; `launcher.extensions` names it."""
