"""
Damaged weight files, command lines and run folders, drawn from seeds: each is refused in one line, at once, and runs no
code.

    python tests/fuzz.py [FILES LINES FOLDERS [SEED]]     300, 300 and 50; prints the counts by kind

A case is judged by `outcome`: refused, accepted, or one of BAD. What cannot be told from a sound file, a bit of a
number, may be accepted; `silent` is what should have been refused and was not.
"""

import contextlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from test_train import MICRO  # noqa: E402

import bench  # noqa: E402
import distill  # noqa: E402
import recipes  # noqa: E402
import train  # noqa: E402
import visualize  # noqa: E402
import weights  # noqa: E402
from engine import config, layouts  # noqa: E402
from model import ViT, ViTConfig  # noqa: E402
from tasks import TASKS  # noqa: E402

BAD = "traceback", "hang", "silent", "executed"
PATIENCE = 60                  # seconds that a case may take, on a machine that is busy
LAYOUTS = {"meta": "x.pth", "hf": "x", "timm": "x.safetensors", "nano": "x.safetensors"}
JUNK = None, -1, 0, 10**9, 1e300, float("nan"), "x", "", [], {}, [[]], [None] * 3, ["a", "b", "c"], [0, 0, 0]
FOREIGN = (b"", b"\n", b"\0" * 64, b"<html>", b"hello", b"{}", b"[" * 100_000, b"PK\x03\x04", b"\x80\x04N.", b"\x89PNG",
           b"\xff" * 9, (1 << 62).to_bytes(8, "little") + b"{}", (8).to_bytes(8, "little") + b'{"a": 1}')


class Trap:
    """Unpickling it leaves a folder."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Late(BaseException):
    """No `except Exception` may hold it."""


def ring(*_):
    raise Late


def outcome(work, wrong, trap):
    """What became of work(), which says whether it told the user of what is `wrong`; one of BAD, refused, accepted."""
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()), \
                warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
        found = "silent" if wrong and wrong not in out.getvalue() else "accepted"
    except (ValueError, OSError) as error:
        found = "refused" if config.on_purpose(error) and "\n" not in str(error) else "traceback"
    except Late:
        found = "hang"
    except Exception:  # any other is what a user would see as a traceback
        found = "traceback"
    finally:
        signal.alarm(0)
    return "executed" if trap.exists() else found

# --------------------------------------------------------------------------------
# Weight files. A case: rng, folder with a sound file -> path, what must be said, or "" if it may pass


def sound_file(folder, rng):
    layout = rng.choice(list(LAYOUTS))
    vit = ViT(ViTConfig(2, 16, 2, 24, patch_size=4, n_registers=2))
    torch.nn.init.ones_(vit.blocks[0].attn.qkv.bias)
    with contextlib.redirect_stdout(io.StringIO()):
        weights.save_backbone(vit, folder / LAYOUTS[layout], layout)
    path = folder / LAYOUTS[layout]
    return layout, path, path / "model.safetensors" if layout == "hf" else path


def rewrite(file, change, metadata=()):
    """The file again, after change(state)."""
    if file.suffix == ".pth":
        state = torch.load(file)
        change(state)
        return torch.save(state, file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() | dict(metadata)
    state = load_file(file)
    change(state)
    save_file(state, file, metadata)


def cut(rng, folder):
    _, path, file = sound_file(folder, rng)
    file.write_bytes(file.read_bytes()[: -rng.randrange(1, file.stat().st_size)])
    return path, "refused"


def flipped(rng, folder):
    """A byte anywhere; a number's may pass."""
    _, path, file = sound_file(folder, rng)
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data) if rng.random() < 0.3 else 3000)] ^= rng.randrange(1, 256)
    file.write_bytes(data)
    return path, ""


def foreign(rng, folder):
    _, path, file = sound_file(folder, rng)
    if rng.random() < 0.1:
        file.unlink()
        file.mkdir() if rng.random() < 0.5 else file.symlink_to(file.name)
    else:
        file.write_bytes(rng.choice(FOREIGN))
    return path, "refused"


