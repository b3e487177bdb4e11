"""The arguments of a command line: flags, dotted keys, Hydra overrides.

Owns the table of flags and the parsing of argv into assignments to dotted keys, in order of
precedence. It knows no schema and imports the standard library only, so that --help is fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from launcher.errors import Problem, did_you_mean

FlagType = Literal["text", "int", "bool", "switch", "bool or text", "texts"]
"""`switch`: true or false; without a value, true."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One named flag and the keys it writes to."""

    name: str
    type: FlagType
    targets: tuple[str, ...]
    help: str
    only_present: bool = False
    """Write only into sections that the configuration has."""


def _flag(name: str, kind: FlagType, target: str, text: str) -> Flag:
    return Flag(name=name, type=kind, targets=(target or name,), help=text)


FLAGS: dict[str, Flag] = {
    flag.name: flag
    for flag in (
        _flag("run_mode", "text", "", "train, finetune, eval, predict or resume"),
        _flag("output_dir", "text", "", "root of everything the run writes"),
        _flag("load_checkpoint", "text", "", "weights to load: a file or a folder"),
        _flag("pretrained_model_dir", "text", "", "Hugging Face directory of the model"),
        _flag("auto_trans_ckpt", "bool", "", "weights may be resharded for this run's layout"),
        _flag("resume_training", "bool or text", "", "continue a run, or the name of a checkpoint"),
        _flag("src_strategy_path_or_dir", "text", "", "layout of the weights to load"),
        _flag("transform_process_num", "int", "", "ranks that convert ckpt files"),
        _flag("only_save_strategy", "bool", "", "write the strategy files and exit"),
        _flag(
            *("strategy_load_checkpoint", "text", "parallel.strategy_ckpt_load_file"),
            "strategy file of the weights to load",
        ),
        _flag("seed", "int", "", "seed of weights, data order, dropout and sampling"),
        _flag("use_parallel", "bool", "", "the run has several processes"),
        _flag("epochs", "int", "runner_config.epochs", "passes over the training data"),
        _flag(
            "max_steps", "int", "runner_config.max_steps", "length of the run in optimizer steps"
        ),
        _flag(
            "batch_size", "int", "runner_config.batch_size", "samples of a micro step on one rank"
        ),
        _flag(
            *("gradient_accumulation_steps", "int", "runner_config.gradient_accumulation_steps"),
            "micro steps of an optimizer step",
        ),
        _flag(
            "sink_mode",
            "bool",
            "runner_config.sink_mode",
            "run sink_size steps without callbacks in between",
        ),
        _flag("do_eval", "bool", "", "evaluate during training"),
        _flag(
            *("train_dataset_dir", "text", "train_dataset.data_loader.dataset_dir"),
            "training data",
        ),
        _flag(
            *("eval_dataset_dir", "text", "eval_dataset.data_loader.dataset_dir"),
            "evaluation data",
        ),
        Flag(
            name="num_samples",
            type="int",
            targets=(
                "train_dataset.data_loader.num_samples",
                "eval_dataset.data_loader.num_samples",
            ),
            help="read at most this many documents",
            only_present=True,
        ),
        _flag(
            *("predict_data", "texts", "input_data"),
            "one or more prompts, messages as JSON, or a file of them",
        ),
        _flag("system", "text", "", "system prompt of conversations"),
        _flag("chat_template", "text", "", "chat template: a name, a file, Jinja text or none"),
        _flag("stream", "bool", "", "print a text while it is generated"),
        _flag("interactive", "switch", "", "chat at the terminal, with --run_mode predict"),
        _flag("tools", "text", "", "JSON file of the tools that conversations may call"),
        _flag("predict_batch_size", "int", "", "prompts generated together"),
        _flag(
            "do_sample", "bool", "model.model_config.do_sample", "sample instead of greedy decoding"
        ),
        _flag("modal_type", "texts", "", "kinds of the inputs of a multimodal model"),
        _flag("adapter_id", "texts", "", "adapter of each prompt"),
        _flag("trust_remote_code", "bool", "", "run code found in pretrained_model_dir"),
        _flag("register_path", "text", "", "folder or file with your own callbacks"),
        _flag("profile", "bool", "", "profile some steps"),
        _flag("mode", "int", "context.mode", "0 graph, 1 eager (no effect on PyTorch)"),
        _flag("device_id", "int", "context.device_id", "device number (no effect on PyTorch)"),
        _flag("device_target", "text", "context.device_target", "CPU: do not use the GPU"),
        _flag("remote_save_url", "text", "", "only for ModelArts (no effect on PyTorch)"),
    )
}
SHORT_NAMES = {"train_dataset": "train_dataset_dir", "train_data": "train_dataset_dir"}
"""Abbreviations that MindFormers uses."""

