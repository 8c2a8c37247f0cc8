"""Layouts: processes, parallel sizes, batches and models that do not fit each other."""

from __future__ import annotations

from tests.faults.inputs.entry import BadInput, score, train

TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
CP = "parallel.context_parallel_size"

ENTRIES = [
    BadInput(
        "one process for two tensor-parallel ranks",
        train(f"{TP}=2"),
        "1 process is no multiple of the 2 that one copy of the model takes "
        "(parallel.tensor_model_parallel_size=2 × parallel.pipeline_model_parallel_size=1); change "
        "--nproc-per-node or these sizes.",
    ),
    BadInput(
        "three processes for a pipeline of two",
        train("--nproc-per-node=3", f"{PP}=2"),
        "3 processes are no multiple of the 2 that one copy of the model takes "
        "(parallel.tensor_model_parallel_size=1 × parallel.pipeline_model_parallel_size=2); change "
        "--nproc-per-node or these sizes.",
    ),
    BadInput("no process", train("--nproc-per-node=0"), "--nproc-per-node must be at least 1, not 0."),
    BadInput(
        "a word for a number of processes",
        train("--nproc-per-node=all"),
        "command line: --nproc-per-node 'all' is refused: it should be a whole number; "
        "see python -m recipes.train --help.",
    ),
    BadInput(
        "a million processes",
        train("--nproc-per-node=1000000"),
        "train.global_batch_size=4 pairs is not a multiple of micro_batch_size × data-parallel size = 2 "
        "× 1000000 = 2000000; change one of them.",
    ),
    BadInput(
        "a context-parallel size that does not divide the processes",
        train("--nproc-per-node=3", f"{CP}=2"),
        "3 processes are no multiple of the 2 that one copy of the model takes "
        "(parallel.tensor_model_parallel_size=1 × parallel.pipeline_model_parallel_size=1 × "
        "parallel.context_parallel_size=2); change --nproc-per-node or these sizes.",
    ),
    BadInput(
        "one process for two context-parallel ranks, in scoring",
        score(f"{CP}=2"),
        "1 process is no multiple of the 2 that one copy of the model takes "
        "(parallel.tensor_model_parallel_size=1 × parallel.pipeline_model_parallel_size=1 × "
        "parallel.context_parallel_size=2); change --nproc-per-node or these sizes.",
    ),
    BadInput(
        "no context-parallel rank",
        train(f"{CP}=0"),
        "command line: parallel.context_parallel_size=0 is refused: it should be at least 1.",
    ),
    BadInput(
        "a token budget that context parallelism does not split",
        train("--nproc-per-node=2", f"{CP}=2", "train.micro_batch_tokens=65"),
        "train.micro_batch_tokens=65 is not a multiple of 2 (parallel.context_parallel_size=2, whose ranks each hold "
        "a share of the tokens); round it up to 66.",
    ),
    BadInput(
        "a token budget that sequence and context parallelism do not split",
        train(
            "--nproc-per-node=4", f"{CP}=2", f"{TP}=2", "parallel.sequence_parallel=true", "train.micro_batch_tokens=66"
        ),
        "train.micro_batch_tokens=66 is not a multiple of 4 (parallel.tensor_model_parallel_size=2, over which "
        "sequence_parallel splits the tokens × parallel.context_parallel_size=2, whose ranks each hold a share of the "
        "tokens); round it up to 68.",
    ),
    BadInput(
        "context parallelism by Megatron-LM's name",
        train("--context-parallel-size", "2"),
        "command line: '--context-parallel-size' is Megatron-LM's and ms-swift's name; here it is "
        "parallel.context_parallel_size: write parallel.context_parallel_size=2.",
    ),
    BadInput(
        "context parallelism by NeMo-RL's name",
        train("policy.megatron_cfg.context_parallel_size=2"),
        "command line: 'policy.megatron_cfg.context_parallel_size' is NeMo-RL's name; here it is "
        "parallel.context_parallel_size: write parallel.context_parallel_size=2.",
    ),
    BadInput(
        "a word for shared prompts",
        train("train.shared_prompts=sometimes"),
        "command line: train.shared_prompts='sometimes' is refused: it should be true or false.",
    ),
    BadInput(
        "sequence parallelism without tensor parallelism",
        train("parallel.sequence_parallel=true"),
        "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1; set it to false.",
    ),
    BadInput(
        "chunks of a pipeline without a pipeline",
        train("parallel.virtual_pipeline_model_parallel_size=2"),
        "parallel.virtual_pipeline_model_parallel_size needs parallel.pipeline_model_parallel_size > 1; unset it.",
    ),
    BadInput(
        "a tensor-parallel size that does not divide the heads",
        train("--nproc-per-node=3", f"{TP}=3"),
        "parallel.tensor_model_parallel_size=3 does not divide the model's 4 attention heads; choose a divisor.",
        fresh=True,
    ),
    BadInput(
        "a pipeline that does not divide the layers",
        train("--nproc-per-node=4", f"{PP}=4"),
        "4 pipeline stages (pipeline 4 × virtual 1) do not divide the model's 2 layers; choose a divisor.",
        fresh=True,
    ),
    BadInput(
        "a batch that micro-batches do not fill",
        train("train.global_batch_size=5"),
        "train.global_batch_size=5 pairs is not a multiple of micro_batch_size × data-parallel size = 2 "
        "× 1 = 2; change one of them.",
    ),
    BadInput(
        "more pairs in a step than in the file",
        train("train.global_batch_size=64"),
        "train.global_batch_size=64 is more than the 6 pairs of pairs.jsonl; lower it.",
    ),
    BadInput(
        "a token budget smaller than a pair",
        train("train.micro_batch_tokens=16"),
        "pairs.jsonl: the longest pair (row 3 of pairs.jsonl) has 35 tokens and does not fit "
        "train.micro_batch_tokens=16; raise it to 35 or more, or lower data.max_length.",
        late=True,
    ),
    BadInput(
        "the same without shared prompts",
        train("train.micro_batch_tokens=16", "train.shared_prompts=false"),
        "pairs.jsonl: the longest pair (row 3 of pairs.jsonl) has 56 tokens and does not fit "
        "train.micro_batch_tokens=16; raise it to 56 or more, or lower data.max_length.",
        late=True,
    ),
    BadInput(
        "a token budget that sequence parallelism does not split",
        train("--nproc-per-node=2", f"{TP}=2", "parallel.sequence_parallel=true", "train.micro_batch_tokens=65"),
        "train.micro_batch_tokens=65 is not a multiple of 2 (parallel.tensor_model_parallel_size=2, over "
        "which sequence_parallel splits the tokens); round it up to 66.",
    ),
    BadInput(
        "scoring with a layout that one process cannot have",
        score(f"{PP}=2"),
        "1 process is no multiple of the 2 that one copy of the model takes "
        "(parallel.tensor_model_parallel_size=1 × parallel.pipeline_model_parallel_size=2); change "
        "--nproc-per-node or these sizes.",
    ),
]
