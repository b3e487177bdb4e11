"""Tasks of lm-eval on local files: scores against transformers, and results against lm-eval's own
model on the exported directory (where lm-eval is installed)."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.errors import UserError
from launcher.generation.forward import Forward
from launcher.generation.settings import GenerationSettings
from launcher.predict.scoring import Scorer, cut
from launcher.tools.export import main as export
from launcher.tools.lm_eval import check_tasks, main, task_files
from tests.models.tiny import dense_spec, pair
from tests.ranks import run_job
from tests.workshop import Workshop

TASKS = {
    "next.yaml": """
        task: next_number
        output_type: multiple_choice
        fewshot_split: test
        doc_to_text: "After {{n}} comes"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{label}}"
        metric_list: [{metric: acc}, {metric: acc_norm}]
        """,
    "rolling.yaml": """
        task: rolling
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
        """,
    "continued.yaml": """
        task: continued
        output_type: generate_until
        doc_to_text: "def f{{n}}("
        doc_to_target: "{{text}}"
        generation_kwargs: {until: ["zz", "e"], max_gen_toks: 9, do_sample: false}
        metric_list: [{metric: exact_match}]
        """,
}
DATA = "test_split: test\ndataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\n"


def write_tasks(folder: Path) -> Path:
    folder.mkdir()
    rows = [
        {"n": n, "choices": [str(n + 1), f" {n + 7}", "def heapq", " the end of it"],
         "label": n % 4, "text": f"def f{n}(x): " + " ".join(str(n * k) for k in range(n * 6))}
        for n in range(16)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        common = DATA % (folder / "rows.jsonl")
        (folder / name).write_text(textwrap.dedent(text).lstrip() + common)
    (folder / "part.yaml").write_text("test_split: test\n")
    return folder


class Letters:
    """A tokenizer of single characters."""

    bos_token_id, eos_token_id = None, 1

    def encode(self, text: str) -> list[int]:
        return [2 + ord(letter) % 90 for letter in text]

    def decode(self, tokens: Any, **_: Any) -> str:
        found = [tokens] if isinstance(tokens, int) else tokens
        return "".join("" if token == 1 else chr(token) for token in found)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    native, _ = pair(dense_spec(type="LlamaConfig"))
    return Scorer(forward=Forward(native), tokenizer=Letters(), device="cpu", max_length=20,
                  batch_size=3)  # fmt: skip


def test_scores_are_those_of_each_row_alone(scorer: Scorer) -> None:
    pairs = [([3, 4, 5], [6]), ([3], [7, 8, 9]), (list(range(2, 30)), [5, 6]), ([9] * 18, [4] * 4)]
    found = scorer.scores(pairs)
    for (context, answer), score in zip(pairs, found, strict=True):
        ids = (context + answer)[-21:]
        with torch.no_grad():
            logs = scorer.model(torch.tensor([ids[:-1]])).log_softmax(-1)[0, -len(answer) :]
        expected = logs[range(len(answer)), answer].sum().item()
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert score.is_greedy == (logs.argmax(-1).tolist() == answer)
    likeliest = scorer.model(torch.tensor([[3, 4]]))[0, -1].argmax().item()
    assert scorer.scores([([3, 4], [likeliest])])[0].is_greedy


def test_an_answer_longer_than_the_model_is_an_error(scorer: Scorer) -> None:
    with pytest.raises(UserError, match="21 tokens"):
        scorer.scores([([1], [5] * 21)])


def test_texts_end_before_the_first_stop(scorer: Scorer) -> None:
    settings = GenerationSettings(max_new_tokens=6)
    whole = scorer.continued(["abc"], settings)[0]
    assert len(whole) == 6
    stop = whole[3]
    assert scorer.continued(["abc"], settings, until=[stop])[0] == whole[: whole.index(stop)]
    both = scorer.continued(["abc", "xyz" * 9], settings, until=[stop])
    assert both[0] == whole[: whole.index(stop)]
    assert cut("one two", ["wo", " "]) == "one"
    assert cut("one", ["x", ""]) == "one"


def test_folders_of_tasks_and_code_in_them(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    files = task_files([folder])
    assert [file.name for file in files] == ["continued.yaml", "next.yaml", "rolling.yaml"]
    check_tasks(files, trusted=False)
    (folder / "part.yaml").write_text("doc_to_text: !function code.question\n")
    (folder / "next.yaml").write_text("include: part.yaml\ntask: x\n")
    with pytest.raises(UserError, match=r"part\.yaml:1: .*!function.*--trust_task_code"):
        check_tasks(files, trusted=False)
    check_tasks(files, trusted=True)
    for wrong in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match="--tasks"):
            task_files([wrong / "none.yaml"])


@pytest.fixture(scope="module")
def trained(materials: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    pytest.importorskip("lm_eval")
    workshop = materials.copy_to(tmp_path_factory.mktemp("lm_eval"))
    name = workshop.yaml(callbacks=[])
    assert run_job(["--config", name, "--run_mode", "train"], workshop.folder).code == 0
    source, target = workshop.folder / "output/checkpoint", workshop.folder / "hf"
    assert export(["--load_checkpoint", str(source), "--output_dir", str(target)]) == 0
    write_tasks(workshop.folder / "tasks")
    return workshop


def own_results(workshop: Workshop, source: str, *more: str) -> dict[str, Any]:
    place = workshop.folder / f"{source.replace('/', '_')}.json"
    code = main(["--load_checkpoint", str(workshop.folder / source), "--tasks",
                 str(workshop.folder / "tasks"), "--output_path", str(place), *more])  # fmt: skip
    assert code == 0
    return json.loads(place.read_text())["results"]


def results_of_lm_eval(workshop: Workshop, few: int | None) -> dict[str, Any]:
    evaluator = pytest.importorskip("lm_eval.evaluator")
    tasks = pytest.importorskip("lm_eval.tasks")
    found = evaluator.simple_evaluate(
        model="hf", model_args={"pretrained": str(workshop.folder / "hf"), "dtype": "float32"},
        tasks=[str(file) for file in task_files([workshop.folder / "tasks"])], batch_size=8,
        task_manager=tasks.TaskManager(include_defaults=False), device="cpu", num_fewshot=few,
        random_seed=1, numpy_random_seed=1, torch_random_seed=1, fewshot_random_seed=1,
    )  # fmt: skip
    return found["results"]


def numbers(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {metric}": value
        for task, metrics in results.items() for metric, value in metrics.items()
        if isinstance(value, int | float)
    }  # fmt: skip


@pytest.mark.parametrize("few", [None, 2])
def test_results_equal_those_of_lm_eval_on_the_exported_directory(
    trained: Workshop, few: int | None
) -> None:
    more = [] if few is None else ["--num_fewshot", str(few)]
    expected = numbers(results_of_lm_eval(trained, few))
    assert len(expected) >= 5
    for source in ("output/checkpoint", "hf"):
        assert numbers(own_results(trained, source, *more)) == pytest.approx(expected, rel=1e-5)


def test_without_lm_eval_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folder = write_tasks(tmp_path / "tasks")
    assert main(["--load_checkpoint", "x", "--tasks", str(folder)]) == 2
    assert "slipway[lm-eval]" in capsys.readouterr().err
