"""
The adapter: what a frozen ViT says on one grid, as maps of strides 4, 8, 16 and 32 pixels, with the image's own detail.

    sampled                  maps, read between their pixels: the definition of deformable attention   Zhu et al. 2021
    DeformableAttention      a query looks at a few places, that it names itself, of each map
    SpatialPrior             convolutions of the image -> maps of strides 4 to 32         ViT-Adapter, Chen et al. 2023
    Extractor                the maps ask the patches of one block
    Adapter                  Features of four blocks, and the images -> four maps

Names of parameters are those of the released file. No injector: what the backbone says never changes.

paper: DINOv3 §6.3.2, App. D.10. Dimension letters: see the top of model.py.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from decoders.fit import BatchNorm
from engine.ranks import Ranks

PLACES = 4      # that a head looks at in each map
COARSEST = 32   # pixels: both sides of an image are a multiple
RATIO = 4       # of the width to what is inside of the convolutional network

# --------------------------------------------------------------------------------
# Deformable attention


def sampled(values, sizes, places, weights):
    """
    sum over maps l, points p of  weights[b,n,a,l,p] values_l[b,a](places[b,n,a,l,p]),  bilinear, 0 outside

    values   B S A E: the maps, one after the other, row by row    sizes  h w of each
    places   B N A L K 2: x, y; 0 and 1 are the outer edges of a map    weights  B N A L K
    returns  B N AE
    """
    (B, _, A, E), N, total = values.shape, places.shape[1], 0
    places, weights = places.transpose(1, 2).flatten(0, 1), weights.transpose(1, 2).flatten(0, 1)  # (B A) N L K ...
    maps = values.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in sizes], 2)
    for level, (map, size) in enumerate(zip(maps, sizes, strict=True)):
        found = F.grid_sample(map.unflatten(2, size), 2 * places[:, :, level] - 1, mode="bilinear",
                              padding_mode="zeros", align_corners=False)                           # (B A) E N K
        total = total + (found * weights[:, None, :, level]).sum(3)
    return total.view(B, A * E, N).transpose(1, 2)


def centres(sizes, device):
    """Of the cells of maps, one after the other, row by row: S 2, x and y in 0 to 1"""
    found = []
    for h, w in sizes:
        y, x = (torch.arange(n, device=device) + 0.5 for n in (h, w))
        found.append(torch.cartesian_prod(y / h, x / w).flip(1))
    return torch.cat(found)


class DeformableAttention(nn.Module):
    """Queries and their places -> what `heads` find in `n_levels` maps.    inner  width of the values"""

    def __init__(self, width, inner, n_levels, heads):
        super().__init__()
        self.heads = heads
        n = heads * n_levels * PLACES
        self.sampling_offsets, self.attention_weights = nn.Linear(width, 2 * n), nn.Linear(width, n)
        self.value_proj, self.output_proj = nn.Linear(width, inner), nn.Linear(inner, width)
        self.start(n_levels)

    def start(self, n_levels):
        """Each head looks in its own direction, one, two, ... cells away, at all alike"""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        ways = torch.stack([angles.cos(), angles.sin()], 1)                                    # A 2
        ways = ways / ways.abs().amax(1, keepdim=True)
        steps = torch.arange(1, PLACES + 1)[:, None]                                           # K 1
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((ways[:, None, None] * steps).expand(-1, n_levels, -1, -1).flatten())
        for x in self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias:
            nn.init.zeros_(x)
        for linear in self.value_proj, self.output_proj:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, queries, places, features, sizes):
        """queries B N D    places  N 2, of the queries    features  B S D: maps of `sizes`    -> B N D"""
        form = self.heads, len(sizes), PLACES
        offsets = self.sampling_offsets(queries).unflatten(2, (*form, 2))                      # B N A L K 2
        weights = self.attention_weights(queries).unflatten(2, (self.heads, -1)).softmax(3).unflatten(3, form[1:])
        cells = torch.tensor([(w, h) for h, w in sizes], device=queries.device)[:, None]       # L 1 2
        values = self.value_proj(features).unflatten(2, (self.heads, -1))                      # B S A E
        return self.output_proj(sampled(values, sizes, places[:, None, None, None] + offsets / cells, weights))

# --------------------------------------------------------------------------------
# The adapter


def convolved(n_in, n_out, stride):
    return [nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), BatchNorm(n_out), nn.ReLU()]


class SpatialPrior(nn.Module):
    """images B 3 H W -> maps B D ., of strides 4, 8, 16, 32"""

    def __init__(self, width, n):
        super().__init__()
        self.stem = nn.Sequential(*convolved(3, n, 2), *convolved(n, n, 1), *convolved(n, n, 1),
                                  nn.MaxPool2d(3, 2, 1))
        self.conv2, self.conv3, self.conv4 = (nn.Sequential(*convolved(a * n, b * n, 2))
                                              for a, b in ((1, 2), (2, 4), (4, 4)))
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Conv2d(k * n, width, 1) for k in (1, 2, 4, 4))

    def forward(self, images):
        c1 = self.stem(images)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(self.conv4(c3))


class DropPath(nn.Module):
    """A branch that some samples do without; which, is drawn for all ranks' batch, so that ranks do not matter"""
    ranks = Ranks()

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or not self.rate:
            return x
        B, (_, *others) = len(x), x.shape
        kept = torch.rand(B * self.ranks.count, device=x.device)[B * self.ranks.rank :][:B] >= self.rate
        return x * kept.view(B, *[1] * len(others)) / (1 - self.rate)


