"""Scores of reward models: those of HuggingFace one at a time, or of a second implementation, whatever the batches."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.reward_models import make_armorm, make_classifier, make_pairrm, tokenizer_with
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.reward_models import Group, open_scorer
from tgdpo_megatron.reward_models.scorer import RewardModel, Scorer, Tokens, batches

CPU = torch.device("cpu")
WORDS = "the blue stone sings of 12 rivers and no house"
ANSWERS = [" ".join((WORDS.split() * 9)[:length]) for length in (1, 3, 60, 7, 2, 33, 3)]
PROMPTS = [
    [{"role": "user", "content": "Name a colour."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say why, at some length. " * 5}],
    [
        {"role": "user", "content": "Add 2 and 3."},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "And 4?"},
    ],
]
GROUPS = [Group(prompt, ANSWERS[:number]) for prompt, number in zip(PROMPTS, (7, 2, 4), strict=True)]
BUDGETS = (1, 100, 300, 10**6)
"""Tokens of a batch: one sequence at a time, few of about the same length, all together."""


def flat(scorer: Scorer, groups: list[Group] = GROUPS) -> np.ndarray:
    return np.concatenate(list(scorer.scores(groups)))


# ---------------------------------------------------------------- sequence classifiers


def one_at_a_time(folder: Path, groups: list[Group] = GROUPS) -> np.ndarray:
    """transformers' own logit of each conversation that its template writes."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    for group in groups:
        for answer in group.answers:
            turns = [*group.messages, {"role": "assistant", "content": answer}]
            ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
            with torch.no_grad():
                scores.append(model(ids).logits.item())
    return np.array(scores)


