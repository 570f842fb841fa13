"""
Zero-shot classification: an image is of the class whose sentences lie nearest, and nothing is trained.

    python evaluate.py --task zeroshot --weights runs/words                                   on the generated `shapes`
    python evaluate.py --task zeroshot --weights runs/words --data PHOTOS                     PHOTOS/[val/]CLASS/*.jpg
    python evaluate.py --task zeroshot --weights dinov3_vitl16.pth --text dinotxt.pth --data IMAGENET \
        --tests imagenet-r,imagenet-a,objectnet-1.0                                           see sets/variants.py

paper: DINOv3 §5.3, Tab. 16; at 384 pixels, CLIP's 80 sentences. Dimension letters: see the top of model.py.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dinotxt import ask, best_name, with_words
from engine.sources import open_source
from engine.task import Option, Paper, Task
from engine.views import middle
from sets import variants
from sets.classes import KAGGLE, limited, open_splits, stray
from sets.prompts import NAMES, STRUCTURED, TEMPLATES, TEXT, names_of, sentences


def open_all(c):
    """val, names of its classes, sentences, and of all --tests {name: (its name in --cache, images, Variant)}"""
    said, tests = sentences(c.templates), {}
    if c.data == "shapes":
        if c.tests or c.names:
            raise ValueError("--tests, --names: zeroshot on shapes has no use for them; write --data PHOTOS")
        return limited(open_source("shapes", c.limit or 500, seed=1001), 0), [[name] for name in STRUCTURED], said, {}
    train, val = splits(c)
    for path in c.tests.split(",") if c.tests else []:
        for name, variant in variants.open_variants(path, train, val).items():
            source = variant.source if variant.of_val else limited(variant.source, c.limit)
            tests[name] = f"{path} {name}", source, variant
    return val, names_of(val.classes, c.names), said, tests


def splits(c):
    """What names the classes, and the images; of a folder without train it is the same. Raises ValueError."""
    root = Path(c.data)
    if (root / "train").is_dir() or (root / KAGGLE).is_dir():
        return open_splits(c)
    source = open_source(root / "val" if (root / "val").is_dir() else root)
    alone = stray(source)
    if alone or len(source.classes) < 2:
        raise ValueError(f"--data: {c.data} has {len(source.classes)} folders of classes"
                         + (f", and {alone} in none" if alone else "") + f"; zeroshot wants {TASK.layout}")
    return source, limited(source, c.limit)


def run(data, frozen, c):
    val, names, said, tests = data
    vectors, classes = prompts(frozen, names, said)
    tokens, n = frozen.tokens("val", val), len(names)
    labels = tokens.labels[torch.from_numpy(np.random.default_rng(c.seed).permutation(len(tokens.labels)))] \
        if c.control else tokens.labels
    ranked = ranking(tokens, vectors, classes, range(n))
    found = {f"top{k}": 100 * (ranked[:, :k] == labels[:, None]).any(1).float().mean().item()
             for k in (1, 5) if k == 1 or n > 5}
    scores = {}
    for name, (folder, source, variant) in tests.items():
        seen = tokens if variant.of_val else frozen.tokens(folder, source)
        rows = torch.tensor([variant.source.label(k) for k in seen.rows]) if variant.of_val else seen.labels
        scores[name] = variants.top1(ranking(seen, vectors, classes, variant.columns)[:, 0], rows, variant)
    return found | variants.summary(scores) | dict(chance=100 / n, n_classes=n, n_val=len(labels),
                                                   n_sentences=len(said))


def prompts(frozen, names, said):
    """Vectors of the names, kept as features are; the class of each"""
    classes = torch.tensor([k for k, several in enumerate(names) for _ in several])
    vectors = frozen.once("prompts", partial(asked, frozen, names, said), names=names, sentences=said)
    return torch.from_numpy(vectors).to(frozen.device), classes


def asked(frozen, names, said):
    with torch.autocast(frozen.device.type, torch.bfloat16, enabled=frozen.precision == "bf16"):
        return ask(frozen.model, names, said)[0].numpy()


def ranking(tokens, vectors, classes, columns):
    """Classes, of those of `columns`, from the likeliest to the least, five at most:  n 5"""
    columns, found = torch.as_tensor(list(columns)), []
    for part in tokens.table("cls", "patches").split(2048):
        cosine = F.normalize(part.to(vectors.device), dim=1) @ vectors.T                       # B names
        scores = best_name(cosine, classes, int(classes.max()) + 1).cpu()[:, columns]
        found.append(columns[scores.topk(min(5, len(columns)), 1).indices])
    return torch.cat(found)


PAPER = tuple(Paper(metric, {"l": value}, 384, dict(n_val=50000, n_classes=1000)) for metric, value in (
    ("top1", 82.3), ("top1_imagenet-a", 85.4), ("top1_imagenet-r", 93.0), ("top1_objectnet", 80.5)))  # Tab. 16
TASK = Task(
    "zeroshot", "[val/]CLASS/; of ImageNet train/CLASS/ too, for --tests", open_all, run, wants="tokens", metric="top1",
    view=middle, sides=(384, 80), network=with_words, paper=PAPER,
    options=(TEXT, NAMES, TEMPLATES, Option("tests", "", "more sets to score, as in imagenet-r,imagenet-a; see "
                                            "sets/variants.py", scored=False)))