SWITCHES = {
    "check_config": "check the configuration and exit",
    "print_config": "print the resolved configuration as YAML and exit",
    "prepare_data": "tokenize the data into the cache and exit; no GPU, one process",
    "migrate": "print a configuration of MindFormers in the keys of Slipway and exit",
    "help": "print this help and exit",
}

SHOW_DATA = "show_data"
SAMPLES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One assignment of the command line."""

    kind: Literal["literal", "option", "override"]
    """literal: the text itself. option: `--options`. override: Hydra's grammar, in `text`."""
    key: str
    text: str | list[str]
    where: str
    only_present: bool = False


@dataclass(kw_only=True)
class CommandLine:
    """A parsed command line."""

    config: str | None = None
    check_config: bool = False
    print_config: bool = False
    prepare_data: bool = False
    show_data: int = 0
    """Samples of the data that are printed; 0: none."""
    migrate: bool = False
    help: bool = False
    flags: list[Assignment] = field(default_factory=list)
    overrides: list[Assignment] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def opens_data_alone(self) -> bool:
        """Whether the data are opened by this process, without a run."""
        return self.prepare_data or self.show_data > 0


def parse(argv: Sequence[str]) -> CommandLine:
    """Parse `argv` (without the program's name) into assignments; errors go to `problems`."""
    line = CommandLine()
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            line.help = True
        elif word.startswith("--") and len(word) > 2:
            _option(line, word, words)
        elif "=" in word or word.startswith("~"):
            line.overrides.append(override_word(word))
        else:
            line.problems.append(_stray(word))
    return line


def override_word(word: str) -> Assignment:
    """An argument in Hydra's grammar as an assignment."""
    key = word.lstrip("+~").partition("=")[0]
    return Assignment(kind="override", key=key, text=word, where=f"command line: {word}")


def _stray(word: str) -> Problem:
    return Problem(
        what=f"unexpected argument `{word}`",
        where="command line",
        rule="arguments are `--flag value` or `key.path=value`",
        nearest=nearest_flag(word.lstrip("-")),
        advice=f"Write `--config {word}`" if word.endswith((".yaml", ".yml")) else "",
    )


def _option(line: CommandLine, word: str, words: list[str]) -> None:
    name, equals, text = word[2:].partition("=")
    where = f"command line: --{name}"
    if name in SWITCHES:
        _switch(line, name, text if equals else "true", where)
        return
    if name == SHOW_DATA:
        _show_data(line, [text] if equals else _take_one(words), where)
        return
    if name == "options":
        pairs = ([text] if equals else []) + _take_values(words)
        line.flags += list(_options(line, pairs))
        return
    flag = FLAGS.get(SHORT_NAMES.get(name, name))
    many = flag is not None and flag.type == "texts"
    values = [text] if equals else (_take_values(words) if many else _take_one(words))
    if flag is not None and flag.type == "switch" and not equals:
        values = _switch_value(words, values)
    if not values:
        nearest = "" if flag or name == "config" else nearest_flag(name)
        line.problems.append(
            Problem(
                what=f"`--{name}` has no value",
                where=where,
                rule=f"it takes {_takes(flag)}",
                nearest=nearest,
                advice="" if nearest else f"Write `--{name} value`",
            )
        )
    elif name == "config":
        line.config = values[0]
    elif flag is not None:
        _named(line, flag, values, where)
    else:
        line.overrides.append(Assignment(kind="literal", key=name, text=values[0], where=where))


def nearest_flag(name: str) -> str:
    """`did you mean `--epochs`?` for a misspelt flag, or an empty string."""
    names = [*FLAGS, *SHORT_NAMES, *SWITCHES, SHOW_DATA, "config", "options"]
    return did_you_mean(f"--{name}", [f"--{known}" for known in names], cutoff=0.75)


def _takes(flag: Flag | None) -> str:
    words = {"int": "an integer", "bool": "true or false", "texts": "one or more values"}
    return words.get(flag.type, "one value") if flag else "one value"


