"""What every entry starts from: pairs, a model in both forms, its scores of the pairs, a training of two steps, and a
reward model with answers to score.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import PAIRS
from tests.faults.inputs.entry import BadInput, score, train
from tests.faults.inputs.run import Programs, _environment
from tests.support.reward_models import answered, write_lines


def make_parts(folder: Path, programs: Programs) -> None:
    """Write them to a new folder."""
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron
    from tools.make_tiny_model import make_model, train_tokenizer

    folder.mkdir()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    tokenizer = train_tokenizer([text for row in PAIRS for text in row.values()] * 2, vocab_size=330)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 256}
    make_model(folder / "hf", tokenizer, **sizes)
    make_model(folder / "scorer", tokenizer, reward_model=True, **sizes)
    answers = [answered(row["instruction"], [row["chosen"], row["rejected"]]) for row in PAIRS]
    write_lines(folder / "answers.jsonl", answers)
    hf_to_megatron(folder / "hf", folder / "megatron")
    scratch = folder.with_name(f"{folder.name}-scratch")
    scratch.mkdir()
    environment = _environment(BadInput("", (), ""), "", scratch)
    for command in (score("scores.path=scores"), train("train.output=run", "train.save_interval=1")):
        code, out, err = programs.run(BadInput("", command, "", seconds=60), folder, environment)
        assert code == 0, out + err
