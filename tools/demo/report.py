"""The demo's report: the answers of the three models, the curves of training, and what the token rewards found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tgdpo_megatron.report.curves import ACCURACY, metric_chart
from tgdpo_megatron.report.page import (
    Answer,
    Commands,
    Curves,
    Facts,
    Page,
    Sample,
    Section,
    Table,
    TokenPair,
    TokenPairs,
    build_page,
    reward_limit,
)
from tgdpo_megatron.report.plots import Chart, Token, figure_svg
from tgdpo_megatron.report.words import percent
from tools.demo.journal import BETA, BETA_R, MODELS, NOISE, RUNS, Effort, Journal, Quality, mean, read_metrics
from tools.marked_pairs import Row


def write_report(journal: Journal, effort: Effort, rows: Sequence[Row], found: Sequence[dict[str, Quality]]) -> str:
    """Write report.html, figure.svg and demo.json. Returns the comparison as lines of text.

    Args:
        found: For each start, the quality of every model. All that is shown of single pairs is of the first.
    """
    output = journal.output
    comparison = _comparison(found)
    qualities = found[0]
    by_kind = _exact_match_by_kind(rows, qualities)
    charts = _charts(output)
    token_pairs = read_token_pairs(output, rows)
    auroc, wrong, right = _how_well_rewards_find_mistakes(token_pairs)
    shown = [next(place for place, row in enumerate(rows) if row.kind == kind) for kind in dict.fromkeys(_kinds(rows))]
    shown_pairs = [token_pairs[place] for place in shown]
    settings = _settings(journal, effort)
    page = Page(
        title="TGDPO on Megatron: the demo",
        summary=[
            "A small language model was fine-tuned on question-and-answer examples of which "
            f"{NOISE:.0%} were wrong, and then corrected with preference pairs. DPO trained a guidance model. TGDPO, "
            "which weights every token by that guidance, trained the final model, with tensor parallelism 2 × "
            "pipeline parallelism 2 on four processes.",
            f"On {len(rows)} held-out prompts, the share of answers that match the expected text exactly went from "
            f"{_mean_and_range([quality['sft'].exact_share for quality in found])} to "
            f"{_mean_and_range([quality['tgdpo'].exact_share for quality in found])}"
            + (f": the mean, and the range, over {len(found)} starts." if len(found) > 1 else "."),
        ],
        sections=[
            Section("Before and after", [comparison]),
            Section("Exact match by kind of question", [_kinds_table(by_kind, rows)]),
            Section("Curves", [Curves(charts), Curves(_loss_charts(output), small=True)]),
            Section(
                "What the guidance says, token by token",
                [
                    f"The colour is the token reward r̂ = {BETA_R} × (log-prob under the guidance − log-prob under the "
                    "SFT model), in nats, for one held-out pair of each kind. TGDPO gives more weight to tokens of "
                    "chosen answers that the guidance likes, and to tokens of rejected answers that it dislikes.",
                    f"Over the rejected answers of all {len(rows)} held-out pairs, −r̂ ranks a token known to be wrong "
                    f"above one that is right with probability {auroc:.3f} (AUROC over {wrong} wrong and {right} right "
                    "tokens; 0.5 would be chance). Nothing told the models which tokens are wrong.",
                    TokenPairs(shown_pairs),
                ],
            ),
            Section(
                "Answers to held-out prompts", [_sample(rows[place], qualities, place) for place in _samples(rows)]
            ),
            Section("Data", _data_notes(output)),
            Section(
                "Commands",
                [
                    Commands(
                        [
                            "# hf/start was made with train_tokenizer and make_model of tools.make_tiny_model",
                            *journal.commands,
                        ]
                    )
                ],
            ),
            Section("Versions and settings", [Facts(settings)]),
        ],
    )
    (output / "report.html").write_text(build_page(page), encoding="utf-8")
    _write_figure(output, charts, shown_pairs)
    summary = {
        "comparison": {MODELS[name]: _numbers(found, name) for name in MODELS},
        "exact_match_by_kind": by_kind,
        "wrong_token_auroc": auroc,
        "stage_seconds": journal.stages,
        "peak_memory_gib": journal.memory.peak / 2**30,
        "settings": dict(settings),
        "effort": asdict(effort),
        "commands": journal.commands,
    }
    (output / "demo.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return _as_text(comparison)


def read_token_pairs(output: Path, rows: Sequence[Row]) -> list[TokenPair]:
    """The held-out pairs token by token, with r̂ from cached scores and with the known mistakes marked."""
    from tgdpo_megatron.report.run_files import pairs_of, settings_of
    from tgdpo_megatron.report.tokens import REWARD, kept_scores, rewards_from, start_tokenizer, viewed_pairs

    run = output / RUNS["tgdpo"]
    config = settings_of(run)
    data = pairs_of(run, config, "validation")
    pairs = range(len(data))
    rewards = rewards_from(config, data, pairs, kept_scores(run, config, "validation", data, pairs))
    assert rewards is not None, "the demo trains with cached scores"
    viewed = viewed_pairs(start_tokenizer(config), data, pairs, {REWARD: rewards})
    marked = []
    for pair, number in zip(viewed, data.rows, strict=True):
        row = rows[number - 1]
        chosen = _marked(pair.chosen.tokens, pair.chosen.numbers[REWARD], [])
        rejected = _marked(pair.rejected.tokens, pair.rejected.numbers[REWARD], row.wrong)
        marked.append(TokenPair(row.prompt, chosen, rejected))
    return marked


def _marked(texts: Sequence[str], rewards: Sequence[float], spans: Sequence[Sequence[int]]) -> list[Token]:
    """Tokens with their rewards. A token is wrong if it shares a character with a span."""
    tokens, start = [], 0
    for text, reward in zip(texts, rewards, strict=True):
        end = start + len(text)
        tokens.append(Token(text, reward, any(first < end and start < last for first, last in spans)))
        start = end
    return tokens


def _how_well_rewards_find_mistakes(pairs: Sequence[TokenPair]) -> tuple[float, int, int]:
    """AUROC of −r̂ for wrong against right tokens of rejected responses, and the numbers of wrong and right tokens."""
    tokens = [token for pair in pairs for token in pair.rejected]
    wrong = [-token.reward for token in tokens if token.wrong]
    right = [-token.reward for token in tokens if not token.wrong]
    return area_under_roc(wrong, right), len(wrong), len(right)


def area_under_roc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive scores above a negative, from the Mann-Whitney rank sum. Ties count half."""
    ranked = sorted([(value, True) for value in positive] + [(value, False) for value in negative])
    rank_sum, first = 0.0, 0
    while first < len(ranked):
        last = first
        while last < len(ranked) and ranked[last][0] == ranked[first][0]:
            last += 1
        mean_rank = (first + 1 + last) / 2  # ranks count from 1, and equal values share their mean rank
        rank_sum += mean_rank * sum(is_positive for _, is_positive in ranked[first:last])
        first = last
    n = len(positive)
    return (rank_sum - n * (n + 1) / 2) / (n * len(negative))


