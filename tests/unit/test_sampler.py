"""From prompts to the file of answers: resumed, refused, bounded. The server is a real one on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.support.completions import Completions, served
from tests.support.in_process import Program
from tests.support.ports import free_port
from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.data.tokenizer import load_tokenizer
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.sampling.answers import read_answers
from tgdpo_megatron.sampling.engine import Answer, EngineName, Request, Sampling, nobody, open_engine
from tgdpo_megatron.sampling.kept_ids import read_ids
from tgdpo_megatron.sampling.prompts import encode_prompts, read_prompts
from tgdpo_megatron.sampling.sampler import sample
from tools.sample import USUAL_NAMES, main

TEXTS = ["Add 2 and 3.", "Name a colour.", "Say hello.", "Write the word tree.", "Add 4 and 4, and then 5.", "Why?"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(TEXTS))
    return path


@pytest.fixture
def run(hf_model: Path, prompts: Path, tmp_path: Path, in_process: Program) -> Callable[..., tuple[int, str]]:
    """A function that runs tools.sample in this process: its exit code, and what it said."""

    def run(*options: str, output: str = "answers.jsonl", given: Sequence[str] = ()) -> tuple[int, str]:
        common = ["--output", str(tmp_path / output), "--n", "2", "--max-new-tokens", "6", "--batch-size", "2"]
        return in_process(main, [*(given or (hf_model, prompts)), *common, *options])

    return run


Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def server(hf_model: Path) -> Iterator[Completions]:
    with served(Completions(hf_model, str(hf_model))) as one:
        yield one


@contextlib.contextmanager
def changed(server: Completions, **changes: Any) -> Iterator[None]:
    """Another behaviour of the server, for a while."""
    before = {name: getattr(server, name) for name in changes}
    server.asked.clear()
    server.most_at_once = 0
    for name, value in changes.items():
        setattr(server, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(server, name, value)


# ---------------------------------------------------------------- the file


def test_the_file_says_what_it_takes_to_sample_the_same_answers_again(run: Run, hf_model: Path, tmp_path: Path) -> None:
    code, said = run("--temperature", "0.9", "--top-k", "40", "--seed", "7")
    assert code == 0 and "6 prompts, 12 answers" in said
    lines = list(read_answers(tmp_path / "answers.jsonl"))
    assert [line.prompt for line in lines] == TEXTS
    engine = open_engine(hf_model, batch_size=1)
    for line in lines:
        ids = tuple(engine.tokenizer(line.format_prompt, add_special_tokens=False)["input_ids"])
        settings = Sampling(**{name: line.sampling[name] for name in Sampling.__dataclass_fields__})
        again = [Request(ids, number, line.sampling["seed"], settings) for number in range(line.sampling["n"])]
        assert [request.own_seed for request in again] == line.seeds
        assert [answer.text for answer in engine.answers(again)] == line.all_generated_responses
    assert line.model["name"] == str(hf_model) and re.fullmatch("[0-9a-f]{64}", line.model["fingerprint"])
    assert (settings.temperature, settings.top_k, line.sampling["engine"]) == (0.9, 40, "transformers")


def test_the_tokens_of_the_answers_are_kept_on_request(
    run: Run, hf_model: Path, server: Completions, tmp_path: Path
) -> None:
    assert run("--keep-ids")[0] == 0
    lines, kept = list(read_answers(tmp_path / "answers.jsonl")), read_ids(tmp_path / "answers.ids")
    assert len(kept) == 12
    assert [path.name for path in tmp_path.glob("answers*.jsonl")] == ["answers.jsonl"], "cat takes no ids"
    tokenizer = open_engine(hf_model).tokenizer
    for line in lines:
        for number, text in enumerate(line.all_generated_responses):
            ids = kept[line.prompt_id, number]
            assert len(ids) == line.num_tokens[number]
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
    with changed(server, says_ids=False):
        run("--keep-ids", "--engine", "http", "--url", server.url, output="there.jsonl")
    assert not read_ids(tmp_path / "there.ids")


def test_a_file_that_was_cut_anywhere_is_completed_bit_for_bit(run: Run, tmp_path: Path) -> None:
    run(output="whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for left in (0, 1, 3, 4, 5, 6):
        torn = lines[left][: len(lines[left]) // 2] if left < len(lines) else b""
        (tmp_path / "answers.jsonl").write_bytes(b"".join(lines[:left]) + torn)
        assert run()[0] == 0
        assert (tmp_path / "answers.jsonl").read_bytes() == whole, left


def test_prompts_that_the_template_writes_alike_are_answered_once_also_after_an_interruption(
    run: Run, hf_model: Path, tmp_path: Path
) -> None:
    """Counted twice, they would shift all blocks that begin after them."""
    prompts = tmp_path / "alike.txt"
    prompts.write_text("\n".join([TEXTS[0], f"{TEXTS[0]} ", f"{TEXTS[0]}  ", *TEXTS[1:], f" {TEXTS[4]}"]))
    given = (str(hf_model), str(prompts))
    code, said = run(given=given, output="whole.jsonl")
    assert code == 0 and "6 prompts, 12 answers" in said and "left out: the prompt was there before: 3 (row 2," in said
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    for left in (1, 4, 5):
        (tmp_path / "answers.jsonl").write_bytes(b"".join(lines[:left]))
        assert run(given=given)[0] == 0
        assert (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True) == lines, left


class Bursts:
    """An engine that writes the answers to two prompts in ten seconds, a token of each answer in each second."""

    name: EngineName = "transformers"
    max_length, block = 256, 2

    def __init__(self, tokenizer: Any) -> None:
        self.model, self.tokenizer, self.seconds = dict[str, Any](), tokenizer, 0.0

    def answers(self, requests: Iterable[Request], told: Callable[[int], object] = nobody) -> Iterator[Answer]:
        rest = iter(requests)
        while some := list(islice(rest, 4)):
            for _ in range(10):
                self.seconds += 1
                told(4)
            yield from [Answer("a", (7,) * 10, 10, "stop")] * len(some)


def test_the_bar_says_how_much_time_is_left(
    hf_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the first prompts are answered, it moves; what was there already does not count as quickly done."""
    engine = Bursts(load_tokenizer(hf_model))
    monkeypatch.setattr("tqdm.std.time", lambda: engine.seconds)
    found = read_prompts(prompts, DataConfig())
    encoded = encode_prompts(found, engine.tokenizer, DataConfig(), max_length=256)
    sample(engine, encoded, tmp_path / "a.jsonl", settings=Sampling(), n=2, seed=0)
    shown = capsys.readouterr().err
    assert "0/6 [00:05<?, ?prompt/s, 4 tokens/s]" in shown
    assert "2/6 [00:11<00:22, " in shown and "4/6 [00:21<00:10, " in shown and "6/6 [00:30<00:00, " in shown
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:2]))
    engine.seconds = 0
    sample(engine, encoded, tmp_path / "a.jsonl", settings=Sampling(), n=2, seed=0)
    assert "4/6 [00:11<00:11, " in capsys.readouterr().err


