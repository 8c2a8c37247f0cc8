"""Megatron-Bridge's checkpoints and ours: weights go from HuggingFace through one to the other and back, bit for bit.

    python -m tests.bridge --python PYTHON [--only TEXT] [--json FILE]

PYTHON is that of an environment with Megatron-Bridge; `make bridge-check` makes one. theirs.py runs there, with
stand-ins for Transformer Engine's layers from layers.py: that package needs a GPU. table.py runs here, and compares.
"""
