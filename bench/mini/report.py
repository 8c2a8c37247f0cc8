"""What the miniature says: every claim judged, tables for docs/miniature.md, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

import numpy as np

from bench.mini.measures import at_divergence, steps_to_reach
from bench.mini.methods import SPREADS
from bench.mini.rules import CLAIMS, QUESTIONS, Claim, judge
from bench.mini.stages import EVALUATED_EVERY, Effort
from bench.pages import markdown_table
from tgdpo_megatron.report.plots import Bars, Chart, Line, Series, grid_svg

NAME = "written by python -m bench.mini"
"""Of the tables in their page."""
METHODS = {
    "DPO": "DPO",
    "SimPO": "SimPO",
    "TGDPO": "TGDPO",
    "guided-otherwise": "TGDPO, guided by DPO at another β",
    "same-beta": "control: DPO with TGDPO's β",
    "shuffled": "control: TGDPO, r̂ shuffled within an answer",
    "mean": "control: TGDPO, r̂ averaged over an answer",
    "true": "control: TGDPO, true token rewards",
}
"""Run -> what the tables call it."""
LONG = {"DPO": "DPO", "SimPO": "SimPO", "TGDPO": "TGDPO", "same-beta": "DPO with TGDPO's β"}
"""Runs of several epochs -> what the table and the picture of epochs call them."""
WINS = {
    "C1": ("TGDPO", "DPO"),
    "C2": ("TGDPO", "SimPO"),
    "C5": ("guided-otherwise", "TGDPO"),
    "Q2": ("TGDPO", "shuffled"),
    "Q3": ("TGDPO", "mean"),
    "Q4": ("true", "same-beta"),
    "Q7": ("TGDPO", "same-beta"),
}
"""Claims about the win rates of two runs after one epoch."""
MOVED = ("right in chosen", "right in rejected", "wrong in chosen", "wrong in rejected")
DRAWS = 2000

Numbers = dict[str, Any]
"""JSON types."""


def summarise(found: Numbers, effort: Effort) -> Numbers:
    """All numbers that the tables and the picture are made of.

    Args:
        found: What `compare` returned.
    """
    runs = {(run["name"], run["seed"]): run for run in found["runs"]}
    starts = {world["seed"]: _of_answers(world["start"]) for world in found["worlds"]}
    seeds = [_Seed(runs, seed, starts[seed], effort) for seed in effort.seeds]
    values = {claim.name: [_VALUES[claim.name](seed) for seed in seeds] for claim in _ALL}
    return {
        "effort": asdict(effort),
        **{name: found[name] for name in ("tried", "chosen")},
        "worlds": [{**world, "start": _of_answers(world["start"])} for world in found["worlds"]],
        "start": [starts[seed] for seed in effort.seeds],
        "claims": {
            claim.name: {"values": values[claim.name], **asdict(judge(values[claim.name], claim.within))}
            for claim in _ALL
        },
        "prompts": {claim: _over_prompts(runs, effort, *names) for claim, names in WINS.items()},
        "curves": {name: [_curve(runs[name, seed]) for seed in effort.seeds] for name in METHODS},
        "moved": {name: [runs[name, seed]["moved"] for seed in effort.seeds] for name in METHODS},
        "accuracy": {
            name: [list(seed.accuracy(name).items()) for seed in seeds]
            for name in ("DPO", *(f"spread-{spread:g}" for spread in SPREADS))
        },
    }


_ALL = (*CLAIMS, *QUESTIONS)


class _Seed:
    """The runs of one seed."""

    def __init__(self, runs: Mapping[tuple[str, int], Numbers], seed: int, start: Numbers, effort: Effort) -> None:
        self.runs, self.seed, self.start, self.effort = runs, seed, start, effort

    def win(self, name: str, epochs: int = 1) -> float:
        """Win rate against the start, %."""
        return 100 * mean(self.runs[name, self.seed]["checks"][epochs * self.effort.epoch]["wins"])

    def drop(self, name: str) -> float:
        """From the best checkpoint to the last, points."""
        wins = [point["win"] for point in _curve(self.runs[name, self.seed])]
        return max(wins) - wins[-1]

    def accuracy(self, name: str) -> dict[int, float]:
        """Held-out preference accuracy of the steps of one epoch."""
        run = self.runs.get((name, self.seed)) or self.runs["TGDPO", self.seed]  # at the spread that was tuned
        return {step: value for step, value in run["accuracy"].items() if step <= self.effort.epoch}

    def steps(self, spread: float) -> int:
        """Until the accuracy is DPO's best."""
        target = max(self.accuracy("DPO").values())
        late = self.effort.epoch + EVALUATED_EVERY
        return steps_to_reach(target, self.accuracy(f"spread-{spread:g}"), otherwise=late)

    def at_equal_divergence(self, *names: str) -> list[float]:
        """The known reward of runs where both are as far from the start."""
        curves = [_curve(self.runs[name, self.seed]) for name in names]
        level = max(0.0, min(max(point["kl"] for point in curve) for curve in curves))  # what is sampled can be below 0
        return [
            at_divergence(
                level,
                [0.0, *(point["kl"] for point in curve)],
                [self.start["reward"], *(point["reward"] for point in curve)],
            )
            for curve in curves
        ]

    def moved(self, name: str, which: str) -> float:
        return float(self.runs[name, self.seed]["moved"][which])