def test_finished_blocks_are_not_computed_again(run: Run, server: Completions, prompts: Path, tmp_path: Path) -> None:
    over_http = ("--engine", "http", "--url", server.url)
    run(*over_http)
    lines = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_bytes(b"".join(lines[:4]))
    with changed(server):
        assert run(*over_http)[0] == 0
        assert len(server.asked) == 2 * 2
        code, said = run(*over_http)
        assert code == 0 and "nothing was left to do" in said and len(server.asked) == 2 * 2


OTHERS = {
    ("--temperature", "0.7"): "was sampled with temperature 0.8, and this run has 0.7",
    ("--top-p", "1"): "was sampled with top_p 0.95, and this run has 1.0",
    ("--n", "3"): "was sampled with n 2, and this run has 3",
    ("--seed", "1"): "was sampled with seed 0, and this run has 1",
    ("--max-new-tokens", "7"): "was sampled with max_new_tokens 6, and this run has 7",
    ("data.template=none",): "was sampled with template",
    ("--shard", "2/2"): "line 1: answers another prompt than row 4 of the prompts now",
    ("--shard", "1/2"): "holds answers to more than these 3 prompts",
}


def test_a_file_of_other_answers_is_refused_by_what_differs_and_kept(
    run: Run, server: Completions, tmp_path: Path
) -> None:
    over_http = ("--engine", "http", "--url", server.url)
    run(*over_http)
    before = (tmp_path / "answers.jsonl").read_bytes()
    for options, says in OTHERS.items():
        code, said = run(*over_http, *options)
        assert code == 2 and says in said
        assert (tmp_path / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", USUAL_NAMES)
def test_an_option_by_its_name_elsewhere_is_answered_with_ours(name: str, run: Run) -> None:
    code, said = run(name.replace("-", "_").replace("__", "--"), "1")
    assert code == 2 and f" is called {USUAL_NAMES[name]} here" in said


def test_a_file_of_another_model_or_of_something_else_is_refused(
    run: Run, make_hf_model: Callable[..., Path], prompts: Path, tmp_path: Path
) -> None:
    run()
    other = make_hf_model(tmp_path / "other", seed=5)
    assert "was sampled with the model's name" in run(given=(str(other), str(prompts)))[1]
    (tmp_path / "answers.jsonl").write_text('{"prompt": "Say hello.", "chosen": "Hello."}\n')
    code, said = run()
    assert code == 2 and "line 1: no field 'format_prompt'" in said


def test_a_file_goes_on_with_the_servers_model_that_it_was_begun_with(
    run: Run, server: Completions, tmp_path: Path
) -> None:
    over_http = ("--engine", "http", "--url", server.url, "--served-model")
    with changed(server, name="start"):
        assert run(*over_http, "start")[0] == 0
    lines = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_bytes(b"".join(lines[:2]))
    with changed(server, name="aligned"):
        code, said = run(*over_http, "aligned")
    assert code == 2 and "line 1: was sampled with the server's model start, and this run has aligned; go on" in said
    assert (tmp_path / "answers.jsonl").read_bytes() == b"".join(lines[:2])


def test_shards_joined_are_the_whole(run: Run, tmp_path: Path) -> None:
    run(output="whole.jsonl")
    for part in ("1/3", "2/3", "3/3"):
        assert run("--shard", part, output=f"part-{part[0]}.jsonl")[0] == 0
    joined = tmp_path / "joined.jsonl"
    joined.write_bytes(b"".join((tmp_path / f"part-{part}.jsonl").read_bytes() for part in (1, 2, 3)))
    lines = list(read_answers(joined))
    assert [line.source.pop("shard") for line in lines] == ["1/3", "1/3", "2/3", "2/3", "3/3", "3/3"]
    assert lines == list(read_answers(tmp_path / "whole.jsonl"))


def test_a_part_goes_on_as_the_part_that_it_was_begun_as(run: Run, tmp_path: Path) -> None:
    """Otherwise it would answer prompts that another part answers as well."""
    output = tmp_path / "answers.jsonl"
    assert run("--shard", "1/3")[0] == 0
    before = output.read_bytes()
    for shard, now in ((("--shard", "1/2"), "1/2"), ((), "1/1")):
        code, said = run(*shard)
        assert (code, output.read_bytes()) == (2, before)
        assert said == (
            f"{output} line 1: was sampled with --shard 1/3, and this run has {now}; go on with the old one, or give "
            "another --output."
        )
    code, said = run("--shard", "1/3")
    assert code == 0 and "nothing was left to do" in said and output.read_bytes() == before


def test_a_part_that_does_not_say_so_goes_on(run: Run, tmp_path: Path) -> None:
    """As earlier versions left them."""
    output = tmp_path / "answers.jsonl"
    run("--shard", "1/2")
    after = list(read_answers(output))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    for line in lines:
        del line["source"]["shard"]
    output.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    assert run("--shard", "1/2")[0] == 0
    assert [line.all_generated_responses for line in read_answers(output)] == [
        line.all_generated_responses for line in after
    ]


def test_two_jobs_do_not_write_one_file(run: Run, tmp_path: Path) -> None:
    with (tmp_path / "answers.jsonl").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, said = run()
    assert code == 2 and "another job writes it; wait for its end, or give another --output." in said
    assert run()[0] == 0


def test_memory_does_not_grow_with_the_number_of_answers(
    hf_model: Path, server: Completions, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of 20 kB each, from a server that gives all the same; also where the file is read again."""
    text = "word " * 4000
    answer = {
        "choices": [{"text": text, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 4000},
    }
    monkeypatch.setattr(server, "complete", lambda request: answer)
    engine = open_engine(hf_model, engine="http", url=server.url, concurrency=2)
    found = read_prompts(prompts, DataConfig())
    encoded = encode_prompts(found, engine.tokenizer, DataConfig(), max_length=256)
    peaks = []
    for times in (3, 30):
        output = tmp_path / f"{times}.jsonl"
        for _ in range(2):  # the second time, all of it is there
            with changed(server, asked=deque(maxlen=1)):  # which would grow as well
                tracemalloc.start()
                sample(engine, encoded * times, output, settings=Sampling(max_new_tokens=9), n=2, seed=0)
                peaks.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
    few, few_again, many, many_again = peaks
    made = output.stat().st_size - (tmp_path / "3.jsonl").stat().st_size
    assert made > 2 * 6 * 27 * len(text)
    assert many - few < 0.05 * made and many_again - few_again < 0.05 * made


# ---------------------------------------------------------------- a server


def test_a_server_is_told_every_setting_and_the_prompts_token_ids(
    run: Run, server: Completions, hf_model: Path
) -> None:
    with changed(server):
        options = ("--engine", "http", "--url", f"{server.url}/v1/", "--concurrency", "1")
        assert run(*options, "--top-p", "0.9")[0] == 0
        first, second = server.asked[:2]
    engine = open_engine(hf_model)
    for request in (first, second):
        assert isinstance(request["prompt"], list) and request["prompt"].count(engine.tokenizer.bos_token_id) == 1
        expected = {"temperature": 0.8, "top_p": 0.9, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        expected |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "max_tokens": 6, "n": 1}
        assert {name: request[name] for name in expected} == expected
        assert engine.tokenizer.eos_token_id in request["stop_token_ids"]
    assert first["prompt"] == second["prompt"] and first["seed"] != second["seed"]


@pytest.mark.parametrize("says_ids", [True, False])
def test_greedy_answers_of_a_server_are_those_of_transformers(
    says_ids: bool, run: Run, server: Completions, tmp_path: Path
) -> None:
    run("--temperature", "0", "--n", "1", output="here.jsonl")
    with changed(server, says_ids=says_ids):
        run("--temperature", "0", "--n", "1", "--engine", "http", "--url", server.url, output="there.jsonl")
    for here, there in zip(*(read_answers(tmp_path / name) for name in ("here.jsonl", "there.jsonl")), strict=True):
        assert here.all_generated_responses == there.all_generated_responses
        assert (here.finish_reasons, here.num_tokens) == (there.finish_reasons, there.num_tokens)
        assert (here.prompt_id, here.seeds) == (there.prompt_id, there.seeds)
    assert there.model["fingerprint"] is None


def test_only_so_many_requests_are_under_way(run: Run, server: Completions) -> None:
    with changed(server, seconds=0.05):
        assert run("--engine", "http", "--url", server.url, "--concurrency", "3")[0] == 0
        assert 2 <= server.most_at_once <= 3


def test_a_request_that_fails_for_a_moment_is_made_again(run: Run, server: Completions, tmp_path: Path) -> None:
    over_http = ("--engine", "http", "--url", server.url, "--concurrency", "4", "--retries", "1")
    run(*over_http, output="whole.jsonl")
    with changed(server, fails=lambda number: {1: 503, 2: 429, 3: -1}.get(number, 0)):
        assert run(*over_http)[0] == 0
        assert len(server.asked) == 2 * 6 + 3
    assert (tmp_path / "answers.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_server_that_goes_down_ends_the_run_and_what_was_made_is_kept(
    run: Run, server: Completions, tmp_path: Path
) -> None:
    over_http = ("--engine", "http", "--url", server.url, "--concurrency", "1", "--retries", "0")
    with changed(server, fails=lambda number: 500 * (number >= 6)):
        code, said = run(*over_http)
    assert code == 2
    assert said == (
        f"{server.url}: no answer after 1 tries (status 500); what was made is kept; mend the server, and give the "
        "same command again."
    )
    assert len(list(read_answers(tmp_path / "answers.jsonl"))) == 3
    assert run(*over_http)[0] == 0


def test_a_prompts_answers_end_where_the_server_says_its_model_ends(run: Run, server: Completions) -> None:
    with changed(server, max_model_len=24):
        assert run("--engine", "http", "--url", server.url, "--max-prompt-tokens", "20")[0] == 0
        assert {len(request["prompt"]) + request["max_tokens"] > 24 for request in server.asked} == {False}


def test_no_server_another_model_and_another_tokenizer_are_refused(
    run: Run, server: Completions, make_hf_model: Callable[..., Path], prompts: Path, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    code, said = run("--engine", "http", "--url", url)
    assert code == 2 and said.startswith(f"{url}: no server answers there (Connection refused); start one")
    with changed(server, name="mistral"):
        code, said = run("--engine", "http", "--url", server.url)
        assert code == 2 and said.startswith(f"{server.url}: serves mistral, not ")
        assert run("--engine", "http", "--url", server.url, "--served-model", "mistral")[0] == 0
    other = tmp_path / "other"
    make_hf_model(other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"].clear()
    (other / "tokenizer.json").write_text(json.dumps(content))
    for tokenizes in (True, False):
        with changed(server, tokenizes=tokenizes):
            options = ("--engine", "http", "--url", server.url, "--served-model", server.name)
            code, said = run(*options, output="of-other.jsonl", given=(str(other), str(prompts)))
            assert code == 2 and "its tokenizer cuts a text in another way than that of" in said
    assert not (tmp_path / "of-other.jsonl").exists()


def test_a_key_is_read_from_the_environment(run: Run, server: Completions, monkeypatch: pytest.MonkeyPatch) -> None:
    with changed(server, key="secret"):
        code, said = run("--engine", "http", "--url", server.url)
        assert code == 2 and said.endswith("asks for a key; set the environment variable TGDPO_API_KEY.")
        monkeypatch.setenv("TGDPO_API_KEY", "secret")
        assert run("--engine", "http", "--url", server.url)[0] == 0


@pytest.mark.parametrize("content", [{"choices": []}, {"choices": [{"text": 7, "finish_reason": "stop"}]}, [1], None])
def test_a_server_that_speaks_otherwise_is_refused(
    content: Any, server: Completions, hf_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(hf_model, engine="http", url=server.url)
    monkeypatch.setattr(server, "complete", lambda request: content)
    with pytest.raises(UserError, match="v1/completions"):
        list(engine.answers([Request((1, 7), 0, 0, Sampling())]))
