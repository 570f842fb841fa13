"""
What a run leaves and starts from. Every rank writes its own rows and reads those that it holds: any number of ranks can
go on, and no host holds more than one tensor. Nothing in a run's folder is executed.

    save_checkpoint   the rows of all ranks: OUT/checkpoints/STEP, whole or not at all; OUT/teacher.safetensors
    newest            the newest whole checkpoint of a run, and its step
    load_checkpoint   student, teacher, optimizer back, bit for bit
    load_teacher      its teacher alone, backbone and heads: for those who distill it
    start_from        a weights file's backbone into student and teacher: --init
    replace_text      a small file, replaced whole

    checkpoints/STEP/RANK.safetensors   the rows of a rank: see shards.py
    checkpoints/STEP/teacher.safetensors   the teacher's backbone; OUT/teacher.safetensors is that of the newest
    checkpoints/STEP/step.json          the step, and size and crc32 of the files: written last
"""

import json
import os
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from engine import legacy
from engine.shards import Entry, checksum, fill, read_pieces, write_tensors
from model import replicated, shard
from weights import commit, stream_backbone

# --------------------------------------------------------------------------------
# Saving


def training_state(student, teacher, optimizer, gram=None):
    """{name: tensor} of all that training changes, live: saving reads them, loading fills them.    gram  its teacher"""
    state = {f"student.{name}": x for name, x in student.state_dict().items()}
    state |= {f"teacher.{name}": x for name, x in teacher.state_dict().items()}
    for name, p in student.named_parameters():
        state |= {f"optimizer.state.{name}.{key}": x for key, x in optimizer.state.get(p, {}).items()}
    return state | {f"gram.{name}": x for name, x in (gram.state_dict() if gram is not None else {}).items()}


def begin_state(optimizer):
    """AdamW's state before its first step: what there is to save, or to fill, does not depend on what has happened."""
    dtype = getattr(optimizer, "moments", None)
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = dict(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p, dtype=dtype),
                                      exp_avg_sq=torch.zeros_like(p, dtype=dtype))


def bytes_of(state):
    """What a checkpoint takes on disk: the tensors of all ranks, and the teacher's backbone once more."""
    return sum(x.numel() * x.element_size() * (1 + name.startswith("teacher.backbone.")) for name, x in state.items())


def save_checkpoint(c, ranks, step, rows, size, config):
    """
    OUT/checkpoints/STEP is there when all ranks have written their files and main has made teacher.safetensors of them:
    a kill at any time leaves the checkpoints before it. Raises ValueError on all ranks if any cannot write.

    rows  own_rows() of the training_state(), live or copied;  size  its bytes_of();  config  of the backbone
    """
    new = Path(c.out, "checkpoints", f"{step}.new")
    try:
        ranks.together(lambda: ranks.main and make_room(c, new, size))
        files = ranks.together(lambda: write_rows(new / f"{ranks.rank}.safetensors", rows))
        ranks.together(lambda: ranks.main and finish(c, step, new, dict(files), config))
    except ValueError as error:
        if ranks.main:
            shutil.rmtree(new, ignore_errors=True)
        raise ValueError(f"step {step} is not saved: {error}; a checkpoint takes {size:,} bytes, "
                         f"{shutil.disk_usage(existing(c.out)).free:,} are free; {last_good(c.out)}") from error


def last_good(out):
    return next((f"the last good checkpoint is {folder}" for _, folder in saved(out)), "there is no checkpoint yet")


def existing(path):
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.exists())


