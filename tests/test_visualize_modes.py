"""visualize.py beyond one small square: attention, explore, several layers, ConvNeXt, 1024 pixels."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from speaking import Colours, photo
from test_film import film

from convnext import ConvNeXt, ConvNeXtConfig
from decoders import detr, dpt, mask2former, names_in, vggt
from decoders.pictures import LEGEND, depth_pictures, segment_pictures
from engine.attention import attention_row
from engine.explore import HEAT
from engine.pictures import STRIP, hues, network_input
from model import ViT, ViTConfig, build
from visualize import (
    GUTTER,
    attention_picture,
    main,
    names_for,
    outliers,
    patch_features,
    text_pictures,
)


@pytest.fixture(scope="module")
def vit():
    return build(lambda: ViT(ViTConfig(3, 16, 2, 32, patch_size=8, layerscale=0.1, init_std=0.3))).eval()


@pytest.fixture(scope="module")
def convnext():
    return build(lambda: ConvNeXt(ConvNeXtConfig((1, 1, 1, 1), (4, 8, 8, 12), layerscale=0.1))).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modes")
    for i, (W, H) in enumerate([(40, 24), (32, 56)]):
        Image.fromarray(noise(H, W, 3, seed=i).numpy()).save(folder / f"{i}.png")
    return folder


def noise(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def run(folder, monkeypatch, vit, words):
    """main() with this network, wherever it comes from, in this folder."""
    monkeypatch.setattr("visualize.load_backbone", lambda path, size: vit)
    monkeypatch.chdir(folder)
    main([*words.split(), "--weights", "weights.safetensors"])

# --------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("point, token", [(None, 0), ((0.5, 0.5), 5 + 2 * 5 + 2), ((0.99, 0), 5 + 4)])
def test_attention_picture_shows_mean_and_heads(vit, point, token):
    image = noise(3, 32, 40)
    [picture], shares = attention_picture(vit, image, [1], point)
    rows = attention_row(vit, network_input(vit, image), 1, token)[0]                                # A N
    assert np.allclose(shares, rows[:, 5:].sum(1))
    H, W = 32 + GUTTER, 40 + 4 * GUTTER          # four pictures of 40x32, in two rows: photo, mean; heads
    assert picture.shape == (2 * H - GUTTER, 2 * W - 4 * GUTTER, 3)
    tiles = [picture[i * H :, j * W :][:32, :40] for i in range(2) for j in range(2)]
    assert np.array_equal(tiles[0], image.permute(1, 2, 0)) == (point is None)  # with a point: ringed
    for tile, attention in zip(tiles[1:], [rows.mean(0), *rows], strict=True):
        attention = attention[5:].view(4, 5).numpy()
        assert np.array_equal(tile[4::8, 4::8], tile[::8, ::8])  # a patch is one colour
        brightest = np.unravel_index(attention.argmax(), (4, 5))
        assert tuple(tile[4::8, 4::8][brightest]) == HEAT[-1]
        order = attention.flatten().argsort()
        green = tile[4::8, 4::8, 1].flatten()[order].astype(int)  # HEAT's green rises all the way
        assert (np.diff(green) >= 0).all()


def test_attention_takes_the_last_block_if_none_is_named(vit):
    image = noise(3, 24, 40)
    assert np.array_equal(attention_picture(vit, image)[0], attention_picture(vit, image, [2])[0])
    assert not np.array_equal(attention_picture(vit, image)[0], attention_picture(vit, image, [0])[0])


def test_attention_command(folder, monkeypatch, vit, capsys):
    run(folder, monkeypatch, vit, "attention 0.png 1.png --out a.png --layers 1 --point 0.2,0.9")
    printed = capsys.readouterr().out
    assert re.search(r"attention to patches, by head:\n  \d+% \d+%\n  \d+% \d+%\nwrote a.png: 2 images", printed)
    with Image.open(folder / "a.png") as picture:
        assert picture.width > 2 * 32 and picture.height > 2 * 56

# --------------------------------------------------------------------------------
# Explore


def test_explore_command(folder, monkeypatch, vit, capsys):
    run(folder, monkeypatch, vit, "explore ./0.png ./1.png shapes:2 --out new/page.html --resolution 24 --layers 0,2")
    html = (folder / "new" / "page.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    assert [(each["name"], each["h"], each["w"]) for each in data["images"]] == [
        ("0.png", 3, 5), ("1.png", 5, 3), ("shapes:2", 3, 3)]
    printed = f"3 images, {len(html) / 1e6:.1f} MB; 32 features kept as 32 int8, cosines within 0.0"
    assert f"wrote new/page.html: {printed}" in capsys.readouterr().out

# --------------------------------------------------------------------------------
# Layers, ConvNeXt, size


def test_layers_lie_side_by_side(folder, monkeypatch, vit):
    pictures = []
    for layers in "0", "2", "0,2", "":
        run(folder, monkeypatch, vit, f"pca 0.png 1.png --out layers{layers}.png --layers={layers}")
        with Image.open(folder / f"layers{layers}.png") as picture:
            pictures.append(np.array(picture))
    assert np.array_equal(pictures[1], pictures[3])
    assert not np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[2], pictures[1])


@pytest.mark.parametrize("layers, stride, width", [(None, 32, 12), ([3], 32, 12), ([2], 16, 8), ([0], 4, 4)])
def test_convnext_features(convnext, layers, stride, width):
    maps = patch_features(convnext, [noise(3, 70, 97)], layers=layers)
    assert maps[0].shape == (64 // stride, 96 // stride, width)


@pytest.mark.parametrize("words", ["pca 1.png 0.png --layers 2", "similarity 0.png --point 0,0.9", "explore 0.png"])
def test_convnext_in_every_mode_but_attention(folder, monkeypatch, convnext, words, capsys):
    out = "c.html" if words.startswith("explore") else "c.png"
    run(folder, monkeypatch, convnext, f"{words} --resolution 128 --out {out}")
    printed = capsys.readouterr().out
    assert "0.png: 213x128 cropped to 192x128, whole patches of 32x32" in printed and f"wrote {out}: " in printed


@pytest.mark.parametrize("mode", ["pca", "similarity", "explore", "attention"])
def test_a_thousand_pixels_non_square_several_at_once(folder, monkeypatch, mode):
    vit = build(lambda: ViT(ViTConfig(1, 8, 2, 8))).eval()
    out = "large.html" if mode == "explore" else "large.png"
    run(folder, monkeypatch, vit, f"{mode} 0.png 1.png --resolution 1024 --out {out}")
    assert (folder / out).stat().st_size > 1e5
    if mode in ("pca", "similarity"):
        with Image.open(folder / out) as picture:  # 1696x1024 and 1024x1792
            assert picture.size == (2 * 1696 + GUTTER, 2 * 1792 + GUTTER)

# --------------------------------------------------------------------------------
# Words


def stripes(folder):
    photo(folder / "stripes.png", "red", "green", "blue", size=(16, 48))
    return torch.from_numpy(np.array(Image.open(folder / "stripes.png"))).permute(2, 0, 1)


def test_words_land_where_they_are_meant(tmp_path):
    """Of a stripe of each colour: brightest there for its word, and the nearest word is its own"""
    pictures, cosines = text_pictures(Colours(), stripes(tmp_path), ["blue", "a red one"])
    assert cosines.shape == (2, 6, 2) and len(pictures) == 4
    assert cosines[..., 0].argmax(1).tolist() == [4, 4] and cosines[..., 1].argmax(1).tolist() == [0, 0]
    assert all(picture.shape == (16 + STRIP, 48, 3) for picture in pictures)
    heat, nearest = pictures[1], pictures[3]
    assert heat[8, 40].tolist() == list(HEAT[-1]) and heat[8, 4].tolist() == list(HEAT[0])
    blue, red = (hues(torch.tensor([[k]]))[:, 0, 0].tolist() for k in (1, 2))
    assert nearest[8, 40].tolist() == pytest.approx(blue, abs=1) and nearest[8, 4].tolist() == pytest.approx(red, abs=1)
    assert heat[-1, -1].tolist() == blue and pictures[2][-1, -1].tolist() == red               # of the strip below


@pytest.mark.parametrize("out", ["text.png", "text.html"])
def test_text_command(out, tmp_path, monkeypatch, vit, capsys):
    stripes(tmp_path)
    monkeypatch.setattr("visualize.load_dinotxt", lambda path, backbone: Colours())
    monkeypatch.setattr("visualize.load_backbone", lambda path, size: vit)
    main(["text", str(tmp_path / "stripes.png"), "--weights", "x", "--prompts", "red; <b>blue</b>;", "--out",
          str(tmp_path / out)])
    assert f"wrote {tmp_path / out}: 1 image, " in capsys.readouterr().out
    if out.endswith("png"):
        with Image.open(tmp_path / out) as picture:
            assert picture.size == (4 * 48 + 3 * GUTTER, 16 + STRIP)
    else:
        html = (tmp_path / out).read_text()
        assert html.count("<img src=") == 4 and "&lt;b&gt;blue" in html and "stripes.png" in html and "<b>" not in html


class Sloping:
    """A decoder of depth that sees 2 to 4 metres, from left to right"""
    backbone = None

    def __init__(self, vit):
        self.backbone = vit

    def __call__(self, x):
        return torch.linspace(2, 4, 48).expand(1, 16, 48)


def test_depth_is_bright_where_it_is_near(vit, tmp_path):
    (_, heat), metres = depth_pictures(Sloping(vit), stripes(tmp_path), (3, 5))  # nearer than the scale is its end
    assert heat[8, 0].tolist() == heat[8, 23].tolist() == list(HEAT[-1]) and metres.min() == 2
    (photo, heat), metres = depth_pictures(Sloping(vit), stripes(tmp_path))
    assert metres.shape == (16, 48) and metres.min() == 2 and metres.max() == 4
    assert heat[8, 0].tolist() == list(HEAT[-1]) == heat[18, 0].tolist()       # the picture, and the scale below it
    assert heat[8, 47].tolist() == list(HEAT[0]) == heat[18, 47].tolist()
    assert photo.shape == heat.shape == (16 + STRIP // 2 + STRIP, 48, 3)


def test_points_command(folder, tmp_path, monkeypatch, vit, capsys):
    """Two frames and their depths, a row each, and all points from two sides in a third; the head's file is read."""
    torch.manual_seed(0)
    save_file(vggt.Head(16).eval().state_dict(), tmp_path / "head.safetensors")
    for i in 0, 1:
        Image.fromarray(noise(32, 48, 3, seed=i).numpy()).save(tmp_path / f"f{i}.png")
    words = f"--head {tmp_path}/head.safetensors --out {tmp_path}/a.png --layers 0,1,2,2"
    run(folder, monkeypatch, vit, f"points {tmp_path}/f0.png {tmp_path}/f1.png {words}")
    assert "a.png: 2 images" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (2 * 48 + GUTTER, 3 * (32 + STRIP) + 2 * GUTTER)
        points = np.asarray(picture)[-32:].reshape(-1, 3)
    assert 10 < (points != 255).any(1).sum() and (points == (255, 0, 0)).all(1).sum() > 4      # the cameras
    with pytest.raises(ValueError, match="IMAGE: frames of 40x24, 48x32 pixels; points wants those of one scene"):
        run(folder, monkeypatch, vit, f"points 0.png {tmp_path}/f1.png {words}")
    with pytest.raises(ValueError, match="answers with no depth; name the head of a task of depth"):
        run(folder, monkeypatch, vit, f"depth 0.png {words}")


