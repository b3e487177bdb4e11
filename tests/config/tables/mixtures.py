"""Lists of data loaders."""

from __future__ import annotations

from tests.config.tables import TRAIN, Error, Row

ONE = "  data_loader:\n    type: TextDataLoader\n    dataset_dir: corpus\n"
KEY = "train_dataset.data_loader"


def mixture(*entries: str) -> dict[str, str]:
    """The right configuration with a list; every entry is lines of `key: value`."""
    lines = ["  data_loader:"]
    for entry in entries:
        first, *rest = entry.splitlines()
        lines += [f"  - {first}", *(f"    {line}" for line in rest)]
    return {ONE: "\n".join(lines) + "\n"}


A, B = "dataset_dir: corpus\nname: a", "dataset_dir: corpus\nname: b"

TABLE = (
    Row(
        name="a list in a list of data loaders",
        replace=mixture("- dataset_dir: corpus", B),
        errors=(Error(f"{KEY}.0 = ", at="- - dataset_dir"),),
    ),
    Row(
        name="an unknown key of a source",
        replace=mixture(A + "\nwieght: 1", B),
        errors=(Error(f"`{KEY}.0.wieght`", at="wieght", near=f"{KEY}.0.weight"),),
    ),
    Row(
        name="a weight and epochs of one source",
        replace=mixture(A + "\nweight: 1\nepochs: 2", B + "\nweight: 1"),
        errors=(Error(f"{KEY}.0.epochs = 2.0", at="epochs: 2"),),
    ),
    Row(
        name="numbers of sources out of range",
        replace=mixture(A + "\nweight: .inf", B + "\nepochs: .nan", A + "2\nweight: 0"),
        errors=(
            Error(f"{KEY}.0.weight = inf", at=".inf"),
            Error(f"{KEY}.1.epochs = nan", at=".nan"),
            Error(f"{KEY}.2.weight = 0", at="weight: 0"),
        ),
    ),
    Row(
        name="weights that leave nothing for a source",
        replace=mixture(A + "\nweight: 0.5", A + "2\nweight: 0.7", B),
        errors=(Error(f"{KEY}.1.weight = 0.7", at="weight: 0.7", near=f"{KEY}.1.weight: 0.25"),),
    ),
    Row(
        name="sources of one name",
        replace=mixture(
            A, B, "dataset_dir: ./corpus\nname:  a", "dataset_dir: corpus", "dataset_dir: corpus/"
        ),
        errors=(
            Error(f"{KEY}.2.name = 'a'", at="name:  a", near="a-2"),
            Error(f"{KEY}.4.name = 'corpus'", at="dataset_dir: corpus/", near="corpus-2"),
        ),
    ),
    Row(
        name="a name that is no part of a key",
        replace=mixture("dataset_dir: corpus\nname: a/b", B),
        errors=(Error(f"{KEY}.0.name = 'a/b'", at="name: a/b"),),
    ),
    Row(
        name="weights where every row is read once",
        add=(
            "do_eval: True\neval_dataset:\n  data_loader:\n"
            "  - {dataset_dir: corpus, name: a, weight: 2}\n"
            "  - {dataset_dir: corpus, name: b, epochs: 2}\n"
        ),
        errors=(
            Error("eval_dataset.data_loader.0.weight = 2.0", at="weight: 2"),
            Error("eval_dataset.data_loader.1.epochs = 2.0", at="epochs: 2}"),
        ),
    ),
    Row(
        name="a missing path and a wrong argument in a list",
        replace=mixture("dataset_dir: corpsu", B + "\ntext_column: body"),
        errors=(
            Error(f"{KEY}.0.dataset_dir = 'corpsu'", at="corpsu", near="corpus"),
            Error(f"{KEY}.1.text_column = 'body'", at="body", near="HFDataLoader"),
        ),
    ),
    Row(
        name="--train_dataset_dir with a list",
        replace=mixture(A, B),
        argv=(*TRAIN, "--train_dataset_dir", "corpus"),
        errors=(Error(f"`{KEY}.dataset_dir`", place="command line: --train_dataset_dir"),),
    ),
    Row(
        name="an entry for what is no list",
        argv=(*TRAIN, f"+{KEY}={{dataset_dir: corpus}}"),
        errors=(Error(f"`{KEY}`", place=f"command line: +{KEY}={{dataset_dir: corpus}}"),),
    ),
    Row(
        name="sources of MindFormers one after another",
        replace={
            ONE: "  data_loader:\n    type: MultiSourceDataLoader\n    shuffle: infile\n"
            "    load_indices_npz_path: x.npz\n    nums_per_dataset: [1]\n    sub_data_loader:\n"
            "    - {type: TextDataLoader, dataset_dir: corpus}\n"
            "    - {type: TextDataLoader, dataset_dir: other}\n"
        },
        errors=(
            Error(f"{KEY}.shuffle = 'infile'", at="shuffle: infile", near="files"),
            Error(f"{KEY}.load_indices_npz_path = 'x.npz'", at="x.npz"),
            Error(f"{KEY}.nums_per_dataset = [1]", at="nums_per_dataset"),
        ),
    ),
)
