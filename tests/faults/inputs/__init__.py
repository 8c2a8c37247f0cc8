"""Bad inputs: how each is made, the command that meets it, and the one sentence that is said.

A file for each subject holds a list ENTRIES; `entry.py` says what an entry is, `run.py` runs it and judges.
"""

from tests.faults.inputs import (
    annotation,
    checkpoints,
    configuration,
    data,
    environment,
    evaluation,
    hf_folders,
    layouts,
    other_programs,
    sampling,
    scores,
)

SUBJECTS = {
    "configuration": configuration.ENTRIES,
    "layouts": layouts.ENTRIES,
    "data": data.ENTRIES,
    "HuggingFace folders": hf_folders.ENTRIES,
    "checkpoints": checkpoints.ENTRIES,
    "other programs": other_programs.ENTRIES,
    "scores": scores.ENTRIES,
    "sampling": sampling.ENTRIES,
    "annotation": annotation.ENTRIES,
    "evaluation": evaluation.ENTRIES,
    "environment": environment.ENTRIES,
}
