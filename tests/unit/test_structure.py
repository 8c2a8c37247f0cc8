"""How the code hangs together: imports run one way, and every formula is near the program that uses it."""

from __future__ import annotations

import ast
from pathlib import Path

from tgdpo_megatron.losses import LOSSES

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("tgdpo_megatron", "recipes", "tools", "bench")


def module_imports() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports when it is imported itself."""
    files = {_module(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    return {name: _imported(path, files) - {name} for name, path in files.items()}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path, files: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text()).body:  # module level only; TYPE_CHECKING blocks are not run
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(files)


def test_the_library_knows_nothing_of_what_is_built_on_it() -> None:
    """Not inside functions either."""
    for path in (ROOT / "tgdpo_megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in named:
                assert name.partition(".")[0] not in ("recipes", "tools", "bench", "tests"), f"{path}: {name}"


def test_no_module_imports_itself_through_others() -> None:
    imports = module_imports()
    reached: dict[str, set[str]] = {name: set(direct) for name, direct in imports.items()}
    changed = True
    while changed:
        changed = False
        for name, modules in reached.items():
            further = set().union(*(reached[module] for module in modules)) | modules
            changed |= further != modules
            reached[name] = further
    assert [name for name, modules in reached.items() if name in modules] == []


def test_the_library_imports_neither_recipes_nor_tools() -> None:
    upward = {
        name: {module for module in modules if not module.startswith("tgdpo_megatron")}
        for name, modules in module_imports().items()
        if name.startswith("tgdpo_megatron")
    }
    assert {name: modules for name, modules in upward.items() if modules} == {}


def test_a_reader_who_starts_at_train_reaches_every_formula_within_four_files() -> None:
    """By following imports; the losses' folder is opened where it is named, since it lists its own files."""
    imports = module_imports()
    folder = {name for name in imports if name.startswith("tgdpo_megatron.losses.")}
    reached, files = {"tgdpo_megatron.train"}, 1
    while files < 4:
        named = set().union(*(imports[name] for name in reached))
        reached |= named | (folder if "tgdpo_megatron.losses" in reached else set())
        files += 1
    assert {loss.formula.__module__ for loss in LOSSES.values()} <= reached


def test_every_file_of_text_is_read_and_written_as_utf8() -> None:
    """Whatever the locale says: batch jobs often have an ASCII one."""
    places = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            calls = [
                node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
            ]
            places += [f"{path.relative_to(ROOT)}:{call.lineno}" for call in calls if _leaves_the_encoding_open(call)]
    assert places == []


def _leaves_the_encoding_open(call: ast.Call) -> bool:
    """Whether a call reads or writes text, or opens a file for it, and does not say how the text is encoded."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    of_os = isinstance(function, ast.Attribute) and getattr(function.value, "id", "") == "os"
    if of_os or any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    texts = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    binary = any(isinstance(text, str) and "b" in text and len(text) <= 3 for text in texts)
    ours = name == "read_text" and bool(call.args)  # bounded.read_text, and the formats', have no such argument
    return (name in ("read_text", "write_text") and not ours) or (name == "open" and not binary)
