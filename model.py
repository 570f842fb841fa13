"""
The DINOv3 vision transformer: patches, registers, axial RoPE, and the projection heads of the pretraining losses.

    ViTConfig, SIZES   the family, tiny to 7B                                       DINOv3 §3.2, §7.1, Tab. 2
    rope_tables        axial rotary position embedding with box jitter              DINOv3 §3.2
    Noise, Packing     stochastic depth on a subset of the samples; crops of different sizes in one sequence
    ViT                images -> Features(cls, registers, patches, grid)
    ProjectionHead     features -> logits over prototypes                           DINOv3 Tab. 2
    initialise         every parameter and buffer, as a function of (seed, its name)
    shard              this rank's rows of a tensor

Dimension letters, here and in every other file:

    B images on this rank   G global crops (2)   L local crops   C H W image   h w patch grid, P = h w   R registers
    N tokens = 1+R+P   D width   A heads   E head width = D/A   F MLP width   K prototypes   M masked patches   S ranks
    T tokens of all crops of a forward, packed
"""

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree

import ops


@dataclass(frozen=True)
class ViTConfig:
    depth: int                 # [1, 1000]: blocks
    width: int                 # [4, 65536]: D
    heads: int                 # [1, 1024]: A
    hidden: int                # [1, 262144]: F, width of the MLP
    ffn: str = "mlp"           # "mlp": GELU; "swiglu": w3(silu(w1 x) * w2 x)
    qkv_bias: bool = True      # its key third is masked out, unless key_bias
    key_bias: bool = False     # the bias of keys too, as in the released recipe of ViT-L on ImageNet-1k
    norm_eps: float = 1e-5     # of all LayerNorms; 1e-6 in that recipe
    local_norm: bool = False   # own final norm for cls and registers of local crops, in training only
    patch_size: int = 16       # [1, 256]: pixels
    n_registers: int = 4       # [0, 1024]: R
    layerscale: float = 1e-5   # [0, 100]: what LayerScale's gamma starts from
    init_std: float = 0.02     # [0, 100]: of the linears' start values
    in_chans: int = 3          # [1, 1024]: C
    mean: tuple = (0.485, 0.456, 0.406)  # (-1000, 1000): of the images, RGB in [0, 1]; here: LVD-1689M (web)
    std: tuple = (0.229, 0.224, 0.225)   # (0, 1000]: the same: standard deviation

    def __post_init__(self):
        if self.ffn not in ("mlp", "swiglu"):
            raise ValueError(f"ViTConfig: ffn is {self.ffn!r}; write 'mlp' or 'swiglu'")
        if self.heads < 1 or self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(f"ViTConfig: width {self.width} over {self.heads} heads; a head needs a multiple of 4")


SIZES = {                                                              # parameters, exactly
    "tiny": ViTConfig(6, 128, 2, 512, layerscale=1.0, init_std=0.07),  # 1,290,624  for tests and laptops
    "s":    ViTConfig(12, 384, 6, 1536),                               #    21,601,152
    "s+":   ViTConfig(12, 384, 6, 1536, "swiglu"),                     #    28,697,472
    "b":    ViTConfig(12, 768, 12, 3072),                              #    85,669,632
    "l":    ViTConfig(24, 1024, 16, 4096),                             #   303,154,176
    "l+":   ViTConfig(24, 1024, 16, 4096, "swiglu"),                   #   403,915,776
    "h+":   ViTConfig(32, 1280, 20, 5120, "swiglu"),                   #   840,633,600
    "7b":   ViTConfig(40, 4096, 32, 8192, "swiglu", qkv_bias=False, local_norm=True),  # 6,716,043,264
}


@dataclass
class Features:
    """What a backbone says of its images, after the final norm (raw channels have outliers: DINOv3 App. A)."""
    cls: torch.Tensor          # B D
    registers: torch.Tensor    # B R D
    patches: torch.Tensor      # B P D, row-major over the grid
    grid: tuple[int, int]      # h, w

    def map(self):
        """The patches as an image: B D h w."""
        return self.patches.transpose(1, 2).unflatten(2, self.grid)


