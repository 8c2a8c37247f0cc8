"""Makes megatron-core's DistributedOptimizer checkpoint torch's AdamW correctly.

Without Transformer Engine or apex, megatron-core 0.16.1 falls back to torch.optim.AdamW, whose state
differs from theirs in two ways its checkpoint code does not expect: it is empty before the first
step, and every parameter has its own `step` tensor. Loaded unchanged, all parameters share *one*
`step`, which then advances once per parameter in each update: training goes on with wrong numbers.

A run may also go on under another implementation than it began with: theirs and torch's name different
options in the state, of which Megatron keeps only the saved ones.
"""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    """Patch DistributedOptimizer, once per process."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if getattr(DistributedOptimizer, "_holds_torch_adam_state", False):
        return
    patched: Any = DistributedOptimizer
    original_state_dict, original_load = patched.state_dict, patched.load_state_dict
    original_set = patched._set_main_param_and_optimizer_states

    def state_dict(self: Any) -> Any:
        if _is_torch_adam(self):
            _fill_empty_state(self.optimizer)
        return original_state_dict(self)

    def load_state_dict(self: Any, state: Any) -> None:
        complete_options(state["optimizer"]["param_groups"], self.optimizer.defaults, torchs=_is_torch_adam(self))
        original_load(self, state)
        if _is_torch_adam(self):
            for entry in self.optimizer.state.values():
                entry["step"] = entry["step"].detach().clone()

    @torch.no_grad()
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        if not _is_torch_adam(self):
            return original_set(self, model_param, tensors)
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        for name, destination in {"param": main, **self.optimizer.state[main]}.items():
            if name in tensors and name != "step":
                destination.copy_(tensors[name])

    patched.state_dict, patched.load_state_dict = state_dict, load_state_dict
    patched._set_main_param_and_optimizer_states = set_states
    patched._holds_torch_adam_state = True


def complete_options(groups: list[dict[str, Any]], defaults: dict[str, Any], *, torchs: bool) -> None:
    """Give saved groups, in place, the options that this optimizer has and the one they were saved from had not.

    Args:
        defaults: This optimizer's own options.
        torchs: Whether it is torch's, whose `step` may have a fraction; the others' kernels take integers alone.
    """
    for group in groups:
        for option, value in defaults.items():
            group.setdefault(option, value)
        if not torchs and "step" in group:
            group["step"] = int(group["step"])


def _is_torch_adam(distributed_optimizer: Any) -> bool:
    return isinstance(getattr(distributed_optimizer, "optimizer", None), torch.optim.Adam)


def _fill_empty_state(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not optimizer.state.get(param):
                optimizer.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }
