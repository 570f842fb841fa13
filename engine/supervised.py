"""
The same network trained on labels: what one of the same size, crops and steps without them stands beside.

    python -m engine.supervised --data PHOTOS/train --steps 2500 --out RUN      options and recipes of train.py

Cross-entropy of a linear layer on the class tokens of both global crops, AdamW, the recipe's rate along a cosine to 0.
RUN/teacher.safetensors is the backbone, for all commands that take weights. Dimension letters: see the top of model.py.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import Batches, colour_batch, loader
from engine import config as command_line
from engine.channels import reader
from engine.ranks import count_workers
from engine.sources import open_source
from model import ViT, build, set_std, to_device
from recipes import configure
from weights import save_backbone


def train(c):
    """Trains on one device, writes the backbone -> the last loss, nats.    raises  ValueError: an image has no label"""
    source, device = open_source(c.data, c.n_shapes, c.seed, reader(c, c)), command_line.choose_device(c.device)
    batches = Batches(replace(c, n_local=0), source, 0, c.batch)
    network = build(lambda: make(c, len(source.classes)), device, c.seed)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=c.weight_decay)
    steps = loader(batches, range(c.steps), count_workers(c.workers))
    for step, batch in enumerate(bar := tqdm(steps, "labels", c.steps, leave=False, disable=None)):
        for group in optimizer.param_groups:
            group["lr"] = c.lr * c.lr_factor * min((step + 1) / (c.lr_warmup + 1), half_cosine(step / c.steps))
        labels = torch.tensor([source.label(i) for i in batch["indices"].tolist()], device=device)
        crops = colour_batch(to_device(dict(global_crops=batch["global_crops"]), device) | dict(
            colours=batch["colours"][:1]), c)["global_crops"]                                    # (G B) C H W
        loss = F.cross_entropy(network["head"](network["backbone"](crops).cls), labels.repeat(2))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    save_backbone(network["backbone"], Path(c.out, "teacher.safetensors"), "nano", dict(size=c.size, step=c.steps))
    return loss.item()


def make(c, n_classes):
    networks = nn.ModuleDict(dict(backbone=ViT(c.vit), head=nn.Linear(c.vit.width, n_classes)))
    set_std(networks["head"], c.vit.init_std)
    return networks


def half_cosine(t):
    return (1 + math.cos(math.pi * t)) / 2


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip())
        return
    c = configure(argv)
    print(f"last loss {train(c):.3f}; wrote {c.out}/teacher.safetensors")


if __name__ == "__main__":
    command_line.run(main)
