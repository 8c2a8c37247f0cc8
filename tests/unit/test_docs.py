"""The README and docs/ say what the code does: tables, numbers, settings, commands and links."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.pages import with_tables
from recipes.settings import RECIPES, read_command_line
from tests.parity.rows import LIMITS
from tests.roundtrip.table import LIMIT as ROUND_TRIP_LIMIT
from tgdpo_megatron.commands import PROGRAMS
from tgdpo_megatron.config import Config, LossConfig, ParallelConfig
from tgdpo_megatron.config.foreign_names import FOREIGN
from tgdpo_megatron.config.loading import RENAMED
from tgdpo_megatron.data.formats import FORMATS
from tgdpo_megatron.data.hub_splits import hub_split
from tgdpo_megatron.hub import model_id
from tgdpo_megatron.losses import LOSSES
from tgdpo_megatron.losses.rewards import REWARD_SOURCES
from tgdpo_megatron.report.metrics import averages, names_for
from tools.docs import faults, tables
from tools.marked_pairs import make_splits

ROOT = Path(__file__).resolve().parents[2]
INDEX = ROOT / "docs" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLLOWED = ROOT / "docs" / "extending.md"
"""Adds a loss that is not in the repository. tests/distributed/test_extending.py follows it to the letter."""
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL)


def all_tables(page: str) -> list[list[dict[str, str]]]:
    """Every table of a page of docs/: its rows, by heading."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text(ROOT / "docs" / page), flags=re.MULTILINE):
        lines = [
            [cell.strip() for cell in line[1:].rstrip().removesuffix("|").split("|")] for line in block.splitlines()
        ]
        headings, _, *rows = lines
        found.append([dict(zip(headings, row, strict=True)) for row in rows])
    return found


def table(page: str, first_column: str, second_column: str | None = None) -> list[dict[str, str]]:
    """The one table of a page whose first headings these are."""
    wanted = [first_column, *([second_column] if second_column else [])]
    (rows,) = [rows for rows in all_tables(page) if list(rows[0])[: len(wanted)] == wanted]
    return rows


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# ---------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_leads_to_every_page() -> None:
    listed = {(INDEX.parent / link.partition("#")[0]).resolve() for link in links(INDEX)}
    assert listed >= set(PAGES) - {INDEX, ROOT / "CHANGELOG.md"}
    assert INDEX in {(ROOT / link).resolve() for link in links(ROOT / "README.md")}


def test_the_first_page_is_short() -> None:
    assert len(text(ROOT / "README.md").splitlines()) <= 150


def test_the_map_shows_files_and_folders_that_exist() -> None:
    block = re.search(r"## The map\n\n```\n(.*?)```", text(ROOT / "README.md"), flags=re.DOTALL)
    assert block
    parent, shown = ROOT, []
    for line in block[1].splitlines():
        names = re.split(r"  ", line.strip())[0].split()
        base = parent if line.startswith("  ") else ROOT
        shown += [base / name for name in names]
        parent = base if line.startswith("  ") else ROOT / names[0]
    assert len(shown) > 20
    assert [str(path) for path in shown if not path.exists()] == []


# ---------------------------------------------------------------- commands and settings


def commands(page: Path) -> Iterator[str]:
    """Every command that a page shows, in a block of code or within a sentence, on one line and without comment."""
    blocks = "".join(re.findall(r"^```\w*\n(.*?)^```", text(page), flags=re.MULTILINE | re.DOTALL))
    shown = [*blocks.replace("\\\n", " ").splitlines(), *(word.replace("\n", " ") for word in quoted(prose(page)))]
    for line in shown:
        line = re.sub(r"^(\$ )?([A-Z_]+=\S+ )*", "", line.partition("  #")[0].strip())  # a prompt, variables
        line = re.sub(r"^tgdpo-[\w-]+(?= )", lambda script: f"python -m {PROGRAMS[script[0]]}", line)
        if re.match(r"(make |torchrun |(\S+/)?python3? -)", line):
            yield line


def programs() -> list[tuple[str, list[str]]]:
    """Module and arguments of every Python program shown, those of docs/extending.md left out."""
    found = []
    for page in PAGES:
        for command in commands(page) if page != FOLLOWED else ():
            if (match := re.search(r" -m (\S+)(.*)$", command)) and "--help" not in command:
                found.append((match[1], match[2].removesuffix("...").split()))
    return found


