"""Rules between sections, by what they are about. The list of all of them: config/rules.py."""
