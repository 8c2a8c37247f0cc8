"""tools.answers: the files that MT-Bench, AlpacaEval 2 and Arena-Hard judge, from made-up questions."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.completions import Completions, served
from tests.support.in_process import Program
from tgdpo_megatron.data.tokenizer import encode_prompt, load_tokenizer
from tgdpo_megatron.evaluation.answer_files import Said, form_of, written
from tgdpo_megatron.evaluation.questions import Question
from tgdpo_megatron.run_lock import InUseError, alone
from tools.answers import main

MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Say hello.", "Now say it twice."]},
    {"question_id": 82, "category": "stem", "turns": ["Name a colour.", "And another one?"]},
    {"question_id": 83, "category": "math", "turns": ["Add 2 and 3.", "Add 4 to that."], "reference": ["5", "9"]},
]
ALPACA = [
    {"dataset": "helpful_base", "instruction": "Name a colour.", "output": "Red.", "generator": "text_davinci_003"},
    {"dataset": "koala", "instruction": "Say hello."},
    {"dataset": "koala", "instruction": "Name a colour."},
]
ARENA = [
    {"uid": "a1", "category": "hard_prompt", "subcategory": "coding", "prompt": "Write the word tree."},
    {"uid": "b2", "category": "creative_writing", "subcategory": "creative_writing", "prompt": "Add 4 and 4."},
]
ARENA_BEFORE = [
    {"question_id": row["uid"], "category": "arena-hard-v0.1", "cluster": "c", "turns": [{"content": row["prompt"]}]}
    for row in ARENA
]
Run = Callable[..., tuple[int, str]]


def write(path: Path, rows: Sequence[Any], *, as_list: bool = False) -> Path:
    path.write_text(json.dumps(rows) if as_list else "".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(hf_model: Path, tmp_path: Path, in_process: Program) -> Run:
    """A function that runs tools.answers in this process: its exit code, and what it said."""

    def run(benchmark: str, questions: Sequence[Any], *options: str, as_list: bool = False) -> tuple[int, str]:
        file = write(tmp_path / "questions.json", questions, as_list=as_list)
        common = ["--output", str(tmp_path / "out"), "--model-id", "tiny-1.5", "--max-new-tokens", "6"]
        return in_process(main, [benchmark, hf_model, file, *common, *options])

    return run


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def decoding(tmp_path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tmp_path / "out" / "tiny-1.5.decoding.json").read_text(encoding="utf-8"))
    return content


# ---------------------------------------------------------------- the forms


def test_mt_benchs_file_has_fastchats_fields_and_says_its_temperatures(run: Run, tmp_path: Path) -> None:
    code, said = run("mt-bench", MT_BENCH)
    assert code == 0
    rows = lines(tmp_path / "out" / "tiny-1.5.jsonl")
    assert [row["question_id"] for row in rows] == [81, 82, 83]
    for row in rows:
        assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert row["model_id"] == "tiny-1.5" and type(row["tstamp"]) is float
        ((choice,),) = (row["choices"],)
        assert choice["index"] == 0 and [type(turn) for turn in choice["turns"]] == [str, str]
    assert len({row["answer_id"] for row in rows}) == 3
    made = decoding(tmp_path)
    assert made["sampling"]["temperature"] == {"writing": 0.7, "stem": 0.1, "math": 0.0}
    assert made["sampling"]["max_new_tokens"] == 6 and made["benchmark"] == "mt-bench"
    assert re.fullmatch("[0-9a-f]{64}", made["model"]["fingerprint"]) and made["questions"]["number"] == 3
    assert "python gen_judgment.py --model-list tiny-1.5" in said and "has 80 questions" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tiny-1.5.decoding.json", "tiny-1.5.jsonl"]


def test_the_second_turn_is_asked_after_the_first_answer(run: Run, hf_model: Path, tmp_path: Path) -> None:
    """Greedily, as transformers' own generate answers the whole conversation."""
    from transformers import AutoModelForCausalLM

    run("mt-bench", MT_BENCH, "--temperature", "0")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(hf_model), load_tokenizer(hf_model)
    for question, row in zip(MT_BENCH, lines(tmp_path / "out" / "tiny-1.5.jsonl"), strict=True):
        messages = []
        for asked, answered in zip(question["turns"], row["choices"][0]["turns"], strict=True):
            messages.append({"role": "user", "content": asked})
            _, ids = encode_prompt(tokenizer, messages)
            made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6)[0, len(ids) :]
            assert tokenizer.decode(made, skip_special_tokens=True).strip() == answered
            messages.append({"role": "assistant", "content": answered})


