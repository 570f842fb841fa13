"""
Logistic regression on class tokens, to its optimum: small sets, and sets of fine classes. evaluate.py is the command.

    python evaluate.py --task logreg --weights runs/s --data PHOTOS               PHOTOS/train/CLASS, PHOTOS/val/CLASS
    python evaluate.py --task voc07 --weights runs/s --data VOCdevkit/VOC2007     JPEGImages, Annotations, ImageSets

    logreg    each image is of one class                                       DINOv3 App. D.7; Fine-S of Tab. 8
    voc07     of several: each class against the rest; 11-point mAP            the same; Everingham et al. 2010

embed(name, source, chosen) -> (cls n D, labels n) comes from evaluate.py. Dimension letters: see model.py.
"""

import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from tqdm import tqdm

from engine.features import evenly
from engine.metrics import eleven_point_precision
from retrieval import Listed

PENALTIES = 10 ** np.linspace(-6, 5, 45)  # C: those tried
RANDOM = 20                               # rankings that the chance of voc07 is the mean of


def classifier(C=1.0, warm_start=False):
    """min over w, b of  |w|^2 / 2 + C sum_i cross entropy_i;  a warm start is the optimum of the C before"""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ValueError("logreg: scikit-learn is not installed; pip install -e .[eval]") from error
    return LogisticRegression(C=C, max_iter=1000, tol=1e-12, warm_start=warm_start)


def logreg(train, val, n_classes, c, device):
    """
    Logistic regression on cls as it is. A tenth of each class of train picks C, then all of train is fitted.

    train, val  (cls n D, patches, labels n)
    returns     top-1 and the mean over classes, in percent, and C;  raises ValueError without scikit-learn

    paper:   DINOv3 App. D.7; by convention mean_per_class for Aircraft, Pets, Caltech-101 and Flowers, else top1
    differs: there the short side becomes 512 and the crop is as long; ours is cut from 256/224 of --resolution
    """
    (x, y), (x_val, y_val) = ((split[0].double().numpy(), split[2].numpy()) for split in (train, val))
    shuffled, held = np.random.default_rng(c.seed).permutation(len(y)), np.zeros(len(y), bool)
    for k in range(n_classes):
        mine = shuffled[y[shuffled] == k]
        held[mine[: max(len(mine) // 10, 1) if len(mine) > 1 else 0]] = True
    best, C = -1.0, 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 1000 iterations need not reach 1e-12
        model = classifier(warm_start=True)
        for candidate in tqdm(PENALTIES, desc="logreg", unit="C", leave=False, disable=None):
            score = model.set_params(C=candidate).fit(x[~held], y[~held]).score(x[held], y[held])
            best, C = max((best, C), (score, candidate), key=lambda pair: pair[0])  # of equals the first
        guess = classifier(C).fit(x, y).predict(x_val)
    each = [100 * float((guess == k)[y_val == k].mean()) for k in range(n_classes) if (y_val == k).any()]
    return dict(top1=100 * float((guess == y_val).mean()), mean_per_class=float(np.mean(each)), C=float(C))

# --------------------------------------------------------------------------------
# VOC


class Rows(Listed):
    """Images by their paths, each labelled with its own row: what is in it has no single number."""

    def label(self, i):
        return i


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


def open_voc(embed, c, split):
    """-> cls n D, float64;  objects n, each as read_objects has them"""
    listed = Path(c.data, f"ImageSets/Main/{split}.txt")
    if not listed.is_file():
        raise ValueError(f"--data: {c.data} has no ImageSets/Main/{split}.txt; name a folder as VOCdevkit/VOC2007")
    names = listed.read_text().split()
    source = Rows([Path(c.data, f"JPEGImages/{name}.jpg") for name in names])
    cls, rows = embed(split, source, evenly(range(len(names)), c.limit))
    return cls.double().numpy(), [read_objects(Path(c.data, f"Annotations/{names[i]}.xml")) for i in rows.tolist()]


def mean_precision(scores, there, counted):
    """n K each -> mean of the 11-point precisions of the classes that are there, in percent"""
    each = [eleven_point_precision(*columns) for columns in zip(scores.T, there.T, counted.T, strict=True)]
    each = [precision for precision in each if precision is not None]
    if not each:
        raise ValueError("voc07: none of the images to score has an object that counts; write a larger --limit")
    return 100 * float(np.mean(each))


def voc07(embed, c):
    """
    For each class a logistic regression of its images against the rest, on cls; one C for all. A tenth of trainval
    picks C by mAP, then all of it is fitted. Where all objects of a class in an image are difficult, the image is
    neither fitted nor scored for this class. Without a test.txt, as in VOC2012, train is fitted and val is scored.

    returns  11-point mAP in percent, C;  chance, the mAP of random rankings;  the split that was scored

    paper:   DINOv3 App. D.7, Tab. 22; what its fit makes of difficult objects, it does not say
    """
    if c.shots:
        raise ValueError("--shots: an image of voc07 is of several classes; leave it out")
    lists, rng = {path.stem for path in Path(c.data, "ImageSets/Main").glob("*.txt")}, np.random.default_rng(c.seed)
    splits = ("train", "val") if "val" in lists and "test" not in lists else ("trainval", "test")
    (x, objects), (x_test, tested) = (open_voc(embed, c, split) for split in splits)
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
                scored=splits[1], n_classes=len(classes), n_train=len(x), n_val=len(x_test))
