"""health.py: recorded courses, each threshold from both sides, what a row must be, and the command."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import run

import health
from health import WORDS, judge, measure, read_run

ROOT = Path(__file__).parents[1]
CONFIG = dict(dino_prototypes=64, ibot_prototypes=64, mask_share=0.5, lr_warmup=5, steps=160)
NAMES = "step", "dino_global", "ibot", "dino_entropy", "dino_balance", "cls_rank", "patch_neighbours", "patch_others"
# of tests/sick_runs.py --first 100: rows of each run, from its begin to its end
RECORDED = {
    "healthy": """
        0 4.343 2.053 0.665 1.000 34.7 0.595 0.521
        30 3.923 1.745 0.746 1.000 28.0 0.799 0.752
        65 3.835 1.599 0.764 1.000 30.4 0.826 0.796
        95 3.854 1.514 0.768 1.000 31.8 0.832 0.779
        150 3.887 1.504 0.774 1.000 32.1 0.822 0.760
        155 3.869 1.531 0.777 1.000 32.9 0.835 0.779
        159 3.891 1.486 0.760 1.000 33.9 0.827 0.772""",
    "collapsed": """
        0 3.654 1.725 0.456 0.817 30.6 0.654 0.587
        30 0.800 0.564 0.104 0.187 26.7 0.848 0.804
        65 0.044 0.269 0.002 0.003 36.0 0.763 0.712
        95 0.024 0.271 0.000 0.000 38.7 0.752 0.685
        150 0.022 0.173 0.000 0.000 42.1 0.692 0.649
        155 0.021 0.148 0.000 0.000 42.3 0.725 0.660
        159 0.021 0.194 0.000 0.000 41.8 0.747 0.709""",
    "collapsed, of class tokens": """
        0 4.369 2.176 0.692 1.000 31.3 0.700 0.633
        30 3.821 1.751 0.757 1.000 19.0 0.882 0.848
        65 3.741 1.510 0.730 1.000 17.9 0.911 0.875
        95 3.692 1.501 0.717 1.000 19.1 0.911 0.878
        150 3.794 1.449 0.713 0.999 18.3 0.925 0.892
        155 3.963 1.436 0.719 0.999 18.6 0.922 0.890
        159 3.595 1.417 0.709 1.000 18.3 0.919 0.884""",
    "diverging": """
        0 4.558 2.152 0.718 0.999 31.2 0.647 0.577
        30 4.145 1.988 0.937 1.000 11.8 0.676 0.506
        65 4.138 2.015 0.965 1.000 13.4 0.679 0.551
        95 4.160 1.893 0.968 1.000 13.7 0.610 0.481
        150 4.131 1.885 0.968 1.000 14.0 0.658 0.527
        155 4.138 1.939 0.971 1.000 14.4 0.614 0.474
        159 4.172 1.888 0.968 1.000 13.8 0.691 0.562""",
    "decaying": """
        0 4.604 2.246 0.702 1.000 33.8 0.642 0.573
        30 4.019 1.788 0.769 1.000 28.5 0.796 0.769
        65 4.032 2.232 0.809 1.000 27.8 0.859 0.826
        95 4.061 1.765 0.813 0.999 20.0 0.967 0.962
        150 3.972 1.632 0.817 0.999 21.1 0.964 0.957
        155 3.954 1.665 0.825 1.000 20.3 0.967 0.963
        159 3.862 1.637 0.785 1.000 20.2 0.968 0.961""",
    "uniform": """
        0 4.911 2.420 0.999 1.000 33.8 0.642 0.573
        30 4.190 2.084 1.000 1.000 39.1 0.783 0.755
        65 4.174 2.080 1.000 1.000 45.2 0.737 0.673
        95 4.169 2.079 1.000 1.000 46.8 0.715 0.672
        150 4.168 2.079 1.000 1.000 48.0 0.691 0.629
        155 4.168 2.079 1.000 1.000 47.9 0.667 0.625
        159 4.169 2.079 1.000 1.000 48.4 0.703 0.654""",
}
WELL = dict(step=1000, warming=False, dino=0.93, ibot=0.7, entropy=0.76, balance=1.0, rank=1.0, spread=0.9,
            locality=0.9, patch_cls=0.6, gradient=1.0, skipped=0.0, waiting=0.2)


def recorded(name, **more):
    table = [line.split() for line in RECORDED[name].strip().splitlines()]
    return [dict(zip(NAMES, [int(line[0]), *map(float, line[1:])], strict=True), grad_norm_backbone=1.0, skipped=0,
                 waiting=0.2, patch_cls=0.6) | more for line in table]


def write(folder, rows, config=CONFIG, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return str(folder)

# --------------------------------------------------------------------------------
# The word


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_courses(name):
    rows = recorded(name)
    assert judge(measure(CONFIG, rows)).word == name.partition(",")[0]
    assert judge(measure(CONFIG | dict(lr_warmup=160), rows[:-3])).word == ("collapsed" if name == "collapsed" else
                                                                           "warming")


@pytest.mark.parametrize("word, sick, well", [
    ("collapsed", dict(balance=0.49, entropy=0.40), dict(balance=0.51, entropy=0.42)),
    ("collapsed", dict(balance=0.49, entropy=0.40), dict(balance=0.49, entropy=0.38)),  # a small batch, sharp targets
    ("collapsed", dict(rank=0.74, dino=0.98), dict(rank=0.76, dino=0.98)),
    ("diverging", dict(rank=0.74, dino=0.99), dict(rank=0.76, dino=0.99)),
    ("diverging", dict(dino=1.03, entropy=0.9), dict(dino=1.01, entropy=0.9)),
    ("diverging", dict(skipped=0.021), dict(skipped=0.019)),
    ("uniform", dict(entropy=0.986), dict(entropy=0.984)),
    ("uniform", dict(dino=0.996, entropy=0.951), dict(dino=0.996, entropy=0.949)),
    ("uniform", dict(dino=0.996, entropy=0.951), dict(dino=0.994, entropy=0.951)),
    ("decaying", dict(spread=0.39), dict(spread=0.41)),
    ("decaying", dict(locality=0.39), dict(locality=0.41)),
    ("starved", dict(waiting=0.41), dict(waiting=0.39)),
    ("starved", dict(waiting=0.41, step=50), dict(waiting=0.41, step=49)),
    ("warming", dict(warming=True), dict(warming=False)),
])
def test_thresholds_from_both_sides(word, sick, well):
    assert judge(WELL | sick).word == word
    assert judge(WELL | well).word == "healthy"


def test_while_the_learning_rate_rises_only_what_is_certain_is_said():
    for early in dict(rank=0.5), dict(dino=1.1), dict(entropy=0.99), dict(spread=0.1), dict(locality=0.1):
        assert judge(WELL | dict(warming=True) | early).word == "warming"
    for certain, word in ((dict(balance=0.1, entropy=0.1), "collapsed"), (dict(skipped=0.1), "diverging"),
                          (dict(waiting=0.5), "starved")):
        assert judge(WELL | dict(warming=True) | certain).word == word


def test_patches_that_lose_more_than_class_tokens_do_decay_and_what_loses_both_has_collapsed():
    for rank, spread, word in ((0.5, 0.39, "decaying"), (0.5, 0.41, "collapsed"), (0.31, 0.1, "decaying"),
                               (0.29, 0.1, "collapsed"), (0.5, math.nan, "collapsed")):
        assert judge(WELL | dict(rank=rank, spread=spread)).word == word


def test_who_is_sick_is_not_called_starved_and_meters_that_are_missing_accuse_nobody():
    assert judge(WELL | dict(waiting=0.9, spread=0.1)).word == "decaying"
    missing = WELL | dict.fromkeys(health.METERS, math.nan)
    assert judge(missing).word == "healthy"

# --------------------------------------------------------------------------------
# The numbers


def test_numbers_are_medians_of_the_last_quarter_beside_the_first_row_and_the_best():
    rows = [dict(step=10 * i, dino_global=4.0, ibot=1.0, dino_entropy=0.5, dino_balance=0.9, cls_rank=20.0 + i,
                 patch_neighbours=0.6, patch_others=0.5, patch_cls=0.3, grad_norm_backbone=2.0, skipped=0, waiting=0.1,
                 patch_rank=40.0 - i)
            for i in range(16)]
    for row in rows[-4:]:
        row |= dict(dino_global=2.0, patch_neighbours=0.91, patch_others=0.9, grad_norm_backbone=6.0, skipped=3)
    rows[-1] |= dict(dino_global=99.0, waiting=9.0)  # one row alone moves no median
    found, k = measure(CONFIG, rows), math.log(64)
    assert found == pytest.approx(dict(
        step=150, warming=False, dino=2 / k, ibot=1 / k / 0.5, entropy=0.5, balance=0.9, rank=33.5 / 20, spread=0.2,
        locality=0.5, patch_cls=0.3, patch_rank=26.5 / 40, gradient=3, skipped=3 / 70, waiting=0.1))


def test_patches_are_compared_with_their_best_after_the_warm_up():
    """An untrained network's patches differ more than they ever will again."""
    rows = recorded("healthy")
    rows[0] |= dict(patch_others=-0.9, patch_neighbours=0.9)
    assert judge(measure(CONFIG, rows)).word == "healthy"
    assert judge(measure(CONFIG | dict(lr_warmup=0), rows[:1] * 3 + rows)).word == "decaying"


