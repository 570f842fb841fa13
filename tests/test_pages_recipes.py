"""docs/adapt.md: what stands in its blocks runs, word by word, in a copy of the repository: small photos, few steps."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import wave
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import shapes

ROOT = Path(__file__).parents[1]
TITLES = ("Own data", "Another modality", "A new size", "A new loss", "A new task", "A new decoder", "Distil mine",
          "Resume on other ranks", "One GPU of 24 GB", "A cluster", "Export", "Serve a folder")
SMALL = """--batch 8 --group 8 --koleo_group 8 --steps 4 --global_size 32 --local_size 16 --workers 0
           --device cpu --log_every 1""".split()
HEADS = """--dino_prototypes 64 --ibot_prototypes 64 --dino_hidden 32 --ibot_hidden 32 --dino_bottleneck 16
           --ibot_bottleneck 16 --n_local 1""".split()
MORE = {  # what commands get beside what stands there: later words win
    "train.py": ["--depth", "2", "--patch_size", "8", *SMALL, *HEADS],
    "distill.py": [*SMALL, "--cooldown", "0"],
    "evaluate.py": ["--limit", "30", "--workers", "0", "--device", "cpu"],
    "embed.py PHOTOS": ["--resolution", "32", "--workers", "0", "--device", "cpu"],
    "visualize.py pca": ["--resolution", "32"],
}
RUNNER = '''
import importlib, io, json, sys, traceback
from contextlib import redirect_stdout
for line in sys.stdin:
    said, failed, (script, *words) = io.StringIO(), "", json.loads(line)
    try:
        with redirect_stdout(said):
            importlib.import_module(script).main(words)
    except BaseException:
        failed = traceback.format_exc()
    print(json.dumps([said.getvalue(), failed]), flush=True)
'''
SHELL = """set -e
trap '[ -z "$(jobs -p)" ] || kill $(jobs -p)' EXIT
"""
ON_PATH = dict(python=f'exec {sys.executable} "$@"', torchrun=f'exec {sys.executable} -m torch.distributed.run '
               '--rdzv-backend c10d --rdzv-endpoint localhost:0 "$@"')


def parts_of(text):
    """{title: [(kind of block, its text, what stands before it)]}"""
    found = {}
    for part in text.split("\n## ")[1:]:
        title = part.partition("\n")[0].partition(". ")[2]
        found[title] = [(kind, body, part[:start]) for kind, body, start in
                        ((m[1], m[2], m.start()) for m in re.finditer(r"^```(\w+)\n(.*?)^```", part, re.M | re.S))]
    return found


def change(folder, diff):
    """A diff without numbers of lines: what is there, with its context, stands in its file once."""
    for name, hunks in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", diff, re.M | re.S):
        path = folder / name
        for hunk in re.split(r"^@@\n", hunks, flags=re.M):
            assert {line[:1] for line in hunk.splitlines()} <= {" ", "+", "-"}, hunk
            old, new = ("\n".join(line[1:] for line in hunk.splitlines() if line[0] in kinds) for kinds in (" -", " +"))
            text = path.read_text()
            assert text.count(old) == 1, f"{name} has {text.count(old)} times:\n{old}"
            path.write_text(text.replace(old, new))


def words_of(line):
    """A command, with what makes it small"""
    more = next((words for start, words in MORE.items() if f"{start} " in line), [])
    return line.split() + more * ("--plan" not in line and "search" not in line)


def make_data(folder):
    for split in "train", "val":
        for i in range(16):
            path = folder / "PHOTOS" / split / "ab"[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(shapes.scene(i, 48).image).save(path)
    (folder / "SOUNDS").mkdir()
    for i in range(8):
        with wave.open(str(folder / f"SOUNDS/{i}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes((9000 * np.sin(np.arange(16000) * (0.1 + 0.1 * i))).astype(np.int16).tobytes())


@pytest.fixture(scope="module")
def recipes():
    return parts_of((ROOT / "docs/adapt.md").read_text())


@pytest.fixture(scope="module")
def copy(recipes, tmp_path_factory):
    """The repository, photos and sounds, with all that the recipes write and change"""
    folder = tmp_path_factory.mktemp("adapt")
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".so"):
            shutil.copy(path, folder)
        elif (path / "__init__.py").is_file():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    make_data(folder)
    (folder / "bin").mkdir()
    for name, line in ON_PATH.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / "bin" / name).chmod(0o755)
    for blocks in recipes.values():
        for kind, body, before in blocks:
            if kind in ("python", "bash"):
                (folder / re.findall(r"`([\w/]+\.(?:py|sbatch))`", before)[-1]).write_text(body)
            if kind == "diff":
                change(folder, body)
    return folder


def of_shell(line):
    """Whether it is for a shell: scripts of the repository run one after the other in one process"""
    return not line.startswith("python ") or line.endswith("&") or not (ROOT / line.split()[1]).is_file()


@pytest.fixture(scope="module")
def runner(copy):
    """[script, word, ...] -> what it said, and its traceback if it failed; all of them in one process"""
    with subprocess.Popen([sys.executable, "-c", RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          cwd=copy, env=environment(copy), stderr=subprocess.DEVNULL) as process:
        def run(script, *words):
            print(json.dumps([script.removesuffix(".py"), *words]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())
        yield run
        process.kill()  # what others have loaded may take its time to end


def environment(copy):
    return os.environ | dict(OMP_NUM_THREADS="1", PATH=f"{copy}/bin:{os.environ['PATH']}")


def in_shell(lines, copy):
    script = SHELL + "\n".join(map(" ".join, lines)).replace("8080", str(free_port()))
    done = subprocess.run(["bash", "-c", script], cwd=copy, env=environment(copy), capture_output=True, text=True)
    return done.stdout, done.stderr if done.returncode else ""


@pytest.fixture(scope="module")
def ran(recipes, copy, runner):
    """{title: (what its commands said, how they failed)}"""
    found = {}
    for title, blocks in recipes.items():
        lines, said = [body.replace("\\\n", "") for kind, body, _ in blocks if kind == "sh"], []
        for shell, group in groupby("".join(lines).splitlines(), of_shell):
            group = [words_of(line) for line in group]
            said += [in_shell(group, copy)] if shell else [runner(*words[1:]) for words in group]
        found[title] = ["".join(each) for each in zip(*said, strict=True)]
    return found


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_there_are_twelve(recipes):
    assert tuple(recipes) == TITLES


@pytest.mark.parametrize("title", TITLES)
def test_a_recipe_runs(title, ran):
    said, failed = ran[title]
    assert not failed, failed[-3000:]
    assert said


def test_what_they_leave(ran, copy):
    """Files that the text names, and numbers that can only come from what it changes"""
    for name in ("look.png", "pca.png", "runs/mine/teacher.safetensors", "runs/deep/teacher.safetensors", "curves.png",
                 "heads/head.safetensors", "runs/small/tiny_half/teacher.safetensors", "mine.onnx", "mine.pt2",
                 "runs/mine-hf/config.json", "photos.npz"):
        assert (copy / name).is_file(), name
    row = json.loads((copy / "runs/variance/metrics.jsonl").read_text().splitlines()[0])
    assert row["variance"] > 0
    assert json.loads((copy / "runs/sounds/config.json").read_text())["in_chans"] == 1
    trained, again = (json.loads(line) for line in ran["A new decoder"][0].splitlines() if line.startswith("{"))
    assert trained["decoder"] == "mlp" and trained["miou"] == again["miou"]
    steps = [json.loads(line)["step"] for line in (copy / "runs/moved/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]
    nearest = json.loads(ran["Serve a folder"][0].splitlines()[-1])
    assert nearest[0] == ["PHOTOS/train/a/0.jpg", 1.0] and len(nearest) == 10
    assert "torch.Size([1, 128])" in ran["Export"][0]


def test_the_new_task_has_all_that_tasks_have(ran, runner):
    words = "evaluate --task centroid --weights pixels --device cpu --workers 0 --limit 120".split()
    more = [], ["--metric", "euclid"], ["--control"]
    found = [json.loads(runner(*words, *each)[0].splitlines()[-1]) for each in more]
    assert [row["metric"] for row in found] == ["cosine", "euclid", "cosine"] and found[2]["control"]
    assert all(0 <= row["top1"] < 60 and row["n_val"] == 120 and row["task"] == "centroid" for row in found)
    assert found[0]["top1"] != found[1]["top1"] and "cosine, or euclid" in runner(*words, "--help")[0]
    assert "--layers: centroid does not read it; its own options are: --shots, --metric" in runner(
        *words, "--layers", "3")[1]


def test_plans_fit(ran):
    plans = {title: [json.loads(line) for line in said.splitlines() if line.startswith('{"size"')]
             for title, (said, _) in ran.items()}
    assert [plan["size"] for plan in plans["One GPU of 24 GB"]] == ["s", "l", "h+"]
    rooms = {plan["size"]: (plan["bytes"]["peak"], plan["room"]) for each in plans.values() for plan in each}
    assert all(peak <= room for peak, room in rooms.values()), rooms


def test_the_file_for_slurm_is_one(copy):
    assert subprocess.run(["bash", "-n", str(copy / "7b.sbatch")]).returncode == 0
