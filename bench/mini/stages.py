"""One world of the miniature, and the runs in it, by the public commands: what is made, and what is measured there."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bench.mini.commands import Commands
from bench.mini.measures import agreement, judged, moved, rewards_of
from bench.mini.methods import LEARNING_RATE, Rewards, Setting
from bench.mini.world import Prompt, first_is_preferred, make_prompts, pieces, write
from tgdpo_megatron.data.prepare import PreparedPairs, load_prepared
from tgdpo_megatron.data.token_scores import response_starts
from tgdpo_megatron.losses import CHOSEN, REJECTED
from tgdpo_megatron.scores.reward_file import read_reward_file
from tgdpo_megatron.scores.store import load_scores

BATCH = 32
SFT_LR = 2e-3
SFT_BATCH = 16
SFT_PROMPTS = 400
WARMUP = 5
"""Steps, or all but one of a shorter epoch."""
EVALUATED_EVERY = 4
MAX_LENGTH = 256
LONGEST = 80
"""Most tokens of a sampled answer; the writers' longest has 60."""
PARTS = ("train", "held_out")
ROLES = ("train", "validation")
"""What the settings call the parts."""


@dataclass(frozen=True)
class Effort:
    """How much of everything.

    Attributes:
        seeds: Worlds whose numbers are reported.
        tuning_seed: The world in which configurations are chosen.
        sft, labels, train, held_out: Answers by writers to learn from; pairs that annotators labelled, for the scorer;
            prompts of the pairs; prompts that judge.
        epoch: Steps of 32 pairs in an epoch.
        checked: Steps of the longest runs after which answers are judged.
        configurations: Of each method, the first of methods.TRIED.
        answers, judged: To every prompt, of the start and of a trained model.
    """

    seeds: tuple[int, ...] = (11, 12, 13, 14, 15)
    tuning_seed: int = 100
    sft: int = 6000
    sft_steps: int = 1000
    labels: int = 14000
    train: int = 1500
    held_out: int = 300
    epoch: int = 44
    epochs: int = 3
    checked: tuple[int, ...] = (22, 44, 88, 132)
    configurations: int = 6
    answers: int = 5
    judged: int = 2

    def __post_init__(self) -> None:
        assert {self.epoch, 2 * self.epoch, self.steps} <= set(self.checked), "the rules compare these"

    @property
    def steps(self) -> int:
        """Of the longest runs."""
        return self.epochs * self.epoch


class World:
    """A seed's folder: prompts, the start, the scorer, pairs, and runs."""

    def __init__(self, folder: Path, seed: int, effort: Effort) -> None:
        self.folder, self.seed, self.effort = folder, seed, effort

    @property
    def hf(self) -> Path:
        """The start, as HuggingFace has it."""
        return self.folder / "sft" / "hf" / f"iter-{self.effort.sft_steps:07d}"

    @property
    def start(self) -> Path:
        """The start of every method, and its reference: the fine-tuned model."""
        return self.folder / "sft" / "checkpoints" / f"iter-{self.effort.sft_steps:07d}"

    @property
    def scorer(self) -> Path:
        """One for all worlds, as a published reward model is."""
        return self.folder.parent / "scorer"

    def answers(self, part: str) -> Path:
        """The start's answers to a part's prompts."""
        return self.folder / f"{part}-answers.jsonl"

    def prompts(self, part: str) -> Path:
        return self.folder / f"{part}-prompts.jsonl"

    def pairs(self, part: str) -> Path:
        """Pairs of these answers, as text."""
        return self.folder / f"{part}-pairs.jsonl"

    def tokens(self, part: str) -> Path:
        """The same pairs, as tokens."""
        return self.folder / f"{part}-tokens"

    def data(self, part: str) -> PreparedPairs:
        """The same pairs, read."""
        return load_prepared(self.tokens(part))

    @cached_property
    def tokenizer(self) -> Any:
        from tgdpo_megatron.data.tokenizer import load_tokenizer

        return load_tokenizer(self.hf)

    @property
    def scores(self) -> Path:
        """The start's log-probs of the pairs."""
        return self.folder / "scores"

    def commands(self, name: str) -> Commands:
        """For one job, since others may be under way in the same world."""
        return Commands(self.folder / "logs" / name)

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def true_rewards(self, part: str) -> np.ndarray:
        """What every token of the pairs adds to the known reward. [tokens] fp32.

        Through a reward file, the way a user gives rewards.
        """
        path = self.folder / f"{part}-true-rewards.jsonl"
        if not path.is_file():
            lines = []
            for row, pair in enumerate(_read(self.pairs(part)), start=1):
                prompt = Prompt.parse(pair["prompt"])
                spans = {side: _spans(prompt, pair[side][-1]["content"]) for side in ("chosen", "rejected")}
                lines.append({"row": row, **spans})
            _write(path, lines)
        return read_reward_file(path, self.data(part), self.tokenizer)


