"""sets/geobench.py, tasks/geobench.py: miniatures of the sets as they unpack; pickles refused; both protocols."""

import ast
import datetime
import json
import os
import pickle
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score

import evaluate
from decoders import load_decoder
from engine.features import load
from sets import geobench as sets
from tasks import TASKS, geobench

try:
    import h5py
except ImportError:
    h5py = None


class File:
    """Stands for h5py.File where that is not installed: arrays by name, and what is said beside them"""

    def __init__(self, path, mode):
        self.path, self.mode, self.attrs, self.arrays = path, mode, {}, {}
        if mode == "r":
            try:
                with np.load(path, allow_pickle=True) as file:
                    self.arrays = dict(file)
            except (ValueError, pickle.UnpicklingError) as error:
                raise OSError("file signature not found") from error
            self.attrs = self.arrays.pop("attrs").item()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.mode == "w":
            with open(self.path, "wb") as file:
                np.savez(file, attrs=np.array(self.attrs, object), **self.arrays)

    def __iter__(self):
        return iter(self.arrays)

    def __getitem__(self, name):
        return self.arrays[name]

    def __setitem__(self, name, value):
        self.arrays[name] = value


@pytest.fixture(autouse=True)
def library(monkeypatch):
    found = h5py or SimpleNamespace(File=File)
    monkeypatch.setitem(sys.modules, "h5py", found)
    return found


def foreign(module, name):
    """An object of a class that only the writers of the samples have"""
    owner = ModuleType(module)
    kind = type(name, (), dict(__module__=module))
    setattr(owner, name, kind)
    return owner, kind()


BANDS = {"02 - Blue": 9000, "03 - Green": 8000, "04 - Red": 7000, "05 - Vegetation Red Edge": 6000, "08 - NIR": 5000}


def sample(library, path, bands, label=None, said=None, date=""):
    with library.File(path, "w") as file:
        for name, x in bands.items():
            file[name + date] = x
        if label is not None:
            file["label"] = label
        if said is not None:
            file.attrs["pickle"] = repr(pickle.dumps(said))


