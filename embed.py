"""
The vectors of a pile of photos, in one file; then neighbours, copies and a map of them.

    python embed.py PHOTOS --weights W --out FILE.npz             or .safetensors, .parquet: cls, patches_mean, paths
    python embed.py PHOTOS --weights W --out FILE.npz --patches   FILE.patches.npy too: N h w D float16, to be mapped
    python embed.py search FILE QUERY.jpg --top 20                the nearest, as a list and a page
    python embed.py search FILE "a red square"                    of vectors made with --text: of words, too
    python embed.py duplicates FILE                               groups of copies, as a page; a list of what to drop
    python embed.py map FILE                                      a page: what lies near what, to zoom and point at
    torchrun --nproc-per-node 8 embed.py PHOTOS --weights W --out FILE.safetensors --cache DIR

PHOTOS is whatever --data takes. Ctrl-C keeps what is done, and the same command goes on with it; a photo that cannot be
read is named and has no row. A photo is seen as evaluate.py --task linear sees it, or, with --text, --task zeroshot.
Dimension letters: see the top of model.py; N images of the pile.
"""

import os
import shutil
import signal
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dinotxt import load_dinotxt
from engine import atlas
from engine import config as command_line
from engine.channels import of_run
from engine.chunks import kept, read, serve, turn
from engine.features import Frozen, chosen_layers, describe, load, reads, whole_patches
from engine.images import EXTENSIONS, ImageConfig
from engine.keys import weights_of
from engine.names import LISTS, place_of, write_list
from engine.near import alike, calibrate, components, groups_of, nearest, try_copies
from engine.ranks import choose_precision, count_workers, leading, start_ranks
from engine.sources import Unlabelled, archive_of, open_source, read_named
from engine.task import SKIPPED, WIDE, Task
from engine.vectors import OPENERS, ROWS, Unit, Vectors, write
from engine.views import centre_crop, fitted, letterbox, middle, squared

TASK = Task("embed", layout="", open=None, run=None, wants="tokens", metric="", view=centre_crop)
CROPS = dict(centre=centre_crop, middle=middle, letterbox=letterbox, squared=squared, whole=fitted)
HERE = "out", "cache", "overwrite", "device", "workers", "batch"  # options that say nothing of what a vector means


@dataclass(frozen=True)
class EmbedConfig(ImageConfig):
    data: str = "?"            # PHOTOS: what --data of train.py takes
    weights: str = ""          # a run's folder, a weights file, pixels, or untrained:SIZE
    text: str = ""             # the folder of a run of text.py, or the released file: vectors that words find, too
    out: str = ""              # FILE: .npz, .safetensors or .parquet
    resolution: int = 0        # [0, 16384]: pixels of the square that the network sees; 0 = 224, with --text 384
    crop: str = ""             # centre, middle, letterbox, squared, whole: see engine/views.py; empty = by --resolution
    layers: str = ""           # blocks, 0-based, as in 3,5, side by side; empty = the last
    patches: bool = False      # whole maps of patches, too, in FILE.patches.npy
    overwrite: bool = False    # a FILE that exists is replaced
    batch: int = 64            # [1, 1e6]: images at a time
    device: str = "auto"       # auto, cpu, cuda, mps
    workers: int = -1          # [-1, 256]: processes that read images, for each rank; -1 = as the machine allows
    precision: str = "auto"    # of the network: bf16, fp32; auto = bf16 where the hardware multiplies it
    seed: int = 0              # [0, 4294967295]: of --data shapes
    cache: str = ""            # folder that keeps vectors on the way; empty = TMPDIR, until FILE is there
    limit, control = 0, False  # of a task; a pile has neither


@dataclass(frozen=True)
class SearchConfig:
    top: int = 10              # [1, 10000]: neighbours
    weights: str = ""          # of FILE's network, if they have moved
    text: str = ""             # the same, of FILE's words
    out: str = ""              # the page, .html, or picture, .png; empty = FILE.search.html
    device: str = "auto"       # auto, cpu, cuda, mps


@dataclass(frozen=True)
class DuplicatesConfig:
    threshold: float = 0.0     # [0, 1]: cosine from which on two are copies; 0 = measured on copies made of the pile
    weights: str = ""          # of FILE's network, if they have moved
    out: str = ""              # list of what to drop: .txt, .csv or .parquet; empty = FILE.copies.txt
    seed: int = 0              # [0, 4294967295]: of all that is drawn
    device: str = "auto"       # auto, cpu, cuda, mps


