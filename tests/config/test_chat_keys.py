"""Rules about chat templates, their arguments, tools and learnt turns; words of other launchers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config import rules
from launcher.config.chat_template import trains_on_conversations
from launcher.config.resolve import resolve
from launcher.config.suggest import did_you_mean_key
from tests.config.workspace import RIGHT

OLD = "    type: TextDataLoader\n    dataset_dir: corpus\n"
CHAT = "type: InstructionDataLoader\ndataset_files: talk.jsonl\n"
P = "train_dataset.data_loader"


def resolved(more: str = "", loader: str = CHAT, mode: str = "train") -> Any:
    new = "".join(f"    {line}\n" for line in loader.splitlines())
    Path("x.yaml").write_text(RIGHT.replace(OLD, new) + more)
    flags = {"predict_data": "Hello"} if mode == "predict" else {}
    return resolve("x.yaml", mode, flags, ())


def found(more: str = "", loader: str = CHAT, mode: str = "train") -> list[str]:
    result = resolved(more, loader, mode)
    rest = rules.check(result.config, result.provenance, world=1, bad_keys=result.bad_keys)
    return [str(problem) for problem in (*result.problems, *rest)]


def warned(more: str = "", loader: str = CHAT) -> list[str]:
    result = resolved(more, loader)
    return [line for line in rules.warnings(result.config, result.provenance) if "chat" in line]


@pytest.fixture
def data(workspace: Path) -> Path:
    """Conversations, a template in a file, tools, and a tokenizer with one template."""
    Path("talk.jsonl").write_text("{}\n")
    Path("own.jinja").write_text("{% generation %}{{ tone }}{% endgeneration %}")
    Path("broken.jinja").write_text("{{ a }}\n{% for x in y %}")
    Path("tools.json").write_text("[{}]")
    Path("no_list.json").write_text("{}")
    Path("no_json.json").write_text("[\n{]")
    set_template("{{ messages }}{% if enable_thinking %}{% endif %}")
    return workspace


def set_template(template: Any) -> None:
    path = Path("tokenizer/tokenizer_config.json")
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | {"chat_template": template}))


NAMED = [{"name": "default", "template": "{{ a }}"}, {"name": "rag", "template": "{{ b }}"}]


@pytest.mark.parametrize(
    ("more", "loader"),
    [
        ("chat_template: own.jinja\nchat_template_kwargs: {tone: calm}\ntools: tools.json\n", CHAT),
        ("chat_template: '{% for m in messages %}{{ m }}{% break %}{% endfor %}'\n", CHAT),
        ("tools: [{type: function}]\n", CHAT),
        ("chat_template: default\n", CHAT),
        ("", f"{CHAT}train_on_roles: [user, assistant]\ntrain_on_turns: last"),
        ("chat_template: none\n", "type: TextDataLoader\ndataset_dir: corpus"),
        ("chat_template: none\n", f"{CHAT}format: alpaca\nprompt_template: mindformers_alpaca"),
    ],
)
def test_what_is_right(data: Path, more: str, loader: str) -> None:
    assert found(more, loader) == []


@pytest.mark.parametrize(
    ("more", "loader", "words"),
    [
        ("chat_template: none\n", CHAT, ["chat_template = 'none'", "predict"]),
        ("chat_template: ow.jinja\n", CHAT, ["chat_template = 'ow.jinja'", "`own.jinja`"]),
        ("chat_template: rag\n", CHAT, ["chat_template = 'rag'", "one template"]),
        ("chat_template: broken.jinja\n", CHAT, ["broken.jinja', line 2", "{% for x in y %}"]),
        ("chat_template: '{{ a'\n", CHAT, ["chat_template, line 1"]),
        (
            "chat_template_kwargs: {tokenize: True}\n",
            CHAT,
            ["chat_template_kwargs.tokenize = True"],
        ),
        (
            "chat_template_kwargs: {tools: []}\n",
            CHAT,
            ["chat_template_kwargs.tools = []", "Set the key `tools`"],
        ),
        ("tools: tool.json\n", CHAT, ["tools = 'tool.json'", "`tools.json`"]),
        ("tools: no_list.json\n", CHAT, ["tools = 'no_list.json'", "not a list of objects"]),
        ("tools: no_json.json\n", CHAT, ["tools = 'no_json.json'", "line 2"]),
        ("", f"{CHAT}train_on_roles: []", [f"{P}.train_on_roles = []", "Nearest: [assistant]"]),
        ("", f"{CHAT}train_on_roles: [asistant]", [f"{P}.train_on_roles", "`assistant`"]),
        ("", f"{CHAT}train_on_turns: lst", [f"{P}.train_on_turns = 'lst'", "`last`"]),
        (
            "",
            f"{CHAT}prompt_template: mindformers_alpaca\ntrain_on_turns: last",
            [f"{P}.train_on_turns = 'last'", "prompt_template"],
        ),
        (
            "",
            "type: TextDataLoader\ndataset_dir: corpus\ntrain_on_turns: last",
            [f"{P}.train_on_turns = 'last'", "InstructionDataLoader"],
        ),
    ],
)
def test_what_is_wrong(data: Path, more: str, loader: str, words: list[str]) -> None:
    problems = found(more, loader)
    assert len(problems) == 1, problems
    assert problems[0].startswith("x.yaml:")
    for word in words:
        assert word in problems[0]


@pytest.mark.parametrize("mode", ["train", "predict"])
def test_a_name_is_looked_up_in_the_files_of_the_tokenizer(data: Path, mode: str) -> None:
    set_template(NAMED)
    assert found("chat_template: rag\n", mode=mode) == []
    (problem,) = found("chat_template: rga\n", mode=mode)
    assert "did you mean `rag`?" in problem
    folder = Path("tokenizer/additional_chat_templates")
    folder.mkdir()
    (folder / "brief.jinja").write_text("{{ c }}")
    Path("tokenizer/chat_template.jinja").write_text("{{ d }}")
    assert found("chat_template: brief\n", mode=mode) == []
    (problem,) = found("chat_template: rag\n", mode=mode)
    assert "default, brief" in problem or "brief, default" in problem


def test_predict_may_be_raw(data: Path) -> None:
    assert found("chat_template: none\n", mode="predict") == []


def test_what_has_no_use_is_a_warning(data: Path) -> None:
    assert warned("chat_template_kwargs: {enable_thinking: False}\n") == []
    (line,) = warned("chat_template_kwargs: {enable_thinkin: False}\n")
    assert "x.yaml:" in line
    assert "chat_template_kwargs.enable_thinkin" in line
    assert "did you mean `enable_thinking`?" in line
    assert warned("chat_template: own.jinja\nchat_template_kwargs: {tone: calm}\n") == []
    (line,) = warned("chat_template: own.jinja\n", f"{CHAT}prompt_template: mindformers_alpaca")
    assert f"not used by {P}" in line


def test_arguments_are_typed_on_the_command_line(data: Path) -> None:
    result = resolved("chat_template_kwargs: {a: 1}\n")
    again = resolve(
        "x.yaml", "train", {},
        ("--chat_template_kwargs.enable_thinking=False", "+chat_template_kwargs.b=2"),
    )  # fmt: skip
    assert result.config.chat_template_kwargs == {"a": 1}
    assert again.config.chat_template_kwargs == {"a": 1, "enable_thinking": False, "b": 2}


@pytest.mark.parametrize(
    ("word", "section", "key"),
    [
        ("roles_to_train", P, f"{P}.train_on_roles"),
        ("train_on_inputs", "", f"{P}.train_on_roles"),
        ("train_on_eos", "", f"{P}.train_on_roles"),
        ("train_on_prompt", P, f"{P}.train_on_roles"),
        ("mask_history", P, f"{P}.train_on_turns"),
        ("assistant_only_loss", "", f"{P}.train_on_roles"),
        ("completion_only_loss", "runner_config", f"{P}.train_on_roles"),
        ("mask_history", "eval_dataset.data_loader", "eval_dataset.data_loader.train_on_turns"),
        ("template", "", "chat_template"),
        ("chat_template_path", "", "chat_template"),
        ("enable_thinking", "", "chat_template_kwargs.enable_thinking"),
    ],
)
def test_words_of_other_launchers(word: str, section: str, key: str) -> None:
    assert did_you_mean_key(word, section).startswith(f"did you mean `{key}`?")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"type": "InstructionDataLoader"}, True),
        ({"type": "PreferenceDataLoader"}, True),
        ({"type": "FeedbackDataLoader"}, True),
        ({"type": "TextDataLoader"}, False),
        ({"type": "InstructionDataLoader", "prompt_template": "alpaca"}, False),
        ({"0.type": "TextDataLoader", "1.type": "FeedbackDataLoader"}, True),
    ],
)
def test_which_trainings_render_conversations(keys: dict[str, str], expected: bool) -> None:
    found = {f"train_dataset.data_loader.{key}": value for key, value in keys.items()}
    assert trains_on_conversations({**found, "model.model_config.type": "x"}) is expected