def make_start(world: World) -> None:
    """Draw the prompts of a world, let writers answer some, and fine-tune a model on the answers: the start."""
    folder, effort, chance = world.folder, world.effort, random.Random(world.seed)
    prompts = make_prompts(effort.train + effort.held_out + SFT_PROMPTS, chance)
    for part in PARTS:
        asked = [prompts.pop() for _ in range(getattr(effort, part))]
        _write(world.prompts(part), [{"prompt": prompt.text} for prompt in asked])
    _write(folder / "sft.jsonl", [_two_answers(chance.choice(prompts), chance) for _ in range(effort.sft)])

    commands = world.commands("start")
    commands.run("tools.make_tiny_model", folder / "sft.jsonl", folder / "hf", f"--seed={world.seed}")
    commands.run("tools.convert_hf_to_megatron", folder / "hf", folder / "random")
    commands.run(
        "recipes.train",
        "--recipe=sft_tiny",
        f"model.checkpoint={folder / 'random'}",
        f"data.train={folder / 'sft.jsonl'}",
        f"train.output={folder / 'sft'}",
        f"train.train_iters={effort.sft_steps}",
        f"train.export_interval={effort.sft_steps}",
        f"train.seed={world.seed}",
        f"optimizer.lr={SFT_LR}",
        f"train.global_batch_size={SFT_BATCH}",
        f"train.micro_batch_size={SFT_BATCH}",
        *_QUICK,
    )


def make_scorer(world: World) -> None:
    """Train the scorer from the start of a world, which is made first, on labels of its own."""
    make_start(world)
    chance, labels = random.Random("labels"), world.folder / "labels.jsonl"
    _write(labels, [_labelled(make_prompts(1, chance)[0], chance) for _ in range(world.effort.labels)])
    world.commands("scorer").run("bench.mini.scorer", world.hf, labels, world.scorer)


def make_pairs(world: World) -> dict[str, Any]:
    """Let the start answer, let the scorer make pairs, and compute the start's log-probs of them.

    Returns:
        How the start and the pairs came out.
    """
    commands = world.commands("pairs")
    for part in PARTS:
        _sample(commands, world, world.hf, part, world.answers(part), number=world.effort.answers, seed=world.seed)
        commands.run("tools.annotate", world.scorer, world.answers(part), "--output", world.pairs(part))
        commands.run(
            "tools.prepare_pairs", world.pairs(part), world.hf, world.tokens(part), f"--max-length={MAX_LENGTH}"
        )
    _score(commands, world, world.scores, PARTS, "--recipe=dpo_tiny")
    for part in PARTS:
        world.true_rewards(part)  # once, before runs of this world go on side by side
    start = judged(world.answers("held_out"), world.answers("held_out"))
    return {"seed": world.seed, "start": asdict(start), **_quality(world)}


def _two_answers(prompt: Prompt, chance: random.Random) -> dict[str, str]:
    """By writers of any quality, in any order. Fine-tuning learns the first."""
    first, second = (write(prompt, chance.random(), chance) for _ in range(2))
    return {"prompt": prompt.text, "chosen": first, "rejected": second}


def _labelled(prompt: Prompt, chance: random.Random) -> dict[str, str]:
    """The same, in the order that an annotator prefers."""
    row = _two_answers(prompt, chance)
    if first_is_preferred(prompt, row["chosen"], row["rejected"], chance):
        return row
    return {"prompt": prompt.text, "chosen": row["rejected"], "rejected": row["chosen"]}


def _quality(world: World) -> dict[str, Any]:
    """How well the scorer and the pairs know the reward."""
    agreed = []
    for row in _read(world.pairs("held_out")):
        found = zip(row["all_rm_scores"], row["all_generated_responses"], strict=True)
        scores, answers = zip(*((score, answer) for score, answer in found if score is not None), strict=True)
        agreed.append(agreement(np.array(scores), rewards_of(row["prompt"], answers)))
    rights, counted = zip(*agreed, strict=True)
    gaps = [
        np.subtract(*rewards_of(row["prompt"], [row[side][-1]["content"] for side in ("chosen", "rejected")]))
        for row in _read(world.pairs("train"))
    ]
    return {
        "pairs": len(gaps),
        "scorer_right": sum(rights) / sum(counted),
        "pairs_right": float(np.mean([gap > 0 for gap in gaps if gap])),
    }


_QUICK = ("train.async_save=false", "train.save_optimizer=false", "train.report=false", "--quiet")
"""For runs of a minute."""


