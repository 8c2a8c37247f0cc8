"""tools.compare: two models against their start, checked with plain loops over HuggingFace's own models."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import PAIRS
from tests.support.in_process import Program
from tests.support.reward_models import answered, make_pairrm
from tgdpo_megatron.checkpoint.sources import Source
from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.data.prepare import tokenised
from tgdpo_megatron.data.tokenizer import load_tokenizer
from tgdpo_megatron.evaluation import comparison_page
from tgdpo_megatron.evaluation.comparison import AnswerNumbers, PairNumbers, as_json, compared
from tgdpo_megatron.evaluation.gathering import answer_numbers, scores_of
from tgdpo_megatron.evaluation.log_probs import Tokenised, load_model, response_log_probs
from tgdpo_megatron.evaluation.models import Model
from tgdpo_megatron.evaluation.origins import check_origins
from tgdpo_megatron.reward_models.classifier import Classifier
from tgdpo_megatron.reward_models.opening import open_scorer
from tgdpo_megatron.reward_models.scorer import Group, Tokens
from tgdpo_megatron.sampling.answers import from_json, read_answers
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
    for name in ("win_rate", "win_rate_soft", "win_rate_soft_length_controlled"):
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
    kept = {(prompt, place): ids for prompt, place, ids in kept_lines(tmp_path / "out" / "answers" / "other.ids")}
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
    ids = given[1].with_suffix(".ids")
    lines = kept_lines(ids)
    assert len(lines) == 3 * len(PAIRS)
    for damaged in ("", json.dumps(lines[0])[:-3], "".join(json.dumps([*line[:2], [5, 6]]) + "\n" for line in lines)):
        ids.write_text(damaged, encoding="utf-8")
        code, said = run(f"start={hf_model}", f"other={other}", "--answers", *given, output="given")
        assert code == 0 and re.search(
            r"No KL divergence of other: \d.* tools.sample keeps the tokens with --keep-ids.", said
        )
        assert "kl" not in results(tmp_path, "given")["models"]["other"]


def test_prompts_that_the_template_renders_otherwise_give_no_kl_divergence(
    run: Run, hf_model: Path, other: Path, sampled: list[Any], tmp_path: Path
) -> None:
    """The answers' own token ids are there, and would be read behind other prompts than they were written to."""
    run(f"start={hf_model}", f"other={other}", *sampled)
    given = [tmp_path / "out" / "answers" / f"{name}.jsonl" for name in ("start", "other")]
    template = tmp_path / "other.jinja"
    template.write_text((hf_model / "chat_template.jinja").read_text().replace("|>", "|> "))
    models = (f"start={hf_model}", f"other={other}", f"data.template={template}")
    code, said = run(*models, "--answers", *given, output="given")
    assert code == 0 and "No KL divergence of other: the chat template makes other tokens of the prompts" in said
    assert "kl" not in results(tmp_path, "given")["models"]["other"]


def test_answers_are_refused_for_another_model_than_the_one_that_wrote_them(
    run: Run, hf_model: Path, other: Path, sampled: list[Any], tmp_path: Path
) -> None:
    run(f"start={hf_model}", f"other={other}", *sampled[:2], "--max-new-tokens", 4)
    start, theirs = (tmp_path / "out" / "answers" / f"{name}.jsonl" for name in ("start", "other"))
    models = (f"start={hf_model}", f"other={other}")
    code, said = run(*models, "--answers", theirs, start, output="given")
    assert code == 2 and said == (
        f"{theirs}: has answers of {other}, whose files are not those of start now; give one file for each model, in "
        "the order of the models, or sample the answers again."
    )
    rows = theirs.read_text().splitlines(keepends=True)
    theirs.write_text("".join([*rows[:-1], start.read_text().splitlines(keepends=True)[-1]]))
    code, said = run(*models, "--answers", start, theirs, output="given")
    assert code == 2 and said.startswith(f"{theirs}: has answers of {hf_model}, whose files are not those of other now")
    assert not (tmp_path / "given" / "comparison.json").exists()


