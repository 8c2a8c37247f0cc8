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
    BadInput(
        "no folder for scores",
        train("scores.source=cached"),
        "scores.path is not set; give the folder python -m recipes.score wrote.",
    ),
    cached(
        "scores that are not there",
        "nowhere/train: no token scores there; write them with python -m recipes.score.",
        "scores.path=nowhere",
    ),
    cached(
        "a run for scores",
        "run/train: no token scores there; write them with python -m recipes.score.",
        "scores.path=run",
    ),
    cached(
        "scores of another length",
        "scores/train: these scores were made with another data.max_length (64, this run has 48); score "
        "again with this run's settings, into another folder.",
        "data.max_length=48",
        late=True,
    ),
    cached(
        "scores of another pair",
        "scores/train: no reference scores for row 5 of pairs.jsonl; run python -m recipes.score again, "
        "which adds what is missing.",
        make=_another_pair,
        late=True,
    ),
    cached(
        "scores of another template",
        "scores/train: these scores were made with another chat template (*, this run has "
        "*); score again with this run's settings, into another folder.",
        "data.template=t.jinja",
        make=_another_template,
        late=True,
    ),
    cached(
        "scores whose shard was altered",
        "scores/train/scores-*.safetensors: was altered or damaged since it was written (its checksum "
        "differs); delete the file and run python -m recipes.score again, which computes only the scores "
        "that it held.",
        make=_flip,
        late=True,
    ),
    cached(
        "scores whose shard was cut",
        "scores/train/scores-*.safetensors: was altered or damaged since it was written (its checksum "
        "differs); delete the file and run python -m recipes.score again, which computes only the scores "
        "that it held.",
        make=_cut,
        late=True,
    ),
    cached(
        "scores whose shard is gone",
        "scores/train: no reference scores for row 1 of pairs.jsonl; run python -m recipes.score again, "
        "which adds what is missing.",
        make=_lose,
        late=True,
    ),
    cached(
        "a manifest of scores that is no JSON",
        "scores/train/manifest.json line 1: not valid JSON (Expecting property name enclosed in double quotes).",
        files={"scores/train/manifest.json": "{"},
    ),
    cached(
        "a manifest of scores that is a number",
        "scores/train/manifest.json: not a manifest of token scores; score again into another folder.",
        files={"scores/train/manifest.json": "7"},
    ),
    cached(
        "a manifest of scores nested 100,000 deep",
        "scores/train/manifest.json: lists or mappings are nested more than 100 deep.",
        files={"scores/train/manifest.json": "[" * 100_000},
    ),
    cached(
        "scores of other weights",
        "scores/train: these scores were made with other weights of the reference (000000000000, this "
        "run has *); score again with this run's settings, into another folder.",
        make=edit_json("scores/train/manifest.json", reference="0" * 64),
        late=True,
    ),
    cached(
        "scores of another format",
        "scores/train: the token scores have format 99, but this version reads format 2; score again "
        "into another folder.",
        make=edit_json("scores/train/manifest.json", format=99),
    ),
    BadInput(
        "scoring into the folder of a run",
        score("scores.path=run"),
        "run: is a training run, not a folder of scores; choose another scores.path.",
    ),
    BadInput(
        "scoring what no loss reads",
        score("loss.type=simpo", "loss.beta=null"),
        "loss.type=simpo needs no scores of frozen models; there is nothing to compute.",
    ),
]
