"""Convert a HuggingFace model to a checkpoint that Megatron-Bridge and Megatron-LM load as a start.

The model is a folder, such as one that tools.convert_megatron_to_hf or recipes.align wrote, or a name on a hub.
"""

from pathlib import Path

from tgdpo_megatron.checkpoint.sources import find
from tgdpo_megatron.errors import CommandLine, UserError, one_sentence_errors
from tgdpo_megatron.hub import FORM


def main() -> None:
    with one_sentence_errors():
        parser = CommandLine(prog="python -m tools.convert_hf_to_bridge", description=__doc__)
        parser.add_argument("hf_model", type=Path, help=f"folder with config.json, safetensors, tokenizer; or {FORM}")
        parser.add_argument("bridge_folder", type=Path, help="checkpoint folder to make")
        parser.add_argument(
            "--dtype", choices=("bf16", "fp32"), help="dtype of the converted weights; default: as stored"
        )
        parser.add_argument("--processes", type=int, default=1, help="how many processes share the work; default: 1")
        parsed = parser.parse_args()
        if parsed.processes < 1:
            raise UserError(f"--processes {parsed.processes}: at least one process has to work.")
        source = find(parsed.hf_model)
        from tgdpo_megatron.checkpoint.foreign.writing import hf_to_bridge  # imported here, since it loads torch

        hf_to_bridge(source.folder, parsed.bridge_folder, dtype=parsed.dtype, processes=parsed.processes)
        print(parsed.bridge_folder)


if __name__ == "__main__":
    main()
