"""
What a run on satellite images changes of a recipe, by train.py --recipe satellite, and of the stages that follow it.

    recipe    a size's own recipe -> the one for satellite images
    stage     what Gram anchoring and high resolution change for a run of it

paper:   DINOv3 §8.1: SAT-493M, RGB of 512 x 512 pixels at 0.6 m; all numbers of the web's 7B but mean, std and lengths:
         100k steps, 10k of Gram anchoring, 8k at 512 pixels
differs: quarter turns and flips, as from above there is no up; warm-ups are as long a part of the steps as they are of
         the web's. Smaller sizes are distilled there; here they may be trained with the same steps. Not run
"""

from dataclasses import replace

from engine.layouts import STATISTICS

STEPS = dict(pretrain=100_000, gram=10_000, highres=8_000)
SEEN = dict(zip(("mean", "std"), STATISTICS["sat493m"], strict=True), flip=0.5, turns=True)
HIGHRES = dict(resolutions="512x112x768*1", lr_warmup=round(STEPS["highres"] / 3))  # a third of them, as of the web's


def recipe(c, warmups):
    """c  of a size    warmups  fields in steps, which shrink as the steps do; of tiny all keep their length"""
    if c.size == "tiny":
        return replace(c, recipe="satellite", **SEEN)
    shrunk = {name: round(getattr(c, name) * STEPS["pretrain"] / c.steps) for name in warmups}
    return replace(c, recipe="satellite", steps=STEPS["pretrain"], **shrunk, **SEEN)


def stage(c, name):
    """Fields of a stage that goes on from the run c, above those of its size; {} of other runs"""
    if c.recipe != "satellite" or c.size == "tiny":
        return {}
    return dict(steps=STEPS[name]) | (HIGHRES if name == "highres" else {})