def test_what_files_of_answers_do_not_tell_and_where_they_differ_is_said(
    run: Run, hf_model: Path, other: Path, sampled: list[Any], tmp_path: Path
) -> None:
    """A server does not tell its weights; a file may be sampled otherwise than another, if only in one line."""
    models = (f"start={hf_model}", f"other={other}")
    run(*models, *sampled[:2], "--max-new-tokens", 4)
    given = [tmp_path / "out" / "answers" / f"{name}.jsonl" for name in ("start", "other")]
    assert run(*models, "--answers", *given, output="given")[0] == 0
    assert not any("sampled with another" in note or "tell" in note for note in results(tmp_path, "given")["notes"])
    rows = kept_lines(given[1])
    rows[2]["model"]["fingerprint"], rows[3]["sampling"]["max_new_tokens"] = None, 5
    given[1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(*models, "--answers", *given, output="given")[0] == 0
    assert results(tmp_path, "given")["notes"][:2] == [
        f"{given[1]} does not tell whose answers it has, as a server answered: that they are those of other is not "
        "checked.",
        "The answers of other were sampled with another max_new_tokens than those of start.",
    ]


def test_weights_are_not_hashed_for_answers_that_do_not_tell_whose_they_are(hf_model: Path) -> None:
    """Which takes minutes for the weights of a large model."""
    model = Model("a", Source(hf_model, hf_model), None)
    lines = [from_json({**answered("Say hello.", ["Hi."]), "model": {"fingerprint": None}}, where="a line")]
    (note,) = check_origins([model], {"a": lines}, {"a": Path("a.jsonl")})
    assert "does not tell whose answers it has" in note and "fingerprint" not in vars(model)


def test_tempered_samples_have_no_kl_divergence(
    run: Run, hf_model: Path, other: Path, sampled: list[Any], tmp_path: Path
) -> None:
    code, said = run(hf_model, other, *sampled, "--temperature", 0.5)
    assert code == 0 and "No KL divergence: it needs answers sampled at temperature 1" in said
    assert all("kl" not in found for found in results(tmp_path)["models"].values())


def renamed_token(model: Path, folder: Path) -> Path:
    """The same model with another tokenizer: one special token has another name."""
    shutil.copytree(model, folder)
    text = json.loads((folder / "tokenizer.json").read_text())
    text["added_tokens"][0]["content"] = "<|padding|>"
    text["model"]["vocab"]["<|padding|>"] = text["model"]["vocab"].pop("<|pad|>")
    (folder / "tokenizer.json").write_text(json.dumps(text))
    return folder


def test_models_of_two_tokenizers_have_a_win_rate_and_no_kl_divergence(
    run: Run, hf_model: Path, other: Path, sampled: list[Any], tmp_path: Path
) -> None:
    """Both models' log-probs of their own answers would be of other tokens."""
    foreign = renamed_token(other, tmp_path / "foreign")
    assert run(f"start={hf_model}", f"other={foreign}", *sampled)[0] == 0
    found = results(tmp_path)
    assert "win_rate" in found["models"]["other"] and "kl" not in found["models"]["other"]
    assert found["notes"] == [
        "No KL divergence of other: it has another tokenizer than start, so their log-probs are not of the same tokens."
    ]


def test_with_no_kl_the_weights_of_models_whose_answers_are_given_are_not_read(
    run: Run, hf_model: Path, other: Path, scorer: Path, sampled: list[Any], tmp_path: Path
) -> None:
    """The weights are damaged, and the answers do not tell their model, as those of a server."""
    run(f"start={hf_model}", f"other={other}", *sampled)
    given = [tmp_path / "out" / "answers" / f"{name}.jsonl" for name in ("start", "other")]
    models = []
    for name, folder, file in zip(("start", "other"), (hf_model, other), given, strict=True):
        rows = [row | {"model": {"name": name, "fingerprint": None}} for row in kept_lines(file)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "model.safetensors").write_bytes(b"")
        models.append(f"{name}={tmp_path / name}")
    command = (*models, "--answers", *given, "--scorer", scorer)
    assert run(*command, output="given")[0] == 2
    assert run(*command, "--no-kl", output="given")[0] == 0
    all_numbers, without = results(tmp_path)["models"]["other"], results(tmp_path, "given")["models"]["other"]
    assert without == {name: value for name, value in all_numbers.items() if not name.startswith("kl")}


def test_prompts_that_the_reward_models_template_refuses_are_left_out_and_counted(
    run: Run, hf_model: Path, other: Path, scorer: Path, sampled: list[Any], tmp_path: Path
) -> None:
    refuses = tmp_path / "refuses"
    shutil.copytree(scorer, refuses)
    template = refuses / "chat_template.jinja"
    template.write_text(
        "{% if 'Add' in messages[0].content %}{{ raise_exception('no sums') }}{% endif %}" + template.read_text()
    )
    models = (f"start={hf_model}", f"other={other}")
    assert run(*models, *sampled, "--no-kl")[0] == 0
    whole = results(tmp_path)["models"]["other"]["reward"]
    code, said = run(*models, *sampled, "--no-kl", "--scorer", refuses)
    assert (
        code == 0 and said.count("2 of 6 prompts have turns that the reward model's chat template does not take;") == 1
    )
    assert results(tmp_path)["models"]["other"]["reward"] != whole
    html = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert html.count("no score") == 4  # the first answers of two models to two prompts


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
    assert page.count('class="side"') == 3 * len(PAIRS) and "win rate, soft, length-controlled (minimal form)" in page
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


def test_numbers_of_scores_are_drawn_among_the_prompts_that_have_some() -> None:
    """Two of 200: a draw among all would hold none of them in one of seven cases."""
    scores = np.full((200, 1), np.nan)
    scores[[3, 150]] = [[1.0], [-1.0]]
    answers = {"start": numbers(np.zeros((200, 1))), "a": numbers(scores)}
    with np.errstate(all="raise"):
        measured = compared({}, answers, is_bradley_terry=True).models["a"]
    assert set(measured["win_rate"].draws) == {0.0, 0.5, 1.0} and set(measured["reward"].draws) == {-1.0, 0.0, 1.0}
    controlled = measured["win_rate_soft_length_controlled"].draws
    assert {round(rate, 2) for rate in controlled} == {
        0.27,
        0.5,
        0.73,
    }  # σ(−1), σ(0) and σ(1), all answers being as long
    assert len(set(measured["tokens"].draws)) == 1


def test_two_models_have_one_win_rate_by_pairrm_whatever_the_others_are(tmp_path: Path) -> None:
    """PairRM's score is a mean over all answers that it is given: with all three models' it would be 1/4 and 1/2."""
    scorer = open_scorer(make_pairrm(tmp_path / "pairrm"), device=torch.device("cpu"))
    texts = {
        "start": ["Blue say", "say the"],
        "one": ["The you 5. the", "The is the like"],
        "two": ["the", "like the Blue"],
    }
    answers = {
        name: [from_json(answered(prompt, some), where="a line") for prompt in ("Name a colour.", "Add 2 and 3.")]
        for name, some in texts.items()
    }

    def found(*names: str) -> dict[str, AnswerNumbers]:
        some = {name: answers[name] for name in names}
        scores, of_start, _ = scores_of(some, scorer)
        return {
            name: answer_numbers(lines, scores=scores.get(name), start_scores=of_start.get(name))
            for name, lines in some.items()
        }

    all_three = compared({}, found("start", "one", "two"), is_bradley_terry=False)
    for name in ("one", "two"):
        alone = compared({}, found("start", name), is_bradley_terry=False).models[name]
        assert all_three.models[name]["win_rate"].value == alone["win_rate"].value
        wins = []
        for prompt in range(2):
            group = Group(answers[name][prompt].messages, [*texts["start"], *texts[name]])
            ((*theirs, first, second),) = scorer.scores([group])
            wins += [(ours > other) + (ours == other) / 2 for ours in (first, second) for other in theirs]
        assert alone["win_rate"].value == np.mean(wins)
    assert "reward" not in all_three.models["start"] and "reward" in all_three.models["one"]


def test_pairs_of_one_prompt_are_drawn_together() -> None:
    """Two prompts, one of which has nine pairs that the model all gets right: the share is 0, 0.9 or 1."""
    prompts = np.array([0] * 9 + [1])
    model = PairNumbers(np.array([[-1.0, -2.0]] * 9 + [[-2.0, -1.0]]), prompts)
    measured = compared({"start": model, "same": model}, {}, is_bradley_terry=False).models
    assert measured["start"]["accuracy_logp"].value == 0.9
    assert set(np.round(measured["start"]["accuracy_logp"].draws, 12)) == {0.0, 0.9, 1.0}
    assert measured["same"]["accuracy_reward"].value == 0.5


def test_whiskers_of_shares_are_the_intervals_of_the_table() -> None:
    """Nine prompts of ten won: there is more room below than above."""
    answers = {"start": numbers(np.zeros((10, 1))), "a": numbers([[1.0]] * 9 + [[-1.0]])}
    comparison = compared({}, answers, is_bradley_terry=False)
    (chart,) = comparison_page._charts(comparison)
    low, high = comparison.models["a"]["win_rate"].interval
    below, above = chart.series[0].spreads[0]
    assert (below, above) == pytest.approx((90 - 100 * low, 100 * high - 90)) and below > above > 0


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
    foreign = renamed_token(other, tmp_path / "foreign")
    retold = tmp_path / "retold"
    shutil.copytree(other, retold)
    (retold / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text() + "{# retold #}")
    pairs = ("--pairs", pairs_file)
    for arguments, says in (
        ((hf_model, other), "nothing to compare on: give --pairs, or --prompts, or both."),
        ((hf_model, *pairs), "a comparison needs the model that was started from and at least one other; give both."),
        ((hf_model, hf_model, *pairs), f"{hf_model}: another model is called so, too; name one of them"),
        ((hf_model, checkpoint, *pairs), f"{checkpoint}: is a Megatron checkpoint; export it first"),
        ((hf_model, other / "config.json", *pairs), f"config.json: is a file; give the folder that it is in, {other}."),
        ((hf_model, foreign, *pairs), f"{foreign}: has another tokenizer than {hf_model}"),
        ((hf_model, retold, *pairs), f"{retold}: has another chat template than {hf_model}"),
        ((hf_model, scorer, "--prompts", pairs_file), f"{scorer}: holds 'LlamaForSequenceClassification', which is no"),
        ((hf_model, other, *pairs, "--no-kl"), "--no-kl: a KL divergence is made of answers, and there are none;"),
        ((hf_model, other, *pairs, "--device", "cuda:99"), "--device cuda:99: cannot be used"),
        (
            (hf_model, other, "--answers", pairs_file, pairs_file, "data.template=none"),
            "--answers … data.template=none: is a setting, not a file; give it before --answers.",
        ),
        ((hf_model, other, *pairs, "--scorer", scorer), f"--scorer {scorer}: scores answers; give --prompts"),
        ((hf_model, other, "--prompts", pairs_file, "--scorer", other), "is no reward model that is known"),
        ((hf_model, other, "--prompts", pairs_file, "--n", 0), "--n 0: give 1 or more."),
        ((hf_model, other, "--answers", pairs_file), "--answers: 1 file for 2 models; give one for each"),
        ((hf_model, other, "--n", 1, "--answers", pairs_file, pairs_file), "--n 1: says how prompts are answered, and"),
        ((hf_model, other, *pairs, "--max-new-tokens", 8), "--max-new-tokens 8: says how prompts are answered, and"),
    ):
        code, said = run(*arguments)
        assert code == 2 and says in said, (said, says)
    assert not (tmp_path / "out" / "answers").exists()


def test_a_folder_whose_path_has_an_equals_sign_is_a_model(
    run: Run, hf_model: Path, other: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """As a sweep names its runs. With a name before it, the name ends at the first sign."""
    (tmp_path / "lr=1e-6").mkdir()
    folder = tmp_path / "lr=1e-6" / "hf"
    folder.symlink_to(other)
    for given, name in ((str(folder), str(folder)), (f"dpo={folder}", "dpo")):
        code, said = run(f"start={hf_model}", given, "--pairs", pairs_file)
        assert code == 0 and list(results(tmp_path)["models"]) == ["start", name], said


def test_prompts_that_are_too_long_are_left_out_where_that_is_asked_for(
    run: Run, hf_model: Path, other: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Add 2 and 3.\n" + "word " * 300 + "\n")
    command = (hf_model, other, "--prompts", prompts, "--max-new-tokens", 4)
    code, said = run(*command)
    assert code == 2 and said.endswith("leave long prompts out with --max-prompt-tokens.")
    code, said = run(*command, "--max-prompt-tokens", 64)
    assert code == 0 and "1 prompts, 1 answers; left out: longer than 64 tokens (row 2)" in said


def test_memory_that_runs_out_while_scoring_is_spared_by_smaller_batches(
    run: Run, hf_model: Path, other: Path, sampled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers_of = Classifier.numbers

    def with_little_memory(model: Classifier, sequences: Sequence[Tokens]) -> torch.Tensor:
        if len(sequences) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return numbers_of(model, sequences)

    monkeypatch.setattr(Classifier, "numbers", with_little_memory)
    code, said = run(hf_model, other, *sampled)
    assert code == 2 and said == (
        "memory ran out with --batch-tokens 4096; give a smaller number, or a larger machine."
    )
    assert run(hf_model, other, *sampled, "--batch-tokens", 1)[0] == 0


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