@dataclass(frozen=True)
class MapConfig:
    points: int = 20_000       # [2, 1e6]: images on the map, evenly spaced; each takes 2 kB of the page, about
    thumbnail: int = 64        # [0, 512]: pixels of the long side of a picture; 0 = names alone
    out: str = ""              # the page, .html; empty = FILE.map.html
    workers: int = -1          # [-1, 256]: processes that read images; -1 = as the machine allows

# --------------------------------------------------------------------------------
# Vectors of a pile


def network(c):
    """The frozen network of a config; with --text as in tasks of words: what stands behind their vision head"""
    with turn("reading"):
        backbone = load(c.weights, precision=c.precision)
        return load_dinotxt(c.text, backbone) if c.text else backbone


def embed(c, frozen):
    """Writes FILE -> the line of JSON, as a dict"""
    SKIPPED.clear()
    source, out = open_source(c.data, seed=c.seed, read=reads(c)), Path(c.out)
    print(f"{len(source):,} images of {c.data}, seen at {c.resolution} px, {c.crop}, by {c.weights} in {c.precision} "
          f"on {frozen.device.type}")
    if c.patches:
        afford(c, frozen, source)
    tokens = frozen.tokens("images", Unlabelled(source), frozen.seen(CROPS[c.crop]), c.patches)
    folder, rows = os.path.realpath(out.parent), np.array(tokens.rows, np.int64)

    def name(i):
        said = source.name(int(rows[i]))
        return place_of(said, folder) if os.path.isfile(said) or archive_of(said) else said
    options = {field.name: getattr(c, field.name) for field in fields(c) if field.name not in HERE}
    options |= {key: os.path.abspath(value) for key in ("data", "weights", "text")
                if (value := options[key]) and os.path.exists(value)}
    about = dict(network=weights_of(frozen.model), mean=list(frozen.model.config.mean), digest=source.digest(),
                 options=options)
    out.parent.mkdir(parents=True, exist_ok=True)
    if c.patches:
        write_maps(maps_of(out), tokens)
    write(out, about, dict(cls=tokens.table("cls"), patches_mean=tokens.table("patches"), rows=rows), name)
    return dict(data=c.data, weights=c.weights, out=c.out, n=len(rows), width=tokens.table("cls").shape[1],
                skipped=sum(SKIPPED.values()), resolution=c.resolution, crop=c.crop, precision=c.precision,
                layers=c.layers, bytes=out.stat().st_size)


def maps_of(out):
    return out.with_name(f"{out.stem}.patches.npy")