def test_alpaca_evals_file_is_a_list_in_the_order_of_the_questions(run: Run, tmp_path: Path) -> None:
    """An instruction may be there twice; a reference's own answer is left out."""
    code, said = run("alpaca-eval", ALPACA, as_list=True)
    assert code == 0 and "--annotators_config weighted_alpaca_eval_gpt4_turbo" in said
    rows = json.loads((tmp_path / "out" / "tiny-1.5.json").read_text(encoding="utf-8"))
    assert [list(row) for row in rows] == [["dataset", "instruction", "output", "generator"]] * 3
    assert [(row["dataset"], row["instruction"]) for row in rows] == [
        (row["dataset"], row["instruction"]) for row in ALPACA
    ]
    assert {row["generator"] for row in rows} == {"tiny-1.5"}
    assert decoding(tmp_path)["sampling"]["temperature"] == 0.9


@pytest.mark.parametrize("questions", [ARENA, ARENA_BEFORE], ids=["uid", "question_id"])
@pytest.mark.parametrize("dialect", ["uid", "question_id", None])
def test_arena_hards_dialects_hold_the_same_answers(
    questions: list[dict[str, Any]], dialect: str | None, run: Run, tmp_path: Path
) -> None:
    code, said = run("arena-hard", questions, *(["--dialect", dialect] if dialect else []))
    assert code == 0
    written_as = dialect or ("uid" if questions is ARENA else "question_id")
    rows = lines(tmp_path / "out" / "tiny-1.5.jsonl")
    assert [row[written_as] for row in rows] == ["a1", "b2"]
    for row, question in zip(rows, ARENA, strict=True):
        if written_as == "uid":
            assert list(row) == ["uid", "ans_id", "model", "messages", "tstamp", "metadata"]
            asked, answered = row["messages"]
            assert asked == {"role": "user", "content": question["prompt"]}
            assert answered["role"] == "assistant" and list(answered["content"]) == ["answer"]
        else:
            assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp", "conv_metadata"]
            assert list(row["choices"][0]["turns"][0]) == ["content"]
    assert decoding(tmp_path)["sampling"]["temperature"] == 0 and "api_config.yaml" in said
    assert ("arena-hard-v2.0" in said) == (questions is ARENA and written_as == "uid")
    shown = [line for line in said.split("\n") if line.startswith("python show_result.py")]
    categories = ["hard_prompt", "creative_writing"] if questions is ARENA else ["arena-hard-v0.1"]
    version = "v2.0" if questions is ARENA else "v0.1"
    assert shown == (
        [f"python show_result.py -b arena-hard-{version} -j JUDGE -c {category}" for category in categories]
        if written_as == "uid"
        else ["python show_result.py"]
    )


def test_arena_hards_metadata_counts_markdown_outside_of_code() -> None:
    text = (
        "# One\n\n## Two\n#No heading\n1. a\n 2. b\n- c\n* d\n+ e\n**bold** and __bold__ and **bold**\n"
        "```\n# code\n- code\n**code**\n```\n### Three"
    )
    question = Question("a1", ("Why?",), "", {})
    for dialect, field in (("uid", "metadata"), ("question_id", "conv_metadata")):
        row = form_of("arena-hard", dialect).row(question, Said((text,), (41,), ("stop",), 0.0), "m")
        assert row[field] == {
            "token_len": 41,
            "header_count": {"h1": 1, "h2": 1, "h3": 1, "h4": 0, "h5": 0, "h6": 0},
            "list_count": {"ordered": 2, "unordered": 3},
            "bold_count": {"**": 2, "__": 1},
        }


# ---------------------------------------------------------------- going on


def test_an_interrupted_command_goes_on_where_it_was(run: Run, hf_model: Path, tmp_path: Path) -> None:
    """A server that fails after 66 questions, and then answers again. Meanwhile the last line is cut inside a letter,
    and before, while the server is asked, no second command may write the same answers."""
    questions = [{"dataset": "made up", "instruction": f"Add {number} and 4."} for number in range(70)]
    part, refused = tmp_path / "out" / "tiny-1.5.part", []

    def fails(number: int) -> int:
        if number == 65:
            with pytest.raises(InUseError) as second, alone(part):
                pass
            refused.append(str(second.value))
        return 400 if number >= 66 else 0

    with served(Completions(hf_model, str(hf_model))) as server:
        over_http = ("--engine", "http", "--url", server.url, "--concurrency")
        assert run("alpaca-eval", questions, *over_http, "4")[0] == 0
        whole = (tmp_path / "out" / "tiny-1.5.json").read_bytes()
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        server.asked.clear()
        server.fails = fails
        code, said = run("alpaca-eval", questions, *over_http, "1")
        assert code == 2 and "400" in said
        assert not (tmp_path / "out" / "tiny-1.5.json").exists()
        assert [line["question"] for line in lines(part)] == list(range(1, 67))
        assert refused == [f"{part}: another job writes it; wait for its end, or give another --output."]
        with part.open("ab") as file:
            file.write(b'{"question": 67, "texts": ["' + "你".encode()[:2])
        server.fails = lambda number: 0
        server.asked.clear()
        assert run("alpaca-eval", questions, *over_http, "4")[0] == 0
        assert len({tuple(request["prompt"]) for request in server.asked}) == 4
        assert (tmp_path / "out" / "tiny-1.5.json").read_bytes() == whole and not part.exists()
        server.asked.clear()
        code, said = run("alpaca-eval", questions, *over_http, "4")
        assert code == 0 and "answers to 70 questions" in said and server.asked == []


