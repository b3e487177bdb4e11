"""Tasks of lm-eval on a model of this project: the job, the model behind its interface, results.

Owns the one place that knows lm-eval, an optional package that is imported when it is used. What a
score is, is up to `launcher.predict.scoring`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.builders.job import Job
from launcher.builders.load_weights import find_weights, load_or_init
from launcher.builders.model import build_predicting
from launcher.builders.start import chosen_kernels, join
from launcher.config import rules
from launcher.config.command_line import parse
from launcher.config.derived import world_size
from launcher.config.nodes import from_plain
from launcher.config.resolve import Resolved, read_tree, resolve_command_line
from launcher.errors import EXIT_OK, UserError
from launcher.generation.settings import GenerationSettings
from launcher.parallel import world as worlds
from launcher.parallel.model_parts import ModelParts
from launcher.predict.generate import positions_of
from launcher.predict.scoring import Scorer
from launcher.report.aside import write_new
from launcher.report.console import Console
from launcher.weights.offline.described import NAME as CONFIG_NAME
from launcher.weights.ranks.rank_folders import first_file
from launcher.weights.ranks.saves import model_folder
from launcher.weights.source import detect

_PACKAGE = Path(__file__).parents[1]
USUAL_LENGTH = 2048
"""Tokens of a row where the model has no limit."""
USUAL_NEW_TOKENS = 256
"""Of a task that generates without a limit of its own."""
_SETTINGS = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "min_p")
"""Keys of `generation_kwargs` of a task that are honoured."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def evaluate_tasks(options: argparse.Namespace, files: Sequence[Path], console: Console) -> int:
    """Compute the tasks in `files`, print the table and write the results. Returns the exit code.

    Called by all ranks together. Raises `UserError`.
    """
    resolved = _resolved(options)
    world = join(resolved.config)
    job = Job(resolved.config, resolved.provenance, world, Console(enabled=world.is_main))
    try:
        with chosen_kernels(job):
            results = _results(options, files, scorer_of(job, options.batch_size))
        if world.is_main:
            console.log(_table(results))
            write_new(options.output_path, _text(results))
            console.log(f"written: {options.output_path}")
    finally:
        worlds.stop(world)
    return EXIT_OK


def _resolved(options: argparse.Namespace) -> Resolved:
    """The configuration of a prediction with the weights. Raises `UserError` with all problems."""
    if options.config is not None:
        _check_unused(options)
        words = ["--config", options.config, "--run_mode", "predict", "--predict_data", "-",
                 "--load_checkpoint", str(options.load_checkpoint)]  # fmt: skip
        resolved = resolve_command_line(parse(words))
    else:
        plain: dict[str, Any] = {
            "run_mode": "predict", "input_data": "-", "seed": options.seed,
            "load_checkpoint": str(options.load_checkpoint),
            "pretrained_model_dir": str(folder_of_model(options.load_checkpoint)),
            "parallel_config": {"model_parallel": world_size()},
        }  # fmt: skip
        if options.compute_dtype:
            plain["model"] = {"model_config": {"compute_dtype": options.compute_dtype}}
        if options.tokenizer:
            tokenizer = {"pretrained_model_dir": str(options.tokenizer)}
            plain["processor"] = {"tokenizer": tokenizer}
        resolved = read_tree(from_plain(plain, "command line"))
    found = rules.check(
        resolved.config, resolved.provenance, world=world_size(), bad_keys=resolved.bad_keys
    )
    if problems := (*resolved.problems, *found):
        raise UserError(problems)
    return resolved


def _check_unused(options: argparse.Namespace) -> None:
    """Raises `UserError` for options that a configuration has keys for."""
    for name, key in {"compute_dtype": "model.model_config.compute_dtype",
                      "tokenizer": "processor.tokenizer.pretrained_model_dir"}.items():  # fmt: skip
        if getattr(options, name) is not None:
            raise UserError(
                f"--{name} and --config are both given", where="command line",
                rule="the configuration describes the model", nearest=f"Set {key} in it",
            )  # fmt: skip


def folder_of_model(path: Path) -> Path:
    """The folder of config.json and the tokenizer of the weights at `path`. Raises `UserError`."""
    file = first_file(path) if detect(path) == "distributed" else None
    folder = model_folder(file) if file is not None else path if path.is_dir() else path.parent
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(
            f"{folder} has no config.json", rule="it describes the model of the weights",
            advice="Give the YAML file of the run with --config",
        )  # fmt: skip
    return folder


