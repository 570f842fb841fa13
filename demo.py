"""
make demo: the whole project once through, on two CPU cores in about a quarter of an hour.

Trains a tiny ViT with the DINO, iBOT and KoLeo losses on generated images, measures it beside raw pixels and beside
the same network untrained, and writes pictures to runs/demo. A second call finds the trained network and only
measures it again; one that was interrupted goes on where it stopped.
"""

import json
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import evaluate
import train
import visualize
from engine import config as command_line
from engine.checkpoint import newest, saved

OUT = Path("runs/demo")
# differs from the paper: the scenes' colours tell no class, so those of the crops vary more; a teacher that averages
# ever more steps lags behind in so short a run, so its momentum stays; the rest fits some minutes
OPTIONS = """--size tiny --device cpu --steps 1250 --lr 2e-3 --lr_end 1e-3 --momentum_end 0.994 --n_local 4
             --global_size 80 --global_scale 0.5,1.0 --local_scale 0.2,0.5 --blur_sigma 0.05,0.5 --solarize 0 --hue 0.5
             --rope_rescale 1.2""".split()
ROWS = ("raw pixels", "pixels"), ("ViT, untrained", "untrained:tiny"), ("ViT, trained", str(OUT))
TASKS = dict(knn=("top1_k20",), linear=("top1", "--iterations", "1000"), segmentation=("miou",))  # metric, options


def train_or_resume():
    """Seconds that training took in all, remembered beside the run."""
    note, start = OUT / "seconds.json", time.perf_counter()
    resumed = bool(saved(OUT)) and (OUT / "config.json").is_file()
    before = json.loads(note.read_text()) if resumed and note.exists() else 0
    if resumed:
        if newest(OUT)[0] == json.loads((OUT / "config.json").read_text())["steps"]:
            print(f"{OUT} is trained already; delete it to train again")
            return before
    else:
        shutil.rmtree(OUT, ignore_errors=True)
    finished = train.main([*(["--resume"] if resumed else OPTIONS), "--out", str(OUT)])
    seconds = before + time.perf_counter() - start
    note.write_text(json.dumps(seconds))
    if not finished:
        raise KeyboardInterrupt  # Ctrl-C: what is done is saved
    return seconds


def measure():
    """(name, metric of each of TASKS) of each of ROWS, in percent; features are extracted once."""
    scores = []
    with TemporaryDirectory() as cache:
        for name, weights in ROWS:
            words = "--weights", weights, "--device", "cpu", "--cache", cache
            found = [evaluate.evaluate(evaluate.configure([*words, "--task", task, *options]))[metric]
                     for task, (metric, *options) in TASKS.items()]
            scores.append((name, *found))
    return scores


def loss_picture(path):
    """The loss terms over the steps, beside the value of a network that predicts nothing."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [json.loads(line) for line in (OUT / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    for axis, name in zip(axes, ("dino_global", "dino_local", "ibot", "koleo"), strict=True):
        axis.plot([row["step"] for row in rows], [row[name] for row in rows], color="#3a6ea5")
        axis.set(title=name, xlabel="step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main(argv):
    seconds = train_or_resume()
    scores = measure()
    loss_picture(OUT / "losses.png")
    pictures = [f"shapes:{i}" for i in range(6)]
    visualize.main(["pca", *pictures, "--weights", str(OUT), "--out", str(OUT / "pca.png")])
    visualize.main(["similarity", *pictures[:3], "--weights", str(OUT), "--out", str(OUT / "similarity.png")])

    print(f"\n{'shapes: 12 classes':30}{'k-NN':>10} {'linear':>9} {'segmentation':>14}")
    for name, knn, linear, miou in scores:
        print(f"{name:30}{knn:9.1f}% {linear:8.1f}% {miou:13.1f}%")
    print(f"{'trained in':30}{seconds / 60:6.1f} min")
    print(f"\npictures: {OUT}/pca.png  {OUT}/similarity.png  {OUT}/losses.png\n\nnext:")
    print("  .venv/bin/python train.py --data FOLDER_OF_PHOTOS --out runs/photos   your own images, no labels needed")
    print("  .venv/bin/python visualize.py pca PHOTO.jpg --weights runs/photos --out pca.png")
    print("  .venv/bin/python train.py --help                                      every option and its value")


if __name__ == "__main__":
    command_line.run(main)
