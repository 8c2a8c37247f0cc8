"""Answers by a server that speaks OpenAI's completions protocol, such as vLLM's or SGLang's.

The prompt is sent as token ids of our template, so that the server renders nothing and adds no second BOS. Every
parameter is sent: what a request leaves out, a server takes from the model's generation_config.json. The key, if the
server asks for one, is in the environment variable TGDPO_API_KEY, and goes to this server only.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from tgdpo_megatron.bounded import LIMIT, parse_json, shown
from tgdpo_megatron.checkpoint.sources import Source
from tgdpo_megatron.data.tokenizer import encode_prompt, special_ids
from tgdpo_megatron.errors import UserError, in_short
from tgdpo_megatron.sampling.engine import (
    Answer,
    EngineName,
    Request,
    end_ids,
    max_length_of,
    nobody,
    room_for,
    said,
)

KEY = "TGDPO_API_KEY"
_SECONDS = 600.0
"""An answer that takes longer is asked for again."""
_SECONDS_TO_CHECK = 30.0
_LONGEST_WAIT = 30.0
"""Seconds between two tries; the first wait is one second, and each is twice as long as the one before."""
_AHEAD = 4
"""Answers that wait for an earlier one, for each request that may be under way."""
_PROBE = "Naïve café, 12345 + 6.7e-8 — 你好, мир!\n\tdef f(x):\n\t\treturn x**2  # 🙂 ﷺ"
"""A text that tokenizers cut in different ways."""


class HttpEngine:
    """A server. Attributes as Engine's.

    Args:
        source: A folder with the model's tokenizer.
        url: Where the server listens.
        served_model: What the server calls the model.
        concurrency: Requests that are under way at once.
        retries: How often a request is made again that a server did not answer, or could not at the moment.

    Raises:
        UserError: There is no server, or it has another model or another tokenizer.
    """

    name: EngineName = "http"
    block = 1

    def __init__(
        self, source: Source, tokenizer: Any, *, url: str, served_model: str, concurrency: int = 64, retries: int = 6
    ) -> None:
        self.tokenizer = tokenizer
        self.model = {"name": str(source.given), "fingerprint": None, "served": served_model}
        self._server, self._served = _Server(url), served_model
        self._concurrency, self._retries = concurrency, retries
        self._ends, self._special = end_ids(source, tokenizer), special_ids(tokenizer)
        self.max_length = min(max_length_of(source), self._check_model())
        self._check_tokenizer()

    def answers(self, requests: Iterable[Request], told: Callable[[int], object] = nobody) -> Iterator[Answer]:
        """As Engine.answers."""
        pending: deque[Future[Answer]] = deque()
        free = threading.Semaphore(self._concurrency)
        for request in requests:
            free.acquire()
            pending.append(_begun(partial(self._answer, request), free))
            while pending and (pending[0].done() or len(pending) >= _AHEAD * self._concurrency):
                yield _told(pending.popleft().result(), told)
        while pending:
            yield _told(pending.popleft().result(), told)

    def _answer(self, request: Request) -> Answer:
        """One answer, asked for again where the server could not give it at the moment."""
        content = self._content(request)
        for retry in range(self._retries + 1):
            if retry:
                time.sleep(min(2.0 ** (retry - 1), _LONGEST_WAIT))
            try:
                return self._read(self._server.ask("/v1/completions", content, seconds=_SECONDS))
            except _NotNow as error:
                reason = str(error)
        raise UserError(
            f"{self._server.url}: no answer after {self._retries + 1} tries ({reason}); what was made is kept; mend "
            "the server, and give the same command again."
        )

    def _content(self, request: Request) -> dict[str, Any]:
        """A request as the server reads it."""
        settings = request.settings
        return {
            "model": self._served,
            "prompt": list(request.ids),
            "max_tokens": room_for(request, self.max_length),
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k or -1,  # what vLLM and SGLang both take for all tokens
            "min_p": 0.0,
            "repetition_penalty": settings.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_tokens": 0,
            "seed": request.own_seed,
            "stop_token_ids": self._ends,
            "ignore_eos": False,
            "n": 1,
            "stream": False,
            "echo": False,
            "skip_special_tokens": True,
            "return_token_ids": True,  # vLLM's; others pass it over
        }

    def _read(self, content: Any) -> Answer:
        """The answer in what the server said.

        Raises:
            _NotNow: The server gave up on this answer.
            UserError: It does not speak the protocol.
        """
        try:
            choice = content["choices"][0]
            reason, ids, text = choice["finish_reason"], choice.get("token_ids"), choice["text"]
            tokens = content["usage"]["completion_tokens"] if ids is None else len(ids)
            if not isinstance(text, str) or type(tokens) is not int:
                raise TypeError
            if ids is not None:
                text = said(self.tokenizer, ids, self._special)
        except (KeyError, IndexError, TypeError, AttributeError, OverflowError):
            raise UserError(
                f"{self._server.url}: the server's answer is not that of /v1/completions ({shown(content)})."
            ) from None
        if reason not in ("stop", "length"):
            raise _NotNow(f"it finished an answer by '{reason}'")
        text = text.encode("utf-8", "replace").decode()  # JSON can hold half a character
        return Answer(text, None if ids is None else tuple(ids), tokens, reason)

    # ---------------------------------------------------------------- checks before the first request

    def _check_model(self) -> int:
        """The most tokens that the server takes.

        Raises:
            UserError: It does not have the model.
        """
        content = self._server.check("/v1/models")
        try:
            models = {str(model["id"]): model for model in content["data"]}
        except (KeyError, TypeError):
            raise UserError(
                f"{self._server.url}: does not list its models at /v1/models; give another --url."
            ) from None
        if self._served not in models:
            raise UserError(
                f"{self._server.url}: serves {', '.join(models) or 'no model'}, not {self._served}; if that is the "
                "same model, name it with --served-model."
            )
        length = models[self._served].get("max_model_len")
        return length if type(length) is int and length > 0 else 2**31

    def _check_tokenizer(self) -> None:
        """Refuse a server that cuts texts in other ways: then its token ids mean something else than ours.

        vLLM and SGLang say how they cut a text. Of another server only the number of tokens is known.
        """
        text, _ = encode_prompt(self.tokenizer, [{"role": "user", "content": _PROBE}])
        ours = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        try:
            content = {"model": self._served, "prompt": text, "add_special_tokens": False}
            same = self._server.check("/tokenize", content)["tokens"] == ours
        except (_Refused, KeyError, TypeError):
            content |= {"max_tokens": 1, "temperature": 0.0}
            try:
                counted = self._server.check("/v1/completions", content)["usage"]["prompt_tokens"]
            except (KeyError, TypeError):
                raise UserError(f"{self._server.url}: does not say how many tokens a prompt has.") from None
            same = counted in (len(ours), len(ours) + 1)  # a BOS may come before
        if not same:
            raise UserError(
                f"{self._server.url}: its tokenizer cuts a text in another way than that of {self.model['name']}; "
                "start the server with this model, or give the model that it serves."
            )


class _NotNow(Exception):
    """The server could not answer at the moment."""


class _Refused(UserError):
    """The server does not take the request, or does not know the path."""


class _Server:
    """A server's address, and requests to it, each on a connection of its own.

    Proxies are not asked, and redirections not followed: the key goes where the user said.

    Raises:
        UserError: The address is none.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.fragment:
            raise UserError(f"--url {url}: is no server's address, such as http://localhost:8000.")
        if parts.username or parts.password:
            raise UserError(f"--url: give the key in the environment variable {KEY}, not in the address.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port = parts.hostname, port

    def ask(self, path: str, content: Any = None, *, seconds: float) -> Any:
        """What the server answers, as JSON.

        Args:
            content: What is posted; None to get.

        Raises:
            _NotNow: It is down, silent, busy, or has failed.
            _Refused: It does not take the request, or does not know the path.
            UserError: It asks for a key, or answers with something else than JSON.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        method, body = ("GET", None) if content is None else ("POST", json.dumps(content))
        connection = self._connect(self._host, self._port, timeout=seconds)
        try:
            connection.request(method, self._path + path, body, headers)
            response = connection.getresponse()
            status, text = response.status, response.read(LIMIT + 1)[:LIMIT].decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            raise _NotNow(getattr(error, "strerror", None) or in_short(error)) from error
        finally:
            connection.close()
        if status in (408, 409, 425, 429) or status in range(500, 600) and status != 501:
            raise _NotNow(f"status {status}")
        if status in (401, 403):
            raise UserError(f"{self.url}: the server asks for a key; set the environment variable {KEY}.")
        if status != 200:
            raise _Refused(f"{self.url}: the server refuses {path} with {status} ({' '.join(text.split())[:300]}).")
        return parse_json(text, where=f"{self.url}{path}")

    def check(self, path: str, content: Any = None) -> Any:
        """As ask, once and not for long.

        Raises:
            UserError: As ask; or the server does not answer.
        """
        try:
            return self.ask(path, content, seconds=_SECONDS_TO_CHECK)
        except _NotNow as error:
            raise UserError(
                f"{self.url}: no server answers there ({error}); start one, or wait until it has loaded its model."
            ) from None


def _begun(work: Callable[[], Answer], free: threading.Semaphore) -> Future[Answer]:
    """Do something in a thread that does not keep the program from ending, unlike those of a ThreadPoolExecutor."""
    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        finally:
            free.release()

    threading.Thread(target=run, daemon=True).start()
    return future


def _told(answer: Answer, told: Callable[[int], object]) -> Answer:
    told(answer.num_tokens)
    return answer
