"""The model card: README.md of an exported model, in the form of the Hugging Face Hub.

Owns the text. It states what a run recorded and nothing else: a section without facts is left out.
The form is that of https://huggingface.co/docs/hub/model-cards: metadata in YAML between two lines
of dashes, then Markdown.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from launcher.config.schema import PREFERENCE_ARGUMENTS, PREFERENCE_TRAINERS, WITH_REFERENCE
from launcher.report.run_record import INITIAL_WEIGHTS, RunRecord

EVALUATIONS_SHOWN = 12
"""Evaluation rows in the table: the first, the best and the newest ones."""
_PLACE_KEYS = (
    *("dataset_dir", "dataset_files", "data_files", "path"),
    *("config.data_path", "config.train_data_path"),
)
"""Keys of a data loader for the place of its data; the first that is set counts."""
_NOT_OF_GENERATION = ("_", "output_", "return_dict", "transformers_version", "use_cache")
"""Beginnings of keys of generation_config.json that change no text."""
_METRICS = ("eval_loss", "eval_perplexity", "eval_rewards/accuracies", "eval_rewards/margins")
"""Beginnings of the metrics in the table of evaluations."""


@dataclass(frozen=True, kw_only=True)
class CardSubject:
    """The exported model."""

    name: str
    config: Mapping[str, Any]
    """Content of its config.json."""
    parameters: int
    weight_bytes: int
    files: int
    """Files of weights."""
    has_tokenizer: bool
    has_template: bool
    generation: Mapping[str, Any]
    """Content of its generation_config.json."""
    source: str
    """The path that it was exported from."""


def model_card(subject: CardSubject, record: RunRecord | None) -> str:
    """The text of README.md. `record`: what the run left; None where there was no run."""
    parts = [_metadata(), f"# {subject.name}\n", _introduction(subject, record)]
    parts += _section("Model", _table(_model_rows(subject)))
    if record is not None:
        parts += _section("Training", _table(_training_rows(record)))
        parts += _section("Data", _data(record))
        parts += _section("Evaluation", _evaluation(record))
    parts += _section("Use", _use(subject))
    if record is not None:
        parts += _section("Configuration", _configuration(record))
        parts += _section("Software", _table(_versions(record)))
    return "\n".join(parts)


def _metadata() -> str:
    content = {"library_name": "transformers", "pipeline_tag": "text-generation",
               "tags": ["slipway"]}  # fmt: skip
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---\n"


def _introduction(subject: CardSubject, record: RunRecord | None) -> str:
    if record is None:
        return f"Exported by Slipway from `{subject.source}`, which records no training run.\n"
    step = f"step {record.step:,}, " if record.step is not None else ""
    start = record.state.get(INITIAL_WEIGHTS)
    how = ""
    if INITIAL_WEIGHTS in record.state:
        how = f" that began with {f'the weights in `{start}`' if start else 'random weights'}"
    return f"Trained with Slipway: {step}save `{record.name}`, of a run{how}.\n"


def _model_rows(subject: CardSubject) -> Iterator[tuple[str, str]]:
    config = subject.config
    yield "architecture", ", ".join(config.get("architectures") or []) or "?"
    yield "parameters", f"{subject.parameters:,}"
    dtype = config.get("dtype") or config.get("torch_dtype")
    size = f"{subject.weight_bytes / 1e6:,.1f} MB in {subject.files} file"
    yield "weights", f"{f'{dtype}, ' if dtype else ''}{size}{'s' * (subject.files != 1)}"
    for key, label in (("max_position_embeddings", "positions"), ("vocab_size", "vocabulary")):
        if isinstance(config.get(key), int):
            yield label, f"{config[key]:,}"
    yield "tokenizer", "included" if subject.has_tokenizer else "not included"
    yield "chat template", "included" if subject.has_template else "none"
    if subject.generation:
        shown = (f"{key} {value}" for key, value in sorted(subject.generation.items())
                 if not key.startswith(_NOT_OF_GENERATION))  # fmt: skip
        yield "generation", ", ".join(shown)


def _training_rows(record: RunRecord) -> Iterator[tuple[str, str]]:
    state, config = record.state, record.configuration
    if record.step is not None:
        total = config.get("runner_config.max_steps")
        epoch = record.last_row.get("epoch")
        of = f" of at most {total:,}" if isinstance(total, int) else ""
        yield "optimizer steps", f"{record.step:,}{of}{f', epoch {epoch}' if epoch else ''}"
    for key, label in (("consumed_samples", "samples"), ("consumed_tokens", "tokens"),
                       ("global_batch_size", "samples of a step")):  # fmt: skip
        if isinstance(state.get(key), int):
            yield label, f"{state[key]:,}"
    yield from _present({
        "objective": _objective(config),
        "optimizer": _optimizer(state, config),
        "schedule": state.get("schedule"),
        "seed": state.get("seed"),
        "loss at this step": _number(record.last_row.get("loss")),
        "ranks": record.layout,
        "saved": _date(record.manifest.get("saved_at")),
    })  # fmt: skip


def _objective(config: Mapping[str, Any]) -> str:
    """The trainer; of preferences with the loss and the numbers that it used."""
    kind, loss = str(config.get("trainer.type") or ""), preference_loss_of(config)
    if loss is None:
        return kind
    used = ("beta", *(key for key, losses in PREFERENCE_ARGUMENTS.items() if loss in losses))
    values = ((key, config.get(f"preference.{key}")) for key in used)
    numbers = "".join(f", {key} {value:g}" for key, value in values if value is not None)
    weights = config.get("preference.reference.weights")
    compared = f", compared with `{weights}`" if weights and loss in WITH_REFERENCE else ""
    return f"{kind}, loss {loss}{numbers}{compared}"


def preference_loss_of(config: Mapping[str, Any]) -> str | None:
    """The loss on preferences of a configuration by dotted key; None: another training."""
    losses = PREFERENCE_TRAINERS.get(str(config.get("trainer.type")))
    return None if losses is None else str(config.get("preference.loss") or losses[0])


def _optimizer(state: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    rate = config.get("lr_schedule.learning_rate") or config.get("optimizer.learning_rate")
    name = state.get("optimizer") or ""
    return f"{name}, learning rate {rate:g}" if name and isinstance(rate, int | float) else name


def _data(record: RunRecord) -> str:
    """One row for each source: where it was, its kind, how many rows, how many were trained on."""
    data, config = record.state.get("data"), record.configuration
    if not isinstance(data, Mapping):
        return ""
    sources = _loaders(config)
    mixture = data.get("mixture")
    if isinstance(mixture, Mapping) and isinstance(mixture.get("sources"), Mapping):
        rows = [
            (name, *_place(sources.get(name, {})), _count(entry.get("rows")),
             _count(record.last_row.get(f"consumed/{name}")))
            for name, entry in mixture["sources"].items()
        ]  # fmt: skip
    else:
        only = next(iter(sources.values()), {})
        samples = _count(record.state.get("consumed_samples"))
        rows = [("train_dataset", *_place(only), _count(data.get("rows")), samples)]
    length = data.get("seq_length")
    packed = "several documents in a row" if data.get("packing") else "one document in a row"
    what = "A row has"
    if preference_loss_of(config) is not None:
        what, packed = "A row has two sequences of", "the answers that are compared"
    note = f"{what} {length:,} tokens, {packed}.\n" if isinstance(length, int) else ""
    head = ("source", "place", "loader", "rows", "samples trained on")
    return f"{_grid(head, rows)}\n{note}"


def _loaders(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The keys of each training data loader; those of a mixture by name."""
    start, found = "train_dataset.data_loader.", dict[str, dict[str, Any]]()
    for key, value in config.items():
        if key.startswith(start):
            number, _, rest = key.removeprefix(start).partition(".")
            place, name = (number, rest) if number.isdecimal() else ("", key.removeprefix(start))
            found.setdefault(place, {})[name] = value
    return {str(keys.get("name") or _stem(keys) or place): keys for place, keys in found.items()}