def afford(c, frozen, source):
    """Says how large the maps will be. Raises ValueError if the disk has no room."""
    patch, width = frozen.model.config.patch_size, frozen.model.config.width * max(len(frozen.layers), 1)
    size = len(source) * (c.resolution // patch) ** 2 * width * 2
    out = next(folder for folder in Path(c.out).absolute().parents if folder.is_dir())
    places = {os.stat(folder).st_dev: folder for folder in (out, Path(c.cache))}
    need = size * (2 if len(places) == 1 else 1)  # once on the way, once in the end
    print(f"patches: {size / 1e9:.3g} GB in {maps_of(Path(c.out))}, and as much in {c.cache} until that is there")
    for folder in places.values():
        if (free := shutil.disk_usage(folder).free) < need:
            raise ValueError(f"--patches: {need / 1e9:.3g} GB are needed in {folder} and {free / 1e9:.3g} GB are free; "
                             "make room, or name another --out and --cache")


def write_maps(path, tokens):
    """N h w D float16, a file of tokens at a time; whole or not at all"""
    places = [file["maps"] for file in tokens.files]
    shape = sum(shape[0] for _, _, shape, _ in places), *places[0][2][1:]
    with command_line.whole(path) as new, open(new, "wb") as file:
        np.lib.format.write_array_header_1_0(file, dict(descr="<f2", fortran_order=False, shape=shape))
        for place in places:
            file.write(read(*place).tobytes())

# --------------------------------------------------------------------------------
# What one does with them


def same_network(file, c, ranks):
    """
    FILE's own network -> what it says of images: Frozen, whose view is FILE's

    raises  ValueError: the weights are not there, or not those
    """
    known = dict(file.about["options"])
    known |= {name: value for name in ("weights", "text") if (value := getattr(c, name, ""))}
    own = EmbedConfig(**known | dict(percentiles=tuple(known["percentiles"]), device=c.device))
    frozen = Frozen(network(own), TASK, own, ranks)
    if weights_of(frozen.model) != file.about["network"]:
        raise ValueError(f"{file.path} is of another network than {own.weights}{f' and {own.text}' * bool(own.text)}; "
                         "name the weights that it was made with, or make it again")
    frozen.view = frozen.seen(CROPS[own.crop])
    return frozen


def search(c, path, query):
    """Prints the nearest to an image, or to words, and writes a page -> the line of JSON, as a dict"""
    file, ranks = Vectors(path), start_ranks(c.device)
    out = Path(c.out or file.path.with_suffix(".search.html"))
    check_out(out, ".html", ".png")
    words = not (os.path.isfile(query) or archive_of(query))
    if words and Path(query).suffix.lower() in EXTENSIONS:
        raise ValueError(f"{query} does not exist; name an image")
    if words and not (file.about["options"]["text"] or c.text):
        raise ValueError(f"{query!r} is no file, and {path} was made without words; name an image, or make it again "
                         "with --text, the folder of a run of text.py")
    if c.text and not file.about["options"]["text"]:
        raise ValueError(f"--text {c.text}: {path} was made without words; make it again, with --text")
    frozen, picture = same_network(file, c, ranks), None
    if words:
        vector, rows = frozen.model.encode_words([query]).cpu(), Unit(file, "cls", "patches_mean")
    else:
        picture = read_named(query, file.read)
        vector, rows = torch.from_numpy(frozen.tokens_of([frozen.view(picture)[0]])[0]), Unit(file, "cls")
    vector = torch.nn.functional.normalize(vector.float(), dim=1).numpy()
    places, cosines = (x[0].tolist() for x in nearest(vector, rows, min(c.top, len(file)), ranks.device))
    names = [file.name(i) for i in places]
    for cosine, name in zip(cosines, names, strict=True):
        print(f"{cosine:7.4f}  {name}")
    atlas.neighbours(out, file, query, picture, places, cosines)
    print(f"wrote {out}")
    return dict(file=str(path), query=query, n=len(file), names=names, cosines=[round(x, 5) for x in cosines])


def duplicates(c, path):
    """Writes the list of what to drop and the page of all groups -> the line of JSON, as a dict"""
    file, ranks = Vectors(path), start_ranks(c.device)
    out = Path(c.out or file.path.with_suffix(".copies.txt"))
    check_out(out, *sorted(LISTS))
    if not (os.path.isfile(first := file.name(0)) or archive_of(first)):
        raise ValueError(f"{first} is no file, and a list cannot name it; name a FILE of photos in files")
    unit = Unit(file, "cls")
    vectors = np.concatenate([unit[first : first + ROWS].astype(np.float16) for first in range(0, len(file), ROWS)])
    found = measured(file, vectors, c, ranks) if not c.threshold else None
    threshold = c.threshold or found.threshold
    pairs = alike(vectors, threshold, c.seed, ranks.device,
                  lambda cells: tqdm(cells, "comparing", leave=False, disable=None))
    groups = groups_of(vectors, components(len(file), pairs))
    cosines = [vectors[rows].astype(np.float32) @ vectors[rows[0]].astype(np.float32) for rows in groups]
    folder = os.path.realpath(out.parent)
    columns = dict(path=[], stays=[], cosine=[])
    for rows, near in zip(groups, cosines, strict=True):
        stays = place_of(file.name(rows[0]), folder)
        for i, cosine in zip(rows[1:], near[1:], strict=True):
            for column, value in zip(columns.values(), (place_of(file.name(i), folder), stays, float(cosine)),
                                     strict=True):
                column.append(value)
    write_list(out, columns)
    page = out.with_suffix(".html")
    atlas.copies(page, file, groups, cosines, threshold, found)
    print(f"wrote {out}, what to drop, and {page}, all groups")
    return dict(file=str(path), out=str(out), n=len(file), threshold=threshold, groups=len(groups),
                drop=len(columns["path"]), **({} if found is None else dict(recall=found.recall, wrong=found.wrong)))


def measured(file, vectors, c, ranks):
    """What copies of some of the images look like to FILE's network: Calibration. Raises ValueError."""
    if len(file.about["mean"]) != 3:
        raise ValueError(f"{file.path}: --threshold is missing; it is measured on RGB photos alone")
    frozen = same_network(file, c, ranks)

    def say(images):
        return np.concatenate([frozen.tokens_of(frozen.view(image))[0] for image in images])
    try:
        return calibrate(*try_copies(vectors, file.load, say, c.seed, ranks.device))
    except OSError as error:
        raise ValueError(f"{error}: the threshold is measured on the photos; give --threshold, as 0.95") from error


def draw_map(c, path):
    """Writes the page -> the line of JSON, as a dict"""
    file = Vectors(path)
    out = Path(c.out or file.path.with_suffix(".map.html"))
    check_out(out, ".html")
    if len(file) < 3:
        raise ValueError(f"{path} has {len(file)} vectors; a map shows three or more")
    share, shown = atlas.chart(out, file, Unit(file, "cls"), c.points, c.thumbnail, count_workers(c.workers))
    print(f"wrote {out}: {shown:,} of {len(file):,} images, {share:.0%} of their variance in two dimensions")
    return dict(file=str(path), out=str(out), n=len(file), shown=shown, variance=round(share, 4),
                bytes=out.stat().st_size)

# --------------------------------------------------------------------------------
# The command


COMMANDS = dict(search=(SearchConfig, search, "FILE QUERY"), duplicates=(DuplicatesConfig, duplicates, "FILE"),
                map=(MapConfig, draw_map, "FILE"))


def check_out(path, *suffixes):
    if path.suffix not in suffixes:
        raise ValueError(f"--out {path}: name a file that ends in {' or '.join(suffixes)}")
    command_line.writable(path, folder=False)


def configure(argv):
    values, words = command_line.read_words(argv, command_line.types(EmbedConfig()))
    if len(words) > 1 and (near := get_close_matches(words[0], COMMANDS, n=1)):
        raise ValueError(f"{words[0]!r} is no command; did you mean {near[0]}?")
    if len(words) > 1:
        raise ValueError(f"{words[1]!r} is not an option; write --field value")
    if words and "data" in values:
        raise ValueError(f"{words[0]} and --data {values['data']}: which photos? name them once")
    values |= dict(data=words[0]) if words else {}
    c = command_line.apply(EmbedConfig(), of_run(values.get("weights", "")) | values)
    if c.data == "?":
        raise ValueError("which photos? python embed.py PHOTOS --weights W --out FILE")
    if c.crop not in ("", *CROPS):
        raise ValueError(f"--crop {c.crop}: choose one of {', '.join(CROPS)}")
    if c.precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"--precision {c.precision}: write auto, bf16 or fp32")
    check_out(Path(c.out or "(none)"), *OPENERS)
    for path in (Path(c.out), maps_of(Path(c.out)))[: 1 + c.patches]:
        if path.exists() and not c.overwrite:
            raise ValueError(f"--out {path} exists; name another, or --overwrite")
    if c.cache:
        command_line.writable(c.cache, option="--cache")
    if c.out.endswith(".parquet"):
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ValueError(f"--out {c.out}: pyarrow is not installed; pip install -e .[data]") from error
    config = describe(c.weights)
    side = 80 if c.data == "shapes" else 384 if c.text else 224
    c = replace(c, resolution=c.resolution or -(-side // config.patch_size) * config.patch_size)
    c = replace(c, crop=c.crop or ("middle" if c.text or c.resolution >= WIDE else "centre"))
    if chosen_layers(c, config) and c.text:
        raise ValueError(f"--layers {c.layers}: words are of the last block alone; leave one of them out")
    whole_patches(c, config)
    if c.patches and (c.crop == "whole" or c.weights == "pixels"):
        raise ValueError("--patches: maps of one size, of a network that has them; not --crop whole, not of pixels")
    open_source(c.data, seed=c.seed, read=reads(c))
    return replace(c, workers=count_workers(c.workers))


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip(), command_line.describe(EmbedConfig()), *(
            f"embed.py {name} {words}\n{command_line.describe(kind())}" for name, (kind, _, words) in COMMANDS.items()),
            sep="\n\n")
        return
    if argv and argv[0] in COMMANDS:
        kind, function, wanted = COMMANDS[argv[0]]
        values, words = command_line.read_words(argv[1:], command_line.types(kind()))
        if len(words) != len(wanted.split()):
            raise ValueError(f"{argv[0]} {' '.join(words) or '(none)'}: write embed.py {argv[0]} {wanted}")
        return command_line.show(function(command_line.apply(kind(), values), *words))
    c = configure(argv)
    ranks = start_ranks(c.device, talk=True)
    c = replace(c, precision=choose_precision(c.precision, ranks.device))
    if ranks.rank:
        with redirect_stdout(None):
            frozen = Frozen(network(c), TASK, c, ranks)
        serve(frozen, c, ranks)
        return
    with leading(ranks), kept(c) as c:
        said = embed(c, Frozen(network(c), TASK, c, ranks))
    command_line.show(said)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # torchrun's, too: temporary folders go as after Ctrl-C
    command_line.run(main)
