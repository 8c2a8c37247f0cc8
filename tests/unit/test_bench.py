"""What the benchmark counts and places by itself, on cases known by hand, and the pairs it runs on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench.files import run_file, write_results
from bench.lengths import count_tokens
from bench.pairs import read_lengths, ultrafeedback_like, with_real_lengths
from bench.rows import Row, paired, table
from bench.speed import context, counts, trace
from bench.speed.flops import causal_scores, counted_flops, masked_scores
from bench.speed.limits import Timed, within_limit
from bench.speed.picture import draw
from bench.speed.shared import PROMPT, RESPONSE, long_prompts
from bench.speed.trace import idle_share
from tgdpo_megatron.config import ParallelConfig
from tgdpo_megatron.config.constants import MASKED_ROWS
from tgdpo_megatron.data.batch import make_batch
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.model.attention import masked_attention
from tools.docs import speed


def forward_then_backward(micro_batches: int) -> list[tuple[str, int, int]]:
    return [(kind, 0, place) for kind in "FB" for place in range(micro_batches)]


def test_one_stage_is_never_idle() -> None:
    assert idle_share([forward_then_backward(4)]) == 0.0


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 2), (2, 5), (4, 3)])
def test_all_forward_then_all_backward_idles_as_the_formula_says(stages: int, micro_batches: int) -> None:
    """GPipe's schedule has the bubble of 1F1B: (p − 1) / (m + p − 1)."""
    found = idle_share([forward_then_backward(micro_batches)] * stages)
    assert found == pytest.approx((stages - 1) / (micro_batches + stages - 1))


def test_one_micro_batch_after_the_other_leaves_all_but_one_stage_idle() -> None:
    order = [event for place in range(4) for event in (("F", 0, place), ("B", 0, place))]
    assert idle_share([order] * 2) == pytest.approx(1 / 2)


def test_operations_of_a_product_and_of_its_gradients_are_counted() -> None:
    left, right = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7, requires_grad=True)
    assert counted_flops(lambda: left @ right) == 2 * 3 * 5 * 7
    assert counted_flops(lambda: (left @ right).sum().backward()) == 3 * 2 * 3 * 5 * 7
    total = torch.zeros(3, 7)
    assert counted_flops(lambda: total.addmm_(left.detach(), right.detach())) == 2 * 3 * 5 * 7


