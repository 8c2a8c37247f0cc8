"""Token scores that are missing, damaged, or of something else."""

from __future__ import annotations

from pathlib import Path

from tests.faults.inputs.entry import BadInput, edit_json, score, train

CACHED = ("scores.source=cached", "scores.path=scores")


def cached(name: str, says: str, *changes: str, **more: object) -> BadInput:
    """A training that reads scores with something wrong."""
    return BadInput(name, train(*CACHED, *changes), says, **more)  # type: ignore[arg-type]


def _shard(folder: Path) -> Path:
    (shard,) = (folder / "scores" / "train").glob("scores-*")
    return shard


def _flip(folder: Path) -> None:
    content = bytearray(_shard(folder).read_bytes())
    content[-1] ^= 1
    _shard(folder).write_bytes(content)


def _cut(folder: Path) -> None:
    _shard(folder).write_bytes(_shard(folder).read_bytes()[:-100])


def _lose(folder: Path) -> None:
    _shard(folder).unlink()


def _another_pair(folder: Path) -> None:
    pairs = folder / "pairs.jsonl"
    pairs.write_text(pairs.read_text().replace('"tree"', '"free"'))


def _another_template(folder: Path) -> None:
    (folder / "t.jinja").write_text((folder / "hf" / "chat_template.jinja").read_text().replace("<|end|>", "<|end|> "))


ENTRIES = [
    BadInput("no folder for scores", train("scores.source=cached"), "?"),
    cached("scores that are not there", "?", "scores.path=nowhere"),
    cached("a run for scores", "?", "scores.path=run"),
    cached("scores of another length", "?", "data.max_length=48"),
    cached("scores of another pair", "?", make=_another_pair),
    cached("scores of another template", "?", "data.template=t.jinja", make=_another_template),
    cached("scores whose shard was altered", "?", make=_flip),
    cached("scores whose shard was cut", "?", make=_cut),
    cached("scores whose shard is gone", "?", make=_lose),
    cached("a manifest of scores that is no JSON", "?", files={"scores/train/manifest.json": "{"}),
    cached("a manifest of scores that is a number", "?", files={"scores/train/manifest.json": "7"}),
    cached("a manifest of scores nested 100,000 deep", "?", files={"scores/train/manifest.json": "[" * 100_000}),
    cached("scores of other weights", "?", make=edit_json("scores/train/manifest.json", reference="0" * 64)),
    cached("scores of another format", "?", make=edit_json("scores/train/manifest.json", format=99)),
    BadInput("scoring into the folder of a run", score("scores.path=run"), "?"),
    BadInput("scoring what no loss reads", score("loss.type=simpo", "loss.beta=null"), "?"),
]
