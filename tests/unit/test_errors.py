"""How programs end: whose fault an exception is, and what is said of it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tgdpo_megatron.errors import CommandLine, UserError, in_short, lost_a_rank, refusal

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
from tgdpo_megatron.errors import LostRankError, UserError, one_sentence_errors

def inner():
    {statement}

with one_sentence_errors():
    try:
        inner()
    except KeyError:
        raise UserError("a mistake of the user.") from None
"""


def run(statement: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of which one line is given."""
    ours = ("RANK", "TGDPO_DEBUG", "TGDPO_LAUNCHED")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    program = PROGRAM.format(statement=statement)
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=kept | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        ("raise UserError('no such file.')", "no such file."),
        ("open('/nowhere/file')", "/nowhere/file: the operating system refused with 'No such file or directory'; "),
        ("raise MemoryError", "memory ran out (MemoryError); "),
    ],
)
def test_a_refusal_is_one_sentence_and_exit_code_2(statement: str, sentence: str) -> None:
    done = run(statement)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {sentence}") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("mistake", ["assert False, 'ours'", "{}.missing", "[][0]", "raise RuntimeError('ours')"])
def test_a_mistake_of_the_program_keeps_its_traceback_and_exits_with_1(mistake: str) -> None:
    done = run(mistake)
    assert done.returncode == 1
    assert "Traceback (most recent call last):" in done.stderr and "in inner" in done.stderr
    assert "error: " not in done.stderr.lower().splitlines()[0]


def test_every_line_of_a_ranks_traceback_names_the_rank() -> None:
    done = run("assert False, 'ours'", RANK="3")
    assert done.returncode == 1
    *traceback, last = done.stderr.splitlines()
    assert len(traceback) > 4 and all(line.startswith("[rank 3] ") for line in traceback), done.stderr
    assert last == "error: rank 3 failed with AssertionError: ours"


@pytest.mark.parametrize(
    ("statement", "code", "sentence"),
    [
        ("raise RuntimeError('Connection closed by peer [127.0.0.1]')", 3, "another rank ended; this one stops too."),
        ("raise LostRankError('rank 0 failed.')", 3, "rank 0 failed."),
    ],
)
def test_a_rank_that_lost_another_says_so_without_a_traceback(statement: str, code: int, sentence: str) -> None:
    done = run(statement, RANK="0")
    assert done.returncode == code
    assert done.stderr == f"error: {sentence}\n"


def test_debugging_shows_the_traceback_of_a_refusal_and_what_was_left_out_of_it() -> None:
    done = run("{}['hidden cause']", TGDPO_DEBUG="1")
    assert done.returncode == 2
    assert "KeyError: 'hidden cause'" in done.stderr
    assert "tgdpo_megatron.errors.UserError: a mistake of the user.\nerror: a mistake of the user.\n" in done.stderr
    assert run("{}['hidden cause']").stderr == "error: a mistake of the user.\n"


def test_a_program_may_end_as_it_likes() -> None:
    assert run("raise SystemExit(7)").returncode == 7


@pytest.mark.parametrize(
    "error", [AssertionError(), RuntimeError("The size of tensor a (2) must match"), ValueError("[Errno 28]")]
)
def test_what_is_neither_input_nor_system_is_no_refusal(error: Exception) -> None:
    assert refusal(error) is None


def test_a_full_disk_is_recognised_in_the_words_of_safetensors(tmp_path: Path) -> None:
    """A folder cannot be written like a file: that comes from the operating system as well."""
    import numpy as np
    from safetensors.numpy import save_file

    with pytest.raises(Exception, match=r"\(os error ") as caught:
        save_file({"a": np.zeros(1)}, tmp_path)
    assert str(refusal(caught.value)).startswith("the operating system refused with '")


def test_an_error_without_words_is_called_by_its_type() -> None:
    assert in_short(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert in_short(ValueError("First. Second.\nThird.")) == "First"


def test_only_the_words_for_a_lost_rank_mean_one() -> None:
    assert lost_a_rank(RuntimeError("Connection was likely closed. Did the remote server shutdown or crash?"))
    assert not lost_a_rank(RuntimeError("Timed out waiting 600000ms for recv operation to complete"))
    assert not lost_a_rank(UserError("Connection closed by peer"))


# ---------------------------------------------------------------- output that nobody reads


def first_line(*command: str) -> tuple[str, int, str]:
    """What `command | head -1` prints, and the exit code and stderr of the command."""
    piped = subprocess.run(
        ["bash", "-c", f"{{ {shlex.join([sys.executable, *command])}; echo $? >&2; }} | head -1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "TGDPO_DEBUG"},
    )
    *said, code = piped.stderr.splitlines()
    return piped.stdout, int(code), "\n".join(said)


MANY_LINES = """
from tgdpo_megatron.errors import one_sentence_errors
with one_sentence_errors():
    for number in range(20_000):
        print("line", number)
    {end}
"""


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(0)"])
def test_a_reader_that_has_read_enough_is_no_error(end: str) -> None:
    assert first_line("-c", MANY_LINES.format(end=end)) == ("line 0\n", 0, "")


def test_a_page_of_help_may_be_cut_off() -> None:
    line, code, said = first_line("-m", "recipes.train", "--help")
    assert (line, code, said) == ("Train a policy on preference pairs.\n", 0, "")


def test_tokens_may_be_cut_off(hf_model: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    row = '{"prompt": "Count.", "chosen": "' + "one two three " * 500 + '", "rejected": "no"}\n'
    pairs.write_text(row * 5)
    line, code, said = first_line("-m", "tools.tokens", str(pairs), str(hf_model), "data.max_length=100000")
    assert line.split()[:3] == ["1", "chosen", "0"] and (code, said) == (0, "")


def test_a_program_finishes_its_work_when_nobody_reads_what_it_prints(tmp_path: Path) -> None:
    """What it makes is in files; other ranks and later stages wait for it."""
    end = f"import sys; print('said', file=sys.stderr); open({str(tmp_path / 'done')!r}, 'w').write('finished')"
    assert first_line("-c", MANY_LINES.format(end=end)) == ("line 0\n", 0, "said")
    assert (tmp_path / "done").read_text() == "finished"


def test_a_program_without_standard_output_works() -> None:
    command = shlex.join([sys.executable, "-m", "recipes.train", "loss.betta=1"])
    done = subprocess.run(["bash", "-c", f"{command} >&-"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: command line: unknown key 'loss.betta'")


def test_a_pipe_that_broke_elsewhere_is_still_an_error() -> None:
    done = run("raise BrokenPipeError(32, 'Broken pipe')")
    assert done.returncode == 2 and "the operating system refused with 'Broken pipe'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ranks", "two", "a"], "--ranks 'two' is refused: it should be a whole number"),
        (["--share", "abc", "a"], "--share 'abc' is refused: it should be a number"),
        (["--kind", "c", "a"], "--kind 'c' is refused: it should be one of 'x', 'y'"),
        (["a", "--ranks"], "--ranks needs a value"),
        (["a", "--fast=1"], "--fast takes no value, but '1' was given"),
        ([], "FILE must be given"),
        (["a", "--rank", "2"], "--rank 2 is not known here"),
        (["a", "--top_p=0.9"], "--top_p is called --top-p here"),
        (["a", "--nucleus", "0.9"], "--nucleus is called --top-p here"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_refused_in_plain_words(arguments: list[str], sentence: str) -> None:
    parser = CommandLine(prog="program", allow_abbrev=False, others={"--nucleus": "--top-p"})
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--share", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--kind", choices=("x", "y"))
    parser.add_argument("--fast", action="store_true")
    with pytest.raises(UserError) as refused:
        parser.parse_args(arguments)
    assert str(refused.value) == f"command line: {sentence}; see program --help."