def source(module: str) -> str:
    """The text of a program."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    path = Path(spec.origin)
    found = text(path.with_name("__main__.py") if path.name == "__init__.py" else path)
    # Two programs share their command line.
    return found + text(ROOT / "tests" / "support" / "tables.py") * ("support.tables import program" in found)


@each_page
def test_every_command_names_a_program_or_a_target(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", text(ROOT / "Makefile"), flags=re.MULTILINE))
    variables = set(re.findall(r"\$[({](\w+)|\$\((?:if|filter 0,)\s*\$?\(?(\w+)", text(ROOT / "Makefile")))
    known = {name for pair in variables for name in pair}
    for command in commands(page):
        if match := re.match(r"make (.*)$", command):
            for word in match[1].split():
                name, equals, _ = word.partition("=")
                assert name in (known if equals else targets), command
        elif match := re.search(r" -m (\S+)", command):
            # Looking for pip would switch off what setuptools does to distutils, for the rest of this process.
            assert match[1] in ("pytest", "pip") or importlib.util.find_spec(match[1]) is not None, command


def test_enough_commands_are_found() -> None:
    modules = [module for module, _ in programs()]
    assert {"recipes.train", "recipes.score", "tools.plan", "tools.view", "bench.gpu"} <= set(modules)
    assert len(modules) > 25


OWN_OPTIONS = {
    "tools.plan": ("--model", "--memory"),
    "tools.submit": ("--from", "--until", "--alphas", "--betas"),
}
"""Program -> options with a value that it has beside those of training."""


@pytest.mark.parametrize(("module", "arguments"), programs(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_is_read(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes, experiment files and settings by the program's own parser; options of the others by their names."""
    monkeypatch.chdir(ROOT)
    for option in OWN_OPTIONS.get(module, ()):  # beside what training takes
        if option in arguments:
            place = arguments.index(option)
            del arguments[place : place + 2]
    if module in ("recipes.align", "recipes.train", "recipes.score", *OWN_OPTIONS):
        arguments = [argument for argument in arguments if argument not in ("$SMALL", "--dry-run")]
        read_command_line(module, "", [argument.removeprefix("guidance.") for argument in arguments])
    elif module not in ("pytest", "pip"):
        for argument in arguments:
            assert not argument.startswith("--") or f'"{argument.partition("=")[0]}"' in source(module), argument


OUTPUTS: dict[str, tuple[str | int, ...]] = {
    "recipes.align": ("train.output",),
    "recipes.train": ("train.output",),
    "recipes.score": ("scores.path",),
    "tools.answers": ("--output",),
    "tools.compare": ("--output",),
    "tools.convert_hf_to_bridge": (1,),
    "tools.convert_hf_to_megatron": (1,),
    "tools.convert_megatron_to_hf": (1,),
    "tools.demo": ("--output",),
    "tools.make_tiny_model": (1,),
    "tools.marked_pairs": (0,),
    "tools.prepare_pairs": (2,),
    "tools.annotate": ("--output",),
    "tools.sample": ("--output",),
    "tools.submit": ("train.output",),
    "tools.view": ("--output",),
    "bench.gpu": ("--json",),
    "bench.speed": ("--json", "--picture"),
    "tests.faults.fuzz": ("--json",),
    "tests.parity": ("--json",),
    "tests.roundtrip": ("--json",),
    "tools.certify": (1,),
}
"""Program -> where its command line says what it writes: places among its arguments, options, settings."""
WRITE_NOTHING = {"bench.speed.sampling", "tests.faults", "tools.plan", "tools.runs", "tools.tokens", "pip", "pytest"}
WRITE_TRACKED_FILES = {"tools.docs"}


def written_to(module: str, arguments: list[str]) -> Iterator[str]:
    """What a command names to be written."""
    said = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    for output in OUTPUTS[module]:
        if isinstance(output, int):
            yield from arguments[output : output + 1]
        elif output in arguments:
            yield arguments[arguments.index(output) + 1]
        elif output in said:
            yield said[output]


def test_every_command_writes_below_runs() -> None:
    shown = programs()
    assert {module for module, _ in shown} <= {*OUTPUTS, *WRITE_NOTHING, *WRITE_TRACKED_FILES}
    written = [place for module, arguments in shown if module in OUTPUTS for place in written_to(module, arguments)]
    assert len(written) > 20
    assert [place for place in written if not place.startswith("runs/")] == []


