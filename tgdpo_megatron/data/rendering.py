"""Render chat templates in a process of their own, which bounds their time and their memory.

A chat template is a program that comes with a model from elsewhere. transformers runs it in Jinja's sandbox, which
keeps it from files and from the rest of the program, but not from running for ever or from filling the memory. Here it
runs in a child process. The operating system ends the child when one rendering has used up its time, and gives it no
more memory than its share. This holds in any thread, and also while Python itself is busy within one operation.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from tgdpo_megatron.errors import UserError, in_short
from tgdpo_megatron.platform import programs

SECONDS = 10.0
"""Most CPU seconds of one rendering."""
MEMORY = 2**30
"""Bytes that rendering may take beside what the process has already."""
LONGEST = 2**26
"""Most characters of a rendered conversation."""
_IDLE = 2.0
"""Seconds after which the child ends when nothing is asked of it, so that it does not stay for a whole training."""


class TemplateRefusal(UserError):
    """The chat template does not accept a conversation, such as one with a system turn."""


class TemplateFailure(UserError):
    """The chat template ended like a program with a mistake."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any],
) -> str:
    """The text that a chat template makes of a conversation, as transformers' apply_chat_template makes it.

    Args:
        tools: What the conversation may call, as JSON schemas.
        variables: What the template finds beside these arguments, such as `bos_token`.

    Raises:
        TemplateRefusal: The template does not take the conversation.
        TemplateFailure: The template fails in the course of it.
        UserError: The template has a mistake of grammar, or takes too much time or memory.
    """
    text: str = _asked(
        "render",
        {
            "conversations": [list(messages)],
            "tools": list(tools) if tools else None,
            "chat_template": template,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        },
    )
    return text


def variables_of(template: str) -> list[str]:
    """Names of the variables that a template reads and that are not Jinja's or transformers' own. Sorted.

    Raises:
        UserError: As render.
    """
    names: list[str] = _asked("variables", {"template": template})
    return names


# ---------------------------------------------------------------- this process


class _Child:
    """The process that renders: a program of its own. A fork of a rank would share its network cards with it.

    Attributes:
        parent: Id of the process that started it.
        ending: Waits for its end, so that nothing is left of it then.
    """

    def __init__(self) -> None:
        self.parent = os.getpid()
        self.connection, theirs = Pipe()
        with theirs:
            self.program = subprocess.Popen(
                programs.command(__name__, theirs.fileno(), SECONDS, _IDLE),
                env=programs.environment(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # what the terminal or a launcher tells this process is not meant for it
            )
        self.ending = threading.Thread(target=self.program.wait, daemon=True)
        self.ending.start()
        try:
            self.connection.recv_bytes()
        except (EOFError, OSError):
            self.ending.join()
            raise RuntimeError(f"the program that renders chat templates did not start ({self.status})") from None

    @property
    def status(self) -> int:
        """How it ended: its exit code, or the number of a signal, negative."""
        return self.program.returncode

    def ask(self, question: tuple[str, dict[str, Any]]) -> Any:
        """Its answer.

        Raises:
            EOFError, OSError: It ended before it could answer.
        """
        self.connection.send(question)
        return json.loads(self.connection.recv_bytes())


_child: _Child | None = None
_one_at_a_time = threading.Lock()


def _asked(what: str, arguments: dict[str, Any]) -> Any:
    """Let the child do something, and raise what went wrong with it here."""
    global _child
    with _one_at_a_time:
        for is_last in (False, True):
            if _child is None or _child.parent != os.getpid():  # a process that was forked needs a child of its own
                _child = _Child()
            try:
                kind, found = _child.ask((what, arguments))
                break
            except (EOFError, OSError):
                ended, _child = _child, None
                ended.connection.close()
                ended.ending.join()
                # 0: it was idle and ended just now, or somebody else has asked how it ended.
                if ended.status != 0 or is_last:
                    raise UserError(_end(ended.status)) from None
            except BaseException:  # such as Ctrl-C: the answer to this question must not be taken for that to the next
                _child.connection.close()
                _child = None
                raise
    if kind == "done":
        return found
    raise {"refused": TemplateRefusal, "failed": TemplateFailure}.get(kind, UserError)(found)


def _end(status: int) -> str:
    """What is said of a child that ended while it was rendering."""
    if status == -signal.SIGPROF:
        return f"the chat template did not finish a conversation within {SECONDS:g} seconds; mend it."
    how = f"signal {-status}" if status < 0 else f"exit code {status}"
    return f"the chat template ended the process that renders it ({how}); mend it."


# ---------------------------------------------------------------- the child


def _serve(connection: Connection, seconds: float, idle: float) -> None:
    """Answer until the parent is gone or asks for nothing any more."""
    import transformers.utils.chat_template_utils  # noqa: F401  # before time and memory are counted

    connection.send_bytes(b"ready")
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())  # a template does not speak to the user
    with open("/proc/self/statm", encoding="utf-8") as file:
        pages = int(file.read().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    while connection.poll(idle):
        try:
            what, arguments = connection.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = _answer(what, arguments)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(json.dumps(answer).encode())


class _TooLong(Exception):
    """A rendered conversation is longer than any data."""


def _answer(what: str, arguments: dict[str, Any]) -> tuple[str, Any]:
    """`done` with the result, or `refused`, `failed` or `unusable` with a sentence."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        return "done", _variables(**arguments) if what == "variables" else _rendered(arguments)
    except TemplateSyntaxError as error:
        return "unusable", f"the chat template has a mistake in line {error.lineno} ({error.message}); mend it."
    except TemplateError as error:
        return "refused", f"the chat template refuses the conversation ({error})"
    except _TooLong:
        return "unusable", f"the chat template writes more than {LONGEST} characters for one conversation; mend it."
    except MemoryError:
        return "unusable", f"the chat template takes more than {MEMORY // 2**20} MiB of memory; mend it."
    except Exception as error:  # a template is a program: it can fail like one
        return "failed", f"the chat template fails ({type(error).__name__}: {in_short(error)}); mend it."


def _rendered(arguments: dict[str, Any]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    text: str = render_jinja_template(**arguments)[0][0]
    if len(text) > LONGEST:
        raise _TooLong
    return text


def _variables(template: str) -> list[str]:
    from jinja2 import Environment, ext, meta, nodes, parser

    class Generation(ext.Extension):
        """The block that transformers adds to Jinja. It only marks what it holds."""

        tags = {"generation"}

        def parse(self, parser: parser.Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Environment(extensions=[Generation, "jinja2.ext.loopcontrols"])
    parsed = environment.parse(template)
    given = {*environment.globals, "raise_exception", "strftime_now"}
    # Jinja also counts what a template sets in one branch and reads in another. Such a name is meant to be given only
    # where the template asks whether it was.
    own = {name.name for name in parsed.find_all(nodes.Name) if name.ctx == "store"}
    asked = {test.node.name for test in parsed.find_all(nodes.Test) if isinstance(test.node, nodes.Name)}
    return sorted(meta.find_undeclared_variables(parsed) - given - (own - asked))


if __name__ == "__main__":
    number, *limits = sys.argv[1:]
    _serve(Connection(int(number)), *map(float, limits))
