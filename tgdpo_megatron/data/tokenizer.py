"""The tokenizer of a checkpoint: how it is loaded and identified, and how it turns a pair into token ids."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.config.settings import GIVEN_ANYWAY
from tgdpo_megatron.data import rendering, thinking
from tgdpo_megatron.data.rendering import TemplateRefusal
from tgdpo_megatron.errors import UserError, in_short

DATE = "26 Jul 2024"
"""The date given to templates that write today's date, as Llama-3.2's does. It is fixed to keep token ids the same."""


AS_THEY_ARE = "none"
"""The data.template that takes texts as they are."""
_AS_THEY_ARE = (
    "{%- if messages[0]['role'] != 'user' or messages[1:] | rejectattr('role', 'equalto', 'assistant') | list -%}"
    "{{ raise_exception('data.template=none takes only prompts that are one text, without turns') }}{%- endif -%}"
    "{%- for message in messages %}{{ message['content'] }}{% endfor -%}"
)


def load_tokenizer(folder: Path, template: str | None = None, template_kwargs: Mapping[str, Any] | None = None) -> Any:
    """Load a fast tokenizer from a local folder, never from a hub and never with remote code.

    Args:
        template: As data.template: a file with the chat template to use, `none` for texts that are taken as they are,
            or None for the tokenizer's own template, if it has one.
        template_kwargs: As data.chat_template_kwargs: what every rendering gives the template.

    Raises:
        UserError: No tokenizer in the folder, one that cannot be loaded, a template that cannot be read, or an argument
            that the template does not read.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json there; save the tokenizer beside the model.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        tokenizer("a")  # some settings are first looked at here
    except Exception as error:  # only the libraries' code is in here, and what they raise about a damaged file varies
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({in_short(error)}).") from error
    if template is not None:
        tokenizer.chat_template = _AS_THEY_ARE if template == AS_THEY_ARE else read_template(Path(template))
    if template_kwargs:
        _check_kwargs(tokenizer, template_kwargs)
        # It belongs to the template, and wherever that is used it must be given: so it goes along with the tokenizer.
        tokenizer.chat_template_kwargs = dict(template_kwargs)
    return tokenizer


def tokenizer_for(folder: Path, data: DataConfig) -> Any:
    """The tokenizer in a folder, with the template and its arguments that the settings of the data give it.

    Raises:
        UserError: As load_tokenizer.
    """
    return load_tokenizer(folder, data.template, data.chat_template_kwargs)


def kwargs_of(tokenizer: Any) -> dict[str, Any]:
    """What every rendering gives the tokenizer's chat template: the data.chat_template_kwargs it was loaded with."""
    found: dict[str, Any] = getattr(tokenizer, "chat_template_kwargs", {})
    return found


def _check_kwargs(tokenizer: Any, given: Mapping[str, Any]) -> None:
    """Refuse an argument that the template does not read: it would change nothing but the hash.

    Raises:
        UserError: There is no template, it has a mistake, or it does not read an argument.
    """
    templates = tokenizer.chat_template
    if not templates:
        raise UserError("data.chat_template_kwargs: the tokenizer has no chat template that could read them.")
    texts = templates.values() if isinstance(templates, Mapping) else [templates]
    read = {name for text in texts for name in rendering.variables_of(text)}
    settable = sorted(read - GIVEN_ANYWAY - set(tokenizer.special_tokens_map))
    for name in given:
        if name not in settable:
            raise UserError(
                f"data.chat_template_kwargs: the chat template does not read '{name}'; "
                + (f"it reads {', '.join(settable)}." if settable else "it reads nothing that can be set.")
            )


def template_of(setting: str | None) -> str | None:
    """The text of the chat template in the file that data.template names; None where it names none.

    Raises:
        UserError: As read_template.
    """
    return None if setting in (None, AS_THEY_ARE) else read_template(Path(str(setting)))


