"""
What a stage adds to pretraining: a run to go on from, and a third network, which the patches' similarities are kept to.

    kept                RUN or RUN@STEP -> a run's folder, and the step of a checkpoint in it
    gram_config         --gram_teacher -> the configuration of that network; what does not fit is said here
    make_gram_teacher   the network, frozen: no heads, no average, no optimizer        DINOv3 §4.2
    first_state         what a run begins with: of --init, of --start, of --gram_teacher
    describe            the stage in words
    refresh             the Gram teacher becomes the teacher of now                     DINOv3 §4.2
    gram_term           L_Gram of a part of the batch                                   DINOv3 §4.2, eq. 2; §4.3

Dimension letters: see the top of model.py.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from data import read_resolutions
from engine.checkpoint import check, fill_all, newest, saved, start_from, take_rows, training_state
from engine.layouts import read_config, size_of
from losses import gram_loss
from model import ViTConfig, shard
from weights import empty, identify, inflated, stream_backbone

MASK_TOKEN = "optimizer.state.backbone.mask_token."

# --------------------------------------------------------------------------------
# What goes on from what


def kept(text):
    """RUN or RUN@STEP -> the run's folder, and the step of its newest whole checkpoint or of the one that is named."""
    run, at, step = text.rpartition("@")
    if not at or Path(text).exists():
        return text, newest(text)[0] if Path(text, "config.json").exists() else 0
    there = [each for each, _ in saved(run)]
    if not step.isdecimal() or int(step) not in there:
        raise ValueError(f"{text}: there is no checkpoint of step {step} in {run}; it has "
                         f"{', '.join(map(str, sorted(there))) or 'none'}; --keep_every keeps some for good")
    return run, int(step)


def weights_of(text):
    """--gram_teacher, but self -> what weights.py reads"""
    run, at, _ = text.rpartition("@")
    if not at or Path(text).exists():
        return text
    run, step = kept(text)
    return dict(saved(run))[step] / "teacher.safetensors"


