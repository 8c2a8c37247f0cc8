"""Tokenise a pairs file once, beforehand: recipes.train and recipes.score take the folder as data.train.

Worth it for large files, which several runs then share.
"""

from pathlib import Path

from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.errors import CommandLine, one_sentence_errors


def main() -> None:
    with one_sentence_errors():
        parser = CommandLine(prog="python -m tools.prepare_pairs", description=__doc__)
        parser.add_argument("pairs", type=Path, help=".json, .jsonl or .parquet with prompt, chosen, rejected")
        parser.add_argument("checkpoint", type=Path, help="Megatron checkpoint whose tokenizer is used")
        parser.add_argument("folder", type=Path, help="folder to make")
        parser.add_argument(
            "--max-length", type=int, default=DataConfig().max_length, help="tokens, as data.max_length"
        )
        parsed = parser.parse_args()
        from tgdpo_megatron.checkpoint.manifest import HF, read_manifest
        from tgdpo_megatron.data.prepare import prepare_pairs
        from tgdpo_megatron.data.tokenizer import load_tokenizer
        from tgdpo_megatron.run_folder import check_writable

        read_manifest(parsed.checkpoint)
        check_writable(parsed.folder)
        settings = DataConfig(max_length=parsed.max_length)
        pairs = prepare_pairs(settings, parsed.pairs, load_tokenizer(parsed.checkpoint / HF), parsed.folder)
        print(pairs.summary.sentences())


if __name__ == "__main__":
    main()