def miniature(library, root, name, counts=(8, 6, 4), side=32, date="_2018-05-01"):
    """Red tells the class; as it unpacks"""
    forms = sets.CLASSIFICATION if name in sets.CLASSIFICATION else sets.SEGMENTATION
    form, folder = forms[name], root / name
    folder.mkdir(parents=True)
    rng, partition, i = np.random.default_rng(0), {}, 0
    for split, n in zip(("train", "valid", "test"), counts, strict=True):
        partition[split] = [f"id_{i + k:04}" for k in range(n)]
        for _ in range(n):
            bands = {band: rng.integers(1000, top, (side, side)).astype(np.int16) for band, top in BANDS.items()}
            classes = i % form.n_classes
            bands["04 - Red"][:] = 1000 + 6000 * classes / max(form.n_classes - 1, 1)
            label, said = None, {}
            if form.kind == "pixels":
                label = (np.arange(side * side).reshape(side, side) // side % (form.n_classes + form.first))
            else:
                said = dict(label=classes if form.kind == "class" else np.eye(form.n_classes, dtype=int)[classes])
            sample(library, folder / f"id_{i:04}.hdf5", bands, label, said, date)
            i += 1
    stats = {band: dict(min=1000, max=top, mean=3.0, std=2.0, percentile_1=1) for band, top in BANDS.items()}
    (folder / "band_stats.json").write_text(json.dumps(stats | dict(label=dict(min=0, max=1))))
    (folder / "default_partition.json").write_text(json.dumps(partition))
    (folder / "task_specs.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")  # it is never opened
    return folder


def config(task, folder, **more):
    return TASKS[task].config(data=str(folder), weights="untrained:tiny", **more)

# --------------------------------------------------------------------------------
# What lies on disk


def test_there_are_the_twelve_sets():
    assert len(sets.CLASSIFICATION) == len(sets.SEGMENTATION) == 6
    assert sum(sum(form.counts) for form in sets.CLASSIFICATION.values()) == 87_283
    assert sum(sum(form.counts) for form in sets.SEGMENTATION.values()) == 16_718


@pytest.mark.parametrize("date", ["", "_2018-05-01"])
@pytest.mark.parametrize("name", [*sets.CLASSIFICATION, *sets.SEGMENTATION])
def test_each_set_as_it_unpacks(library, tmp_path, capsys, name, date):
    task = "geobench" if name in sets.CLASSIFICATION else "geobench_seg"
    folder = miniature(library, tmp_path, name, (3, 2, 1), date=date)
    found, splits = geobench.opened(config(task, folder), sets.CLASSIFICATION if task == "geobench" else
                                    sets.SEGMENTATION)
    assert found == name and [len(split) for split in splits] == [3, 2, 1]
    form = splits[0].form
    assert f"has (3, 2, 1) images to train on, to pick by, to measure on; the published {name} {form.counts}" in \
        capsys.readouterr().out
    image, truth = splits[0].load(1), splits[0].truth(1)
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32
    assert image[0].unique().item() == pytest.approx(1 / max(form.n_classes - 1, 1), abs=2e-4)
    assert 0 <= image[1:].min() < 0.1 and 0.9 < image[1:].max() <= 1
    exact = dict(class_=1, classes=np.eye(form.n_classes)[1], pixels=None)
    if form.kind == "pixels":
        stored = np.arange(32) % (form.n_classes + form.first) - form.first
        exact = np.where(stored < 0, 255, stored)[:, None].repeat(32, 1)
        assert np.array_equal(truth, exact)
    else:
        assert np.array_equal(truth, exact["class_" if form.kind == "class" else "classes"])


def test_bands_by_name(library, tmp_path):
    folder = miniature(library, tmp_path, "m-eurosat")
    _, (train, *_) = sets.open_geobench(config("geobench", folder, channels="nir,08 - NIR,Vegetation Red Edge"),
                                        sets.CLASSIFICATION)
    image = train.load(0)
    assert torch.equal(image[0], image[1]) and not torch.equal(image[0], image[2])
    for channels, says in (("Red,Green,SWIR", "band_stats.json has no single band SWIR; it has 02 - Blue, 03 - Green"),
                           ("Red", "--channels Red names 1, the network has 3")):
        with pytest.raises(ValueError, match=says):
            geobench.opened(config("geobench", folder, channels=channels), sets.CLASSIFICATION)


@pytest.mark.parametrize("data", [
    pickle.dumps(os.system), b"cos\nsystem\n(S'exit 1'\ntR.", b"cbuiltins\neval\n(S'1'\ntR.",
    b"cbuiltins\ngetattr\n.", pickle.dumps(ast.literal_eval), b"\x80\x04\x8c\x05numpy\x8c\x04load\x93.", b"no pickle"])
def test_a_malicious_pickle_is_refused(library, tmp_path, data):
    with pytest.raises(ValueError, match="its pickle is refused"):
        sets.unpickled(data)
    folder = miniature(library, tmp_path, "m-eurosat")
    with library.File(folder / "id_0000.hdf5", "w") as file:
        file["04 - Red"] = np.ones((8, 8))
        file.attrs["pickle"] = repr(data)
    _, (train, *_) = sets.open_geobench(config("geobench", folder), sets.CLASSIFICATION)
    with pytest.raises(ValueError, match="id_0000.hdf5 has no label that can be read: its pickle is refused") as error:
        train.truth(0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_what_samples_say_is_read(monkeypatch, protocol):
    """Numbers, arrays, dates; objects of the library that wrote them, which is not here, are left empty"""
    owner, thing = foreign("geobench", "Sentinel2")
    monkeypatch.setitem(sys.modules, "geobench", owner)
    said = dict(label=np.int64(3), many=np.eye(3), date=datetime.datetime(2018, 5, 1), band=thing, name="a")
    data = pickle.dumps(said, protocol)
    monkeypatch.delitem(sys.modules, "geobench")
    found = sets.unpickled(data)
    assert found["label"] == 3 and np.array_equal(found["many"], np.eye(3)) and found["date"].year == 2018
    assert isinstance(found["band"], sets.Opaque)


def test_arrays_of_an_older_numpy():
    old = pickle.dumps(np.arange(3), 3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert sets.unpickled(old).tolist() == [0, 1, 2]


def broken(folder, library, what):
    if what == "name":
        return folder.rename(folder.with_name("eurosat"))
    if what in ("band_stats.json", "default_partition.json"):
        (folder / what).write_text("{")
    elif what == "ends":
        (folder / "band_stats.json").write_text(json.dumps({band: {} for band in BANDS}))
    elif what == "missing":
        (folder / "id_0003.hdf5").unlink()
    return folder


@pytest.mark.parametrize("what, says", [
    ("name", "eurosat is called none of m-bigearthnet, m-so2sat"),
    ("band_stats.json", "band_stats.json cannot be read"),
    ("default_partition.json", "default_partition.json cannot be read .*; wanted names of train, valid and test"),
    ("ends", "its lists of bands or of splits have no 'min'; wanted them as downloaded"),
    ("missing", "id_0003.hdf5 is missing in .*; wanted all of default_partition.json")])
def test_a_set_that_is_not_whole(library, tmp_path, what, says):
    folder = broken(miniature(library, tmp_path, "m-eurosat"), library, what)
    with pytest.raises(ValueError, match=says) as error:
        sets.open_geobench(config("geobench", folder), sets.CLASSIFICATION)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, label, says", [
    ("m-eurosat", 10, r"has a label \(\) up to 10; wanted one of 10 classes"),
    ("m-bigearthnet", np.ones(42), r"has a label \(42,\) up to 1.0; wanted 43 of 0 and 1"),
    ("m-bigearthnet", np.full(43, 2), r"has a label \(43,\) up to 2; wanted 43 of 0 and 1"),
    ("m-nz-cattle", np.full((4, 4), 2), r"has a label \(4, 4\) up to 2; wanted H W of 2 classes from 0 on"),
    ("m-nz-cattle", 1, r"has a label \(\) up to 1; wanted H W of 2 classes")])
def test_labels_that_are_refused(library, tmp_path, name, label, says):
    forms = sets.CLASSIFICATION if name in sets.CLASSIFICATION else sets.SEGMENTATION
    folder = miniature(library, tmp_path, name)
    sample(library, folder / "id_0000.hdf5", {"04 - Red": np.ones((4, 4))}, None, dict(label=label))
    _, (train, *_) = sets.open_geobench(config("geobench", folder), forms)
    with pytest.raises(ValueError, match=says):
        train.truth(0)


def test_samples_that_cannot_be_read(library, tmp_path):
    folder = miniature(library, tmp_path, "m-eurosat")
    (folder / "id_0000.hdf5").write_text("no numbers")
    sample(library, folder / "id_0001.hdf5", {"04 - Red": np.full((4, 4), np.nan)}, None, dict(other=1))
    _, (train, *_) = sets.open_geobench(config("geobench", folder, channels="Red,Red,Red"), sets.CLASSIFICATION)
    for read, says in ((lambda: train.load(0), "id_0000.hdf5 cannot be read"),
                       (lambda: train.load(1), r"has bands \(4, 4\), or values that are none"),
                       (lambda: train.truth(1), "no label that can be read: 'label'")):
        with pytest.raises(ValueError, match=says):
            read()

# --------------------------------------------------------------------------------
# Protocols


def test_f1_is_scikit_learns():
    rng = np.random.default_rng(0)
    found, truth = (rng.random((40, 7)) > p for p in (0.6, 0.7))
    assert geobench.f1(*map(torch.from_numpy, (found, truth))) == pytest.approx(
        100 * f1_score(truth, found, average="micro"))
    assert geobench.f1(torch.zeros(2, 3, dtype=bool), torch.zeros(2, 3, dtype=bool)) == 0


def test_the_loss_of_several_labels():
    logits, y = torch.randn(4, 2, 5), (torch.rand(4, 5) > 0.5).float()
    exact = sum(F.binary_cross_entropy_with_logits(logits[:, r], y) * 4 for r in range(2))
    assert geobench.several(logits, y).item() == pytest.approx(exact.item(), rel=1e-5)


def test_rates_are_the_papers():
    assert geobench.RATES[0] == pytest.approx(1e-5) and geobench.RATES[-1] == 1 and len(geobench.RATES) == 16
    assert geobench.PIXEL_RATES == (3e-5, 1e-4, 3e-4, 1e-3)
    assert (TASKS["geobench"].config().iterations, TASKS["geobench"].config().linear_batch) == (2400, 32)
    assert TASKS["geobench_seg"].config().iterations == 40000


def run(*words):
    words = " ".join(map(str, (*words, "--device cpu --precision fp32 --workers 0 --weights untrained:tiny")))
    return evaluate.evaluate(evaluate.configure(words.split()))


@pytest.mark.parametrize("name", ["m-brick-kiln", "m-bigearthnet"])
def test_a_classification(library, tmp_path, name):
    """What red tells is found; shuffled, it is not. Valid picks the rate, the score is of test."""
    folder = miniature(library, tmp_path, name, (24, 12, 12))
    words = "--task geobench --resolution 32 --iterations 200 --data", folder
    found = run(*words)
    assert (found["n_train"], found["n_valid"], found["n_test"]) == (24, 12, 12) and found["set"] == name
    assert found["lr"] in geobench.RATES and found["n_classes"] == sets.CLASSIFICATION[name].n_classes
    if name == "m-brick-kiln":
        assert found["score"] == found["valid_score"] == 100 and found["chance"] == 50
        assert run(*words, "--control")["score"] < 90
    else:
        assert 0 <= found["score"] <= 100 and found["chance"] == 0


def test_a_segmentation(library, tmp_path):
    """Every rate is tried, the best on valid kept with its head, which is read again; background does not count"""
    folder = miniature(library, tmp_path, "m-cashew-plant", (4, 2, 2))
    words = "--task geobench_seg --resolution 32 --data", folder
    found = run(*words, "--iterations 1 --out", tmp_path / "out")
    assert found["lr"] in geobench.PIXEL_RATES and found["n_classes"] == 6 and found["n_test"] == 2
    assert (tmp_path / "out/geobench_seg.png").is_file()
    again = run(*words, "--head", tmp_path / "out/head.safetensors")
    assert again["score"] == found["score"] and again["lr"] == found["lr"]
    with pytest.raises(ValueError, match="answers with 6 classes of m-cashew-plant, which only evaluate.py"):
        load_decoder(tmp_path / "out/head.safetensors", load("untrained:tiny"))
    one = run(*words, "--iterations 1 --lr 0.001")
    assert one["lr"] == 0.001


def test_the_loss_of_pixels():
    out = torch.randn(2, 3, 4, 4)
    truths = [torch.tensor([[0, 1], [2, 255]], dtype=torch.uint8).repeat_interleave(4, 0).repeat_interleave(4, 1),
              torch.full((8, 8), 255, dtype=torch.uint8)]
    logits = F.interpolate(out[:1], (8, 8), mode="bilinear")[0].permute(1, 2, 0)
    exact = [-torch.log_softmax(logits[y, x], 0)[int(truths[0][y, x])].item() for y in range(8) for x in range(8)
             if truths[0][y, x] != 255]
    assert geobench.mean_loss(out, truths).item() == pytest.approx(np.mean(exact), rel=1e-5)
    assert geobench.mean_loss(out, truths[1:] * 2) == 0


def test_without_h5py_it_is_named(library, tmp_path, monkeypatch):
    folder = miniature(library, tmp_path, "m-eurosat")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="GEO-Bench wants h5py, which is not installed; pip install -e ..geo."):
        sets.open_geobench(config("geobench", folder), sets.CLASSIFICATION)
