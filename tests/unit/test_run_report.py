"""The report of a run: every number in it is one of the run's, and every path one of the run's."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.made_run import make_run
from tgdpo_megatron.config import LossConfig
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.losses import LOSSES
from tgdpo_megatron.report.curves import ACCURACY, metric_chart
from tgdpo_megatron.report.metrics import warnings
from tgdpo_megatron.report.plots import chart_svg
from tgdpo_megatron.report.run_files import read_metrics
from tgdpo_megatron.report.run_report import write_run_report
from tgdpo_megatron.report.terminal import all_tie, result_words
from tgdpo_megatron.report.words import number, percent, plural

COMMAND = ["python", "-m", "recipes.train", "--recipe", "tgdpo_tiny", "data.train=my pairs.jsonl"]
LIVE = {"scores": {"source": "live", "path": None}}
NO_GUIDANCE = {**LIVE, "model": {"guidance": None}}


class _Page(HTMLParser):
    """The words of each section by its heading, with the rows of its tables and of its lists of facts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {"": ""}
        self.rows: dict[str, dict[str, list[str]]] = {}
        self.inside: list[str] = []
        self.heading, self.row = "", [""]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.inside.append(tag)
        if tag == "h2":
            self.heading = ""
        if tag in ("tr", "dt"):
            self.row = []

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass
        if tag in ("tr", "dd") and self.row:
            self.rows.setdefault(self.heading, {})[self.row[0]] = self.row[1:]

    def handle_data(self, data: str) -> None:
        if "style" in self.inside or not data.strip():
            return
        if self.inside and self.inside[-1] == "h2":
            self.heading = data
            self.sections[data] = ""
        else:
            self.sections[self.heading] += data + " "
        if self.inside and self.inside[-1] in ("th", "td", "dt", "dd"):
            self.row.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, pairs_file: Path) -> Path:
    """A run of TGDPO that ended. Read it, do not change it."""
    return make_run(tmp_path_factory.mktemp("runs") / "tgdpo", checkpoint, pairs_file)


@pytest.fixture(scope="module")
def page(run: Path) -> _Page:
    """The report of that run."""
    return read(run, world_size=1, command=COMMAND)


@pytest.fixture
def report(tmp_path: Path, checkpoint: Path, pairs_file: Path) -> Callable[..., _Page]:
    """A function that makes a run with some settings, and reads its report."""

    def write(**options: Any) -> _Page:
        return read(make_run(tmp_path / "run", checkpoint, pairs_file, **options), command=COMMAND)

    return write


def read(run: Path, **known: Any) -> _Page:
    path = write_run_report(run, **known)
    assert path == run / "report.html"
    return _Page(path.read_text(encoding="utf-8"))


def test_the_report_says_first_what_was_trained_and_what_came_of_it(run: Path, page: _Page) -> None:
    evaluations = [step for step in read_metrics(run) if "eval/loss" in step]
    first, last = evaluations[0], evaluations[-1]
    assert first["eval/rewards/accuracies"] == 0 and (first["iteration"], last["iteration"]) == (0, 6)
    summary = page.sections[""]
    assert "was trained with tgdpo on 6 preference pairs, for 6 steps of 2 pairs." in summary
    assert "On 6 held-out pairs" in summary
    assert f"from a tie in all pairs (step 0) to {percent(last['eval/rewards/accuracies'])} (step 6)" in summary
    assert (
        f"the loss went from {number(first['eval/loss'])} (step 0) to {number(last['eval/loss'])} (step 6)" in summary
    )


def test_held_out_results_are_those_of_the_first_and_the_last_evaluation(run: Path, page: _Page) -> None:
    evaluations = [step for step in read_metrics(run) if "eval/loss" in step]
    rows = page.rows["Results on held-out pairs"]
    for words, metric in {
        "loss": "loss",
        "reward margin": "rewards/margins",
        "chosen reward": "rewards/chosen",
        "rejected reward": "rewards/rejected",
        "chosen log-prob, nats": "logps/chosen",
        "rejected log-prob, nats": "logps/rejected",
    }.items():
        shown = [float(cell.replace("−", "-")) for cell in rows[words]]
        assert shown == pytest.approx([evaluations[place][f"eval/{metric}"] for place in (0, -1)], rel=5e-4), words
    assert rows["reward accuracy"] == ["all ties", percent(evaluations[-1]["eval/rewards/accuracies"])]