def scorer_of(job: Job, batch_size: int) -> Scorer:
    """The model of a job, loaded. Called by all ranks together; raises `UserError`."""
    if job.mesh.pp > 1:
        raise UserError(
            "parallel_config.pipeline_stage: a model is scored by ranks that hold all layers",
            where=job.provenance.nearest("parallel_config.pipeline_stage"),
            nearest="Nearest: tensor parallelism (model_parallel)",
        )
    forward, layout = build_predicting(job)
    load_or_init(job, ModelParts([forward.model]), layout, find_weights(job))
    forward.model.eval()
    return Scorer(
        forward=forward, tokenizer=job.tokenizer, device=job.world.device, batch_size=batch_size,
        max_length=positions_of(forward.model) or USUAL_LENGTH, seed=job.config.seed,
    )  # fmt: skip


def as_harness_model(scorer: Scorer) -> Any:
    """The model as an `lm_eval.api.model.TemplateLM`, which encodes contexts and answers."""
    base: Any = importlib.import_module("lm_eval.api.model").TemplateLM
    windows = importlib.import_module("lm_eval.utils")

    class HarnessModel(base):
        tokenizer = scorer.tokenizer
        tokenizer_name = str(getattr(scorer.tokenizer, "name_or_path", "")).replace("/", "__")
        eot_token_id = scorer.tokenizer.eos_token_id
        max_length = scorer.max_length
        batch_size = scorer.batch_size

        @property
        def prefix_token_id(self) -> int:
            return scorer.prefix

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            return scorer.encode(string, special=add_special_tokens)

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            found = scorer.scores([(context, answer) for _, context, answer in requests])
            return [tuple(score) for score in found]

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            return [self._rolling(request.args[0]) for request in requests]

        def _rolling(self, text: str) -> float:
            """Each token once, after as much context as fits."""
            parts = windows.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            pairs = [windows.make_disjoint_window(part) for part in parts]
            return sum(score.log_likelihood for score in scorer.scores(pairs))

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            texts: list[str] = []
            for prompt, given in (request.args for request in requests):
                settings, until = generation_of(given, scorer)
                texts += scorer.continued([prompt], settings, until=until, first_index=len(texts))
            return texts

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            text: str = scorer.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )  # fmt: skip
            return text

    return HarnessModel()


def generation_of(given: dict[str, Any], scorer: Scorer) -> tuple[GenerationSettings, list[str]]:
    """The settings of `generation_kwargs` of a task, and its stop texts. Greedy unless it samples.

    Raises `UserError` for keys that are not known.
    """
    left = dict(given)
    until = left.pop("until", None) or []
    lengths = [left.pop(key) for key in _LENGTHS if key in left]
    settings = {key: left.pop(key) for key in _SETTINGS if key in left}
    if left:
        raise UserError(
            f"generation_kwargs of a task: {', '.join(sorted(left))}",
            rule=f"known are until, {', '.join((*_LENGTHS, *_SETTINGS))}",
            advice="Remove them from the task",
        )
    if not settings.get("temperature", 1.0):
        settings |= {"temperature": 1.0, "do_sample": False}
    end = scorer.tokenizer.eos_token_id
    chosen = GenerationSettings(
        **settings, max_new_tokens=int(lengths[0] if lengths else USUAL_NEW_TOKENS),
        eos_token_ids=() if end is None else (end,), pad_token_id=end or 0,
    )  # fmt: skip
    return chosen, [until] if isinstance(until, str) else list(until)


def _results(options: argparse.Namespace, files: Sequence[Path], scorer: Scorer) -> dict[str, Any]:
    evaluator: Any = importlib.import_module("lm_eval.evaluator")
    manager: Any = importlib.import_module("lm_eval.tasks").TaskManager(include_defaults=False)
    try:
        found: dict[str, Any] = evaluator.simple_evaluate(
            model=as_harness_model(scorer),
            tasks=[str(file.resolve()) for file in files],
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
            log_samples=False,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
        )
    except Exception as error:
        if _is_of_the_model(error):
            raise
        raise UserError(
            f"lm-eval: {type(error).__name__}: {error}", where=", ".join(map(str, files)),
            rule="a task names local data, fields of its records, and metrics that lm-eval knows",
            advice="Fix the task: "
            "https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/task_guide.md",
        ) from error  # fmt: skip
    return found


def _is_of_the_model(error: Exception) -> bool:
    """Whether an error was raised while the model computed, and not by the content of a task."""
    _, *inner = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).is_relative_to(_PACKAGE) for frame in inner)


def _table(results: dict[str, Any]) -> str:
    text: str = importlib.import_module("lm_eval.utils").make_table(results)
    return text.rstrip()


def _text(results: dict[str, Any]) -> str:
    kept = ("results", "groups", "versions", "n-shot", "higher_is_better", "n-samples", "configs")
    content = {key: results[key] for key in kept if key in results}
    return json.dumps(content, indent=2, sort_keys=True, default=str) + "\n"