def _sample(commands: Commands, world: World, model: Path, part: str, answers: Path, *, number: int, seed: int) -> None:
    """All models answer in the same way: sampled from their own distribution, as it is.

    Args:
        number: Of answers to a prompt.
        seed: Of the noise. That of the start's answers is another than that of all trained models.
    """
    commands.run(
        "tools.sample",
        model,
        world.prompts(part),
        "--output",
        answers,
        f"--n={number}",
        "--temperature=1",
        "--top-p=1",
        "--top-k=0",
        f"--max-new-tokens={LONGEST}",
        f"--seed={seed}",
        "--batch-size=256",
        "--keep-ids",
    )


def _score(commands: Commands, world: World, scores: Path, parts: Sequence[str], *settings: str) -> None:
    """Token log-probs of the pairs of one or two parts, under the frozen models that the settings name."""
    commands.run(
        "recipes.score",
        f"model.checkpoint={world.start}",
        *(f"data.{role}={world.tokens(part)}" for role, part in zip(ROLES, parts, strict=False)),
        f"data.max_length={MAX_LENGTH}",
        f"scores.path={scores}",
        "train.micro_batch_size=64",
        *settings,
    )


@dataclass(frozen=True)
class Plan:
    """A run: what is trained, how long, and what is looked at.

    Attributes:
        name: Of its folder.
        rewards: Token rewards of TGDPO.
        guidance: Folder of scores that holds the guidance's log-probs.
        steps: Optimizer steps.
        checks: Steps after which answers are sampled and judged.
        scored: Whether the scorer judges them in place of the divergence: what a user who tunes looks at.
        timed: Whether held-out preference accuracy is measured every few steps, and not at the end alone.
        guides: Whether its checkpoint after an epoch guides TGDPO, which reads its log-probs of all pairs.
    """

    name: str
    setting: Setting
    steps: int
    checks: tuple[int, ...] = ()
    rewards: Rewards | None = None
    guidance: Path | None = None
    scored: bool = False
    timed: bool = False
    guides: bool = False


def train(world: World, plan: Plan) -> dict[str, Any]:
    """Train from the world's start, and judge the checkpoints that the plan names.

    Returns:
        Held-out preference accuracy by step; for each checkpoint what `judged` says, `kl` to the start in nats per
        answer, and the scorer's `win_rate`.
    """
    commands, output = world.commands(plan.name), world.run(plan.name)
    every = math.gcd(plan.steps, *plan.checks)
    commands.run(
        "recipes.train",
        "--recipe=dpo_tiny",
        f"model.checkpoint={world.start}",
        f"data.train={world.tokens('train')}",
        f"data.validation={world.tokens('held_out')}",
        f"data.max_length={MAX_LENGTH}",
        f"loss.type={plan.setting.loss}",
        f"loss.beta={plan.setting.beta}",
        f"optimizer.lr={LEARNING_RATE}",
        "optimizer.lr_decay_style=constant",
        f"optimizer.lr_warmup_iters={min(WARMUP, world.effort.epoch - 1)}",
        f"train.output={output}",
        f"train.train_iters={plan.steps}",
        f"train.micro_batch_size={BATCH}",
        f"train.eval_interval={EVALUATED_EVERY if plan.timed else plan.steps}",
        f"train.seed={world.seed}",
        *_loss_settings(world, plan),
        *((f"train.export_interval={every}", "train.keep_last=0") if plan.checks else ()),
        *_QUICK,
    )
    if plan.guides:
        score_pairs(world, plan.name)
    found = {"seed": world.seed, "name": plan.name, "setting": str(plan.setting), "accuracy": _accuracies(output)}
    return found | {"checks": _judge(commands, world, plan)} if plan.checks else found


def _judge(commands: Commands, world: World, plan: Plan) -> dict[int, dict[str, Any]]:
    """Let checkpoints answer the held-out prompts, and compare the answers with the start's."""
    output = world.run(plan.name)
    answers = {step: output / f"answers-{step}.jsonl" for step in plan.checks}
    models = {step: output / "hf" / f"iter-{step:07d}" for step in plan.checks}
    for step, path in answers.items():
        _sample(commands, world, models[step], "held_out", path, number=world.effort.judged, seed=1000 + world.seed)
    commands.run(
        "tools.compare",
        f"start={world.hf}",
        *(f"{step}={model}" for step, model in models.items()),
        "--answers",
        world.answers("held_out"),
        *answers.values(),
        *(("--scorer", world.scorer, "--no-kl") if plan.scored else ()),
        f"--output={output / 'compared'}",
    )
    compared = json.loads((output / "compared" / "comparison.json").read_text(encoding="utf-8"))["models"]
    return {
        step: {
            **asdict(judged(answers[step], world.answers("held_out"))),
            **{name: compared[str(step)][name]["value"] for name in ("kl", "win_rate") if name in compared[str(step)]},
        }
        for step in plan.checks
    }


