"""
DPT: the patches of four blocks, each as a map of its own size, fused from coarse to fine; bins of depth for each pixel.

    DPTConfig     widths; `class_token`: the form of the released canopy model
    Reassemble    patches of four blocks -> maps of 4, 2, 1 and 1/2 times the grid
    Fusion        a coarse map and the next finer one -> twice as large
    DPT           Features of four blocks -> n_out h' w'
    blocks        which four; layers_of, of a backbone
    sized         the widths and bins for a backbone; recipe, the numbers of its training

Names of parameters are those of the released files. Their layers, and the bins, see depth.py.

paper: DINOv3 App. D.11; D.13 for canopies. Ranftl et al. 2021. Dimension letters: see the top of model.py.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from decoders.fit import BatchNorm, Recipe


@dataclass(frozen=True)
class DPTConfig:
    width: int                     # D
    channels: tuple = (1024,) * 4  # of the maps, shallow first; 2048 each for 7B
    fused: int = 512               # d
    hidden: int = 32               # before the last layer
    n_out: int = 256               # bins, or classes
    class_token: bool = False      # mixed into every patch; then units have biases, and nothing is normalised first
    dropout: float = 0.0           # before the last layer; 0.05 in the paper


SMALL = 384              # below this width of a backbone everything is small

# differs: the paper has no DPT of absolute depth; batch, rate and shape of NYU's linear head, one rate for all sizes
RECIPE = Recipe(lr=1e-3, weight_decay=1e-4, batch=16, betas=(0.9, 0.99), warmup=0.1, clip=35)


def sized(width):
    """As released from 1024 on; below chosen by time: most of a small one's goes to the bins of each pixel"""
    for least, channels, fused, bins in (4096, 2048, 512, 256), (1024, 1024, 512, 256), (SMALL, 256, 256, 256), \
            (0, 32, 32, 64):
        if width >= least:
            return DPTConfig(width, (channels,) * 4, fused, n_out=bins, dropout=0.05)


# paper: App. D.11, at 768 x 1024 pixels; 12,000 steps of warm-up, of the 160,000 that Depth Anything V2 trains
# differs: batch, weight decay, betas and clip are not stated there; these are RECIPE's
SYNTHMIX = Recipe(lr=1e-3, weight_decay=1e-4, batch=16, betas=(0.9, 0.99), warmup=0.075, power=3.5, clip=35)


def recipe(width, relative=False, class_token=False):
    """
    RECIPE of absolute depth, SYNTHMIX of relative; of a small backbone with small steps, which one core can take. The
    form with a class token has no BatchNorm: at 3e-3 it stays at the median now and then (LOG.md).
    """
    found = SYNTHMIX if relative else RECIPE
    return found if width >= SMALL else replace(found, lr=3e-4 if class_token else 3e-3, batch=4)