def read_template(path: Path) -> str:
    """The text of a chat template.

    Raises:
        UserError: There is no such file, or it is no text, or it is empty.
    """
    if not path.is_file():
        raise UserError(
            f"data.template={path}: no such file; give a Jinja chat template, or none for texts as they are."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"data.template={path}: the file is not UTF-8 text.") from None
    if not text.strip():
        raise UserError(f"data.template={path}: the file is empty.")
    return text


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary, merges, normalisation and special tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None  # settings of the last call, not part of the identity
    identity = {"backend": backend, "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def template_hash(tokenizer: Any) -> str:
    """SHA-256 of the chat template, of the date that the template is given, and of data.chat_template_kwargs."""
    return hash_of(tokenizer.chat_template, kwargs_of(tokenizer))


def hash_of(template: str | Mapping[str, str] | None, kwargs: Mapping[str, Any] | None = None) -> str:
    """As template_hash, of a template: its text, or text by name."""
    identity = [template, DATE, kwargs] if kwargs else [template, DATE]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def encode_prompt(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> tuple[str, list[int]]:
    """Render and tokenise the turns before an answer, with the answer's header.

    Args:
        messages: Turns as chat templates take them. The last is from the user or from a tool.
        tools: What the model may call, as JSON schemas.

    Returns:
        The text, and its ids, with exactly one BOS if the template or the tokenizer adds one.

    Raises:
        TemplateRefusal: The template does not take these turns.
    """
    text = render(tokenizer, messages, tools, add_generation_prompt=True)
    return text, _with_one_bos(tokenizer, text)


def encode_conversation(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """Ids of a whole conversation as one text, with all that the template writes after its last turn.

    Raises:
        TemplateRefusal: The template does not take these turns.
    """
    return _with_one_bos(tokenizer, render(tokenizer, messages, tools))


def _with_one_bos(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that a template wrote, with exactly one BOS if the template or the tokenizer adds one."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    body = ids
    while body and body[0] == bos:
        body = body[1:]
    in_template = len(body) < len(ids)
    added_by_tokenizer = tokenizer("", add_special_tokens=True)["input_ids"][:1] == [bos]
    return [bos, *body] if in_template or added_by_tokenizer else body


def encode_response(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    prompt_text: str,
    response: str | Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Ids of the assistant's turn, from its first token to the token that closes it.

    The turn is tokenised separately from the prompt, so that no token spans the boundary. What the template writes
    after the end-of-turn token, often a newline, is left out, because generation stops before it.

    Args:
        messages: The turns before the answer.
        prompt_text: The text that encode_prompt rendered from them.
        response: The text of the answer, or the whole turn where it also has tool_calls or reasoning_content.
        tools: As for encode_prompt.

    Raises:
        UserError: The template renders the prompt differently once there is an answer, or nothing closes the turn.
        TemplateRefusal: The template does not take these turns, or leaves no way to write the answer as the model does.
    """
    answer = {"role": "assistant", "content": response} if isinstance(response, str) else response
    said = _said(tokenizer, messages, prompt_text, answer, tools)
    ids: list[int] = tokenizer(said, add_special_tokens=False)["input_ids"]
    special = special_ids(tokenizer)
    last_special = max((place for place, token in enumerate(ids) if token in special), default=-1)
    if last_special >= 0 and not tokenizer.decode(ids[last_special + 1 :]).strip():
        return ids[: last_special + 1]
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the chat template closes no turn and the tokenizer has no end-of-sequence token; give it either one."
        )
    return [*ids, tokenizer.eos_token_id]


_PROBE = "zq-answer-zq"
"""An answer that no template changes, and that is found again in what a template writes."""


def _said(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    prompt_text: str,
    answer: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]],
) -> str:
    """What the model writes after the prompt, its thinking block included, and what the template writes after that.

    A template that drops the block from the answer, or has opened it in the prompt, renders something else than the
    model writes. Then the answer is taken as it stands, between the prompt and what the template writes after answers.

    Raises:
        UserError, TemplateRefusal: As encode_response.
    """
    text = render(tokenizer, [*messages, answer], tools)
    if text.startswith(prompt_text) and thinking.keeps(text[len(prompt_text) :], prompt_text, answer):
        return text[len(prompt_text) :]
    thought, start = thinking.thought_of(answer), thinking.opened(prompt_text)
    probed = render(tokenizer, [*messages, {"role": "assistant", "content": _PROBE}], tools)
    before, _, after = probed.rpartition(_PROBE)
    if thinking.is_closed(prompt_text) and thought:
        raise TemplateRefusal("an answer has a thinking block, and the prompt ends with a closed one")
    same = thinking.without_block(before) == thinking.without_block(prompt_text)
    if not same or (thought is None and not start):
        raise UserError(
            "the chat template does not render the prompt the same way with and without an answer; "
            "give the tokenizer a template that does."
        )
    if thought is None:
        raise TemplateRefusal("the prompt opens a thinking block, and an answer does not close it")
    if answer.get("tool_calls") or (answer.get("reasoning_content") and not start):
        raise TemplateRefusal("the chat template drops the thinking block of an answer")
    return thinking.as_written(prompt_text, answer) + after


def check_template(tokenizer: Any) -> None:
    """Check that the template keeps an answer, and that a prompt ends with the answer's header.

    Raises:
        UserError: There is no template, it loses the answer, or the prompt lacks the header, which would then be
            learned as the start of every answer.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template; give data.template=FILE.jinja, or data.template=none for texts that "
            "are taken as they are."
        )
    turn, answer = {"role": "user", "content": "a"}, "answer"
    prompt_text, _ = encode_prompt(tokenizer, [turn])
    if answer not in render(tokenizer, [turn, {"role": "assistant", "content": answer}]).removeprefix(prompt_text):
        raise UserError("the chat template loses the assistant's answer; give data.template=FILE.jinja that writes it.")
    if _short_answer(tokenizer)[0] in special_ids(tokenizer):
        raise UserError(
            "the chat template ignores add_generation_prompt, so the header of an answer would be learned as its "
            "start; give the tokenizer a template that uses add_generation_prompt."
        )


def end_of_turn(tokenizer: Any) -> int:
    """Id of the token that closes an answer. The template must have passed check_template."""
    return _short_answer(tokenizer)[-1]


def _short_answer(tokenizer: Any) -> list[int]:
    """Ids of an answer of one word to a short prompt, after a thinking block where the template opens one."""
    turn, answer = {"role": "user", "content": "a"}, "answer"
    prompt_text, _ = encode_prompt(tokenizer, [turn])
    if thinking.opened(prompt_text):
        answer = f"a\n{thinking.CLOSE}\n\n{answer}"
    return encode_response(tokenizer, [turn], prompt_text, answer)


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens included."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token. A character that spans several tokens is the text of the last; the others are empty."""
    texts: list[str] = []
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = text_of(tokenizer, pending)
        # A character has at most 4 bytes in UTF-8. A response that was cut may end within one.
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or len(pending) == 4 or len(texts) == len(ids) - 1
        texts.append(text if whole else "")
        if whole:
            pending = []
    return texts


def special_texts(tokenizer: Any) -> list[str]:
    """The texts of the tokenizer's special tokens."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


MARKS = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<｜User｜>", "<｜Assistant｜>"),
)
"""What the chat templates of many models write around turns, whether or not a tokenizer has it as a token."""


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Finds the texts of the tokenizer's special tokens, and marks of chat templates, but no thinking blocks."""
    texts = [text for text in (*special_texts(tokenizer), *MARKS) if text not in thinking.MARKS]
    return re.compile("|".join(map(re.escape, texts)))


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the special tokens, without those that begin and end thinking blocks, which are part of an answer."""
    return {
        token
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special and added.content not in thinking.MARKS
    }


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The text that the tokenizer's chat template makes of a conversation.

    Raises:
        UserError: As rendering.render, or several templates of which none is the usual one.
    """
    try:
        template = tokenizer.get_chat_template(None, list(tools) or None)
    except ValueError as error:
        raise UserError(f"the tokenizer has no chat template to use ({in_short(error)}).") from error
    return rendering.render(
        template,
        messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        variables={**tokenizer.special_tokens_map, "date_string": DATE, **kwargs_of(tokenizer)},
    )