def _accuracies(run: Path) -> dict[int, float]:
    """Held-out preference accuracy by step."""
    name = "eval/rewards/accuracies"
    return {int(line["iteration"]): line[name] for line in _read(run / "metrics.jsonl") if name in line}


def _loss_settings(world: World, plan: Plan) -> list[str]:
    """The settings of a loss beside β, and where its scores are. Writes a file of token rewards where there is one."""
    setting = plan.setting
    if setting.loss == "simpo":
        return [f"loss.gamma_beta_ratio={setting.margin}"]
    if setting.loss == "dpo":
        return ["scores.source=cached", f"scores.path={world.scores}"]
    assert plan.rewards is not None
    rewards = {part: token_rewards(world, plan, part) for part in PARTS}
    alpha = setting.spread / signed(world.data("train"), rewards["train"]).std()
    common = ["scores.source=cached", "loss.beta_r=1", f"loss.alpha={alpha}"]
    if plan.rewards == "guidance":
        return [*common, f"scores.path={plan.guidance}"]
    files = {part: world.run(f"{plan.name}-rewards-{part}.jsonl") for part in PARTS}
    for part, path in files.items():
        write_reward_file(path, world.data(part), rewards[part])
    return [
        *common,
        "loss.token_rewards=file",
        f"scores.path={world.scores}",
        f"scores.reward_file={files['train']}",
        f"scores.validation_reward_file={files['held_out']}",
    ]


def token_rewards(world: World, plan: Plan, part: str) -> np.ndarray:
    """r̂ of every token of the pairs. [tokens] fp32."""
    if plan.rewards == "true":
        return world.true_rewards(part)
    assert plan.guidance is not None
    data = world.data(part)
    scores = load_scores(_part_of(plan.guidance, part), data, ("reference", "guidance")).values
    rewards = np.asarray(scores["guidance"]) - np.asarray(scores["reference"])
    if plan.rewards == "guidance":
        return rewards
    chance, starts = np.random.default_rng(world.seed), response_starts(data)
    answers = np.split(rewards, starts[1:-1])
    if plan.rewards == "shuffled":
        return np.concatenate([chance.permutation(answer) for answer in answers])
    return np.concatenate([np.full_like(answer, answer.mean()) for answer in answers])


def signed(data: PreparedPairs, rewards: np.ndarray) -> np.ndarray:
    """r̂ with the sign that it has in TGDPO's weights: 1 + α r̂ for chosen tokens, 1 − α r̂ for rejected ones. [tokens]"""
    return rewards * np.repeat(np.tile([1.0, -1.0], len(data)), np.diff(response_starts(data)))


def write_reward_file(path: Path, data: PreparedPairs, rewards: np.ndarray) -> None:
    """Rewards of all tokens, as a user would give them."""
    answers = np.split(rewards, response_starts(data)[1:-1])
    lines = [
        {"row": int(row), "chosen": answers[2 * pair].tolist(), "rejected": answers[2 * pair + 1].tolist()}
        for pair, row in enumerate(data.rows)
    ]
    _write(path, lines)


def scores_of(world: World, name: str) -> Path:
    """The folder of a run's scores."""
    return world.folder / "scores-of" / name


def score_pairs(world: World, name: str) -> Path:
    """Log-probs of all pairs after an epoch of a run, beside the start's. Returns their folder, `scores_of`."""
    _score(world.commands(name), world, scores_of(world, name), PARTS, *_after_an_epoch(world, name))
    return scores_of(world, name)


def tokens_moved(world: World, name: str) -> dict[str, float]:
    """How far an epoch of a run moved the tokens of held-out pairs, by what they are worth."""
    data, scores = world.data("held_out"), world.folder / "moved" / name
    _score(world.commands(name), world, scores, ["held_out"], *_after_an_epoch(world, name))
    found = load_scores(scores / ROLES[0], data, ("reference", "guidance")).values
    lengths = np.diff(response_starts(data))
    side = np.repeat(np.tile([CHOSEN, REJECTED], len(data)), lengths)
    return moved(np.asarray(found["reference"]), np.asarray(found["guidance"]), world.true_rewards("held_out"), side)


def _after_an_epoch(world: World, name: str) -> tuple[str, str]:
    """Settings with which a run's checkpoint stands in the place of the guidance."""
    checkpoint = world.run(name) / "checkpoints" / f"iter-{world.effort.epoch:07d}"
    return "--recipe=tgdpo_tiny", f"model.guidance={checkpoint}"


def _part_of(scores: Path, part: str) -> Path:
    return scores / ROLES[PARTS.index(part)]


def _spans(prompt: Prompt, answer: str) -> list[list[float]]:
    """The true reward of every word with the blank before it, since that is one token: [start, end, reward]."""
    return [
        [piece.start - (answer[piece.start - 1 : piece.start] == " "), piece.end, piece.reward]
        for piece in pieces(prompt, answer)
    ]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
