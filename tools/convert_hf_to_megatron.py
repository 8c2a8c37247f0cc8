"""Convert a HuggingFace model (a folder, or a name on a hub) to a Megatron checkpoint that loads at any layout.

A checkpoint of Megatron-Bridge, Megatron-LM or NeMo 2 is taken as well, with --like; a HuggingFace folder of it lies
beside the target for as long as the work takes.

Then both models score the same tokens on the CPU, and the result is kept as the checkpoint's certificate.
"""

from argparse import Namespace
from pathlib import Path

from tgdpo_megatron.checkpoint.foreign.folder import find_foreign
from tgdpo_megatron.checkpoint.sources import find
from tgdpo_megatron.errors import CommandLine, UserError, one_sentence_errors
from tgdpo_megatron.hub import FORM


def main() -> None:
    with one_sentence_errors():
        parser = CommandLine(prog="python -m tools.convert_hf_to_megatron", description=__doc__)
        parser.add_argument("hf_model", type=Path, help=f"folder with config.json, safetensors, tokenizer; or {FORM}")
        parser.add_argument("megatron_folder", type=Path, help="checkpoint folder to make")
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
        parser.add_argument(
            "--no-certificate",
            action="store_true",
            help="do not compare the two models; programs then refuse the checkpoint unless told otherwise",
        )
        parsed = parser.parse_args()
        if parsed.processes < 1:
            raise UserError(f"--processes {parsed.processes}: at least one process has to work.")
        options = {
            "dtype": parsed.dtype,
            "processes": parsed.processes,
            "certificate": not parsed.no_certificate,
        }
        is_hf = (parsed.hf_model / "config.json").is_file()
        if not is_hf and (foreign := find_foreign(parsed.hf_model)):
            like = find(parsed.like, needs="tokenizer").folder if parsed.like else None
            from tgdpo_megatron.checkpoint.foreign.reading import foreign_to_megatron  # imported here: it loads torch

            manifest = foreign_to_megatron(foreign, parsed.megatron_folder, like, **options)
        else:
            source = find(parsed.hf_model)
            if parsed.like is not None:
                raise UserError(f"--like {parsed.like}: {source.folder} has a config.json; leave --like out.")
            from tgdpo_megatron.checkpoint.convert import hf_to_megatron  # it loads torch, too

            manifest = hf_to_megatron(source.folder, parsed.megatron_folder, **options)
        print(f"{parsed.megatron_folder}: weights {manifest.weights[:12]}, {manifest.dtype}; {_proof(parsed)}")


def _proof(parsed: Namespace) -> str:
    from tgdpo_megatron.checkpoint.certificate import read_certificate

    if parsed.no_certificate:
        return "not compared with HuggingFace's model"
    found = read_certificate(parsed.megatron_folder)
    return f"log-probs differ from HuggingFace's by at most {found.largest_difference:.1e} nats"


if __name__ == "__main__":
    main()
