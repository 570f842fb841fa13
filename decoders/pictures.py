"""
Pictures of what decoders answer, for visualize.py.

    decoder_of         --head, of the kind that a mode shows                HEADS
    depth_pictures     image -> metres, near is bright, over a scale        depth_film, of a video
    canopy_map         raster -> metres, a GeoTIFF                          engine/raster.py
    detect_pictures    image -> the boxes that it is sure of
    point_pictures     frames of a scene -> their depths, and all that they show as points in space
    segment_pictures   image -> its classes, and their names; the segments of a Mask2Former, and their scores

Dimension letters: see the top of model.py.
"""

import numpy as np
import torch
import torch.nn.functional as F

from decoders import load_decoder, load_depth
from decoders.depth import Depth
from decoders.detr import Detector
from decoders.linear import OfImages as LinearSegmenter
from decoders.mask2former import OfImages as Mask2Former
from decoders.masks import panoptic
from decoders.vggt import OfFrames
from engine.cameras import decode, matrix_of_fov
from engine.film import redrawn
from engine.images import shown
from engine.metrics import PER
from engine.pictures import STRIP, SURE, clouds, entitled, hues, named, network_input, outlined, side_by_side
from engine.raster import heights
from engine.views import fitted

# what a mode's --head is, what it answers with, its task
HEADS = dict(depth=(Depth, "depth", "depth"), segment=((Mask2Former, LinearSegmenter), "classes", "segmentation"),
             detect=(Detector, "boxes", "detection"), points=(OfFrames, "cameras", "vggt"))
FAINT = 0.2  # share of a scene's points, the least sure, that are left out
WINDOW = 512  # pixels of the windows of a raster, of the released canopy model's training
LEGEND = 5  # strips below a picture of classes