def check_space(c, start, student, teacher, optimizer, gram=None):
    """Raises ValueError, before the first step, if the disk will not hold the checkpoints that are to come."""
    size, free = bytes_of(training_state(student, teacher, optimizer, gram)), shutil.disk_usage(existing(c.out)).free
    to_come = -(-(c.end - start) // c.save_every)
    n = min(max(c.keep + 1 - len(saved(c.out)), 1), max(to_come, 1))  # the oldest goes when the newest is there
    if n * size > free:
        raise ValueError(f"--out {c.out}: {n} checkpoints of {size:,} bytes do not fit in the {free:,} that are free; "
                         f"make room, or take a smaller --keep than {c.keep}")


def make_room(c, new, wanted):
    sweep(c.out)
    new.mkdir(parents=True)
    if (free := shutil.disk_usage(new).free) < wanted:
        raise ValueError(f"no space left for {new.with_suffix('')}, {wanted - free:,} bytes too few")


def own_rows(ranks, state):
    """{name: (rows, first, total)} that this rank writes; total 0: what is whole on every rank, the first one's."""
    found = {}
    for name, x in state.items():
        local, first = shard(x)
        if not (local is x and not ranks.main or local.shape[:1] == (0,) or replicated(x)):
            found[name] = local, first, 0 if local is x else len(x)
    return found


def write_rows(path, rows):
    """Returns name -> (size, crc32) of the file."""
    entries = {name: Entry(tuple(x.shape), x.dtype, partial(iter, [x])) for name, (x, _, _) in rows.items()}
    places = {name: (first, total) for name, (_, first, total) in rows.items() if total}
    return path.name, write_tensors(path, entries, dict(rows=json.dumps(places)))


def finish(c, step, new, files, config):
    """On main, when all files are there: the teacher's file, step.json, the new name, and an end to what is too old."""
    pieces = gather_pieces([new / name for name in files])
    entries = {}
    for name in [name for name in pieces if name.startswith("teacher.backbone.")]:
        first = pieces[name][0]
        shape = first.shape and (first.total, *first.shape[1:])
        entries[name.removeprefix("teacher.backbone.")] = Entry(
            shape, first.dtype, lambda found=pieces[name]: (piece.read() for piece in found))
    notes = dict(size=c.size, step=str(step), config=json.dumps(asdict(config)), commit=commit(), format="pt")
    files["teacher.safetensors"] = write_tensors(new / "teacher.safetensors", entries, notes)
    replace_text(new / "step.json", json.dumps(dict(step=step, files=files)))
    folder = new.with_suffix("")
    if folder.exists():  # a damaged one, that the run went on from before
        folder.rename(folder.with_suffix(".old"))
    new.rename(folder)
    tidy(c, folder)


def tidy(c, folder):
    """The newest checkpoint's teacher is the run's; what is too old goes, by another name first, so as to go whole."""
    publish(folder, c.out)
    for step, each in saved(c.out)[c.keep:]:
        if not (c.keep_every and step % c.keep_every == 0):
            shutil.rmtree(each.rename(each.with_suffix(".old")) if each.parent == folder.parent else each)
    sweep(c.out)


def sweep(out):
    """What a run leaves that is killed while it saves."""
    for pattern in ("*.new", "*.old"):
        for left in Path(out, "checkpoints").glob(pattern):
            shutil.rmtree(left)


def publish(folder, out, name="teacher.safetensors"):
    """OUT/teacher.safetensors becomes that of a checkpoint: the same file, where the file system has links."""
    teacher, new = Path(folder, "teacher.safetensors"), Path(out, name + ".new")
    new.unlink(missing_ok=True)
    try:
        os.link(teacher, new)
    except OSError:
        shutil.copyfile(teacher, new)
    new.replace(Path(out, name))
    new.unlink(missing_ok=True)  # two names of one file: renaming does nothing


def replace_text(path, text):
    """Writes a file under another name, then gives it its own: a kill leaves the old one or the new."""
    new = path.with_name(path.name + ".new")
    with open(new, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)

# --------------------------------------------------------------------------------
# Finding


def saved(out):
    """[(step, folder)] of what a run has saved, newest first; an older run's one checkpoint among them."""
    found = [(int(path.name), path) for path in Path(out, "checkpoints").glob("*") if path.name.isdecimal()]
    for path in (Path(out, name) for name in ("checkpoint", "checkpoint.old")):  # .old: killed between two renames
        if path.is_dir():
            try:
                found.append((read_step(path)["step"], path))
            except ValueError:
                found.append((-1, path))
    return sorted(found, key=lambda each: each[0], reverse=True)


def read_step(folder):
    """step.json: {"step": int, "files": {name: (size, crc32 or None)}}, or a ValueError that names it."""
    path = folder / "step.json"
    try:
        note = json.loads(path.read_text())
        files = note["files"] if "files" in note else {name: (size, None) for name, size in note["sizes"].items()}
        right = type(note["step"]) is int and all(
            Path(name).name == name and type(size) is int and type(crc) in (int, type(None))
            for name, (size, crc) in files.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error!r})") from error
    if not right or not files:
        raise ValueError(f"{path} does not say a step, and the sizes of files")
    return dict(step=note["step"], files=files)