def test_depth_command(folder, tmp_path, monkeypatch, vit, capsys):
    head = dpt.DPT(dpt.DPTConfig(16, channels=(4,) * 4, fused=4, hidden=2, n_out=3))
    torch.save(head.state_dict(), tmp_path / "head.pth")
    words = f"--out {tmp_path}/a.png --head {tmp_path}/head.pth"
    run(folder, monkeypatch, vit, f"depth 0.png 1.png {words} --layers 0,1,2,2")
    said = capsys.readouterr().out
    assert "metres, from the nearest to the farthest:" in said and "2 images" in said
    (tmp_path / "album").mkdir()
    for name in "0.png", "1.png":
        shutil.copy(folder / name, tmp_path / "album")
    run(folder, monkeypatch, vit, f"depth {tmp_path}/album {words.replace('a.png', 'a.html')} --layers 0,1,2,2")
    page = (tmp_path / "a.html").read_text()
    assert page.count("<img src=") == 4 and "0.png" in page and "2 images, a page" in capsys.readouterr().out
    film(tmp_path / "a.mp4", 3)
    words = words.replace("a.png", "b.mp4")
    run(folder, monkeypatch, vit, f"depth {tmp_path}/a.mp4 {words} --layers 0,1,2,2")
    assert re.search(r"b.mp4: 3 frames, 80x44 pixels; [\d.]+ to [\d.]+ m, on the first", capsys.readouterr().out)
    for images in "0.png", f"{tmp_path}/a.mp4 0.png":
        with pytest.raises(ValueError, match="a video becomes a video, in the mode depth: name one, and --out X.mp4"):
            run(folder, monkeypatch, vit, f"depth {images} {words}")
    words = words.replace("b.mp4", "a.png")
    torch.save(dict(weight=torch.ones(3, 32), bias=torch.ones(3)), tmp_path / "head.pth")
    with pytest.raises(ValueError, match="answers with no depth; name the head of a task of depth"):
        run(folder, monkeypatch, vit, f"depth 0.png {words}")



