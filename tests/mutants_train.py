"""
Plants faults in copies of train.py and of engine/fp8.py, and runs test_train_loop.py or the quick tests of test_fp8.py
on each: all must be caught.

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
FLOAT8 = {  # of engine/fp8.py
    "another largest number": ("torch.finfo(torch.float8_e4m3fn).max", "240.0"),
    "scales of columns": ("dim=1, keepdim", "dim=0, keepdim"),
    "one scale": ("dim=1, keepdim", "dim=(0, 1), keepdim"),
    "zeros by zero": (".clamp(min=SMALLEST)", ""),
    "what is not finite is cut": ("(largest / LARGEST)", "(largest / LARGEST).nan_to_num()"),
    "columns not in one piece": (", memory_format=torch.contiguous_format", ""),
    "scales of one operand": (" * scale_a * scale_b.t()", " * scale_a"),
    "sums in bfloat16": ("(a.float() @ b.float().t() *", "((a.bfloat16() @ b.bfloat16().t()).float() *"),
    "an emulation under autocast": ("enabled=False", "enabled=True"),
    "finer weights": ("product(x, weight.bfloat16())", "product(x, weight)"),
    "x's gradient in bfloat16": ("product(grad, weight.bfloat16().t())", "grad @ weight.bfloat16()"),
    "W's gradient in float8": ("grad.t() @ x", "product(grad.t(), x.t())"),
    "no bias": ("return y if bias is None else y + bias.to(y.dtype)", "return y"),
    "keys with a bias": ("self.bias * self.bias_mask.to(self.bias.dtype)", "self.bias"),
    "devices that cannot": ("CAPABILITY = 8, 9", "CAPABILITY = 8, 0"),
}


def survivor(name, folder):
    """None if the tests fail with this fault planted; else what was found."""
    file = "engine/fp8.py" if name in FLOAT8 else "train.py"
    source, (old, new) = (ROOT / file).read_text(), (MUTANTS | FLOAT8).get(name, ("", ""))
    if old and source.count(old) != 1:
        return f"{file} has {old!r} {source.count(old)} times"
    path = folder / Path(file).name
    path.write_text(source.replace(old, new) if old else source)
    pid = os.fork()
    if not pid:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            os._exit(tested(path, file))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {pytest.ExitCode.TESTS_FAILED: None, pytest.ExitCode.OK: "NOT CAUGHT"}.get(code, f"pytest ended with {code}")


def tested(path, file):
    """pytest's exit code, with the module `file` as it is at this path."""
    name = file.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = ["test_train_loop.py"] if name == "train" else ["test_fp8.py", "-k", "not run and not ranks and not distil"]
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not long", "--rootdir", str(ROOT),
                            str(ROOT / "tests" / tests[0]), *tests[1:]]))


def main(names):
    unknown = set(names) - set(MUTANTS | FLOAT8)
    if unknown:
        print(f"mutants_train: {sorted(unknown)} are not known; choose of {[*MUTANTS, *FLOAT8]}", file=sys.stderr)
        return 2
    survivors = 0
    for name in ["", *(names or MUTANTS | FLOAT8)]:  # "": no fault, which must pass
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
