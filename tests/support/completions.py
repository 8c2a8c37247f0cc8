"""A small completions server: transformers' own `generate`, spoken to as vLLM's server is.

It stands for a program of others. `transformers serve` has the same route, but takes no token ids.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, MutableSequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Completions:
    """A server with one model.

    Attributes:
        name: What it calls the model.
        seconds: How long it waits before each answer.
        says_ids: Whether it returns the token ids of answers, as vLLM does where it is asked.
        tokenizes: Whether it has /tokenize.
        key: What it asks for as a key.
        max_model_len: What it says of the longest sequence.
        fails: Says for the number of a request, from 0, with which status it fails; 0 to answer, -1 to hang up.
        url: Where it listens.
        asked: The completions that it was asked for.
        at_once, most_at_once: Requests under way, now and at most.
    """

    folder: Path
    name: str
    seconds: float = 0.0
    says_ids: bool = True
    tokenizes: bool = True
    key: str = ""
    max_model_len: int | None = None
    fails: Callable[[int], int] = lambda number: 0
    url: str = ""
    asked: MutableSequence[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    def __post_init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder)
        self.lock = threading.Lock()

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request of /v1/completions."""
        import torch

        prompt = request["prompt"]
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ends = request.get("stop_token_ids") or [self.tokenizer.eos_token_id]
        how: dict[str, Any] = {"do_sample": False}
        if request.get("temperature"):
            how = {"do_sample": True, "temperature": request["temperature"], "top_p": request["top_p"]}
            how["top_k"] = max(request["top_k"], 0)
        with self.lock:
            torch.manual_seed(request.get("seed", 0))
            made = self.model.generate(
                torch.tensor([ids]),
                max_new_tokens=request["max_tokens"],
                eos_token_id=ends,
                pad_token_id=0,
                **how,
            )[0, len(ids) :].tolist()
        choice = {
            "index": 0,
            "text": self.tokenizer.decode(made, skip_special_tokens=True),
            "finish_reason": "stop" if made[-1] in ends else "length",
        }
        if self.says_ids and request.get("return_token_ids"):
            choice["token_ids"] = made
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(made)}
        return {"object": "text_completion", "model": self.name, "choices": [choice], "usage": usage}


@contextlib.contextmanager
def served(server: Completions) -> Iterator[Completions]:
    """The server while it listens."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            model: dict[str, Any] = {"id": server.name, "object": "model"}
            if server.max_model_len is not None:
                model["max_model_len"] = server.max_model_len
            self._say({"object": "list", "data": [model]} if self.path == "/v1/models" else None)

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                ids = server.tokenizer(request["prompt"], add_special_tokens=request["add_special_tokens"])["input_ids"]
                self._say({"tokens": ids, "count": len(ids)} if server.tokenizes else None)
                return
            with server.lock:
                number = len(server.asked)
                server.asked.append(request)
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            time.sleep(server.seconds)
            status = server.fails(number)
            content = {"error": "on purpose"} if status else server.complete(request)
            with server.lock:  # before it is answered: who has the answer may ask for the next one at once
                server.at_once -= 1
            if status >= 0:
                self._say(content, status or 200)

        def _say(self, content: Any, status: int = 200) -> None:
            if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
                status = 401
            body = json.dumps(content).encode()
            with contextlib.suppress(OSError):  # nobody waits for the answer any more
                self.send_response(404 if content is None else status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{listening.server_address[1]}"
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