def test_a_question_whose_last_turn_is_answered_is_kept_where_the_server_dies_after_it(
    run: Run, hf_model: Path, tmp_path: Path
) -> None:
    """Of three questions the fifth request is the second one's second turn. Tries are as many as asked for."""
    with served(Completions(hf_model, str(hf_model))) as server:
        over_http = ("--engine", "http", "--url", server.url, "--concurrency", "1", "--retries", "0")
        server.fails = lambda number: 503 if number >= 4 else 0
        code, said = run("mt-bench", MT_BENCH, *over_http)
        assert code == 2 and "no answer after 1 tries" in said
        assert [line["question"] for line in lines(tmp_path / "out" / "tiny-1.5.part")] == [81]
        server.fails = lambda number: 0
        server.asked.clear()
        assert run("mt-bench", MT_BENCH, *over_http)[0] == 0
        assert len({tuple(request["prompt"]) for request in server.asked}) == 4


def test_of_two_commands_at_once_the_second_is_refused(run: Run, tmp_path: Path) -> None:
    part = tmp_path / "out" / "tiny-1.5.part"
    with alone(part):
        code, said = run("mt-bench", MT_BENCH)
    assert code == 2 and said == f"{part}: another job writes it; wait for its end, or give another --output."
    assert [path.name for path in part.parent.iterdir()] == [part.name]
    assert run("mt-bench", MT_BENCH)[0] == 0 and not part.exists()


def test_answers_of_another_question_are_not_gone_on_with(run: Run, tmp_path: Path) -> None:
    """Lines of two jobs, one after another, as they were before there was a lock."""
    file = tmp_path / "out" / "tiny-1.5.jsonl"
    run("mt-bench", MT_BENCH)
    said_of = {"texts": ["a", "b"], "tokens": [1, 1], "finish_reasons": ["stop"] * 2, "seconds": 0.0}
    file.unlink()
    for ids in ([81, 82, 81], [81, 82, 83] * 64):
        kept = "".join(json.dumps({"question": number, **said_of}) + "\n" for number in ids)
        file.with_suffix(".part").write_text(kept)
        code, said = run("mt-bench", MT_BENCH)
        assert code == 2 and re.search(r"part line [34]: answers another question than the one that is asked", said)
        assert not file.exists() and file.with_suffix(".part").read_text() == kept


