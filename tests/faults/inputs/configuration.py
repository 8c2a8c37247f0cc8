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
    BadInput(
        "a misspelt setting", train("loss.bta=0.1"), "command line: unknown key 'loss.bta'; did you mean 'loss.beta'."
    ),
    BadInput("a setting without its group", train("bta=0.1"), "command line: unknown key 'bta'; did you mean 'data'."),
    BadInput(
        "TRL's name of a setting",
        train("learning_rate=1e-6"),
        "command line: 'learning_rate' is TRL's, LLaMA-Factory's and ms-swift's name; here it is "
        "optimizer.lr: write optimizer.lr=1e-6.",
    ),
    BadInput(
        "an option with dashes that is a setting",
        train("--learning_rate=1e-6"),
        "command line: '--learning_rate' is TRL's, LLaMA-Factory's and ms-swift's name; here it is "
        "optimizer.lr: write optimizer.lr=1e-6.",
    ),
    BadInput("a word without a value", train("loss.beta"), "command line: 'loss.beta' is not of the form key=value."),
    BadInput(
        "a value where a group is",
        train("loss=dpo"),
        "command line: 'loss' is a group of settings, not 'dpo'; write loss.NAME=VALUE.",
    ),
    BadInput(
        "a loss that is not known",
        train("loss.type=dpo2"),
        "command line: loss.type='dpo2' is refused: it should be 'dpo', 'dpo_norm', 'robust', "
        "'hinge', 'ipo', 'ipo_sum', 'rpo', 'sepo', 'sft', 'simpo', 'tdpo1', 'tdpo2', 'tgdpo', 'dpo_reg' or "
        "'simpo_reg'.",
    ),
    BadInput("beta 0", train("loss.beta=0"), "command line: loss.beta=0 is refused: it should be more than 0."),
    BadInput(
        "beta that is not finite",
        train("loss.beta=.inf"),
        "command line: loss.beta=inf is refused: it should be a finite number.",
    ),
    BadInput(
        "a text for a number",
        train("optimizer.lr=small"),
        "command line: optimizer.lr='small' is refused: it should be a number.",
    ),
    BadInput(
        "true for a number",
        train("train.train_iters=true"),
        "command line: train.train_iters=true is refused: it should not be true or false.",
    ),
    BadInput(
        "a negative batch",
        train("train.global_batch_size=-4"),
        "command line: train.global_batch_size=-4 is refused: it should be at least 1.",
    ),
    BadInput(
        "half a step",
        train("train.train_iters=2.5"),
        "command line: train.train_iters=2.5 is refused: it should be a whole number.",
    ),
    BadInput(
        "10^12 steps",
        train("train.train_iters=1000000000000"),
        "command line: train.train_iters=1000000000000 is refused: a whole number should be at most 2147483647.",
    ),
    BadInput(
        "10^300 epochs",
        train("train.train_iters=null", "train.num_epochs=1e300"),
        "command line: train.train_iters and train.num_epochs say the same in two ways; give one of them.",
    ),
    BadInput(
        "a seed of 2^64",
        train("train.seed=18446744073709551616"),
        "command line: train.seed=18446744073709551616 is refused: a whole number should be at most 2147483647.",
    ),
    BadInput(
        "a negative seed",
        train("train.seed=-1"),
        "command line: train.seed=-1 is refused: it should be at least 0.",
    ),
    BadInput(
        "a batch of 2^70 pairs",
        train("train.global_batch_size=1180591620717411303424"),
        "command line: train.global_batch_size=1180591620717411303424 is refused: a whole number should "
        "be at most 2147483647.",
    ),
    BadInput(
        "a timeout of a century",
        train("train.distributed_timeout_minutes=52560000"),
        "command line: train.distributed_timeout_minutes=52560000 is refused: it should be at most 10080.",
    ),
    BadInput(
        "micro-batches padded to 2·10^9 tokens",
        train("train.micro_batch_tokens=2000000000", "train.fixed_micro_batches=true"),
        "train.micro_batch_tokens=2000000000 is more than the 512 tokens that a step can have (2 × "
        "data.max_length=64 × 4 pairs), and train.fixed_micro_batches=true pads every micro-batch to it; "
        "lower it.",
    ),
    BadInput(
        "a date for a number",
        train("loss.beta=2026-11-30"),
        "command line: loss.beta='2026-11-30' is refused: it should be a number.",
    ),
    BadInput(
        "a date that no calendar has",
        train("loss.beta=2026-13-45"),
        "command line: loss.beta='2026-13-45' is refused: it should be a number.",
    ),
    BadInput(
        "5,000 digits on the command line",
        train(f"train.seed={'9' * 5000}"),
        "command line: train.seed: holds an integer of 5,000 digits; at most 100 are read.",
    ),
    BadInput(
        "5,000 brackets on the command line",
        train(f"data.train={'[' * 5000}"),
        "command line: data.train: lists or mappings are nested more than 100 deep.",
    ),
    BadInput(
        "an alias bomb on the command line",
        train("loss.beta=" + BOMB),
        "command line: loss.beta: has more than 100,000 values, with its aliases written out; this is too many.",
    ),
    BadInput(
        "a list of 10^5 texts for a number",
        train(f"loss.beta=[{'word,' * 50_000}]"),
        "command line: loss.beta=['word', 'word', 'word', 'word', 'word', 'word', ...] is refused: it "
        "should be a number.",
    ),
    # Settings that do not go together.
    BadInput(
        "an option of another loss",
        train("loss.alpha=0.5"),
        "the settings: loss.type=dpo does not read loss.alpha=0.5; leave it out (loss.alpha=null).",
    ),
    BadInput(
        "a guidance model that no loss reads",
        train("model.guidance=megatron"),
        "the settings: model.guidance is not read by loss.type=dpo; leave it out.",
    ),
    BadInput(
        "two lengths of a run",
        train("train.num_epochs=1"),
        "command line: train.train_iters and train.num_epochs say the same in two ways; give one of them.",
    ),
    BadInput(
        "a warm-up as long as the run",
        train("optimizer.lr_warmup_iters=2"),
        "optimizer.lr_warmup_iters=2 leaves no step of the 2 after the warm-up; lower it.",
    ),
    BadInput(
        "a learning rate that ends above its peak",
        train("optimizer.min_lr=1"),
        "optimizer.min_lr=1.0 is more than optimizer.lr=0.0002; lower it.",
    ),
    BadInput(
        "evaluation without held-out pairs",
        train("train.eval_interval=1"),
        "train.eval_interval=1 needs held-out pairs; set data.validation or data.validation_share, or "
        "train.eval_interval=0.",
    ),
    BadInput(
        "held-out pairs given twice",
        train("data.validation=pairs.jsonl", "data.validation_share=0.5"),
        "the settings: data.validation names held-out pairs already, so data.validation_share=0.5 is not "
        "read; leave one of them out.",
    ),
    BadInput(
        "weights for two files where there is one",
        train("data.weights=[1, 2]"),
        "the settings: data.weights has 2 numbers and data.train 1 files; give one number for each file, "
        "in the same order.",
    ),
    BadInput(
        "fixed micro-batches without a size",
        train("train.fixed_micro_batches=true"),
        "train.fixed_micro_batches=true needs train.micro_batch_tokens, the size to pad to; set "
        "train.micro_batch_tokens.",
    ),
    BadInput(
        "FP8's scaling without FP8",
        train("train.fp8_recipe=delayed"),
        "the settings: train.fp8_recipe=delayed is not read without train.fp8; set train.fp8=hybrid.",
    ),
    BadInput(
        "FP8 in fp32",
        train("train.fp8=hybrid", "train.precision=fp32"),
        "the settings: train.fp8=hybrid needs train.precision=bf16, in which the other layers compute; "
        "set train.precision=bf16.",
    ),
    BadInput(
        "a variable that the program itself gives the template",
        train("data.chat_template_kwargs={messages: 1}"),
        "command line: data.chat_template_kwargs={'messages': 1} is refused: 'messages' is given to the "
        "template by the program itself, leave it out.",
    ),
    # Files.
    BadInput("a configuration file that is not there", train("--conf=no.yaml"), "no.yaml: no such configuration file."),
    BadInput("a folder for a configuration file", train("--conf=hf"), "hf: is a folder, not a configuration file."),
    conf(
        "a configuration that is no YAML",
        "recipe: dpo_tiny\nloss: [\n",
        "my.yaml line 3: not valid YAML (expected the node content, but found '<stream end>').",
    ),
    conf(
        "a configuration that is Latin-1",
        "recipe: dpo_tiny\n# Gr\xf6\xdfe\n".encode("latin-1"),
        "my.yaml: byte 21 is not UTF-8 text.",
    ),
    conf(
        "a configuration that is a list",
        "- loss\n",
        "my.yaml: expected groups of settings, such as 'loss:' with 'beta: 0.05' below it.",
    ),
    conf(
        "a configuration without recipe",
        "loss: {beta: 0.1}\n",
        "my.yaml: names no recipe; add 'recipe: NAME' as its first key (--help lists the recipes).",
    ),
    conf(
        "a configuration with a recipe that is not there",
        "recipe: dpo_tyni\n",
        "my.yaml: recipe: dpo_tyni: no such recipe; did you mean 'dpo_tiny'?",
    ),
    conf(
        "a configuration with another key",
        "recipe: dpo_tiny\nlos: {beta: 0.1}\n",
        "my.yaml: unknown key 'los'; did you mean 'loss'.",
    ),
    conf(
        "a configuration that sets a key twice",
        "recipe: dpo_tiny\nloss: {beta: 0.1}\nloss: {beta: 0.2}\n",
        "my.yaml line 3: 'loss' is there twice; keep one of them.",
    ),
    conf(
        "a configuration with an alias bomb",
        BOMB,
        "my.yaml: has more than 100,000 values, with its aliases written out; this is too many.",
    ),
    conf(
        "a configuration that holds itself",
        "recipe: dpo_tiny\nloss: &a {beta: *a}\n",
        "my.yaml: lists or mappings are nested more than 100 deep.",
    ),
    conf(
        "a configuration nested 20,000 deep", "[" * 20_000, "my.yaml: lists or mappings are nested more than 100 deep."
    ),
    conf(
        "a configuration with 5,000 digits",
        f"recipe: dpo_tiny\ntrain: {{seed: {'9' * 5000}}}\n",
        "my.yaml: holds an integer of 5,000 digits; at most 100 are read.",
    ),
    conf(
        "a configuration of 2 MB",
        "recipe: dpo_tiny\n" + "# words\n" * 250_000,
        "my.yaml: has more than 1,048,576 bytes, which is too much for a configuration file.",
    ),
    conf(
        "a configuration that asks for Python",
        "recipe: !!python/object/apply:os.system [id]\n",
        "my.yaml line 1: not valid YAML (could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.system').",
    ),
    BadInput(
        "a word that is no program",
        ("tgdpo_megatron", "train"),
        "'train' is no program; name one of recipes.align, recipes.convert, *, tools.view.",
    ),
    BadInput(
        "a recipe that is not there",
        train("--recipe=dpo_tyni"),
        "--recipe dpo_tyni: no such recipe; did you mean 'dpo_tiny'?",
    ),
    BadInput(
        "a configuration and another recipe",
        train("--conf=my.yaml", "--recipe=sft_tiny"),
        "my.yaml: its recipe is dpo_tiny, but --recipe sft_tiny was given; leave --recipe out.",
        files={"my.yaml": "recipe: dpo_tiny\n"},
    ),
]
