"""config.py: what a command line may look like, what its mistakes say, and that help shows the comments in the code."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import pytest
import torch

from engine import config
from train import RECIPES, TrainConfig

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Parent:
    scale: tuple = (0.3, 1.0)  # share of the area: a, b
    flip: float = 0.5          # probability


@dataclass(frozen=True)
class Options(Parent):
    name: str = "tiny"         # of the run # second half
    flip: float = 0.25         # overrides the parent's
    steps: int = 10
    long_name: bool = False    # dashes, too


def parse(*argv):
    values, words = config.read_words(argv, config.types(Options()))
    return config.apply(Options(), values), words

# --------------------------------------------------------------------------------
# What is understood


@pytest.mark.parametrize("argv, field, value", [
    (["--steps", "3"], "steps", 3),
    (["--steps=3"], "steps", 3),
    (["--steps=-3"], "steps", -3),
    (["--steps", "-3"], "steps", -3),
    (["--steps", "1_000"], "steps", 1000),
    (["--steps", "3", "--steps", "4"], "steps", 4),
    (["--flip", "1e-3"], "flip", 0.001),
    (["--flip", "1"], "flip", 1.0),
    (["--name", "b"], "name", "b"),
    (["--name=b=c"], "name", "b=c"),
    (["--name="], "name", ""),
    (["--name", "7"], "name", "7"),
    (["--long_name"], "long_name", True),
    (["--long-name"], "long_name", True),
    (["--long_name", "true"], "long_name", True),
    (["--long_name", "FALSE"], "long_name", False),
    (["--long-name=false"], "long_name", False),
    (["--long_name", "--steps", "3"], "long_name", True),
    (["--scale", "0.1,0.2"], "scale", (0.1, 0.2)),
    (["--scale=(0.1, 2)"], "scale", (0.1, 2)),
])
def test_one_option(argv, field, value):
    found, words = parse(*argv)
    assert getattr(found, field) == value and type(getattr(found, field)) is type(value)
    assert words == []
    rest = {f.name for f in fields(Options)} - {field, "steps"}
    assert all(getattr(found, name) == getattr(Options(), name) for name in rest)


def test_a_bool_swallows_no_word():
    found, words = parse("--long_name", "word", "--steps", "2", "other")
    assert found == Options(steps=2, long_name=True) and words == ["word", "other"]


def test_nothing_is_changed_in_place():
    argv, default = ["--steps", "3"], Options()
    config.read_words(argv, config.types(default))
    assert argv == ["--steps", "3"]
    assert config.apply(default, {"steps": "3"}) == Options(steps=3) and default == Options()

# --------------------------------------------------------------------------------
# What is not


@pytest.mark.parametrize("argv, says", [
    (["--stpes", "3"], "unknown option --stpes; did you mean --steps?"),
    (["--long-nam"], "unknown option --long_nam; did you mean --long_name?"),
    (["--steps"], "--steps wants a value of type int; write --steps VALUE"),
    (["--steps", "--flip", "1"], "--steps wants a value of type int"),
    (["--steps", "3.0"], "--steps wants int, got '3.0'"),
    (["--steps", "three"], "--steps wants int, got 'three'"),
    (["--steps="], "--steps wants int, got ''"),
    (["--steps", "True"], "--steps wants int, got 'True'"),
    (["--flip", "often"], "--flip wants float, got 'often'"),
    (["--flip", "nan"], "--flip wants float, got 'nan'"),
    (["--flip", "__import__('os')"], "--flip wants float"),
    (["--long_name=1"], "--long_name wants bool, got '1'"),
    (["--scale", "0.5"], "--scale wants 2 numbers, as in 0.3,1.0, got '0.5'"),
    (["--scale", "1,2,3"], "--scale wants 2 numbers"),
    (["--scale", "a,b"], "--scale wants 2 numbers"),
    (["--scale", "1,'b'"], "--scale wants 2 numbers"),
])
def test_mistakes_name_themselves_in_one_line(argv, says):
    with pytest.raises(ValueError) as error:
        parse(*argv)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_devices():
    assert config.choose_device("cpu") == torch.device("cpu")
    assert config.choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="--device abacus is not here; this machine has: .*cpu"):
        config.choose_device("abacus")

# --------------------------------------------------------------------------------
# Help


def test_describe_shows_values_and_comments_of_a_class_and_its_parent():
    lines = {line.split()[0]: line for line in config.describe(Options(name="")).splitlines()}
    assert list(lines) == ["--scale", "--flip", "--name", "--steps", "--long_name"]
    assert lines["--scale"].split() == "--scale 0.3,1 share of the area: a, b".split()
    assert lines["--flip"].split() == "--flip 0.25 overrides the parent's".split()
    assert lines["--name"].split() == "--name - of the run # second half".split()
    assert lines["--steps"].split() == ["--steps", "10"]
    assert lines["--long_name"].split() == "--long_name False dashes, too".split()


def test_every_option_of_every_recipe_can_be_written_down():
    for recipe in RECIPES.values():
        argv = [f"--{f.name}={getattr(recipe, f.name)}" for f in fields(recipe)]
        values, _ = config.read_words(argv, config.types(TrainConfig()))
        assert config.apply(TrainConfig(), values) == recipe

# --------------------------------------------------------------------------------
# As a program


def program(tmp_path, body):
    """Runs a script beside a copy of engine/config.py; returns its exit code and what it said."""
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "config.py").write_text((ROOT / "engine" / "config.py").read_text())
    source = f"from engine import config\n\n\ndef main(argv):\n    {body}\n\n\nconfig.run(main)\n"
    (tmp_path / "program.py").write_text(source)
    done = subprocess.run([sys.executable, "program.py", "a word"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": ""})
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("body, code, says", [
    ("print(argv)", 0, "['a word']\n"),
    ("raise ValueError('too many')", 2, "program.py: too many\n"),
    ("raise OSError('no room')", 2, "program.py: no room\n"),
    ("raise KeyboardInterrupt", 130, ""),
])
def test_what_we_say_on_purpose_is_one_line(tmp_path, body, code, says):
    assert program(tmp_path, body) == (code, says)


@pytest.mark.parametrize("body", ["int('x')", "import json; json.loads('{')", "open('nowhere')", "raise KeyError('x')"])
def test_bugs_keep_their_traceback(tmp_path, body):
    code, said = program(tmp_path, body)
    assert code == 1 and "Traceback" in said


def unread(names, files):
    source = "".join((ROOT / f"{file}.py").read_text() for file in files)
    return [name for name in names if not re.search(rf"\b(c|cfg|config|self)\.{name}\b", source)]


def test_every_option_is_read():
    """An option that nothing reads would train on without a word; of a task, in its own file or what it stands on."""
    from engine.task import EvaluateConfig
    from tasks import TASKS
    from visualize import VisualizeConfig

    for kind, files in ((TrainConfig, ["train", "data", "engine/checkpoint"]), (VisualizeConfig, ["visualize"]),
                        (EvaluateConfig, ["evaluate", "engine/features", "engine/chunks", "sets/pairs"])):
        assert not unread([field.name for field in fields(kind)], files)
    for task in TASKS.values():
        run = task.run.func if isinstance(task.run, partial) else task.run
        files = [run.__module__.replace(".", "/"), *(f"decoders/{name}" for name in task.decoders)]
        files += ["engine/features"] * (task.wants == "maps") + ["engine/classify"] * (task.wants == "tokens")
        assert not unread({option.name for option in task.all_options()} - {"decoder"}, files), task.name
