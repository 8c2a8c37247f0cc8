"""Freeze the numbers of a loss, as tests/parity/formulas.py writes it out: nothing of the product computes them.

    python -m tests.support.golden dpo_norm        # writes tests/data/golden/dpo_norm.json

On the two pairs of part A of tests/data/golden.json, in float64: the loss of each pair, and the gradient of their mean
loss on every token log-prob by central differences. golden.json itself, made by a program of its own, has the numbers
of most losses; the files of this folder have those of the others.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.parity.formulas import METHODS, Method, Response

DATA = Path(__file__).resolve().parents[1] / "data"
NAMES = {"reference": "ref", "guidance": "rm", "better": "better", "worse": "worse"}
"""Our name of a score -> its name in golden.json."""
STEP = 1e-5


def main() -> None:
    known = {method.ours.type: method for method in reversed(METHODS.values())}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=known, help="loss.type, as tests/parity/formulas.py has it")
    name = parser.parse_args().name
    method = known[name]
    settings = method.ours.model_dump(exclude_unset=True)
    path = DATA / "golden" / f"{name}.json"
    path.write_text(json.dumps({"settings": settings, "pairs": numbers(method)}, indent=1) + "\n")
    print(path)


def numbers(method: Method) -> list[dict[str, Any]]:
    """Loss, and gradient of the mean loss on the chosen and rejected token log-probs, of each pair."""
    inputs = json.loads((DATA / "golden.json").read_text())["part_a_token_logprobs"]["inputs"]
    found = []
    for pair in inputs:
        sides = [_response(pair[side], chosen=side == "w") for side in "wl"]
        gradients = []
        for place, side in enumerate(sides):
            gradients.append([_slope(method, sides, place, token) / len(inputs) for token in range(len(side.policy))])
        loss = float(method.formula(*sides))
        found.append({"loss": loss, "grad_chosen": gradients[0], "grad_rejected": gradients[1]})
    return found


def _response(side: dict[str, list[float]], *, chosen: bool) -> Response:
    def tensor(name: str) -> Tensor:
        return torch.tensor(side[name], dtype=torch.float64)

    return Response(tensor("pi"), tensor("kl"), {ours: tensor(name) for ours, name in NAMES.items()}, chosen)


def _slope(method: Method, sides: list[Response], place: int, token: int) -> float:
    """Of the pair's loss on one token's log-prob."""
    ends = []
    for step in (STEP, -STEP):
        policy = sides[place].policy.clone()
        policy[token] += step
        moved = [*sides]
        moved[place] = Response(policy, sides[place].divergence, sides[place].scores, sides[place].chosen)
        ends.append(float(method.formula(*moved)))
    return (ends[0] - ends[1]) / (2 * STEP)


if __name__ == "__main__":
    main()
