"""What bench.fp8 says: rows with their targets, tables in Markdown for docs/fp8.md, and a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from bench.fp8.cases import BF16, CASES, REGROUPED, SCALE_ONE, TRAINED
from bench.pages import markdown_table
from bench.rows import Row
from tgdpo_megatron.report.plots import Bars, Chart, Line, Series, grid_svg

NAME = "written by python -m bench.fp8"
"""Of the tables in their page."""
WORDS = {
    "policy": "policy",
    "frozen": "frozen, cached",
    "all, same packs": "all, live",
    "all, other packs": "all, frozen cached",
}
"""Which models are in FP8, as the tables name it."""
LONG = 400
"""Tokens of an ordinary answer of a large model."""
SMOOTHED = 10
"""Steps that a curve's point is the mean of."""

Numbers = dict[str, Any]


def rows(summary: Numbers) -> list[Row]:
    """What a policy in FP8 must not do, set before it was measured."""
    found = [
        Row(
            "loss at step 0 in bf16, away from ln 2",
            abs(summary["curves"][BF16]["loss"][0] - math.log(2)),
            # On a GPU a product's kernel depends on its height, so that other packs round differently.
            1e-6 if summary["where"] == "emulated on CPU" else None,
            limit="policy = reference, in other packs",
        )
    ]
    ends = {name: run["exported"]["accuracy"] for name, run in summary["curves"].items()}
    for recipe in TRAINED:
        drift = summary["trained"]["recipes"][recipe]["policy"]["reward_margin"]["std"]
        found += [
            Row(
                f"{recipe}: noise of reward margins / their spread",
                drift / summary["trained"]["spread"]["reward_margin"],
                0.1,
                limit="policy alone in FP8",
            ),
            Row(
                f"{recipe}: loss curve away from bf16's / what training gains",
                _apart(summary, recipe)["mean"] / _gain(summary),
                0.05,
                note=f"bf16 in other micro-batches: {_apart(summary, REGROUPED)['mean'] / _gain(summary):.2g}",
            ),
            Row(
                f"{recipe}: held-out accuracy lost, exported",
                ends[BF16] - ends[recipe],
                0.02,
                note=f"of {summary['pairs']} pairs; bf16 in other micro-batches: {ends[BF16] - ends[REGROUPED]:+.2g}",
            ),
        ]
    return found


def markdown(summary: Numbers) -> str:
    """What came out, and all tables, each with what computed FP8 in its title."""
    titles = {
        "Token log-probs, nats: mean · standard deviation · 99th percentile · maximum": _logps(summary),
        "After training: log-ratios, token weights, margins": _trained(summary),
        "How noise adds up over a response, policy alone in FP8": _adding_up(summary),
        "Before training, policy = reference: |loss − ln 2|, mean · maximum over pairs": _step_0(summary),
        "The same response beside other sequences: change of its summed log-prob, nats": _packing(summary),
        f"{summary['effort']['steps']} steps of TGDPO from the same start in the same order": _curves(summary),
    }
    if summary["outliers"]:
        titles["One outlier channel in front of each product: noise of token log-probs, std, nats"] = _outliers(summary)
    said = "\n".join(f"- {sentence}" for sentence in headlines(summary))
    return (
        said + "\n\n" + "\n\n".join(f"**{title}** ({summary['where']})\n\n{table}" for title, table in titles.items())
    )


def headlines(summary: Numbers) -> list[str]:
    """What came out, in sentences made of the numbers; those of recipes in the order of TRAINED."""
    of, curves = summary["trained"], summary["curves"]
    spread = of["spread"]["reward_margin"]

    def each(form: Callable[[str], str]) -> str:
        return ", ".join(map(form, TRAINED))

    def exported(name: str) -> str:
        return f"{100 * curves[name]['exported']['accuracy']:.1f}"

    def margins(case: str) -> str:
        return each(lambda recipe: f"{100 * of['recipes'][recipe][case]['reward_margin']['std'] / spread:.1f}")

    names = ", ".join(TRAINED)
    together = each(lambda recipe: f"{summary['correlation'][recipe]:.2f}")
    floor = (
        f"; bf16's own against fp32: {100 * of['floor']['reward_margin']['std'] / spread:.1f} %"
        if "floor" in of
        else ""
    )
    signs = each(lambda recipe: str(of["recipes"][recipe]["policy"]["signs"]))
    return [
        f"Policy alone in FP8 ({names}): noise of reward margins is {margins('policy')} % of their spread{floor}. "
        f"{signs} of {summary['pairs']} margins change sign.",
        f"Frozen models in FP8 too: {margins('all, same packs')} % live, {margins('all, other packs')} % cached. The "
        f"policy's noise and the reference's correlate by "
        f"{together} after training; 1 would cancel, 0 adds up.",
        f"Over {summary['effort']['steps']} steps the loss is away from bf16's by "
        f"{each(lambda recipe: format(_apart(summary, recipe)['mean'], '.1e'))} nats in the mean; it falls by "
        f"{_gain(summary):.2f}. bf16 in other micro-batches is away by {_apart(summary, REGROUPED)['mean']:.1e}.",
        f"Held-out accuracy after export to bf16: {each(exported)} %; trained in bf16: {exported(BF16)} %, in other "
        f"micro-batches {exported(REGROUPED)} %. One pair is {100 / summary['pairs']:.2g} points.",
    ]