_VALUES: dict[str, Callable[[_Seed], float]] = {
    **{claim: lambda seed, of=of: seed.win(of[0]) - seed.win(of[1]) for claim, of in WINS.items()},
    "C3, DPO": lambda seed: seed.drop("DPO") - seed.drop("TGDPO"),
    "C3, SimPO": lambda seed: seed.drop("SimPO") - seed.drop("TGDPO"),
    "C4": lambda seed: seed.steps(SPREADS[0]) - seed.steps(SPREADS[-1]),
    "Q1": lambda seed: float(np.subtract(*seed.at_equal_divergence("TGDPO", "DPO"))),
    "Q5": lambda seed: seed.win("TGDPO") - seed.win("DPO", epochs=2),
    "Q6": lambda seed: seed.moved("TGDPO", "right in chosen") - seed.moved("same-beta", "right in chosen"),
    "Q8": lambda seed: seed.drop("same-beta") - seed.drop("TGDPO"),
}
"""The number of a seed, as rules.py says it in words."""


def _curve(run: Numbers) -> list[Numbers]:
    """What was found at each checkpoint."""
    return [
        {"step": step, "win": 100 * mean(check["wins"]), "kl": check["kl"], **_of_answers(check)}
        for step, check in sorted(run["checks"].items())
    ]


def _of_answers(judged: Numbers) -> Numbers:
    """What is known of answers without comparing them. `unfinished` in %."""
    return {"reward": judged["reward"], "tokens": judged["tokens"], "unfinished": 100 * judged["unfinished"]}


def _over_prompts(runs: Mapping[tuple[str, int], Numbers], effort: Effort, one: str, other: str) -> list[float]:
    """95 % of the bootstrap over prompts of a difference between win rates: the seeds as they are, points."""
    chance = np.random.default_rng(0)
    draws = np.zeros(DRAWS)
    for seed in effort.seeds:
        wins = [np.array(runs[name, seed]["checks"][effort.epoch]["wins"]) for name in (one, other)]
        prompts = len(wins[0])
        counts = chance.multinomial(prompts, np.full(prompts, 1 / prompts), size=DRAWS)
        draws += 100 * (counts @ (wins[0] - wins[1])) / prompts / len(effort.seeds)
    return [float(bound) for bound in np.quantile(draws, [0.025, 0.975])]


# ---------------------------------------------------------------- tables


def markdown(summary: Numbers) -> str:
    """All tables."""
    titles = {
        "What the rules say of the paper's claims": _verdicts(summary, CLAIMS),
        "What they say of the questions": _verdicts(summary, QUESTIONS),
        "After one epoch, mean ± standard deviation over the seeds": _methods(summary),
        "Three epochs at a constant learning rate: win rate against the start, %": _epochs(summary),
        "How far one epoch moved the log-prob of a held-out token, nats": _moved(summary),
        "Steps until the held-out preference accuracy is the best of DPO's first epoch": _steps(summary),
        "Seed by seed: KL divergence from the start after one epoch and after three, nats": _distances(summary),
        "The worlds: share of comparisons that agree with the known reward, %": _worlds(summary),
        "All configurations that were tried, in the tuning world, after one epoch": _tried(summary),
    }
    return "\n\n".join(f"**{title}**\n\n{table}" for title, table in titles.items())