def test_experiments_write_below_runs_and_start_from_names_on_a_hub() -> None:
    for path in sorted((ROOT / "conf").glob("*.yaml")):
        content = yaml.safe_load(text(path))
        assert model_id(content["model"]["checkpoint"]) and hub_split(Path(content["data"]["train"])), path
        places = [content["train"]["output"], content["model"].get("guidance"), content.get("scores", {}).get("path")]
        assert [place for place in places if place is not None and not place.startswith("runs/")] == [], path


def test_what_programs_write_by_default_is_ignored_by_git() -> None:
    ignored = tuple(line for line in text(ROOT / ".gitignore").splitlines() if line.endswith("/"))
    sources = [path for folder in ("tools", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
    defaults = re.findall(r'default=Path\("([\w./-]+)"\)', "".join(map(text, sources)))
    assert {"runs/demo", "runs/real", "runs/credit.json"} <= set(defaults)
    assert [place for place in defaults if not f"{place}/".startswith(ignored)] == []


@each_page
def test_every_setting_named_exists(page: Path) -> None:
    groups = "|".join(Config.model_fields)
    defaults = Config()
    theirs = {name for foreign in FOREIGN for name in foreign.names}
    for word in quoted(prose(page)):
        if (match := re.match(rf"({groups})\.(\w+)(?![\w/.(])", word)) and match[2] not in (
            "py",
            "md",
            "html",
            "sbatch",
            "yaml",
        ):
            known = match[0] in RENAMED or match[2] in type(getattr(defaults, match[1])).model_fields
            assert known or word in theirs or page == FOLLOWED, word


# ---------------------------------------------------------------- tables that follow from the code


@pytest.mark.parametrize("page", tables())
def test_the_tables_that_are_written_by_a_program_are_up_to_date(page: str) -> None:
    """Methods with their options, defaults and files; token rewards with theirs; metrics of single losses."""
    path = ROOT / "docs" / page
    assert text(path) == with_tables(path, tables()[page]), "python -m tools.docs writes them"


def test_the_table_of_faults_counts_what_was_tried_and_what_passed(tmp_path: Path) -> None:
    results = tmp_path / "faults.json"
    kills = [{"subject": "kills", "passed": True}, {"subject": "kills", "passed": False}]
    results.write_text(json.dumps({"inputs": [{"subject": "data", "passed": True}], "runs": kills}))
    assert faults(results).splitlines()[2:] == ["| data | 1 | 1 |", "| kills | 2 | 1 |"]


def test_the_first_page_names_losses_that_exist() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \|.*\| \[\w.*\]\(docs/methods\.md#[\w-]+\) \|$", text(ROOT / "README.md"), re.MULTILINE
    )
    assert len(rows) > 10 and set(rows) <= set(LOSSES)


def test_the_golden_test_named_is_there() -> None:
    (name,) = re.findall(r"`(test_\w+)\[NAME\]`", text(ROOT / "docs" / "methods.md"))
    assert f"def {name}(" in text(ROOT / "tests" / "unit" / "test_losses.py")


def test_the_settings_that_give_token_rewards_exist() -> None:
    rows = table("methods.md", "`loss.token_rewards`")
    assert [quoted(row["`loss.token_rewards`"])[0] for row in rows] == list(REWARD_SOURCES)
    for row in rows:
        for word in quoted(row["given by"]):
            group, _, name = word.partition(".")
            assert hasattr(getattr(Config(), group), name), word


def test_every_metric_is_explained() -> None:
    reported: set[str] = set()
    for name in LOSSES:
        reported |= set(averages(dict.fromkeys(names_for(LossConfig(type=name)), 1.0)))
    explained = set(quoted(prose(ROOT / "docs" / "metrics.md")))
    assert reported - explained == set()
    tabled = {name for rows in all_tables("metrics.md") for row in rows for name in quoted(next(iter(row.values())))}
    assert {name for name in tabled if re.match(r"token_rewards/|tgdpo/|treg/", name)} <= reported


def test_the_table_of_formats_has_every_format_with_its_columns() -> None:
    rows = table("formats.md", "`data.format`")
    columns = {quoted(row["`data.format`"])[0]: set(quoted(row["columns"])) for row in rows}
    assert set(columns) == set(FORMATS)
    for name, named in columns.items():
        for form in FORMATS[name]:
            assert set(form.columns) <= named, name  # a cell also names the fields of its objects
    for row in table("data.md", "format"):
        (name,) = quoted(row["format"])
        assert name in FORMATS


def test_the_table_of_settings_has_every_recipe_of_a_paper_and_its_layout() -> None:
    rows = table("training.md", "setting", "recipes")
    written_down = {name: row["layout on 8 × 80 GB"] for row in rows for name in quoted(row["recipes"])}
    others = ("_tiny", "_4x8", "_8x8")
    assert set(written_down) == {name for name in RECIPES if not name.endswith(others)}
    for name, layout in written_down.items():
        parallel = RECIPES[name]().parallel
        tensor, ranks = parallel.tensor_model_parallel_size, 8 // parallel.model_parallel_size
        assert layout == (f"TP{tensor} DP{ranks}" if tensor > 1 else f"DP{ranks}")
        assert parallel == ParallelConfig(tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1)


def test_the_example_pairs_are_what_the_generator_makes() -> None:
    splits = make_splits(seed=0, num_train=500, num_validation=100, num_sft=0, noise=0.0)
    for name, rows in {"pairs": splits.train, "validation": splits.validation}.items():
        lines = text(ROOT / "docs" / "example" / f"{name}.jsonl").splitlines()
        expected = [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in rows]
        assert [json.loads(line) for line in lines] == expected


# ---------------------------------------------------------------- numbers that were measured


def results(name: str) -> Any:
    return json.loads(text(ROOT / "results" / f"{name}.json"))


def number(cell: str) -> float:
    """The number of a cell, without its sign of comparison; of a percentage, its hundredth."""
    found = re.search(r"[-−+]?\d[\d.]*(e-?\d+)?", cell)
    assert found, cell
    value = float(found[0].replace("−", "-"))
    return value / 100 if "%" in cell else value


def same(cell: str, value: float) -> bool:
    """Whether a cell gives a number, rounded to the digits that it shows."""
    digits = re.search(r"\d[\d.]*(e-?\d+)?", cell)
    assert digits, cell
    mantissa, _, exponent = digits[0].partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2])) / (100 if "%" in cell else 1)
    return abs(number(cell) - value) <= 0.5000001 * unit