def changed(rng, folder):
    """One tensor."""
    _, path, file = sound_file(folder, rng)

    def change(state):
        key = rng.choice([key for key, x in state.items() if x.numel() > 1 and not key.endswith("bias_mask")])
        x = state[key]
        kind = rng.randrange(9)
        if kind < 2:
            state[key] = x.index_put([torch.tensor(0)] * x.ndim, torch.tensor(float("nan" if kind else "inf")))
        elif kind < 5:
            state[key] = x.to(rng.choice([torch.int64, torch.uint8, torch.bool, torch.complex64]))
        elif kind == 5:
            state[key] = x[..., :-1].clone()
        elif kind == 6:
            state[key + ".x"] = state.pop(key)
        elif kind == 7:
            state[rng.choice(["extra", "blocks.1000000000.norm1.weight", "layer.10000000.norm1.weight"])] = x.clone()
        else:
            state[key] = x[None].repeat(*[2] * (x.ndim + 1))
    rewrite(file, change)
    return path, "refused"


def packed(rng, folder):
    """What torch.save can hold besides dense tensors."""
    vit, path, trap = ViT(ViTConfig(2, 16, 2, 24, patch_size=4, n_registers=2)), folder / "x.pth", folder / "sprung"
    state = dict(vit.state_dict())
    key = rng.choice([key for key in state if not key.endswith("bias_mask")])
    itself = dict(state)
    itself["model"] = {"teacher": itself}
    torch.save(rng.choice([
        state | {key: state[key].to_sparse()}, state | {key: state[key].to("meta")}, state | {key: Trap(trap)},
        state | {key: torch.quantize_per_tensor(state[key], 0.1, 0, torch.qint8)}, state | {3: state[key]},
        dict(enumerate(state.values())), list(state.values()), itself, Trap(trap), {"model": Trap(trap)}, vit,
        state | {key: 1.0}, {"teacher": {}}, 3]), path)
    return path, "refused"


def said(rng, folder):
    """The configuration in a file, or beside it."""
    layout, path, file = "", None, None
    while layout not in ("hf", "nano"):
        shutil.rmtree(folder / "x", ignore_errors=True)
        layout, path, file = sound_file(folder, rng)
    if layout == "nano":
        with safe_open(file, "pt") as opened:
            c = json.loads(opened.metadata()["config"])
        c[rng.choice(list(c))] = rng.choice([x for x in JUNK if x != 0])
        rewrite(file, lambda state: None, {"config": rng.choice([json.dumps(c)] * 6 + ["[" * 10**5, "3", "{}", "{"])})
        return path, "refused"
    name = rng.choice(["config.json", "preprocessor_config.json"])
    c = json.loads((path / name).read_text())
    own = {"image_mean", "image_std"} if "image_mean" in c else \
        {"num_attention_heads", *layouts.hf_config(ViTConfig(1, 16, 2, 24))} - layouts.OPEN - {"model_type"}
    c[rng.choice(sorted(own))] = rng.choice([x for x in JUNK if x not in (0, [0, 0, 0])] + [[float("nan")] * 3])
    (path / name).write_text(rng.choice([json.dumps(c)] * 6 + ["[" * 10**5, "3", "{", "\0"]))
    return path, "refused"


def index(rng, folder):
    _, path, file = sound_file(folder, rng)
    (folder / "shards").mkdir()
    path = folder / "shards"
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": rng.choice(JUNK)}
                                                                  if rng.random() < 0.6 else rng.choice(JUNK)))
    return path, "refused"


FILES = cut, flipped, foreign, changed, packed, said, index

# --------------------------------------------------------------------------------
# Command lines. A case: rng, folder -> name of the script, words


def scripts(folder):
    """{script: (a command line that would run, its config)}"""
    at = str(folder / "out")
    found = dict(train=(["--out", at], recipes.TrainConfig()), distill=(["--teacher", at, "--out", at], None),
                 bench=(["forward"], bench.BenchConfig()), weights=([at], weights.WeightsConfig()),
                 visualize=(["pca", "shapes:1", "--weights", at, "--out", f"{at}/x.png"], visualize.VisualizeConfig()))
    for name, task in TASKS.items():
        found[f"evaluate {name}"] = ["--task", name, "--weights", "pixels"], task.config()
    found["distill"] = found["distill"][0], distill.DistillConfig()
    return found