def tables(summary: Numbers) -> dict[str, str]:
    """What stands in the page: name -> text."""
    machine = summary["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "megatron-core", "transformers"))
    took = f"{summary['seconds'] / 60:.0f} minutes on {machine['cores']} cores, {summary['cpu_seconds']} CPU seconds"
    origin = f"Commit {machine['commit']}, {machine['date']}; {versions}; {took}."
    return {NAME: f"{markdown(summary)}\n\n{origin}"}


def _verdicts(summary: Numbers, claims: Sequence[Claim]) -> str:
    lines = []
    words = {"reproduced": "yes", "contradicted": "no"} if claims is QUESTIONS else {}
    for claim in claims:
        found = summary["claims"][claim.name]
        form = "+.2f" if claim.unit in ("nats", "reward") else "+.1f"
        interval = f"{_signed(found['low'], form)} to {_signed(found['high'], form)}"
        of_prompts = summary["prompts"].get(claim.name)
        prompts = f"{_signed(of_prompts[0], form)} to {_signed(of_prompts[1], form)}" if of_prompts else "–"
        lines.append(
            [
                claim.name,
                claim.says,
                f"{_signed(found['mean'], form)} {claim.unit}",
                interval,
                prompts,
                f"{found['detectable']:{form[1:]}}" if claim.within is None and found["low"] < found["high"] else "–",
                f"**{words.get(found['verdict'], found['verdict'])}**",
            ]
        )
    columns = [
        "",
        "question" if words else "claim",
        "mean",
        "95 % interval",
        "bootstrap over prompts",
        "smallest detectable effect",
        "verdict",
    ]
    return markdown_table(columns, lines, words=2)


def _methods(summary: Numbers) -> str:
    epoch = summary["effort"]["epoch"]
    lines = [
        [
            "the start",
            "50",
            *_over(summary["start"], reward="+.2f"),
            "0",
            *_over(summary["start"], tokens=".1f", unfinished=".1f"),
        ]
    ]
    points = {words: _at(summary, name, epoch) for name, words in METHODS.items()}
    points["control: DPO, two epochs"] = _at(summary, "DPO", 2 * epoch)
    for words, found in points.items():
        lines.append([words, *_over(found, win=".1f", reward="+.2f", kl=".1f", tokens=".1f", unfinished=".1f")])
    columns = ["method", "win rate, %", "known reward", "KL to the start, nats", "tokens", "unfinished, %"]
    return markdown_table(columns, lines)


def _epochs(summary: Numbers) -> str:
    effort = summary["effort"]
    steps = [point["step"] for point in summary["curves"]["DPO"][0]]
    lines = []
    for name, words in LONG.items():
        curves = summary["curves"][name]
        cells = [_over(_at(summary, name, step), win=".1f")[0] for step in steps]
        drops = [max(point["win"] for point in curve) - curve[-1]["win"] for curve in curves]
        since = [
            at["win"] - curve[-1]["win"] for at, curve in zip(_at(summary, name, effort["epoch"]), curves, strict=True)
        ]
        lines.append([words, *cells, _words(drops, ".1f"), _words(since, "+.1f")])
    epochs = [f"{step / effort['epoch']:g} epoch{'s' if step > effort['epoch'] else ''}" for step in steps]
    return markdown_table(["method", *epochs, "best less last", "1 epoch less last"], lines)


def _distances(summary: Numbers) -> str:
    effort = summary["effort"]
    lines = []
    for name, words in LONG.items():
        first, last = _at(summary, name, effort["epoch"]), (curve[-1] for curve in summary["curves"][name])
        lines.append(
            [
                words,
                *(f"{_signed(a['kl'], '.1f')}; {_signed(b['kl'], '.1f')}" for a, b in zip(first, last, strict=True)),
            ]
        )
    return markdown_table(["method", *(f"seed {seed}" for seed in effort["seeds"])], lines)


def _moved(summary: Numbers) -> str:
    lines = []
    for name, words in METHODS.items():
        found = summary["moved"][name]
        lines.append([words, *(_words([one[which] for one in found], "+.2f") for which in MOVED)])
    return markdown_table(["method", *MOVED], lines)


def _steps(summary: Numbers) -> str:
    effort = summary["effort"]
    targets = [max(value for _, value in curve) for curve in summary["accuracy"]["DPO"]]
    late = effort["epoch"] + EVALUATED_EVERY
    lines = []
    for name in summary["accuracy"]:
        curves = [{int(step): value for step, value in curve} for curve in summary["accuracy"][name]]
        steps = [steps_to_reach(target, curve, otherwise=late) for target, curve in zip(targets, curves, strict=True)]
        best = [100 * max(curve.values()) for curve in curves]
        words = name if name == "DPO" else f"TGDPO, token weights ± {name.removeprefix('spread-')}"
        never = sum(step == late for step in steps)
        lines.append([words, _words(steps, ".0f"), f"{never} of {len(steps)}", _words(best, ".1f")])
    return markdown_table(["run", "steps", "seeds that do not reach it", "best accuracy, %"], lines)


def _worlds(summary: Numbers) -> str:
    names = {"scorer_right": "scorer, answers of the start", "pairs_right": "pairs"}
    lines = [
        [
            f"{world['seed']}" + (" (tuning)" if world["seed"] == summary["effort"]["tuning_seed"] else ""),
            *(f"{100 * world[name]:.1f}" for name in names),
            str(world["pairs"]),
        ]
        for world in summary["worlds"]
    ]
    return markdown_table(["seed", *names.values(), "number of pairs"], lines)


def _tried(summary: Numbers) -> str:
    lines = []
    for name, tried in summary["tried"].items():
        for one in tried:
            words = f"**{one['setting']}**" if one["setting"] == summary["chosen"][name] else one["setting"]
            shares = (f"{100 * one[share]:.1f}" for share in ("seen", "known", "unfinished"))
            lines.append([name, words, *shares])
    columns = ["method", "configuration", "scorer's win rate, %", "by the known reward, %", "unfinished, %"]
    return markdown_table(columns, lines, words=2) + "\n\nBold: what was chosen."


def _at(summary: Numbers, name: str, step: int) -> list[Numbers]:
    """What was found at a step, by seed."""
    return [next(point for point in curve if point["step"] == step) for curve in summary["curves"][name]]


def _over(found: Sequence[Numbers], **forms: str) -> list[str]:
    return [_words([one[name] for one in found], form) for name, form in forms.items()]


def _words(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation."""
    return f"{_signed(mean(values), form)} ± {stdev(values):{form.lstrip('+')}}"


def _signed(value: float, form: str) -> str:
    return f"{value:{form}}".replace("-", "−")


# ---------------------------------------------------------------- the picture


def picture(summary: Numbers) -> str:
    """Win rates over three epochs, reward over distance, tokens moved, accuracy over steps."""
    epoch = summary["effort"]["epoch"]
    wins, distances = [], []
    for colour, (name, words) in enumerate(LONG.items()):
        steps = [point["step"] for point in summary["curves"][name][0]]
        points = [_at(summary, name, step) for step in steps]
        wins.append(
            Line(
                words, [0, *(step / epoch for step in steps)], [50, *(_mean(at, "win") for at in points)], True, colour
            )
        )
        reward = [_mean(summary["start"], "reward"), *(_mean(at, "reward") for at in points)]
        distances.append(Line(words, [0, *(_mean(at, "kl") for at in points)], reward, True, colour))
    accuracy = []
    for colour, (name, curves) in enumerate(summary["accuracy"].items()):
        words = name if name == "DPO" else f"TGDPO, weights ± {name.removeprefix('spread-')}"
        # Before the first step nothing is gained on either answer, which counts as not preferred.
        heights = [100 * mean(value for _, value in at) for at in zip(*curves, strict=True)][1:]
        accuracy.append(Line(words, [step for step, _ in curves[0]][1:], heights, True, colour))
    moved = [
        Series(
            which,
            [mean(one[which] for one in summary["moved"][name]) for name in METHODS],
            [stdev(one[which] for one in summary["moved"][name]) for name in METHODS],
        )
        for which in ("right in chosen", "wrong in rejected")
    ]
    return grid_svg(
        [
            Chart("Win rate against the start, known reward", "epochs", "%", wins),
            Chart("Known reward over distance", "KL to the start, nats per answer", "known reward", distances),
            Chart("Held-out preference accuracy", "step", "%", accuracy),
            Bars("Log-prob of held-out tokens, one epoch", "nats", list(METHODS.values()), moved),
        ],
        columns=2,
    )


def _mean(found: Sequence[Numbers], name: str) -> float:
    return mean(one[name] for one in found)
