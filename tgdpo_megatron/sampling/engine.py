"""Who answers: one small interface, and two engines behind it.

    engine = open_engine("runs/aligned/hf")
    text, ids = encode_prompt(engine.tokenizer, [{"role": "user", "content": "Hello."}])
    settings = Sampling(temperature=0.8, max_new_tokens=512)
    for answer in engine.answers(Request(tuple(ids), sample, seed=0, settings=settings) for sample in range(5)):
        print(answer.text)

Importing this loads neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from tgdpo_megatron.bounded import read_json
from tgdpo_megatron.checkpoint.sources import Source, check_unconverted, find
from tgdpo_megatron.data.tokenizer import check_template, end_of_turn, load_tokenizer, text_of
from tgdpo_megatron.errors import UserError

EngineName = Literal["transformers", "http"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Nothing that is not said here changes it.

    Attributes:
        temperature: Logits are divided by it. 0 takes the likeliest token.
        top_p: Only the likeliest tokens are kept that have this probability together. 1 keeps all.
        top_k: Only so many of the likeliest tokens are kept. 0 keeps all.
        repetition_penalty: Logits of tokens of the prompt and of the answer so far are divided by it where they are
            positive, and multiplied where they are negative. 1 changes nothing.
        max_new_tokens: Longest answer, in tokens. At the model's last position an answer ends as well.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 4096

    def check(self) -> None:
        """Refuse values without meaning.

        Raises:
            UserError: A value is out of range.
        """
        ranges: dict[str, tuple[bool, str]] = {
            "temperature": (0 <= self.temperature < math.inf, "a number from 0 on; 0 takes the likeliest token"),
            "top_p": (0 < self.top_p <= 1, "a probability above 0; 1 keeps every token"),
            "top_k": (self.top_k >= 0, "a number of tokens; 0 keeps every token"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a number above 0; 1 changes nothing"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least one token"),
        }
        for name, (is_right, expected) in ranges.items():
            if not is_right:
                raise UserError(f"{name} {getattr(self, name)} is refused: it should be {expected}.")


@dataclass(frozen=True)
class Request:
    """One answer that is asked for.

    Attributes:
        ids: The prompt's token ids, as encode_prompt makes them.
        sample: Number of the answer among those to the same prompt, from 0.
        seed: The seed of the whole run.
    """

    ids: tuple[int, ...]
    sample: int
    seed: int
    settings: Sampling

    @cached_property
    def own_seed(self) -> int:
        """The seed of this answer's noise: 31 bits of a hash of the run's seed, the prompt and the sample's number.

        So neither the order of the prompts, nor their number, nor the batch changes it. Every server takes 31 bits.
        """
        digest = hashlib.sha256(f"{self.seed} {prompt_id(self.ids)} {self.sample}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: Without special tokens. Thinking blocks are part of it.
        ids: Its tokens, with the one that closed the turn; None where a server does not tell.
        num_tokens: Their number.
        finish_reason: `stop`: the model closed its turn. `length`: there was no room left.
    """

    text: str
    ids: tuple[int, ...] | None
    num_tokens: int
    finish_reason: Literal["stop", "length"]


def nobody(tokens: int) -> object:
    """Told of new tokens, does nothing."""


class Engine(Protocol):
    """Answers requests.

    Attributes:
        name: `transformers` or `http`.
        model: As Answered.model.
        tokenizer: With the chat template that prompts are rendered with.
        max_length: Most tokens of a prompt and its answer together.
        block: How many different prompts, counted from the first request, are computed together. Answers are the same
            bits where a stream of requests begins at a multiple of it as where the stream is not interrupted.
    """

    name: EngineName
    model: dict[str, Any]
    tokenizer: Any
    max_length: int
    block: int

    def answers(self, requests: Iterable[Request], told: Callable[[int], object] = nobody) -> Iterator[Answer]:
        """Answers in the order of the requests. A bounded number of requests is read ahead.

        Args:
            told: Called with numbers of new tokens, as they come.

        Raises:
            UserError: A prompt leaves no room for an answer, memory ran out, or the server failed.
        """
        ...


def open_engine(
    model: str | Path,
    *,
    engine: EngineName = "transformers",
    url: str = "",
    served_model: str = "",
    template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    concurrency: int = 64,
    retries: int = 6,
    device: str | None = None,
) -> Engine:
    """Load a model, or find the server that has it.

    Args:
        model: A HuggingFace folder, or a model's name on a hub. With `http` only its tokenizer is read.
        url: For `http`: where the server listens, such as http://localhost:8000.
        served_model: For `http`: what the server calls the model. Default: `model`.
        template, chat_template_kwargs: As data.template and data.chat_template_kwargs.
        batch_size: For `transformers`: answers that are computed at once.
        concurrency: For `http`: requests that are under way at once.
        retries: For `http`: how often a request is made again that the server could not answer at the moment.
        device: For `transformers`. Default: the first GPU, or the CPU where there is none.

    Raises:
        UserError: The model cannot be used, or the server is not there, has another model or another tokenizer.
    """
    source = find(Path(model), needs="model" if engine == "transformers" else "tokenizer")
    if source.is_converted and (source.folder / "manifest.json").is_file():
        raise UserError(
            f"{model}: is a Megatron checkpoint; export it first (python -m tools.convert_megatron_to_hf {model} "
            "FOLDER), and sample from the folder."
        )
    check_unconverted(source, needs="model" if engine == "transformers" else "tokenizer")
    tokenizer = load_tokenizer(source.folder, template, chat_template_kwargs)
    check_template(tokenizer)
    if engine == "http":
        from tgdpo_megatron.sampling.http_engine import HttpEngine

        served = served_model or str(model)
        return HttpEngine(source, tokenizer, url=url, served_model=served, concurrency=concurrency, retries=retries)
    from tgdpo_megatron.sampling.transformers_engine import TransformersEngine

    return TransformersEngine(source, tokenizer, batch_size=batch_size, device=device)


def room_for(request: Request, max_length: int) -> int:
    """Longest answer to a request, in tokens.

    Raises:
        UserError: The prompt leaves no room.
    """
    room = min(request.settings.max_new_tokens, max_length - len(request.ids))
    if room < 1:
        raise UserError(
            f"a prompt has {len(request.ids):,} tokens, and the model takes {max_length:,} with the answer; leave long "
            "prompts out."
        )
    return room


def max_length_of(source: Source) -> int:
    """Most tokens of a prompt and its answer together, by a HuggingFace folder's config.json."""
    from tgdpo_megatron.checkpoint.hf_models import positions_in

    return positions_in(source.folder) or 2**31


def end_ids(source: Source, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the template's end of turn, the tokenizer's end, and those that the model names.

    Raises:
        UserError: A file of the folder cannot be read.
    """
    found = {end_of_turn(tokenizer), tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        if (source.folder / name).is_file():
            content = read_json(source.folder / name, what="settings of a model")
            named = content.get("eos_token_id") if isinstance(content, dict) else None
            found |= set(named if isinstance(named, list) else [named])
    return sorted(token for token in found if type(token) is int)


def said(tokenizer: Any, ids: Sequence[int], special: set[int]) -> str:
    """The text of an answer's tokens, without special tokens, but with thinking blocks.

    Args:
        special: The tokenizer's special_ids.
    """
    return text_of(tokenizer, [token for token in ids if token not in special])


def prompt_id(ids: Sequence[int] | np.ndarray) -> str:
    """SHA-256 of a prompt's token ids, as hex."""
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest()
