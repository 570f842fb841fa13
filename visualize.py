"""
Look at frozen patch features.    paper: DINOv3 §6.1.1    Dimension letters: see the top of model.py.

    python visualize.py pca shapes:3 shapes:8 --weights runs/tiny --out pca.png       generated images, files, a folder
    python visualize.py pca PHOTOS --weights runs/s --out pca.png --resolution 512 --foreground 0.5
    python visualize.py similarity dog.jpg --weights runs/s --out dog.png --point 0.3,0.6 --layers 8
    python visualize.py attention dog.jpg --weights runs/s --out heads.png        photo, mean, head 0, 1, ... by row
    python visualize.py outliers dog.jpg --weights runs/s --out norms.png     by block: norms of patches, of channels
    python visualize.py explore dog.jpg cat.jpg --weights runs/s --out explore.html     a page: cosines to any patch
    python visualize.py text dog.jpg --weights runs/words --prompts "a dog; grass; sky" --out dog.png   or .html: a page
    python visualize.py depth PHOTOS --weights runs/s --head heads/head.safetensors --out depth.png   .html; FILM: .mp4
    python visualize.py segment PHOTOS --weights runs/s --head heads/head.safetensors --out masks.png  classes, segments
    python visualize.py detect PHOTOS --weights runs/s --head heads/head.safetensors --out boxes.png   or .html: a page
    python visualize.py points FRAMES --weights runs/s --head heads/head.safetensors --out points.png   of one scene
    python visualize.py canopy IN.tif --weights SAT-L --head CHMv2 --out OUT.tif    heights, in IN's coordinates
    python visualize.py pca AREA.tif --weights runs/four --out area.png --bands 4,3,2    of more channels these show
    python visualize.py curves runs/a runs/b --out curves.png     losses and meters over the steps; needs no weights
    python visualize.py gram dog.jpg --weights runs/s --weights runs/s-gram --out gram.png     similarities in both
    python visualize.py resolutions dog.jpg --weights runs/s --sizes 256,512,1024 --out sizes.png     one basis for all
    python visualize.py training runs/s --out training.gif     PCA and similarity over the steps that it has kept

    patch_features       images of any size -> maps of patches
    pca_picture          maps -> colours, one basis for all of them            DINOv2 Fig. 1
    similarity_picture   map, point -> cosines to the patch under the point    DINOv3 Fig. 3
    outliers             image -> norms of patches and of channels, by block          DINOv3 App. A
    depth, segment, detect, points, canopy   what a decoder answers            decoders/pictures.py
    text_pictures        image, prompts -> cosines of patches and words, and the nearest words      dino.txt
    attention_picture    image -> what a token attends to, each head           Caron et al. 2021, Fig. 1; attention.py
    gram_picture         two maps -> their cosines to some patches, what differs      DINOv3 Fig. 10; comparisons.py
    sizes_picture        image at several sizes -> colours in one basis, consistency       DINOv3 Fig. 4, 17
    training_frames      a run's kept networks -> a frame for each                    DINOv3 §4.1

Why does my PCA look wrong?
    coarse              a colour is a patch, 16 pixels: --resolution 1024; papers show larger inputs, not upsampling
    noise               images want the mean and std of training: our files carry theirs; a .pth is taken for web images
    colours disagree    every command fits its own basis: name all images in one, and a colour means one thing
    background is loud  component 1 often is the object itself: --foreground 0.5 colours that alone
    all is shifted      class token and registers come first, 1 + R of them: take features.patches, not x[:, 1:]
"""

