"""Predict renders with the template and the arguments that the weights were trained with."""

from __future__ import annotations

from launcher.builders.chat_template import with_chat_of_training
from launcher.config.flat import flat
from launcher.config.schema import Config

TRAINED = flat(
    Config(chat_template="brief", chat_template_kwargs={"enable_thinking": False, "tone": "calm"})
)


def test_they_are_taken_where_nothing_is_set() -> None:
    found = with_chat_of_training(Config(seed=3), TRAINED)
    assert found == Config(
        seed=3,
        chat_template="brief",
        chat_template_kwargs={"enable_thinking": False, "tone": "calm"},
    )
    assert with_chat_of_training(Config(), {}) == Config()


def test_what_is_set_wins() -> None:
    found = with_chat_of_training(Config(chat_template_kwargs={"tone": "loud"}), TRAINED)
    assert found.chat_template_kwargs == {"enable_thinking": False, "tone": "loud"}
    own = Config(chat_template="other")
    assert with_chat_of_training(own, TRAINED) == own
