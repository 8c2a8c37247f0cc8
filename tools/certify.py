"""Compare a converted checkpoint with the HuggingFace model it came from, and write its certificate.

Conversion does so by itself. This program is for a checkpoint whose certificate was lost, or made by another version.
"""

from pathlib import Path

from tgdpo_megatron.checkpoint.manifest import read_manifest
from tgdpo_megatron.checkpoint.sources import find
from tgdpo_megatron.errors import CommandLine, one_sentence_errors
from tgdpo_megatron.hub import FORM


def main() -> None:
    with one_sentence_errors():
        parser = CommandLine(prog="python -m tools.certify", description=__doc__)
        parser.add_argument("hf_model", type=Path, help=f"folder with config.json and safetensors; or {FORM}")
        parser.add_argument("megatron_folder", type=Path, help="the checkpoint that was converted from it")
        parsed = parser.parse_args()
        read_manifest(parsed.megatron_folder, with_index=False)
        source = find(parsed.hf_model)
        from tgdpo_megatron.checkpoint.certify import certify  # imported here, since it loads torch and Megatron

        found = certify(source.folder, parsed.megatron_folder)
        print(f"{parsed.megatron_folder}: log-probs differ by at most {found.largest_difference:.1e} nats")


if __name__ == "__main__":
    main()