import math
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import shapes
from decoders import names_in
from decoders.adapter import COARSEST
from decoders.pictures import (
    HEADS,
    canopy_map,
    decoder_of,
    depth_film,
    depth_pictures,
    detect_pictures,
    point_pictures,
    segment_pictures,
)
from dinotxt import ask, load_dinotxt
from engine import comparisons
from engine import config as command_line
from engine.attention import attention_row
from engine.channels import of_run, read_bands, reader
from engine.curves import draw, find_runs
from engine.explore import gallery, page
from engine.film import is_film
from engine.images import EXTENSIONS, ImageConfig, resize, shown
from engine.pictures import entitled, hues, network_input, side_by_side
from engine.sources import open_source
from losses import gram_loss
from recipes import saved_config
from sets.pairs import lines as lines_of
from sets.prompts import LABELS
from weights import load_backbone, rearranged

MODES = dict(pca=".png", similarity=".png", attention=".png", explore=".html", outliers=".png", curves=".png",
             gram=".png", resolutions=".png", text=".png .html", training=".gif",
             depth=".png .html .mp4", segment=".png", points=".png", detect=".png .html", canopy=".tif")  # of OUT
GUTTER = 4  # white pixels between pictures


@dataclass(frozen=True)
class VisualizeConfig(ImageConfig):
    weights: str = ""          # a run's folder, or a weights file; gram: twice, of two networks
    size: str = ""             # s, b, ...: of a .pth file, which does not say
    head: str = ""             # depth, segment, detect, points, canopy: a decoder's file, evaluate.py's or released
    out: str = ""              # the .png to write, for explore the .html; its folder is made
    resolution: int = 0        # [0, 16384]: pixels of the short side, 0 = its own, more = finer; canopy: of windows
    foreground: float = 0.0    # [0, 1): pca: patches above this share of component 1's range are the object; 0 = off
    layers: str = ""           # blocks, 0-based, as in 3,5: side by side; ConvNeXt, attention: one; empty = the last
    prompts: str = ""          # text: what to look for, as in "a dog; grass; sky"
    names: str = ""            # segment: a file of the classes' names, one a line; empty = those of sets that are known
    point: tuple = (0.5, 0.5)  # [0, 1): similarity, attention: x,y, shares of the sides; attention without: class token
    sizes: str = "256,512,1024,2048"  # resolutions: pixels of the short side, rising


def find_images(words):
    """IMAGE... of the command line -> one name for each image; a folder gives the images that lie in it, sorted."""
    names = []
    for word in words:
        path = Path(word)
        if not path.exists() and not (word.startswith("shapes:") and word[7:].isdecimal()):
            raise ValueError(f"IMAGE {word} does not exist; name files, a folder, or shapes:INDEX, as in shapes:7")
        names += sorted(str(p) for p in path.iterdir() if p.suffix.lower() in EXTENSIONS) if path.is_dir() else [word]
    if not names:
        raise ValueError(f"IMAGE: none in {' '.join(words) or 'the command'}; name files, a folder, or shapes:INDEX")
    return names