def test_a_stage_counts_its_own_steps():
    """they go on from those of the run before"""
    rows = [row | dict(step=row["step"] + 1000) for row in recorded("healthy")]
    found = [measure(CONFIG | dict(lr_warmup=n, began=1000), rows)["warming"] for n in (159, 160)]
    assert found == [False, True]
    rows[0] |= dict(patch_others=-0.9, patch_neighbours=0.9)
    assert judge(measure(CONFIG | dict(began=1000), rows)).word == "healthy"


def test_warming_lasts_as_long_as_the_config_says_or_fifty_steps():
    rows = recorded("healthy")
    assert [measure(CONFIG | dict(lr_warmup=n), rows)["warming"] for n in (159, 160)] == [False, True]
    assert [measure(CONFIG, [*rows[:2], rows[2] | dict(step=step)])["warming"] for step in (49, 50)] == [True, False]


def test_rows_of_before_a_meter_was_written_do_not_count_for_it():
    """A run that was resumed by a later version; and a number that is none."""
    rows = recorded("healthy")
    whole = measure(CONFIG, rows)
    for row in rows[:4]:
        del row["patch_others"]
    rows[0] |= dict(cls_rank=math.nan, waiting=math.nan)
    found = measure(CONFIG, rows)
    assert found["rank"] == 32.9 / 28.0 and found["waiting"] == whole["waiting"]
    assert found["spread"] == found["locality"] == 1  # the best of three rows is their median
    del rows[-1]["skipped"]
    assert math.isnan(measure(CONFIG, rows)["skipped"])