@pytest.mark.parametrize(
    ("heading", "of_tgdpo"), [("largest error of TGDPO", True), ("largest error of the other losses", False)]
)
def test_parity_is_quoted_as_it_was_measured(heading: str, of_tgdpo: bool) -> None:
    largest: dict[str, float] = {}
    for result in results("parity"):
        if result["family"] == "llama" and (result["method"] == "TGDPO") == of_tgdpo:
            for kind, error in result["errors"].items():
                largest[kind] = max(largest.get(kind, 0.0), error)
    rows = {quoted(row[heading])[0]: row for row in table("measurements.md", heading)}
    assert set(rows) == set(largest)
    for kind, row in rows.items():
        assert same(row["measured"], largest[kind]), row
        assert number(row["target"]) == LIMITS[kind], row


def test_the_parity_matrix_is_as_large_as_is_said() -> None:
    page, rows = text(ROOT / "docs" / "measurements.md"), results("parity")
    of_tgdpo = {row["row"] for row in rows if row["method"] == "TGDPO" and row["family"] == "llama"}
    others = {row["method"] for row in rows} - {"TGDPO"}
    assert f"**TGDPO at {len(of_tgdpo)} layouts**" in page and f"**{len(others)} other losses" in page
    assert f"At {len(of_tgdpo)} layouts" in text(ROOT / "README.md")


def test_families_are_quoted_as_they_were_measured() -> None:
    """The largest errors of each family in the parity matrix, and of its way to Megatron and back."""
    rows = {row["family"].strip("`"): row for row in table("measurements.md", "family")}
    assert number(rows.pop("target")["`logps`"]) == LIMITS["logps"] == ROUND_TRIP_LIMIT
    compared, round_trips = results("parity"), results("roundtrip")
    assert set(rows) == {result["family"] for result in compared}
    for family, row in rows.items():
        for kind in ("logps", "loss", "gradient", "weights"):
            of_kind = [result["errors"].get(kind, 0.0) for result in compared if result["family"] == family]
            assert same(row[f"`{kind}`"], max(of_kind)), (family, kind)
        there_and_back = [result for result in round_trips if result["model"].startswith(f"{family},")]
        assert len(there_and_back) == 4 and all(result["bit_equal"] for result in there_and_back)
        assert same(
            row["log-probs at four layouts"],
            max(value for result in there_and_back for value in result["differences"].values()),
        ), family