def beyond(legal, n, whole, rng):
    """The text of a number, or n of them, that a range does not hold."""
    opens, low, high, closes, rising = config.RANGE.match(legal + ": ").groups()
    low, high = float(low), float(high)
    wrong = [low - 1, low - 10**6, -1e300, high + 1, high * 10 + 5, *[low] * (opens == "("), *[high] * (closes == ")")]
    x = rng.choice([x for x in wrong if abs(x) != float("inf")])
    x = int(x) if whole else x
    if n and rising and rng.random() < 0.3:
        return f"{min(high, 1)},{max(low, 0.02)}"
    return ",".join([repr(x)] * n) if n else repr(x)


def numbers(rng, folder):
    name = rng.choice(["train", "train", "train", *scripts(folder)])
    words, c = scripts(folder)[name]
    legal = {field: text for field, text in config.ranges(type(c)).items() if name != "distill"
             or field in distill.OPTIONS}
    field = rng.choice(sorted(legal))
    old = getattr(c, field)
    n = len(old) if type(old) is tuple else 0
    text = beyond(legal[field], n, type(old) is int, rng) if rng.random() < 0.7 else rng.choice(
        ["nan", "inf", "-inf", "1e999", "", "x", "1j", "[]", "{}", "None", "0x", "9" * 5000, "(" * 200, "1,2,3,4,5",
         "\0", "nan,nan", "1e999,1e999", "'1'", "__import__('os').getcwd()", "1 2", "True", "é", "-" * 3000 + "1"])
    return name, [*words, f"--{field}={text}"]


def words(rng, folder):
    """Names and values that no command knows, places that are none, words too many and too few."""
    name = rng.choice(["train", "train", *scripts(folder)])
    given, c = scripts(folder)[name]
    nowhere = rng.choice(["nowhere", "", "/dev/null", "/proc", "x" * 300, "a/../b", "-", "shapes:-1", "untrained:x"])
    options = {"train": ["size", "stage", "data", "init", "device", "kernels", "precision", "resume"],
               "distill": ["students", "teacher", "mode"], "bench": ["dry"], "weights": ["to", "size"],
               "visualize": ["weights", "layers"]}.get(name.split()[0], ["weights", "task", "data", "device"])
    field = rng.choice(options)
    value = nowhere if field not in ("to", "size", "layers", "kernels", "device") else nowhere or "nothing"
    return name, rng.choice([
        [*given, f"--{rng.choice('abcxyz')}{rng.randrange(99)}", "1"], [*given, f"--{field}", value], [*given, "--"],
        [*given, f"--{field}=" + value], [*given, "--=", "1"], [*given, "x", "y"],
        [*given, "-x"], ["x", *given], [*given, "\0"], [*given, "--data"]])


def places(rng, folder):
    """An --out that nothing can be written to."""
    (folder / "file").touch()
    at = rng.choice([str(folder / "file"), str(folder / "file/below"), "/dev/null", "/proc/x", "x" * 300])
    return rng.choice([
        ("train", ["--out", at]), ("distill", ["--out", at]), ("bench", ["forward", "--out", at]),
        ("evaluate nyu", ["--task", "nyu", "--weights", "pixels", "--out", at]),
        ("evaluate knn", ["--task", "knn", "--weights", "pixels", "--cache", at]),
        ("visualize", ["pca", "shapes:1", "--weights", at, "--out", at + "/x.png"]),
        ("weights", [at, at + "/x.pth", "--to", "meta"])])


LINES = numbers, words, places

# --------------------------------------------------------------------------------
# Run folders. A case: rng, a copy of a sound run -> what must be said, or "" if it may pass


def run_once(out):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main([*MICRO, "--out", str(out), "--steps", "4", "--save_every", "2", "--stop_after", "4"])


def of_config(rng, out):
    path = out / "config.json"
    c = json.loads(path.read_text())
    fields = [name for name in config.types(recipes.TrainConfig()) if name not in ("out", "resume", "init", "data")]
    c[rng.choice(fields)] = rng.choice([x for x in JUNK if x not in ("", "x", 0)])
    path.write_text(rng.choice([json.dumps(c)] * 4 + [path.read_text()[:99], "", "[" * 10**5, "3", "{}\0"]))
    return "refused"