def test_detect_command(folder, tmp_path, monkeypatch, capsys):
    """The head is sure of a dog for each of its four queries."""
    vit = build(lambda: ViT(ViTConfig(3, 16, 2, 32))).eval()
    c = detr.DETRConfig(4 * 16, 0, d=32, heads=2, hidden=8, bias=4, depths=(1, 1), queries=4, repeated=4, n_classes=3)
    head = detr.start(detr.DETR(c))
    torch.nn.init.constant_(head.class_embed[0].bias, -9)
    with torch.no_grad():
        head.class_embed[0].bias[1] = 9
    about = dict(outputs=detr.outputs(c), said=json.dumps(dict(names={"1": "dog"})), format="pt")
    save_file(head.state_dict(), tmp_path / "head.safetensors", about)
    words = f"--out {tmp_path}/a.png --head {tmp_path}/head.safetensors --resolution 64 --layers 0,1,2,2"
    run(folder, monkeypatch, vit, f"detect 0.png 1.png {words}")
    said = capsys.readouterr().out
    assert "boxes:\n  " in said and "0.png: 4\n" in said and "2 images" in said
    assert names_in(tmp_path / "head.safetensors") == {"1": "dog"} and (tmp_path / "a.png").is_file()
    run(folder, monkeypatch, vit, f"detect 0.png {words.replace('a.png', 'a.html')}")
    assert (tmp_path / "a.html").read_text().count("<img src=") == 2
    torch.save(dict(weight=torch.ones(3, 32), bias=torch.ones(3)), tmp_path / "head.pth")
    with pytest.raises(ValueError, match="answers with no boxes; name the head of a task of detection"):
        run(folder, monkeypatch, vit, f"detect 0.png {words.replace('head.safetensors', 'head.pth')}")

