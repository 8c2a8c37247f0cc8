"""The versions that this project runs on: which were checked, which are refused, and all that differs between them.

`make versions` checks them, and docs/requirements.md has its table. No other file asks which version is installed.
Where a difference needs two ways, this file chooses. Where one way serves every version, that way stands where it is
used, and the difference only here, in words.

Only the standard library is needed to import this file: `make` asks it before anything is installed.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tgdpo_megatron.errors import UserError

MEGATRON = {
    "0.16.1": ("3.11", "3.12", "3.13"),
    "0.17.1": ("3.12", "3.13"),
    "0.18.2": ("3.12", "3.13"),
    "0.19.2": ("3.12", "3.13"),
}
"""Each checked version of megatron-core, oldest first -> the Pythons that it has packages for."""
PYTHONS = MEGATRON["0.16.1"]
"""The Pythons of any of them. On 3.11, 0.16.1 is the newest megatron-core that there is."""
TRANSFORMER_ENGINE = ("2.9", "2.12")
"""The oldest Transformer Engine, and the first that is too new, by the metadata of megatron-core 0.16.1. NVIDIA's
containers join later versions of megatron-core with later ones, so that to refuse those would be to refuse them."""
UNCHECKED = "TGDPO_UNCHECKED_VERSIONS"
"""Set to 1, what was not checked is warned about, and not refused."""


# ---------------------------------------------------------------- what differs


@dataclass(frozen=True)
class Difference:
    """Something that megatron-core does otherwise from a version on.

    Attributes:
        since: The first numbers of that version.
        what: What is otherwise.
        here: What this project does about it.
    """

    since: str
    what: str
    here: str

    @property
    def holds(self) -> bool:
        """Whether the installed megatron-core is of that version, or newer."""
        return _numbers(megatron()) >= _numbers(self.since)


NAMES_NO_TRANSFORMER_ENGINE = Difference(
    "0.17",
    "names no limits of Transformer Engine in its metadata, where 0.16.1 names 2.9 up to 2.11",
    "a newer Transformer Engine is warned about, and with 0.16.1 refused",
)
SPEC_OF_MLP_IS_PARTIAL = Difference(
    "0.18",
    "a layer's spec holds the feed-forward block as a `functools.partial`, and no longer as a `ModuleSpec`",
    "its parts are looked up in the one or the other",
)
SENDS_BEFORE_FREEING = Difference(
    "0.18",
    "an interleaved pipeline waits until a stage's output is sent before it frees the output; earlier ones free it "
    "while it is being sent, and the next stage gets other numbers",
    "with earlier ones, interleaved pipelines keep their outputs, and the setting that frees them is refused",
)
MARKS_EVERY_WEIGHT = Difference(
    "0.18",
    "weights that are split over tensor-parallel ranks are marked as such also where they are not initialised; without "
    "the mark the gradient norm takes their parts for copies",
    "weights are always initialised; with earlier versions, the setting that leaves this out is refused",
)
REDUCES_ANY_TENSOR = Difference(
    "0.19",
    "an all-reduce over tensor-parallel ranks returns the sum also of a tensor that is not contiguous in memory; "
    "earlier ones return the tensor as it was",
    "the head's gradient, the one that we give to it, is asserted to be contiguous",
)
DIFFERENCES = (
    Difference(
        "0.17",
        "asks for Python 3.12",
        "on Python 3.11, `make` installs 0.16.1, and on newer ones the newest that was checked",
    ),
    NAMES_NO_TRANSFORMER_ENGINE,
    Difference(
        "0.17",
        "an activation that a layer's spec names must be a torch `Module`",
        "ours is one",
    ),
    Difference(
        "0.18",
        "cannot be imported without Triton, which the CPU build of torch does not bring",
        "the locks of these versions pin it",
    ),
    SPEC_OF_MLP_IS_PARTIAL,
    SENDS_BEFORE_FREEING,
    MARKS_EVERY_WEIGHT,
    Difference(
        "0.18",
        "the gradient is divided by the number of pairs without asking the device whether the number is 0",
        "this project divides it, always without asking",
    ),
    Difference(
        "0.19",
        "data parallelism asks for CUDA's current stream on a CPU, too",
        "the CPU platform answers that there is none",
    ),
    Difference(
        "0.19",
        "writes what is no tensor of a checkpoint among its tensors, and no longer into `common.pt`",
        "this project writes and reads checkpoints itself, always with `common.pt`, which every version loads",
    ),
    REDUCES_ANY_TENSOR,
    Difference(
        "0.19",
        "counts the gradient of Transformer Engine's experts whole in the gradient norm, where experts and tensors are "
        "both split",
        "nothing: mixtures of experts are not supported",
    ),
    Difference(
        "0.19",
        "warns that `GPTModel` will be replaced by `HybridModel`",
        "`GPTModel` is still used, and the warning is among those that are not shown; the move is planned below",
    ),
)
"""All that matters here, in the order of the versions."""


def megatron() -> str:
    """The version of the installed megatron-core."""
    return metadata.version("megatron-core")


def transformer_engine() -> str:
    """The version of the installed Transformer Engine."""
    try:
        return metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return "of an unknown version"


def mlp_submodules(layer: Any) -> Any:
    """The parts of the feed-forward block in Megatron's spec of a layer. They can be changed in place."""
    mlp = layer.submodules.mlp
    return mlp.keywords["submodules"] if SPEC_OF_MLP_IS_PARTIAL.holds else mlp.submodules


