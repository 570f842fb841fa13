"""
How many images a second a frozen backbone sees, by every way that is here, beside other libraries: the same weights and
images, in turn; and how far each way's features are from float32's.

    WAYS       {name: (weights on disk, the network) -> images -> cls B D, patches B P D}
    apart      the largest difference of features from float32's, and the smallest cosine
    compare    the rows of one size: one image, and a batch

The weights are invented, with layers as strong as trained ones': what low precision costs released ones is not told.
"""

import copy
import tempfile
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import shapes
import weights
from engine import export
from engine.features import load
from engine.opponents import with_kernels
from engine.timing import medians
from model import SIZES, ViT, build

BASE, OURS, EXACT = "transformers", "ours", "ours, by definitions"
FAITHFUL = 0.9999            # cosine from which on features are float32's
TIMM = dict(s="small", b="base", l="large")
BATCHES = (1, 224), (8, 256)  # images, pixels
SLOW = 3                     # times as long as BASE's for one image: of such a way a batch is not asked
BUDGET = 60                  # seconds of all rounds of one batch, about

# --------------------------------------------------------------------------------
# Ways


def ours(net, bf16=False):
    def run(images):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found = net(images)
        return found.cls, found.patches
    return run


def transformers(folder, net, bf16=False, compiled=False):
    from transformers import AutoModel, logging
    logging.disable_progress_bar()
    theirs = AutoModel.from_pretrained(folder / "hf", attn_implementation="sdpa").eval()
    theirs = theirs.to(torch.bfloat16 if bf16 else torch.float32)
    theirs, first = torch.compile(theirs) if compiled else theirs, 1 + net.config.n_registers

    def run(images):
        tokens = theirs(images.to(torch.bfloat16 if bf16 else torch.float32)).last_hidden_state  # B N D
        return tokens[:, 0], tokens[:, first:]
    return run


def timm(folder, net):
    from timm import create_model
    name = next(f"vit_{TIMM[size]}_patch16_dinov3" for size in TIMM if SIZES[size].width == net.config.width)
    theirs = create_model(name, num_classes=0, depth=net.config.depth, dynamic_img_size=True).eval()
    from safetensors.torch import load_file
    theirs.load_state_dict(load_file(folder / "timm.safetensors"))

    def run(images):
        tokens = theirs.forward_features(images)                                               # B N D
        return tokens[:, 0], tokens[:, theirs.num_prefix_tokens :]
    return run


def onnx(folder, net):
    path = folder / "net.onnx"
    if not path.exists():
        export.write_onnx(path, weights.empty(net.config), iter(net.state_dict().items()), torch.float32, None)
    return export.session(path)


def onnx_int8(folder, net):
    """Weights to a scale a channel; activations to one a tensor, found anew for each."""
    onnx(folder, net)
    from onnxruntime.quantization import QuantType, quantize_dynamic
    with export.quiet():
        quantize_dynamic(folder / "net.onnx", folder / "int8.onnx", per_channel=True,
                         weight_type=QuantType.QInt8, extra_options=dict(MatMulConstBOnly=True))
    return export.session(folder / "int8.onnx")


class Int8Weight(nn.Module):
    """A linear whose weights are bytes with a scale for each output; its products are float32."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.weight = (linear.weight / self.scale).round().to(torch.int8)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight.float() * self.scale, self.bias)


def plain(net):
    """A copy whose linears are nothing but that: a masked bias is multiplied once."""
    net = copy.deepcopy(net)
    for block in net.blocks:
        masked = block.attn.qkv
        block.attn.qkv = nn.Linear(masked.in_features, masked.out_features)
        block.attn.qkv.weight, bias = masked.weight, masked.bias * masked.bias_mask
        block.attn.qkv.bias = nn.Parameter(bias)
    return net


def int8_weights(folder, net):
    net = plain(net)
    for block in net.blocks:
        for module, name in (block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2"):
            setattr(module, name, Int8Weight(getattr(module, name)))
    return ours(net)


def int8_dynamic(folder, net):
    """torch's own: weights to a scale a tensor, activations to one a tensor, found anew for each"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is to be replaced by torchao's, some day
        return ours(torch.ao.quantization.quantize_dynamic(plain(net), {nn.Linear}, dtype=torch.qint8))


