"""
Plants faults in copies of files that training stands on, and runs some of their tests on each: all must be caught.

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
    "EMA of the backbone alone": ("update_ema(teacher, student, momentum[t])",
                                  'update_ema(teacher["backbone"], student["backbone"], momentum[t])'),
    "constant momentum": ("schedule(0, c.momentum, c.momentum_end,", "schedule(0, c.momentum, c.momentum,"),
    "EMA with the share of the student": ("student, momentum[t])", "student, 1 - momentum[t])"),
    "EMA of the step before": ("        optimizer.step()\n        optimizer.zero_grad(set_to_none=True)\n"
                               "        update_ema(teacher, student, momentum[t])\n",
                               "        update_ema(teacher, student, momentum[t])\n        optimizer.step()\n"
                               "        optimizer.zero_grad(set_to_none=True)\n"),
    "teacher in train mode": ("teacher.requires_grad_(False).eval()", "teacher.requires_grad_(False)"),
    "teacher with gradients": ("teacher.requires_grad_(False).eval()", "teacher.eval()"),
    "constant teacher temperature": ("schedule(c.teacher_temp_start, c.teacher_temp,",
                                     "schedule(c.teacher_temp, c.teacher_temp,"),
    # optimizer
    "constant weight decay": ("schedule(0, c.weight_decay, c.weight_decay_end,",
                              "schedule(0, c.weight_decay, c.weight_decay,"),
    "weight decay of biases": ('weight_decay * group["decays"]', "weight_decay"),
    "last layer not frozen": (' or c.freeze_last_layer * ("last_layer" in name)', ""),
    "last layer frozen for good": ('if step < group["still"]', 'if group["still"]'),
    "last lr not scaled": ("schedule(0, c.lr, c.lr_end, c.lr_warmup, c.steps, c.cosine_warmup) * c.lr_factor",
                           "schedule(0, c.lr * c.lr_factor, c.lr_end, c.lr_warmup, c.steps, c.cosine_warmup)"),
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
    "koleo_weight ignored": ("koleo=c.koleo_weight,", "koleo=0.1,"),
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


IN_STAGES = {  # of engine/stages.py
    "images as the student wants them": ("if (own.mean, own.std) == (c.mean, c.std):", "if True:"),
    "bilinear maps": ('mode="bicubic"', 'mode="bilinear"'),
    "a refresh in every step": ("rest == 0 and 1 <= done", "1 <= done"),
    "a refresh at the start": ("1 <= done", "0 <= done"),
    "a refresh too many": ("done <= c.gram_refreshes", "done <= c.gram_refreshes + 1"),
    "moments stay behind": ("fill_all(folder, training_state(student, teacher, optimizer), MASK_TOKEN)",
                            "fill_all(folder, {n: x for n, x in training_state(student, teacher, optimizer).items() "
                            "if n[0] != 'o'})"),
    "the teacher stays behind": ("fill_all(folder, training_state(student, teacher, optimizer), MASK_TOKEN)",
                                 "fill_all(folder, training_state(student, student, optimizer), MASK_TOKEN)"),
    "a damaged start": ("        ranks.together(partial(check, folder, ranks))\n", ""),
    "self is the student": ('if gram is not None and c.gram_teacher == "self":\n        refresh(gram, teacher)',
                            'if gram is not None and c.gram_teacher == "self":\n        refresh(gram, student)'),
    "coarser grids": (" or large // found.patch_size < side // c.patch_size:", ":"),
    "a resumed run wants the file": ("    if c.resume:  #", "    if False:  #"),
    "always the newest checkpoint": ("    return run, int(step)\n", "    return run, max(there)\n"),
    "started at the newest checkpoint": ("dict(saved(run)).get(c.began, Path(run, str(c.began)))",
                                         "max(saved(run))[1]"),
    "another shape takes its place": ("    if c.gram_refresh and c.gram_refreshes and replace(",
                                      "    if 0 and replace("),
}
STAGES = {  # of train.py, and what stages do there
    "no Gram term": ("                terms |= gram_term(c, gram, batch, features)\n", ""),
    "weights of the end": ("weights = term_weights(now)", "weights = term_weights(c)"),
    "the local weight of the end": ("loss_terms(now, student,", "loss_terms(c, student,"),
    "schedules from the run's first step": ("t, now = step - c.began,", "t, now = step % c.steps,"),
    "no refresh": ("        if refreshes(c, step):\n            refresh(gram, teacher)\n", ""),
    "refreshed by the student": ("            refresh(gram, teacher)\n", "            refresh(gram, student)\n"),
    "a Gram teacher that is not saved": ("saver = Saver(c, ranks, *state,", "saver = Saver(c, ranks, *state[:3],"),
    "a straight warm-up": ("(1 - np.cos(np.pi * ramp)) / 2 if cosine_warmup else ramp", "ramp"),
    "noise of one resolution": ("    c = c.at(step)\n    grids", "    grids"),
    "the Gram weight ignored": ("gram=c.gram_weight)", "gram=1.0)"),
}
NUMBERS = {  # of recipes.py
    "a straight Gram weight": ("share = (1 - math.cos(math.pi * done / self.gram_warmup)) / 2",
                               "share = done / self.gram_warmup"),
    "Gram crops for nobody": ("now if self.gram_teacher or not now.gram_size else replace(now, gram_size=0)", "now"),
    "a Gram warm-up of any length": ('"freeze_backbone", "gram_warmup",', '"freeze_backbone",'),
    "Gram's rate along a cosine": ("lr=3e-5, lr_end=3e-5,", "lr=3e-5, lr_end=0.0,"),
    "a short warm-up of highres": ("lr_end=1.25e-5, lr_warmup=10_000,", "lr_end=1.25e-5, lr_warmup=1000,"),
    "smaller sizes at the full rate": ("steps=25_000, lr=1e-4, lr_end=1e-4,", "steps=25_000, lr=1e-3, lr_end=1e-3,"),
}
LOSS = {  # of losses.py
    "half the gradient": ("E.mul_(4 * grad)", "E.mul_(2 * grad)"),
    "gradient along the patch": (".addcmul_(s, (s * along).sum(-1, keepdim=True), value=-1)", ""),
    "gradient of another length": (".div_(norm)", ""),
    "all similarities at once": ("max(SIMILARITIES // max(x.shape[1], 1) ** 2, 1)", "len(x)"),
    "a sum": (" / (len(student) * student.shape[1] ** 2)", ""),
    "teacher of any length": ("s.float() / norm, F.normalize(t.float(), dim=-1)", "s.float() / norm, t.float()"),
}
CROPS = {  # of data.py
    "cut at the student's size": ("max(c.global_size, c.gram_size)) for where", "c.global_size) for where"),
    "a corner of local crops": ("edge = (c.local_size - whole) // 2", "edge = 0"),
    "the same triples for any seed": ("[self.seed, 6, step]", "[0, 6, step]"),
    "triples equally often": (".choice(len(sides), p=shares)", ".choice(len(sides))"),
    "masks of one resolution": ("        c = self.config.at(step)\n        side",
                                "        c = self.config\n        side"),
    "nothing is called enlarged": ("min(image.shape[1:]) < c.gram_size", "max(image.shape[1:]) < c.gram_size"),
}
QUICK = "not run and not ranks and not distil"
STAGE = "not two_ranks and not parts_are and not distilled and not mistakes"
SUITES = [  # file, faults, the tests that must catch them
    ("train.py", MUTANTS, ["test_train_loop.py"]),
    ("engine/fp8.py", FLOAT8, ["test_fp8.py", "-k", QUICK]),
    ("engine/stages.py", IN_STAGES, ["test_stages.py", "-k", STAGE.removesuffix(" and not mistakes")]),
    ("train.py", STAGES, ["test_stages.py", "-k", STAGE]),
    ("recipes.py", NUMBERS, ["test_stages.py", "-k", "numbers or share or shrink or weights_of or without_a_gram"]),
    ("losses.py", LOSS, ["test_losses.py", "-k", "gram"]),
    ("data.py", CROPS, ["test_data.py", "-k", "gram or resolutions or sides"]),
]
ALL = {name: (file, fault, tests) for file, faults, tests in SUITES for name, fault in faults.items()}
assert len(ALL) == sum(len(faults) for _, faults, _ in SUITES), "two faults have one name"


def survivor(file, fault, tests, folder):
    """None if the tests fail with this fault planted, "" = none; else what was found."""
    source, (old, new) = (ROOT / file).read_text(), fault or ("", "")
    if old and source.count(old) != 1:
        return f"{file} has {old!r} {source.count(old)} times"
    path = folder / Path(file).name
    path.write_text(source.replace(old, new) if old else source)
    pid = os.fork()
    if not pid:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            os._exit(tested(path, file, tests))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {pytest.ExitCode.TESTS_FAILED: None, pytest.ExitCode.OK: "NOT CAUGHT"}.get(code, f"pytest ended with {code}")


def tested(path, file, tests):
    """pytest's exit code, with the module `file` as it is at this path."""
    name = file.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not long", "--rootdir", str(ROOT),
                            str(ROOT / "tests" / tests[0]), *tests[1:]]))


def main(names):
    unknown = set(names) - set(ALL)
    if unknown:
        print(f"mutants_train: {sorted(unknown)} are not known; choose of {[*ALL]}", file=sys.stderr)
        return 2
    survivors = 0
    chosen = {name: ALL[name] for name in names or ALL}
    sound = {str(each[::2]): (each[0], None, each[2]) for each in chosen.values()}  # no fault: each suite must pass
    for name, each in (sound | chosen).items():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            wrong = survivor(*each, Path(folder))
        if each[1] is None:
            wrong = None if wrong == "NOT CAUGHT" else f"the tests fail without a fault: {wrong}"
        survivors += wrong is not None
        said = "caught" if each[1] else "passes"
        print(f"{name[:70]:40} {time.perf_counter() - start:5.1f} s  {wrong or said}", flush=True)
    return survivors > 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