@pytest.mark.parametrize("causal", [False, True])
def test_operations_of_attention_are_counted(causal: bool) -> None:
    """Two heads of 8 channels, 1,024 tokens: two products over all keys; five more in backward.

    Causal queries of the first of two blocks of keys leave the second out.
    """
    q, k, v = (torch.ones(1, 2, 1024, 8, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 1024 * (768 if causal else 1024) * 8
    assert counted_flops(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)) == 2 * product
    backward = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward()  # noqa: E731
    assert counted_flops(backward) == 7 * product


@pytest.mark.parametrize(("length", "scores"), [(1, 1), (512, 512**2), (513, 512**2 + 513), (1024, 512**2 * 3)])
def test_causal_attention_skips_whole_blocks_of_512_keys_alone(length: int, scores: int) -> None:
    assert causal_scores(length) == scores


@pytest.mark.parametrize(("queries", "keys"), [(1, 2), (300, 900), (512, 600), (700, 1500), (1024, 1025)])
def test_masked_attention_computes_what_is_counted_for_it(queries: int, keys: int) -> None:
    """Every query computes the keys up to the last one that its strip of queries sees, counted here one by one."""
    heads, channels = 2, 8
    before = keys - queries
    scores = sum(before + min((query // MASKED_ROWS + 1) * MASKED_ROWS, queries) for query in range(queries))
    assert masked_scores(queries, keys) == scores
    q, k, v = (torch.ones(1, heads, length, channels) for length in (queries, keys, keys))
    assert counted_flops(lambda: masked_attention(q, k, v, 1.0, keys)) == 2 * 2 * heads * channels * scores


def rows_that_must_be_computed(data: PreparedPairs, pair: int) -> list[tuple[int, bool]]:
    """For each row of a pair with a shared prompt, how many tokens it sees, and whether it is of the prompt.

    A row is the text up to a token, and the same text is one row, whichever response it is read for.
    """
    prompt, texts = int(data.prompt_lengths[pair]), set()
    for side in (0, 1):
        sequence = data.sequence(pair, side).tolist()
        texts |= {(tuple(sequence[:seen]), side if seen > prompt else None) for seen in range(1, len(sequence))}
    return [(len(text), side is None) for text, side in texts]


def test_tokens_with_shared_prompts_are_as_many_as_there_are_different_texts_that_end_in_a_token() -> None:
    data = ultrafeedback_like(6, longest=200)
    found = counts._real_tokens(data, torch.arange(6).numpy())
    assert found.tolist() == [len(rows_that_must_be_computed(data, pair)) for pair in range(6)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_operations_of_context_parallel_ranks_are_together_those_of_every_row_key_and_label(ranks: int) -> None:
    data = ultrafeedback_like(5, longest=150)
    parts = [
        make_batch(data, range(5), shared_prompts=True, context_rank=rank, context_ranks=ranks) for rank in range(ranks)
    ]
    seen = [keys for pair in range(5) for keys, _ in rows_that_must_be_computed(data, pair)]
    labels = sum(data.response_length(pair, side) for pair in range(5) for side in (0, 1))
    padding = parts[0].padding
    # Padding of a rank is a segment of its own, less than one row for each rank.
    assert padding < ranks and sum(len(part.tokens) for part in parts) == len(seen) + padding
    assert sum(context.keys_seen(part.plan) for part in parts) == sum(seen) + padding
    weights = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336  # of a layer of Llama-3-8B, without its norms
    body = 32 * ((len(seen) + padding) * weights + 2 * 4096 * (sum(seen) + padding))
    assert sum(map(context.operations, parts)) == 2 * (body + 4096 * 128256 * labels)


def test_bytes_of_context_parallel_ranks_are_what_rings_send_tensor_by_tensor() -> None:
    """Each rank of a ring sends its part of a gathered tensor, or what others are owed of a scattered one."""
    ranks, tokens, labels, weights = 4, 1000, 60, 500_000
    sent = 0.0
    for _ in range(ranks):
        others = ranks - 1
        for _ in range(trace.MODEL.num_layers):
            channels = trace.MODEL.num_query_groups * trace.MODEL.kv_channels
            both = 2 * channels * tokens // ranks  # keys and values of its own tokens
            sent += 4 * both * others  # forward, to gather them
            sent += 4 * both * others  # backward, to give the others their gradients
        sent += 4 * labels / ranks * others
        sent += 2 * 4 * weights / ranks * others  # gradients scattered, weights gathered
    found = trace._expected(ParallelConfig(context_parallel_size=ranks), 1, tokens, labels, weights)
    assert found == pytest.approx(sent)


@pytest.mark.parametrize("at_most", [False, True])
def test_a_row_with_a_limit_is_the_median_share_of_each_batchs_own_limit(at_most: bool) -> None:
    """Three batches whose limits are 2, 4 and 3; the second is measured at 3/4 of its own, the others at theirs."""
    over, under = Timed([2.0, 6.0, 6.0], [20, 80, 60]), Timed([1.0, 2.0, 2.0], [10, 20, 20])
    row = within_limit("x", over, under, at_most=at_most, share=0.9, limit="operations")
    assert row.measured == pytest.approx(160 / 50) and row.verdict == "pass"
    assert row.target == pytest.approx(160 / 50 / 0.9 if at_most else 160 / 50 * 0.9)
    assert row.details["limit"] == pytest.approx(160 / 50) and row.details["reached"] == pytest.approx(1)
    assert row.limit == f"operations; the target is the limit {'/' if at_most else '×'} 0.90"
    slower = Timed([1.7, 3.4, 5.1], over.cost)  # 0.85 of the limit
    assert within_limit("x", slower, under, at_most=False, share=0.9, limit="").verdict == "FAIL"
    longer = Timed([2.3, 4.6 * 2, 6.9], over.cost)  # 1.15 times the limit
    assert within_limit("x", longer, under, at_most=True, share=0.9, limit="").verdict == "FAIL"


def test_what_ran_before_and_after_is_one_measurement() -> None:
    assert Timed([1.0, 3.0, 4.0, 6.0], [7, 7, 9, 9]).mean_of_two() == Timed([2.0, 5.0], [7, 9])


def test_pairs_with_real_lengths_are_as_long_as_the_products_cut_of_the_real_ones(tmp_path: Path) -> None:
    """At every maximum length, from the first that leaves a pair to one that cuts nothing."""
    from tools.make_tiny_model import train_tokenizer

    words = [(60, 5, 30), (3, 40, 2), (25, 25, 24), (1, 1, 70), (90, 12, 11)]  # of prompt, chosen, rejected
    texts = [[" ".join("ab"[place % 2] for place in range(number)) for number in numbers] for numbers in words]
    pairs = tmp_path / "pairs.json"
    columns = ("instruction", "chosen", "rejected")
    pairs.write_text(json.dumps([dict(zip(columns, parts, strict=True)) for parts in texts]))
    tokenizer = train_tokenizer([text for parts in texts for text in parts], vocab_size=300)
    uncut = count_tokens(pairs, tokenizer)
    assert len(uncut) == len(words)
    room_for_one = int(uncut[:, 1:].max(axis=1).min()) + 2
    left = set()
    for longest in range(room_for_one, int(uncut.sum(axis=1).max())):
        data = with_real_lengths(longest, lengths=uncut)
        found = [
            [data.prompt_lengths[pair], *(data.response_length(pair, side) for side in (0, 1))]
            for pair in range(len(data))
        ]
        assert found == count_tokens(pairs, tokenizer, longest).tolist()
        left.add(len(data))
    assert left == {1, 2, 3, 4, 5}, "pairs are dropped at some lengths"


def test_the_real_lengths_are_there_and_both_responses_follow_one_prompt() -> None:
    assert read_lengths().shape == (75, 3) and read_lengths().min() > 0
    data = with_real_lengths(512)
    assert len(data) == 48  # 27 of the real pairs have a response that leaves no room
    for pair, prompt in enumerate(data.prompt_lengths):
        chosen, rejected = (data.sequence(pair, side) for side in (0, 1))
        assert (chosen[:prompt] == rejected[:prompt]).all() and max(len(chosen), len(rejected)) <= 512


def test_long_prompts_are_as_long_as_is_said_and_nothing_is_cut() -> None:
    data = long_prompts()
    assert set(data.prompt_lengths.tolist()) == {PROMPT}
    assert {data.response_length(pair, side) for pair in range(len(data)) for side in (0, 1)} == {RESPONSE}


def test_a_row_is_the_median_of_paired_ratios() -> None:
    row = paired("x", [2.0, 9.0, 4.0], [1.0, 3.0, 4.0], target=2.5)
    assert row.measured == 2.0 and row.verdict == "pass" and row.note == "1.00–3.00 in 3 pairs"


def test_a_broken_or_missed_row_fails_and_a_skipped_one_does_not() -> None:
    assert Row("x", None, broke=True).verdict == "FAIL"
    assert Row("x", 1.1, target=1.0).verdict == "FAIL" and Row("x", 1.1, target=1.0, at_most=False).verdict == "pass"
    assert Row("x", None, note="no data").verdict == "skipped"


def test_the_picture_shows_every_row_with_a_target_and_every_others_step(tmp_path: Path) -> None:
    rows = [
        Row("TGDPO step, CPU time: the authors' computation, against ours", 3.0, target=2.8, at_most=False),
        Row("DPO step, CPU time: TRL's trainer against ours", 1.7),
        Row("our step, CPU time: cached against live", 0.61, target=0.63),
        Row("skipped", None),
    ]
    draw(rows, tmp_path / "bench.svg")
    text = (tmp_path / "bench.svg").read_text()
    assert "3.00×" in text and "1.70×" in text and "0.61 (target ≤ 0.63)" in text and "skipped" not in text
    assert text.count("×") == 2, "our own steps are no one else's"


def test_the_page_shows_the_measured_rows_of_a_file_with_target_and_limit(tmp_path: Path) -> None:
    rows = [
        Row(
            "timed",
            2.9172,
            target=2.6626,
            at_most=False,
            limit="counted",
            file="steps",
            details={"limit": 2.958, "reached": 0.98611},
        ),
        Row("told", 0.91, file="saves"),
        Row("skipped", None, note="no network", file="saves"),
    ]
    write_results(rows, tmp_path / "bench.json")
    tables = speed(tmp_path / "bench.json")
    assert tables["make bench, steps"].splitlines()[2:] == [
        "| timed | 2.92 | ≥ 2.66 | 2.96, counted; 0.986 of it is measured |"
    ]
    assert tables["make bench, saves"].splitlines()[2:] == ["| told | 0.91 | – | – |"]
    assert {words for name, words in tables.items() if name not in ("make bench, steps", "make bench, saves")} == {
        "There are no results of this version yet."
    }


def test_a_row_knows_the_file_that_measured_it_also_one_that_broke() -> None:
    (row,) = run_file("bench.speed.no_such_file")
    assert row.file == "no_such_file" and row.verdict == "FAIL"


def test_the_table_says_measured_target_and_verdict_and_the_words_below() -> None:
    text = table(
        [Row("some row", 1.5, target=2.0, limit="1", note="five pairs"), Row("other", None, note="no network")]
    )
    assert text.splitlines()[1:] == [
        "some row       1.5       ≤2  pass",
        "    limit 1; five pairs",
        "other            –        –  skipped",
        "    no network",
    ]
