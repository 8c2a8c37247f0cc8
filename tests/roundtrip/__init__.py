"""HuggingFace to Megatron and back: every family keeps every bit, and gives HuggingFace's log-probs at every layout.

    python -m tests.roundtrip [--only TEXT] [--json FILE]

models.py makes the models, and converts them there and back. ranks.py scores them at one layout. table.py: all of it.
"""
