"""
What turns frozen patches into an answer for every pixel: one decoder a file, chosen by --decoder. A task knows none of
them, and a decoder no task. One that learns from stored features is a module with

    stride(side)                windows of this side lie so far apart
    windows(image, side)        what it wants the network to see of an image -> views; those of frozen.maps
    Head(width, n_out)          a head, for parameters from a file;  width
    fit(kind, maps, truths, n_out, loss_of, c, device)    -> a head; kind: segmentation, depth
    peak(kind, c)               the learning rate that it took
    head.predict(views)         maps of an image's views -> n_out h w each, for sliding.slide to put together

one that learns from those of new views, in fit.py, is a module with

    Head(width)                 Features of four blocks -> B n_out h w;  width
    sized(width).n_out          how many
    layers_of(config, layers)   which blocks, of a backbone; those named, or as released
    recipe(width, relative)     numbers of its training

one whose answers are masks, such a module with

    trained(source, order, n_out, per, frozen, ranks)    -> a head, what is known of it
    stride(side)                                         of windows, at test

one whose answers are boxes has

    Head(width, n_out, windows, n_layers), layers_of, as those;  outputs(config)    what its file says of it
    STAGES                                               numbers of its training, by name

load_decoder reads released ones, and those that evaluate.py --out has kept: images in, answers out.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import torch

from decoders import depth, detr, dpt, linear, mask2former, vggt
from weights import File, open_pth, open_safetensors, take

DECODERS = dict(linear=linear, dpt=dpt, mask2former=mask2former, detr=detr, vggt=vggt)
BACKBONES = "segmentation_model.0.backbone.", "backbone."  # what lies in a file beside the decoder
FAR = dict(dpt=100.0, canopy=96.0, linear=10.0)            # metres, of the last bin, as released
MASKS = "segmentation_model.0.level_embed"                  # is in a file of a Mask2Former alone
NEAR = 0.001                                               # metres, of the first


def load_decoder(path, backbone, layers=None, depth_range=None, n_windows=None):
    """
    path         a file of a decoder, .pth or .safetensors: a DPT of depth or canopies, a Mask2Former, a detector, a
                 linear head of depth or segmentation, a classifier, a VGGT. What it is, and all sizes, its tensors say
    backbone     a ViT of weights.load_backbone
    layers       blocks that it sees, 0-based; None: as released
    depth_range  metres, nearest and farthest bin; None: as released
    n_windows    of a detector, per side; None: as its file says, or as released: 2 for ViT-L+, 3 for others
    returns      a module in eval mode: images B 3 H W, normalised -> metres B h' w', logits B n h w, or logits B n;
                 a Mask2Former: dict(logits, masks) of its queries, and from `semantic` scores B n H W;
                 a detector: images C H W in a list -> dict(scores, labels, boxes) of each;
             a VGGT: frames of one scene, F 3 H W -> dict(cameras F 9, depth F H W, confidence F H W)
    raises       ValueError: no such file, of no known decoder, tensors that do not fit, by name
    """
    path = Path(path)
    stored, about = read(path)
    file = File(path, about.get("outputs", ""), backbone.config, stored, [])
    for mark, load in LOADERS.items():
        if mark in file.stored:
            option = n_windows if load is load_detr else depth_range
            return load(file, backbone, layers, option).eval()
    first = ", ".join(list(file.stored)[:3]) or "no tensors"
    raise ValueError(f"{path} is no decoder: it has {first}, ...; wanted one of {', '.join(LOADERS)}")


def load_depth(path, backbone, layers, heights=False):
    """As load_decoder, of depth alone, or of heights of canopies; raises ValueError for others"""
    found, what = load_decoder(path, backbone, layers), "heights" if heights else "depth"
    if not isinstance(found, depth.Depth) or found.heights != heights:
        raise ValueError(f"{path} answers with no {what}; name a head of {'canopies' if heights else what}")
    return found


def read(path):
    """{name: Stored} of the decoder alone, without what wrappers put before the names; what evaluate.py says of it"""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name the file of a decoder, .pth or .safetensors")
    stored = {}
    about = (open_safetensors if path.suffix == ".safetensors" else open_pth)(path, stored)
    if all(name.startswith("module.") for name in stored):
        stored = {name.removeprefix("module."): x for name, x in stored.items()}
    stored = {name: x for name, x in stored.items() if not name.startswith(BACKBONES)}
    wrapper = "" if MASKS in stored else "segmentation_model.1."  # there, 0 is an adapter
    return {name.removeprefix(wrapper): x for name, x in stored.items()}, about


def names_in(path):
    """{label, as text: name} of what a detector of ours answers; of a released file, which has none, nothing"""
    _, about = read(Path(path))
    return json.loads(about.get("said", "{}")).get("names", {})


def fits(file, width, backbone, layers):
    """Raises ValueError for a decoder of another backbone."""
    D, depth = backbone.config.width, backbone.config.depth
    if width != D:
        raise ValueError(f"{file.path} is for a backbone of width {width}, this one has {D}; name the one that it was "
                         "trained on")
    if any(not 0 <= i < depth for i in layers):
        raise ValueError(f"{file.path}: layers {', '.join(map(str, layers))}; this backbone has blocks 0 to "
                         f"{depth - 1}")


def load_dpt(file, backbone, layers, depth_range):
    if "classes" in file.layout:
        raise ValueError(f"{file.path} answers with {file.layout}, which only evaluate.py --task geobench_seg reads")
    shapes = {name: x.shape for name, x in file.stored.items()}
    c = dpt.read_config(file.path, shapes)
    layers = dpt.layers_of(backbone.config, layers, c.class_token)
    fits(file, c.width, backbone, layers)
    with torch.device("meta"):
        head = dpt.DPT(c)
    bins, least, far = (depth.mixed, 1e-8, FAR["canopy"]) if c.class_token else (depth.evenly, 0.1, FAR["dpt"])
    bins = bins(*(depth_range or (NEAR, farthest(file) or far)), c.n_out)
    return depth.Depth(backbone, take(head, file), layers, bins, least, heights=c.class_token)


def farthest(file):
    """Metres, of a decoder of depth that evaluate.py has kept; None for others"""
    said = re.fullmatch(r"\d+ bins to ([\d.]+) m", file.layout)
    return said and float(said[1])


def of_one_name(stored):
    """{name: Stored} of a detector's file, which may have some tensors again under a second name"""
    again = "transformer.decoder."
    return {name.removeprefix(again) if name.startswith((again + "class_embed", again + "bbox_embed")) else name: x
            for name, x in reversed(stored.items())}