def _stem(keys: Mapping[str, Any]) -> str:
    """The name that a source has by its path: its last part, without the ending of a file."""
    place = _place(keys)[0].partition(",")[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", place.rstrip("/").rpartition("/")[2].rpartition(".")[0]
                  or place.rstrip("/").rpartition("/")[2]).strip("._-")  # fmt: skip


def _place(keys: Mapping[str, Any]) -> tuple[str, str]:
    """(where the data is, type of the loader)."""
    value = next((keys[key] for key in _PLACE_KEYS if keys.get(key)), "")
    listed = value if isinstance(value, list) else [value]
    return ", ".join(map(str, listed)), str(keys.get("type", ""))


def _evaluation(record: RunRecord) -> str:
    rows = record.evaluations
    own = record.state.get("evaluation")
    if not rows and isinstance(own, Mapping):
        rows = ({"step": record.step, **own},)
    if not rows:
        return ""
    shown = _shown(rows)
    metrics = [key for key in rows[-1] if key.startswith(_METRICS)]
    head = ["step", *metrics]
    lines = [[_count(row.get("step")), *(_number(row.get(key)) for key in metrics)]
             for row in shown]  # fmt: skip
    left = len(rows) - len(shown)
    note = f"{left} more evaluations are not shown.\n" if left else ""
    tokens, samples = (_count(rows[-1].get(f"eval_{what}")) for what in ("tokens", "samples"))
    unit = f"Losses are in nats for each of {tokens or 'the'} target tokens.\n"
    if samples:
        unit = f"Losses are means over {samples} samples.\n"
    return f"{_grid(head, lines)}\n{unit}{note}"


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first, the best and the newest rows, in order."""
    losses = [(row["eval_loss"], index) for index, row in enumerate(rows)
              if isinstance(row.get("eval_loss"), int | float)]  # fmt: skip
    best = {min(losses)[1]} if losses else set()
    kept = {0, *best, *range(max(len(rows) - EVALUATIONS_SHOWN + 2, 0), len(rows))}
    return [rows[index] for index in sorted(kept)]


def _use(subject: CardSubject) -> str:
    if not subject.has_tokenizer:
        return "The tokenizer is not included: give the one that the data was encoded with.\n"
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{subject.name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{subject.name}")',
    ]
    if subject.has_template:
        lines += [
            'messages = [{"role": "user", "content": "Hello"}]',
            "ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True,",
            '                                    return_tensors="pt", return_dict=True)',
        ]
    else:
        lines.append('ids = tokenizer("Hello", return_tensors="pt")')
    lines += ["print(tokenizer.decode(model.generate(**ids)[0]))", "```", ""]
    return "\n".join(lines)


def _configuration(record: RunRecord) -> str:
    if not record.configuration:
        return ""
    text = yaml.safe_dump(nested(record.configuration), sort_keys=False, allow_unicode=True)
    summary = "<details><summary>The resolved configuration of the run</summary>"
    return f"{summary}\n\n```yaml\n{text}```\n\n</details>\n"


def nested(flat: Mapping[str, Any]) -> Any:
    """A map of dotted keys as the sections and lists that it came from."""
    root: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        place = root
        for name in sections:
            inner = place.get(name)
            place = place.setdefault(name, {}) if inner is None or isinstance(inner, dict) else {}
        place[last] = value
    return _with_lists(root)


def _with_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {name: _with_lists(child) for name, child in value.items()}
    if inner and list(inner) == [str(index) for index in range(len(inner))]:
        return list(inner.values())
    return inner


def _versions(record: RunRecord) -> Iterator[tuple[str, str]]:
    versions = record.state.get("versions")
    yield from _present(versions if isinstance(versions, Mapping) else {})


def _section(title: str, content: str) -> list[str]:
    return [f"## {title}\n", content] if content else []


def _table(rows: Iterable[tuple[str, str]]) -> str:
    listed = list(rows)
    return _grid(("", ""), listed) if listed else ""


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(text: str) -> str:
    """A text that stays inside its cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _present(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from ((name, str(value)) for name, value in values.items() if value not in (None, ""))


def _number(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else ""


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else ""


def _date(seconds: Any) -> str:
    if not isinstance(seconds, int | float) or not seconds:
        return ""
    moment = datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M UTC")
