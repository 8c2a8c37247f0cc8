"""With this folder on PYTHONPATH, Python programs run as where Transformer Engine is not installed."""

import sys

sys.modules["transformer_engine"] = None  # type: ignore[assignment]
