"""Weights that MindFormers' own converters wrote are their Hugging Face twins bit for bit, and the
twins are written as they are: from complete folders, files, and rank folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.extensions import NAME_WRITERS, required
from launcher.weights.offline.export import write_complete
from launcher.weights.ranks.saves import open_any_format
from launcher.weights.source import open_complete
from tests.mindspore.names import (
    ALL,
    HERE,
    KEYS,
    WRITTEN,
    arrays,
    assert_same,
    config_of,
    goldens,
    hugging_face,
    native,
    needs_all,
    translated,
    write_ranks,
)

STATE = "qwen3_state", "mcore_train_state"
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp 2 x tp 2": {"grid": (2, 2)},
    "dp 2 x tp 2, replicas left out": {"grid": (2, 2), "deduplicated": True},
    "pp 2": {"stages": 2},
    "pp 2 x tp 2": {"stages": 2, "grid": (2, 1)},
}


def check(root: Path, family: str, form: str) -> None:
    """A golden set and its twin."""
    expected = arrays(open_complete(root / family / "hf"))
    keys = KEYS.get((family, form), {})
    found = hugging_face(root / family / form, config_of(family, root), **keys)
    assert_same({n: v for n, v in found.items() if not n.startswith("adam")}, expected)


@pytest.mark.parametrize(("family", "form"), goldens(HERE))
def test_a_golden_set_is_its_twin(family: str, form: str) -> None:
    check(HERE, family, form)


@needs_all
@pytest.mark.parametrize(("family", "form"), goldens(ALL))
def test_every_golden_set_is_its_twin(family: str, form: str) -> None:
    check(ALL, family, form)


def check_back(root: Path, family: str, form: str, folder: Path) -> None:
    """What is written from the twin is the golden set."""
    given = {
        "naming": "mcore_1.6" if form == "mcore_old" else form.partition("_")[0].replace(
            "online", "legacy"),
        "qkv_concat": form.endswith("_concat"),
        **KEYS.get((family, form), {}), **WRITTEN.get((family, form), {}),
    }  # fmt: skip
    write = required(NAME_WRITERS, "mindspore", "")
    named = write(open_complete(root / family / "hf"), config_of(family, root), given, str)
    write_complete(named.source, folder, form="mindspore", metadata=named.metadata)
    expected = arrays(open_complete(root / family / form))
    expected.pop("mtp.output_layer.weight", None)
    assert_same(arrays(open_complete(folder)), expected)


@pytest.mark.parametrize(
    ("family", "form"), [case for case in goldens(HERE) if case != STATE]
)  # fmt: skip
def test_a_twin_is_written_as_the_golden_set(family: str, form: str, tmp_path: Path) -> None:
    check_back(HERE, family, form, tmp_path)


@needs_all
@pytest.mark.parametrize(("family", "form"), [case for case in goldens(ALL) if case != STATE])
def test_every_twin_is_written_as_the_golden_set(family: str, form: str, tmp_path: Path) -> None:
    check_back(ALL, family, form, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "form"), goldens(HERE))
def test_rank_folders_are_the_twin(family: str, form: str, layout: str, tmp_path: Path) -> None:
    stored = open_complete(HERE / family / form)
    tensors = native(arrays(stored))
    extras = {"step_num": np.array(4), "global_step": np.array([4], np.int32)}
    folder = write_ranks(tmp_path, tensors, extras=extras, **LAYOUTS[layout])
    keys = KEYS.get((family, form), {})
    if form in ("mcore_contiguous", "legacy_concat", "mcore_old") and "tp 2" in layout:
        keys = {**keys, "mindformers_tensor_parallel": 1}
    source = open_any_format(folder, strategy=tmp_path / "strategy")
    config = config_of(family)
    assert_same(arrays(translated(source, config, **keys)),
                hugging_face(HERE / family / form, config, **keys))  # fmt: skip
    assert source.extras.keys() == extras.keys()


def test_names_of_the_code_of_glm_4_9b_for_the_class_of_transformers() -> None:
    config = {**config_of("glm4_9b"), "model_type": "glm"}
    own = arrays(open_complete(HERE / "glm4_9b" / "hf"))
    found = hugging_face(HERE / "glm4_9b" / "hf", config)
    place, new = "transformer.encoder.layers.1.", "model.layers.1."
    q, k, v = np.split(own[f"{place}self_attention.query_key_value.weight"], [32, 48])
    for letter, rows in zip("qkv", (q, k, v), strict=True):
        assert np.array_equal(found[f"{new}self_attn.{letter}_proj.weight"], rows)
    both = own[f"{place}mlp.dense_h_to_4h.weight"]
    assert np.array_equal(found[f"{new}mlp.gate_up_proj.weight"], both)
    for form in ("legacy_concat", "legacy_rearranged"):
        keys = KEYS.get(("glm4_9b", form), {})
        stored = hugging_face(HERE / "glm4_9b" / form, config, **keys)
        assert_same(
            stored,
            found,
        )
