"""The speed benchmark: ratios of time, memory and work within one run."""

FILES = (
    "counts",
    "head",
    "packing",
    "steps",
    "shared",
    "saves",
    "trace",
    "context",
    "trl",
    "convert",
    "sampling",
    "annotation",
)
"""Each has rows of its own."""
