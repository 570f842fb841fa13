"""
VGGT on frozen patches: all frames of a scene at once -> the camera of each, its depths, and how sure they are.

    VGGTConfig         widths and counts
    VGGT               Features of four blocks, of every frame -> cameras, depth, confidence
    Sought             where in the first frame a patch is seen again
    camera_loss        of the cameras' numbers;  depth_loss  of depths, each as sure as it says it is;  loss  all
    Head, OfFrames     the decoder for a backbone, at its start values; both;  recipe  numbers of its training

Frames, F of a scene, have one size. Lengths are in the scene's own unit: the mean distance of all of its points from
the first camera. Poses as numbers: engine/cameras.py. Dimension letters: see the top of model.py.

paper:   DINOv3 §6.3.4, App. D.12; VGGT, Wang et al. 2025
differs: the backbone is frozen, there fine-tuned; blocks are model.py's, with its RoPE and without norms of queries and
         keys; the camera head answers once, and sees the mean patch, too: there it corrects itself four times; no point
         maps of their own, no tracks
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import ops
from decoders.depth import edges
from decoders.dpt import DPT, DPTConfig, blocks
from decoders.fit import Recipe
from engine.sliding import resized
from model import Block, Features, RopeEmbed, Subset, ViTConfig, initialise, rope_tables, set_std

CODES = 9                # numbers of a camera: 3 of its place, 4 of its rotation, 2 of its field of view
WEIGHTS = 5, 5, 5, 25, 25, 25, 25, 2.5, 2.5  # of the errors of those numbers, beside depth's; chosen by eye
SHARP = 20.0             # what cosines of patches are multiplied by
MATCH = "row", "column", "own row", "own column", "weight"
UNSURE = 0.2             # weight of -log confidence, without which none would be sure
SMALL = 384              # below this width of a backbone everything is small


@dataclass(frozen=True)
class VGGTConfig:
    width: int               # D of the backbone
    d: int = 1024            # of the tokens
    heads: int = 16          # A
    pairs: int = 24          # of blocks: one within each frame, one over all of them
    registers: int = 4       # beside the token of the camera
    channels: int = 256      # of the maps of the DPT, and fused
    hidden: int = 32         # before its last layer
    layerscale: float = 0.01  # what that of the blocks starts from
    init_std: float = 0.02   # of the linears' start values
    recompute: str = "full"  # in the backward, what blocks keep: see ops.recomputed
    sought: int = 0          # width in which each patch is sought in the first frame, after half of the pairs; 0: it is
    #                          not; ours, for short trainings

    @property
    def blocks(self):
        return ViTConfig(self.pairs, self.d, self.heads, 4 * self.d, n_registers=self.registers,
                         layerscale=self.layerscale)


def sized(width):
    """As VGGT from SMALL on; below chosen by time"""
    if width >= SMALL:
        return VGGTConfig(width)
    return VGGTConfig(width, 96, 3, 3, 4, 16, 8, layerscale=0.3, init_std=0.07, recompute="none", sought=64)


# paper: App. D.12: rate; the others VGGT's. There a step sees 2 to 24 frames of each scene, and warms up for 8k of 160k
RECIPE = Recipe(lr=1e-4, weight_decay=0.05, batch=64, part=1, warmup=0.05, clip=1.0, undecayed=("token",))


def recipe(width):
    return RECIPE if width >= SMALL else replace(RECIPE, lr=2e-3, batch=4)

# --------------------------------------------------------------------------------
# The network


class VGGT(nn.Module):
    """
    Features of four blocks, tensors B F ... of every frame -> dict of B F ...: cameras 9; depth H W and confidence H W,
    both above 0, as large as 16 patches' grid.    The first frame's camera is the world: see engine/cameras.py

    paper:   VGGT: tokens of camera and registers, one set for the first frame and one for the others; blocks within a
             frame and over all frames in turn, whose outputs stand side by side
    differs: four layers of the backbone are reduced to the tokens' width by a linear: not described
    """
    def __init__(self, c):
        super().__init__()
        self.config, self.width = c, c.width
        self.reduce = nn.Linear(4 * c.width, c.d)
        self.cls_token = nn.Parameter(torch.empty(2, 1, c.d))               # of the first camera, of the others
        self.storage_tokens = nn.Parameter(torch.empty(2, c.registers, c.d))
        self.rope_embed = RopeEmbed(c.blocks)
        self.frame_blocks = nn.ModuleList(Block(c.blocks) for _ in range(c.pairs))
        self.global_blocks = nn.ModuleList(Block(c.blocks) for _ in range(c.pairs))
        self.camera_head = nn.Sequential(nn.LayerNorm(4 * c.d), nn.Linear(4 * c.d, c.d), nn.GELU(),
                                         nn.Linear(c.d, CODES))
        self.depth_norm = nn.LayerNorm(2 * c.d)
        self.sought = Sought(c) if c.sought else None
        for part, std in (self, c.init_std), (self.camera_head, 0.02), (self.sought or nn.Identity(), 0.5):
            set_std(part, std)
        if not self.cls_token.is_meta:
            initialise(self, torch.initial_seed())
        self.depth_head = DPT(DPTConfig(2 * c.d, (c.channels,) * 4, c.channels, c.hidden, n_out=2))

    def see(self, frozen, images):
        """B (F 3) H W uint8, frames of a scene -> Features of each layer, B F ...; one frame of all scenes at a time"""
        frames = zip(*(image.unflatten(0, (-1, 3)) for image in images), strict=True)
        found = [frozen.network(frozen.network_input(list(each)), frozen.layers) for each in frames]
        return [together(layer, lambda tensors: torch.stack(tensors, 1).float()) for layer in zip(*found, strict=True)]

    def forward(self, features):
        found, likeness = self.aggregate(features)
        B, frames = found[0].patches.shape[:2]
        cameras = self.camera_head(torch.cat([found[-1].cls, found[-1].patches.mean(2)], 2))   # B F 9
        cameras = cameras + torch.eye(CODES, device=cameras.device)[3]  # it begins with no rotation
        found = [together([f], lambda tensors: tensors[0].flatten(0, 1)) for f in found]       # (B F) ...
        found = [replace(f, patches=self.depth_norm(f.patches)) for f in found]
        depth, confidence = self.depth_head(found).unflatten(0, (B, frames)).unbind(2)         # B F H W
        sought = {} if likeness is None else dict(likeness=likeness)
        return dict(cameras=cameras, depth=depth.exp(), confidence=1 + confidence.exp(), **sought)

    def aggregate(self, features):
        """-> Features of the DPT's four pairs of blocks, B F ... 2d: what both have said;  likeness, or None"""
        c, (h, w) = self.config, features[0].grid
        patches = self.reduce(torch.cat([f.patches for f in features], 3))                     # B F P d
        if self.sought:
            patches = patches + self.sought.place(middles(h, w, patches.device))
        B, frames = patches.shape[:2]
        own = torch.arange(frames, device=patches.device).clamp(max=1)  # the first frame's tokens, the others'
        prefix = torch.cat([self.cls_token, self.storage_tokens], 1)[own].expand(B, -1, -1, -1)
        x = torch.cat([prefix, patches], 2)                                                    # B F N d
        alone = [x[0] for x in rope_tables(h, w, 1 + c.registers, self.rope_embed.periods, None)]
        over_all = [x.repeat(frames, 1, 1, 1) for x in alone]                                  # (F N) 1 1 E/2
        shape, taps, found, likeness = x.shape[:3], blocks(c.pairs), {}, None
        x = x.flatten(0, 2)                                                                    # (B F N) d
        for k, (within, over) in enumerate(zip(self.frame_blocks, self.global_blocks, strict=True)):
            one = ops.recomputed(c.recompute, within, x, [alone], [Subset([B * frames])] * 2)
            x = ops.recomputed(c.recompute, over, one, [over_all], [Subset([B])] * 2)
            if k in taps:
                both = torch.cat([one, x], 1).unflatten(0, shape)                              # B F N 2d
                cls, registers, patches = both.split([1, c.registers, h * w], 2)
                found[k] = Features(cls[:, :, 0], registers, patches, (h, w))
            if self.sought and k == c.pairs // 2:
                x = x.unflatten(0, shape)
                likeness, flow = self.sought(x[:, :, 1 + c.registers :], h, w)
                x = torch.cat([x[:, :, : 1 + c.registers], x[:, :, 1 + c.registers :] + flow], 2).flatten(0, 2)
        return [found[k] for k in taps], likeness


