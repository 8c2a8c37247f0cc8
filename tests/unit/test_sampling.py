"""Answers by transformers: the right distribution, no neighbours, no hidden settings, the right end."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import PAIRS
from tests.parity.models import FAMILIES, make_model
from tgdpo_megatron.data.tokenizer import encode_prompt
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.sampling.engine import Answer, Engine, Request, Sampling, open_engine, prompt_id

GREEDY = Sampling(temperature=0, max_new_tokens=12)
PLAIN = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def engine(hf_model: Path) -> Engine:
    return open_engine(hf_model, batch_size=4)


@pytest.fixture
def changed_model(hf_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that copies the model with another generation_config.json."""

    def make(**settings: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(hf_model, folder)
        (folder / "generation_config.json").write_text(json.dumps(settings))
        return folder

    return make


def prompts(engine: Engine) -> list[tuple[int, ...]]:
    """Prompts of different lengths."""
    return [
        tuple(encode_prompt(engine.tokenizer, [{"role": "user", "content": row["instruction"]}])[1]) for row in PAIRS
    ]


def asked(ids: Sequence[tuple[int, ...]], settings: Sampling, n: int = 1, seed: int = 0) -> Iterator[Request]:
    return (Request(prompt, sample, seed, settings) for prompt in ids for sample in range(n))


def ids_of(answers: Iterator[Answer]) -> list[tuple[int, ...] | None]:
    return [answer.ids for answer in answers]


def probabilities(logits: Sequence[float], settings: Sampling, seen: set[int]) -> np.ndarray:
    """What a token is drawn with, by a plain loop in float64. [vocabulary]"""
    penalty = settings.repetition_penalty
    punished = [
        (value / penalty if value > 0 else value * penalty) if token in seen else value
        for token, value in enumerate(map(float, logits))
    ]
    scaled = [value / settings.temperature for value in punished]
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    kept = order[: settings.top_k or len(order)]
    weights = {token: math.exp(scaled[token] - scaled[order[0]]) for token in kept}
    total, before, nucleus = sum(weights.values()), 0.0, []
    for token in kept:  # the token with which the sum reaches top_p is kept
        if before < settings.top_p:
            nucleus.append(token)
        before += weights[token] / total
    found = np.zeros(len(scaled))
    for token in nucleus:
        found[token] = weights[token] / sum(weights[kept] for kept in nucleus)
    return found


def largest_chi_square(freedom: int) -> float:
    """The value that chi-square exceeds once in 10^5 draws, by Wilson and Hilferty."""
    return freedom * (1 - 2 / (9 * freedom) + 4.265 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(max_new_tokens=1),
        Sampling(temperature=0.5, max_new_tokens=1),
        Sampling(temperature=0.8, top_p=0.7, max_new_tokens=1),
        Sampling(temperature=2.0, top_k=7, max_new_tokens=1),
        Sampling(temperature=1.3, top_k=20, top_p=0.5, repetition_penalty=1.5, max_new_tokens=1),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_token_is_drawn_with_its_probability(settings: Sampling, hf_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    draws, engine = 4000, open_engine(hf_model, batch_size=500)
    (ids, *_) = prompts(engine)
    # Sharper than those of random weights, so that each filter has something to leave out.
    engine._model.lm_head.weight.data.mul_(4)  # type: ignore[attr-defined]
    model = AutoModelForCausalLM.from_pretrained(hf_model, dtype=torch.float64)
    model.lm_head.weight.data.mul_(4)
    expected = draws * probabilities(model(torch.tensor([ids])).logits[0, -1].tolist(), settings, set(ids))
    drawn = [answer[0] for answer in ids_of(engine.answers(asked([ids], settings, n=draws))) if answer]
    counts = np.bincount(drawn, minlength=len(expected)).astype(float)
    assert counts[expected == 0].sum() == 0
    often = expected >= 5  # the others are taken together
    cells = [(counts[often], expected[often]), (counts[~often].sum(), expected[~often].sum())]
    chi_square = float(((cells[0][0] - cells[0][1]) ** 2 / cells[0][1]).sum())
    if cells[1][1] > 0:
        chi_square += float((cells[1][0] - cells[1][1]) ** 2 / cells[1][1])
    assert chi_square < largest_chi_square(int(often.sum()))
    assert often.sum() >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_temperature_0_is_huggingfaces_greedy_search_for_every_family(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    """In batches with left padding, also past a sliding window, against one prompt at a time."""
    make_model(3, family, False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = open_engine(tmp_path, batch_size=3)
    random = np.random.default_rng(0)
    ids = [tuple(random.integers(6, 290, length).tolist()) for length in (3, 41, 12, 30, 5)]
    found = ids_of(engine.answers(asked(ids, GREEDY)))
    model = engine._model  # type: ignore[attr-defined]
    ends = sorted(engine._ends)  # type: ignore[attr-defined]
    for prompt, answer in zip(ids, found, strict=True):
        made = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=ends, pad_token_id=0
        )
        assert answer == tuple(made[0, len(prompt) :].tolist())


def test_a_repetition_penalty_is_huggingfaces_and_does_not_see_padding(engine: Engine) -> None:
    settings = replace(GREEDY, repetition_penalty=1.7)
    found = ids_of(engine.answers(asked(prompts(engine), settings)))
    model, ends = engine._model, sorted(engine._ends)  # type: ignore[attr-defined]
    for prompt, answer in zip(prompts(engine), found, strict=True):
        made = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            repetition_penalty=1.7,
            eos_token_id=ends,
            pad_token_id=0,
        )
        assert answer == tuple(made[0, len(prompt) :].tolist())


def test_a_row_is_padded_with_a_token_of_its_own_prompt() -> None:
    """Any other would be punished by a repetition penalty, which looks at all ids and not at the mask."""
    from tgdpo_megatron.sampling.transformers_engine import _left_padded

    given = [(5, 6), (7, 8, 9, 10), (3,)]
    ids, mask = _left_padded(given)
    for prompt, row, seen in zip(given, ids, mask.bool(), strict=True):
        assert set(row.tolist()) == set(prompt) and tuple(row[seen].tolist()) == prompt
        assert row[-1] == prompt[-1]


def test_an_answer_does_not_depend_on_its_neighbours(changed_model: Callable[..., Path]) -> None:
    """Many tokens end an answer here, so that batches shrink again and again."""
    folder = changed_model(eos_token_id=list(range(7, 330, 9)))
    engine = open_engine(folder, batch_size=4)
    ids = prompts(engine)
    together = ids_of(engine.answers(asked(ids, PLAIN, n=5)))
    alone = ids_of(open_engine(folder, batch_size=1).answers(asked(ids, PLAIN, n=5)))
    backwards = ids_of(engine.answers(reversed(list(asked(ids, PLAIN, n=5)))))
    assert together == alone == backwards[::-1]
    assert len({len(answer) for answer in together if answer}) > 5
    assert all(len(set(together[first : first + 5])) == 5 for first in range(0, len(together), 5))  # samples differ


def test_each_answer_has_the_settings_it_was_asked_with(engine: Engine) -> None:
    (ids, *_) = prompts(engine)
    other = replace(PLAIN, temperature=0.3, max_new_tokens=5)
    mixed = [Request(ids, sample, 0, settings) for sample in range(3) for settings in (PLAIN, other, GREEDY)]
    found = ids_of(engine.answers(mixed))
    for place, settings in enumerate((PLAIN, other, GREEDY)):
        assert found[place::3] == ids_of(engine.answers(asked([ids], settings, n=3)))


def test_seeds_differ_by_run_prompt_and_sample_and_by_nothing_else() -> None:
    seeds = {
        Request(ids, sample, seed, settings).own_seed
        for ids in ((1, 2), (1, 3), (1,))
        for sample in range(5)
        for seed in range(4)
        for settings in (GREEDY, PLAIN)
    }
    assert len(seeds) == 3 * 5 * 4
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_prompts_id_is_a_hash_of_its_token_ids() -> None:
    import hashlib

    expected = hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in (1, 128000))).hexdigest()
    assert prompt_id((1, 128000)) == prompt_id(np.array([1, 128000], dtype=np.int64)) == expected


def test_the_models_own_settings_of_generation_change_nothing(
    engine: Engine, changed_model: Callable[..., Path]
) -> None:
    """All of these would change what transformers' generate gives."""
    folder = changed_model(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=12,
        max_length=3,
        suppress_tokens=list(range(100)),
        begin_suppress_tokens=[101],
        num_beams=2,
    )
    other = open_engine(folder, batch_size=4)
    ids = prompts(engine)
    assert ids_of(other.answers(asked(ids, PLAIN, n=2))) == ids_of(engine.answers(asked(ids, PLAIN, n=2)))


def test_every_end_that_the_model_names_ends_an_answer(engine: Engine, changed_model: Callable[..., Path]) -> None:
    ids = prompts(engine)
    (whole,) = ids_of(engine.answers(asked(ids[:1], PLAIN)))
    assert whole is not None and len(whole) == 12
    other = open_engine(changed_model(eos_token_id=[whole[4], 320]), batch_size=4)
    (answer,) = other.answers(asked(ids[:1], PLAIN))
    assert answer.ids == whole[: whole.index(whole[4]) + 1] and answer.finish_reason == "stop"
    assert engine.tokenizer.eos_token_id in other._ends  # type: ignore[attr-defined]


def test_an_answer_ends_at_the_models_last_position_unfinished(engine: Engine) -> None:
    long = (7,) * (engine.max_length - 3)
    (answer,) = engine.answers([Request(long, 0, 0, PLAIN)])
    assert answer.num_tokens <= 3 and (answer.finish_reason == "length" or answer.num_tokens < 3)
    with pytest.raises(UserError, match="256 tokens, and the model takes 256"):
        list(engine.answers([Request((7,) * engine.max_length, 0, 0, PLAIN)]))


def test_the_models_last_position_is_known_whatever_its_family_calls_it(tokenizer: Any, tmp_path: Path) -> None:
    """GPT-2 has `n_positions`. Its published files also hold masks, which are no weights."""
    from safetensors.torch import load_file, save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(tokenizer), n_positions=24, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {"transformer.h.0.attn.bias": torch.ones(24, 24)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    engine = open_engine(tmp_path)
    assert engine.max_length == 24
    (answer,) = engine.answers([Request((7,) * 21, 0, 0, PLAIN)])
    assert answer.num_tokens <= 3
    with pytest.raises(UserError, match="has 24 tokens, and the model takes 24 with the answer"):
        list(engine.answers([Request((7,) * 24, 0, 0, PLAIN)]))


def test_a_model_whose_files_lack_a_weight_is_refused(hf_model: Path, tmp_path: Path) -> None:
    """transformers would fill it with random numbers."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(hf_model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the weights lack model.norm.weight, so this is no LlamaForCausalLM"):
        open_engine(tmp_path / "model")


def test_a_model_whose_numbers_are_none_is_refused(hf_model: Path) -> None:
    engine = open_engine(hf_model)
    engine._model.lm_head.weight.data.fill_(math.nan)  # type: ignore[attr-defined]
    for settings in (PLAIN, GREEDY):
        with pytest.raises(UserError, match="logits are not numbers"):
            list(engine.answers(asked(prompts(engine), settings)))


def test_a_megatron_checkpoint_is_refused_with_the_command_that_exports_it(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="tools.convert_megatron_to_hf"):
        open_engine(checkpoint)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"max_new_tokens": 0},
    ],
    ids=str,
)
def test_a_setting_without_meaning_is_refused_by_its_name(settings: dict[str, Any]) -> None:
    ((name, _),) = settings.items()
    with pytest.raises(UserError, match=f"^{name} .* is refused"):
        replace(PLAIN, **settings).check()