@pytest.mark.parametrize("pad", ["a token of its own", "the end of every turn", "none", "no token"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_classifiers_score_as_huggingface_does_one_at_a_time_in_any_batches(
    family: str, pad: str, tokenizer: Any, tmp_path: Path
) -> None:
    ids = {
        "a token of its own": tokenizer.pad_token_id,
        "the end of every turn": tokenizer.eos_token_id,
        "no token": -1,
    }
    folder = make_classifier(tmp_path / "rm", tokenizer, family, pad_token_id=ids.get(pad))
    expected = one_at_a_time(folder)
    assert expected.std() > 0.1, "the case has power"
    for budget in BUDGETS:
        scorer = open_scorer(folder, batch_tokens=budget, device=CPU)
        assert scorer.is_bradley_terry
        np.testing.assert_allclose(flat(scorer), expected, rtol=0, atol=1e-5)


def test_a_bos_that_template_and_tokenizer_both_add_is_read_once(tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    adding = copy.deepcopy(tokenizer)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    adding.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    folder = make_classifier(tmp_path / "rm", adding)
    (encoded,) = open_scorer(folder, device=CPU).model.encode(GROUPS[0], ["Blue."])
    assert encoded.ids.count(bos[1]) == 1
    np.testing.assert_allclose(flat(open_scorer(folder, device=CPU)), one_at_a_time(folder), rtol=0, atol=1e-5)


def test_an_answer_that_is_too_long_has_no_score_and_the_others_keep_theirs(tokenizer: Any, tmp_path: Path) -> None:
    """Positions of which the longest answer needs more."""
    folder = make_classifier(tmp_path / "rm", tokenizer)
    whole = flat(open_scorer(folder, device=CPU), GROUPS[:1])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    cut = flat(open_scorer(folder, device=CPU), GROUPS[:1])
    lengths = [len(tokenizer.apply_chat_template(turns(text), return_dict=False)) for text in ANSWERS]
    np.testing.assert_array_equal(np.isnan(cut), np.array(lengths) > 100)
    assert 0 < np.isnan(cut).sum() < len(ANSWERS)
    np.testing.assert_allclose(cut[~np.isnan(cut)], whole[~np.isnan(cut)], rtol=0, atol=1e-5)


def turns(answer: str) -> list[dict[str, str]]:
    return [*PROMPTS[0], {"role": "assistant", "content": answer}]


# ---------------------------------------------------------------- ArmoRM


def armorm_one_at_a_time(folder: Path) -> np.ndarray:
    """The published computation, in float64 from the hidden states on."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    tokenizer, config = AutoTokenizer.from_pretrained(folder), LlamaConfig.from_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    llama = LlamaModel(config).eval()
    llama.load_state_dict({name[6:]: tensor for name, tensor in stored.items() if name.startswith("model.")})
    numbers = {name: tensor.double().numpy() for name, tensor in stored.items()}
    header = tokenizer.encode("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", add_special_tokens=False)
    scores = []
    for group in GROUPS:
        for answer in group.answers:
            conversation = [*group.messages, {"role": "assistant", "content": answer}]
            ids = tokenizer.apply_chat_template(conversation, return_dict=False)
            (*_, place) = [at for at in range(len(ids)) if ids[at : at + len(header)] == header]
            with torch.no_grad():
                states = llama(torch.tensor([ids])).last_hidden_state[0].double().numpy()
            gate = states[place]
            for layer in range(4):
                gate = numbers[f"gating.layers.{layer}.weight"] @ gate + numbers[f"gating.layers.{layer}.bias"]
                gate = np.maximum(gate, 0) if layer < 3 else gate
            gate = np.exp(gate / 10 - (gate / 10).max())
            gate = gate / gate.sum() * numbers["gating.logit_scale"][0]
            rewards = numbers["regression_layer.weight"] @ states[-1]
            scores.append(float(gate @ (rewards @ numbers["reward_transform_matrix"])))
    return np.array(scores)


def test_armorm_scores_as_its_published_computation_does_in_any_batches(tmp_path: Path) -> None:
    folder = make_armorm(tmp_path / "rm")
    expected = armorm_one_at_a_time(folder)
    assert expected.std() > 0.1
    for budget in BUDGETS:
        scorer = open_scorer(folder, batch_tokens=budget, device=CPU)
        assert not scorer.is_bradley_terry
        np.testing.assert_allclose(flat(scorer), expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- PairRM


def pairrm_one_pair_at_a_time(folder: Path, prompt: str, answers: list[str]) -> np.ndarray:
    """The published comparison of every ordered pair, in float64 from the hidden states on."""
    from transformers import AutoTokenizer, DebertaV2Config, DebertaV2Model

    tokenizer, config = AutoTokenizer.from_pretrained(folder), DebertaV2Config.from_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    encoder = DebertaV2Model(config).eval()
    prefix = "pretrained_model."
    encoder.load_state_dict({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
    weights = {name: tensor.double().numpy() for name, tensor in stored.items()}

    def head(source: np.ndarray, candidate: np.ndarray) -> float:
        hidden = np.tanh(
            weights["head_layer.1.weight"] @ np.concatenate([source, candidate]) + weights["head_layer.1.bias"]
        )
        return float((weights["head_layer.4.weight"] @ hidden + weights["head_layer.4.bias"])[0])

    better = np.zeros((len(answers), len(answers)))
    for i, first in enumerate(answers):
        for j, second in enumerate(answers):
            parts = (f"<|source|>{prompt}", f"<|candidate1|>{first}", f"<|candidate2|>{second}")
            ids = [token for part in parts for token in tokenizer.encode(part)]
            with torch.no_grad():
                states = encoder(torch.tensor([ids])).last_hidden_state[0].double().numpy()
            places = [ids.index(tokenizer.convert_tokens_to_ids(mark)) for mark in parts_of_marks()]
            source, one, two = states[places]
            better[i, j] = head(source, one) - head(source, two)
    return (better - better.T).mean(axis=-1)


def parts_of_marks() -> tuple[str, str, str]:
    return "<|source|>", "<|candidate1|>", "<|candidate2|>"


def test_pairrm_scores_as_its_published_comparisons_do_in_any_batches(tmp_path: Path) -> None:
    """One answer is there twice, which weighs in the means."""
    folder = make_pairrm(tmp_path / "rm")
    answers = [ANSWERS[1], ANSWERS[0], ANSWERS[3], ANSWERS[1], "No."]
    expected = pairrm_one_pair_at_a_time(folder, "Name a colour.", answers)
    assert expected.std() > 0.01
    for budget in BUDGETS:
        scorer = open_scorer(folder, batch_tokens=budget, device=CPU)
        assert not scorer.is_bradley_terry
        (found,) = scorer.scores([Group(PROMPTS[0], answers)])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_pairrm_reads_a_conversation_in_the_words_it_was_trained_with(tmp_path: Path) -> None:
    folder = make_pairrm(tmp_path / "rm")
    prompt = (
        "Finish the following coversation in each i-th turn by filling in <Response i> with your response."
        "USER: Add 2 and 3.\nAssistant: <Response 1>\nUSER: And 4?\nAssistant: <Response 2>"
    )
    said = [f"<Response 1>: 5\n<Response 2>: {answer}" for answer in ("9", "no")]
    (found,) = open_scorer(folder, device=CPU).scores([Group(PROMPTS[2], ["9", "no"])])
    np.testing.assert_allclose(found, pairrm_one_pair_at_a_time(folder, prompt, said), rtol=0, atol=1e-5)


def test_pairrm_is_not_misled_by_an_answer_that_mentions_its_marks(tmp_path: Path) -> None:
    """Each mark counts where its own part begins."""
    scorer = open_scorer(make_pairrm(tmp_path / "rm"), device=CPU)
    (first, second) = scorer.model.encode(Group(PROMPTS[0], []), ["a <|candidate1|> <|source|> b", "c"])
    known = scorer.model.tokenizer.get_vocab()  # type: ignore[attr-defined]
    for tokens in scorer.model.sequences([first, second]):
        assert [tokens.ids[place] for place in tokens.marks] == [known[mark] for mark in parts_of_marks()]
        assert all(tokens.ids[place - 1] == known["[CLS]"] for place in tokens.marks)


def test_pairrm_refuses_turns_that_it_does_not_know(tmp_path: Path) -> None:
    scorer = open_scorer(make_pairrm(tmp_path / "rm"), device=CPU)
    with pytest.raises(UserError, match=r"^line 3: PairRM reads conversations .* this one has system, user"):
        list(scorer.scores([Group(PROMPTS[1], ["a", "b"], name="line 3")]))


@pytest.mark.parametrize("kind", ["classifier", "pairrm"])
def test_turns_that_a_model_does_not_take_are_told_of_and_the_others_are_scored(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "rm"
    if kind == "pairrm":
        make_pairrm(folder)
    else:
        strict = copy.deepcopy(tokenizer)
        no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        strict.chat_template = no_system + strict.chat_template
        make_classifier(folder, strict)
    scorer, refused = open_scorer(folder, device=CPU), list[Group]()
    groups = [Group(prompt, ["Blue.", "No."]) for prompt in PROMPTS]
    found = np.array(list(scorer.scores(groups, refused=refused.append)))
    assert refused == groups[1:2]
    np.testing.assert_array_equal(np.isnan(found), [[False] * 2, [True] * 2, [False] * 2])
    np.testing.assert_allclose(found[[0, 2]].ravel(), flat(scorer, [groups[0], groups[2]]), rtol=0, atol=1e-5)


def test_pairrm_leaves_out_answers_that_do_not_fit_beside_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are compared as if it were not there."""
    from tgdpo_megatron.reward_models import pairrm

    scorer = open_scorer(make_pairrm(tmp_path / "rm"), device=CPU)
    monkeypatch.setattr(pairrm, "LONGEST", 120)
    (found,) = scorer.scores([Group(PROMPTS[0], ["Blue.", WORDS * 5, "No."])])
    (others,) = scorer.scores([Group(PROMPTS[0], ["Blue.", "No."])])
    assert np.isnan(found[1])
    np.testing.assert_allclose(found[[0, 2]], others, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- batches


class Count(RewardModel):
    """Scores an answer by the number of its tokens, which are numbers in its text."""

    device = CPU
    vocabulary = 10**9

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def encode(self, group: Group, answers: Any) -> list[Tokens]:
        return [Tokens([1] * int(answer)) for answer in answers]

    def numbers(self, sequences: Any) -> torch.Tensor:
        self.batches.append([len(sequence.ids) for sequence in sequences])
        return torch.tensor([float(len(sequence.ids)) for sequence in sequences])


def test_padding_takes_less_than_a_fifth_of_the_tokens_that_are_read() -> None:
    """Lengths as sampled answers have them: lognormal, up to 4,096 tokens."""
    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(random.normal(5.8, 0.8, size=4000)), 1, 4096).astype(int)
    model = Count()
    scorer = Scorer(model, name="count", fingerprint="", batch_tokens=16384)
    found = list(scorer.scores(Group([], [str(length) for length in five]) for five in lengths.reshape(-1, 5)))
    np.testing.assert_array_equal(np.concatenate(found), lengths)
    assert scorer.tokens == sum(length for five in lengths.reshape(-1, 5) for length in set(five.tolist()))
    assert scorer.padded <= 1.2 * scorer.tokens
    assert all(len(batch) * max(batch) <= 16384 for batch in model.batches)
    assert np.mean([len(batch) for batch in model.batches]) > 8, "many are scored together"


def test_a_sequence_longer_than_a_batch_goes_alone() -> None:
    assert list(batches([5, 50, 5, 5], budget=10)) == [[1], [0, 2], [3]]


def test_a_million_answers_are_scored_some_at_a_time() -> None:
    """What was taken and not yet given never exceeds a window."""
    scorer = Scorer(Count(), name="count", fingerprint="", batch_tokens=64)
    taken = given = most = 0

    def groups() -> Iterator[Group]:
        nonlocal taken
        for number in range(2000):
            taken += 1
            yield Group([], ["3", str(1 + number % 7)])

    for _ in scorer.scores(groups()):
        given += 1
        most = max(most, taken - given)
    assert given == 2000 and most < 600


def test_the_same_text_has_the_same_score_and_is_read_once() -> None:
    model = Count()
    scorer = Scorer(model, name="count", fingerprint="", batch_tokens=4)
    (found,) = scorer.scores([Group([], ["3", "2", "3", "3"])])
    assert found.tolist() == [3, 2, 3, 3] and sum(map(len, model.batches)) == 2


def test_progress_tells_of_all_tokens_that_are_read() -> None:
    told: list[int] = []
    scorer = Scorer(Count(), name="count", fingerprint="", batch_tokens=8)
    list(scorer.scores([Group([], ["3", "2"]), Group([], ["7"])], told.append))
    assert sum(told) == 12 == scorer.tokens


# ---------------------------------------------------------------- refusals


def test_a_score_that_is_not_finite_names_the_prompt(tokenizer: Any, tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "rm", tokenizer)
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"][0, 3] = math.inf
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"^answers\.jsonl prompt 7: .*rm gives an answer the score .* not finite"):
        list(open_scorer(folder, device=CPU).scores([Group(PROMPTS[0], ["a"], name="answers.jsonl prompt 7")]))


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The folder with a field of its configuration changed."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The folder with its tensors changed."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_model_that_gives_no_single_score_is_refused(tokenizer: Any, hf_model: Path, tmp_path: Path) -> None:
    three = make_classifier(tmp_path / "three", tokenizer, num_labels=3)
    with pytest.raises(UserError, match="three: the classifier has 3 labels; a reward model has one, the score"):
        open_scorer(three, device=CPU)
    with pytest.raises(UserError, match="holds 'LlamaForCausalLM', which is no reward model that is known"):
        open_scorer(hf_model, device=CPU)


def test_a_scorer_without_a_template_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(())
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="rm: the tokenizer has no chat template"):
        open_scorer(make_classifier(tmp_path / "rm", tokenizer), device=CPU)


@pytest.mark.parametrize(
    ("make", "head"),
    [("classifier", "score.weight"), ("armorm", "gating.layers.2.bias"), ("pairrm", "head_layer.4.weight")],
)
def test_weights_that_lack_a_tensor_hold_another_or_have_another_size_are_refused(
    make: str, head: str, tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "rm"
    makers = {"classifier": lambda: make_classifier(folder, tokenizer)}
    makers |= {"armorm": lambda: make_armorm(folder), "pairrm": lambda: make_pairrm(folder)}
    makers[make]()
    whole = load_file(folder / "model.safetensors")[head]
    rewritten(folder, lambda weights: weights.pop(head))
    with pytest.raises(UserError, match=f"rm: the weights lack {head}, so this is no "):
        open_scorer(folder, device=CPU)
    rewritten(folder, lambda weights: weights.update({head: torch.cat([whole, whole])}))
    with pytest.raises(UserError, match=f"rm: the weights have another size for {head}, so this is no "):
        open_scorer(folder, device=CPU)
    rewritten(folder, lambda weights: weights.update({head: whole, "head.more": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"rm: the weights also hold head\.more, so this is no "):
        open_scorer(folder, device=CPU)


def test_code_that_comes_with_a_model_is_not_run(tokenizer: Any, tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "rm", tokenizer)
    expected = flat(open_scorer(folder, device=CPU))
    (folder / "modeling_custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    changed(folder, lambda config: config.update(auto_map={"AutoModelForSequenceClassification": "modeling_custom.M"}))
    np.testing.assert_array_equal(flat(open_scorer(folder, device=CPU)), expected)
    assert not (tmp_path / "ran").exists()
