"""How a loss is declared: its formula, its options, what it reads, what it reports and its paper, in one object.

A file of this folder that holds a :class:`Loss` is all the rest of the program needs: the values of `loss.type`, the
settings under `loss.`, the text of `--help`, the tables of docs/ and the metrics follow from it. See docs/extending.md.
Nothing here imports torch, so that settings can be checked before torch is loaded.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from tgdpo_megatron.errors import UserError
from tgdpo_megatron.losses.pairs import CHOSEN, REJECTED

if TYPE_CHECKING:
    from torch import Tensor

Formula = Callable[..., "tuple[Tensor, Tensor]"]
"""(policy, pairs, *, what it reads, its options) -> loss and margin of each pair. Both [P], unreduced."""

READABLE = ("reference", "rewards", "divergence")
"""What a formula can read beside the policy's token log-probs: the reference's token log-probs, token rewards r̂, and
the divergence of the policy from the reference over the whole vocabulary. One number per token each, [R]."""


@dataclass(frozen=True)
class Option:
    """A setting of a loss.

    Attributes:
        default: Its value where the user gives none.
        meaning: One sentence, with the unit.
        above, at_least, below, at_most: Its range. Ignored where there are choices.
        choices: The words it can be, for an option that is a word.
    """

    default: Any
    meaning: str
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def range(self) -> tuple[Any, ...]:
        """What must be the same wherever two losses share the name of an option."""
        return self.above, self.at_least, self.below, self.at_most, self.choices


@dataclass(frozen=True)
class Metric:
    """A number that a loss reports beside those that every loss has.

    Attributes:
        meaning: What it says, for docs/metrics.md.
        per_token: Whether its sum is divided by the number of response tokens; otherwise by the number of pairs.
        warn_above: Where it is larger than this, the user is warned once.
        warning: With these words, after the number as a percentage.
    """

    meaning: str
    per_token: bool = False
    warn_above: float | None = None
    warning: str = ""


@dataclass(frozen=True)
class Loss:
    """One value of `loss.type`.

    Attributes:
        name: That value.
        formula: Its formula. Every keyword-only argument is either one of READABLE or one of `options`.
        meaning: What it is, in one line.
        equation: The loss of a pair as it stands in the tables of docs/methods.md, which explain the symbols.
        paper: Where it is from.
        options: Its settings. A setting that a loss does not declare is refused.
        rewards: Where its token rewards come from unless `loss.token_rewards` says otherwise.
        order_alone: Whether only the order of the token rewards matters: scaling them would change nothing.
        sides: The responses it reads.
        metrics: What it reports beyond what every loss reports.
        report: The sums of these over a micro-batch, by name; called as
            `report(policy, pairs, margins, **what it reads, **its options)`. A sum whose name ends in `square` beside
            one that ends in `mean` is reported as `std`.
    """

    name: str
    formula: Formula
    meaning: str
    equation: str
    paper: str
    options: Mapping[str, Option] = field(default_factory=dict)
    rewards: str | None = None
    order_alone: bool = False
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
        """Whether it compares two responses, or learns from the chosen one alone."""
        return REJECTED in self.sides

    @property
    def file(self) -> str:
        """The file it is declared in, as a path from the repository's root."""
        return self.formula.__module__.replace(".", "/") + ".py"

    def check(self) -> None:
        """Check that the declaration and the formula agree.

        Raises:
            UserError: An option that the formula does not take, an argument that nothing gives it, or token rewards
                without a source.
        """
        assert isinstance(self.formula, FunctionType), f"{self.name}: a formula is a plain function"
        code = self.formula.__code__
        for name in self.options:
            if name not in self._arguments or not _uses(code, name):
                raise UserError(
                    f"{self.file}: the loss {self.name} declares the option {name}, which its formula does not read; "
                    "take it as a keyword argument, or leave it out."
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
    return argument in code.co_cellvars or any(
        step.argval == argument and step.opname.startswith("LOAD_FAST") for step in dis.get_instructions(code)
    )


def check_together(losses: Mapping[str, Loss]) -> None:
    """Check that losses which share the name of an option give it the same range.

    Raises:
        UserError: Two do not.
    """
    first: dict[str, Loss] = {}
    for loss in losses.values():
        for name, option in loss.options.items():
            other = first.setdefault(name, loss)
            if other.options[name].range != option.range:
                raise UserError(
                    f"{loss.file}: the loss {loss.name} gives the option {name} another range than the loss "
                    f"{other.name} of {other.file} does; give it the same, or another name."
                )
