"""The FP8 benchmark."""