def _numbers(found: Sequence[dict[str, Quality]], name: str) -> dict[str, list[float]]:
    """What was measured of a model, once for every start."""
    return {
        "accuracy": [qualities[name].accuracy for qualities in found],
        "logp_margin_nats": [mean(qualities[name].margins) for qualities in found],
        "exact_match": [qualities[name].exact_share for qualities in found],
    }


def _comparison(found: Sequence[dict[str, Quality]]) -> Table:
    rows = []
    for name, words in MODELS.items():
        numbers = _numbers(found, name)
        margins = numbers["logp_margin_nats"]
        rows.append(
            [
                words,
                _mean_and_range(numbers["accuracy"]),
                f"{mean(margins):.2f}" + (f" ({min(margins):.2f} to {max(margins):.2f})" if len(found) > 1 else ""),
                _mean_and_range(numbers["exact_match"]),
            ]
        )
    starts = (
        f"The mean over {len(found)} starts, and in brackets the lowest and the highest: each start has other random "
        "weights and another order of the pairs. "
    )
    return Table(
        ("model", "preference accuracy", "log-prob margin (nats)", "exact match"),
        rows,
        (starts if len(found) > 1 else "")
        + "Measured on held-out pairs, with the exported models in transformers, fp32. Preference accuracy: the share "
        "of pairs whose chosen answer is more likely than the rejected one. Log-prob margin: log-prob of the chosen "
        "minus log-prob of the rejected answer, mean over pairs. Exact match: the share of greedy answers that equal "
        "the chosen answer. The curves show reward accuracy instead, the share of pairs whose margin is larger than "
        "the SFT model's. Steps and learning rates were chosen by looking at the held-out pairs of seed 0, so other "
        "seeds (--seed) are a fairer measure.",
    )


def _mean_and_range(shares: Sequence[float]) -> str:
    """`66 % (60–71)`; without the range for a single share."""
    if len(shares) == 1:
        return f"{shares[0]:.1%}"
    return f"{mean(shares):.1%} ({100 * min(shares):.0f}–{100 * max(shares):.0f})"