# --------------------------------------------------------------------------------
# Classes and segments


class Halves(mask2former.OfImages):
    """Left is class 1, right class 2, and class 0 is nowhere; the last query is none of them"""

    def __init__(self, backbone):
        torch.nn.Module.__init__(self)
        self.backbone = backbone

    def forward(self, images):
        near = torch.full((1, 3, 4, 8), -9.0)
        near[0, 0, :, :4], near[0, 1, :, 4:], near[0, 2] = 9, 9, 9
        return dict(logits=torch.eye(4)[None, [1, 2, 3]] * 9, masks=near)


def test_classes_and_segments_have_names_and_colours(vit, tmp_path):
    image = torch.full((3, 32, 64), 100, dtype=torch.uint8)
    photo, classes, segments = segment_pictures(Halves(vit), image, ["nothing", "cat", "dog"])
    assert photo.shape == classes.shape == segments.shape == (32 + LEGEND * STRIP, 64, 3)
    left, right = (hues(torch.tensor([[1 + k]]))[:, 0, 0] for k in (1, 2))
    assert classes[5, 5].tolist() == left.tolist() and classes[5, 60].tolist() == right.tolist()
    assert segments[5, 5].tolist() == [(100 + x) // 2 for x in left.tolist()]
    assert (segments[:32, 31:33] == 255).all(-1).any(1).all() and (classes[:32] != 255).all()  # a line where they meet
    legend = {tuple(each[32 + STRIP * k + 12, 30]) for each in (classes, segments) for k in (0, 1)}
    assert legend == {tuple(left.tolist()), tuple(right.tolist())} and (classes[32 + 2 * STRIP :] == 255).all()


def test_names_of_classes(tmp_path):
    assert names_for(13, "")[:2] == ["background", "star"] and names_for(19, "")[0] == "road"
    assert names_for(5, "") == [f"class {k}" for k in range(5)]
    (tmp_path / "names").write_text("a\nb\n")
    assert names_for(2, tmp_path / "names") == ["a", "b"]
    with pytest.raises(ValueError, match="names has 2 lines, and the head 3 classes; wanted a name for each"):
        names_for(3, tmp_path / "names")


def test_segment_command(folder, tmp_path, monkeypatch, vit, capsys):
    wide = build(lambda: ViT(ViTConfig(4, 32, 2, 32, patch_size=8))).eval()
    c = mask2former.Mask2FormerConfig(32, 3, decoder=64, hidden=8, queries=5, encoder_layers=1, layers=2, stem=4)
    torch.save(mask2former.Mask2Former(c).state_dict(), tmp_path / "head.pth")
    words = f"segment 0.png 1.png --resolution 64 --head {tmp_path}/head.pth --out {tmp_path}/a.png"
    run(folder, monkeypatch, wide, words)
    assert "2 images" in capsys.readouterr().out and (tmp_path / "a.png").is_file()
    torch.save({"conv.weight": torch.randn(3, 16, 1, 1), "conv.bias": torch.ones(3)}, tmp_path / "head.pth")
    run(folder, monkeypatch, vit, words)
    torch.save(dict(weight=torch.ones(3, 32), bias=torch.ones(3)), tmp_path / "head.pth")
    with pytest.raises(ValueError, match="answers with no classes; name the head of a task of segmentation"):
        run(folder, monkeypatch, vit, words)

# --------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("words, message", [
    ("attention 0.png --out a.png --layers 0,1", "--layers 0,1: write blocks, .* for attention only one"),
    ("attention 0.png --out a.png --layers 3", "attention: no block 3; this network has blocks 0 to 2"),
    ("attention 0.png --out a.png --point 1,0.5", "--point is 1,0.5; it must be in "),
    ("pca 0.png --out a.png --layers 0,12", "no block 12"),
    ("pca 0.png --out a.png --layers -1", "--layers -1: write blocks, 0-based, as in 3,5"),
    ("pca 0.png --out a.png --layers 1,,2", "write blocks"),
    ("text 0.png --out a.png", "--prompts '': it is for the mode text, which wants some, as in"),
    ("text 0.png --out a.png --prompts ;", "--prompts ';': it is for the mode text, which wants some"),
    ("pca 0.png --out a.png --prompts dog", "--prompts 'dog': it is for the mode text"),
    ("text 0.png --out a.jpg --prompts dog", "OUT a .png or .html"),
    ("text 0.png --out a.png --prompts dog", "text.safetensors|weights.safetensors does not exist; name the folder"),
    ("depth 0.png --out a.png", "--head '': it is for the modes depth, segment, "),
    ("pca 0.png --out a.png --head x", "--head 'x': it is for the modes depth, segment"),
    ("segment 0.png --out a.png", "--head '': it is for the modes depth, segment, "),
    ("pca 0.png --out a.png --names x", "--names x: it is for the mode segment"),
    ("explore 0.png --out a.png", "OUT a .html"), ("similarity 0.png --out a.html", "OUT a .png"),
    ("explor 0.png --out a.html", "did you mean explore"), ("atention 0.png --out a.png", "did you mean attention")])
