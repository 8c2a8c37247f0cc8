"""The conversion that sources.py starts: python -m tgdpo_megatron.checkpoint HF_FOLDER TARGET PROCESSES.

For people there is tools.convert_hf_to_megatron.
"""

import sys
from pathlib import Path

from tgdpo_megatron.errors import one_sentence_errors

if __name__ == "__main__":
    with one_sentence_errors():
        from tgdpo_megatron.checkpoint.convert import hf_to_megatron  # it loads torch and Megatron

        source, target, processes = sys.argv[1:]
        hf_to_megatron(Path(source), Path(target), processes=int(processes))
