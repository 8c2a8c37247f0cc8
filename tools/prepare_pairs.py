"""Tokenise pairs before a run. recipes.train and recipes.score take the resulting folder as data.train.

This is useful for large files, which several runs can then share. Prints how the data was read, what was dropped, and
how long prompts and responses are.
"""

from pathlib import Path
from typing import get_args

from recipes.settings import changed
from tgdpo_megatron.config import Config, DataConfig, FormatName
from tgdpo_megatron.data.prepare import Summary, few
from tgdpo_megatron.errors import CommandLine, one_sentence_errors

BAR = 16
"""Length of a histogram's longest bar, in characters."""


def report(summary: Summary) -> str:
    """Counts, dropped rows by reason, and the three histograms of token lengths, as text."""
    dropped = sum(map(len, summary.dropped.values()))
    lines = [
        f"{summary.source}: {summary.read_as()}",
        f"rows         {summary.rows:>8}",
        f"pairs kept   {summary.pairs:>8}",
        f"prompts cut  {summary.prompts_cut:>8}   to data.max_length={summary.max_length}, by {summary.truncation}",
        f"responses cut{summary.responses_cut:>8}",
        f"dropped      {dropped:>8}",
    ]
    lines += [f"{len(rows):>10}  {reason}: row {few(rows, 10)}" for reason, rows in summary.dropped.items()]
    return "\n".join([*lines, "", *_histograms(summary.lengths)])


def _histograms(lengths: dict[str, dict[str, int]]) -> list[str]:
    """Histograms side by side, with one line for each bin from the first to the last that is used."""
    bins = list(next(iter(lengths.values())))
    used = [place for place, name in enumerate(bins) if any(counts[name] for counts in lengths.values())]
    lines = ["tokens      " + "".join(f"  {name:<{BAR + 8}}" for name in lengths).rstrip()]
    for name in bins[used[0] : used[-1] + 1]:
        cells = [
            f"  {counts[name]:>7} {_bar(counts[name], max(counts.values())):<{BAR}}" for counts in lengths.values()
        ]
        lines.append(f"{name:<12}{''.join(cells)}".rstrip())
    return lines


def _bar(count: int, most: int) -> str:
    """A bar, which is never empty where something was counted."""
    return "#" * -(-BAR * count // most)


def main() -> None:
    with one_sentence_errors():
        parser = CommandLine(prog="python -m tools.prepare_pairs", description=__doc__)
        parser.add_argument("pairs", type=Path, help="pairs, in any form that data.train takes")
        parser.add_argument("checkpoint", type=Path, help="model whose tokenizer is used, as model.checkpoint")
        parser.add_argument("folder", type=Path, help="folder to make")
        parser.add_argument(
            "changes", nargs="*", metavar="data.key=value", help="settings, as recipes.train takes them"
        )
        parser.add_argument(
            "--max-length",
            type=int,
            default=DataConfig().max_length,
            help="longest sequence in tokens, as data.max_length (default: %(default)s)",
        )
        parser.add_argument(
            "--format",
            "--layout",
            choices=get_args(FormatName),
            help="format of the pairs, as data.format; default: recognised by the columns; --layout is the old name",
        )
        parsed = parser.parse_intermixed_args()
        settings = changed(Config(data=DataConfig(max_length=parsed.max_length, format=parsed.format)), parsed.changes)
        from tgdpo_megatron.checkpoint.manifest import read_manifest
        from tgdpo_megatron.checkpoint.sources import find
        from tgdpo_megatron.data.prepare import prepare_pairs
        from tgdpo_megatron.data.tokenizer import tokenizer_for
        from tgdpo_megatron.run_folder import check_writable

        source = find(parsed.checkpoint, needs="tokenizer")
        if source.is_converted:
            read_manifest(source.folder)
        check_writable(parsed.folder)
        tokenizer = tokenizer_for(source.config_folder, settings.data)
        pairs = prepare_pairs(settings.data, parsed.pairs, tokenizer, parsed.folder)
        print(report(pairs.summary))


if __name__ == "__main__":
    main()