def test_mistakes_are_named(folder, monkeypatch, vit, words, message):
    (folder / "a.png").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=message):
        run(folder, monkeypatch, vit, words)
    assert not (folder / "a.png").exists() and not (folder / "a.html").exists()


def test_what_a_convnext_cannot_do_is_named(folder, monkeypatch, convnext):
    with pytest.raises(ValueError, match="these weights are a ConvNeXt, which has none; use pca or similarity"):
        run(folder, monkeypatch, convnext, "attention 0.png --resolution 64 --out b.png")
    with pytest.raises(ValueError, match=r"--layers \[2, 3\] have grids \[\(4, 6\), \(2, 3\)\]; name one of them"):
        run(folder, monkeypatch, convnext, "pca 0.png --resolution 64 --layers 2,3 --out b.png")
    assert not (folder / "b.png").exists()


def test_outliers_are_found_by_block(vit, tmp_path, monkeypatch, capsys):
    """A channel that the second block adds 1000 to: loud in it, not in the first; norms are those of the tokens."""
    vit, image = copy.deepcopy(vit), torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
    patches, channels = outliers(vit, image)
    exact = [x.patches[0] for x in vit.layers(network_input(vit, image), [0, 1, 2], norm=False)]
    for k in range(3):
        torch.testing.assert_close(patches[k].flatten(), exact[k].norm(dim=1))
        torch.testing.assert_close(channels[k], exact[k].norm(dim=0))
    plain = vit(network_input(vit, image)).patches[0]
    torch.testing.assert_close(vit.norm(exact[-1]), plain)                                   # --norm false is before it
    last = [module for module in vit.blocks[1].modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.bias[5] += 1000
        for name, gamma in vit.blocks[1].named_parameters():
            if name.startswith("ls2"):
                gamma.fill_(1)
    loud = outliers(vit, image)
    assert loud[1][1].argmax() == 5 and loud[1][1].max() > 100 * loud[1][1].median()
    torch.testing.assert_close(loud[1][0], channels[0])
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    run(tmp_path, monkeypatch, vit, "outliers photo.png --out norms.png")
    assert "of channel 5" in capsys.readouterr().out and (tmp_path / "norms.png").is_file()
