"""Missing inputs, files that cannot be read, and wrong command lines."""

from __future__ import annotations

from tests.config.tables import TRAIN, Error, Row

TABLE = (
    # what a mode needs, and paths
    Row(name="no mode", argv=(), errors=(Error("run_mode"),)),
    Row(
        name="finetune without weights",
        argv=(
            "--run_mode",
            "finetune",
        ),
        errors=(Error("finetune"),),
    ),
    Row(
        name="finetune from a folder without weights",
        argv=(
            "--run_mode",
            "finetune",
            "--pretrained_model_dir",
            "no_weights",
        ),
        errors=(Error("finetune"),),
    ),
    Row(
        name="predict without prompts",
        argv=(
            "--run_mode",
            "predict",
        ),
        errors=(Error("input_data"),),
    ),
    Row(
        name="eval without data",
        argv=(
            "--run_mode",
            "eval",
        ),
        errors=(Error("eval_dataset"),),
    ),
    Row(
        name="a missing path with a similar one beside it",
        replace={"dataset_dir: corpus": "dataset_dir: corpsu"},
        errors=(
            Error("train_dataset.data_loader.dataset_dir = 'corpsu'", at="corpsu", near="corpus"),
        ),
    ),
    Row(
        name="a glob that matches nothing",
        replace={"dataset_dir: corpus": "dataset_dir: corpus/*.md"},
        errors=(Error("train_dataset.data_loader.dataset_dir = 'corpus/*.md'", at="corpus"),),
    ),
    Row(
        name="many missing paths at once",
        replace={"pretrained_model_dir: tokenizer": "pretrained_model_dir: tokeniser"},
        add=("load_checkpoint: nowhere\nregister_path: no.py\npretrained_model_dir: qwem\n"),
        errors=(
            Error(
                "processor.tokenizer.pretrained_model_dir = 'tokeniser'",
                at="tokeniser",
                near="tokenizer",
            ),
            Error("pretrained_model_dir = 'qwem'", at="qwem", near="qwen"),
            Error("register_path = 'no.py'", at="no.py"),
            Error("load_checkpoint = 'nowhere'", at="nowhere"),
        ),
    ),
    Row(
        name="no tokenizer",
        replace={"    pretrained_model_dir: tokenizer": "    type: LlamaTokenizer"},
        errors=(Error("tokenizer", at="tokenizer:"),),
    ),
    Row(
        name="a tokenizer folder without one",
        replace={"pretrained_model_dir: tokenizer": "pretrained_model_dir: corpus"},
        errors=(
            Error("processor.tokenizer.pretrained_model_dir = 'corpus'", at="pretrained_model_dir"),
        ),
    ),
    Row(
        name="a broken config.json",
        add="pretrained_model_dir: broken\n",
        errors=(Error("JSON", place="broken/config.json:2"),),
    ),
    Row(
        name="a model without a type",
        replace={"    type: Qwen3Config\n": ""},
        errors=(Error("model.model_config", at="model_config"),),
    ),
    Row(
        name="weights to reshard that are not there",
        add="auto_trans_ckpt: True\n",
        errors=(Error("auto_trans_ckpt = True", at="auto_trans"),),
    ),
    Row(
        name="a folder without weights",
        add="load_checkpoint: corpus\n",
        errors=(Error("load_checkpoint = 'corpus'", at="load_checkpoint"),),
    ),
    # YAML
    Row(name="a tab", replace={"  epochs: 2": "\tepochs: 2"}, errors=(Error("YAML", at="epochs"),)),
    Row(
        name="a key twice",
        replace={"  epochs: 2": "  epochs: 2\n  epochs: 3"},
        errors=(Error("epochs", at="epochs: 3"),),
    ),
    Row(
        name="an unknown anchor", replace={"*train": "*trian"}, errors=(Error("YAML", at="*trian"),)
    ),
    Row(
        name="code in YAML",
        add="save_file: !!python/object/apply:os.getcwd []\n",
        errors=(Error("!!python/object/apply:os.getcwd", at="save_file"),),
    ),
    Row(
        name="a missing base_config",
        add="base_config: nowhere.yaml\n",
        errors=(Error("base_config = 'nowhere.yaml'", at="base_config"),),
    ),
    Row(
        name="a base_config that is its own base",
        add="base_config: wrong.yaml\n",
        errors=(Error("base_config = 'wrong.yaml'", at="base_config"),),
    ),
    # command line
    Row(
        name="a misspelt flag",
        argv=(*TRAIN, "--epohcs", "3"),
        errors=(Error("--epohcs", place="command line", near="--epochs"),),
    ),
    Row(
        name="a flag of another launcher",
        argv=(*TRAIN, "--num_train_epochs", "3"),
        errors=(Error("--num_train_epochs", place="command line", near="--runner_config.epochs"),),
    ),
    Row(
        name="a key without its section",
        argv=(*TRAIN, "--dataset_strategy", "full_batch"),
        errors=(
            Error("--dataset_strategy", place="command line", near="--parallel.dataset_strategy"),
        ),
    ),
    Row(
        name="a misspelt dotted key",
        argv=(*TRAIN, "--optimizer.weight_deacy", "0.1"),
        errors=(
            Error(
                "optimizer.weight_deacy",
                place="command line: --optimizer.weight_deacy",
                near="optimizer.weight_decay",
            ),
        ),
    ),
    Row(
        name="a misspelt override",
        argv=(*TRAIN, "runner_config.epoch=3"),
        errors=(
            Error(
                "runner_config.epoch",
                place="command line: runner_config.epoch=3",
                near="runner_config.epochs",
            ),
        ),
    ),
    Row(
        name="a wrong boolean",
        argv=(*TRAIN, "--use_parallel", "1"),
        errors=(Error("--use_parallel", place="command line: --use_parallel"),),
    ),
    Row(
        name="a wrong number",
        argv=(*TRAIN, "--epochs", "many", "--batch_size=-1"),
        errors=(
            Error("runner_config.epochs = 'many'", place="command line: --epochs"),
            Error("runner_config.batch_size = -1", place="command line: --batch_size"),
        ),
    ),
    Row(
        name="a flag without a value",
        argv=(*TRAIN, "--seed"),
        errors=(Error("--seed", place="command line: --seed"),),
    ),
    Row(
        name="a stray word",
        argv=(*TRAIN, "other.yaml"),
        errors=(Error("other.yaml", place="command line"),),
    ),
    Row(
        name="an entry that a list does not have",
        argv=(*TRAIN, "callbacks.5.prefix=x"),
        errors=(Error("callbacks.5.prefix", place="command line: callbacks.5.prefix=x"),),
    ),
    Row(
        name="plus in a closed section",
        argv=(*TRAIN, "+optimizer.lr=0.1", "+runner_config.epochs=3"),
        errors=(
            Error(
                "optimizer.lr",
                place="command line: +optimizer.lr=0.1",
                near="optimizer.learning_rate",
            ),
            Error("+runner_config.epochs", place="command line: +runner_config.epochs=3"),
        ),
    ),
    Row(
        name="removing what is not there",
        argv=(*TRAIN, "~optimizer.eps"),
        errors=(Error("optimizer.eps", place="command line: ~optimizer.eps"),),
    ),
    Row(
        name="a sweep",
        argv=(*TRAIN, "seed=1,2"),
        errors=(Error("seed=1,2", place="command line: seed=1,2"),),
    ),
    Row(
        name="grammar that cannot be parsed",
        argv=(*TRAIN, "output_dir=a(b"),
        errors=(Error("output_dir=a(b", place="command line: output_dir=a(b"),),
    ),
    Row(
        name="a file that is not there",
        argv=(
            "--config",
            "wrnog.yaml",
            "--run_mode",
            "train",
        ),
        errors=(Error("wrnog.yaml", place="command line: --config", near="wrong.yaml"),),
    ),
    Row(
        name="a folder for a file",
        argv=(
            "--config",
            "corpus",
            "--run_mode",
            "train",
        ),
        errors=(Error("corpus", place="command line: --config"),),
    ),
    Row(
        name="everything at once, from every layer",
        replace={
            "weight_decay": "weigth_decay",
            "epochs: 2": "epochs: two",
            "dataset_dir: corpus": "dataset_dir: corpsu",
        },
        add="parallel_config: {data_parallel: 3}\n",
        argv=(*TRAIN, "--sed", "3", "lr_schedule.typ=x"),
        errors=(
            Error("runner_config.epochs = 'two'", at="epochs"),
            Error("optimizer.weigth_decay", at="weigth_decay", near="optimizer.weight_decay"),
            Error(
                "lr_schedule.typ", place="command line: lr_schedule.typ=x", near="lr_schedule.type"
            ),
            Error("--sed", place="command line", near="--seed"),
            Error("data_parallel 3 = 3 processes", at="parallel_config: {data_paralle", near="1"),
            Error(
                "train_dataset.data_loader.dataset_dir = 'corpsu'", at="dataset_dir", near="corpus"
            ),
        ),
    ),
)