def _exact_match_by_kind(rows: Sequence[Row], qualities: dict[str, Quality]) -> dict[str, dict[str, float]]:
    """Kind -> model -> share of exact answers."""
    shares = {}
    for kind in sorted(set(_kinds(rows))):
        places = [place for place, row in enumerate(rows) if row.kind == kind]
        shares[kind] = {
            MODELS[name]: mean([quality.exact[place] for place in places]) for name, quality in qualities.items()
        }
    return shares


def _kinds_table(by_kind: dict[str, dict[str, float]], rows: Sequence[Row]) -> Table:
    kinds = _kinds(rows)
    lines = [
        [kind, str(kinds.count(kind)), *(f"{share:.1%}" for share in shares.values())]
        for kind, shares in by_kind.items()
    ]
    return Table(("kind", "prompts", *MODELS.values()), lines)


def _charts(output: Path) -> list[Chart]:
    """Rewards of both preference runs, which mean the same for both."""
    runs = {_short(name): read_metrics(output / RUNS[name]) for name in ("dpo", "tgdpo")}
    margins = {name: (steps, "rewards/margins") for name, steps in runs.items()}
    accuracies = {name: (steps, ACCURACY) for name, steps in runs.items()}
    return [
        metric_chart("Reward margin", "mean β·log-ratio, chosen − rejected", margins),
        metric_chart("Reward accuracy", "share of pairs with margin > 0", accuracies, percent),
    ]


def _loss_charts(output: Path) -> list[Chart]:
    """Each method's loss on axes of its own, because the losses are different things."""
    return [
        metric_chart(f"Loss of {_short(name)}", "nats", {"": (read_metrics(output / RUNS[name]), "loss")})
        for name in MODELS
    ]


def _short(name: str) -> str:
    """`DPO` for `DPO (the guidance)`."""
    return MODELS[name].partition(" ")[0]


def _write_figure(output: Path, charts: Sequence[Chart], pairs: Sequence[TokenPair]) -> None:
    """Write the picture of the README: margin and accuracy, above one rejected answer of each kind."""
    labelled = [(pair.prompt, pair.rejected) for pair in pairs]
    caption = "Token reward of rejected answers (orange: the guidance dislikes it; underlined: known to be wrong)"
    (output / "figure.svg").write_text(figure_svg(charts, labelled, reward_limit(pairs), caption), encoding="utf-8")


def _sample(row: Row, qualities: dict[str, Quality], place: int) -> Sample:
    answers = [Answer(MODELS[name], found.answers[place], found.exact[place]) for name, found in qualities.items()]
    return Sample(row.prompt, row.chosen, answers)


def _samples(rows: Sequence[Row], each: int = 2) -> list[int]:
    """The first rows of each kind, so that they are not picked by how good the answers are."""
    return [
        place
        for kind in sorted(set(_kinds(rows)))
        for place in [place for place, row in enumerate(rows) if row.kind == kind][:each]
    ]


def _kinds(rows: Sequence[Row]) -> list[str]:
    return [row.kind for row in rows]


def _data_notes(output: Path) -> list[str]:
    """Sentences on the data: how many rows were kept, and how many dropped and why."""
    from tgdpo_megatron.data.prepare import load_prepared

    folders = {
        "Examples for SFT": (output / RUNS["sft"], "train"),
        "Preference pairs": (output / RUNS["tgdpo"], "train"),
        "Held-out pairs": (output / RUNS["tgdpo"], "validation"),
    }
    prepared = {words: next((run / "data").glob(f"{part}-*")) for words, (run, part) in folders.items()}
    return [f"{words}: {load_prepared(folder).summary.sentences()}" for words, folder in prepared.items()]


def _settings(journal: Journal, effort: Effort) -> list[tuple[str, str]]:
    from tgdpo_megatron.report.run_report import versions

    return [
        *versions(),
        ("seed", str(journal.seed)),
        ("wrong SFT examples", f"{NOISE:.0%}"),
        ("β, β_r", f"{BETA}, {BETA_R}"),
        ("steps", f"SFT {effort.sft_iters}, DPO and TGDPO {effort.preference_iters} each, 32 pairs a step"),
        ("seconds", ", ".join(f"{seconds:.0f} ({stage})" for stage, seconds in journal.stages.items())),
        ("every other setting", "config.yaml in the folders sft, aligned/guidance and aligned/policy beside this file"),
    ]


def _as_text(table: Table) -> str:
    """A table in aligned columns."""
    lines = [list(table.columns), *map(list, table.rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(table.columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) if not place else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    )
