"""Settings: misspelt, out of range, contradictory; and the files and command lines that hold them."""

from __future__ import annotations

from tests.faults.inputs.entry import BadInput, train

BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
"""A YAML file of 600 bytes that stands for 10^11 numbers."""


def conf(name: str, text: str | bytes, says: str) -> BadInput:
    """An experiment file with something wrong."""
    return BadInput(name, train("--conf=my.yaml"), says, files={"my.yaml": text})


ENTRIES = [
    # One setting.
    BadInput("a misspelt setting", train("loss.bta=0.1"), "?"),
    BadInput("a setting without its group", train("bta=0.1"), "?"),
    BadInput("TRL's name of a setting", train("learning_rate=1e-6"), "?"),
    BadInput("an option with dashes that is a setting", train("--learning_rate=1e-6"), "?"),
    BadInput("a word without a value", train("loss.beta"), "?"),
    BadInput("a value where a group is", train("loss=dpo"), "?"),
    BadInput("a loss that is not known", train("loss.type=dpo2"), "?"),
    BadInput("beta 0", train("loss.beta=0"), "?"),
    BadInput("beta that is not finite", train("loss.beta=.inf"), "?"),
    BadInput("a text for a number", train("optimizer.lr=small"), "?"),
    BadInput("true for a number", train("train.train_iters=true"), "?"),
    BadInput("a negative batch", train("train.global_batch_size=-4"), "?"),
    BadInput("half a step", train("train.train_iters=2.5"), "?"),
    BadInput("10^12 steps", train("train.train_iters=1000000000000"), "?"),
    BadInput("10^300 epochs", train("train.train_iters=null", "train.num_epochs=1e300"), "?"),
    BadInput("a seed of 2^64", train("train.seed=18446744073709551616"), "?"),
    BadInput("a negative seed", train("train.seed=-1"), "?"),
    BadInput("a batch of 2^70 pairs", train("train.global_batch_size=1180591620717411303424"), "?"),
    BadInput("a timeout of a century", train("train.distributed_timeout_minutes=52560000"), "?"),
    BadInput(
        "micro-batches padded to 2·10^9 tokens",
        train("train.micro_batch_tokens=2000000000", "train.fixed_micro_batches=true"),
        "?",
    ),
    BadInput("a date for a number", train("loss.beta=2026-11-30"), "?"),
    BadInput("a date that no calendar has", train("loss.beta=2026-13-45"), "?"),
    BadInput("5,000 digits on the command line", train(f"train.seed={'9' * 5000}"), "?"),
    BadInput("5,000 brackets on the command line", train(f"data.train={'[' * 5000}"), "?"),
    BadInput("an alias bomb on the command line", train("loss.beta=" + BOMB), "?"),
    BadInput("a list of 10^5 texts for a number", train(f"loss.beta=[{'word,' * 50_000}]"), "?"),
    # Settings that do not go together.
    BadInput("an option of another loss", train("loss.alpha=0.5"), "?"),
    BadInput("a guidance model that no loss reads", train("model.guidance=megatron"), "?"),
    BadInput("two lengths of a run", train("train.num_epochs=1"), "?"),
    BadInput("a warm-up as long as the run", train("optimizer.lr_warmup_iters=2"), "?"),
    BadInput("a learning rate that ends above its peak", train("optimizer.min_lr=1"), "?"),
    BadInput("evaluation without held-out pairs", train("train.eval_interval=1"), "?"),
    BadInput("held-out pairs given twice", train("data.validation=pairs.jsonl", "data.validation_share=0.5"), "?"),
    BadInput("weights for two files where there is one", train("data.weights=[1, 2]"), "?"),
    BadInput("fixed micro-batches without a size", train("train.fixed_micro_batches=true"), "?"),
    BadInput("FP8's scaling without FP8", train("train.fp8_recipe=delayed"), "?"),
    BadInput("FP8 in fp32", train("train.fp8=hybrid", "train.precision=fp32"), "?"),
    BadInput(
        "a variable that the program itself gives the template", train("data.chat_template_kwargs={messages: 1}"), "?"
    ),
    # Files.
    BadInput("a configuration file that is not there", train("--conf=no.yaml"), "?"),
    BadInput("a folder for a configuration file", train("--conf=hf"), "?"),
    conf("a configuration that is no YAML", "recipe: dpo_tiny\nloss: [\n", "?"),
    conf("a configuration that is Latin-1", "recipe: dpo_tiny\n# Gr\xf6\xdfe\n".encode("latin-1"), "?"),
    conf("a configuration that is a list", "- loss\n", "?"),
    conf("a configuration without recipe", "loss: {beta: 0.1}\n", "?"),
    conf("a configuration with a recipe that is not there", "recipe: dpo_tyni\n", "?"),
    conf("a configuration with another key", "recipe: dpo_tiny\nlos: {beta: 0.1}\n", "?"),
    conf("a configuration that sets a key twice", "recipe: dpo_tiny\nloss: {beta: 0.1}\nloss: {beta: 0.2}\n", "?"),
    conf("a configuration with an alias bomb", BOMB, "?"),
    conf("a configuration that holds itself", "recipe: dpo_tiny\nloss: &a {beta: *a}\n", "?"),
    conf("a configuration nested 20,000 deep", "[" * 20_000, "?"),
    conf("a configuration with 5,000 digits", f"recipe: dpo_tiny\ntrain: {{seed: {'9' * 5000}}}\n", "?"),
    conf("a configuration of 2 MB", "recipe: dpo_tiny\n" + "# words\n" * 250_000, "?"),
    conf("a configuration that asks for Python", "recipe: !!python/object/apply:os.system [id]\n", "?"),
    BadInput("a recipe that is not there", train("--recipe=dpo_tyni"), "?"),
    BadInput(
        "a configuration and another recipe",
        train("--conf=my.yaml", "--recipe=sft_tiny"),
        "?",
        files={"my.yaml": "recipe: dpo_tiny\n"},
    ),
]
