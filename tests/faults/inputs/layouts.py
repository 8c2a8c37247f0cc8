"""Layouts: processes, parallel sizes, batches and models that do not fit each other."""

from __future__ import annotations

from tests.faults.inputs.entry import BadInput, score, train

TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"

ENTRIES = [
    BadInput("one process for two tensor-parallel ranks", train(f"{TP}=2"), "?"),
    BadInput("three processes for a pipeline of two", train("--nproc-per-node=3", f"{PP}=2"), "?"),
    BadInput("no process", train("--nproc-per-node=0"), "?"),
    BadInput("a word for a number of processes", train("--nproc-per-node=all"), "?"),
    BadInput("a million processes", train("--nproc-per-node=1000000"), "?"),
    BadInput("context parallelism", train("--nproc-per-node=2", "parallel.context_parallel_size=2"), "?"),
    BadInput("sequence parallelism without tensor parallelism", train("parallel.sequence_parallel=true"), "?"),
    BadInput("chunks of a pipeline without a pipeline", train("parallel.virtual_pipeline_model_parallel_size=2"), "?"),
    BadInput(
        "a tensor-parallel size that does not divide the heads", train("--nproc-per-node=3", f"{TP}=3"), "?", fresh=True
    ),
    BadInput("a pipeline that does not divide the layers", train("--nproc-per-node=4", f"{PP}=4"), "?", fresh=True),
    BadInput("a batch that micro-batches do not fill", train("train.global_batch_size=5"), "?"),
    BadInput("more pairs in a step than in the file", train("train.global_batch_size=64"), "?"),
    BadInput("a token budget smaller than a pair", train("train.micro_batch_tokens=16"), "?"),
    BadInput(
        "a token budget that sequence parallelism does not split",
        train("--nproc-per-node=2", f"{TP}=2", "parallel.sequence_parallel=true", "train.micro_batch_tokens=65"),
        "?",
    ),
    BadInput("sequences longer than the model's positions", train("data.max_length=512"), "?"),
    BadInput("scoring with a layout that one process cannot have", score(f"{PP}=2"), "?"),
]
