"""
visualize.py: components agree with an SVD, one basis serves all images, nothing is transposed, mistakes end in a line.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.explore import HEAT
from engine.images import resize
from model import ViT, ViTConfig, build
from visualize import (
    GUTTER,
    MODES,
    cropped,
    find_images,
    main,
    patch_features,
    pca_picture,
    sheet,
    similarity_picture,
)
from weights import save_backbone

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def vit():
    return build(lambda: ViT(ViTConfig(2, 16, 2, 32, patch_size=8, layerscale=0.1))).eval()


@pytest.fixture(scope="module")
def folder(vit, tmp_path_factory):
    """weights.safetensors, and photos/: 40x24, 33x50 (width x height), a broken one, and a text."""
    folder = tmp_path_factory.mktemp("visualize")
    save_backbone(vit, folder / "weights.safetensors", "nano")
    (folder / "photos").mkdir()
    for i, (W, H) in enumerate([(40, 24), (33, 50)]):
        Image.fromarray(noise(3, H, W, seed=i).permute(1, 2, 0).numpy()).save(folder / "photos" / f"{i}.png")
    (folder / "photos" / "broken.jpg").write_bytes(b"no image")
    (folder / "photos" / "notes.txt").write_text("not an image either")
    return folder


def noise(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

# --------------------------------------------------------------------------------
# PCA


@pytest.mark.parametrize("seed", range(4))
def test_pca_agrees_with_an_svd_and_with_sklearn(seed):
    from sklearn.decomposition import PCA
    maps = [normal(5, 7, 12, seed=seed) * torch.arange(1, 13), normal(4, 3, 12, seed=seed + 4) + 2]
    x = torch.cat([m.flatten(0, 1) for m in maps]).double().numpy()
    _, _, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
    got = np.concatenate([c.reshape(-1, 3) for c in pca_picture(maps)])
    for axes in v[:3], PCA(3, svd_solver="full").fit(x).components_:
        axes = axes * np.sign([axis[abs(axis).argmax()] for axis in axes])[:, None]
        scores = (x - x.mean(0)) @ axes.T
        low, high = np.percentile(scores, (1, 99), axis=0)
        assert abs(got - ((scores - low) / (high - low)).clip(0, 1)).max() < 1e-9  # measured: 4e-15


def test_pca_is_the_same_again_and_changes_no_input():
    maps = [normal(6, 5, 8)]
    before = maps[0].clone()
    assert np.array_equal(pca_picture(maps)[0], pca_picture(maps)[0])
    assert torch.equal(maps[0], before)


def test_one_basis_for_all_images():
    a, b = normal(6, 4, 16), normal(6, 4, 16, seed=1) + 1
    one, two = pca_picture([torch.cat([a, b], 1), torch.cat([b, a], 1)])
    assert one.shape == (6, 8, 3)
    assert np.allclose(one[:, :4], two[:, 4:]) and np.allclose(one[:, 4:], two[:, :4])
    alone = pca_picture([torch.cat([a, b], 1)])[0]
    assert not np.allclose(pca_picture([torch.cat([a, b], 1), 5 * normal(9, 9, 16, seed=2)])[0], alone, atol=0.05)


def test_rows_and_columns_stay_where_they_are():
    ramp = torch.stack(torch.meshgrid(torch.arange(3.0), 10 * torch.arange(9.0), indexing="ij"), -1)
    colours = pca_picture([torch.cat([ramp, torch.zeros(3, 9, 2)], -1)])[0]
    assert colours.shape == (3, 9, 3)
    assert np.ptp(colours[..., 0], axis=0).max() < 1e-9 and (np.diff(colours[..., 0]) >= 0).all()  # columns: larger
    assert np.ptp(colours[..., 1], axis=1).max() < 1e-9 and np.ptp(colours[..., 1], axis=0).min() > 0.99


def test_a_component_that_is_not_there_stays_empty():
    colours = pca_picture([normal(6, 7, 2).double() @ normal(2, 16).double()])[0]
    assert (colours[..., :2].max((0, 1)) == 1).all() and colours[..., 2].max() < 1e-6


@pytest.mark.parametrize("sign", [1, -1])
def test_foreground_is_away_from_the_border_and_the_rest_is_black(sign):
    m = 0.1 * normal(8, 10, 6)
    m[2:6, 3:8, 0] += 5 * sign
    colours = pca_picture([m, m.flip(1)], foreground=0.5)
    inside = np.zeros((8, 10), bool)
    inside[2:6, 3:8] = True
    assert (colours[0][~inside] == 0).all() and (colours[0][inside].sum(-1) > 0).all()
    assert np.allclose(colours[1], colours[0][:, ::-1])
    assert np.allclose(colours[0][inside].max(0), 1)  # components of its own use the whole range


def test_flat_maps_are_black_and_have_no_foreground():
    assert pca_picture([torch.ones(3, 4, 5) / 3])[0].max() == 0
    with pytest.raises(ValueError, match="--foreground 0.5 leaves 0 of 12 patches"):
        pca_picture([torch.ones(3, 4, 5) / 3], foreground=0.5)

# --------------------------------------------------------------------------------
# Similarity


def lightness(rgb):
    rgb = np.asarray(rgb) / 255
    y = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    return np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27)


def test_the_colour_map_rises_evenly_in_lightness():
    steps = np.diff(lightness(HEAT))
    assert len(HEAT) == 8 and abs(steps - 94 / 7).max() < 0.5  # measured: 0.14


@pytest.mark.parametrize("row, column", [(0, 0), (2, 8), (5, 1)])
def test_similarity_is_the_highest_at_the_point(row, column):
    m, image = normal(6, 9, 16), noise(3, 6 * 24, 9 * 24)
    photo, picture = similarity_picture(m, image, ((column + 0.5) / 9, (row + 0.5) / 6))
    assert photo.shape == picture.shape == (144, 216, 3) and photo.dtype == picture.dtype == np.uint8
    centres = picture[12::24, 12::24]
    assert tuple(centres[row, column]) == tuple(HEAT[-1]) and (centres == HEAT[-1]).all(-1).sum() == 1
    cosine = torch.nn.functional.cosine_similarity(m, m[row, column].expand_as(m), dim=-1).flatten().numpy()
    away = (abs(np.arange(6)[:, None] - row) + abs(np.arange(9) - column) > 1).flatten()  # the ring hides neighbours
    order = cosine[away].argsort()
    assert (np.diff(lightness(centres.reshape(-1, 3)[away][order])) >= -0.5).all()  # 0.5: rounding to uint8
    changed = np.argwhere((photo != image.permute(1, 2, 0).numpy()).any(-1))
    assert 0 < len(changed) and (abs(changed - [row * 24 + 12, column * 24 + 12]) < 28).all()  # the ring is there


def test_the_ring_is_drawn_on_copies():
    image = noise(16, 24, 3).permute(2, 0, 1)  # laid out as files are read
    before, m = image.clone(), normal(2, 3, 4)
    similarity_picture(m, image)
    assert torch.equal(image, before) and torch.equal(m, normal(2, 3, 4))


def test_a_point_outside_is_refused():
    for point in (1.0, 0.5), (0.5, -0.01):
        with pytest.raises(ValueError, match="outside of the image"):
            similarity_picture(normal(2, 2, 4), noise(3, 16, 16), point)

# --------------------------------------------------------------------------------
# Images of any size


@pytest.mark.parametrize("shape, resolution, want", [
    ((24, 40), 0, (24, 40)), ((50, 33), 0, (48, 32)), ((9, 300), 0, (8, 296)), ((50, 33), 16, (24, 16)),
    ((5, 7), 16, (16, 16)), ((1, 20), 8, (8, 160)), ((8, 8), 0, (8, 8))])
def test_any_size_becomes_whole_patches(vit, capsys, shape, resolution, want):
    image = noise(3, *shape)
    photo = cropped(image, resolution, 8, "dog.jpg")
    assert photo.shape == (3, *want) and photo.dtype == torch.uint8
    assert patch_features(vit, [image], resolution)[0].shape == (want[0] // 8, want[1] // 8, 16)
    if not resolution:
        top, left = (shape[0] - want[0]) // 2, (shape[1] - want[1]) // 2
        assert torch.equal(photo, image[:, top : top + want[0], left : left + want[1]])  # its own pixels, untouched
        assert ("dog.jpg: " in capsys.readouterr().out) == (shape != want)
    else:
        scale = resolution / min(shape)
        whole = resize(image, round(shape[0] * scale), round(shape[1] * scale))
        top, left = (whole.shape[1] - want[0]) // 2, (whole.shape[2] - want[1]) // 2
        assert torch.equal(photo, whole[:, top : top + want[0], left : left + want[1]])


def test_less_than_a_patch_is_refused():
    with pytest.raises(ValueError, match="dog.jpg: 30x7 is less than one patch; write --resolution 8 or more"):
        cropped(noise(3, 7, 30), 0, 8, "dog.jpg")


def test_features_are_the_networks_own(vit):
    image = noise(3, 16, 40)
    x = (image / 255 - torch.tensor(vit.config.mean)[:, None, None]) / torch.tensor(vit.config.std)[:, None, None]
    with torch.no_grad():
        want = vit(x[None])
    got, = patch_features(vit, [image])
    assert torch.allclose(got.permute(2, 0, 1), want.map()[0], atol=1e-6) and got.shape == (2, 5, 16)
    both, = patch_features(vit, [image], layers=[0, 1])
    assert both.shape == (2, 5, 32) and torch.allclose(both[..., 16:], got, atol=1e-6)


def test_the_sheet_holds_every_pair_and_stays_about_square():
    pairs = [(np.full((h, w, 3), 2 * i, np.uint8), np.full((h, w, 3), 2 * i + 1, np.uint8))
             for i, (h, w) in enumerate([(30, 40), (50, 20)] * 10)]
    picture = sheet(pairs)
    assert 0.5 < picture.shape[0] / picture.shape[1] < 2
    values, counts = np.unique(picture[..., 0], return_counts=True)
    assert dict(zip(values[:-1], counts[:-1], strict=True)) == {i: (1200, 1000)[i // 2 % 2] for i in range(40)}
    assert values[-1] == 255 and sheet(pairs[:1]).shape == (30, 80 + GUTTER, 3)

# --------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("mode", ["pca", "similarity"])
def test_command_writes_a_picture(folder, tmp_path, capsys, mode):
    out = tmp_path / "new" / "folder" / "picture.png"
    extra = ["--point", "0.1,0.9"] if mode == "similarity" else ["--foreground=0.2"]
    main([mode, str(folder / "photos"), "shapes:3", "--weights", str(folder / "weights.safetensors"),
          "--out", str(out), "--resolution", "24", *extra])
    with Image.open(out) as picture:  # 40x24, 24x32 and 24x24, under each other
        assert picture.size == (2 * 40 + GUTTER, 3 * 32 + 2 * GUTTER) and picture.mode == "RGB"
    printed = capsys.readouterr().out
    assert f"wrote {out}: 3 images, 84x104 pixels" in printed
    assert "skipped 1 of 4" in printed and "broken.jpg" in printed
    assert "1.png: 24x36 cropped to 24x32" in printed and "0.png: " not in printed


def test_an_image_of_one_pixel_costs_its_place_alone(folder, tmp_path, capsys):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (24, 24), "red").save(tmp_path / "square.png")
    main(["pca", str(tmp_path), "--weights", str(folder / "weights.safetensors"), "--out", str(tmp_path / "x.png")])
    printed = capsys.readouterr().out
    assert "skipped 1 of 2:" in printed and "dot.png: 1x1 is less than one patch" in printed and ": 1 image," in printed


def test_find_images(folder):
    photos = folder / "photos"
    inside = [str(photos / name) for name in ("0.png", "1.png", "broken.jpg")]
    assert find_images([str(photos), "shapes:7", inside[0]]) == [*inside, "shapes:7", inside[0]]


@pytest.mark.parametrize("words, message", [
    ("", "unknown mode ''"),
    ("similarty 0.png", "did you mean similarity"),
    ("pca 0.png --pint 0.1,0.1", "did you mean --point"),
    ("pca", "IMAGE: none in the command"),
    ("pca missing.png", "missing.png does not exist"),
    ("pca shapes:x", "shapes:x does not exist"),
    ("pca empty", "none in empty"),
    ("pca broken.jpg", "none of 1 can be taken; "),
    ("pca 0.png --foreground 1.5", "--foreground is 1.5; it must be in "),
    ("similarity 0.png --point 12,3", "--point is 12,3; it must be in "),
    ("similarity 0.png --point 0.3", "--point wants 2 numbers"),
    ("pca 0.png --resolution 5", "less than one patch"),
    ("pca 0.png --resolution=-5", r"--resolution is -5; it must be in .0, 16384."),
    ("pca 0.png --out picture.xyz", "OUT a .png"),
    ("pca 0.png --weights nowhere", "nowhere does not exist"),
])
def test_mistakes_are_named(folder, monkeypatch, words, message):
    monkeypatch.chdir(folder / "photos")
    (folder / "photos" / "empty").mkdir(exist_ok=True)
    given = dict([("--weights", "../weights.safetensors"), ("--out", "picture.png")])
    words = words.split()
    with pytest.raises(ValueError, match=message):
        main(words + [word for pair in given.items() if pair[0] not in words for word in pair])
    assert not (folder / "photos" / "picture.png").exists()


def test_a_mistake_is_one_line_and_exit_code_2(folder):
    run = subprocess.run([sys.executable, ROOT / "visualize.py", "pca", folder / "photos" / "broken.jpg", "--weights",
                          folder / "weights.safetensors", "--out", folder / "x.png"], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (2, run.stderr) and run.stderr.startswith(
        "visualize.py: IMAGE: none of 1 can be taken; ") and run.stderr.count("\n") == 1
    assert "broken.jpg" in run.stderr


def test_help_names_every_option(capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    options = "weights", "size", "out", "resolution", "foreground", "layers", "point"
    assert all(f"--{name}" in printed for name in options)
    assert all(f"visualize.py {mode} " in printed for mode in MODES) and "Why does my PCA look wrong?" in printed