def conv(n_in, n_out, side, bias=True):
    """A convolution that keeps the size; its name has one word more, as in the files"""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(n_in, n_out, side, padding=side // 2, bias=bias)))


def doubled(x):
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class Reassemble(nn.Module):
    def __init__(self, c):
        super().__init__()
        if c.class_token:
            self.readout_projects = nn.ModuleList(nn.Sequential(nn.Linear(2 * c.width, c.width), nn.GELU())
                                                  for _ in c.channels)
        else:
            self.batchnorm_layers = nn.ModuleList(BatchNorm(c.width) for _ in c.channels)
        self.projects = nn.ModuleList(conv(c.width, n, 1) for n in c.channels)
        first, second, _, last = c.channels
        self.resize_layers = nn.ModuleList([
            nn.ConvTranspose2d(first, first, 4, stride=4), nn.ConvTranspose2d(second, second, 2, stride=2),
            nn.Identity(), nn.Conv2d(last, last, 3, stride=2, padding=1)])
        self.class_token = c.class_token

    def forward(self, features):
        """Features of four blocks -> B P# h# w#: 4, 2, 1, 1/2 times the grid"""
        found = []
        for i, (f, project, resize) in enumerate(zip(features, self.projects, self.resize_layers, strict=True)):
            if self.class_token:
                tokens = torch.cat([f.patches, f.cls[:, None].expand_as(f.patches)], dim=2)    # B P 2D
                x = self.readout_projects[i](tokens).transpose(1, 2).unflatten(2, f.grid)      # B D h w
            else:
                x = self.batchnorm_layers[i](f.map())
            found.append(resize(project(x)))
        return found


class Unit(nn.Module):
    """x + conv2(relu(conv1(relu(x))))"""

    def __init__(self, d, bias):
        super().__init__()
        self.conv1, self.conv2 = conv(d, d, 3, bias), conv(d, d, 3, bias)

    def forward(self, x):
        return x + self.conv2(self.conv1(x.relu()).relu())


class Fusion(nn.Module):
    """The map so far, and the next finer one, if there is one -> twice as large"""

    def __init__(self, d, bias, alone):
        super().__init__()
        self.project = conv(d, d, 1)
        if not alone:
            self.res_conv_unit1 = Unit(d, bias)
        self.res_conv_unit2 = Unit(d, bias)

    def forward(self, x, finer=None):
        if finer is not None:
            if finer.shape != x.shape:  # of an odd grid
                finer = F.interpolate(finer, x.shape[2:], mode="bilinear", align_corners=False)
            x = x + self.res_conv_unit1(finer)
        return self.project(doubled(self.res_conv_unit2(x)))


class Bins(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head = nn.Sequential(OrderedDict({
            "0": nn.Conv2d(c.fused, c.fused // 2, 3, padding=1), "1": nn.UpsamplingBilinear2d(scale_factor=2),
            "2": nn.Conv2d(c.fused // 2, c.hidden, 3, padding=1), "3": nn.ReLU(), "dropout": nn.Dropout2d(c.dropout),
            "4": nn.Conv2d(c.hidden, c.n_out, 1)}))

    def forward(self, x):
        return self.head(x)


class DPT(nn.Module):
    """Features of four blocks, shallow first -> B n_out 16h' 16w', where h' w' are h w, rounded up to even numbers"""

    def __init__(self, c):
        super().__init__()
        self.width = c.width
        self.reassemble_blocks = Reassemble(c)
        self.convs = nn.ModuleList(conv(n, c.fused, 3, bias=False) for n in c.channels)
        self.fusion_blocks = nn.ModuleList(Fusion(c.fused, c.class_token, alone=i == 0) for i in range(4))
        self.project = None if c.class_token else conv(c.fused, c.fused, 3)
        self.conv_depth = Bins(c)

    def forward(self, features):
        maps = [change(x) for change, x in zip(self.convs, self.reassemble_blocks(features), strict=True)]
        x = self.fusion_blocks[0](maps[3])
        for fuse, finer in zip(self.fusion_blocks[1:], maps[2::-1], strict=True):
            x = fuse(x, finer)
        return self.conv_depth(x if self.project is None else self.project(x).relu())


def Head(width, class_token=False):
    """The DPT for a backbone of that width"""
    return DPT(replace(sized(width), class_token=class_token))


@torch.no_grad()
def start(head, shares):
    """Until it has learned more it answers with about these shares of its bins, n_out, for every pixel"""
    last = head.conv_depth.head[-1]
    nn.init.normal_(last.weight, std=0.01)
    last.bias.copy_(shares)


def blocks(depth, class_token=False):
    """The four blocks, 0-based, of a backbone of that depth, as released; of any other depth evenly, to the last"""
    if depth == 24 and not class_token:
        return [4, 11, 17, 23]
    return [max(i * depth // 4 - 1, 0) for i in (1, 2, 3, 4)]


def layers_of(config, layers, class_token=False):
    """The blocks that it sees of a backbone: those, or as released. Raises ValueError if a DPT cannot see them."""
    if hasattr(config, "dims"):
        raise ValueError("a DPT sees four blocks of one width and grid; a ConvNeXt has stages of several: name a ViT")
    if layers and len(layers) != 4:
        raise ValueError(f"--layers {','.join(map(str, layers))}: a DPT sees four blocks; name four, or none")
    return layers or blocks(config.depth, class_token)


def read_config(path, shapes):
    """The configuration of a file, by the shapes of its tensors. Raises ValueError if they are of no DPT."""
    need = [f"reassemble_blocks.projects.{i}.conv.weight" for i in range(4)]
    need += ["convs.0.conv.weight", "conv_depth.head.4.weight"]
    lacking = [name for name in need if len(shapes.get(name, ())) != 4]
    if lacking:
        raise ValueError(f"{path}: {lacking[0]} is {shapes.get(lacking[0], 'missing')}, wanted one of 4 dimensions")
    *maps, fused, (n_out, hidden, *_) = (shapes[name] for name in need)
    return DPTConfig(maps[0][1], tuple(shape[0] for shape in maps), fused[0], hidden, n_out,
                     "reassemble_blocks.readout_projects.0.0.weight" in shapes)
