"""What every file owes its reader: a docstring on top, a test beside it, and imports that run one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNTESTED = {"demo", "setup"}  # they run the others, and are run by hand: make demo
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("engine/*.py")])
TESTS = sorted(ROOT.glob("tests/test_*.py"))


def relative(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def test_every_file_has_its_test_and_every_test_its_file():
    """test_data.py may go on in test_data_sources.py."""
    files = {path.stem for path in FILES if path.stem not in UNTESTED | {"__init__"}}
    tests = {path.stem.removeprefix("test_") for path in TESTS} - {"house"}
    without = {file for file in files if not any(test == file or test.startswith(f"{file}_") for test in tests)}
    assert not without, f"without a test: {sorted(without)}"
    strays = [test for test in tests - files if not any(test.startswith(f"{file}_") for file in files)]
    assert not strays, f"tests of no file: {strays}"


@pytest.mark.parametrize("name", relative(FILES + TESTS))
def test_file_opens_with_a_docstring(name):
    text = (ROOT / name).read_text()
    assert text.startswith('"""') and ast.get_docstring(ast.parse(text))


def imported(path):
    """The project's own modules that a file imports anywhere, as dotted names."""
    own = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & own


def test_imports_run_one_way():
    """model, convnext and losses import only ops and one another; nothing imports itself by a detour."""
    graph = {".".join(file.relative_to(ROOT).with_suffix("").parts): imported(file) for file in FILES}
    for name in "model", "convnext", "losses":
        assert graph[name] <= {"ops", "model"}, f"{name} imports {graph[name]}"
    assert not graph["ops"] and not graph["data"] & {"model", "convnext", "losses"}
    for name, own in graph.items():
        may = name in ("train", "distill", "demo", "bench", "engine.trials")
        assert may or "train" not in own, f"{name} imports train"
    done = set()
    while ready := {name for name, own in graph.items() if name not in done and own <= done}:
        done |= ready
    assert not graph.keys() - done, f"imports in a circle, or what leads to one: {sorted(graph.keys() - done)}"
