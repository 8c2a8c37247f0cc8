"""Sizes that are fixed in the code, for the planner as for the programs. Free of torch."""

FP8_MULTIPLE, FP8_BLOCK = 16, 128
"""FP8 matrix products take sizes that are multiples of the first. Where scaling is blockwise and ranks split the
sequence, Transformer Engine gathers only whole blocks: the second."""

FP8_FORMATS = {"tensorwise": "hybrid", "delayed": "hybrid", "blockwise": "e4m3"}
"""The format that goes with each recipe: Transformer Engine's defaults."""

VOCAB_MULTIPLE = 128
"""Each rank's share of the vocabulary is padded to a multiple of this, Megatron's default."""

TILE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Logits of one tile of the head. In fp32 16 MiB and 512 MiB; bf16 models hold a bf16 copy beside them. Large enough
that the matrix products run at full rate."""

SCORED_AT_ONCE = 128
"""Pairs that scoring hands to each data-parallel rank between progress updates: enough to fill the pipeline, few
enough to see it move."""
