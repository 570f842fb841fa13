"""
The ConvNeXt students of the DINOv3 family: convolutions that were distilled from the 7B ViT, for small hardware.

    ConvNeXtConfig, CONVNEXT_SIZES   the four students                                      DINOv3 §7.2, Fig. 16a
    ConvNeXt                         images -> Features(cls, registers, patches, grid), called like ViT
    resize_map, on_grid              the patches at another grid: that of a ViT, whose stride is 16

Between layers an image is B h w C, so that norms and linears find their channels last; convolutions get the same
memory as a view. Other dimension letters: see the top of model.py; C is the width of a stage here.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

import ops
from model import Features, initialise

STRIDE = 32  # pixels from one patch to the next: the stem's 4, then 2 before each of the other three stages
EPS = 1e-6   # of every LayerNorm; the ViTs have 1e-5


@dataclass(frozen=True)
class ConvNeXtConfig:
    depths: tuple              # [1, 1000]: blocks of each of the four stages
    dims: tuple                # [1, 65536]: their widths C; the last one is D
    layerscale: float = 1e-6   # [0, 100]: what gamma starts from
    init_std: float = 0.02     # [0, 100]: of the start values of linears and convolutions
    in_chans: int = 3          # [1, 1024]: C of the images
    mean: tuple = (0.485, 0.456, 0.406)  # (-1000, 1000): of the images, RGB in [0, 1]; here: LVD-1689M (web)
    std: tuple = (0.229, 0.224, 0.225)   # (0, 1000]: the same: standard deviation

    # what a ViTConfig says too; depth counts what `layers` can name: stages
    patch_size = property(lambda self: STRIDE)
    width = property(lambda self: self.dims[-1])
    depth = property(lambda self: len(self.depths))
    n_registers = property(lambda self: 0)

    def __post_init__(self):
        if not len(self.depths) == len(self.dims) == 4:
            raise ValueError(f"ConvNeXtConfig: depths {self.depths} and dims {self.dims}; write four of each")


CONVNEXT_SIZES = {                                                               # parameters, exactly
    "convnext_t": ConvNeXtConfig((3, 3, 9, 3), (96, 192, 384, 768)),             #  27,820,128
    "convnext_s": ConvNeXtConfig((3, 3, 27, 3), (96, 192, 384, 768)),            #  49,454,688
    "convnext_b": ConvNeXtConfig((3, 3, 27, 3), (128, 256, 512, 1024)),          #  87,566,464
    "convnext_l": ConvNeXtConfig((3, 3, 27, 3), (192, 384, 768, 1536)),          # 196,230,336
}

# --------------------------------------------------------------------------------
# Layers; parameters carry the released checkpoints' names


class Conv(nn.Conv2d):
    """x  B H W C -> B h w C'"""
    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """
    x + gamma * pwconv2(gelu(pwconv1(norm(dwconv(x))))),  where dwconv sees 7x7 of one channel, the rest all channels of
    one place.    x, returns  B h w C    paper: Liu et al. 2022, A ConvNet for the 2020s, §2 and Fig. 4
    """
    def __init__(self, width, layerscale):
        super().__init__()
        self.dwconv = Conv(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.empty(width))
        self.start = layerscale

    def forward(self, x):
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(self.dwconv(x)))))
        return torch.addcmul(x, y, self.gamma)


def downsampling(n_in, width, first):
    """Disjoint 4x4 patches of the image, then a norm; later a norm, then disjoint 2x2 patches of the map."""
    if first:
        return nn.Sequential(Conv(n_in, width, 4, 4), nn.LayerNorm(width, eps=EPS))
    return nn.Sequential(nn.LayerNorm(n_in, eps=EPS), Conv(n_in, width, 2, 2))

# --------------------------------------------------------------------------------
# The network


