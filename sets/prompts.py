"""
What classes are called, and sentences to say it in: prompts, for a network that knows words.

    names_of       a class folder's names: of a file, of ImageNet's 1,000, or as the folders are called
    label_names    the same of a segmentation set's class numbers
    sentences      --templates: imagenet, CLIP's 80; plain, a few; shapes, 33 like its captions; or a file, a
                   line each with {} for the name
    TEXT, NAMES, TEMPLATES  options of the tasks

A class may have several names, "sky; wall; floor": its score is that of the best. So a background is asked for. CLIP's
lists are read off the file of open_clip_torch, which is not imported.
"""

import ast
import json
import re
from functools import cache
from importlib.util import find_spec
from itertools import permutations, product
from pathlib import Path

import shapes
from engine.task import Option
from sets.pairs import lines

TEXT = Option("text", "", "file of the towers, as released; empty = text.safetensors in the folder --weights",
              scored=False)
NAMES = Option("names", "", "file of names: a class a line in the order of the classes, or JSON {folder: name}")
TEMPLATES = Option("templates", "imagenet", "imagenet, plain, shapes, or a file: a line each, {} for the name",
                   shapes="shapes")
PLAIN = "a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "{}"
STRUCTURED = [f"{structure} {kind}" for (structure, *_), kind in zip(shapes.STRUCTURES, shapes.CLASSES, strict=True)]
SURFACES = [*product(shapes.TEXTURES, repeat=2)]
SCENES = [f"{shapes.article(a)} and {b} {{}} on {SURFACES[k % 25][0]} ground before a {SURFACES[k % 25][1]} wall"
          for k, (a, b) in enumerate(permutations(shapes.PALETTE, 2)) if k % 4 == 0]  # as captions are: LOG.md
OWN = dict(plain=PLAIN, shapes=SCENES)
BACKGROUND = [f"{texture} {part}" for texture in shapes.TEXTURES for part in ("ground", "wall")]
# COCO's 80 things, then its 91 kinds of stuff, "-other" and "-stuff" left out; Pascal Context's 59 that are scored
STUFF = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
scissors, teddy bear, hair drier, toothbrush, banner, blanket, branch, bridge, building, bush, cabinet, cage,
cardboard, carpet, ceiling, ceiling tile, cloth, clothes, clouds, counter, cupboard, curtain, desk, dirt, door,
fence, marble floor, floor, stone floor, tiled floor, wooden floor, flower, fog, food, fruit, furniture, grass,
gravel, ground, hill, house, leaves, light, mat, metal, mirror, moss, mountain, mud, napkin, net, paper,
pavement, pillow, plant, plastic, platform, playing field, railing, railroad, river, road, rock, roof, rug,
salad, sand, sea, shelf, sky, skyscraper, snow, solid, stairs, stone, straw, structure, table, tent, textile,
towel, tree, vegetable, brick wall, concrete wall, wall, wall panel, stone wall, tiled wall, wooden wall, water,
waterdrops, window blind, window, wood
"""
CONTEXT = """
aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car, cat,
ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground, horse,
keyboard, light, motorbike, mountain, mouse, person, plate, platform, potted plant, road, rock, sheep, shelves,
sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, tv monitor, wall, water, window, wood
"""
LABELS = dict(  # in the order of class numbers
    cityscapes=("road; street", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
                "vegetation; tree", "terrain; grass", "sky", "person; pedestrian", "rider; cyclist", "car", "truck",
                "bus", "train; tram", "motorcycle", "bicycle"),
    # the words for VOC's background are our own choice: no source has them
    voc=("background; sky; wall; floor; ground; grass; tree; water; building; road; mountain", "aeroplane", "bicycle",
         "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog", "horse", "motorbike",
         "person", "potted plant", "sheep", "sofa", "train", "tv monitor"),
    camvid=("sky", "building", "pole", "road", "pavement; sidewalk", "tree", "sign", "fence", "car", "pedestrian",
            "bicyclist"),
    stuff=tuple(" ".join(STUFF.split()).split(", ")), context=tuple(" ".join(CONTEXT.split()).split(", ")))
ADE = "objectInfo150.txt"      # in ADE20k's zip: a table, its last column names


def spoken(text):
    """ "dog; hound" -> its names"""
    return [name.strip() for name in text.split(";") if name.strip()]


def names_of(classes, path=""):
    """Folders of classes -> names of each. Raises ValueError if a folder has none."""
    if path and Path(path).suffix == ".json":
        try:
            known = {str(folder): str(name) for folder, name in json.loads(Path(path).read_text()).items()}
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"--names {path} cannot be read ({error}); wanted JSON, {{folder: name}}") from error
        lacking = [folder for folder in classes if not spoken(known.get(folder, ""))]
        if lacking:
            raise ValueError(f"--names {path} has no name for {lacking[0]}, and {len(lacking)} of {len(classes)} "
                             "folders; wanted {folder: name} for all")
        return [spoken(known[folder]) for folder in classes]
    if path:
        return listed(path, len(classes))
    if all(re.fullmatch(r"n\d{8}", folder) for folder in classes):
        if len(classes) != 1000:
            raise ValueError(f"--names is missing: folders are called {classes[0]}, and are {len(classes)} of "
                             "ImageNet's 1,000; write --names FILE.json, {folder: name}")
        return [[name] for name in clip_list("IMAGENET_CLASSNAMES")]
    return [[folder.replace("_", " ")] for folder in classes]


def listed(path, n=None):
    """A file's classes, a line each. Raises ValueError if they are not n."""
    found = [spoken(line) for line in lines(Path(path), "names of classes")]
    if n is not None and len(found) != n or not all(found):
        raise ValueError(f"--names {path} has names for {len([each for each in found if each])} classes; wanted {n}, "
                         "a line each")
    return found


