"""Makes megatron-core's DistributedOptimizer save and load the state of torch's AdamW correctly.

Without Transformer Engine or apex, megatron-core uses torch.optim.AdamW. Its state differs from theirs in two
ways that the checkpoint code does not expect: it is empty before the first step, and every parameter has a `step`
tensor of its own. Without this patch, all parameters share *one* `step` after loading. That `step` then advances once
for each parameter in every update, and training continues with wrong numbers.

A run may also continue with another implementation of Adam than it began with. Each implementation has options that the
others lack, and Megatron keeps only the saved ones.
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
    """Add the options that saved parameter groups lack, in place, where another implementation of Adam saved them.

    Args:
        groups: The saved parameter groups.
        defaults: Options of the optimizer that loads the groups.
        torchs: Whether that optimizer is torch's. The other implementations accept only an integer as `step`.
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
