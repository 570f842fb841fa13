"""What every file owes its reader: a docstring on top, a test beside it, a row in README, imports that run one way."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WINGS = "engine", "sets", "tasks", "decoders"
UNTESTED = {"setup", "__init__"}  # what runs without being called
FILES = sorted([*ROOT.glob("*.py"), *(path for wing in WINGS for path in ROOT.glob(f"{wing}/*.py"))])
TESTS = sorted(ROOT.glob("tests/test_*.py"))


def relative(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def test_the_root_is_what_people_type_and_what_the_paper_says():
    assert len(list(ROOT.glob("*.py"))) <= 24
    assert {path.parent.name for path in ROOT.glob("*/*.py")} <= {*WINGS, "tests", "csrc"}, "an unknown wing"


def test_every_file_has_its_test_and_every_test_its_file():
    """test_train.py may go on in test_train_ranks.py."""
    files = {path.stem for path in FILES if path.stem not in UNTESTED}
    tests = {path.stem.removeprefix("test_") for path in TESTS} - {"house", "readme"}
    without = {file for file in files if not any(test == file or test.startswith(f"{file}_") for test in tests)}
    assert not without, f"without a test: {sorted(without)}"
    strays = [test for test in tests - files if not any(test.startswith(f"{file}_") for file in files)]
    assert not strays, f"tests of no file: {strays}"


@pytest.mark.parametrize("name", relative(FILES + TESTS))
def test_file_opens_with_a_docstring(name):
    text = (ROOT / name).read_text()
    assert text.startswith('"""') and ast.get_docstring(ast.parse(text))


def dotted(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path):
    """The project's own modules that a file imports anywhere, as dotted names."""
    own, found = {dotted(file) for file in FILES}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & own - {dotted(path)}


def test_imports_run_one_way():
    """model, convnext and losses import only ops and one another; nothing imports itself by a detour."""
    graph = {dotted(file): imported(file) for file in FILES}
    for name in "model", "convnext", "losses":
        assert graph[name] <= {"ops", "model"}, f"{name} imports {graph[name]}"
    assert graph["ops"] <= {"engine.proof"} and not graph["data"] & {"model", "convnext", "losses"}
    for name, own in graph.items():
        wing, _, file = name.partition(".")
        may = name in ("train", "distill", "text", "demo", "bench", "engine.trials")
        assert may or "train" not in own, f"{name} imports train"
        others = {"engine": ("sets", "tasks", "decoders", "evaluate"), "decoders": ("sets", "tasks", "evaluate"),
                  "sets": ("tasks", "decoders", "evaluate"), "tasks": ("evaluate", "tasks")}.get(wing, ())
        wrong = {each for each in own if each.split(".")[0] in others}
        assert name == "tasks" or not wrong, f"{name} imports {sorted(wrong)}"
    done = set()
    while ready := {name for name, own in graph.items() if name not in done and own <= done}:
        done |= ready
    assert not graph.keys() - done, f"imports in a circle, or what leads to one: {sorted(graph.keys() - done)}"


def test_evaluate_is_the_command_alone():
    """What a task is, no word of it there: neither a task's own option nor a set's name."""
    text = (ROOT / "evaluate.py").read_text()
    code = ast.unparse([node for node in ast.parse(text).body if not isinstance(node, ast.Expr)])
    assert len(text.splitlines()) <= 200
    for word in "shots", "iterations", "ignore", "linear", "ade20k", "Tab.", "tests":
        assert not re.search(rf"\b{word}\b", code), f"evaluate.py knows of {word}"


def test_readme_names_every_file():
    """Its table has a row for each file of the root, and each wing's row names the files there."""
    rows = re.findall(r"^\| (.+?) \|", (ROOT / "README.md").read_text().partition("## Files")[2], re.M)
    named = {name.strip() for row in rows for name in row.split(",")}
    assert {name for name in named if name.endswith(".py")} == set(relative(FILES)) - {f"{wing}/__init__.py"
                                                                                     for wing in WINGS}