def test_every_curve_is_drawn_from_its_first_value_to_its_last(run: Path, page: _Page) -> None:
    steps = [step for step in read_metrics(run) if "loss" in step]
    curves = page.sections["Curves"]
    for title in ("Loss", "Reward margin", "Reward accuracy", "Gradient norm", "Learning rate", "Pace"):
        assert title in curves
    assert f"training {number(steps[0]['loss'])} → {number(steps[-1]['loss'])}; held out" in curves
    assert f"{number(1.0)} → {number(steps[-1]['grad_norm'])}." in curves
    assert "1e-06 → 6e-06." in curves
    assert " 1,600." in curves


def test_the_time_is_divided_as_the_lines_of_the_run_say(page: _Page) -> None:
    """Six lines of two seconds each, half of it the policy's. What took no time is left out."""
    assert page.rows["Where the time went"] == {
        "the policy": [percent(0.5), "6.0 s"],
        "frozen models": [percent(0.25), "3.0 s"],
        "waiting": [percent(0.125), "1.5 s"],
        "saving": [percent(0.125), "1.5 s"],
        "activity": ["share", "time"],
    }
    assert (
        f"one rank waited for others for at most {percent(0.1875)} of the time" in page.sections["Where the time went"]
    )
    assert page.rows["What was run"]["pace"] == ["0.25 s a step, 1,600 tokens a second; medians"]


def test_a_run_that_never_left_its_reference_has_marks_and_no_accuracy() -> None:
    tied = {"rewards/margins": 0.0, "rewards/accuracies": 0.0, "rewards/chosen": 0.0, "rewards/rejected": 0.0}
    chart = metric_chart("Accuracy", "", {"": ([{"iteration": step, **tied} for step in (1, 2, 3)], ACCURACY)}, percent)
    assert not chart.lines and [(mark.x, mark.text) for mark in chart.marks] == [(1, "all ties"), (2, ""), (3, "")]
    assert "all ties" in chart_svg(chart)


def test_a_step_at_which_all_pairs_tie_is_marked_and_is_no_accuracy_of_0(run: Path, page: _Page) -> None:
    curves = page.sections["Curves"]
    assert "all ties" in curves
    assert "At step 0 all pairs tie, because the model is still its reference" in curves
    accuracies = [step["rewards/accuracies"] for step in read_metrics(run) if "loss" in step]
    assert f"training {percent(accuracies[1])} → {percent(accuracies[-1])}" in curves


def test_the_health_of_token_rewards_is_said_in_words(page: _Page) -> None:
    health = page.sections["Health of the token rewards"]
    assert "look healthy" in health
    for words in ("0.3142", "0.01235", f"{percent(0.02)} are zero", "0.50 (step 2: 0.10)"):
        assert words in health


def test_a_warning_of_the_run_stands_in_its_report(tmp_path: Path, run: Path) -> None:
    other = shutil.copytree(run, tmp_path / "tgdpo")
    lines = read_metrics(other)
    for line in lines[3:]:  # from step 3 on
        line |= {"token_rewards/zero_frac": 1.0, "token_rewards/std": 0.0}
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (sentence,) = warnings(LossConfig(type="tgdpo"), lines[-1]).values()
    health = read(other).sections["Health of the token rewards"]
    assert f"Warning in 4 steps of 6, first in step 3: {sentence}" in health
    assert "look healthy" not in health


