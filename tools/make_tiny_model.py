"""Make a small random model of any family, with a byte-level BPE tokenizer trained on the texts of a file of pairs.

The result is an ordinary HuggingFace model folder, for demos and tests: a model that answers, or a reward model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tgdpo_megatron.data.formats import read_pairs
from tgdpo_megatron.errors import CommandLine, one_sentence_errors
from tgdpo_megatron.model.families import FAMILIES

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def train_tokenizer(texts: Sequence[str], *, vocab_size: int, merge_digits: bool = True) -> Any:
    """Train a byte-level BPE tokenizer with a chat template.

    Args:
        vocab_size: Largest number of tokens, special tokens and the 256 bytes included.
        merge_digits: Whether tokens may hold several digits. False makes every digit a token of its own.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [] if merge_digits else [pre_tokenizers.Digits(individual_digits=True)]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(
    folder: Path, tokenizer: Any, *, family: str = "llama", seed: int = 0, reward_model: bool = False, **shape: Any
) -> None:
    """Save a randomly initialised model and its tokenizer.

    Args:
        family: HuggingFace's `model_type`; one of those in tgdpo_megatron/model/families/.
        reward_model: Whether to make a sequence classifier with one label.
        shape: Fields of HuggingFace's configuration that differ from the small defaults.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        **({"num_labels": 1} if reward_model else {}),
        **shape,
    }
    sizes.setdefault("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        auto_class = AutoModelForSequenceClassification if reward_model else AutoModelForCausalLM
        auto_class.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    with one_sentence_errors():
        parser = CommandLine(prog="python -m tools.make_tiny_model", description=__doc__)
        parser.add_argument("pairs", type=Path, help="file of pairs whose texts train the tokenizer")
        parser.add_argument("hf_folder", type=Path, help="model folder to make")
        parser.add_argument(
            "--family",
            choices=sorted(FAMILIES),
            default="llama",
            help="its model_type (default: %(default)s)",
        )
        parser.add_argument(
            "--vocab-size", type=int, default=1000, help="largest number of tokens (default: %(default)s)"
        )
        parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: %(default)s)")
        parser.add_argument(
            "--reward-model", action="store_true", help="make a reward model, which gives answers random scores"
        )
        parsed = parser.parse_args()
        texts = [text for pair in read_pairs(parsed.pairs).pairs for text in pair.texts]
        tokenizer = train_tokenizer(texts, vocab_size=parsed.vocab_size)
        made = {"family": parsed.family, "seed": parsed.seed, "reward_model": parsed.reward_model}
        make_model(parsed.hf_folder, tokenizer, **made)
        print(parsed.hf_folder)


if __name__ == "__main__":
    main()