def cropped(image, resolution, patch_size, name="image"):
    """C H W uint8 -> its short side resized to `resolution` (0 = as it is), its middle cut to whole patches."""
    H, W = image.shape[1:]
    height, width = (round(side * resolution / min(H, W)) if resolution else side for side in (H, W))
    h, w = height // patch_size * patch_size, width // patch_size * patch_size
    if not h or not w:
        raise ValueError(f"{name}: {width}x{height} is less than one patch; write --resolution {patch_size} or more")
    if (height, width) != (h, w):
        tqdm.write(f"{name}: {width}x{height} cropped to {w}x{h}, whole patches of {patch_size}x{patch_size}")
    image = resize(image, height, width)                        # of the same size: nothing changes
    return image[:, (height - h) // 2 :, (width - w) // 2 :][:, :h, :w]


def load_photos(names, resolution, patch_size, read):
    """The images that can be read and hold a patch, for the network, and their names; others are counted and named."""
    photos, taken, broken = [], [], []
    for name in tqdm(names, desc="reading", unit="img", leave=False, disable=None):
        try:
            image = read(name) if not name.startswith("shapes:") else \
                torch.from_numpy(shapes.scene(int(name[7:]), 192).image).permute(2, 0, 1)
            photos.append(cropped(image, resolution, patch_size, name))
            taken.append(name)
        except (OSError, ValueError) as error:
            broken.append(str(error))
    if not photos:
        raise ValueError(f"IMAGE: none of {len(names)} can be taken; {broken[0]}")
    if broken:
        print(f"skipped {len(broken)} of {len(names)}:", *broken, sep="\n  ")
    return photos, taken


def shown_first(nets, bands, own):
    """
    Of networks that see more channels than three, --bands of three are those to show: as red, green, blue.

    own      the channels that they see, by number, as in 1,2,3,8; empty = all of a file
    returns  the same networks, of images that begin with these three;  --bands for such images
    """
    asked, seen = read_bands(bands), read_bands(own) or tuple(range(1, 1 + nets[0].config.in_chans))
    if len({net.config.in_chans for net in nets}) > 1:
        raise ValueError(f"--weights: networks of {' and '.join(str(net.config.in_chans) for net in nets)} channels "
                         "see no image alike; name two of as many")
    if len(asked) != 3 or len(seen) < 4:
        return nets, bands
    if len(set(asked)) < 3 or not set(asked) <= set(seen):
        raise ValueError(f"--bands {bands}: to show, name three of {','.join(map(str, seen))}, which the network sees")
    order = [*map(seen.index, asked), *(k for k, band in enumerate(seen) if band not in asked)]
    return [rearranged(net, order) for net in nets], ",".join(str(seen[k]) for k in order)


@torch.no_grad()
def patch_features(vit, images, resolution=0, layers=None):
    """
    images  list of C H W uint8, of any sizes    resolution  as in `cropped`
    layers  0-based, of one grid; None = last
    returns  list of h w D float32 on the host, after the final norm; several layers lie side by side in D
    """
    maps = []
    for image in tqdm(images, desc="features", unit="img", leave=False, disable=None):
        x = network_input(vit, cropped(image, resolution, vit.config.patch_size))                  # 1 C H W
        found = [vit(x)] if layers is None else vit.layers(x, layers)
        if len({features.grid for features in found}) > 1:
            raise ValueError(f"--layers {layers} have grids {[features.grid for features in found]}; name one of them")
        patches = torch.cat([features.patches[0] for features in found], dim=1).float().cpu()  # P D
        maps.append(patches.unflatten(0, found[0].grid))                                       # h w D
    return maps


def principal_components(x):
    """x  n D -> n 3 float64 in 0..1: scores on the leading eigenvectors of the D x D covariance, largest first."""
    return spread(*top_scores(x))


def top_scores(x):
    """n D -> n 3 float64, on the leading eigenvectors;  what of a range is no more than rounding"""
    x = x.double() - x.double().mean(0)
    vectors = torch.linalg.eigh(x.T @ x).eigenvectors[:, -3:].flip(1)                          # D 3
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # largest entry > 0: no chance
    return x @ vectors, x.abs().max().item() * 1e-6 + 1e-12


def spread(scores, floor=1e-12):
    """n 3 -> in 0..1, from the 1st to the 99th percentile of each: outliers must not take the contrast."""
    low, high = torch.from_numpy(np.percentile(scores, (1, 99), axis=0))
    return ((scores - low) / (high - low).clamp(min=floor)).clamp(0, 1)  # rounding must not fill an empty component


def pca_picture(maps, foreground=0.0):
    """
    Three principal components of the patches of ALL images as red, green, blue: a colour means one thing everywhere.

    foreground  patches above this share of component 1, counted from the images' borders, are the object: they get
                components of their own, the rest black; 0 = off      maps  h w D each -> h w 3 in 0..1 each
    """
    x = torch.cat([m.flatten(0, 1) for m in maps])                                             # (images P) D
    sizes, colours = [m.shape[:2].numel() for m in maps], principal_components(x)
    if foreground:
        first = [c[:, 0].view(m.shape[:2]) for c, m in zip(colours.split(sizes), maps, strict=True)]
        border = torch.cat([side for c in first for side in (c[0], c[-1], c[:, 0], c[:, -1])]).mean()
        inside = (colours[:, 0] if border <= colours[:, 0].mean() else 1 - colours[:, 0]) > foreground
        if inside.sum() < 4:
            raise ValueError(f"--foreground {foreground} leaves {inside.sum()} of {len(x)} patches; write less")
        colours = torch.zeros_like(colours).index_put((inside,), principal_components(x[inside]))
    return [c.view(*m.shape[:2], 3).numpy() for c, m in zip(colours.split(sizes), maps, strict=True)]


def patch_at(point, grid):
    """Row and column of the patch under x,y, shares of width and height."""
    (x, y), (h, w) = point, grid
    if not (0 <= x < 1 and 0 <= y < 1):
        raise ValueError(f"--point {x},{y} lies outside of the image; write shares, from 0 to below 1")
    return int(y * h), int(x * w)


def ringed(picture, point, grid):
    """A copy of H W 3 uint8 with a ring about the point."""
    (H, W), (h, w), (x, y) = picture.shape[:2], grid, point
    ring = abs(np.hypot(np.arange(W) + 0.5 - x * W, np.arange(H)[:, None] + 0.5 - y * H) - max(H / h, W / w, H / 40))
    return np.where(ring[..., None] < 1, 255, np.where(ring[..., None] < 2, 0, picture)).astype(np.uint8)


def similarity_picture(map, image, point=(0.5, 0.5)):
    """
    The image, and the cosine of every patch to the one under the point (shares x, y): H W 3 uint8 both, point ringed.
    Bright is 1, dark the least of this image: a level is not to be compared across images.
    """
    unit = F.normalize(map, dim=-1)
    cosine = (unit @ unit[patch_at(point, map.shape[:2])]).numpy()                             # h w
    level = (cosine - cosine.min()) / max(1 - cosine.min(), 1e-6)
    return [ringed(picture, point, map.shape[:2]) for picture in side_by_side(image, level)]


def attention_picture(vit, image, layers=None, point=None):
    """
    The image, and what the class token, or the patch under the point, attends to: mean of the heads, head 0, 1, ...
    Levels are each picture's own, 0 to its 99.5th percentile: an outlier must not take the contrast of all others.

    returns  one sheet, in a list;  of each head, the share that goes to patches and not to cls and registers
    """
    (h, w), first = (side // vit.config.patch_size for side in image.shape[1:]), 1 + vit.config.n_registers
    token = first + np.ravel_multi_index(patch_at(point, (h, w)), (h, w)) if point else 0
    row = attention_row(vit, network_input(vit, image), (layers or [vit.config.depth - 1])[0], token)  # 1 A N
    patches = row[0, :, first:].cpu()                                                                  # A P
    maps = [m.view(h, w).numpy() for m in (patches.mean(0), *patches)]
    pairs = [side_by_side(image, (m / max(np.percentile(m, 99.5), 1e-12)).clip(0, 1)) for m in maps]
    photo = ringed(pairs[0][0], point, (h, w)) if point else pairs[0][0]
    return [sheet([[picture] for picture in (photo, *(heat for _, heat in pairs))])], patches.sum(1).tolist()


@torch.no_grad()
def outliers(vit, image):
    """
    Where a few patches or channels carry very large values: of every block's output, before the final norm.

    image    C H W uint8
    returns  maps of the patches' norms, blocks of h w;  norms of the channels over all patches, blocks D; on the host
    """
    blocks = list(range(vit.config.depth))
    found = [features.map()[0].float().cpu() for features in vit.layers(network_input(vit, image), blocks, norm=False)]
    return [x.norm(dim=0) for x in found], [x.flatten(1).norm(dim=1) for x in found]


def outliers_picture(vit, image):
    """One sheet: the photo, then for each block its patches' norms, from 0 to its own largest; and lines to print"""
    patches, channels = outliers(vit, image)
    heats = [side_by_side(image, (m / m.max().clamp(min=1e-12)).numpy())[1] for m in patches]
    lines = [f"block {k:3}  patches {ratio(m)}  channels {ratio(c)}, of channel {c.argmax()}"
             for k, (m, c) in enumerate(zip(patches, channels, strict=True))]
    return [sheet([[picture] for picture in (side_by_side(image, patches[0].numpy() * 0)[0], *heats)])], lines


def ratio(norms):
    return f"median {norms.median():.3g} max {norms.max():.3g}"


def gram_picture(maps, image, points=None):
    """
    Two networks' cosines to the patch under each point, as one sheet: a row of the photo, both on one scale, and the
    second less the first: red is more alike there, blue less. Without points: where they differ most.

    maps     h w D each; the second is taken to the grid of the first
    returns  the rows, in a list;  a line to print
    """
    first, second = maps[0], comparisons.on_grid(maps[1], maps[0].shape[:2])
    rows, grid = [], first.shape[:2]
    for point in points or comparisons.most_different(first, second):
        a, b = (comparisons.cosines(m, patch_at(point, grid)) for m in (first, second))
        low, top = min(a.min(), b.min()), max(abs(b - a).max(), 1e-6)
        levels = [(x - low) / max(1 - low, 1e-6) for x in (a, b)] + [comparisons.signed_colours((b - a) / top)]
        pairs = [side_by_side(image, x) for x in levels]
        rows.append([ringed(x, point, grid) for x in (pairs[0][0], *(colours for _, colours in pairs))])
    loss = gram_loss(*(m.flatten(0, 1)[None] for m in (first, second))).item()
    means = [mean_cosine(m) for m in (first, second)]
    return rows, f"Gram loss {loss:.4g}; mean cosine of two patches {means[0]:.3f}, {means[1]:.3f}"


def mean_cosine(map):
    """Of two patches of a map, of all pairs."""
    return F.normalize(map.flatten(0, 1), dim=-1).mean(0).square().sum().item()


def sizes_picture(vit, photos, names, c):
    """Writes the picture of mode resolutions; returns lines to print. All images and sizes have one basis."""
    sizes = [int(size) for size in c.sizes.split(",")]
    maps = [patch_features(vit, photos, size) for size in sizes]                    # sizes, images of h w D
    each = list(zip(*maps, strict=True))                                                       # images, sizes
    colours = pca_picture([m for of_image in each for m in of_image], c.foreground)
    colours = [colours[i : i + len(sizes)] for i in range(0, len(colours), len(sizes))]
    curves = [[comparisons.consistency(m, of_image[-1]) for m in of_image] for of_image in each]
    pictures = [shown(photo).permute(1, 2, 0).numpy() for photo in photos]
    comparisons.draw_sizes(c.out, [Path(name).name for name in names], sizes, pictures, colours, curves)
    return [f"{name}: consistency " + ", ".join(f"{x} px {value:.3f}" for x, value in zip(sizes, curve, strict=True))
            for name, curve in zip(names, curves, strict=True)]


def training_frames(run, point, n_images=4):
    """[(words, picture)] of a run's kept steps: some of its own images, their PCA, cosines to the patch at a point."""
    c = saved_config(run)
    source = open_source(c.data, c.n_shapes, c.seed, reader(c, c))
    indices = [i * len(source) // n_images for i in range(n_images)]  # apart: neighbours are of one class
    frames, before = [], None
    for step, path in comparisons.kept_steps(run):
        vit = load_backbone(path).to(command_line.choose_device("auto"))
        photos = [cropped(source.load(i), 2 * c.global_size, vit.config.patch_size) for i in indices]
        maps = patch_features(vit, photos)
        scores, _ = top_scores(torch.cat([m.flatten(0, 1) for m in maps]))
        before = scores if before is None else comparisons.turned_like(scores, before)
        colours = spread(before).split([m.shape[:2].numel() for m in maps])
        rows = [[*side_by_side(photo, c.view(*m.shape[:2], 3).numpy()), similarity_picture(m, photo, point)[1]]
                for photo, m, c in zip(photos, maps, colours, strict=True)]
        frames.append((f"step {step:,}", sheet(rows)))
    return frames


@torch.no_grad()
def text_pictures(model, image, prompts):
    """
    Where words land: the photo, the cosine of each patch to each prompt, and which prompt is nearest. Each heat map is
    from its least to its largest: a level is not to be compared across prompts; the colours of the last one are.

    model    DinoTxt    prompts  texts, which ask the patches as they are: their vectors' second half
    returns  H W 3 uint8 each, its title below it;  cosines, h w n
    """
    D, (h, w) = model.config.width, (side // model.config.patch_size for side in image.shape[1:])
    vectors, _ = ask(model, [[prompt] for prompt in prompts], ["{}"], slice(D, None))
    patches = model.encode_patches(network_input(model, image))[0].float().cpu()                   # P D
    cosines = (F.normalize(patches, dim=1) @ vectors.T).view(h, w, -1)
    low, high = cosines.amin((0, 1)), cosines.amax((0, 1))
    levels = ((cosines - low) / (high - low).clamp(min=1e-6)).numpy()
    nearest = hues(1 + cosines.argmax(2)).permute(1, 2, 0).numpy() / 255                           # h w 3
    photo, best = side_by_side(image, nearest)
    colours = hues(1 + torch.arange(len(prompts))[None])[:, 0].T.tolist()
    heats = [entitled(side_by_side(image, levels[..., k])[1], prompt, colours[k]) for k, prompt in enumerate(prompts)]
    return [entitled(photo, "image"), *heats, entitled(best, "nearest of them")], cosines


def names_for(n, path):
    """Of n classes: of a file, of a set that has so many, or numbers. Raises ValueError."""
    if path:
        found = lines_of(Path(path), "names")
        if len(found) != n:
            raise ValueError(f"--names {path} has {len(found)} lines, and the head {n} classes; wanted a name for each")
        return found
    known = [("background", *shapes.CLASSES), *LABELS.values()]
    return next(([name.split(";")[0] for name in each] for each in known if len(each) == n),
                [f"class {k}" for k in range(n)])


def sheet(groups):
    """Groups of H W 3 uint8 -> one picture: a row for each group, in as many columns as make it about square."""
    gutter = (0, 0), (0, GUTTER), (0, 0)
    rows = [np.hstack([np.pad(each, gutter, constant_values=255) for each in group])[:, :-GUTTER] for group in groups]
    H, W = max(row.shape[0] for row in rows) + GUTTER, max(row.shape[1] for row in rows) + 4 * GUTTER
    columns = max(1, round((len(rows) * H / W) ** 0.5))
    out = np.full((-(-len(rows) // columns) * H - GUTTER, columns * W - 4 * GUTTER, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        out[i // columns * H :, i % columns * W :][: row.shape[0], : row.shape[1]] = row
    return out


def all_of(argv, option):
    """Every value of an option, of which read_words keeps the last."""
    return [word.partition("=")[2] or after for word, after in zip(argv, [*argv[1:], ""], strict=True)
            if word.partition("=")[0] == option]


def configure(argv):
    """The command line -> mode, its images or runs, config, layers, point. What is wrong is said before any work."""
    values, words = command_line.read_words(argv, command_line.types(VisualizeConfig()))
    c = command_line.apply(VisualizeConfig(), of_run(values.get("weights", "")) | values)
    mode, *words = words or [""]
    if mode == "gram":
        c = replace(c, weights=all_of(argv, "--weights"))
        if len(c.weights) != 2:
            raise ValueError(f"--weights {' '.join(c.weights) or '(none)'}: gram compares two; write --weights A "
                             "--weights B")
    sizes = c.sizes.split(",")
    if not all(size.isdecimal() and int(size) for size in sizes) or sorted(set(sizes), key=int) != sizes:
        raise ValueError(f"--sizes {c.sizes}: write pixels, rising, as in 256,512,1024")
    if bool(c.head) != (mode in (*HEADS, "canopy")):
        raise ValueError(f"--head {c.head!r}: it is for the modes depth, segment, detect, points and canopy, which "
                         "want the file of a decoder")
    if c.bands and mode == "training":
        raise ValueError(f"--bands {c.bands}: training shows a run's own images as it saw them; leave it out")
    if c.names and mode != "segment":
        raise ValueError(f"--names {c.names}: it is for the mode segment")
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; did you mean {get_close_matches(mode, MODES, n=1, cutoff=0)[0]}?")
    if not (c.weights or mode in ("curves", "training")) or Path(c.out).suffix not in MODES[mode].split():
        raise ValueError(f"--weights {c.weights!r} --out {c.out!r}: write both, OUT a "
                         + " or ".join(MODES[mode].split()))
    if (mode == "text") != bool(c.prompts.strip("; ")):
        raise ValueError(f"--prompts {c.prompts!r}: it is for the mode text, which wants some, as in \"a dog; grass\"")
    command_line.writable(c.out, folder=False)
    layers = c.layers.split(",") if c.layers else []
    if not all(layer.isdecimal() for layer in layers) or mode == "attention" and len(layers) > 1:
        raise ValueError(f"--layers {c.layers}: write blocks, 0-based, as in 3,5; for attention only one")
    if mode in ("training", "canopy") and len(words) != 1:
        what, one = ("RUN", "run; name its folder") if mode == "training" else ("IN", "raster; name a GeoTIFF")
        raise ValueError(f"{what} {' '.join(words) or '(none)'}: {mode} shows one {one}")
    if (Path(c.out).suffix == ".mp4") != any(map(is_film, words)) or len(words) > 1 and any(map(is_film, words)):
        raise ValueError(f"IMAGE {' '.join(words)}: a video becomes a video, in the mode depth: name one, and --out "
                         "X.mp4")
    words = find_runs(words) if mode == "curves" else words if mode in ("training", "canopy") else find_images(words)
    return mode, words, c, [int(layer) for layer in layers] or None, c.point if "point" in values else None


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip(), command_line.describe(VisualizeConfig()), sep="\n\n")
        return
    mode, names, c, layers, point = configure(argv)
    Path(c.out).parent.mkdir(parents=True, exist_ok=True)
    if mode == "curves":
        print(f"wrote {c.out}: {len(names)} run{'s' * (len(names) > 1)}, {draw(names, c.out)} panels")
        return
    if mode == "training":
        frames = training_frames(names[0], c.point)
        comparisons.save_frames(c.out, frames)
        print(f"wrote {c.out}: {len(frames)} steps, {frames[0][1].shape[1]}x{frames[0][1].shape[0]} pixels")
        return
    paths = c.weights if mode == "gram" else [c.weights]
    nets = [load_backbone(path, c.size or None).to(command_line.choose_device("auto")) for path in paths]
    if mode != "canopy":
        nets, bands = shown_first(nets, c.bands, of_run(paths[0]).get("bands", ""))
        c = replace(c, bands=bands)
    vit = load_dinotxt(c.weights, nets[0]).to(command_line.choose_device("auto")) if mode == "text" else nets[0]
    patch = math.lcm(*(net.config.patch_size for net in nets))
    if mode == "canopy":
        print(canopy_map(names[0], c, vit, layers))
        return
    if is_film(c.out):
        print(depth_film(decoder_of(mode, c, vit, layers), names[0], c))
        return
    patch = math.lcm(patch, COARSEST) if mode == "segment" else patch
    photos, names = load_photos(names, c.resolution, patch, reader(c, nets[0].config))
    if mode == "resolutions":
        print(*sizes_picture(vit, photos, names, c), f"wrote {c.out}", sep="\n")
        return
    if mode == "attention":
        groups, shares = zip(*(attention_picture(vit, photo, layers, point) for photo in photos), strict=True)
        print("attention to patches, by head:", *(" ".join(f"{x:.0%}" for x in each) for each in shares), sep="\n  ")
    if mode == "outliers":
        groups, lines = zip(*(outliers_picture(vit, photo) for photo in photos), strict=True)
        print(*(line for name, each in zip(names, lines, strict=True) for line in (name, *each)), sep="\n  ")
    if mode == "depth":
        decoder = decoder_of(mode, c, vit, layers)
        groups, metres = zip(*(depth_pictures(decoder, photo) for photo in photos), strict=True)
        print("metres, from the nearest to the farthest:", *(f"{name}: {x.min():.2f} to {x.max():.2f}"
              for name, x in zip(names, metres, strict=True)), sep="\n  ")
    if mode == "detect":
        decoder, classes = decoder_of(mode, c, vit, layers), names_in(c.head)
        groups, counts = zip(*(detect_pictures(decoder, photo, classes) for photo in photos), strict=True)
        print("boxes:", *(f"{name}: {n}" for name, n in zip(names, counts, strict=True)), sep="\n  ")
    if mode == "points":
        groups = point_pictures(decoder_of(mode, c, vit, layers), photos)
    if mode == "segment":
        decoder = decoder_of(mode, c, vit, layers)
        groups = [segment_pictures(decoder, photo, names_for(decoder.n_out, c.names)) for photo in photos]
    if mode == "text":
        prompts = [prompt.strip() for prompt in c.prompts.split(";") if prompt.strip()]
        groups, cosines = zip(*(text_pictures(vit, photo, prompts) for photo in photos), strict=True)
        print("cosines, from the least to the largest:", *(f"{name}, {prompt}: {x.min():.2f} to {x.max():.2f}"
              for name, each in zip(names, cosines, strict=True)
              for prompt, x in zip(prompts, each.unbind(2), strict=True)), sep="\n  ")
    pictured = "attention", "outliers", "text", *HEADS
    maps = [] if mode in pictured else patch_features(vit, photos, layers=layers)
    if mode == "pca":
        groups = [side_by_side(*each) for each in zip(photos, pca_picture(maps, c.foreground), strict=True)]
    elif mode == "gram":
        pairs = zip(maps, patch_features(nets[1], photos, layers=layers), strict=True)
        points = [point] if point else None
        found = [gram_picture(pair, photo, points) for pair, photo in zip(pairs, photos, strict=True)]
        print(*(f"{name}: {line}" for name, (_, line) in zip(names, found, strict=True)), sep="\n")
        groups = [row for rows, _ in found for row in rows]
    elif mode == "similarity":
        groups = [similarity_picture(*each, c.point) for each in zip(maps, photos, strict=True)]
    if mode == "explore":
        html, d, error = page(maps, [shown(photo) for photo in photos], [Path(name).name for name in names])
        Path(c.out).write_text(html, encoding="utf-8")
        said = f"{len(html) / 1e6:.1f} MB; {maps[0].shape[2]} features kept as {d} int8, cosines within {error:.3f}"
    elif Path(c.out).suffix == ".html":
        html = gallery(groups, [Path(name).name for name in names], c.prompts or mode)
        Path(c.out).write_text(html, encoding="utf-8")
        said = "a page"
    else:
        picture = sheet(groups)
        Image.fromarray(picture).save(c.out)
        said = f"{picture.shape[1]}x{picture.shape[0]} pixels"
    print(f"wrote {c.out}: {len(photos)} image{'s' * (len(photos) > 1)}, {said}")


if __name__ == "__main__":
    command_line.run(main)
