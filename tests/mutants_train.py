"""
Plants faults in copies of train.py and runs test_train_loop.py on each: all must be caught.

    python tests/mutants_train.py [NAME...]     prints the table; exit code 1 if a fault survives, or cannot be planted
"""

import contextlib
import importlib.util
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

MUTANTS = {  # name: old text, new text; it stands there once
    # the teacher
    "EMA of the backbone alone": ("update_ema(teacher, student, momentum[step])",
                                  'update_ema(teacher["backbone"], student["backbone"], momentum[step])'),
    "constant momentum": ("schedule(0, c.momentum, c.momentum_end,", "schedule(0, c.momentum, c.momentum,"),
    "EMA with the share of the student": ("student, momentum[step])", "student, 1 - momentum[step])"),
    "EMA of the step before": ("        optimizer.step()\n        optimizer.zero_grad(set_to_none=True)\n"
                               "        update_ema(teacher, student, momentum[step])\n",
                               "        update_ema(teacher, student, momentum[step])\n        optimizer.step()\n"
                               "        optimizer.zero_grad(set_to_none=True)\n"),
    "teacher in train mode": ("teacher.requires_grad_(False).eval()", "teacher.requires_grad_(False)"),
    "teacher with gradients": ("teacher.requires_grad_(False).eval()", "teacher.eval()"),
    "constant teacher temperature": ("schedule(c.teacher_temp_start, c.teacher_temp,",
                                     "schedule(c.teacher_temp, c.teacher_temp,"),
    # optimizer
    "constant weight decay": ("schedule(0, c.weight_decay, c.weight_decay_end,",
                              "schedule(0, c.weight_decay, c.weight_decay,"),
    "weight decay of biases": ('weight_decay * group["decays"]', "weight_decay"),
    "last layer not frozen": ("lr[step], weight_decay[step], step < c.freeze_last_layer)",
                              "lr[step], weight_decay[step], False)"),
    "last layer frozen for good": ("lr[step], weight_decay[step], step < c.freeze_last_layer)",
                                   "lr[step], weight_decay[step], True)"),
    "last lr not scaled": ("schedule(0, c.lr, c.lr_end, c.lr_warmup, c.steps) * c.lr_factor",
                           "schedule(0, c.lr * c.lr_factor, c.lr_end, c.lr_warmup, c.steps)"),
    "constant lr": ("schedule(0, c.lr, c.lr_end,", "schedule(0, c.lr, c.lr,"),
    "beta2 fixed": ("(c.beta1, c.beta2)", "(c.beta1, 0.999)"),
    "beta1 fixed": ("(c.beta1, c.beta2)", "(0.9, c.beta2)"),
    "no layer decay": ("factor = c.layer_decay **", "factor = 1.0 **"),
    "no factor of the patch embedding": ("(c.patch_embed_lr if stem else 1)", "1"),
    "gradients not clipped": ("clip_grad_norm_(part.parameters(), clip or math.inf)",
                              "clip_grad_norm_(part.parameters(), math.inf)"),
    "gradients not cleared": ("        optimizer.zero_grad(set_to_none=True)\n", ""),
    # the loss
    "local_weight ignored": (" / pairs * c.local_weight,", " / pairs,"),
    "ibot_weight ignored": ("ibot=c.ibot_weight,", "ibot=1.0,"),
    "koleo_weight ignored": ("koleo=c.koleo_weight)", "koleo=0.1)"),
    "student temperature fixed": ('targets["dino"], 2, c.student_temp,', 'targets["dino"], 2, 0.1,'),
    # shards
    "gradients summed in bf16": ("MixedPrecisionPolicy(torch.bfloat16, torch.float32,",
                                 "MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16,"),
    "no sharding by blocks": ('[*networks["backbone"].blocks, *prototypes,', "[*prototypes,"),
    "no sharding of prototypes": (".blocks, *prototypes, *networks", ".blocks, *networks"),
    "parameters gathered for good": ("reshard_after_forward=not stays", "reshard_after_forward=False"),
    "parameters gathered twice": ("reshard_after_forward=not stays", "reshard_after_forward=True"),
    "the teacher's gathered for good": ("stays=stays), build_networks(c, ranks)",
                                        "stays=stays), build_networks(c, ranks, stays=stays)"),
    "the student's gathered twice": ("build_networks(c, ranks, stays=stays), ", "build_networks(c, ranks), "),
    # float8
    "blocks without float8": ('    if c.precision == "fp8":\n        fp8.convert(networks["backbone"])\n', ""),
    "float8 without autocast": ('torch.bfloat16, enabled=c.precision != "fp32")',
                                'torch.bfloat16, enabled=c.precision == "bf16")'),
    "float8 of float32 shards": ('policy = bf16 if c.precision != "fp32" and',
                                 'policy = bf16 if c.precision == "bf16" and'),
    "float8 on any device": ('    if c.precision == "fp8":\n        fp8.check(ranks.device)\n', ""),
}


def survivor(name, folder):
    """None if the tests fail with this fault planted; else what was found."""
    source, (old, new) = (ROOT / "train.py").read_text(), MUTANTS.get(name, ("", ""))
    if name in MUTANTS and source.count(old) != 1:
        return f"train.py has {old!r} {source.count(old)} times"
    path = folder / "train.py"
    path.write_text(source.replace(old, new) if old else source)
    pid = os.fork()
    if not pid:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            os._exit(tested(path))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {pytest.ExitCode.TESTS_FAILED: None, pytest.ExitCode.OK: "NOT CAUGHT"}.get(code, f"pytest ended with {code}")


def tested(path):
    """pytest's exit code, with the module `train` of this file."""
    spec = importlib.util.spec_from_file_location("train", path)
    sys.modules["train"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = str(ROOT / "tests/test_train_loop.py")
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not long", "--rootdir", str(ROOT), tests]))


def main(names):
    unknown = set(names) - set(MUTANTS)
    if unknown:
        print(f"mutants_train: {sorted(unknown)} are not known; choose of {list(MUTANTS)}", file=sys.stderr)
        return 2
    survivors = 0
    for name in ["", *(names or MUTANTS)]:  # "": no fault, which must pass
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            wrong = survivor(name, Path(folder))
        if not name:
            wrong = None if wrong == "NOT CAUGHT" else f"the tests fail without a fault: {wrong}"
        survivors += wrong is not None
        said = "caught" if name else "passes"
        print(f"{name or 'no fault':40} {time.perf_counter() - start:5.1f} s  {wrong or said}", flush=True)
    return survivors > 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