WAYS = {
    BASE: transformers,
    "transformers, compiled": partial(transformers, compiled=True),
    "transformers, bf16": partial(transformers, bf16=True),
    "timm": timm,
    OURS: lambda folder, net: ours(net),
    EXACT: lambda folder, net: partial(with_kernels, "off", ours(net)),
    "ours, compiled": lambda folder, net: ours(torch.compile(net)),
    "ours, bf16": lambda folder, net: ours(load(str(folder / "net.safetensors"), precision="bf16"), bf16=True),
    "ours, int8 weights": int8_weights,
    "ours, int8": int8_dynamic,
    "onnxruntime": onnx,
    "onnxruntime, int8": onnx_int8,
}

# --------------------------------------------------------------------------------
# The comparison


def apart(found, exact):
    """
    cls B D and patches B P D of a way, and float32's -> largest difference, smallest cosine of any token
    """
    pairs = [(torch.as_tensor(a).float(), b) for a, b in zip(found, exact, strict=True)]
    return (max((a - b).abs().max().item() for a, b in pairs),
            min(F.cosine_similarity(a, b, dim=-1).min().item() for a, b in pairs))


def pictures(n, side, config):
    """n generated scenes as the network wants them: n 3 side side float32"""
    x = torch.stack([torch.from_numpy(shapes.scene(i, side, 0).image) for i in range(n)]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    return (x / 255 - mean) / std


def save(net, folder):
    for layout, name in ("hf", "hf"), ("timm", "timm.safetensors"), ("nano", "net.safetensors"):
        weights.save_backbone(net, folder / name, layout)


def compare(machine, report, size, config=None, batches=BATCHES):
    """Rows of a ViT. A way that is not installed, or cannot run here, is a row that says so."""
    net = build(lambda: ViT(config or replace(SIZES[size], layerscale=1.0))).eval()
    with tempfile.TemporaryDirectory() as folder:
        folder, ready = Path(folder), {}
        save(net, folder)
        for name, make in WAYS.items():
            try:
                ready[name] = make(folder, net)
            except (ImportError, RuntimeError, ValueError) as error:
                report.add("inference", size=size, way=name, note=str(error).partition("\n")[0][:200])
        for n, side in batches:
            ready = in_turn(machine, report, size, ready, pictures(n, side, net.config))


@torch.inference_mode()
def in_turn(machine, report, size, ways, images):
    """Adds the rows of one batch -> the ways that a larger one is worth asking of"""
    exact = [x.float() for x in ways[EXACT](images)]
    near = {name: apart(way(images), exact) for name, way in ways.items()}             # compiles, too
    rounds = BUDGET / len(ways) / machine.clock(partial(ways[EXACT], images), 1)
    times = medians(machine, ways, [(images,)], int(max(3, min(15, rounds))))
    base = times[BASE if BASE in times else EXACT].seconds
    faithful = [name for name in ways if near[name][1] >= FAITHFUL]
    best = min(faithful, key=lambda name: times[name].seconds)
    for name, t in times.items():
        slower = name == OURS and t.seconds > base
        report.add("inference", size=size, images=f"{len(images)} x {images.shape[-1]} px", way=name,
                   images_per_s=len(images) / t.seconds, spread=t.spread, base_over_this=base / t.seconds,
                   difference=near[name][0], cosine=f"{near[name][1]:.6f}",
                   flag="SLOWER" if slower else "best" if name == best else None)
    return {name: way for name, way in ways.items() if times[name].seconds < SLOW * base}
