"""The GPU benchmark."""