class Sought(nn.Module):
    """
    Patches of every frame, tokens B F P d, are sought in the first one -> likeness B F P P, logits of where each is;
    flow B F P d, what that adds to a token, by MATCH: the mean place less its own; its own; how sure that is
    """
    def __init__(self, c):
        super().__init__()
        self.place = nn.Linear(2, c.d)
        self.norm, self.project = nn.LayerNorm(c.d), nn.Linear(c.d, c.sought)
        self.flow = nn.Linear(len(MATCH), c.d)

    def forward(self, x, h, w):
        own, x = middles(h, w, x.device), F.normalize(self.project(self.norm(x)), dim=3)
        likeness = SHARP * torch.einsum("bfpd,bqd->bfpq", x, x[:, 0])
        there = likeness.softmax(3)
        at = [there @ own - own, own.expand(*x.shape[:3], 2), there.amax(3, keepdim=True)]
        return likeness, self.flow(torch.cat(at, 3))


def middles(h, w, device):
    """P 2, row and column in -1 to 1"""
    return torch.cartesian_prod(*(((torch.arange(n, device=device) + 0.5) / n * 2 - 1) for n in (h, w)))


def together(features, join):
    """Features, of one grid, as one: each tensor what `join` makes of a list of theirs"""
    return Features(*(join([getattr(f, name) for f in features]) for name in ("cls", "registers", "patches")),
                    features[0].grid)