# ---------------------------------------------------------------- what is refused


def check_python() -> None:
    """Refuse a Python outside the range.

    Raises:
        UserError: It is too old; or it is newer than those that were checked, and was not asked for in spite of that.
    """
    found = ".".join(map(str, sys.version_info[:3]))
    others = f"{', '.join(PYTHONS[:-1])} or {PYTHONS[-1]}"
    if _numbers(found) < _numbers(PYTHONS[0]):
        raise UserError(f"Python {found} is too old for this project; use Python {others}.")
    if _numbers(found)[:2] > _numbers(PYTHONS[-1]):
        _unchecked(f"Python {found} was not checked with this project", f"use Python {others}")


def check_megatron() -> None:
    """Refuse a megatron-core that was not checked, one whose version nothing says, and more than one.

    Raises:
        UserError: It is refused; the sentence names what was found, and what to install.
    """
    checked = ", ".join(MEGATRON)
    places = [Path(entry or ".").resolve() for entry in sys.path]
    copies = [place for place in dict.fromkeys(places) if (place / "megatron" / "core" / "__init__.py").is_file()]
    # A copy that is being developed in another folder has its version in a place of its own.
    installed = metadata.distributions(name="megatron-core")
    versions = {Path(str(one.locate_file(""))).resolve(): one.version for one in installed}
    if len(copies) > 1 or len(set(versions.values())) > 1:
        found = (
            f"{versions.get(place, 'one of no version')} in {place}" for place in dict.fromkeys([*copies, *versions])
        )
        raise UserError(
            f"megatron-core is on Python's path more than once ({', '.join(found)}); uninstall all but one, or take "
            "the others off PYTHONPATH."
        )
    if not versions:
        if copies:
            raise UserError(
                f"nothing says which version the megatron-core in {copies[0]} is; install it with pip (pip install "
                f"--no-deps {copies[0]}), or install one of {checked} in its place."
            )
        raise UserError(f"megatron-core is not installed; install one of {checked}.")
    (version,) = set(versions.values())
    check_megatron_version(version)


def check_megatron_version(version: str) -> None:
    """Refuse a megatron-core that was not checked; another patch of one that was is warned about.

    NVIDIA's containers carry such patches, and a patch should only mend.

    Raises:
        UserError: It is refused; the sentence names the version found and those accepted.
    """
    near = [one for one in MEGATRON if _numbers(one)[:2] == _numbers(version)[:2]]
    if _public(version) in MEGATRON:
        return
    if near and _numbers(version) >= _numbers(next(iter(MEGATRON))):
        _warn(f"megatron-core {version} was not checked with this project, but {near[0]} was")
    else:
        checked = ", ".join(MEGATRON)
        _unchecked(f"megatron-core {version} was not checked with this project", f"install one of {checked}")


def check_transformer_engine_version(found: str) -> None:
    """Refuse a Transformer Engine that is too old, or too new for megatron-core 0.16.1; warn about other new ones.

    Raises:
        UserError: It is refused; the sentence names the version found and those accepted.
    """
    oldest, first_too_new = TRANSFORMER_ENGINE
    old = _numbers(found) < _numbers(oldest)
    new = _numbers(found) >= _numbers(first_too_new)
    if new and NAMES_NO_TRANSFORMER_ENGINE.holds:
        _warn(
            f"Transformer Engine {found} is newer than those that this project knows, which are below {first_too_new}"
        )
    elif old or new:
        _unchecked(
            f"Transformer Engine {found} is not accepted with megatron-core {megatron()}, only >={oldest}"
            + ("" if NAMES_NO_TRANSFORMER_ENGINE.holds else f",<{first_too_new}"),
            "install one of those, or uninstall it to run on Megatron's local layers",
        )


def _unchecked(what: str, remedy: str) -> None:
    """Refuse something, or warn about it where that was asked for."""
    if os.environ.get(UNCHECKED, "") in ("", "0"):
        raise UserError(f"{what}; {remedy}, or set {UNCHECKED}=1 to use it all the same.")
    _warn(what)


def _warn(what: str) -> None:
    """Say something once in a process, and on the first rank only."""
    if what not in _said and os.environ.get("RANK", "0") == "0":
        _said.add(what)
        print(f"warning: {what}; numbers may be wrong.", file=sys.stderr)


_said: set[str] = set()


def _public(version: str) -> str:
    """A version without what its builder added to it, as the commit that it was built from."""
    return version.partition("+")[0]


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers at the start of a version. Those of "of an unknown version" are none, which is below all others."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


# ---------------------------------------------------------------- what is installed


def lock_for(python: str, asked: str = "") -> str:
    """The file that pins megatron-core in an environment of a Python, beside requirements.lock.

    Args:
        python: As in "3.12".
        asked: The version of megatron-core; the newest for this Python where it is empty.

    Raises:
        UserError: There is none that was checked.
    """
    here = [version for version, pythons in MEGATRON.items() if python in pythons]
    if asked and asked not in MEGATRON:
        raise UserError(f"MEGATRON={asked}: this version was not checked; give one of {', '.join(MEGATRON)}.")
    if not here:
        raise UserError(f"Python {python}: this project needs one of {', '.join(PYTHONS)}; name it with PYTHON=.")
    if asked and asked not in here:
        raise UserError(f"MEGATRON={asked} needs one of Python {', '.join(MEGATRON[asked])}, and this is {python}.")
    return f"requirements-megatron-{asked or here[-1]}.lock"