def check(folder, ranks=None):
    """The step of a checkpoint that is whole, or a ValueError. With ranks, which share the work, also by checksum."""
    note = read_step(folder)
    for name, (size, _) in note["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            raise ValueError(f"{folder / name} is cut short: {found} bytes of {size}")
    mine = sorted(note["files"].items())[ranks.rank::ranks.count] if ranks else []
    for name, (_, crc) in mine:
        if crc is not None and checksum(folder / name) != crc:
            raise ValueError(f"{folder / name} is damaged: its checksum is not that of step.json")
    return note["step"]


def newest(out, ranks=None):
    """
    The newest checkpoint of a run that is whole, as (step, folder). Says which newer ones are not.

    ranks   all of them, if they are to read every file: without, only sizes are looked at
    raises  ValueError if there is none
    """
    damaged = []
    for _, folder in saved(out):
        try:
            step = ranks.together(partial(check, folder, ranks))[0] if ranks else check(folder)
        except ValueError as error:
            damaged.append(str(error))
            continue
        if damaged and ranks and ranks.main:
            print(f"{'; '.join(damaged)}; going on from {folder}, the newest whole one", flush=True)
        return step, folder
    if damaged:
        raise ValueError(f"{'; '.join(damaged)}; no other checkpoint in {out} is whole: restore it from a copy, or "
                         "start again in another folder")
    raise ValueError(f"{out} holds no checkpoint yet; --resume auto begins where there is none")

# --------------------------------------------------------------------------------
# Loading


def gather_pieces(paths):
    """{name: [Piece], in the order of rows} of several files."""
    found = {}
    for path in paths:
        for name, piece in read_pieces(path).items():
            found.setdefault(name, []).append(piece)
    return {name: sorted(pieces) for name, pieces in found.items()}


def fill_all(folder, state, fresh="-"):
    """
    Every tensor of the state from a checkpoint's files; a ValueError, before the first, if one is not there.

    fresh  those whose names begin so may lack there, all of them or none: they stay as they are
    """
    old = (folder / ".metadata").exists()
    files = [path for path in sorted(folder.glob("*.safetensors")) if path.name != "teacher.safetensors"]
    pieces = legacy.read_pieces(folder) if old else gather_pieces(files)
    if not any(name.startswith(fresh) for name in pieces):
        state = {name: x for name, x in state.items() if not name.startswith(fresh)}
    for name, x in state.items():
        shapes = {piece.shape[1:] for piece in pieces.get(name, [])}
        if shapes != {tuple(x.shape[1:])} or sum(p.rows for p in pieces[name]) != (len(x) if x.ndim else 1):
            raise ValueError(f"{folder} does not hold {name} of {tuple(x.shape)}: it is of another network")
    for name, x in state.items():
        fill(x, pieces[name])


def load_checkpoint(c, ranks, student, teacher, optimizer, gram=None):
    """Fills the networks and the optimizer in place; returns the next step. Raises ValueError on all ranks."""
    step, folder = newest(c.out, ranks)
    state = training_state(student, teacher, optimizer, gram)
    ranks.together(lambda: fill_all(folder, state))
    if ranks.main and (folder / "teacher.safetensors").exists():
        tidy(c, folder)  # it may have been killed before it had done so
    return step


def load_teacher(out, teacher):
    """Fills backbone and heads with those of a run's teacher, in place."""
    fill_all(newest(out)[1], {f"teacher.{name}": x for name, x in teacher.state_dict().items()})


@torch.no_grad()
def take_rows(own, whole):
    """A tensor's rows that this rank holds, in place."""
    rows, first = shard(own)
    rows.copy_(whole[first : first + len(rows)])


@torch.no_grad()
def start_from(path, ranks, *networks):
    """Copies a file's backbone into each network's, in place, every rank its rows; the heads stay as they are."""
    model, tensors = stream_backbone(path, in_chans=networks[0]["backbone"].config.in_chans)
    shapes = {key: x.shape for key, x in model.state_dict().items()}
    own = [network["backbone"].state_dict() for network in networks]
    source = {key: key for key in own[0]}
    for leaf in ("weight", "bias"):  # not every layout and size has it: it begins as the norm of all crops
        if f"local_cls_norm.{leaf}" in source and f"local_cls_norm.{leaf}" not in shapes:
            source[f"local_cls_norm.{leaf}"] = f"norm.{leaf}"
    misfit = [key for key, name in source.items() if shapes.get(name) != own[0][key].shape]
    misfit += [name for name in shapes if name not in source and not name.startswith("local_cls_norm.")]
    if misfit:
        raise ValueError(f"--init {path} does not fit these options: {len(misfit)} tensors differ, {misfit[:5]}")
    for name, x in tensors:
        for key, backbone in ((key, backbone) for key in source for backbone in own if source[key] == name):
            take_rows(backbone[key], x)
    if ranks.main:
        print(f"student and teacher start from {path}, all {len(source)} tensors of the backbone; "
              "the heads start fresh")