@torch.no_grad()
def depth_pictures(decoder, image, ends=None):
    """
    decoder  decoders.depth.Depth    image  C H W    ends  metres, of the scale; None = the nearest and the farthest
    returns  H W 3 uint8 each, a strip below it: the photo; its depth, near is bright, and the scale in metres, even
             from end to end;  metres, H W
    """
    metres = decoder(network_input(decoder.backbone, image))[None]
    metres = F.interpolate(metres, image.shape[1:], mode="bilinear")[0, 0].cpu().numpy()
    near, far = ends or (metres.min(), metres.max())
    photo, heat = side_by_side(image, 1 - ((metres - near) / max(far - near, 1e-6)).clip(0, 1))
    ramp = np.linspace(1, 0, heat.shape[1])[None].repeat(STRIP // 2, 0)
    bar = side_by_side(image[:, :1].expand(-1, STRIP // 2, -1), ramp)[1]
    return [entitled(np.vstack([photo, np.full_like(bar, 255)]), "image"),
            entitled(np.vstack([heat, bar]), f"{near:.2f} m", right=f"{far:.2f} m")], metres


def decoder_of(mode, c, vit, layers):
    """--head, of a kind that the mode shows. Raises ValueError if it is of another."""
    decoder, (kinds, what, task) = load_decoder(c.head, vit, layers), HEADS[mode]
    if not isinstance(decoder, kinds):
        raise ValueError(f"--head {c.head} answers with no {what}; name the head of a task of {task}")
    return decoder.to(next(vit.parameters()).device)


def detect_pictures(decoder, image, names):
    """
    decoder  decoders.detr.Detector    image  C H W    names  {label, as text: name}
    returns  H W 3 uint8 each, a strip below it: the photo; the boxes that it is sure of;  how many those are
    """
    (found,) = decoder([network_input(decoder.backbone, image)[0]])
    boxes, scores, labels = (found[key].cpu().numpy() for key in ("boxes", "scores", "labels"))
    n, photo = int((scores >= SURE).sum()), shown(image)
    pictures = [x.permute(1, 2, 0).numpy() for x in (photo, named(photo, boxes, scores, labels, names))]
    return [entitled(pictures[0], "image"), entitled(pictures[1], f"{n} of at least {SURE}")], n


@torch.no_grad()
def point_pictures(decoder, images):
    """
    decoder  decoders.vggt.OfFrames    images  F of C H W, of one size: frames of a scene
    returns  rows of H W 3 uint8: each frame and its depth, near is bright; all points, from above and from a side, and
             the cameras, red;  raises ValueError for frames of several sizes
    """
    if len({image.shape for image in images}) > 1:
        sizes = sorted({f"{x.shape[2]}x{x.shape[1]}" for x in images})
        raise ValueError(f"IMAGE: frames of {', '.join(sizes)} pixels; points wants those of one scene, of one size")
    out = decoder(torch.cat([network_input(decoder.backbone, image) for image in images]))
    size = tuple(images[0].shape[1:])
    depth, sure = (F.interpolate(out[name][None], size, mode="bilinear")[0].cpu() for name in ("depth", "confidence"))
    near, far = depth.min(), depth.max()
    rows = [[entitled(x, title) for x, title in zip(side_by_side(image, ((far - d) / (far - near)).numpy()),
                                                    (f"frame {k}", "depth"), strict=True)]
            for k, (image, d) in enumerate(zip(images, depth, strict=True))]
    poses, fov = decode(out["cameras"].double().cpu().numpy())
    known = depth * (sure >= np.quantile(sure, FAINT))
    seen, _ = clouds([shown(image) for image in images], known.numpy(), [matrix_of_fov(x, size) for x in fov], poses)
    return [*rows, [entitled(x.permute(1, 2, 0).numpy(), title)
                    for x, title in zip(seen, ("points from above", "from the right"), strict=True)]]


def depth_film(decoder, film, c):
    """Writes OUT, photo and depth side by side; returns a line. All frames have the scale of the first one."""
    ends, patch = [], decoder.backbone.config.patch_size

    def draw(frame):
        pictures, metres = depth_pictures(decoder, fitted(frame, c.resolution, patch)[0], ends[0] if ends else None)
        ends.append((metres.min(), metres.max()))
        return np.hstack(pictures)
    n, width, height = redrawn(film, c.out, draw)
    near, far = min(near for near, _ in ends), max(far for _, far in ends)
    return f"wrote {c.out}: {n} frames, {width}x{height} pixels; {near:.2f} to {far:.2f} m, on the first one's scale"


def canopy_map(raster, c, vit, layers):
    """Writes OUT, a GeoTIFF of the heights that --head reads off a raster; returns a line"""
    decoder = load_depth(c.head, vit, layers, heights=True).to(next(vit.parameters()).device)
    patch = vit.config.patch_size
    return heights(raster, c.out, decoder, c, -(-(c.resolution or WINDOW) // patch) * patch)


@torch.no_grad()
def segment_pictures(decoder, image, names):
    """
    decoder  a Mask2Former, or a linear head, on its backbone    image  C H W    names  of the classes
    returns  H W 3 uint8 each, strips below it: the photo; its classes, with the largest by name and share; of a
             Mask2Former its segments, with the largest by name and score
    """
    x, size = network_input(decoder.backbone, image), image.shape[1:]
    found, answers = [], decoder(x)
    scores = decoder.semantic(x) if isinstance(decoder, Mask2Former) else \
        F.interpolate(answers, size, mode="bilinear", align_corners=False)
    labels = scores[0].argmax(0).cpu()
    numbers, counts = labels.unique(return_counts=True)
    order = counts.argsort(descending=True).tolist()
    found = [[], [(numbers[k].item(), f"{counts[k] / labels.numel():.0%}") for k in order]]
    pictures = [shown(image), hues(1 + labels)]
    if isinstance(decoder, Mask2Former):
        segments, known = panoptic(answers["logits"][0], answers["masks"][0], size)
        areas = torch.bincount(segments.flatten().cpu(), minlength=len(known) + 1)[1:]
        found.append([(known[k][0], f"{known[k][1]:.2f}") for k in areas.argsort(descending=True).tolist()])
        codes = torch.tensor([0] + [(1 + label) * PER + k for k, (label, _) in enumerate(known)])
        pictures.append(outlined(shown(image), codes[segments.cpu()]))
    return [with_legend(picture.permute(1, 2, 0).numpy().copy(), rows, names)
            for picture, rows in zip(pictures, found, strict=True)]


def with_legend(picture, rows, names):
    """[(class, words)] -> below a picture LEGEND strips in the classes' colours, the first of them"""
    for k in range(LEGEND):
        label, words = rows[k] if k < len(rows) else (None, "")
        colour = (255,) * 3 if label is None else hues(torch.tensor([[1 + label]]))[:, 0, 0].tolist()
        picture = entitled(picture, "" if label is None else names[label], colour, words)
    return picture