def label_names(kind, data, path=""):
    """Of a set of sets/labels.py, or of any with a file of names. Raises ValueError if there are none."""
    if path:
        return listed(path)
    if kind == "ade20k":
        table = next((root / ADE for root in (Path(data), Path(data).parent) if (root / ADE).is_file()), None)
        if not table:
            raise ValueError(f"--names is missing, and {data} has no {ADE}; write --names FILE, a class a line")
        rows = [line.rpartition("\t")[2] for line in lines(table, "classes")[1:]]
        return [[row.split(",")[0].strip()] for row in rows]  # of synonyms the first, as the released code has it
    if kind not in LABELS:
        raise ValueError(f"--names is missing: the classes of {data} have numbers alone; write --names FILE, a class a "
                         "line")
    return [spoken(text) for text in LABELS[kind]]


def sentences(templates):
    """--templates -> sentences with {}. Raises ValueError."""
    if templates == "imagenet":
        return list(clip_list("OPENAI_IMAGENET_TEMPLATES"))
    if templates in OWN:
        return list(OWN[templates])
    if not Path(templates).is_file():
        raise ValueError(f"--templates {templates} is no file; write imagenet, {', '.join(OWN)}, or name one: a "
                         "sentence a line, {} for the name")
    found = lines(Path(templates), "sentences")
    if not all("{}" in line for line in found):
        raise ValueError(f"--templates {templates}: {next(line for line in found if '{}' not in line)!r} has no {{}}; "
                         "that is where the name of the class goes")
    return found


@cache
def clip_list(name):
    """A tuple of open_clip's zero_shot_metadata.py: strings, or functions of a name, as sentences with {}"""
    package = find_spec("open_clip")
    path = Path(package.origin).with_name("zero_shot_metadata.py") if package else None
    if not path or not path.is_file():
        raise ValueError("CLIP's names and sentences are not here; pip install -e \".[text]\", which brings "
                         "open_clip_torch; or write --names FILE --templates plain")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return tuple(sentence(each) for each in node.value.elts)
    raise ValueError(f"{path} has no {name}; install open_clip_torch 3.3 again")


def sentence(node):
    """Of Python's syntax a string, or a lambda of one: lambda c: f'a photo of a {c}.'"""
    if isinstance(node, ast.Constant):
        return node.value
    return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.body.values)