def test_a_command_that_was_killed_at_its_end_says_how_many_answers_are_unfinished(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any of the last three writes; the second command may have nothing left to do."""
    _, whole = run("mt-bench", MT_BENCH)
    assert "; 6 of them are unfinished" in whole
    replace, left = os.replace, [0]

    def killed(*names: Any) -> None:
        replace(*names)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    for writes in (1, 2, 3):
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        left[0] = writes
        with monkeypatch.context() as patched:
            patched.setattr("tgdpo_megatron.evaluation.answering.os.replace", killed)
            assert run("mt-bench", MT_BENCH)[0] == 130
        assert (tmp_path / "out" / "tiny-1.5.jsonl").exists() == (writes == 3)
        (tmp_path / "out" / "tiny-1.5.part").touch()  # which a kill would have left
        code, said = run("mt-bench", MT_BENCH)
        assert code == 0 and said == whole and decoding(tmp_path)["unfinished"] == 6
        assert not (tmp_path / "out" / "tiny-1.5.part").exists()


def test_answers_that_were_made_in_another_way_are_not_mixed(run: Run) -> None:
    assert run("mt-bench", MT_BENCH)[0] == 0
    code, said = run("mt-bench", MT_BENCH, "--temperature", "0.5", "--seed", "3")
    assert code == 2 and "were made with another temperature, seed" in said
    code, said = run("mt-bench", MT_BENCH[:2])
    assert code == 2 and "were made with another temperature, questions" in said


def test_a_file_that_lacks_questions_is_refused_with_their_names(run: Run, tmp_path: Path) -> None:
    run("mt-bench", MT_BENCH)
    file = tmp_path / "out" / "tiny-1.5.jsonl"
    rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(rows[:1]), encoding="utf-8")
    code, said = run("mt-bench", MT_BENCH)
    assert (
        code == 2 and said == f"{file}: lacks answers to questions 82, 83; delete it, and give the same command again."
    )
    file.write_text("".join(reversed(rows)), encoding="utf-8")
    assert "answers them in another order" in run("mt-bench", MT_BENCH)[1]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("benchmark", "questions", "says"),
    [
        ("mt-bench", [*MT_BENCH, MT_BENCH[1]], "line 4: has the id 82 of line 2; give each question its own."),
        ("mt-bench", [{"category": "math", "turns": ["a", "b"]}], "line 1: the question has no question_id; give"),
        ("mt-bench", [{**MT_BENCH[0], "turns": ["a"]}], "line 1: the question has 1 turn, and MT-Bench's have two"),
        ("mt-bench", [{**MT_BENCH[0], "turns": "ab"}], "line 1: the question has no turns, and MT-Bench's have two"),
        ("mt-bench", [{**MT_BENCH[0], "turns": ["a", 3]}], "line 1: a turn is no text"),
        ("mt-bench", ["Why?"], "line 1: expected an object, found str"),
        ("alpaca-eval", [{"dataset": "koala"}], "line 1: instruction is no text"),
        ("arena-hard", [{"uid": True, "prompt": "a"}], "line 1: the question has no uid"),
        ("arena-hard", [{"question_id": "a", "turns": []}], "line 1: the question has neither a uid and a prompt nor"),
        ("arena-hard", [], "holds no questions."),
    ],
)
def test_questions_of_another_form_are_refused(benchmark: str, questions: list[Any], says: str, run: Run) -> None:
    code, said = run(benchmark, questions)
    assert code == 2 and says in said


def test_a_question_that_is_longer_than_the_model_is_named(run: Run, tmp_path: Path) -> None:
    """Its second turn; what was answered before is kept."""
    long = {**MT_BENCH[0], "question_id": 99, "turns": ["Why?", "word " * 400]}
    code, said = run("mt-bench", [*MT_BENCH, long])
    assert code == 2 and re.match(r"question 99, turn 2: the prompt has [\d,]+ tokens, and the model takes 256", said)


def test_names_and_options_without_meaning_are_refused(run: Run) -> None:
    for options, says in {
        ("--model-id", "a/b"): "it names a file",
        ("--dialect", "uid"): "mt-bench has only one",
        ("--temperature", "-1"): "temperature -1.0 is refused",
        ("--url", "http://localhost:1"): "belong together",
        ("data.max_length=8",): "changes nothing here",
    }.items():
        code, said = run("mt-bench", MT_BENCH, *options)
        assert code == 2 and says in said, options


# ---------------------------------------------------------------- the benchmarks' own readers, where they are installed


def test_fastchat_finds_every_answer(run: Run, tmp_path: Path) -> None:
    common = pytest.importorskip("fastchat.llm_judge.common")
    run("mt-bench", MT_BENCH)
    questions = common.load_questions(str(tmp_path / "questions.json"), None, None)
    answers = common.load_model_answers(str(tmp_path / "out"))
    common.check_data(questions, answers, {}, ["tiny-1.5"], {})
    for question in questions:
        assert len(answers["tiny-1.5"][question["question_id"]]["choices"][0]["turns"]) == 2


def test_alpaca_eval_finds_every_answer(run: Run, tmp_path: Path) -> None:
    """Equal answers are ties, for which its judge is not asked."""
    annotators = pytest.importorskip("alpaca_eval.annotators")
    from alpaca_eval.utils import load_or_convert_to_dataframe

    run("alpaca-eval", ALPACA[:2], as_list=True)
    ours = load_or_convert_to_dataframe(tmp_path / "out" / "tiny-1.5.json")
    judge = annotators.PairwiseAnnotator(annotators_config="weighted_alpaca_eval_gpt4_turbo", caching_path=None)
    found = judge.annotate_head2head(outputs_1=ours, outputs_2=ours)
    assert [(row["instruction"], row["dataset"], row["preference"]) for row in found] == [
        (row["instruction"], row["dataset"], 1.5) for row in ALPACA[:2]
    ]
    assert {row["generator_2"] for row in found} == {"tiny-1.5"}


def test_what_is_written_is_what_json_reads(tmp_path: Path) -> None:
    """Lines end where they must, whatever an answer holds."""
    questions = [Question(1, ("a\u2028b",), "", {}), Question(2, ("c",), "", {})]
    said = [Said(("x\u2028\n\ny \U0001f642",), (1,), ("stop",), 0.0), Said(("",), (0,), ("length",), 0.0)]
    path = tmp_path / "file.jsonl"
    path.write_text(written(form_of("arena-hard"), questions, said, "m"), encoding="utf-8")
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert [row["messages"][1]["content"]["answer"] for row in rows] == ["x\u2028\n\ny \U0001f642", ""]
