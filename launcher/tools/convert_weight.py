"""Convert Hugging Face weights to weights under the names of MindFormers' models, or back.

    python -m launcher.tools.convert_weight --model qwen2_5 --input_path hf --output_path ms
    python -m launcher.tools.convert_weight --model qwen2_5 --reversed --input_path ms.ckpt \\
        --config hf/config.json --output_path hf_again --dtype bf16

Argument names are those of MindFormers' command. Sizes come from config.json beside the weights, or
from `--config`: another config.json, or the YAML file of the run. An output path that ends in
`.safetensors` or `.ckpt` becomes a single file, any other a folder of complete weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import EXIT_OK, UserError
from launcher.report.console import Console
from launcher.tools.command import Parser, answer, orders_in, progress, truth


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = Parser("convert_weight", "Convert Hugging Face weights to names of MindFormers.")
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="llama, qwen2_5, glm4, qwen3, ...")
    add("--input_path", type=Path, required=True, metavar="PATH", help="weights to convert")
    add("--output_path", type=Path, required=True, metavar="PATH",
        help="a new folder, or a file ending in .safetensors or .ckpt")  # fmt: skip
    add("--reversed", action="store_true", help="from MindFormers to Hugging Face")
    add("--dtype", choices=("fp32", "bf16", "fp16", "float32", "bfloat16", "float16"),
        help="cast the weights (default: unchanged)")  # fmt: skip
    add("--config", "--config_path", type=Path, metavar="PATH", dest="config",
        help="config.json or YAML of the model (default: beside the weights)")  # fmt: skip
    add("--naming", choices=("legacy", "mcore", "mcore_1.6"),
        help="default: mcore for qwen3, qwen3_moe and deepseekv3, else legacy")  # fmt: skip
    add("--qkv_concat", type=truth, metavar="True|False",
        help="write fused projections under legacy names (False)")  # fmt: skip
    parser.add_orders()
    add("--is_lora", type=truth, default=False, metavar="False", help="adapters are not converted")
    add("--telechat_type", metavar="NAME", help="no effect: sizes are those of config.json")
    add("--file_suffix", metavar="E_S", help="the save, where rank folders hold several")
    parser.add_strategies()
    parser.add_threads()
    add("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake of the user."""
    return answer(lambda console: _convert(parse(arguments), console))


def _convert(options: argparse.Namespace, console: Console) -> int:
    from launcher.weights.offline.renaming import Conversion, convert_weight

    if options.is_lora:
        raise UserError(
            "--is_lora True",
            where="command line",
            rule="adapters have no names here",
            advice="Merge the adapter into its base model first",
        )
    chosen = {"naming": options.naming, "qkv_concat": options.qkv_concat, **orders_in(options)}
    conversion = Conversion(
        model=options.model, reversed=options.reversed, dtype=options.dtype,
        config=options.config, strategy=options.src_strategy_dirs, suffix=options.file_suffix,
        options=chosen,
    )  # fmt: skip
    exported = convert_weight(
        options.input_path, options.output_path, conversion,
        overwrite=options.overwrite, workers=options.max_process_num,
        progress=progress(console, "converted"), log=console.log,
    )  # fmt: skip
    files = len(exported.files)
    console.log(
        f"{options.output_path}: {exported.tensors} tensors in {files} file{'s' * (files != 1)}"
    )
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
