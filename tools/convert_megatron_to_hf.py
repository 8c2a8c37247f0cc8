"""Convert a Megatron checkpoint, converted or saved by a run, to a HuggingFace model folder."""

from pathlib import Path

from tgdpo_megatron.checkpoint.manifest import read_manifest
from tgdpo_megatron.errors import CommandLine, UserError, one_sentence_errors
from tgdpo_megatron.run_folder import checkpoint_of


def main() -> None:
    with one_sentence_errors():
        parser = CommandLine(prog="python -m tools.convert_megatron_to_hf", description=__doc__)
        parser.add_argument("megatron_folder", type=Path, help="checkpoint, or the folder of a run for its newest")
        parser.add_argument("hf_folder", type=Path, help="model folder to make")
        parser.add_argument(
            "--dtype", choices=("bf16", "fp32"), help="dtype of the converted weights; default: as stored"
        )
        parser.add_argument("--processes", type=int, default=1, help="how many processes share the work; default: 1")
        parsed = parser.parse_args()
        if parsed.processes < 1:
            raise UserError(f"--processes {parsed.processes}: at least one process has to work.")
        checkpoint = checkpoint_of(parsed.megatron_folder)
        read_manifest(checkpoint, with_index=False)
        from tgdpo_megatron.checkpoint.convert import megatron_to_hf  # imported here, since it loads torch and Megatron

        megatron_to_hf(checkpoint, parsed.hf_folder, dtype=parsed.dtype, processes=parsed.processes)
        print(parsed.hf_folder)


if __name__ == "__main__":
    main()