class DepthwiseConv(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.dwconv = nn.Conv2d(n, n, 3, padding=1, groups=n)

    def forward(self, x, sizes):
        """B S n, of maps of `sizes`, each by itself"""
        maps = x.transpose(1, 2).split([h * w for h, w in sizes], 2)
        maps = [self.dwconv(m.unflatten(2, size)).flatten(2) for m, size in zip(maps, sizes, strict=True)]
        return torch.cat(maps, 2).transpose(1, 2)


class ConvFFN(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width // RATIO), nn.Linear(width // RATIO, width)
        self.dwconv = DepthwiseConv(width // RATIO)

    def forward(self, x, sizes):
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), sizes)))


class Extractor(nn.Module):
    """c += attention(c, patches);  c += ConvFFN(c)"""

    def __init__(self, width, drop, heads):
        super().__init__()
        self.query_norm, self.feat_norm, self.ffn_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attn, self.ffn = DeformableAttention(width, width // 2, 1, heads), ConvFFN(width)
        self.drop = DropPath(drop)

    def forward(self, c, sizes, patches, grid):
        c = c + self.attn(self.query_norm(c), centres(sizes, c.device), self.feat_norm(patches), [grid])
        return c + self.drop(self.ffn(self.ffn_norm(c), sizes))


class Interaction(nn.Module):
    def __init__(self, width, drop, heads, n_extra):
        super().__init__()
        self.extractor = Extractor(width, drop, heads)
        if n_extra:
            self.extra_extractors = nn.ModuleList(Extractor(width, drop, heads) for _ in range(n_extra))

    def forward(self, c, *seen):
        for extract in (self.extractor, *getattr(self, "extra_extractors", ())):
            c = extract(c, *seen)
        return c


class Adapter(nn.Module):
    """
    Features of four blocks, shallow first, and the images B 3 H W that they are of -> B D H/k W/k, k = 4, 8, 16, 32.

    width  D, of both    stem  channels of the first convolutions    drop  how often a sample does without a ConvFFN
    heads  of its attention
    raises ValueError for sides that are no multiple of 32
    """

    def __init__(self, width, stem=64, drop=0.3, heads=16):
        super().__init__()
        self.level_embed = nn.Parameter(torch.zeros(3, width))
        self.spm = SpatialPrior(width, stem)
        self.interactions = nn.ModuleList(Interaction(width, drop, heads, n_extra) for n_extra in (0, 0, 0, 2))
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (BatchNorm(width) for _ in range(4))
        self.start()

    def start(self):
        """ViT-Adapter's: linears truncated normal, convolutions by what leaves them"""
        nn.init.normal_(self.level_embed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.start(1)

    def forward(self, features, images):
        H, W = images.shape[2:]
        if H % COARSEST or W % COARSEST:
            raise ValueError(f"Mask2Former: images are {W}x{H} pixels; both sides must be a multiple of {COARSEST}")
        c1, *maps = self.spm(images)
        sizes = [tuple(m.shape[2:]) for m in maps]
        c = torch.cat([m.flatten(2).transpose(1, 2) + e for m, e in zip(maps, self.level_embed, strict=True)], 1)
        for interact, f in zip(self.interactions, features, strict=True):
            c = interact(c, sizes, f.patches.float(), f.grid)                                  # B S D
        c2, c3, c4 = (x.transpose(1, 2).unflatten(2, size)
                      for x, size in zip(c.split([h * w for h, w in sizes], 1), sizes, strict=True))
        maps = self.up(c2) + c1, c2, c3, c4
        resized = partial(F.interpolate, mode="bilinear", align_corners=False)
        norms = self.norm1, self.norm2, self.norm3, self.norm4
        return [norm(m + resized(f.map().float(), m.shape[2:])) for norm, m, f in zip(norms, maps, features,
                                                                                      strict=True)]
