"""
Look at frozen patch features. Dimension letters: see the top of model.py.

    python visualize.py pca shapes:3 shapes:8 --weights runs/tiny --out pca.png       generated images, files, a folder
    python visualize.py pca PHOTOS --weights runs/s --out pca.png --resolution 512 --foreground 0.5
    python visualize.py similarity dog.jpg --weights runs/s --out dog.png --point 0.3,0.6

    patch_features       images of any size -> maps of patches
    pca_picture          maps -> colours, one basis for all of them            DINOv2 Fig. 1
    similarity_picture   map, point -> cosines to the patch under the point    DINOv3 Fig. 3
"""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import config as command_line
import shapes
from data import EXTENSIONS, read_image, resize
from weights import load_backbone

MODES = "pca", "similarity"
GUTTER = 4  # white pixels between pictures
HEAT = np.array([(13, 8, 26), (55, 24, 90), (115, 32, 125), (181, 47, 127), (235, 83, 94), (255, 142, 64),
                 (255, 200, 79), (253, 249, 194)])  # CIE lightness 3 to 97 in equal steps: it reads in grey too


@dataclass(frozen=True)
class VisualizeConfig:
    weights: str = ""          # a run's folder, or a weights file
    size: str = ""             # s, b, ...: of a .pth file, which does not say
    out: str = ""              # the .png to write; its folder is made
    resolution: int = 0        # pixels of the short side that the network sees; 0 = its own; more = a finer picture
    foreground: float = 0.0    # pca: patches above this share of component 1's range are the object; 0 = off
    point: tuple = (0.5, 0.5)  # similarity: x,y as shares of width and height, from the top left corner


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


def fit(image, resolution, patch_size, name="image"):
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


def load_photos(names, resolution, patch_size):
    """The images that can be read, as the network takes them; the others are counted and named."""
    photos, broken = [], []
    for name in tqdm(names, desc="reading", unit="img", leave=False, disable=None):
        try:
            image = read_image(name) if not name.startswith("shapes:") else \
                torch.from_numpy(shapes.scene(int(name[7:]), 192).image).permute(2, 0, 1)
            photos.append(fit(image, resolution, patch_size, name))
        except OSError as error:
            broken.append(str(error))
    if broken:
        print(f"skipped {len(broken)} unreadable:", *broken, sep="\n  ")
    if not photos:
        raise ValueError(f"IMAGE: none of {len(names)} could be read")
    return photos


@torch.no_grad()
def patch_features(vit, images, resolution=0, layers=None):
    """
    images  list of C H W uint8, of any sizes    resolution  as in `fit`    layers  blocks, 0-based; None = the last
    returns  list of h w D float32 on the host, after the final norm; several layers lie side by side in D
    """
    device, maps = next(vit.parameters()).device, []
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (vit.config.mean, vit.config.std))
    for image in tqdm(images, desc="features", unit="img", leave=False, disable=None):
        x = (fit(image, resolution, vit.config.patch_size)[None].to(device).float() / 255 - mean) / std  # 1 C H W
        found = [vit(x)] if layers is None else vit.layers(x, layers)
        patches = torch.cat([features.patches[0] for features in found], dim=1).float().cpu()  # P D
        maps.append(patches.unflatten(0, found[0].grid))                                       # h w D
    return maps


def principal_components(x):
    """x  n D -> n 3 float64 in 0..1: scores on the leading eigenvectors of the D x D covariance, largest first."""
    x = x.double() - x.double().mean(0)
    vectors = torch.linalg.eigh(x.T @ x).eigenvectors[:, -3:].flip(1)                          # D 3
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # largest entry > 0: no chance
    low, high = torch.from_numpy(np.percentile(x @ vectors, (1, 99), axis=0))  # outliers must not take the contrast
    floor = x.abs().max().item() * 1e-6 + 1e-12  # of the range: rounding errors must not fill an empty component
    return ((x @ vectors - low) / (high - low).clamp(min=floor)).clamp(0, 1)


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


