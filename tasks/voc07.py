"""
VOC2007's classes, several in an image: for each a logistic regression of its images against the rest; 11-point mAP.

    python evaluate.py --task voc07 --weights runs/s --data VOCdevkit/VOC2007     JPEGImages, Annotations, ImageSets

paper: DINOv3 App. D.7, Tab. 22; Everingham et al. 2010. Dimension letters: see model.py.
"""

import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from tqdm import tqdm

from engine.classify import PENALTIES, classifier
from engine.metrics import eleven_point_precision
from engine.task import Paper, Task
from engine.views import middle
from sets.classes import Files
from sets.pairs import evenly, lines, there

RANDOM = 20                               # rankings that the chance is the mean of


def read_objects(path):
    """VOC's .xml -> {class: one of its objects is not marked difficult}"""
    found = {}
    try:
        for thing in ElementTree.parse(path).findall("object"):
            name = thing.findtext("name")
            found[name] = found.get(name, False) or thing.findtext("difficult", "0").strip() != "1"
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"--data: {path} cannot be read ({error}); wanted Annotations of all images listed") from error
    return found


def open_split(c, split):
    """-> its images;  objects n, each as read_objects has them"""
    listed = Path(c.data, f"ImageSets/Main/{split}.txt")
    if not listed.is_file():
        raise ValueError(f"--data: {c.data} has no ImageSets/Main/{split}.txt; name a folder as VOCdevkit/VOC2007")
    names = evenly([line.split()[0] for line in lines(listed, "names")], c.limit)
    return (Files(there([Path(c.data, f"JPEGImages/{name}.jpg") for name in names], listed)),
            [read_objects(Path(c.data, f"Annotations/{name}.xml")) for name in names])


def open_voc(c):
    """{split: (images, objects)}: trainval and test;  without a test.txt, as in VOC2012, train and val"""
    lists = {path.stem for path in Path(c.data, "ImageSets/Main").glob("*.txt")}
    splits = ("train", "val") if "val" in lists and "test" not in lists else ("trainval", "test")
    data = {split: open_split(c, split) for split in splits}
    fitted, scored = (set().union(*objects) for _, objects in data.values())
    if scored - fitted and not c.limit:
        raise ValueError(f"--data: {splits[1]} of {c.data} shows {min(scored - fitted)}, which {splits[0]} does not")
    return data


def mean_precision(scores, there, counted):
    """n K each -> mean of the 11-point precisions of the classes that are there, in percent"""
    each = [eleven_point_precision(*columns) for columns in zip(scores.T, there.T, counted.T, strict=True)]
    each = [precision for precision in each if precision is not None]
    if not each:
        raise ValueError("voc07: none of the images to score has an object that counts; write a larger --limit")
    return 100 * float(np.mean(each))


def run(data, frozen, c):
    """
    For each class a logistic regression of its images against the rest, on cls; one C for all. A tenth of trainval
    picks C by mAP, then all of it is fitted. Where all objects of a class in an image are difficult, the image is
    neither fitted nor scored for this class.

    returns  11-point mAP in percent, C;  chance, the mAP of random rankings;  the split that was scored

    paper:   DINOv3 App. D.7, Tab. 22; what its fit makes of difficult objects, it does not say
    """
    rng, seen = np.random.default_rng(c.seed), []
    for split, (images, objects) in data.items():
        tokens = frozen.tokens(split, images)  # of those that can be read: their labels are their rows
        seen.append((tokens.cls.double().numpy(), [objects[i] for i in tokens.labels.tolist()]))
    (x, objects), (x_test, tested) = seen
    if c.control:
        objects, tested = ([each[i] for i in rng.permutation(len(each))] for each in (objects, tested))
    classes = sorted(set().union(*objects))
    (there, counted), tested = ([np.array([[each.get(name, absent) for name in classes] for each in split])
                                 for absent in (False, True)] for split in (objects, tested))  # n K each
    held = rng.permutation(len(x)) < max(len(x) // 10, 1)
    tried, scores = np.zeros((len(PENALTIES), held.sum(), len(classes))), np.zeros(tested[0].shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, name in enumerate(tqdm(classes, desc="voc07", unit="class", leave=False, disable=None)):
            model, rows = classifier(warm_start=True), counted[:, k] & ~held
            fitted, y = x[rows], there[rows, k]
            if y.all() or not y.any():
                raise ValueError(f"voc07: all or none of {len(y)} images to fit show {name}; write a larger --limit")
            for j, C in enumerate(PENALTIES):
                tried[j, :, k] = model.set_params(C=C).fit(fitted, y).decision_function(x[held])
        precisions = [mean_precision(each, there[held], counted[held]) for each in tried]
        C = float(PENALTIES[np.argmax(precisions)])  # of equals the first
        for k, rows in enumerate(counted.T):
            scores[:, k] = classifier(C).fit(x[rows], there[rows, k]).decision_function(x_test)
    chance = [mean_precision(rng.random(scores.shape), *tested) for _ in range(RANDOM)]
    return dict(map=mean_precision(scores, *tested), C=C, chance=float(np.mean(chance)),
                scored=list(data)[1], n_classes=len(classes), n_train=len(x), n_val=len(x_test))


TASK = Task("voc07", "JPEGImages/, Annotations/, ImageSets/Main/{trainval,test}.txt", open_voc, run, wants="tokens",
            metric="map", view=middle, shapes=False, needs=("sklearn",),
            paper=(Paper("map", {"7b": 88.2}, 512, dict(n_train=5011, n_val=4952)),))  # Tab. 22
