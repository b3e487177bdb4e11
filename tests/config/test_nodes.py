"""Reading YAML: places, anchors, merge keys, numbers, and nothing that runs."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.config.nodes import Node, from_plain, merge, put, without
from launcher.config.yaml_reader import MAX_DEPTH, parse_value, read_text
from launcher.errors import UserError
from tests import messages


def places(text: str) -> dict[str, str]:
    return {path: node.where for path, node in read_text(text, "x.yaml").walk()}


def test_every_key_knows_its_line() -> None:
    found = places("a: 1\nb:\n  c: 2\n\n  d:\n    - 3\n    - e: 4\n")
    assert found == {
        "a": "x.yaml:1",
        "b": "x.yaml:2",
        "b.c": "x.yaml:3",
        "b.d": "x.yaml:5",
        "b.d.0": "x.yaml:6",
        "b.d.1": "x.yaml:7",
        "b.d.1.e": "x.yaml:7",
    }


def test_anchors_keep_the_line_of_what_they_copy() -> None:
    text = "a: &a\n  b: 1\n  c: 2\nd: *a\ne:\n  <<: *a\n  c: 3\n"
    tree = read_text(text, "x.yaml")
    assert tree.plain()["d"] == {"b": 1, "c": 2}
    assert tree.plain()["e"] == {"b": 1, "c": 3}
    found = places(text)
    assert (found["d"], found["d.b"]) == ("x.yaml:4", "x.yaml:2")
    assert (found["e.b"], found["e.c"]) == ("x.yaml:2", "x.yaml:7")


def test_of_several_merged_sections_the_first_wins() -> None:
    text = "a: &a {x: 1}\nb: &b {x: 2, y: 2}\nc: {<<: [*a, *b]}\n"
    assert read_text(text, "x").plain()["c"] == {"x": 1, "y": 2}


def test_a_tree_never_changes() -> None:
    tree = read_text("a: &a {b: [1, 2]}\nc: *a\n", "x")
    changed = put(put(tree, "c.b.1", from_plain(3, "y")), "d.e", from_plain(4, "y"))
    assert changed.plain() == {"a": {"b": [1, 2]}, "c": {"b": [1, 3]}, "d": {"e": 4}}
    assert without(changed, "c.b.0").plain()["c"] == {"b": [3]}
    assert without(changed, "nowhere.x") is changed
    assert tree.plain() == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.e-8", 1e-8),
        ("1E5", 1e5),
        ("-2e3", -2e3),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", float("inf")),
        ("1_000", 1000),
        ("0x10", 16),
        ("12", 12),
        ("-3", -3),
        ("True", True),
        ("off", False),
        ("~", None),
        ("null", None),
        ("12:30", "12:30"),
        ("2024-01-31", "2024-01-31"),
        ("007", "007"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("'1'", "1"),
        ("[1, a, 2.5]", [1, "a", 2.5]),
        ("{a: 1e-3}", {"a": 1e-3}),
        ("a: b: c", "a: b: c"),
        ("[1", "[1"),
    ],
)
def test_values(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['true']", "the tag `!!python/object/apply:os"),
        ("a: !!python/name:os.system", "is not allowed"),
        ("a: !!python/tuple [1]", "is not allowed"),
        ("a: !mine 1", "the tag `!mine` is not allowed"),
        ("a: !!set {x}", "is not allowed"),
        ("a: !!binary aGk=", "is not allowed"),
        ("a: !!timestamp 2024-01-01", "is not allowed"),
        ("a: &a {b: *a}", "this alias contains itself"),
        ("a: *b", "found undefined alias"),
        ("a: [1,", "this is not valid YAML"),
        ("a: 1\na: 2", "duplicate key `a`"),
        ("? [a]\n: 1", "this key"),
        ("a:\n  <<: 3", "`<<`"),
        ("a: 1\n--- \nb: 2", "this is not valid YAML"),
        ("a: \x00", "this is not valid YAML"),
        ("a: !!int x", "this is not valid YAML"),
        ("[" * 600, "nested too deeply"),
        (": ".join("abcdefghijklmnopqrstuvwxyz"), "this is not valid YAML"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_text(text, "x.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("x.yaml")
    messages.check("yaml", text if len(text) < 80 else text[:20], str(caught.value))


def test_every_duplicate_key_is_reported() -> None:
    with pytest.raises(UserError) as caught:
        read_text("a: 1\na: 2\nb: {c: 1, c: 2}\n", "x.yaml")
    assert [problem.where for problem in caught.value.problems] == ["x.yaml:2", "x.yaml:3"]


def test_depth_has_a_limit() -> None:
    fits = "{a: " * (MAX_DEPTH - 1) + "1" + "}" * (MAX_DEPTH - 1)
    assert read_text(f"a: {fits}", "x")
    with pytest.raises(UserError, match="nested too deeply"):
        read_text(f"a: {'{a: ' * MAX_DEPTH}1{'}' * MAX_DEPTH}", "x")


def test_aliases_cannot_multiply_without_end() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(UserError, match="aliases"):
        read_text("\n".join(lines), "x")


def test_an_empty_file_is_an_empty_section() -> None:
    assert read_text("# nothing\n", "x").plain() == {}


def test_merging_replaces_lists_and_merges_sections() -> None:
    below = from_plain({"a": {"b": 1, "c": [1, 2]}, "d": 1}, "below")
    above = from_plain({"a": {"c": [3]}, "e": 2}, "above")
    merged = merge(below, above)
    assert merged.plain() == {"a": {"b": 1, "c": [3]}, "d": 1, "e": 2}
    assert merged.value["a"].value["b"].where == "below"
    assert merged.value["a"].value["c"].where == "above"
    assert below.plain()["a"] == {"b": 1, "c": [1, 2]}


def test_a_value_over_a_section_replaces_it() -> None:
    merged = merge(
        from_plain({"a": {"b": 1}}, ""), Node(value={"a": Node(value=2, where="")}, where="")
    )
    assert merged.plain() == {"a": 2}