def load_detr(file, backbone, layers, n_windows):
    stored, D = of_one_name(file.stored), backbone.config.width
    n_windows = n_windows or (2 if D == 1024 and not file.layout else None)
    c = detr.read_config(file.path, {name: x.shape for name, x in stored.items()}, file.layout, n_windows)
    layers = detr.layers_of(backbone.config, layers)
    if c.width == len(layers) * D:
        c = replace(c, windows=0)
    fits(file, c.width // (len(layers) * (1 + (c.windows > 0))), backbone, layers)
    with torch.device("meta"):
        head = detr.DETR(c)
    return detr.Detector(backbone, take(head, file._replace(stored=stored), strange=print), layers)


def load_linear(file, backbone, layers, depth_range):
    of_depth, far = "conv_depth.weight" in file.stored, farthest(file)
    file, (n_out, width) = linear.renamed(file)
    layers = layers or [backbone.config.depth - 1]
    whole = width // len(layers) == 2 * backbone.config.width  # the class token beside each patch
    fits(file, width // (len(layers) * (1 + whole)), backbone, layers)
    with torch.device("meta"):
        head = linear.Head(width, n_out, norm="norm.weight" in file.stored)
    head = linear.OfFeatures(take(head, file), whole)
    if "heights" in file.layout:
        bins = depth.mixed(*(depth_range or (NEAR, FAR["canopy"])), n_out)
        return depth.Depth(backbone, head, layers, bins, 1e-8, heights=True)
    if of_depth or far:
        bins = depth.evenly(*(depth_range or (NEAR, far or FAR["linear"])), n_out)
        return depth.Depth(backbone, head, layers, bins, 0.1)
    return linear.OfImages(backbone, head, layers)


def load_mask2former(file, backbone, layers, depth_range):
    c = mask2former.read_config(file.path, {name: x.shape for name, x in file.stored.items()})
    layers = layers or mask2former.blocks(backbone.config.depth)
    fits(file, c.width, backbone, layers)
    with torch.device("meta"):
        head = mask2former.Mask2Former(c)
    return mask2former.OfImages(backbone, take(head, file), layers)


def load_vggt(file, backbone, layers, depth_range):
    width = file.stored["reduce.weight"].shape[1] // 4
    layers = dpt.layers_of(backbone.config, layers)
    fits(file, width, backbone, layers)
    with torch.device("meta"):
        head = vggt.Head(width)
    return vggt.OfFrames(backbone, take(head, file), layers)


def load_classifier(file, backbone, layers, depth_range):
    n_out, width = file.stored["weight"].shape
    fits(file, width // 2, backbone, [])
    with torch.device("meta"):
        head = torch.nn.Linear(width, n_out)
    return linear.Classifier(backbone, take(head, file))


LOADERS = {MASKS: load_mask2former, "transformer.enc_output.weight": load_detr,
           "global_blocks.0.norm1.weight": load_vggt,
           "reassemble_blocks.projects.0.conv.weight": load_dpt, "conv.weight": load_linear,
           "conv_depth.weight": load_linear, "linear.weight": load_linear, "weight": load_classifier}
