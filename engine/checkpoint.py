"""
What a run leaves and starts from. Every rank writes and reads its own shards; any number of ranks can go on.

    save_checkpoint   student, teacher, optimizer and step, and teacher.safetensors; each replaced whole
    load_checkpoint   the same back, bit for bit
    load_teacher      its teacher alone, backbone and heads: for those who distill it
    start_from        a weights file's backbone into student and teacher: --init
"""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from weights import load_backbone, save_backbone


def training_state(student, teacher, optimizer):
    """Student, teacher and optimizer by parameter name, so that any number of ranks can take its part."""
    student_state, optimizer_state = get_state_dict(student, optimizer)
    return dict(student=student_state, teacher=teacher.state_dict(), optimizer=optimizer_state)


def save_checkpoint(c, ranks, step, student, teacher, optimizer):
    """OUT/checkpoint and OUT/teacher.safetensors, each replaced whole: a kill leaves the old or the new."""
    out = Path(c.out)
    new, final, old = (out / name for name in ("checkpoint.new", "checkpoint", "checkpoint.old"))
    if ranks.main:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    if ranks.group is not None:
        dist.barrier(ranks.group)
    dcp.save(training_state(student, teacher, optimizer), checkpoint_id=new, process_group=ranks.group)
    backbone = teacher["backbone"]
    state = {k: v.full_tensor().cpu() if isinstance(v, DTensor) else v for k, v in backbone.state_dict().items()}
    if ranks.main:
        sizes = {file.name: file.stat().st_size for file in sorted(new.iterdir())}
        (new / "step.json").write_text(json.dumps(dict(step=step, sizes=sizes)))
        save_backbone(backbone, out / "teacher.safetensors", "nano", dict(size=c.size, step=step), state)
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        new.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    if ranks.group is not None:
        dist.barrier(ranks.group)


def open_checkpoint(out):
    """A run's checkpoint and the step it was saved before. Raises ValueError if there is none, or a damaged one."""
    folder = Path(out, "checkpoint")
    if not folder.exists() and Path(out, "checkpoint.old").exists():
        folder = Path(out, "checkpoint.old")  # killed between two renames
    try:
        note = json.loads((folder / "step.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no checkpoint ({error}); start again without --resume") from error
    for name, size in note["sizes"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found != size:
            raise ValueError(f"{folder / name} is cut short: {found} bytes of {size}; "
                             "restore it from a copy, or start again in another folder")
    return folder, note["step"]


def load_checkpoint(c, student, teacher, optimizer, group=None):
    """Fills the networks and the optimizer in place; returns the next step. Raises ValueError if damaged."""
    folder, step = open_checkpoint(c.out)
    state = training_state(student, teacher, optimizer)
    dcp.load(state, checkpoint_id=folder, process_group=group)
    teacher.load_state_dict(state["teacher"])
    set_state_dict(student, optimizer, model_state_dict=state["student"], optim_state_dict=state["optimizer"])
    return step


def load_teacher(out, teacher):
    """Fills backbone and heads with those of a run's teacher, in place; all ranks together."""
    dcp.load(dict(teacher=teacher.state_dict()), checkpoint_id=open_checkpoint(out)[0])


@torch.no_grad()
def start_from(path, ranks, *networks):
    """Copies a file's backbone into each network's, in place, every rank its shards; the heads stay as they are."""
    state, own = load_backbone(path).state_dict(), [network["backbone"].state_dict() for network in networks]
    for leaf in ("weight", "bias"):  # not every layout and size has it: it begins as the norm of all crops
        said = state.pop(f"local_cls_norm.{leaf}", state[f"norm.{leaf}"])
        if f"local_cls_norm.{leaf}" in own[0]:
            state[f"local_cls_norm.{leaf}"] = said
    misfit = [key for key in own[0].keys() | state.keys()
              if key not in state or key not in own[0] or state[key].shape != own[0][key].shape]
    if misfit:
        raise ValueError(f"--init {path} does not fit these options: {len(misfit)} tensors differ, {misfit[:5]}")
    for backbone in own:
        for key, x in backbone.items():
            full = state[key].to(x.device, x.dtype)
            x.copy_(distribute_tensor(full, x.device_mesh, x.placements, src_data_rank=None)
                    if isinstance(x, DTensor) else full)
    if ranks.main:
        print(f"student and teacher start from {path}, all {len(state)} tensors of the backbone; the heads start fresh")
