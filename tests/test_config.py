"""config.py: what a command line may look like, what its mistakes say, and that help shows the comments in the code."""

import errno
import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import pytest
import torch

import train
from engine import config
from recipes import RECIPES, TrainConfig, configure

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


@dataclass(frozen=True)
class Ranged:
    share: float = 0.5         # [0, 1): of all
    pair: tuple = (0.1, 1.0)   # (0, 1] rising: least and largest
    n: int = 3                 # [-1, inf): -1 = all
    note: str = "x"            # in [0, 1]: no range


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
# What a number may be


@pytest.mark.parametrize("field, right, wrong", [
    ("share", ["0", "0.999"], ["1", "-0.001", "1e999", "-1e999"]),
    ("pair", ["1e-9,1", "1,1"], ["0,1", "0.5,1.01", "0.6,0.5", "1e999,1e999"]),
    ("n", ["-1", "0", str(10**30)], ["-2", str(-(10**30))]),
])
def test_a_number_lies_in_the_range_of_its_comment(field, right, wrong):
    text = config.ranges(Ranged)[field]
    for said in right:
        assert config.lies_in(getattr(config.apply(Ranged(), {field: said}), field), text)
    for said in wrong:
        with pytest.raises(ValueError, match=rf"^--{field} is .*; it must be in {re.escape(text)}$"):
            config.apply(Ranged(), {field: said})


def test_nan_lies_nowhere_and_words_have_no_range():
    assert config.ranges(Ranged).keys() == {"share", "pair", "n"}
    assert not config.lies_in(float("nan"), "(-inf, inf)") and not config.lies_in((0.5, float("nan")), "(0, 1]")
    with pytest.raises(ValueError, match="--share is nan"):
        config.checked(Ranged(share=float("nan")))


@pytest.mark.parametrize("text", ["9" * 5000, "(" * 3000, "-" * 5000 + "1", "1j", "1_0.0__0", "[1]", "0x", "\0", ""])
def test_whatever_is_typed_is_a_number_or_a_mistake(text):
    for field in "share", "pair", "n":
        with pytest.raises(ValueError, match=f"^--{field} (wants|is) "):
            config.apply(Ranged(), {field: text})


def configs():
    from bench import BenchConfig
    from distill import DistillConfig
    from embed import DuplicatesConfig, EmbedConfig, MapConfig, SearchConfig
    from engine.task import EvaluateConfig
    from tasks import TASKS
    from visualize import VisualizeConfig
    from weights import WeightsConfig
    written = TrainConfig(), DistillConfig(), EvaluateConfig(), VisualizeConfig(), BenchConfig(), WeightsConfig()
    written += EmbedConfig(), SearchConfig(), DuplicatesConfig(), MapConfig()
    return [*written, *(task.config() for task in TASKS.values())]


def test_every_number_of_every_command_has_a_range_and_its_defaults_lie_in_it():
    for c in configs():
        numbers = {field for field, kind in config.types(c).items() if kind in (int, float, tuple)}
        assert config.ranges(type(c)).keys() == numbers, type(c)
        assert config.checked(c) is c
    assert all(config.checked(recipe) for recipe in RECIPES.values())


NONSENSE = """lr -1, momentum 2, drop_path 1.5, flip 7, global_scale 1,0; ratio -1,1; mask_ratio 2,3; student_temp -0.1,
    koleo_group 1, dino_prototypes 1, dino_bottleneck 0, std -1,-1,-1; clip -1, workers -7, stop_after -4, n_shapes 0,
    depth -1, patch_size -16, n_local -1, ratio 0,0; mask_share 2, prototype_std 0, beta1 1, batch 100000000000,
    depth 100000, std 0,0,0; rope_rescale 0, student_temp 0, lr nan, lr inf, lr 1e999, batch 1e11, clip 1e999"""


@pytest.mark.parametrize("said", [each.strip() for each in re.split(r"; |, (?=[a-z])|,\n", NONSENSE)])
def test_nonsense_trains_nothing(said, tmp_path):
    field, text = said.split()
    with pytest.raises(ValueError, match=f"^--{field} (is|wants) .*") as error:
        configure(["--out", str(tmp_path), f"--{field}", text])
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())
    assert "wants" in str(error.value) or config.ranges(TrainConfig)[field] in str(error.value)


def test_no_data_is_not_the_folder_one_stands_in():
    with pytest.raises(ValueError, match="--data is empty; name a folder, or shapes"):
        configure(["--data", ""])


@pytest.mark.parametrize("where, kind", [
    ("file", "folder"), ("file/below", "folder"), ("/dev/null", "folder"), ("/proc/run", "folder"),
    ("/dev/null", "file"), (".", "file"), ("file/x.png", "file"), ("/proc/x.png", "file"), ("x" * 300, "folder")])
def test_where_nothing_can_be_written(tmp_path, monkeypatch, where, kind):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ValueError, match=f"^--out {where}.*({kind})") as error:
        config.writable(where, folder=kind == "folder")
    assert "\n" not in str(error.value) and os.listdir() == ["file"]


