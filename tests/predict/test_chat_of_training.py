"""Predict renders as the run that trained the weights did: template, arguments and tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.builders.chat_template import settings_with_training
from launcher.builders.run_metadata import CHAT
from launcher.config.schema import Config
from launcher.data.chat_rendering import ChatSettings, chat_settings

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {}}}}
KWARGS = {"enable_thinking": False, "style": {"tone": "calm", "words": [{"most": 3}]}}


@pytest.fixture
def trained(tmp_path: Path) -> dict[str, object]:
    """What a run has saved whose template and tools are in files that are no longer there."""
    template, tools = tmp_path / "brief.jinja", tmp_path / "tools.json"
    template.write_text("{{ messages }}")
    tools.write_text(json.dumps([TOOL]))
    config = Config(chat_template=str(template), tools=str(tools), chat_template_kwargs=KWARGS)
    saved = json.loads(json.dumps(chat_settings(config).to_json()))
    template.unlink()
    tools.unlink()
    return {"configuration": {}, CHAT: saved}


def test_it_is_taken_where_nothing_is_set(trained: dict[str, object]) -> None:
    found = settings_with_training(Config(), trained)
    assert (found.text, found.kwargs, found.tools) == ("{{ messages }}", KWARGS, [TOOL])
    for nothing in (None, {"configuration": {}}):
        assert settings_with_training(Config(), nothing) == ChatSettings()


def test_what_is_set_wins(trained: dict[str, object]) -> None:
    own = Config(chat_template_kwargs={"enable_thinking": True}, tools=[])
    found = settings_with_training(own, trained)
    assert (found.kwargs["enable_thinking"], found.kwargs["style"]) == (True, KWARGS["style"])
    assert (found.text, found.tools) == ("{{ messages }}", [])
    named = Config(chat_template="other")
    assert settings_with_training(named, trained) == chat_settings(named)