@pytest.mark.parametrize(("name", "section"), [("bench", "## Speed"), ("fp8", "## FP8")])
def test_rows_are_quoted_as_they_were_measured(name: str, section: str) -> None:
    """Every row of the results, in their order, with its target."""
    page = text(ROOT / "docs" / "measurements.md")
    part = page[page.index(f"\n{section}\n") + 1 :]
    part = part[: part.find("\n## ", 1)] if "\n## " in part else part
    lines = [line for line in part.splitlines() if re.match(r"\| (?!-)", line) and "| measured |" not in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    measured = [row for row in results(name)["rows"] if row["measured"] is not None]
    assert len(cells) == len(measured)
    for (words, value, target, *_), row in zip(cells, measured, strict=True):
        assert same(value, row["measured"]), (words, row["name"])
        assert (target == "–") == (row["target"] is None), (words, row["name"])
        if row["target"] is not None:
            assert same(target, row["target"]) and ("≥" in target) != row["at_most"], (words, row["name"])


def test_the_first_page_quotes_the_pages_of_measurements() -> None:
    readme = text(ROOT / "README.md")
    part = readme[readme.index("## Five results") : readme.index("## Your own")]
    quoted_numbers = set(re.findall(r"\d+\.\d+(?:e-\d+)?(?: %)?", part))
    behind = text(ROOT / "docs" / "measurements.md") + text(ROOT / "docs" / "token-credit.md")
    assert len(quoted_numbers) > 6
    for words in quoted_numbers:
        assert re.search(rf"(?<![\d.]){re.escape(words.removesuffix(' %'))}(?![\d])", behind), words


def test_the_demo_is_quoted_as_it_was_measured() -> None:
    demo = results("demo")
    for row, numbers in zip(
        table("measurements.md", "model", "right answer likelier"), demo["comparison"].values(), strict=True
    ):
        for column, name in {"right answer likelier": "accuracy", "answers right to the letter": "exact_match"}.items():
            shares = numbers[name]
            mean, low, high = 100 * sum(shares) / len(shares), 100 * min(shares), 100 * max(shares)
            assert row[column] == f"{mean:.1f} % ({low:.0f}–{high:.0f})"
    minutes, memory = (
        float(row["measured"]) for row in table("measurements.md", "what the demo takes, after installation")
    )
    assert minutes == round(sum(demo["stage_seconds"].values()) / 60, 1)
    assert memory == round(demo["peak_memory_gib"], 1)


def test_token_credit_is_quoted_as_it_was_measured() -> None:
    credit = results("credit")
    sources = ("surprise", "sft_guidance", "guidance", "contrastive", "file", "random")
    for row, source_of in zip(table("token-credit.md", "token rewards"), sources, strict=True):
        numbers = credit["sources"][source_of]["validation"]
        check_spread(row["AUROC"], numbers["auroc"], 1)
        check_spread(row["average precision"], numbers["average_precision"], 1)
    methods = credit["methods"]
    start, *rows = table("token-credit.md", "method", "preference accuracy, %")
    check_spread(start["exact match, %"], credit["start"]["exact"], 100)
    for row, name in zip(rows, methods, strict=True):
        check_spread(row["preference accuracy, %"], methods[name]["accuracy"], 100)
        check_spread(row["exact match, %"], methods[name]["exact"], 100)
        check_spread(row["steps"], methods[name]["steps"], 1)
        if name != "DPO":
            check_spread(row["less DPO's"], methods[name]["exact_over_dpo"], 100)
    for row, name in zip(table("token-credit.md", "method", "wrong"), methods, strict=True):
        for column, moved in {"wrong": "mass_wrong", "others": "mass_kept", "right": "mass_right"}.items():
            assert same(row[column], 100 * methods[name][moved]["mean"]), (name, column)


def check_spread(cell: str, expected: dict[str, float], scale: float) -> None:
    mean, spread = cell.split(" ± ")
    assert same(mean, scale * expected["mean"]) and same(spread, scale * expected["spread"]), (cell, expected)


def test_the_planner_prints_what_the_page_shows(tmp_path: Path) -> None:
    """With the sizes of Llama-3-8B in a config.json of its own."""
    from tests.unit.test_memory import LLAMA_8B
    from tgdpo_megatron.config import complete
    from tools.plan import report

    config = complete(RECIPES["tgdpo_llama3_8b_pairrm"](), where="test")
    shown = report(config, LLAMA_8B, ranks=8, memory=80 << 30, transformer_engine=False)
    assert shown.rstrip() in text(ROOT / "docs" / "memory.md")
