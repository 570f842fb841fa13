"""engine/evidence.py: a run that is cut goes on to the same page; what is told apart, and what is not, stands there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import MICRO

import recipes
from engine import evidence
from engine.evidence import Leg, trained

ROOT = Path(__file__).parents[1]
SMALL = f"""
from engine import evidence
from engine.evidence import Leg, stage, trained
evidence.TASKS = dict(knn=("top1_k10", "k-NN", ["--limit", "30", "--workers", "0"]))
by = ("train.py", *{MICRO!r}, "--steps", "8")
evidence.LEGS = [Leg("base", "all of it", "", trained(by=by, kept=2), tasks=evidence.TASKS, seeds=(0, 1)),
                 Leg("no_koleo", "no KoLeo term", "worse", trained("--koleo_weight", "0", by=by, kept=2),
                     tasks=evidence.TASKS, seeds=(0,)),
                 Leg("longer", "two steps more", "", stage("--stage", "gram", "--gram_weight", "0", "--steps", "3"),
                     tasks=evidence.TASKS, after="base", seeds=(1,))]
"""


def run_of(leg, seed, **scores):
    return dict(leg=leg, seed=seed, scores=scores, health="healthy", commit="abc", hardware="CPU", cpu_seconds=1800,
                commands=[f"python train.py --seed {seed} --out runs/evidence/{leg}-{seed}"],
                rows=[dict(step=0, ibot=1.0), dict(step=1, ibot=0.5)])


def write(folder, *runs):
    folder.mkdir(exist_ok=True)
    for run in runs:
        (folder / f"{run['leg']}-{run['seed']}.json").write_text(json.dumps(run))
    return folder


def three(leg, *values):
    return [run_of(leg, seed, knn=value) for seed, value in enumerate(values)]


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "evidence", *three("base", 20, 24, 31), *three("no_koleo", 15, 20, 25),
                 *three("no_ibot", 23, 27, 35), *three("constant", 25, 20, 31), *three("no_local", 19, 23.5, 20),
                 *three("no_average", 19, 20, 24), *three("no_registers", 30, 34, 30.5))


def test_what_is_told_apart_is_so_in_every_seed(folder):
    found, legs = evidence.read(folder), {leg.name: leg for leg in evidence.LEGS}
    changes = {name: evidence.change(runs, found["base"], "knn") for name, runs in found.items()}
    # mean difference and deviation: no_average -4, 3; no_local -4.2, 5.9; no_registers 6.5, 6.1, but not in each seed
    assert changes == dict(base=0, no_koleo=-1, no_ibot=1, constant=0, no_local=0, no_average=-1, no_registers=0)
    only = {name: leg._replace(tasks=dict(knn=evidence.TASKS["knn"])) for name, leg in legs.items()}
    assert {name: evidence.outcome(only[name], found) for name in found} == dict(
        base=("", ""), no_koleo=("worse", ""), no_ibot=("better", "not as expected"), constant=("alike", ""),
        no_local=("alike", "not shown"), no_average=("worse", ""), no_registers=("alike", ""))


def test_one_score_of_several_is_no_outcome(tmp_path):
    """Where three seeds agree by chance in a fifth of all scores"""
    tasks = {name: evidence.TASKS[name] for name in ("knn", "linear", "discovery")}
    leg = next(leg for leg in evidence.LEGS if leg.name == "no_ibot")._replace(tasks=tasks)
    base = [run_of("base", seed, knn=20, linear=30, discovery=10) for seed in range(3)]
    for changes, here in (dict(knn=-5), "alike"), (dict(knn=-5, linear=-5), "worse"), (dict(knn=5, discovery=5),
                          "better"), (dict(knn=-5, linear=5), "mixed"), (dict(knn=5, linear=5, discovery=-5), "mixed"):
        runs = [run_of("no_ibot", seed, **{task: base[0]["scores"][task] + changes.get(task, seed - 1)
                                           for task in tasks}) for seed in range(3)]
        assert evidence.outcome(leg, evidence.read(write(tmp_path, *base, *runs)))[0] == here


def test_one_seed_tells_nothing(tmp_path):
    found = evidence.read(write(tmp_path, *three("base", 20), *three("no_koleo", 10)))
    assert evidence.change(found["no_koleo"], found["base"], "knn") is None
    assert evidence.outcome(evidence.LEGS[0], found) == ("", "")


def test_the_page_has_means_commands_and_what_is_missing(folder):
    text = evidence.page_text(folder)
    assert "| no KoLeo term (`no_koleo`) | 3 | 20.0 ± 5.0 ▼ |" in text and "| 25.0 ± 5.6 |" in text
    assert "S=0  # 0, 1, 2\npython train.py --seed $S --out runs/evidence/no_koleo-$S\n" in text
    assert "CPU, commit abc" in text and "10 core hours" in text  # 21 of half an hour each
    assert "untrained 0, 1, 2; pixels 0; " in text.rpartition("Not run yet, by seed: ")[2]


def test_readme_gets_its_section_and_keeps_the_rest(tmp_path, folder):
    readme = tmp_path / "README.md"
    readme.write_text("# x\n\n## Results\n\nstale\n\n## Files\n\n| a | b |\n")
    readme.write_text(evidence.into_readme(readme, folder))
    text = readme.read_text()
    assert text.startswith("# x\n\n## Results\n\nFrozen") and text.endswith("\n\n## Files\n\n| a | b |\n")
    assert "stale" not in text
    assert "20.0 ± 5.0 ▼" in text and text == evidence.into_readme(readme, folder)


def test_before_any_leg_readme_has_the_demo_of_docs(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("## Results\n\n## Files\n")
    text = evidence.into_readme(readme, tmp_path)
    assert "No leg of it has run yet." in text and text.count("| `make demo` |") == 3 and "| what | command |" in text


@pytest.mark.parametrize("device, photos", [("cpu", ("tiny", 2500 * 32)), ("cuda", ("s", 12_500 * 64))])
def test_every_training_is_one_that_train_py_takes(device, photos):
    """Those that begin from nothing; the others want a run to go on from"""
    for leg in evidence.LEGS:
        words = evidence.filled(leg.commands(0, f"runs/evidence/{leg.name}-0") or [], evidence.MACHINES[device])
        if words and words[0] == "train.py" and not leg.after:
            c = recipes.configure([word.replace("PHOTOS/train", "shapes") for word in words[1:]], starts=False)
            assert c.device == device and c.out.endswith(f"{leg.name}-0")
            assert (c.size, c.steps * c.batch) == photos if leg.name == "photos" else c.steps in (1, 400)
    assert len({leg.name for leg in evidence.LEGS}) == len(evidence.LEGS) >= 25
    assert {leg.beside for leg in evidence.LEGS} | set(evidence.IN_README) <= {leg.name for leg in evidence.LEGS}


def test_words_that_the_machine_decides():
    words = "train.py --size SIZE --device DEVICE --data PHOTOS/SIZE --weights untrained:SIZE --out runs/SIZE".split()
    assert evidence.filled(words, evidence.MACHINES["cuda"]) == (
        "train.py --size s --device cuda --data PHOTOS/SIZE --weights untrained:s --out runs/SIZE".split())


def test_a_leg_is_its_commands(tmp_path, monkeypatch):
    """A training, its score, its health: of what train.py, evaluate.py and health.py print"""
    tasks = dict(knn=("top1_k10", "k-NN", ["--limit", "30", "--workers", "0"]))
    legs = [Leg("base", "all of it", "", trained(by=("train.py", *MICRO), kept=2), tasks=tasks, seeds=(1,))]
    monkeypatch.setattr(evidence, "LEGS", legs)
    monkeypatch.setattr(evidence, "TASKS", tasks)
    words = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    evidence.main(words)
    found = evidence.read(tmp_path / "out")["base"][1]
    assert set(found["scores"]) == {"knn"} and 0 <= found["scores"]["knn"] <= 100 and found["health"]
    assert [row["step"] for row in found["rows"]] == list(range(6)) and found["cpu_seconds"] > 0
    assert [line.split()[1] for line in found["commands"]] == ["train.py", "evaluate.py", "health.py"]
    assert not (tmp_path / "work/base-1").exists()  # nothing goes on from it
    before = (tmp_path / "out/README.md").read_text()
    evidence.main(words)  # nothing is left to do
    assert (tmp_path / "out/README.md").read_text() == before


def test_photos_are_counted_and_their_scores_stand_in_both_pages(tmp_path, monkeypatch):
    """What evaluations print is made up"""
    for path in ("photos/train/a/1", "photos/train/b/2", "photos/val/a/3", "camvid/images/training/4",
                 "camvid/images/validation/5", "camvid/annotations/training/6"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    monkeypatch.setattr(evidence, "call", lambda *_: '{"top1_k20": 12.34567, "top1": 20, "miou": 30}')
    words = [f"--{name}={tmp_path / name}" for name in ("photos", "camvid", "work", "out")]
    evidence.main([*words, "--only", "photos_pixels"])
    found = json.loads((tmp_path / "out/photos_pixels-0.json").read_text())
    assert found["scores"] == dict(knn=12.3457, linear=20, camvid=30)
    assert (found["photos"], found["camvid"]) == ([2, 1], [1, 1])
    said = "Trained on 2 photos, k-NN and linear asked with 1 others; CamVid has 1 photos of streets"
    row = "| raw pixels (`photos_pixels`) | 1 | 12.3 | 20.0 | 30.0 |"
    readme = tmp_path / "README.md"
    readme.write_text("## Results\n\n## Files\n")
    for text in (tmp_path / "out/README.md").read_text(), evidence.into_readme(readme, tmp_path / "out"):
        assert said in text and row in text and "CamVid, mIoU" in text


def test_minutes_end_a_leg_and_mistakes_end_in_one_line(tmp_path, monkeypatch):
    words = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    evidence.main([*words, "--minutes", "0"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["README.md"]
    with pytest.raises(ValueError, match="--device mps: wanted cpu or cuda"):
        evidence.main([*words, "--device", "mps"])
    with pytest.raises(ValueError, match="--only typo: there are base, untrained, "):
        evidence.main([*words, "--only", "base,typo"])
    wrong = Leg("base", "", "", lambda seed, run: ["train.py", "--siez", "s"], seeds=(0,))
    monkeypatch.setattr(evidence, "LEGS", [wrong])
    with pytest.raises(ValueError, match="1 legs failed, the first: python train.py --siez s failed: train.py: unkn"):
        evidence.main(words)


def start(folder):
    code = f"{SMALL}\nevidence.main(['--out', 'out', '--work', 'work'])"
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=os.environ | dict(PYTHONPATH=str(ROOT)),
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.long
def test_killed_in_the_middle_and_continued_it_is_the_same_page(tmp_path):
    pages = []
    for name in "whole", "killed":
        folder = tmp_path / name
        folder.mkdir()
        if name == "killed":
            for path in "work/base-0/checkpoints/4", "out/base-0.json", "work/longer-1/config.json":
                process = start(folder)
                until = time.monotonic() + 300
                while not any(folder.glob(path + "*")) and process.poll() is None and time.monotonic() < until:
                    time.sleep(0.05)
                os.killpg(process.pid, signal.SIGKILL)
                assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
        process = start(folder)
        assert process.wait() == 0, process.stderr.read()[-3000:]
        pages.append((folder / "out/README.md").read_text())
    assert pages[0] == pages[1] and "`longer`" in pages[0]
