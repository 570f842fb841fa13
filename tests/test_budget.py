"""Line budgets, and what every file owes its reader: a docstring on top, a test beside it. Raise one with a reason."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUDGETS = {
    "model.py": 500, "losses.py": 250, "data.py": 500, "shapes.py": 470, "train.py": 625, "checkpoint.py": 120,
    "evaluate.py": 500, "weights.py": 330, "layouts.py": 320, "hubconf.py": 60,
    "config.py": 120, "visualize.py": 260, "bench.py": 300, "demo.py": 100, "convnext.py": 200,
    "attention.py": 50, "explore.py": 200,
    "distill.py": 405, "groups.py": 170, "cache.py": 80, "ops.py": 250, "setup.py": 75,
    "dense.py": 500, "features.py": 300, "chunks.py": 300, "matching.py": 430, "navi.py": 150, "metrics.py": 200,
    "retrieval.py": 220, "video.py": 330, "variants.py": 150, "logreg.py": 145, "finegrained.py": 115,
}
TEST_BUDGET = 300
UNTESTED = {"bench.py", "demo.py", "setup.py"}  # they run the others, and are run by hand: make bench, make demo
FILES = sorted(ROOT.glob("*.py"))
TESTS = sorted(ROOT.glob("tests/test_*.py"))


def relative(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def n_lines(path):
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("name", [path.name for path in FILES if path.name not in UNTESTED - BUDGETS.keys()])
def test_file_keeps_its_budget(name):
    assert name in BUDGETS, f"{name} is new: give it a budget here"
    assert n_lines(ROOT / name) <= BUDGETS[name]


@pytest.mark.parametrize("name", relative(TESTS))
def test_test_keeps_its_budget(name):
    assert n_lines(ROOT / name) <= TEST_BUDGET


def test_every_file_has_its_test_and_every_test_its_file():
    """test_data.py may go on in test_data_sources.py."""
    files = {path.stem for path in FILES if path.name not in UNTESTED}
    tests = {path.stem.removeprefix("test_") for path in TESTS} - {"budget"}
    assert files <= tests, f"without a test: {sorted(files - tests)}"
    strays = [test for test in tests - files if not any(test.startswith(f"{file}_") for file in files)]
    assert not strays, f"tests of no file: {strays}"


@pytest.mark.parametrize("name", relative(FILES + TESTS))
def test_file_opens_with_a_docstring(name):
    text = (ROOT / name).read_text()
    assert text.startswith('"""') and ast.get_docstring(ast.parse(text))