def test_a_folder_without_the_right_to_write(tmp_path, monkeypatch):
    def read_only(dir):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(config, "TemporaryFile", read_only)  # root may write anywhere
    with pytest.raises(ValueError, match="no folder can be written there .Permission denied."):
        config.writable(tmp_path / "new" / "run")


def test_where_something_can(tmp_path):
    for path, folder in ((tmp_path, True), (tmp_path / "a/b", True), (tmp_path / "x.png", False)):
        config.writable(path, folder)
    (tmp_path / "x.png").touch()
    config.writable(tmp_path / "x.png", folder=False)  # it will be replaced
    assert os.listdir(tmp_path) == ["x.png"]


def test_a_file_is_whole_or_what_it_was(tmp_path):
    path = tmp_path / "x.txt"
    with config.whole(path) as new:
        new.write_text("old")
        assert not path.exists()
    with pytest.raises(ValueError, match="x.txt cannot be written: No space left on device; name a place with room"):
        with config.whole(path) as new:
            new.write_text("ha")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(KeyboardInterrupt):
        with config.whole(path) as new:
            new.write_text("ha")
            raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("command", [
    "train --out FILE", "distill --out FILE", "evaluate --task nyu --weights pixels --out FILE",
    "evaluate --task knn --weights pixels --cache FILE", "bench forward --out FILE", "bench forward --json FILE/x.json",
    "visualize pca shapes:1 --weights FILE --out FILE/x.png", "weights FILE FILE/x.pth --to meta",
    "embed shapes --weights pixels --out FILE/x.npz", "embed shapes --weights pixels --out x.npz --cache FILE"])
def test_every_command_asks_first(command, tmp_path):
    (tmp_path / "FILE").touch()
    name, *words = command.replace("FILE", str(tmp_path / "FILE")).split()
    with pytest.raises(ValueError, match=r"^(--out|--cache|--json|OUT) .*FILE"):
        importlib.import_module(name).main(words)


def test_the_first_rank_says_what_is_wrong_and_another_only_if_it_outlives_that(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(config.time, "sleep", slept.append)
    for rank, said, waits in ("0", "train.py: unknown", []), ("1", "train.py: rank 1: unknown", [config.PATIENCE]):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(config.sys, "argv", ["train.py", "--lrr", "3"])
        with pytest.raises(SystemExit) as end:
            config.run(train.main)
        assert end.value.code == 2 and capsys.readouterr().err.startswith(said) and slept == waits


@pytest.mark.long
@pytest.mark.parametrize("late", [0, 1])
def test_torchrun_lets_one_sentence_through(tmp_path, late):
    """whichever rank comes late, and torchrun ends all others when one has left"""
    (tmp_path / "x.py").write_text(f"""import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
time.sleep(5 * (os.environ["RANK"] == "{late}"))
import train
train.command_line.run(train.main)
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "x.py")]
    done = subprocess.run([*command, "--lrr", "3"], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode and done.stderr.count("unknown option") == 1
    assert "x.py: unknown option --lrr; did you mean --lr? --help lists all\n" in done.stderr

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
    ("import os; os.stat('x' * 300)", 2, f"program.py: [Errno 36] File name too long: '{'x' * 300}'\n"),
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
    from embed import DuplicatesConfig, EmbedConfig, MapConfig, SearchConfig
    from engine.task import EvaluateConfig
    from tasks import TASKS
    from visualize import VisualizeConfig

    for kind, files in ((TrainConfig, ["train", "recipes", "data", "engine/checkpoint", "engine/profile",
                                       "engine/stages", "engine/channels"]),
                        (VisualizeConfig, ["visualize", "engine/channels"]),
                        (EmbedConfig, ["embed", "engine/features", "engine/chunks", "engine/channels"]),
                        (SearchConfig, ["embed"]), (DuplicatesConfig, ["embed"]), (MapConfig, ["embed"]),
                        (EvaluateConfig, ["evaluate", "engine/features", "engine/chunks", "sets/pairs"])):
        assert not unread([field.name for field in fields(kind)], files)
    for task in TASKS.values():
        run = task.run.func if isinstance(task.run, partial) else task.run
        files = [run.__module__.replace(".", "/"), *(f"decoders/{name}" for name in task.decoders)]
        files += ["engine/features", "engine/heads", "engine/channels"] + ["engine/classify"] * (task.wants == "tokens")
        files += ["dinotxt"] * (task.network is not None)
        files += ["decoders/fit"] * any(name != "linear" for name in task.decoders)
        assert not unread({option.name for option in task.all_options()} - {"decoder"}, files), task.name


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    (tmp_path / "program.py").write_text(
        "from engine import config\n\n\ndef main(argv):\n    for i in range(100_000):\n        print(i)\n\n\n"
        "config.run(main)\n")
    words = ["bash", "-c", f"{sys.executable} program.py | head -1; echo ${{PIPESTATUS[0]}}"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert done.stdout == "0\n141\n" and not done.stderr