def of_step(rng, out):
    path = out / "checkpoints/4/step.json"
    note = json.loads(path.read_text())
    if rng.random() < 0.5:
        note[rng.choice(["step", "files"])] = rng.choice([x for x in JUNK if x not in (-1, 0, 10**9)])
        path.write_text(json.dumps(note))
    else:
        path.write_text(rng.choice(["", "{", "[" * 10**5, "3", path.read_text()[:30]]))
    return "going on from"


def of_checkpoint(rng, out):
    """Zeros, a flip, an end, of the newest checkpoint's file or of both."""
    for step in (4,) if rng.random() < 0.7 else (4, 2):
        path = out / f"checkpoints/{step}/0.safetensors"
        data, at = bytearray(path.read_bytes()), rng.randrange(path.stat().st_size)
        kind = rng.randrange(3)
        data[at] ^= 1 + rng.randrange(255)
        path.write_bytes(data if kind == 0 else data[:at] if kind == 1 else bytes(1000) + data[1000:])
    return "going on from"


def of_pickles(rng, out):
    """A forged checkpoint of an older version, with code in it, and no other."""
    import pickle
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoint").mkdir()
    forged = pickle.dumps(Trap(out.parent / "sprung"))
    for name in ".metadata", "__0_0.distcp":
        (out / "checkpoint" / name).write_bytes(forged)
    (out / "checkpoint/step.json").write_text(json.dumps(dict(step=4, files={
        name: (len(forged), None) for name in (".metadata", "__0_0.distcp")})))
    return "refused"


def of_metrics(rng, out):
    (out / "metrics.jsonl").write_bytes(rng.choice(FOREIGN) + b"\n3\n{\n")
    return ""


FOLDERS = of_config, of_step, of_checkpoint, of_pickles, of_metrics

# --------------------------------------------------------------------------------
# Counts


def try_file(case, rng, folder):
    path, wrong = case(rng, folder)
    return outcome(lambda: weights.load_backbone(path), wrong, folder / "sprung"), path


def try_line(case, rng, folder):
    name, given = case(rng, folder)
    script = importlib.import_module(name.split()[0])
    return outcome(lambda: script.main(given), "refused", folder / "sprung"), (name, given)


def try_folder(case, rng, folder):
    out = folder / "run"
    shutil.copytree(SOUND["run"], out)
    wrong = case(rng, out)
    words = ["--out", str(out), "--resume", "--steps", "5", "--workers", "0"]
    return outcome(lambda: train.main(words), wrong, folder / "sprung"), wrong


SOUND = {}                     # the run that folders are copies of, made when it is asked for


def fuzz(cases, attempt, n, seed):
    """n cases by turns -> {kind: Counter of outcomes}, [what was tried, of those in BAD]"""
    counts, bad = {case.__name__: Counter() for case in cases}, []
    torch.set_num_threads(1)  # all is small
    if attempt is try_folder and "run" not in SOUND:
        SOUND["run"] = Path(tempfile.mkdtemp(), "run")
        run_once(SOUND["run"])
    for i in range(n):
        case = cases[i % len(cases)]
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that it will not quantise for ever
            found, tried = attempt(case, random.Random(f"{seed} {i}"), Path(folder))
        counts[case.__name__][found] += 1
        if found in BAD:
            bad.append((case.__name__, i, found, str(tried)[:200]))
    return counts, bad


def main(argv):
    files, lines, folders, seed = [*map(int, argv), *(300, 300, 50, 0)[len(argv) :]]
    worst = []
    for cases, attempt, n in (FILES, try_file, files), (LINES, try_line, lines), (FOLDERS, try_folder, folders):
        counts, bad = fuzz(cases, attempt, n, seed)
        for name, found in counts.items():
            print(f"{attempt.__name__[4:]:8} {name:14} " + "  ".join(
                f"{found[each]:4} {each}" for each in ("refused", "accepted", *BAD)), flush=True)
        worst += bad
    print(*worst, f"{len(worst)} of {files + lines + folders} went wrong", sep="\n")
    return bool(worst)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
