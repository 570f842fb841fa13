"""engine/progress.py: lines without a terminal, and what they say."""

import io
import json
import re

import pytest
import torch
from test_train import run

from engine import progress
from engine.progress import Progress, step_of
from engine.ranks import Ranks
from recipes import TrainConfig
from text import TextConfig

ALONE = Ranks(0, 1, torch.device("cpu"), None)
ROW = dict(loss=7.4, dino_global=5.1, dino_local=4.8, ibot=2.2, koleo=0.5, lr=1e-3)


def test_a_run_without_a_terminal_writes_a_line_for_each_row(tmp_path, capsys):
    run(tmp_path, "--log_every", "2")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["0/6", "2/6", "4/6", "5/6"]
    says = r"loss \d\.\d+ dino_global .* ibot .* koleo .* img/s lr .*, 0:00:\d\d to go, \d+ % waiting"
    assert all(re.search(says, line) for line in lines)


def test_speed_waiting_and_what_is_left(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    shown = Progress(TrainConfig(batch=32), ALONE, 10, 110)

    def batches():
        for _ in range(10):
            now[0] += 0.5
            yield dict(broken=[], indices=[0] * 8)
    stream = batches()
    for _ in range(10):
        assert shown.next(stream) == dict(indices=[0] * 8)
        now[0] += 1.5
    row = shown.speed(19)
    assert row == pytest.approx(dict(images_per_s=16, waiting=0.25))
    shown.log(tmp_path, dict(step=19, **ROW, **row))
    said = capsys.readouterr().out
    assert said == ("step 19/110 loss 7.400 dino_global 5.100 dino_local 4.800 ibot 2.200 koleo 0.500 16 img/s "
                    "lr 0.001, 0:03:00 to go, 25 % waiting for images\n")
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 19
    shown.mark(19)
    assert (shown.logged, shown.waited) == (20, 0)


def test_images_that_gram_crops_enlarge_are_counted_and_said_once(capsys):
    """of batches that have such crops; a trainer that knows of none, as text.py, has no row of them"""
    shown = Progress(TextConfig(), ALONE, 0, 4)
    shown.next(iter([dict(broken=[], indices=torch.arange(4))]))
    assert "enlarged" not in shown.speed(0)
    for small, so_far in (0, 0), (2, 2), (3, 5):
        shown.next(iter([dict(enlarged=small, broken=[], indices=torch.arange(4))]))
        assert shown.speed(0)["enlarged"] == so_far
    assert capsys.readouterr().out == ("2 of these 4 images are smaller than the Gram crops; such are enlarged, which "
                                       "adds no detail, and counted in metrics.jsonl\n")


def test_a_terminal_has_a_bar_and_other_ranks_have_nothing(tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    assert Progress(TrainConfig(), ALONE, 0, 3).terminal
    assert not Progress(TrainConfig(), Ranks(1, 2, torch.device("cpu"), object()), 0, 3).terminal


def test_a_disk_that_fails_ends_the_run_and_known_damage_does_not():
    shown, names = Progress(TrainConfig(), ALONE, 0, 3), iter(range(10**6))

    def see(n, lost=(), indices=2000):
        new = [(f"{next(names)}.jpg", "gone") for _ in range(n)]
        shown.next(iter([dict(broken=[*new, *lost], indices=range(indices))]))
    see(100)
    for _ in range(20):
        see(0, [("0.jpg", "gone")] * 200)                          # the same hole again, whatever its share
    for _ in range(10):
        see(20)                                                    # 1 % of the last 10,000, not more
    with pytest.raises(ValueError, match="101 of the last 10000 images cannot be read; the last: gone; is their disk"):
        see(21)
    assert len(shown.unreadable) == 321


def test_a_full_disk_is_one_line():
    shown = Progress(TrainConfig(), ALONE, 0, 3)
    with pytest.raises(ValueError, match="metrics.jsonl: .*; there is no checkpoint yet"):
        shown.log("/dev/null/nowhere", dict(step=0, images_per_s=1.0))


@pytest.mark.parametrize("line, step", [(b'{"step": 3}', 3), (b'{"step": 3', float("inf")), (b"null", float("inf")),
                                        (b"\xff", float("inf")), (b'{"step": "x"}', float("inf"))])
def test_rows_that_a_kill_cut_short_have_no_step(line, step):
    assert step_of(line) == step