class ConvNeXt(nn.Module):
    """
    convnext(images)                   images  B C H W -> Features; no registers: B 0 D; the grid is H/32, W/32
    convnext([global, local])          crop groups, one after the other -> a list of Features
    convnext.layers(images, indices)   after the stages named (0 to 3, of stride 4, 8, 16, 32) -> list of Features of
                                       the stage's width; stage 3 through the final norm, the others have none

    masks and noise are taken, as ViT takes them, and ignored: there is no mask token, no RoPE, no stochastic depth.
    Like ViT's, the residual stream has the dtype of the images. Raises ValueError for images whose sides are not whole
    multiples of 32 (the convolutions would leave out the rest), or that have other than `in_chans` channels.

    paper:    DINOv3 §7.2: it has no cls token. The released code's stands in for it: the mean of the last map, through
              the norm that every place of the map gets
    """
    def __init__(self, config):
        super().__init__()
        self.config = config
        widths = pairwise((config.in_chans, *config.dims))                     # before and after each downsampling
        stages = zip(config.depths, config.dims, strict=True)
        self.downsample_layers = nn.ModuleList(downsampling(*w, first=i == 0) for i, w in enumerate(widths))
        self.stages = nn.ModuleList(nn.ModuleList(Block(w, config.layerscale) for _ in range(n)) for n, w in stages)
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.checkpointing = "none"  # the trainer's choice, of ops.RECOMPUTED
        for part in self.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                part.std = config.init_std
        if not self.norm.weight.is_meta:
            initialise(self)

    @property
    def blocks(self):
        """Those of all stages, in order."""
        return [block for stage in self.stages for block in stage]

    def forward(self, images, masks=None, noise=None):
        one = isinstance(images, torch.Tensor)
        features = [self.layers(group, [3])[0] for group in ([images] if one else images)]
        return features[0] if one else features

    def layers(self, images, indices, norm=True):
        """Features after each of these stages, 0-based; norm: those of the last after the final norm"""
        bad = [i for i in indices if not 0 <= i < 4]
        if bad:
            raise ValueError(f"ConvNeXt.layers: no stage {bad[0]}; this network has stages 0 to 3")
        self.check(images)
        x, found = images.permute(0, 2, 3, 1), {}                              # B H W C
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = downsample(x).to(images.dtype)                                 # B h w C
            for block in stage:
                x = ops.recomputed(self.checkpointing, block, x)
            if i in indices:
                found[i] = self.unpack(x, self.norm if norm and i == 3 else nn.Identity())
        return [found[i] for i in indices]

    def unpack(self, x, norm):
        """x  B h w C -> Features"""
        patches = norm(x).flatten(1, 2)                                        # B P C
        return Features(norm(x.mean((1, 2))), patches[:, :0], patches, tuple(x.shape[1:3]))

    def check(self, images):
        """Says what is wrong with the images' shape."""
        C, shape = self.config.in_chans, tuple(images.shape)
        if len(shape) != 4 or shape[1] != C:
            raise ValueError(f"ConvNeXt: images are {shape} but this network wants (batch, {C}, height, width)")
        H, W = shape[2:]
        if H < STRIDE or W < STRIDE:
            raise ValueError(f"ConvNeXt: images are {H}x{W} but one patch is {STRIDE}x{STRIDE}; give it larger images")
        if H % STRIDE or W % STRIDE:
            near = f"{H // STRIDE * STRIDE}x{W // STRIDE * STRIDE}"
            raise ValueError(f"ConvNeXt: images are {H}x{W}, not whole multiples of {STRIDE}; crop or resize to {near}")


def resize_map(features, grid):
    """
    Features with the patches at another grid, bilinear in float32, averaging where the grid becomes coarser.

        patch (i, j) of h w lies at ((i + 0.5)/h, (j + 0.5)/w) of the image, before and after

    grid     h', w'; for images of H x W, (H/16, W/16) is the grid of a ViT: its patches are what a student learns
    returns  Features: patches B (h' w') D, of their own dtype; cls and registers as they are

    paper:   gives none; so the released code resizes its ConvNeXts' maps
    """
    if tuple(grid) == features.grid:
        return features
    resized = F.interpolate(features.map().float(), tuple(grid), mode="bilinear", antialias=True)  # B D h' w'
    patches = resized.flatten(2).transpose(1, 2).to(features.patches.dtype)                        # B P' D
    return Features(features.cls, features.registers, patches, tuple(grid))


def on_grid(backbone, grid):
    """
    The backbone, ViT or ConvNeXt, as a function of crop groups that resizes them to the nearest whole number of its
    patches, and the patches of the first group to `grid`.

    differs: the paper does not say what its ConvNeXts did with crops of 112 px, 3.5 patches; here they see 128 px
    """
    def call(crops, masks=None, noise=None):
        p = backbone.config.patch_size
        sides = [max(1, int(crop.shape[-1] / p + 0.5)) * p for crop in crops]
        first, *rest = backbone([crop if crop.shape[-1] == side else F.interpolate(crop, (side, side), mode="bilinear",
                                antialias=True) for crop, side in zip(crops, sides, strict=True)], masks, noise)
        return [resize_map(first, grid), *rest]
    return call
