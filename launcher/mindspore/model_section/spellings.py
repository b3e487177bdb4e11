"""Several spellings of one key of config.json.

Owns the rule that the command line wins over files, whichever spelling each has:
`num_hidden_layers` of an override replaces `num_layers` of the file. Two spellings at the same kind
of place are left: they must agree, which `models.reading` checks.
"""

from __future__ import annotations

from launcher.config.draft import is_from_command_line
from launcher.mindspore.model_section.keys import SECTION, ModelKeys, spellings
from models.keys import ALIASES, PRECISIONS


def translate(keys: ModelKeys) -> None:
    """Drop the spellings in files of what the command line sets."""
    groups = [[*spellings(key)] for key in dict.fromkeys(ALIASES.values())]
    for field in dict.fromkeys(PRECISIONS.values()):
        groups.append([key for key, target in PRECISIONS.items() if target == field])
    for group in groups:
        nodes = {name: keys.draft.find(f"{SECTION}.{name}") for name in group}
        given = [name for name, node in nodes.items() if node and is_from_command_line(node)]
        for name, node in nodes.items():
            if given and node is not None and name not in given:
                keys.drop(name, f"the command line sets {given[0]}")