def tables(summary: Numbers) -> dict[str, str]:
    """What stands in the page: name -> text."""
    machine = summary["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "megatron-core"))
    origin = f"Commit {machine['commit']}, {machine['date']}; {versions}; {summary['cpu_seconds']} CPU seconds."
    return {NAME: f"{markdown(summary)}\n\n{origin}"}


def picture(summary: Numbers) -> str:
    """Loss curves and how far they are apart; noise of the log-ratio and of the margins."""
    steps = summary["effort"]["steps"]
    bf16 = summary["curves"][BF16]["loss"]
    losses, apart = [], []
    for colour, (name, run) in enumerate(summary["curves"].items()):
        x = range(1, steps + 1)
        losses.append(Line(name, x, _smoothed(run["loss"]), colour=colour))
        distance = [abs(here - there) for here, there in zip(run["loss"], bf16, strict=True)]
        apart.append(Line(name, x, _smoothed(distance), colour=colour))
    recipes = [recipe for recipe in summary["trained"]["recipes"] if recipe != SCALE_ONE]

    def bars(title: str, label: str, what: str, scale: float) -> Bars:
        of = summary["trained"]["recipes"]
        series = [
            Series(
                WORDS[case], [scale * of[recipe][case][what]["std"] for recipe in recipes], [math.nan] * len(recipes)
            )
            for case in CASES
        ]
        floor = summary["trained"].get("floor")
        return Bars(title, label, recipes, series, mark=scale * floor[what]["std"] if floor else 0.0)

    margins = 100 / summary["trained"]["spread"]["reward_margin"]
    where = summary["where"]
    return grid_svg(
        [
            Chart(f"TGDPO's loss (mean of {SMOOTHED} steps)", "optimizer step", "loss, nats", losses),
            Chart(f"Distance from bf16's loss ({where})", "optimizer step", "|difference|, nats", apart),
            bars("Noise of log π/π_ref, trained policy", "nats per token, std (line: bf16)", "policy_ratio", 1),
            bars("Noise of reward margins", "% of their spread (line: bf16)", "reward_margin", margins),
        ],
        columns=2,
    )


def _logps(summary: Numbers) -> str:
    models = list(summary["logps"])
    lines = [
        [_named(of), *(_words(summary["logps"][model][of], "mean", "std", "p99", "max") for model in models)]
        for of in summary["logps"]["policy"]
    ]
    return markdown_table(
        ["", *(f"the {model}" if model != "policy" else "the trained policy" for model in models)], lines
    )


def _named(arithmetic: str) -> str:
    return "bf16 less fp32" if arithmetic == BF16 else f"{arithmetic} less bf16"


def _trained(summary: Numbers) -> str:
    of, pairs = summary["trained"], summary["pairs"]
    margins = of["spread"]["reward_margin"]
    kinds = [("bf16 less fp32", "all", of["floor"])] if "floor" in of else []
    kinds += [(recipe, WORDS[case], of["recipes"][recipe][case]) for recipe in TRAINED for case in CASES]
    lines = [
        [
            recipe,
            case,
            _words(drift["policy_ratio"], "std", "p99", "max"),
            _words(drift["guidance_ratio"], "std", "p99", "max"),
            _words(drift["reward"], "std"),
            _words(drift["weight"], "std", "max"),
            f"{_words(drift['reward_margin'], 'std')} ({100 * drift['reward_margin']['std'] / margins:.1f} %)",
            f"{drift['signs']} of {pairs}",
            f"{drift['loss']['mean']:+.1e}",
        ]
        for recipe, case, drift in kinds
    ]
    spread = of["spread"]
    lines.append(
        [
            "spread in bf16",
            "–",
            *(
                _number(spread[name])
                for name in ("policy_ratio", "guidance_ratio", "reward", "weight", "reward_margin")
            ),
            "–",
            "–",
        ]
    )
    columns = [
        "recipe",
        "in FP8",
        "policy's log-ratio: std · p99 · max, nats",
        "guidance's log-ratio",
        "r̂: std",
        "token weight: std · max",
        "reward margin: std (of its spread)",
        "margins that change sign",
        "mean loss",
    ]
    return markdown_table(columns, lines)


def _adding_up(summary: Numbers) -> str:
    length, beta = summary["tokens_of_a_response"], summary["beta"]
    lines = []
    for recipe in TRAINED:
        drift = summary["trained"]["recipes"][recipe]["policy"]
        token, response = drift["policy_ratio"]["std"], drift["response_ratio"]["std"]
        faster = response / (token * math.sqrt(length))
        long = beta * math.sqrt(2 * LONG) * token * faster
        together = f"{summary['correlation'][recipe]:+.2f}"
        lines.append([recipe, together, _number(token), _number(response), f"{faster:.2f}", _number(long)])
    columns = [
        "recipe",
        "correlation with the reference's noise, same packs",
        "a token: std, nats",
        f"a response of {length:.0f} tokens: std",
        "in √tokens · a token's",
        f"derived: reward margin of responses of {LONG} tokens",
    ]
    return markdown_table(columns, lines)


def _outliers(summary: Numbers) -> str:
    sizes = list(summary["outliers"][BF16])
    lines = [
        [arithmetic, *(_words(drifts[size], "std") for size in sizes)]
        for arithmetic, drifts in summary["outliers"].items()
    ]
    return markdown_table(["arithmetic", *(f"{size}×" if size != "1" else "none" for size in sizes)], lines)


def _step_0(summary: Numbers) -> str:
    of = summary["step_0"]
    lines = [
        [recipe, *(_words(cases[case]["from_ln2"], "size", "max") for case in CASES)]
        for recipe, cases in of["recipes"].items()
    ]
    return markdown_table(["recipe", *(f"in FP8: {WORDS[case]}" for case in CASES)], lines)


def _packing(summary: Numbers) -> str:
    models = ("policy", "reference", "guidance")
    lines = [
        [
            arithmetic,
            *(
                f"{_words(summary['packing'][model][arithmetic]['responses'], 'std', 'max')} "
                f"({100 * summary['packing'][model][arithmetic]['moved']:.0f} %)"
                for model in models
            ),
        ]
        for arithmetic in summary["packing"]["policy"]
    ]
    columns = [f"{model}: std · max (responses that change)" for model in models]
    return markdown_table(["arithmetic", *columns], lines)


def _curves(summary: Numbers) -> str:
    lines = []
    for name, run in summary["curves"].items():
        apart = _apart(summary, name)
        last = run["accuracy"][-SMOOTHED:]
        lines.append(
            [
                name,
                "–" if name == BF16 else f"{apart['mean']:.1e} · {apart['max']:.1e}",
                f"{sum(run['loss'][-SMOOTHED:]) / len(last):.4f}",
                f"{100 * sum(last) / len(last):.1f}",
                *(f"{100 * run[end]['accuracy']:.1f} · {run[end]['loss']:.4f}" for end in ("held_out", "exported")),
            ]
        )
    columns = [
        "policy",
        "loss away from bf16's: mean · max, nats",
        f"last {SMOOTHED} steps: loss",
        "reward accuracy, %",
        "held out, as trained: accuracy % · loss",
        "held out, exported to bf16",
    ]
    return markdown_table(columns, lines)


def _apart(summary: Numbers, name: str) -> Numbers:
    here, there = summary["curves"][name]["loss"], summary["curves"][BF16]["loss"]
    distances = [abs(a - b) for a, b in zip(here, there, strict=True)]
    return {"mean": sum(distances) / len(distances), "max": max(distances)}


def _gain(summary: Numbers) -> float:
    """By how much bf16's loss falls, first steps to last."""
    smooth = summary["curves"][BF16]["loss"]
    few = min(SMOOTHED, len(smooth) // 2)
    return (sum(smooth[:few]) - sum(smooth[-few:])) / few


def _smoothed(values: Sequence[float]) -> list[float]:
    windows = [values[max(0, place + 1 - SMOOTHED) : place + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _words(drift: Numbers, *names: str) -> str:
    return " · ".join(_number(drift[name]) for name in names)


def _number(value: float) -> str:
    """Two digits that count."""
    return f"{value:.2g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.0e}"
