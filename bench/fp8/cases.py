"""What the FP8 benchmark compares: kinds of arithmetic, and which models are in FP8."""

from __future__ import annotations

TRAINED = ("tensorwise", "delayed", "blockwise")
"""The recipes a run can ask for."""
SCALE_ONE = "delayed, scale 1"
"""Delayed scaling before anything was seen: a policy's first micro-batch, and for ever a model that is only run without
gradient."""
BF16, FP32 = "bf16", "fp32"
REGROUPED = "bf16, other micro-batches"
CASES = ("policy", "frozen", "all, same packs", "all, other packs")
"""Which models are in FP8. `same packs`: frozen models live, riding with the policy. `frozen` and `other packs`: their
scores come from a cache, which was made in other packs."""