@pytest.mark.parametrize("garbage", ["{", "[1]", "7", "[" * 100_000, "\udcff", '{"loss": ' + "9" * 5000 + "}"])
def test_a_line_that_is_no_metrics_is_named(garbage: str, tmp_path: Path) -> None:
    lines = b'{"iteration": 1}\n%s\n{"iteration": 2}\n{"iter'
    (tmp_path / "metrics.jsonl").write_bytes(lines % garbage.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=f"^{tmp_path / 'metrics.jsonl'} line 2: these are no metrics of a step"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(lines.replace(b"%s\n", b""))
    assert read_metrics(tmp_path) == [{"iteration": 1}, {"iteration": 2}]


def test_held_out_pairs_are_shown_token_by_token_with_the_rewards_of_the_loss(run: Path) -> None:
    html = (write_run_report(run) or Path()).read_text(encoding="utf-8")
    parts = r'<div class="prompt"[^>]*>(.*?)</div>.*?<div class="tokens">(.*?)</div>'
    prompt, chosen = re.findall(parts, html, re.DOTALL)[0]
    assert unescape(re.sub("<[^>]*>", "", prompt)) == "<|begin|><|user|>\nAdd 2 and 3.<|end|><|assistant|>\n"
    special = [unescape(text) for text in re.findall(r'<span class="special">(.*?)</span>', prompt)]
    assert special == ["<|begin|>", "<|user|>", "<|end|>", "<|assistant|>"]
    tokens = re.findall(r'<span class="token[^>]*title="([^"]*)">(.*?)</span>', chosen)
    assert "".join(unescape(text) for _, text in tokens) == "The sum is 5.<|end|>"
    beta_r = yaml.safe_load((run / "config.yaml").read_text())["loss"]["beta_r"]
    expected = [beta_r * place / 10 for place in range(len(tokens))]
    assert [float(value.replace("−", "-")) for value, _ in tokens] == pytest.approx(expected, rel=5e-3, abs=1e-6)


def test_every_text_of_the_data_is_shown_and_none_is_run(
    tmp_path: Path, checkpoint: Path, write_pairs: Callable[..., Path]
) -> None:
    hostile = "</script><script>alert('a & b')</script>"
    rows = [{"instruction": hostile, "chosen": f"{hostile} {place}", "rejected": hostile} for place in range(3)]
    run = make_run(tmp_path / hostile.replace("/", "|"), checkpoint, write_pairs(tmp_path / "pairs.jsonl", rows))
    answers = dict.fromkeys(("prompt", "chosen", "before", "after"), hostile)
    (run / "answers.json").write_text(json.dumps([answers]))
    html = (write_run_report(run, command=[hostile]) or Path()).read_text(encoding="utf-8")
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 10


def test_the_next_commands_have_the_paths_of_the_run(run: Path, page: _Page) -> None:
    commands = page.sections["What to do next"]
    words = commands.split()
    checkpoint = str(run / "checkpoints" / "iter-0000006")
    assert words[words.index("tools.convert_megatron_to_hf") + 1] == checkpoint
    assert words[words.index("tools.view") + 1 :][:2] == [str(run), "--validation"]
    assert "'data.train=my pairs.jsonl'" in commands and "train.resume=true" not in commands


def test_an_interrupted_run_says_how_to_go_on(report: Callable[..., _Page]) -> None:
    page = report(ended=False)
    assert "for 6 of 12 steps" in page.sections[""] and "The run stopped early." in page.sections[""]
    assert "train.resume=true" in page.sections["What to do next"]
    assert "no checkpoint was saved" in page.sections["What to do next"]
    assert "tools.convert_megatron_to_hf" not in page.sections["What to do next"]


def test_a_line_that_a_killed_run_left_half_written_is_no_step(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "tgdpo")
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 7, "lo')
    assert "for 6 steps" in read(other).sections[""]


def test_a_run_that_ended_before_its_first_step_has_no_report(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "tgdpo", ignore=shutil.ignore_patterns("report.html"))
    before, *_ = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    for lines in ("", before):
        (other / "metrics.jsonl").write_text(lines)
        assert write_run_report(other) is None
    assert not (other / "report.html").exists()


def test_rows_that_were_dropped_are_counted_with_the_reason(
    tmp_path: Path, checkpoint: Path, write_pairs: Callable[..., Path]
) -> None:
    rows = [
        {"instruction": "Say it.", "chosen": f"{place}", "rejected": "" if place == 2 else "no"} for place in range(4)
    ]
    page = read(make_run(tmp_path / "run", checkpoint, write_pairs(tmp_path / "pairs.jsonl", rows)))
    assert page.rows["Data"]["training"][:3] == ["4", "3", "1"]
    assert "training: 1 row dropped because the rejected response is empty (row 3)." in page.sections["Data"]


def test_answers_stand_beside_the_expected_ones_and_what_was_not_asked_is_left_out(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "tgdpo")
    answers = [
        {"prompt": "Name a tree.", "chosen": "An oak.", "before": "A stone.", "after": "An ash."},
        {"prompt": "And?", "chosen": "Or.", "after": "So."},
    ]
    (other / "answers.json").write_text(json.dumps(answers))
    words = read(other).sections["Answers to held-out prompts"]
    expected = "Name a tree. expected An oak. before training A stone. after training An ash. "
    assert " ".join(words.split()) == expected + "And? expected Or. after training So."


def test_one_process_is_no_plural(page: _Page) -> None:
    assert page.rows["What was run"]["layout"] == ["1 process"]
    assert (plural(1, "pair"), plural(2000, "pair"), plural(0, "row")) == ("1 pair", "2,000 pairs", "0 rows")


def test_the_layout_names_every_size(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "tgdpo")
    settings = yaml.safe_load((other / "config.yaml").read_text())
    settings["parallel"] |= {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    assert read(other, world_size=8).rows["What was run"]["layout"] == ["8 processes: tensor 2 × pipeline 2 × data 2"]


def test_the_layout_names_context_parallelism_where_ranks_share_sequences(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "tgdpo")
    settings = yaml.safe_load((other / "config.yaml").read_text())
    settings["parallel"]["context_parallel_size"] = 2
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    expected = ["4 processes: tensor 1 × pipeline 1 × context 2 × data 2"]
    assert read(other, world_size=4).rows["What was run"]["layout"] == expected


def test_live_rewards_are_not_shown_but_the_way_to_see_them_is(report: Callable[..., _Page]) -> None:
    words = report(changes=LIVE).sections["What the token rewards say"]
    assert "python -m tools.view" in words


def test_scores_that_are_gone_cost_no_more_than_their_section(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "tgdpo")
    settings = yaml.safe_load((other / "config.yaml").read_text())
    settings["scores"]["path"] = str(tmp_path / "gone")
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    page = read(other)
    assert f"They cannot be shown: {tmp_path / 'gone'}" in page.sections["What the token rewards say"]
    assert "reward margin" in page.rows["Results on held-out pairs"]


def test_without_held_out_pairs_the_training_batches_are_reported_as_such(report: Callable[..., _Page]) -> None:
    page = report(held_out=False, changes=LIVE)
    assert "No pairs were held out." in page.sections[""]
    assert "Results on training batches" in page.sections and "Results on held-out pairs" not in page.sections
    assert page.rows["What was run"]["held-out pairs"] == ["none"]


@pytest.mark.parametrize("loss", ["sft", "dpo", "simpo", "dpo_reg", "tdpo1"])
def test_losses_of_every_kind_have_a_report(loss: str, report: Callable[..., _Page]) -> None:
    changes = {**NO_GUIDANCE, "loss": {"type": loss}}
    page = report(changes=changes)
    compares = LOSSES[loss].compares
    assert ("Reward margin" in page.sections["Curves"]) == compares
    assert ("reward accuracy" in page.rows["Results on held-out pairs"]) == compares
    assert ("Health of the token rewards" in page.sections) == (LOSSES[loss].rewards is not None)


def test_the_settings_shown_are_those_that_differ_from_the_defaults(run: Path, page: _Page) -> None:
    changed = page.rows["Settings that differ from the defaults"]
    assert changed["train"] == [f"output={run}, train_iters=6, global_batch_size=2, precision=fp32"]
    assert "optimizer" not in changed


def test_nothing_half_written_is_left(run: Path) -> None:
    write_run_report(run)
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize(
    ("margins", "accuracies", "chosen", "tied"),
    [
        (0.0, 0.0, 0.5, True),  # no margin is positive and their mean is 0
        (0.0, 0.5, 0.5, False),  # margins that cancel
        (-0.1, 0.0, 0.5, False),  # every pair is lost
        (3e-8, 0.5, -5.7e-7, True),  # rounding
    ],
)
def test_ties_are_told_from_losses(margins: float, accuracies: float, chosen: float, tied: bool) -> None:
    metrics = {"rewards/margins": margins, "rewards/accuracies": accuracies}
    metrics |= {"rewards/chosen": chosen, "rewards/rejected": chosen - margins}
    assert all_tie(metrics) == tied
    assert all_tie({f"eval/{name}": value for name, value in metrics.items()}, "eval/") == tied
    assert ("chosen and rejected rewards equal" in result_words({"loss": 0.7, **metrics})) == tied
    assert not all_tie({"loss": 0.5})


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.693147, "0.6931"), (-5.7e-7, "0"), (0.0, "0"), (-77.0912, "−77.09"), (12345.6, "12,346"), (1.0, "1.000")],
)
def test_a_number_has_four_digits_and_nothing_that_rounding_left(value: float, shown: str) -> None:
    assert number(value) == shown
