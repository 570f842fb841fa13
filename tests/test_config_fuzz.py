"""
What fuzz.py draws: no damaged weight file, command line or run folder ends in a traceback, hangs, passes for sound, or
runs code.

The long form, 300, 300 and 50: pytest -m long tests/test_config_fuzz.py
"""

import fuzz
import pytest
import torch
from fuzz import FILES, FOLDERS, LINES, Trap, outcome, try_file, try_folder, try_line

KINDS = {"files": (FILES, try_file, 21, 300),
         "lines": (LINES, try_line, 24, 300),
         "folders": (FOLDERS, try_folder, 5, 50)}


def check(kind, n, seed):
    cases, attempt, *_ = KINDS[kind]
    counts, bad = fuzz.fuzz(cases, attempt, n, seed)
    assert not bad, bad
    assert sum(map(sum, (found.values() for found in counts.values()))) == n and counts[cases[0].__name__]["refused"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_few(kind):
    check(kind, KINDS[kind][2], seed=0)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_many(kind):
    check(kind, KINDS[kind][3], seed=1)


def test_the_judge_sees_what_it_is_to_count(tmp_path, monkeypatch):
    """A fuzz that finds nothing must be able to find something."""
    monkeypatch.setattr(fuzz, "PATIENCE", 1)
    trap = tmp_path / "sprung"

    def forever():
        while True:
            pass
    for work, found in ((lambda: int("x"), "traceback"), (lambda: {}["x"], "traceback"), (forever, "hang"),
                        (lambda: print("passed"), "silent"), (lambda: print("refused"), "accepted")):
        assert outcome(work, "refused", trap) == found
    torch.save(Trap(trap), tmp_path / "x.pth")
    assert outcome(lambda: torch.load(tmp_path / "x.pth", weights_only=False), "", trap) == "executed"