def test_without_masks_there_is_no_ibot_to_judge():
    assert math.isnan(measure(CONFIG | dict(mask_share=0.0), recorded("healthy"))["ibot"])

# --------------------------------------------------------------------------------
# The command


def test_what_the_command_says(tmp_path, capsys):
    health.main([write(tmp_path, recorded("diverging"))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "diverging" and "step 159" in lines[0]
    assert any("0.449  rank of the class tokens" in line and "usual: 0.95" in line for line in lines)
    assert lines[-2].startswith("try: a third of the learning rate")
    told = json.loads(lines[-1])
    assert (told["verdict"], told["step"], told["rank"]) == ("diverging", 159, 0.4487)


def test_a_run_without_prototypes_says_what_it_is_not_judged_by(tmp_path, capsys):
    """distill.py, mode features; and runs of before these meters."""
    rows = [{key: row[key] for key in ("step", "cls_rank", "waiting", "skipped")} for row in recorded("healthy")]
    health.main([write(tmp_path, rows)])
    said = capsys.readouterr().out
    assert said.startswith("healthy") and "not judged, for metrics.jsonl does not say it: DINO loss" in said
    assert json.loads(said.splitlines()[-1])["entropy"] is None and "nan" not in said


def test_a_run_of_the_trainer_can_be_read(tmp_path, capsys):
    run(tmp_path / "run")
    health.main([str(tmp_path / "run")])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["verdict"] == "warming" and None not in told.values()


READ = "dino_global ibot dino_entropy dino_balance cls_rank patch_neighbours patch_others".split()


@pytest.mark.parametrize("break_it, says", [
    (lambda d: (d / "config.json").unlink(), "no run to judge .*name the folder of one"),
    (lambda d: (d / "config.json").write_text("[1]"), "dino_prototypes is None, where a number from 2 belongs"),
    (lambda d: (d / "config.json").write_text('{"dino_prototypes": 1}'), "dino_prototypes is 1, where a number from 2"),
    (lambda d: write(d, [], CONFIG | dict(mask_share="x")), "mask_share is 'x', where a number from 0"),
    (lambda d: write(d, [], CONFIG | dict(lr_warmup=True)), "lr_warmup is True, where a number from 0"),
    (lambda d: (d / "metrics.jsonl").unlink(), "metrics.jsonl cannot be read .*a student's folder: RUN/NAME"),
    (lambda d: (d / "metrics.jsonl").write_bytes(b"\xff\xfe"), "metrics.jsonl cannot be read"),
    (lambda d: write(d, recorded("healthy")[:2]), "has 2 rows; 3 can be judged"),
    (lambda d: write(d, []), "has 0 rows; 3 can be judged"),
    (lambda d: write(d, recorded("healthy"), tail='{"step": 200, "lo\n'), "line 8 is cut short, or no JSON"),
    (lambda d: write(d, recorded("healthy"), tail="\n"), "line 8 is cut short, or no JSON"),
    (lambda d: write(d, recorded("healthy"), tail="[3]\n"), "line 8 is no row of a run"),
    (lambda d: write(d, recorded("healthy"), tail='{"loss": 3}\n'), "line 8 is no row of a run"),
    (lambda d: write(d, recorded("healthy"), tail='{"step": true}\n'), "line 8 is no row of a run"),
    (lambda d: write(d, recorded("healthy"), tail='{"step": 159}\n'), "line 8: step 159 comes after 159"),
    (lambda d: write(d, recorded("healthy")[1:2] + recorded("healthy")), "line 2: step 0 comes after 30"),
    (lambda d: write(d, recorded("healthy"), tail=f'{{"step": {10**15}}}\n'), "line 8 is no row of a run"),
    (lambda d: write(d, recorded("healthy", skipped=10**400)), "line 1: skipped is 1000"),
    (lambda d: write(d, recorded("healthy", waiting="long")), "line 1: waiting is 'long', where a number belongs"),
    *[(lambda d, name=name: write(d, recorded("healthy", **{name: None})), f"line 1: {name} is None, where a number")
      for name in READ],
])
def test_what_is_no_run_is_one_line(tmp_path, break_it, says):
    write(tmp_path, recorded("healthy"))
    break_it(tmp_path)
    with pytest.raises(ValueError, match=says) as error:
        read_run(tmp_path)
    assert "\n" not in str(error.value)


def test_a_row_that_is_still_being_written_waits(tmp_path):
    whole = read_run(write(tmp_path, recorded("healthy")))
    assert read_run(write(tmp_path, recorded("healthy"), tail='{"step": 200, "lo')) == whole


def test_three_rows_are_enough(tmp_path):
    assert len(read_run(write(tmp_path, recorded("healthy")[:3]))[1]) == 3


@pytest.mark.parametrize("words", [[], ["a", "b"], ["--rnu"]])
def test_the_command_wants_one_folder(words):
    with pytest.raises(ValueError, match="names no run; write health.py RUN"):
        health.main(words)


def test_numbers_that_are_not_finite_are_judged_and_written_as_null(tmp_path, capsys):
    rows = recorded("healthy", grad_norm_backbone=math.inf)
    health.main([write(tmp_path, rows)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["gradient"] is None


def test_exit_code_is_2_and_no_traceback(tmp_path):
    done = subprocess.run([sys.executable, "health.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("health.py: ")


def test_the_runs_that_must_fail_can_be_begun(tmp_path):
    """tests/sick_runs.py itself trains for minutes; here each run's options are read."""
    import sick_runs
    counted = []
    for kind, script, base in ((health.VISION, sick_runs.train, sick_runs.BASE),
                               (WORDS, sick_runs.text, sick_runs.WORDS)):
        runs = [run for name, run in sick_runs.RUNS.items() if name.startswith("words") == (kind is WORDS)]
        counted.append((len(runs), [word for word, _ in runs].count("healthy")))
        assert {word for word, _ in runs} <= {sign.word for sign in kind.signs}
        for i, (_, words) in enumerate(runs):
            script.configure([*base, *words.split(), "--out", str(tmp_path / str(i))])
    assert counted == [(11, 5), (7, 3)]

# --------------------------------------------------------------------------------
# Runs of text.py

OF_WORDS = dict(batch=32, lr_warmup=12, steps=120, head_blocks=1)
SAID = {  # of the same runs of words: step, loss, top1, scale, gradient norm
    "uniform": """
        0 3.628 0.031 14.3 8.0
        24 3.475 0.062 13.9 0.3
        48 3.470 0.031 13.7 0.075
        72 3.466 0.000 13.7 0.0066
        96 3.466 0.031 13.7 0.0066
        108 3.466 0.031 13.7 0.0043
        116 3.466 0.031 13.7 0.0084
        119 3.466 0.062 13.7 0.0095""",
    "collapsed": """
        0 3.674 0.062 14.2 13.0
        24 3.466 0.031 8.4 0.0002
        48 3.466 0.031 7.7 6.9e-05
        72 3.466 0.031 7.6 0.00017
        96 3.466 0.031 7.6 9.2e-05
        108 3.466 0.031 7.6 0.00016
        116 3.466 0.031 7.6 6.7e-05
        119 3.466 0.031 7.6 7.3e-05""",
    "diverging": """
        0 3.549 0.031 14.3 4.2
        24 3.044 0.156 14.0 5.2
        48 2.908 0.219 14.0 3.2
        72 3.466 0.031 15.7 4.6e-05
        96 3.466 0.031 15.9 9.8e-06
        108 3.466 0.031 15.9 1.2e-05
        116 3.466 0.031 15.9 1.1e-05
        119 3.466 0.031 15.9 8e-06""",
    "saturated": """
        0 5.730 0.031 100.0 170.0
        24 1.387 0.250 99.4 0.18
        48 1.386 0.250 99.3 0.0013
        72 1.386 0.250 99.3 0.00027
        96 1.386 0.250 99.3 0.00018
        108 1.386 0.250 99.3 0.00017
        116 1.386 0.250 99.3 0.00017
        119 1.386 0.250 99.3 0.00017""",
    "healthy": """
        0 3.569 0.062 14.3 7.6
        24 3.196 0.156 14.0 8.3
        48 2.797 0.188 14.1 5.0
        72 2.656 0.125 14.3 3.6
        96 2.398 0.469 14.4 4.7
        108 2.187 0.344 14.5 4.6
        116 2.223 0.531 14.5 4.8
        119 2.369 0.250 14.5 4.3""",
}
FINE = dict(step=1000, warming=False, loss=0.6, top1=0.4, kept=1.0, scale=15.0, gradient=0.4, skipped=0.0, waiting=0.1)


def word_of(numbers):
    return judge(numbers, WORDS).word


@pytest.mark.parametrize("name", SAID)
def test_recorded_courses_of_words(name):
    rows = [dict(zip(("step", "loss", "top1", "scale", "grad_norm_towers"), map(float, line.split()), strict=True),
                 skipped=0, waiting=0.1) for line in SAID[name].strip().splitlines()]
    assert word_of(measure(OF_WORDS, rows)) == name
    assert word_of(measure(OF_WORDS | dict(lr_warmup=120), rows)) == (name if name == "saturated" else "warming")


@pytest.mark.parametrize("word, sick, well", [
    ("collapsed", dict(loss=0.991, gradient=9e-5), dict(loss=0.969, gradient=9e-5)),
    ("collapsed", dict(loss=0.91, scale=9.9), dict(loss=0.91, scale=10.1)),
    ("collapsed", dict(loss=0.91, scale=9.9), dict(loss=0.89, scale=9.9)),
    ("uniform", dict(loss=0.991, gradient=1.1e-4), dict(loss=0.969, gradient=1.1e-4)),
    ("uniform", dict(loss=0.971), dict(loss=0.969)),
    ("uniform", dict(loss=0.989, gradient=1e-5), dict(loss=0.969, gradient=1e-5)),
    ("diverging", dict(skipped=0.021), dict(skipped=0.019)),
    ("diverging", dict(loss=1.051), dict(loss=0.96)),
    ("diverging", dict(kept=0.49), dict(kept=0.51)),
    ("saturated", dict(scale=95.1, loss=0.31), dict(scale=95.1, loss=0.29)),
    ("saturated", dict(scale=95.1, loss=0.31), dict(scale=94.9, loss=0.31)),
    ("starved", dict(waiting=0.41), dict(waiting=0.39)),
    ("starved", dict(waiting=0.41, step=50), dict(waiting=0.41, step=49)),
    ("warming", dict(warming=True), dict(warming=False)),
])
def test_thresholds_of_words_from_both_sides(word, sick, well):
    assert word_of(FINE | sick) == word
    assert word_of(FINE | well) == "healthy"


def test_while_it_warms_up_a_loss_at_chance_is_no_illness():
    for early in dict(loss=1.1), dict(loss=1.0, gradient=1e-4), dict(loss=0.98), dict(kept=0.1):
        assert word_of(FINE | dict(warming=True) | early) == "warming"


def test_numbers_of_words_by_hand():
    rows = [dict(step=10 * i, loss=3.0, top1=0.5, scale=14.0, grad_norm_towers=4.0, skipped=0, waiting=0.2)
            for i in range(16)]
    rows[0] |= dict(grad_norm_towers=8.0, loss=math.nan)
    for row in rows[-4:]:
        row |= dict(loss=1.5, top1=0.25, scale=20.0, grad_norm_towers=2.0, skipped=7)
    rows[-1] |= dict(loss=9.0, top1=0.9)                        # one row alone moves no median
    assert measure(OF_WORDS, rows) == pytest.approx(dict(
        step=150, warming=False, loss=1.5 / math.log(32), top1=0.25, kept=0.5, scale=20, gradient=0.25,
        skipped=7 / 70, waiting=0.2))
    low = [row | dict(top1=0.125 if row["step"] < 100 else 0.03) for row in rows]
    assert measure(OF_WORDS, low)["kept"] == 1, "what is no more than chance cannot be lost"
    assert [measure(OF_WORDS | dict(lr_warmup=n), rows)["warming"] for n in (150, 151)] == [False, True]


def test_a_run_of_words_is_judged_by_its_own_numbers(tmp_path, capsys):
    rows = [dict(step=40 * i, loss=3.4655, top1=0.03, scale=7.0, grad_norm_towers=9.0 / 100**i, skipped=0, waiting=0.1)
            for i in range(4)]
    health.main([write(tmp_path, rows, OF_WORDS)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("collapsed    step 120") and "ln B" in lines[1] and lines[-2].startswith("try: a tenth")
    assert not any("not judged" in line for line in lines)
    told = json.loads(lines[-1])
    assert told["loss"] == pytest.approx(1, abs=1e-3) and "dino" not in told


@pytest.mark.parametrize("config, row, says", [
    (dict(batch=1), {}, "batch is 1, where a number from 2 belongs; name a folder that train.py or text.py has"),
    (dict(lr_warmup=None), {}, "lr_warmup is None"), ({}, dict(top1="x"), "line 1: top1 is 'x', where a number"),
    ({}, dict(scale=None), "line 1: scale is None")])
def test_what_is_no_run_of_words_is_one_line(tmp_path, config, row, says):
    rows = [dict(step=i, loss=1.0) | row for i in range(3)]
    with pytest.raises(ValueError, match=says):
        read_run(write(tmp_path, rows, OF_WORDS | config))
