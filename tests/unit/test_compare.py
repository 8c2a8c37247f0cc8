"""tools.compare: two models against their start, checked with plain loops over HuggingFace's own models."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import PAIRS
from tests.support.in_process import Program
from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.data.prepare import tokenised
from tgdpo_megatron.data.tokenizer import load_tokenizer
from tgdpo_megatron.evaluation.comparison import AnswerNumbers, PairNumbers, as_json, compared
from tgdpo_megatron.evaluation.log_probs import Tokenised, load_model, response_log_probs
from tgdpo_megatron.sampling.answers import read_answers
from tools.compare import main

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, make_hf_model: Callable[..., Path]) -> Path:
    """Another model with the same tokenizer."""
    return make_hf_model(tmp_path_factory.mktemp("hf") / "other", seed=1)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A random classifier with one label."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("scorer") / "scorer"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(pairs_file: Path, tmp_path: Path, in_process: Program) -> Run:
    """A function that runs tools.compare in this process: its exit code, and what it said."""

    def run(*arguments: Any, output: str = "out") -> tuple[int, str]:
        return in_process(main, [*arguments, "--output", tmp_path / output])

    return run


def results(tmp_path: Path, output: str = "out") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tmp_path / output / "comparison.json").read_text(encoding="utf-8"))
    return content


def kept_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def plain_log_prob(model: Any, ids: list[int], prompt: int) -> float:
    """log π(response | prompt) of one sequence alone, token by token."""
    logits = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(prompt, len(ids)))


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# ---------------------------------------------------------------- log-probs


def test_log_probs_are_those_of_one_sequence_at_a_time_in_any_batches(hf_model: Path, pairs_file: Path) -> None:
    prepared = tokenised(DataConfig(max_length=64), pairs_file, load_tokenizer(hf_model))
    sequences = [
        Tokenised(prepared.sequence(pair, side).tolist(), int(prepared.prompt_lengths[pair]))
        for pair in range(len(prepared))
        for side in (0, 1)
    ]
    theirs = loaded(hf_model)
    with torch.inference_mode():
        expected = np.array([plain_log_prob(theirs, one.ids, one.prompt) for one in sequences])
    model = load_model(hf_model, torch.device("cpu"))
    for batch_tokens in (1, 100, 10_000):
        found = response_log_probs(model, sequences, batch_tokens=batch_tokens)
        assert np.abs(found - expected).max() < 1e-4, batch_tokens  # nats of up to 20 tokens
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_preference_accuracies_are_those_of_a_plain_loop(
    run: Run, hf_model: Path, other: Path, pairs_file: Path, tmp_path: Path
) -> None:
    code, said = run(f"start={hf_model}", f"other={other}", "--pairs", pairs_file)
    assert code == 0 and "preference accuracy, log-prob" in said and "win rate" not in said
    prepared = tokenised(DataConfig(max_length=256), pairs_file, load_tokenizer(hf_model))
    chosen_wins = {"start": 0.0, "other": 0.0, "reward": 0.0}
    models = {"start": loaded(hf_model), "other": loaded(other)}
    with torch.inference_mode():
        for pair in range(len(prepared)):
            prompt = int(prepared.prompt_lengths[pair])
            of = {
                name: [plain_log_prob(model, prepared.sequence(pair, side).tolist(), prompt) for side in (0, 1)]
                for name, model in models.items()
            }
            for name, (chosen, rejected) in of.items():
                chosen_wins[name] += chosen > rejected
            gained = [of["other"][side] - of["start"][side] for side in (0, 1)]
            chosen_wins["reward"] += gained[0] > gained[1]
    found = results(tmp_path)["models"]
    assert found["start"].keys() == {"accuracy_logp"}
    assert found["start"]["accuracy_logp"]["value"] == pytest.approx(chosen_wins["start"] / len(PAIRS))
    assert found["other"]["accuracy_logp"]["value"] == pytest.approx(chosen_wins["other"] / len(PAIRS))
    assert found["other"]["accuracy_reward"]["value"] == pytest.approx(chosen_wins["reward"] / len(PAIRS))


# ---------------------------------------------------------------- answers


@pytest.fixture
def sampled(pairs_file: Path, scorer: Path) -> list[Any]:
    """Options of a small comparison by answers."""
    return ["--prompts", pairs_file, "--scorer", scorer, "--n", 3, "--max-new-tokens", 12]


def test_a_model_does_not_differ_from_itself(run: Run, hf_model: Path, sampled: list[Any], tmp_path: Path) -> None:
    code, _ = run(f"start={hf_model}", f"same={hf_model}", *sampled)
    assert code == 0
    same = results(tmp_path)["models"]["same"]
    assert same["kl"] == same["kl_per_token"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert same["win_rate"]["value"] == same["win_rate_soft"]["value"] == pytest.approx(0.5, abs=1e-12)
    assert same["length_ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_swapping_two_models_gives_one_minus_the_win_rate(
    run: Run, hf_model: Path, other: Path, sampled: list[Any], tmp_path: Path
) -> None:
    run(f"a={hf_model}", f"b={other}", *sampled, output="there")
    run(f"b={other}", f"a={hf_model}", *sampled, output="back")
    there, back = results(tmp_path, "there")["models"]["b"], results(tmp_path, "back")["models"]["a"]
    for name in ("win_rate", "win_rate_soft", "win_rate_length_controlled"):
        assert there[name]["value"] == pytest.approx(1 - back[name]["value"], abs=1e-9), name
        assert there[name]["low"] == pytest.approx(1 - back[name]["high"], abs=1e-9), name
    assert there["win_rate"]["value"] != 0.5
    assert there["kl"]["value"] != back["kl"]["value"]


def test_numbers_of_answers_are_those_of_plain_loops(
    run: Run, hf_model: Path, other: Path, scorer: Path, sampled: list[Any], tmp_path: Path
) -> None:
    """Scores by HuggingFace's classifier one at a time, the KL divergence by two models one answer at a time."""
    from transformers import AutoModelForSequenceClassification

    run(f"start={hf_model}", f"other={other}", *sampled)
    found, tokenizer = results(tmp_path)["models"], load_tokenizer(hf_model)
    kept = {(prompt, place): ids for prompt, place, ids in kept_lines(tmp_path / "out" / "answers" / "other.ids.jsonl")}
    lines = {name: list(read_answers(tmp_path / "out" / "answers" / f"{name}.jsonl")) for name in ("start", "other")}
    judge, start, trained = AutoModelForSequenceClassification.from_pretrained(scorer), loaded(hf_model), loaded(other)

    def score(prompt: str, answer: str) -> float:
        text = f"<|begin|><|user|>\n{prompt}<|end|><|assistant|>\n{answer.strip()}<|end|>"
        return float(judge(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits)

    hard, soft, log_ratios, tokens, unfinished, scores = [], [], [], [], [], []
    with torch.inference_mode():
        for ours, theirs in zip(lines["other"], lines["start"], strict=True):
            for place, answer in enumerate(ours.all_generated_responses):
                ids = tokenizer(ours.format_prompt, add_special_tokens=False)["input_ids"]
                whole = ids + kept[ours.prompt_id, place]
                assert len(kept[ours.prompt_id, place]) == ours.num_tokens[place]
                assert (whole[-1] == tokenizer.eos_token_id) == (ours.finish_reasons[place] == "stop")
                log_ratios.append(plain_log_prob(trained, whole, len(ids)) - plain_log_prob(start, whole, len(ids)))
                tokens.append(ours.num_tokens[place])
                unfinished.append(ours.finish_reasons[place] == "length")
                scores.append(score(ours.prompt, answer))
                for against in theirs.all_generated_responses:
                    difference = scores[-1] - score(theirs.prompt, against)
                    hard.append(0.5 + 0.5 * np.sign(difference) if abs(difference) > 1e-6 else 0.5)
                    soft.append(1 / (1 + np.exp(-difference)))
    expected = {
        "win_rate": np.mean(hard),
        "win_rate_soft": np.mean(soft),
        "reward": np.mean(scores),
        "tokens": np.mean(tokens),
        "unfinished": np.mean(unfinished),
        "kl": np.mean(log_ratios),
        "kl_per_token": np.sum(log_ratios) / np.sum(tokens),
    }
    for name, value in expected.items():
        assert found["other"][name]["value"] == pytest.approx(value, abs=1e-4), name
    assert found["other"]["length_ratio"]["value"] == pytest.approx(
        np.mean(tokens) / np.mean([line.num_tokens for line in lines["start"]])
    )


def test_a_second_run_samples_nothing_and_given_files_give_the_same(
    run: Run, hf_model: Path, other: Path, scorer: Path, sampled: list[Any], tmp_path: Path
) -> None:
    models = (f"start={hf_model}", f"other={other}")
    run(*models, *sampled)
    first, files = results(tmp_path), sorted((tmp_path / "out" / "answers").glob("*[!s].jsonl"))
    before = [path.read_bytes() for path in files]
    assert run(*models, *sampled)[0] == 0
    assert results(tmp_path) == first and [path.read_bytes() for path in files] == before
    given = [tmp_path / "out" / "answers" / f"{name}.jsonl" for name in ("start", "other")]
    assert run(*models, "--answers", *given, "--scorer", scorer, output="given")[0] == 0
    assert results(tmp_path, "given")["models"] == first["models"]
    code, said = run(*models, *sampled, "--temperature", 0.7)
    assert code == 2 and "temperature" in said and [path.read_bytes() for path in files] == before


def test_texts_whose_tokens_are_not_known_give_no_kl_divergence(
    run: Run, hf_model: Path, other: Path, sampled: list[Any], tmp_path: Path
) -> None:
    """A random model writes in other tokens than its tokenizer. Ids of another text, and torn lines, are not taken."""
    run(f"start={hf_model}", f"other={other}", *sampled)
    given = [tmp_path / "out" / "answers" / f"{name}.jsonl" for name in ("start", "other")]
    ids = given[1].with_suffix(".ids.jsonl")
    lines = kept_lines(ids)
    assert len(lines) == 3 * len(PAIRS)
    for damaged in ("", json.dumps(lines[0])[:-3], "".join(json.dumps([*line[:2], [5, 6]]) + "\n" for line in lines)):
        ids.write_text(damaged, encoding="utf-8")
        code, said = run(f"start={hf_model}", f"other={other}", "--answers", *given, output="given")
        assert code == 0 and re.search(
            r"No KL divergence of other: \d.* tools.sample keeps the tokens with --keep-ids.", said
        )
        assert "kl" not in results(tmp_path, "given")["models"]["other"]


def test_tempered_samples_have_no_kl_divergence(
    run: Run, hf_model: Path, other: Path, sampled: list[Any], tmp_path: Path
) -> None:
    code, said = run(hf_model, other, *sampled, "--temperature", 0.5)
    assert code == 0 and "No KL divergence: it needs answers sampled at temperature 1" in said
    assert all("kl" not in found for found in results(tmp_path)["models"].values())


def test_three_models_have_paired_differences_and_a_page_with_their_answers(
    run: Run, hf_model: Path, other: Path, pairs_file: Path, sampled: list[Any], tmp_path: Path
) -> None:
    code, said = run(
        f"start={hf_model}", f"one={other}", f"two={hf_model}", *sampled, "--pairs", pairs_file, "data.max_length=64"
    )
    assert code == 0 and "two \N{MINUS SIGN} one" in said
    found = results(tmp_path)
    (difference,) = found["differences"]
    assert (difference["model"], difference["less"]) == ("two", "one")
    for name in ("accuracy_reward", "win_rate", "kl", "tokens"):
        less = found["models"]["two"][name]["value"] - found["models"]["one"][name]["value"]
        assert difference[name]["value"] == pytest.approx(less, abs=1e-12), name
        assert difference[name]["low"] <= less <= difference[name]["high"]
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert page.count('<article class="pair card">') == len(PAIRS) and "All 6 prompts" in page
    assert page.count('class="side"') == 3 * len(PAIRS) and "win rate, length-controlled (minimal form)" in page
    assert "http://" not in page.replace("http://www.w3.org/", "") and "https://" not in page


# ---------------------------------------------------------------- what is compared


def numbers(scores: Any, **more: Any) -> AnswerNumbers:
    scores = np.asarray(scores, dtype=float)
    lengths = {"tokens": np.full(scores.shape, 10.0), "characters": np.full(scores.shape, 40.0)}
    return AnswerNumbers(**{**lengths, "unfinished": np.full(scores.shape, False), "scores": scores, **more})


def test_a_prompt_with_an_answer_that_is_too_long_for_the_scorer_counts_for_no_model() -> None:
    nan = float("nan")
    answers = {
        "start": numbers([[0.0], [0.0], [0.0], [nan]]),
        "a": numbers([[1.0], [1.0], [-1.0], [5.0]]),
        "b": numbers([[1.0], [nan], [-1.0], [5.0]]),
    }
    found = compared({}, answers, is_bradley_terry=False).models
    for name in ("a", "b"):
        assert found[name]["win_rate"].value == 0.5 and found[name]["reward"].value == 0
        assert "win_rate_soft" not in found[name]
    nothing = {"start": numbers([[nan]]), "a": numbers([[1.0]])}
    assert compared({}, nothing, is_bradley_terry=True).models["a"].keys() == {"tokens", "unfinished", "length_ratio"}


def test_pairs_of_one_prompt_are_drawn_together() -> None:
    """Two prompts, one of which has nine pairs that the model all gets right: the share is 0, 0.9 or 1."""
    prompts = np.array([0] * 9 + [1])
    model = PairNumbers(np.array([[-1.0, -2.0]] * 9 + [[-2.0, -1.0]]), prompts)
    measured = compared({"start": model, "same": model}, {}, is_bradley_terry=False).models
    assert measured["start"]["accuracy_logp"].value == 0.9
    assert set(np.round(measured["start"]["accuracy_logp"].draws, 12)) == {0.0, 0.9, 1.0}
    assert measured["same"]["accuracy_reward"].value == 0.5


def test_numbers_that_are_none_are_null_in_json() -> None:
    empty = numbers([[0.0]], tokens=np.zeros((1, 1)), characters=np.zeros((1, 1)))
    with np.errstate(all="ignore"):
        content = as_json(compared({}, {"start": empty, "a": empty}, is_bradley_terry=True))
    assert content["models"]["a"]["length_ratio"] == {"value": None, "low": None, "high": None}
    json.dumps(content, allow_nan=False)


# ---------------------------------------------------------------- refusals


def test_what_cannot_be_compared_is_refused_in_a_sentence(
    run: Run, hf_model: Path, other: Path, checkpoint: Path, scorer: Path, pairs_file: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(other, foreign)
    text = json.loads((foreign / "tokenizer.json").read_text())
    text["added_tokens"][0]["content"] = "<|padding|>"
    text["model"]["vocab"]["<|padding|>"] = text["model"]["vocab"].pop("<|pad|>")
    (foreign / "tokenizer.json").write_text(json.dumps(text))
    retold = tmp_path / "retold"
    shutil.copytree(other, retold)
    (retold / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text() + " ")
    pairs = ("--pairs", pairs_file)
    for arguments, says in (
        ((hf_model, other), "nothing to compare on: give --pairs, or --prompts, or both."),
        ((hf_model, *pairs), "a comparison needs the model that was started from and at least one other; give both."),
        ((hf_model, hf_model, *pairs), f"{hf_model}: another model is called so, too; name one of them"),
        ((hf_model, checkpoint, *pairs), f"{checkpoint}: is a Megatron checkpoint; export it first"),
        ((hf_model, foreign, *pairs), f"{foreign}: has another tokenizer than {hf_model}"),
        ((hf_model, retold, *pairs), f"{retold}: has another chat template than {hf_model}"),
        ((hf_model, other, *pairs, "--scorer", scorer), f"--scorer {scorer}: scores answers; give --prompts"),
        ((hf_model, other, "--prompts", pairs_file, "--scorer", other), "is no reward model that is known"),
        ((hf_model, other, "--prompts", pairs_file, "--n", 0), "--n 0: give 1 or more."),
        ((hf_model, other, "--answers", pairs_file), "--answers: 1 file for 2 models; give one for each"),
    ):
        code, said = run(*arguments)
        assert code == 2 and says in said, (said, says)
    assert not (tmp_path / "out" / "answers").exists()


def test_files_of_answers_must_answer_the_same_prompts(
    run: Run, hf_model: Path, other: Path, sampled: list[Any], tmp_path: Path
) -> None:
    run(f"start={hf_model}", f"other={other}", *sampled[:2], "--max-new-tokens", 4)
    start, theirs = (tmp_path / "out" / "answers" / f"{name}.jsonl" for name in ("start", "other"))
    rows = theirs.read_text().splitlines(keepends=True)
    damaged = json.loads(rows[0])
    for name in ("all_generated_responses", "finish_reasons", "num_tokens", "seeds"):
        damaged[name] *= 2
    for content, says in (
        (rows[:-2], "lacks answers to 2 prompts of"),
        ([*rows, rows[0]], "answers 'Add 2 and 3.' twice; leave one of them out."),
        ([json.dumps(damaged) + "\n", *rows[1:]], "has 1 answer to one prompt and 2 answers to another; give as many."),
        ([], "holds no answers."),
    ):
        theirs.write_text("".join(content))
        for order in ((start, theirs), (theirs, start)):
            code, said = run(hf_model, other, "--answers", *order, output="given")
            assert code == 2 and says in said and said.startswith(str(theirs)), said
    theirs.write_text("".join(reversed(rows)))
    assert run(hf_model, other, "--answers", start, theirs, output="given")[0] == 0
