"""
Open-vocabulary segmentation: a pixel is of the class whose sentences its patch lies nearest to; nothing is trained.

    python evaluate.py --task openvocab --weights runs/words                                   on the generated `shapes`
    python evaluate.py --task openvocab --weights dinov3_vitl16.pth --text dinotxt.pth --data ADE20K --set ade20k
    python evaluate.py --task openvocab --weights runs/words --data PHOTOS --names FILE        a class a line

    short side 512, windows of 384, 192 apart; cosines of each patch, enlarged to the window; softmax over the classes
    without a temperature; mean over the windows; resized to the truth

Both numbers come of one pass: `miou` of the patches behind the vision head, which training has brought near the words,
and `miou_backbone` of those before it, which the authors' notebook takes; the paper does
not say which of them it has.

paper: DINOv3 §7.3, Tab. 16. Dimension letters: see the top of model.py.
"""

from functools import partial
from operator import attrgetter

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dinotxt import ask, best_name, load_dinotxt
from engine.metrics import confusion, segmentation_scores
from engine.pictures import SHOWN, hues, save_pictures
from engine.sliding import resized, slide, windows
from engine.task import Option, Paper, Task
from model import Features
from sets import labels
from sets.pairs import generated
from sets.prompts import BACKGROUND, NAMES, STRUCTURED, TEMPLATES, TEXT, label_names, sentences


class Both(nn.Module):
    """images -> Features behind the head, its patches with those before it beside them: B P 2D"""

    def __init__(self, backbone, c):
        super().__init__()
        self.words, self.config = load_dinotxt(c.text or c.weights, backbone), backbone.config

    def forward(self, images):
        before = self.words.backbone(images)
        after = self.words.towers.see(before)
        return Features(after.cls, after.registers, torch.cat([after.patches, before.patches], 2), before.grid)


def open_set(c):
    """Images with truths, names of the classes, sentences"""
    said = sentences(c.templates)
    if c.data == "shapes":
        return generated(c, attrgetter("semantic"))[1], [BACKGROUND, *([name] for name in STRUCTURED)], said
    if c.set not in labels.SETS:
        raise ValueError(f"--set {c.set}: choose one of {', '.join(labels.SETS)}")
    names = label_names(c.set, c.data, c.names)
    val, top = labels.open_val(c, c.set)
    if top >= len(names):
        raise ValueError(f"--data: {c.data} has label {top}, but names are of {len(names)} classes, from 0; name all")
    return val, names, said


def run(data, frozen, c):
    val, names, said = data
    with torch.autocast(frozen.device.type, torch.bfloat16, enabled=frozen.precision == "bf16"):
        vectors, classes = ask(frozen.model.words, names, said, slice(frozen.model.config.width, None))
    if c.control:  # each word means another class
        classes = torch.from_numpy(np.random.default_rng(c.seed).permutation(len(names)))[classes]
    score = partial(confusions, val=val, vectors=vectors, classes=classes, n=len(names))
    counts = sum(torch.from_numpy(counted) for (counted,) in frozen.each("confusions", score, len(val), names=names,
                                                                          said=said))         # 2 n n
    if c.out:
        shown = [[val.image(i), hues(torch.from_numpy(val.truth(i))), *(hues(x.cpu()) for x in maps)]
                 for i in range(min(SHOWN, len(val)))
                 for maps in [labelled(i, frozen, val, vectors, classes, len(names))]]
        save_pictures(c, shown, "image, truth, by the head's patches, by the backbone's")
    after, before = map(segmentation_scores, counts)
    return dict(**after, miou_backbone=before["miou"], accuracy_backbone=before["accuracy"], n_classes=len(names),
                n_sentences=len(said), n_val=len(val))


def confusions(i, frozen, val, vectors, classes, n):
    """Pixels of each truth that were taken for each class, by the head's patches, by the backbone's:  2 n n"""
    truth = torch.from_numpy(val.truth(i)).to(frozen.device)
    return [torch.stack([confusion(found, truth, n) for found in labelled(i, frozen, val, vectors, classes, n)])
            .cpu().numpy()]


def labelled(i, frozen, val, vectors, classes, n):
    """The classes of an image's pixels, H W, by the head's patches, by the backbone's"""
    image, patch, c = val.image(i), frozen.model.config.patch_size, frozen.c
    side = max(round(c.resolution * 3 / 4 / patch), 1) * patch                                 # of 512: 384, and 192
    stride, halves = side // 2, ([], [])
    views = windows(image, side, stride, c.resolution)
    for start in range(0, len(views), c.batch):
        for map in frozen.live(views[start : start + c.batch]):                                # h w 2D
            for found, patches in zip(halves, map.chunk(2, 2), strict=True):
                cosine = F.normalize(patches, dim=2) @ vectors.to(map.device).T                # h w names
                found.append(resized(best_name(cosine, classes, n).permute(2, 0, 1), (side, side)).softmax(0))
    return [slide(found, image.shape[1:], side, stride, c.resolution).argmax(0) for found in halves]


SET = Option("set", "segmentation", f"how the folder lies, and its classes: {', '.join(labels.SETS)}", scored=False)
TASK = Task(
    "openvocab", "as segmentation's, of val alone; --set says which", open_set, run, wants="maps", metric="miou",
    sides=(512, 80), network=Both, pictures="image, truth, and both predictions",
    options=(TEXT, NAMES, TEMPLATES, SET),
    paper=(Paper("miou", {"l": 24.7}, 512, dict(n_val=2000, n_classes=150)),
           Paper("miou", {"l": 36.9}, 512, dict(n_val=500, n_classes=19))))