def similarity_picture(map, image, point=(0.5, 0.5)):
    """
    The image, and the cosine of every patch to the one under the point (shares x, y): H W 3 uint8 both, point ringed.
    Bright is 1, dark the least of this image: a level is not to be compared across images.
    """
    (h, w), (H, W), (x, y) = map.shape[:2], image.shape[1:], point
    if not (0 <= x < 1 and 0 <= y < 1):
        raise ValueError(f"--point {x},{y} lies outside of the image; write shares, from 0 to below 1")
    unit = F.normalize(map, dim=-1)
    cosine = (unit @ unit[int(y * h), int(x * w)]).numpy()                                     # h w
    level = (cosine - cosine.min()) / max(1 - cosine.min(), 1e-6)
    heat = np.stack([np.interp(level, np.linspace(0, 1, len(HEAT)), channel) for channel in HEAT.T], -1) / 255
    ring = abs(np.hypot(np.arange(W) + 0.5 - x * W, np.arange(H)[:, None] + 0.5 - y * H) - max(H / h, W / w, H / 40))
    pictures = side_by_side(image, heat)
    for picture in pictures:
        picture[ring < 2], picture[ring < 1] = 0, 255
    return pictures


def side_by_side(image, colours):
    """C H W uint8 and h w 3 in 0..1 -> both H W 3 uint8; a patch stays one square: smooth ones feign resolution."""
    colours = torch.from_numpy(np.rint(colours * 255).astype(np.uint8)).permute(2, 0, 1)
    colours = F.interpolate(colours[None], image.shape[1:], mode="nearest-exact")[0]
    return [each.permute(1, 2, 0).numpy().copy() for each in (image, colours)]


def sheet(pairs):
    """Pairs of H W 3 uint8 -> one picture: a row for each pair, in as many columns as make it about square."""
    rows = [np.concatenate([a, np.full_like(a[:, :1], 255).repeat(GUTTER, 1), b], axis=1) for a, b in pairs]
    H, W = max(row.shape[0] for row in rows) + GUTTER, max(row.shape[1] for row in rows) + 4 * GUTTER
    columns = max(1, round((len(rows) * H / W) ** 0.5))
    out = np.full((-(-len(rows) // columns) * H - GUTTER, columns * W - 4 * GUTTER, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        out[i // columns * H :, i % columns * W :][: row.shape[0], : row.shape[1]] = row
    return out


def configure(argv):
    """The command line -> mode, names of images, config. What is wrong there is said before the network is loaded."""
    values, words = command_line.read_words(argv, command_line.types(VisualizeConfig()))
    c, (mode, *words) = command_line.apply(VisualizeConfig(), values), words or [""]
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; did you mean {get_close_matches(mode, MODES, n=1, cutoff=0)[0]}?")
    if not 0 <= c.foreground < 1 or not all(0 <= share < 1 for share in c.point):
        raise ValueError(f"--foreground {c.foreground}, --point {c.point}: write shares, from 0 to below 1")
    if not c.weights or Path(c.out).suffix != ".png" or c.resolution < 0:
        raise ValueError(f"--weights {c.weights!r} --out {c.out!r}: write both, OUT a .png; --resolution is >= 0")
    return mode, find_images(words), c


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip(), command_line.describe(VisualizeConfig()), sep="\n\n")
        return
    mode, names, c = configure(argv)
    vit = load_backbone(c.weights, c.size or None)
    photos = load_photos(names, c.resolution, vit.config.patch_size)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    maps = patch_features(vit.to(device), photos)
    pairs = [side_by_side(*each) for each in zip(photos, pca_picture(maps, c.foreground), strict=True)] \
        if mode == "pca" else [similarity_picture(*each, c.point) for each in zip(maps, photos, strict=True)]
    picture = sheet(pairs)
    Path(c.out).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(c.out)
    print(f"wrote {c.out}: {len(pairs)} image{'s' * (len(pairs) > 1)}, {picture.shape[1]}x{picture.shape[0]} pixels")


if __name__ == "__main__":
    command_line.run(main)
