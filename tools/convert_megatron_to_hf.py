"""Convert a Megatron checkpoint to a HuggingFace model folder.

The checkpoint is one of this project's, converted or saved by a run; or one of Megatron-Bridge, Megatron-LM or NeMo 2,
in the form torch_dist. For these --like names the HuggingFace model that the checkpoint was made from.
"""

from pathlib import Path

from tgdpo_megatron.checkpoint.foreign.folder import find_foreign
from tgdpo_megatron.checkpoint.manifest import read_manifest
from tgdpo_megatron.checkpoint.sources import find
from tgdpo_megatron.errors import CommandLine, UserError, one_sentence_errors
from tgdpo_megatron.hub import FORM
from tgdpo_megatron.run_folder import checkpoint_of


def main() -> None:
    with one_sentence_errors():
        parser = CommandLine(prog="python -m tools.convert_megatron_to_hf", description=__doc__)
        parser.add_argument("megatron_folder", type=Path, help="checkpoint, or the folder of a run for its newest")
        parser.add_argument("hf_folder", type=Path, help="model folder to make")
        parser.add_argument(
            "--like",
            type=Path,
            metavar="HF_MODEL",
            help=f"for a checkpoint of another program: folder with config.json and the tokenizer, or {FORM}",
        )
        parser.add_argument(
            "--dtype", choices=("bf16", "fp32"), help="dtype of the converted weights; default: as stored"
        )
        parser.add_argument("--processes", type=int, default=1, help="how many processes share the work; default: 1")
        parsed = parser.parse_args()
        if parsed.processes < 1:
            raise UserError(f"--processes {parsed.processes}: at least one process has to work.")
        options = {"dtype": parsed.dtype, "processes": parsed.processes}
        checkpoint = checkpoint_of(parsed.megatron_folder)
        foreign = None if (checkpoint / "manifest.json").is_file() else find_foreign(checkpoint)
        if foreign is not None:
            like = find(parsed.like, needs="tokenizer").folder if parsed.like else None
            from tgdpo_megatron.checkpoint.foreign.reading import foreign_to_hf  # imported here, since it loads torch

            foreign_to_hf(foreign, parsed.hf_folder, like, **options)
        else:
            read_manifest(checkpoint, with_index=False)
            if parsed.like is not None:
                raise UserError(f"--like {parsed.like}: {checkpoint} has a config.json of its own; leave --like out.")
            from tgdpo_megatron.checkpoint.convert import megatron_to_hf  # it loads torch, too

            megatron_to_hf(checkpoint, parsed.hf_folder, **options)
        print(parsed.hf_folder)


if __name__ == "__main__":
    main()