def gram_config(c):
    """
    The configuration of the Gram teacher's network. Only its P x P similarities count, so that its width, its depth and
    its patch size may be others.

    raises  ValueError if its grid is not whole or is coarser than the student's, or if a refresh would change its shape
    """
    if c.resume:  # its file need not be there: the run has looked at it, and has its weights
        path = Path(c.out, "config.json")
        return read_config(path, json.dumps(json.loads(path.read_text()).get("gram")))
    found = c.vit if c.gram_teacher == "self" else identify(weights_of(c.gram_teacher)).config
    said = f"--gram_teacher {c.gram_teacher}, {size_of(found)}"
    if not isinstance(found, ViTConfig) or found.in_chans not in (3, c.in_chans):
        raise ValueError(f"{said}, is for images of {found.in_chans} channels; it must be a ViT for {c.in_chans}")
    found = found if found.in_chans == c.in_chans else inflated(found, c.in_chans)
    triples = [triple for triple, _ in read_resolutions(c.resolutions)] if c.resolutions else [
        (c.global_size, c.local_size, c.gram_size)]
    for side, _, large in triples:
        if large % found.patch_size or large // found.patch_size < side // c.patch_size:
            p, least = found.patch_size, side // c.patch_size
            near = max(-(-large // p), least) * p
            raise ValueError(f"{said}: {large} px are {large / p:g} of its patches of {p} px; whole ones are wanted, "
                             f"and {least} or more, as the student has of {side} px; try {near}")
    if c.gram_refresh and c.gram_refreshes and replace(found, mean=c.mean, std=c.std) != c.vit:
        raise ValueError(f"{said}, is another network than the teacher, {size_of(c.vit)}, that would take its place; "
                         "--gram_refresh 0 keeps it")
    return found


def first_state(c, ranks, student, teacher, optimizer, gram):
    """
    Fills all networks, and the optimizer, with what a run begins with; returns its first step.

    --start's checkpoint is taken whole: both networks, heads, the optimizer's moments. One of distill.py has none for
    the mask token, which it has not trained: they begin at 0.
    """
    if c.init:
        start_from(c.init, ranks, student, teacher)
    if c.start:
        run, _ = kept(c.start)
        folder = dict(saved(run)).get(c.began, Path(run, str(c.began)))
        ranks.together(partial(check, folder, ranks))
        ranks.together(lambda: fill_all(folder, training_state(student, teacher, optimizer), MASK_TOKEN))
        if ranks.main:
            print(f"{c.stage} goes on from {folder}: both networks, heads and optimizer, at step {c.began:,}")
    if gram is not None and c.gram_teacher == "self":
        refresh(gram, teacher)
    elif gram is not None:
        own = gram.state_dict()
        for name, x in stream_backbone(weights_of(c.gram_teacher), in_chans=c.in_chans)[1]:
            take_rows(own[name], x)
    return c.began


def describe(c):
    """Lines for people: what a stage has beyond pretraining."""
    for (large, small, gram), share in read_resolutions(c.resolutions) if c.resolutions else ():
        h, w = large // c.patch_size, small // c.patch_size
        rest = f", the middle {w * c.patch_size} px of each" * (small % c.patch_size > 0)
        yield (f"{100 * share:.3g} % of the steps: crops of {large} px ({h}x{h}) and {small} px ({w}x{w} patches{rest})"
               + f", {gram} px for the Gram teacher" * bool(c.gram_teacher))
    if not c.gram_teacher:
        return
    moves = c.gram_refresh and c.gram_refreshes
    often = f"{c.gram_refreshes} times, every {c.gram_refresh:,} steps" if moves else "never"
    yield (f"Gram teacher {c.gram_teacher}" + f", of crops of {c.gram_size} px" * (not c.resolutions)
           + f": weight {c.gram_weight:g}, local crops {c.local_weight:g}, from 0 and {c.local_weight_start:g} over "
           f"{c.gram_warmup:,} steps; replaced by the teacher: {often}")

# --------------------------------------------------------------------------------
# The Gram teacher


def make_gram_teacher(c, freeze):
    """
    The third network, its weights not yet read; None without one.

    freeze  networks on the meta device -> the same, sharded, on this rank's device, without gradients
    """
    if not c.gram_teacher:
        return None
    return freeze(empty(gram_config(c)))


def refresh(gram, teacher):
    """In place; each rank its rows.    paper: §4.2, the Gram teacher becomes identical to the main EMA teacher"""
    own = gram.state_dict()
    for name, x in teacher["backbone"].state_dict().items():
        shard(own[name])[0].copy_(shard(x)[0])


def refreshes(c, step):
    """Whether the Gram teacher is replaced before this step."""
    done, rest = divmod(step - c.began, max(c.gram_refresh, 1))
    return bool(c.gram_refresh) and rest == 0 and 1 <= done <= c.gram_refreshes


def gram_term(c, gram, batch, features):
    """
    dict(gram=L_Gram), of what the student says of its global crops, all patches, hidden or not; {} without a teacher.

    The Gram teacher sees the same crops undistorted, at a resolution of their own; its map is made as coarse as the
    student's, before patches are scaled to unit length.

    paper:   §4.3: bicubic; differs: from bicubic with antialiasing: none, as in the released code
    """
    if gram is None:
        return {}
    with torch.no_grad():
        maps = gram(normalised_for(gram, c, batch["gram_crops"])).map().float()                       # (G B) D h w
        if maps.shape[2:] != features.grid:
            maps = F.interpolate(maps, features.grid, mode="bicubic", align_corners=False)
    return dict(gram=gram_loss(features.patches, maps.flatten(2).mT))


def normalised_for(gram, c, x):
    """Images that were normalised as the student wants them -> as the Gram teacher does.    x  n C H W"""
    own = gram.config
    if (own.mean, own.std) == (c.mean, c.std):
        return x
    statistics = zip(c.mean, c.std, own.mean, own.std, strict=True)
    return torch.stack([(x[:, i] * std + mean - m) / s for i, (mean, std, m, s) in enumerate(statistics)], dim=1)
