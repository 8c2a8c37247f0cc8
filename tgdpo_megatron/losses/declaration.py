"""How a loss is declared: its formula, its options, what it reads, what it reports and its paper, in one object.

To add a loss, add a file with a :class:`Loss` to this folder. The values of `loss.type`, the settings under `loss.`,
the text of `--help`, the tables of docs/ and the metrics are derived from the declarations. See docs/extending.md.
Nothing here imports torch when it is loaded, so that settings can be checked before torch is loaded.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from tgdpo_megatron.errors import UserError
from tgdpo_megatron.losses.pairs import CHOSEN, REJECTED

if TYPE_CHECKING:
    from torch import Tensor

Formula = Callable[..., "tuple[Tensor, Tensor]"]
"""(policy, pairs, *, what the formula reads, its options) -> loss and margin of each pair. Both [P], unreduced."""

READABLE = ("reference", "rewards", "divergence")
"""What a formula can read beside the policy's token log-probs: the reference's token log-probs, token rewards r̂, and
the divergence of the policy from the reference over the whole vocabulary. One number per token each, [R]."""


@dataclass(frozen=True)
class Option:
    """A setting of a loss.

    Attributes:
        default: The value where the user gives none.
        meaning: What the option means, in one sentence, with the unit.
        above, at_least, below, at_most: Limits of a number. Ignored where there are choices.
        only_with: Another option and its value, without which this option is not read.
        choices: The possible words, for an option that is a word.
    """

    default: Any
    meaning: str
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    only_with: tuple[str, str] | None = None

    @property
    def range(self) -> tuple[Any, ...]:
        """The limits and choices. They must be the same in all losses that share the name of an option."""
        return self.above, self.at_least, self.below, self.at_most, self.choices


@dataclass(frozen=True)
class Metric:
    """A number that a loss reports beside the numbers that every loss reports.

    Attributes:
        meaning: What the number means, for docs/metrics.md.
        per_token: Whether the sum is divided by the number of response tokens. Otherwise by the number of pairs.
        warn_above: The user is warned once when the number is larger than this.
        warning: The words of the warning, which follow the number as a percentage.
    """

    meaning: str
    per_token: bool = False
    warn_above: float | None = None
    warning: str = ""


@dataclass(frozen=True)
class Loss:
    """The declaration of one loss.

    Attributes:
        name: The value of `loss.type` that selects the loss.
        formula: The function that computes the loss. A keyword-only argument is one of READABLE or one of `options`.
        meaning: What the loss is, in one line.
        equation: The loss of a pair, for the tables of docs/methods.md, where the symbols are explained.
        paper: Where the loss was published.
        options: The settings of the loss by name. A setting that a loss does not declare is refused.
        rewards: Default of `loss.token_rewards`; None for a loss without token rewards.
        order_alone: Whether the loss reads only the order of the token rewards, so that scaling them changes nothing.
        reward_scale: The option that scales the implicit rewards of the metrics `rewards/*`.
        sides: The responses that the loss reads.
        metrics: What the loss reports beyond what every loss reports, by name.
        report: The function that sums these metrics over a micro-batch. It is called as
            `report(policy, pairs, margins, **what the formula reads, **options)` and returns name -> sum. From two sums
            whose names end in `mean` and in `square`, the second is reported as a standard deviation, ending in `std`.
    """

    name: str
    formula: Formula
    meaning: str
    equation: str
    paper: str
    options: Mapping[str, Option] = field(default_factory=dict)
    rewards: str | None = None
    order_alone: bool = False
    reward_scale: str = "beta"
    sides: tuple[int, ...] = (CHOSEN, REJECTED)
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    report: Callable[..., dict[str, Tensor]] | None = None

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Which of READABLE the formula takes."""
        return tuple(name for name in READABLE if name in self._arguments)

    @property
    def defaults(self) -> dict[str, Any]:
        """Name -> default of every option."""
        return {name: option.default for name, option in self.options.items()}

    @property
    def compares(self) -> bool:
        """Whether the loss compares two responses. Otherwise it learns from the chosen response alone."""
        return REJECTED in self.sides

    @property
    def file(self) -> str:
        """The file that declares the loss, as a path from the repository's root."""
        return self.formula.__module__.replace(".", "/") + ".py"

    def check(self) -> None:
        """Check that the declaration and the formula agree.

        Raises:
            UserError: An option that the formula does not read, an argument that is neither an option nor READABLE, or
                token rewards without a source.
        """
        if not isinstance(self.formula, FunctionType):
            raise UserError(f"the formula of the loss {self.name} is not a plain function; write it with def.")
        code = self.formula.__code__
        for name in self.options:
            if name not in self._arguments or not _uses(code, name):
                raise UserError(
                    f"{self.file}: the loss {self.name} declares the option {name}, which its formula does not read; "
                    "read it there as a keyword argument, or leave the option out."
                )
        for name in self._arguments:
            if name not in self.options and name not in READABLE:
                raise UserError(
                    f"{self.file}: the formula of the loss {self.name} takes {name}, which is neither one of its "
                    f"options nor one of {', '.join(READABLE)}; declare it as an Option."
                )
        if ("rewards" in self.reads) != (self.rewards is not None):
            raise UserError(
                f"{self.file}: the loss {self.name} must both take the argument rewards and name their source, or "
                "neither."
            )

    @cached_property
    def _arguments(self) -> tuple[str, ...]:
        parameters = inspect.signature(self.formula).parameters.values()
        return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def _uses(code: CodeType, argument: str) -> bool:
    """Whether a function ever looks at one of its arguments, itself or in a function inside it."""
    if argument in code.co_cellvars:
        return True
    loaded = [step.argval for step in dis.get_instructions(code) if step.opname.startswith("LOAD_FAST")]
    return any(argument in (names if isinstance(names, tuple) else (names,)) for names in loaded)


def check_together(losses: Iterable[Loss]) -> None:
    """Check that all losses have different names, and that an option has the same range in every loss that has it.

    Raises:
        UserError: Two losses have one name, or give an option different ranges.
    """
    first: dict[str, Loss] = {}
    named: dict[str, Loss] = {}
    for loss in losses:
        if (twin := named.setdefault(loss.name, loss)) is not loss:
            raise UserError(
                f"{loss.file}: {twin.file} declares a loss {loss.name} already; give one of them another name."
            )
        for name, option in loss.options.items():
            other = first.setdefault(name, loss)
            if other.options[name].range != option.range:
                raise UserError(
                    f"{loss.file}: the loss {loss.name} gives the option {name} another range than the loss "
                    f"{other.name} of {other.file} does; give it the same range, or another name."
                )