def _take_one(words: list[str]) -> list[str]:
    return [words.pop(0)] if words and not words[0].startswith("--") else []


def _take_values(words: list[str]) -> list[str]:
    values = []
    while words and not words[0].startswith("--"):
        values.append(words.pop(0))
    return values


def _switch_value(words: list[str], values: list[str]) -> list[str]:
    """The value of a switch: true where the next word, which is put back, is none."""
    if values and values[0].lower() in ("true", "false"):
        return values
    words[:0] = values
    return ["true"]


def _switch(line: CommandLine, name: str, text: str, where: str) -> None:
    if text.lower() not in ("true", "false"):
        line.problems.append(
            Problem(what=f"`--{name}` = {text!r}", where=where, rule="must be true or false")
        )
        return
    setattr(line, name, text.lower() == "true")


def _show_data(line: CommandLine, values: list[str], where: str) -> None:
    text = values[0] if values else str(SAMPLES_SHOWN)
    if not text.isdecimal() or int(text) < 1:
        line.problems.append(
            Problem(
                what=f"`--{SHOW_DATA}` = {text!r}",
                where=where,
                rule="it takes how many samples are shown",
                nearest=f"Nearest: --{SHOW_DATA} {SAMPLES_SHOWN}",
            )
        )
        return
    line.show_data = int(text)


def _named(line: CommandLine, flag: Flag, values: list[str], where: str) -> None:
    text: str | list[str] = values[0] if len(values) == 1 else values
    if flag.name == "predict_data" and isinstance(text, str) and text.lstrip()[:1] not in "[{":
        text = text.replace("\\n", "\n")
    if flag.type in ("bool", "switch") and str(text).lower() not in ("true", "false"):
        line.problems.append(
            Problem(
                what=f"`--{flag.name}` = {text!r}",
                where=where,
                rule="must be true or false",
                advice=f"Write `--{flag.name} true` or `--{flag.name} false`",
            )
        )
        return
    for target in flag.targets:
        line.flags.append(
            Assignment(
                kind="literal",
                key=target,
                text=text,
                where=where,
                only_present=flag.only_present,
            )
        )


def _options(line: CommandLine, pairs: list[str]) -> Iterator[Assignment]:
    where = "command line: --options"
    if not pairs:
        line.problems.append(
            Problem(what="`--options` has no value", where=where, advice="Write `--options k=v`")
        )
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            line.problems.append(
                Problem(
                    what=f"`{pair}` is not key=value",
                    where=where,
                    rule="--options takes key=value pairs",
                )
            )
            continue
        yield Assignment(kind="option", key=key, text=text, where=f"{where} {key}")


def help_text() -> str:
    """The text of `--help`."""
    lines = [
        "usage: python run.py --config x.yaml --run_mode train [--flag value ...] [key=value ...]",
        "",
        "Train, fine-tune, evaluate or run a language model, as configured by a YAML file.",
        "",
        f"  {'--config FILE':<34} the YAML file (current directory, then configs/)",
    ]
    lines += [f"  {f'--{name}':<34} {text}" for name, text in SWITCHES.items()]
    shown_data = "print so many samples of the data, with marks around what carries loss"
    lines += [f"  {f'--{SHOW_DATA} [N]':<34} {shown_data}"]
    shown = {"text": "TEXT", "int": "N", "bool": "true|false", "switch": "",
             "bool or text": "true|false|NAME"}  # fmt: skip
    lines += [
        f"  {f'--{flag.name} ' + shown.get(flag.type, 'TEXT ...'):<34} {flag.help}"
        for flag in FLAGS.values()
    ]
    lines += [
        f"  {'--options k=v ...':<34} values at dotted keys",
        f"  {'--a.b.c VALUE, --a.b.c=VALUE':<34} any key; the value is taken literally",
        f"  {'a.b.c=VALUE  +a.b=1  ~a.b':<34} the same in Hydra's override grammar",
        "",
        "Precedence, low to high: defaults, base_config, the YAML, named flags, dotted keys.",
        "All keys: docs/configuration.md. Several processes: torchrun --nproc_per_node N run.py",
        "Exit codes: 0 success; 2 wrong input (nothing was started); 1 internal error.",
    ]
    return "\n".join(lines)