_pytree.register_pytree_node(  # so that FSDP2, before torch 2.12, finds the tensors that its backward hooks belong to
    Features, lambda f: ([f.cls, f.registers, f.patches], f.grid), lambda tensors, grid: Features(*tensors, grid))

# --------------------------------------------------------------------------------
# Rotary position embedding


def rope_tables(h, w, n_prefix, periods, scales):
    """
    Cosines and sines of every token's angles, in float32, once for each entry of `scales`.

        coordinate of patch (i, j) = s ((i + 0.5)/h 2 - 1),  s ((j + 0.5)/w 2 - 1)        in [-s, s]
        angle                      = 2 pi coordinate / period,  rows first, then columns

    periods   E/4, in units of half an image side
    scales    of one or `depth` factors s: box jitter in training; None = 1
    returns   cos, sin, each  len(scales) N 1 1 E/2; the prefix (cls, registers) has angle 0, so it does not turn

    paper:    DINOv3 §3.2, custom RoPE on coordinates of a [-1, 1] box
    differs:  angles and rotation are float32 in training too; the released training path rounds them to bf16
    """
    device = periods.device
    i = (torch.arange(h, device=device, dtype=torch.float32) + 0.5) / h * 2 - 1
    j = (torch.arange(w, device=device, dtype=torch.float32) + 0.5) / w * 2 - 1
    box = torch.stack(torch.meshgrid(i, j, indexing="ij"), dim=-1).view(h * w, 2, 1)         # P 2 1
    angles = (2 * math.pi * box / periods.float()).flatten(1)                                # P E/2
    if scales is None:
        angles = angles[None]                                                                # 1 P E/2
    else:
        angles = torch.as_tensor(scales, dtype=torch.float32, device=device)[:, None, None] * angles
    angles = F.pad(angles, (0, 0, n_prefix, 0))[:, :, None, None]                            # scales N 1 1 E/2
    return angles.cos(), angles.sin()

# --------------------------------------------------------------------------------
# What a forward does with several crop sizes, and what is random in it


