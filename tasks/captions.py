"""
Retrieval by words: of all captions those of an image, of all images that of a caption.

    python evaluate.py --task captions --weights runs/words                                    on the generated `shapes`
    python evaluate.py --task captions --weights runs/words --data COCO/annotations/captions_val2017.json
    python evaluate.py --task captions --weights runs/words --data PHOTOS                      see sets/captions.py

An image has found its text if any of its captions is among the k nearest, a caption its image if that one is.

paper: DINOv3 §5.3, Tab. 16: COCO, whose 5,000 images of val2017 have five captions each, or a few more that do not
       count. Dimension letters: see the top of model.py.
"""

import numpy as np
import torch
import torch.nn.functional as F

from dinotxt import with_words
from engine.task import Option, Paper, Task
from engine.views import middle
from sets.captions import open_captions
from sets.prompts import TEXT

RANKS = 1, 5, 10


def open_set(c):
    return open_captions(c.data, c.limit, n_shapes=500, seed=1001)


def run(source, frozen, c):
    tokens = frozen.tokens("images", source)
    if len(tokens.rows) < len(source):
        raise ValueError(f"--data: {len(source) - len(tokens.rows)} images of {c.data} cannot be read; ranks would be "
                         "wrong: mend them, or leave them out")
    texts = [source.captions(i)[: c.captions or None] for i in range(len(source))]
    owner = torch.tensor([i for i, several in enumerate(texts) for _ in several])
    with torch.autocast(frozen.device.type, torch.bfloat16, enabled=frozen.precision == "bf16"):
        words = frozen.model.encode_words([text for several in texts for text in several])
    images = tokens.table("cls", "patches")[:].to(frozen.device)
    if c.control:
        owner = owner[torch.from_numpy(np.random.default_rng(c.seed).permutation(len(owner)))]
    found = recalls(F.normalize(images, dim=1), F.normalize(words, dim=1), owner.to(frozen.device))
    return found | dict(chance=100 / len(source), n_images=len(source), n_captions=len(owner))


def recalls(images, words, owner):
    """
    images  n D, words  m D, of unit length    owner  m: the image that a text is of

    returns  percent of the images one of whose texts is among the k nearest, of the texts whose image is
    """
    found, n = {}, len(images)
    nearest = torch.cat([(part @ words.T).topk(min(RANKS[-1], len(words)), 1).indices for part in images.split(1024)])
    right = owner[nearest] == torch.arange(n, device=owner.device)[:, None]                    # n 10
    found |= {f"image_to_text_{k}": 100 * right[:, :k].any(1).float().mean().item() for k in RANKS}
    nearest = torch.cat([(part @ images.T).topk(min(RANKS[-1], n), 1).indices for part in words.split(1024)])
    right = nearest == owner[:, None]                                                          # m 10
    return found | {f"text_to_image_{k}": 100 * right[:, :k].any(1).float().mean().item() for k in RANKS}


TASK = Task(
    "captions", "COCO's captions_*.json, captions.json, a table, tars, NAME.jpg with NAME.txt", open_set, run,
    wants="tokens", metric="image_to_text_1", view=middle, sides=(384, 80), network=with_words,
    options=(TEXT, Option("captions", 5, "captions of each image that count; 0 = all of them")),
    paper=tuple(Paper(metric, {"l": value}, 384, dict(n_images=5000, n_captions=25000))
                for metric, value in (("image_to_text_1", 63.7), ("text_to_image_1", 45.6))))
