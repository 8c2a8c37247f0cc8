"""Megatron's GPT from a model description, the carry of frozen models, the distributed head."""