@dataclass(frozen=True)
class Noise:
    """
    What is random in the student's forward. All of it is a function of (seed, step, block, sample), never of the rank:
    samples are drawn in `group`s of consecutive samples of the global batch, and a rank keeps those that it holds.
    """
    seed: int
    step: int
    first: int                 # place of this rank's first sample in the global batch
    samples: int               # B
    group: int                 # consecutive samples that stochastic depth draws from together
    drop_path: float = 0.0     # share of samples that skip a branch
    rope_rescale: float = 1.0  # RoPE coordinates are multiplied by a factor log-uniform in [1/rescale, rescale]

    @property
    def groups(self):
        """The groups of samples that this rank holds, or holds some of."""
        return range(self.first // self.group, (self.first + self.samples - 1) // self.group + 1)

    def rope_scales(self, crops, depth):
        """
        One factor for each of this rank's groups and each block, groups depth.

        paper:   DINOv3 §3.2, RoPE-box jittering
        differs: the released code draws one for each rank, which in its recipes holds one group
        """
        draws = [np.random.default_rng([self.seed, self.step, 1, crops, group]).uniform(-1, 1, depth)
                 for group in self.groups]
        return self.rope_rescale ** np.stack(draws)

    def parts(self, n_images):
        """Images of a crop group, view by view, as runs of equal RoPE factors; one run if all are equal."""
        if self.rope_rescale == 1 or len(self.groups) == 1:
            return [n_images]
        edges = np.clip(np.arange(self.groups.start, self.groups.stop + 1) * self.group, self.first,
                        self.first + self.samples)
        return np.diff(edges).tolist() * (n_images // self.samples)

    def kept(self, crops, n_views, depth):
        """Which images of the `crops`-th crop group enter each branch:  depth 2 (n_views B), bool;  and n/kept."""
        size = n_views * self.group
        n_kept = max(int(size * (1 - self.drop_path)), 1)
        masks = []
        for group in self.groups:
            keys = np.random.default_rng([self.seed, self.step, 2, crops, group]).random((depth, 2, size))
            masks.append((keys.argsort(-1).argsort(-1) < n_kept).reshape(depth, 2, n_views, self.group))
        offset = self.first - self.groups.start * self.group
        mask = np.concatenate(masks, axis=-1)[..., offset : offset + self.samples]
        return mask.reshape(depth, 2, -1), size / n_kept

    def draw(self, depth, n_images, n_tokens, device="cpu"):
        """
        All that is random in one forward of crop groups, each of n_images images of n_tokens tokens:

            rope    groups of samples x `depth` factors, for each crop group
            images  of each crop group, in runs of equal factors
            counts  those that enter a branch; block-major, then branch
            rows    where their tokens lie among the packed ones, of all branches in that order
            scales  what each of those rows is multiplied by
        """
        assert not any(n % self.samples for n in n_images), "every crop group holds each sample equally often"
        parts = [self.parts(n) for n in n_images]
        found = dict(rope=[torch.from_numpy(self.rope_scales(i, depth)).float() for i in range(len(n_images))],
                     images=parts)
        if self.drop_path:
            masks = [self.kept(i, n // self.samples, depth) for i, n in enumerate(n_images)]
            starts, rows, scales, counts = np.cumsum([0, *np.multiply(n_images, n_tokens)]), [], [], []
            for block, branch in np.ndindex(depth, 2):
                kept = [np.flatnonzero(mask[block, branch]) for mask, _ in masks]
                for images, start, N, (_, scale) in zip(kept, starts[:-1], n_tokens, masks, strict=True):
                    rows.append((start + images[:, None] * N + np.arange(N)).astype(np.int32).ravel())
                    scales.append(np.full(len(rows[-1]), scale, np.float32))
                edges = [np.cumsum([0, *part]) for part in parts]
                n_kept = [np.diff(np.searchsorted(*each)) for each in zip(kept, edges, strict=True)]
                counts.append(np.concatenate(n_kept).tolist())
            found |= dict(rows=torch.from_numpy(np.concatenate(rows)), scales=torch.from_numpy(np.concatenate(scales)))
            found |= dict(counts=counts)
        return to_device(found, device)


def to_device(x, device):
    """A tensor, or lists and dicts with tensors in them, on a device; the host waits for no copy of pinned memory."""
    if isinstance(x, torch.Tensor):
        return x.to(device, non_blocking=True)
    if isinstance(x, dict):
        return {key: to_device(value, device) for key, value in x.items()}
    return [to_device(value, device) for value in x] if isinstance(x, list) else x


@dataclass
class Subset:
    """The tokens that one branch works on."""
    n_images: list             # of each run of images of equal size and RoPE factors
    rows: torch.Tensor = None  # where they lie among the T packed tokens; None = all of them
    scale: torch.Tensor = None  # what their result is multiplied by, so that its expectation is that of all samples

    def take(self, x):
        return x if self.rows is None else x.index_select(0, self.rows)  # x[rows] would sort them in its backward

    def add(self, x, y, gamma):
        """The residual sum x + gamma y, of the tokens that y is of."""
        if self.rows is None:
            return torch.addcmul(x, y, gamma)
        return x.index_add(0, self.rows, (y * gamma * self.scale).to(x.dtype))


class Packing:
    """
    Crop groups of different sizes as one sequence of tokens, T D: linears and norms see them all at once,
    attention sees each run of images of equal size and RoPE factors as B N.

    grids     h, w of each crop group
    n_images  images in each
    noise     Noise, drawn here and now, or what its draw() returned: ahead of time, and on the device by now
    """
    def __init__(self, config, periods, grids, n_images, noise=None):
        depth, n_prefix = config.depth, 1 + config.n_registers
        self.n_tokens = [n_prefix + h * w for h, w in grids]
        drawn = noise.draw(depth, n_images, self.n_tokens, periods.device) if isinstance(noise, Noise) else noise
        drawn = drawn or dict(rope=[None] * len(grids), images=[[n] for n in n_images])
        tables = [rope_tables(h, w, n_prefix, periods, s if s is None else s.flatten())
                  for (h, w), s in zip(grids, drawn["rope"], strict=True)]  # of group 0 in all blocks, then of the next
        runs = [(pair, run) for pair, images in zip(tables, drawn["images"], strict=True) for run in range(len(images))]
        self.rope = [[tuple(x[(run * depth + i) % len(x)] for x in pair) for pair, run in runs] for i in range(depth)]
        self.subsets = [(Subset(sum(drawn["images"], [])),) * 2] * depth
        if "rows" in drawn:
            n_tokens = [pair[0].shape[1] for pair, _ in runs]
            lengths = [int(np.dot(count, n_tokens)) for count in drawn["counts"]]
            rows, scales = drawn["rows"].split(lengths), drawn["scales"][:, None].split(lengths)
            flat = [Subset(*each) for each in zip(drawn["counts"], rows, scales, strict=True)]
            self.subsets = list(zip(flat[::2], flat[1::2], strict=True))

# --------------------------------------------------------------------------------
# Layers; parameters carry the released checkpoints' names


class MaskedBiasLinear(nn.Linear):
    """Linear whose bias is multiplied by `bias_mask`: 1 for queries and values, 0 for keys."""
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.register_buffer("bias_mask", torch.empty(n_out))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.width
        self.heads = config.heads
        masked = config.qkv_bias and not config.key_bias
        self.qkv = MaskedBiasLinear(D, 3 * D) if masked else nn.Linear(D, 3 * D, bias=config.qkv_bias)
        self.proj = nn.Linear(D, D)

    def forward(self, x, n_images, rope):
        """x  T D    n_images, rope  of each run of images    returns  T D"""
        return self.proj(ops.rope_attention(self.qkv(x), n_images, rope, self.heads))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.width, config.hidden)  # gate
        self.w2 = nn.Linear(config.width, config.hidden)  # up
        self.w3 = nn.Linear(config.hidden, config.width)  # down

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class LayerScale(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.start = config.layerscale
        self.gamma = nn.Parameter(torch.empty(config.width))  # Subset.add multiplies by it


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = SwiGLU(config) if config.ffn == "swiglu" else MLP(config)
        self.ls2 = LayerScale(config)

    def forward(self, x, rope, subsets):
        """x  T D    rope  cos, sin of each run of images    subsets  of the attention, of the MLP    returns  T D"""
        attention, mlp = subsets
        x = attention.add(x, self.attn(self.norm1(attention.take(x)), attention.n_images, rope), self.ls1.gamma)
        return mlp.add(x, self.mlp(self.norm2(mlp.take(x))), self.ls2.gamma)


class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.width, config.patch_size, config.patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)  # B P D


class RopeEmbed(nn.Module):
    """Holds the periods, 100^(2j/(E/2)) for j < E/4, as a buffer, as released files do."""
    def __init__(self, config):
        super().__init__()
        self.register_buffer("periods", torch.empty(config.width // config.heads // 4))

    def _apply(self, fn, recurse=True):
        periods = self.periods
        super()._apply(fn, recurse)
        if self.periods.dtype != torch.float32:  # vit.to(bfloat16) would turn every patch by another angle
            self.periods = periods.to(self.periods.device)
        return self

# --------------------------------------------------------------------------------
# The network


class ViT(nn.Module):
    """
    vit(images)                        images  B C H W -> Features
    vit(images, masks)                 masks  B P bool, True = hidden: the mask token takes the patch's place
    vit([global, local], [masks, None], noise)  several crop groups in one pass -> a list of Features
    vit.layers(images, indices)        after the blocks named (0-based), each through the final norm -> list of Features

    The residual stream has the dtype of the images: float32 images under autocast keep it in float32.
    Raises ValueError for images that are not a whole number of patches, or have other than `in_chans` channels.
    """
    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.width
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.storage_tokens = nn.Parameter(torch.empty(1, config.n_registers, D))
        self.mask_token = nn.Parameter(torch.empty(1, D))
        self.patch_embed = PatchEmbed(config)
        self.rope_embed = RopeEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.local_cls_norm = nn.LayerNorm(D, eps=config.norm_eps) if config.local_norm else None
        self.checkpointing = "none"  # the trainer's choice, of ops.RECOMPUTED
        set_std(self, config.init_std)
        if not self.cls_token.is_meta:
            initialise(self)

    def forward(self, images, masks=None, noise=None):
        one = isinstance(images, torch.Tensor)
        if one:
            images, masks = [images], [masks]
        x, packing, grids = self.embed(images, masks or [None] * len(images), noise)
        for block, rope, subsets in zip(self.blocks, packing.rope, packing.subsets, strict=True):
            x = ops.recomputed(self.checkpointing, block, x, rope, subsets)
        features = self.unpack(x, packing, images, grids)
        return features[0] if one else features

    def layers(self, images, indices, norm=True):
        """Features after each of these blocks, 0-based; norm: after the final norm, too"""
        bad = [i for i in indices if not 0 <= i < self.config.depth]
        if bad:
            raise ValueError(f"ViT.layers: no block {bad[0]}; this network has blocks 0 to {self.config.depth - 1}")
        x, packing, grids = self.embed([images], [None], None)
        found = {}
        for i, (block, rope, subsets) in enumerate(zip(self.blocks, packing.rope, packing.subsets, strict=True)):
            x = block(x, rope, subsets)
            if i in indices:
                found[i] = self.unpack(x, packing, [images], grids, norm)[0]
        return [found[i] for i in indices]

    def embed(self, images, masks, noise):
        """Crop groups -> packed tokens T D, their packing, their grids."""
        tokens, grids = [], []
        for image, mask in zip(images, masks, strict=True):
            grids.append(self.grid(image))
            if mask is not None and mask.shape != (len(image), math.prod(grids[-1])):
                raise ValueError(f"ViT: masks are {tuple(mask.shape)} but the images have "
                                 f"{len(image)} x {math.prod(grids[-1])} patches")
            patches = self.patch_embed(image)                                                  # B P D
            if mask is not None:
                patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
            prefix = torch.cat([self.cls_token, self.storage_tokens], dim=1).expand(len(image), -1, -1)
            tokens.append(torch.cat([prefix.to(image.dtype), patches.to(image.dtype)], dim=1).flatten(0, 1))  # (B N) D
        n_images = [len(image) for image in images]
        packing = Packing(self.config, self.rope_embed.periods, grids, n_images, noise)
        return torch.cat(tokens) if len(tokens) > 1 else tokens[0], packing, grids             # T D

    def unpack(self, x, packing, images, grids, norm=True):
        """Packed tokens -> Features of each crop group, after the final norm."""
        R, features = self.config.n_registers, []
        sizes = [len(image) * N for image, N in zip(images, packing.n_tokens, strict=True)]
        for i, (tokens, image) in enumerate(zip(x.split(sizes), images, strict=True)):
            tokens = tokens.unflatten(0, (len(image), -1))                                     # B N D
            prefix, patches = tokens[:, : 1 + R], tokens[:, 1 + R :]
            own = self.local_cls_norm is not None and self.training and i > 0
            if own:
                prefix, patches = self.local_cls_norm(prefix), self.norm(patches)
            else:
                tokens = self.norm(tokens) if norm else tokens
                prefix, patches = tokens.split([1 + R, tokens.shape[1] - 1 - R], dim=1)
            features.append(Features(prefix[:, 0], prefix[:, 1:], patches, grids[i]))
        return features

    def grid(self, image):
        """h, w of a batch of images; says what is wrong with their shape."""
        p, C, shape = self.config.patch_size, self.config.in_chans, tuple(image.shape)
        if len(shape) != 4 or shape[1] != C:
            raise ValueError(f"ViT: images are {shape} but this network wants (batch, {C}, height, width)")
        H, W = shape[2:]
        if H < p or W < p:
            raise ValueError(f"ViT: images are {H}x{W} but one patch is {p}x{p}; give it larger images")
        if H % p or W % p:
            near = f"{H // p * p}x{W // p * p}"
            raise ValueError(f"ViT: images are {H}x{W}, not whole patches of {p}x{p}; crop or resize to {near}")
        return H // p, W // p


class ProjectionHead(nn.Module):
    """
    Three-layer MLP to a bottleneck of unit length, then prototypes:  x  n D -> logits  n K, of the linears' dtype.

    hidden, bottleneck, n_prototypes    H, Z, K of DINOv3 Tab. 2; the prototypes' weights are not normalised
    init_std, prototype_std             of the start values; the latter is how far apart the first logits are
    """
    def __init__(self, width, hidden, bottleneck, n_prototypes, init_std=0.02, prototype_std=0.02):
        super().__init__()
        layers = [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.last_layer = nn.Linear(bottleneck, n_prototypes, bias=False)
        set_std(self.mlp, init_std)
        set_std(self.last_layer, prototype_std)
        if not self.last_layer.weight.is_meta:
            initialise(self)

    def forward(self, x):
        return self.last_layer(self.bottleneck(x))

    def bottleneck(self, x):
        """n D -> n Z, unit length; all that distillation sends between ranks."""
        x = self.mlp(x)
        return F.normalize(x.float(), dim=-1, eps=1e-6).to(x.dtype)

# --------------------------------------------------------------------------------
# Initialisation


def build(make, device="cpu", seed=0):
    """make() on the meta device, then storage full of NaN, then `initialise`: what it forgets shows at once."""
    with torch.device("meta"):
        module = make()
    return initialise(module.to_empty(device=device), seed)


def set_std(module, std):
    """What `initialise` will draw the weights of the module's linears with."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.std = std


@torch.no_grad()
def initialise(module, seed=0):
    """
    Fills every parameter and buffer, sharded or not, as a function of (seed, its name): the same on any ranks.

    paper:    gives none; these are the released code's: truncated normal of std 0.02 for linears, uniform patches
    returns   module
    """
    for path, part in module.named_modules():
        for leaf, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            tensor.fill_(math.nan)
            full = torch.full(tensor.shape, math.nan, device=tensor.device)
            seed_here = zlib.crc32(f"{seed} {path}.{leaf}".encode())
            initial_value(part, leaf, full, torch.Generator(tensor.device).manual_seed(seed_here))
            own, first = shard(tensor)
            own.copy_(full[first : first + len(own)])
    return module


def shard(x):
    """The rows of a tensor that this rank holds, live, and the number of the first; all, of one that is not sharded."""
    if not isinstance(x, DTensor):
        return x, 0
    inner = x.device_mesh.ndim - 1  # the outer dimension, if there is one, is that of replicas
    ranks, at = x.device_mesh.size(inner), x.device_mesh.get_local_rank(inner)
    return x.to_local(), min(at * -(-len(x) // ranks), len(x))  # as FSDP2 cuts: equal parts, the last ones shorter


def replicated(x):
    """Whether another rank of lower number holds the same rows."""
    return isinstance(x, DTensor) and x.device_mesh.ndim > 1 and x.device_mesh.get_local_rank(0) > 0


def initial_value(part, leaf, x, generator):
    """Fills x, in place, with the start value of the parameter or buffer `leaf` of the module `part`."""
    if isinstance(part, nn.LayerNorm):
        x.fill_(leaf == "weight")
    elif isinstance(part, nn.Conv2d) and not hasattr(part, "std"):  # patches; convnext.py's are drawn like linears
        bound = (part.in_channels * math.prod(part.kernel_size)) ** -0.5
        x.uniform_(-bound, bound, generator=generator)
    elif leaf == "weight":
        nn.init.trunc_normal_(x, std=part.std, generator=generator)
    elif leaf in ("cls_token", "storage_tokens"):
        x.normal_(std=0.02, generator=generator)
    elif leaf in ("bias", "mask_token"):
        x.fill_(0)
    elif leaf == "bias_mask":
        x.fill_(1).chunk(3)[1].fill_(0)  # queries, keys, values
    elif leaf == "gamma":
        x.fill_(part.start)
    elif leaf == "periods":
        x.copy_(100 ** (torch.arange(len(x), device=x.device) / len(x)))  # 100^(2j / (E/2)), len(x) = E/4
