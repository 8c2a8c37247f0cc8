"""The whole miniature: worlds, tuning on a world of its own, and every run of every seed, side by side.

Every method is tuned over as many configurations, of which the best is taken by what a user can see, the scorer's win
rate against the start. The tuned DPO guides TGDPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from bench.mini.commands import import_everything, side_by_side
from bench.mini.methods import SPREADS, TRIED, Rewards, Setting, with_other_beta
from bench.mini.stages import (
    Effort,
    Plan,
    World,
    make_pairs,
    make_scorer,
    make_start,
    score_pairs,
    scores_of,
    tokens_moved,
    train,
)

Numbers = dict[str, Any]
"""JSON types."""
UNFINISHED = 0.01
"""Largest share of unfinished answers of a configuration that is chosen, if any has no more."""
CONTROLS: tuple[Rewards, ...] = ("shuffled", "mean", "true")


@dataclass(frozen=True)
class Tried:
    """A configuration in the tuning world.

    Attributes:
        seen: The scorer's win rate against the start, after one epoch: what decides.
        unfinished: Share of answers that had no room left.
        known: The win rate by the known reward, which nobody could see.
    """

    setting: Setting
    seen: float
    unfinished: float
    known: float


def compare(work: Path, effort: Effort, processes: int) -> Numbers:
    """Everything, from nothing. Returns what the report is made of."""
    import_everything()
    tuning, *worlds = (World(work / str(seed), seed, effort) for seed in (effort.tuning_seed, *effort.seeds))
    starts = [(make_scorer, (tuning,)), *((make_start, (world,)) for world in worlds)]
    side_by_side(starts, processes, "starts and scorer")
    made = side_by_side([(make_pairs, (world,)) for world in (tuning, *worlds)], processes, "pairs")

    settings = {name: of[: effort.configurations] for name, of in TRIED.items()}
    plain = [(_try, (tuning, setting)) for name in ("DPO", "SimPO") for setting in settings[name]]
    found = side_by_side(plain, processes, "tuning DPO and SimPO")
    tried = {"DPO": found[: effort.configurations], "SimPO": found[effort.configurations :]}
    dpo, simpo = _best(tried["DPO"]), _best(tried["SimPO"])

    guidance = score_pairs(tuning, dpo.name)
    guided = [(_try, (tuning, setting, guidance)) for setting in settings["TGDPO"]]
    first = [(_follow, (world, _dpo(world, dpo))) for world in worlds]
    done = side_by_side([*first, *guided], processes, "DPO, and tuning TGDPO")
    runs, tried["TGDPO"] = done[: len(first)], done[len(first) :]
    tgdpo = _best(tried["TGDPO"])

    later = [(_follow, (world, *plans)) for world in worlds for plans in _plans(world, dpo, simpo, tgdpo)]
    runs += side_by_side(later, processes, "SimPO, TGDPO, controls")
    return {
        "worlds": made,
        "tried": {name: [{**asdict(one), "setting": str(one.setting)} for one in of] for name, of in tried.items()},
        "chosen": {"DPO": str(dpo), "SimPO": str(simpo), "TGDPO": str(tgdpo)},
        "runs": [run for some in runs for run in some],
    }


def _try(world: World, setting: Setting, guidance: Path | None = None) -> Tried:
    """One epoch with a configuration, as the scorer sees it."""
    epoch = world.effort.epoch
    rewards: Rewards | None = "guidance" if guidance else None
    run = train(world, Plan(setting.name, setting, epoch, (epoch,), rewards, guidance, scored=True))
    found = run["checks"][epoch]
    return Tried(setting, found["win_rate"], found["unfinished"], mean(found["wins"]))


def _best(tried: Sequence[Tried]) -> Setting:
    """By what a user can see. Who sees answers that do not end takes another configuration."""
    return max(tried, key=lambda one: (one.unfinished <= UNFINISHED, one.seen)).setting


def _dpo(world: World, dpo: Setting) -> Plan:
    """DPO, whose checkpoint after an epoch is the guidance."""
    return Plan("DPO", dpo, world.effort.steps, world.effort.checked, timed=True, guides=True)


def _plans(world: World, dpo: Setting, simpo: Setting, tgdpo: Setting) -> list[list[Plan]]:
    """What follows once there is guidance. Plans of one list depend on each other."""
    effort, once = world.effort, (world.effort.epoch,)
    guidance, other = scores_of(world, "DPO"), scores_of(world, "other-guidance")
    return [
        [Plan("SimPO", simpo, effort.steps, effort.checked)],
        [Plan("same-beta", replace(dpo, beta=tgdpo.beta), effort.steps, effort.checked)],
        [Plan("TGDPO", tgdpo, effort.steps, effort.checked, "guidance", guidance, timed=True)],
        *([Plan(control, tgdpo, effort.epoch, once, control, guidance)] for control in CONTROLS),
        *(
            [
                Plan(
                    f"spread-{spread:g}",
                    replace(tgdpo, spread=spread),
                    effort.epoch,
                    (),
                    "guidance",
                    guidance,
                    timed=True,
                )
            ]
            for spread in SPREADS
            if spread != tgdpo.spread
        ),
        [
            Plan("other-guidance", with_other_beta(dpo), effort.epoch, once, guides=True),
            Plan("guided-otherwise", tgdpo, effort.epoch, once, "guidance", other),
        ],
    ]


def _follow(world: World, *plans: Plan) -> list[Numbers]:
    """Train by plans, one after another, and see how far the checkpoints of one epoch moved which tokens."""
    runs = []
    for plan in plans:
        run = train(world, plan)
        if plan.checks:
            run["moved"] = tokens_moved(world, plan.name)
        runs.append(run)
    return runs
