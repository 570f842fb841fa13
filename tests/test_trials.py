"""trials.py: its step is the trainer's, and its verdicts can fail; the rest runs in test_bench.py."""

import pytest
import torch
from safetensors.torch import save_file

import train
from engine import trials
from engine.timing import Rehearsal
from weights import save_backbone


def test_a_step_is_the_trainers(tmp_path):
    """The loss of the first step, to the bit; the second is lower, as weights moved."""
    step = trials.Step(Rehearsal(), ["--size", "tiny", *trials.TINY, "--precision", "fp32"])
    before = [p.clone() for p in step.teacher.parameters()]
    first, second = step(), step()
    train.main(["--size", "tiny", *trials.TINY, "--precision", "fp32", "--device", "cpu", "--log_every", "1", "--out",
                str(tmp_path / "run")])
    assert float(f"{first.item():.6g}") == trials.rows_of_log(tmp_path / "run")[0]["loss"] and second < first
    assert any((a != b).any() for a, b in zip(before, step.teacher.parameters(), strict=True))


def test_a_step_of_transformers_blocks_has_the_same_loss(tmp_path):
    transformers = pytest.importorskip("transformers")
    argv = ["--size", "tiny", *trials.TINY, "--precision", "fp32", "--rope_rescale", "1"]
    ours = trials.Step(Rehearsal(), argv)
    save_backbone(ours.student["backbone"], tmp_path, "hf")
    theirs = transformers.DINOv3ViTModel.from_pretrained(tmp_path, attn_implementation="sdpa")
    plain = trials.Step(Rehearsal(), argv, trials.Plain(theirs))
    losses = [[step().item() for _ in range(3)] for step in (ours, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)                # measured: 1.2e-7


def rows(*losses):
    return [dict(loss=x) for x in losses]


@pytest.mark.parametrize("found, base, word", [
    (dict(code=0, rows=rows(2.0, 1.0)), rows(2.001, 2.0), "right"),          # later ones may part
    (dict(code=0, rows=rows(2.0, 1.0)), rows(2.1, 1.0), "WRONG"),
    (dict(code=0, rows=rows(2.0)), rows(2.0, 1.0), "WRONG"),
    (dict(code=1, rows=rows(2.0, 1.0)), rows(2.0, 1.0), "WRONG"),
    (dict(code=0, rows=rows(float("nan"), 1.0)), rows(2.0, 1.0), "WRONG"),
    (dict(code=1, rows=[]), rows(2.0), "WRONG"), (dict(code=0, rows=[]), [], "WRONG"),
])
def test_losses_beside_the_cpus(found, base, word):
    row = trials.beside(found | dict(seconds=1.0, says="words"), dict(rows=base), 1e-2)
    assert row["verdict"].split(":")[0] == word


def test_differences_are_found(tmp_path):
    for name, x in dict(a=1.0, b=1.0, c=2.0).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 3.0}}\n{{"step": 2, "loss": {x}}}\n')
        save_file(dict(w=torch.full((3,), x)), tmp_path / name / "teacher.safetensors")
    assert trials.differences(tmp_path / "a", tmp_path / "b") == "right"
    assert trials.differences(tmp_path / "a", tmp_path / "c") == (
        "WRONG: 1 of 1 tensors differ, w first; logged losses from step 2's on")
    (tmp_path / "c/metrics.jsonl").unlink()
    assert trials.differences(tmp_path / "a", tmp_path / "c").endswith("logged losses from step 1's on")
    assert trials.differences(tmp_path / "a", tmp_path / "d").startswith("WRONG")


def test_a_wait_of_the_host_is_placed(monkeypatch):
    class Strict(Rehearsal):
        def sync_is_error(self, on):
            monkeypatch.setattr(trials, "update_ema", self.waiting if on else lambda *_: None)

        def waiting(self, *_):
            raise RuntimeError("called a synchronizing CUDA operation")
    verdict = trials.waits(Strict(), dry=True)["verdict"]
    assert verdict.startswith("WRONG: called a synchronizing") and "trials.py:" in verdict


def test_sizes_that_do_not_fit_are_said(monkeypatch):
    from engine.report import Report

    def full(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate")
    monkeypatch.setattr(trials, "Step", full)
    report = Report("gpu-4", None, Rehearsal())
    assert not trials.steps_of(Rehearsal(), report, {}, "l", ["--batch", "64"], True)
    assert report.tables["steps"] == [dict(size="l", images=64, blocks="eager", kernels="auto",
                                           note="CUDA out of memory. Tried to allocate")]


def test_a_command_that_fails_or_takes_long(monkeypatch):
    assert trials.command("train.py", "--size", "x", apart=False)[0] == 2
    code, said = trials.command("-c", "import time; time.sleep(9)", timeout=0.2)
    assert code == 124 and said == "stopped after 0 s"