# --------------------------------------------------------------------------------
# Losses, of one scene


def camera_loss(found, truth):
    """F 9 twice -> mean of the absolute differences, weighed; differs: VGGT has Huber's loss, all alike"""
    return ((found - truth).abs() * found.new_tensor(WEIGHTS)).mean()


def depth_loss(depth, confidence, truth):
    """
    F H W three times, 0 = not known:  mean of c |d - t| - UNSURE log c over what is known;  and, mean over the frames,
    how much d - t changes from one pixel to the next

    differs: VGGT weighs the latter with c, too
    """
    there = truth > 0
    off = torch.where(there, depth - truth, 0)
    each = confidence * off.abs() - UNSURE * confidence.log()
    steps = [edges(*frame, stride=1) for frame in zip(off, there, strict=True)]
    return (each * there).sum() / there.sum().clamp(min=1) + torch.stack(steps).mean()


def sought_loss(likeness, places):
    """
    F P P, places F h w 2, nan = not seen:  mean cross entropy of where the patches of all frames but the first are
    seen in that, shared by the four middles around
    """
    (h, w), places = places.shape[1:3], places[1:].flatten(1, 2)
    known = ~places[:, :, 0].isnan()
    steps = (places[known][:, None] - middles(h, w, places.device)).abs() * places.new_tensor([h, w]) / 2
    shares = (1 - steps).clamp(min=0).prod(2)
    shares = shares / shares.sum(1, keepdim=True)
    return -(shares * likeness[1:][known].log_softmax(1)).sum() / known.sum().clamp(min=1)


def loss(out, truths):
    """Of a part, B F ..., and as many dicts of cameras F 9, depth F H W, places F h w 2: the mean over its scenes"""
    each = []
    for k, truth in enumerate(truths):
        maps = [resized(out[name][k], truth["depth"].shape[1:]) for name in ("depth", "confidence")]
        each.append(camera_loss(out["cameras"][k], truth["cameras"]) + depth_loss(*maps, truth["depth"]))
        if "likeness" in out:
            each[-1] = each[-1] + sought_loss(out["likeness"][k], truth["places"])
    return torch.stack(each).mean()

# --------------------------------------------------------------------------------
# On a backbone


def Head(width):
    return VGGT(sized(width))


class OfFrames(nn.Module):
    """images F 3 H W, normalised: frames of a scene -> what VGGT says of them, F ..."""
    def __init__(self, backbone, head, layers):
        super().__init__()
        self.backbone, self.head, self.layers = backbone, head, layers

    @torch.no_grad()
    def forward(self, images):
        found = [together([f], lambda tensors: tensors[0][None]) for f in self.backbone.layers(images, self.layers)]
        return {name: x[0] for name, x in self.head(found).items()}
