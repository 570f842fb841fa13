"""decoders/detr.py: beside the forward pass written out again in float64, on invented weights."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from decoders import detr, load_decoder, objects
from decoders.fit import groups, rate
from model import ViT, ViTConfig

VIT = ViTConfig(depth=8, width=32, heads=2, hidden=64)
SMALL = dict(windows=3, d=64, heads=4, hidden=48, bias=24, depths=(2, 3), queries=12, repeated=12, n_classes=7)
LAYERS = [1, 3, 5, 7]


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return ViT(VIT).eval()


def invented(width, seed=1, **changes):
    """A decoder with parameters of which none is a start value; its boxes move by a few pixels"""
    head = detr.DETR(detr.DETRConfig(width, **(SMALL | changes)))
    g = torch.Generator().manual_seed(seed)
    for name, x in head.state_dict().items():
        noise = torch.randn(x.shape, generator=g)
        scale = (x[0].numel() ** -0.5 if x.ndim > 1 else 0.1) * (0.3 if ".layers.2." in name else 1)
        x.copy_(noise * scale + (x.ndim == 1 and "norm" in name and "weight" in name))
    return head.eval()


def saved(head, path, more=()):
    torch.save({"model": {**{name: x.clone() for name, x in head.state_dict().items()}, **dict(more)}}, path)
    return path

# --------------------------------------------------------------------------------
# The forward pass once more: a function of a dict of tensors, one image of a batch at a time


def norm(p, name, x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[name + ".weight"] + p[name + ".bias"]


def linear(p, name, x):
    return x @ p[name + ".weight"].T + p.get(name + ".bias", 0)


def attention(p, name, q, k, v, heads, hidden=None):
    d = q.shape[-1]
    parts = [x @ w.T + b for x, w, b in zip((q, k, v), p[name + ".in_proj_weight"].split(d),
                                            p[name + ".in_proj_bias"].split(d), strict=True)]
    out = []
    for q, k, v in zip(*(x.split(d // heads, -1) for x in parts), strict=True):
        logits = q @ k.T / math.sqrt(d // heads)
        if hidden is not None:
            logits = logits.masked_fill(hidden[None], -math.inf)
        out.append(logits.softmax(-1) @ v)
    return linear(p, name + ".out_proj", torch.cat(out, -1))


def feed_forward(p, name, x):
    return linear(p, name + ".linear2", linear(p, name + ".linear1", x).relu())


def mlp(p, name, x):
    for k in range(3):
        x = linear(p, f"{name}.layers.{k}", x if k == 0 else x.relu())
    return x


def wave(a, n):
    columns = [(math.sin, math.cos)[k % 2] for k in range(n)]
    periods = [10000 ** (2 * (k // 2) / n) for k in range(n)]
    return torch.tensor([[f(value / t) for f, t in zip(columns, periods, strict=True)] for value in a.tolist()],
                        dtype=torch.float64)


def refine(box, delta, size):
    """R of one box at a time"""
    out = []
    for (cx, cy, w, h), (dx, dy, dw, dh) in zip(box.tolist(), delta.tolist(), strict=True):
        top = math.log(1000 / 16)
        cx, cy = cx + w * dx, cy + h * dy
        w, h = w * math.exp(min(max(dw, -top), top)), h * math.exp(min(max(dh, -top), top))
        x1, x2 = (min(max(x, 0), size[0]) for x in (cx - w / 2, cx + w / 2))
        y1, y2 = (min(max(y, 0), size[1]) for y in (cy - h / 2, cy + h / 2))
        out.append([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
    return torch.tensor(out, dtype=torch.float64)


def by_the_page(p, x, mask, c):
    """x columns h w, mask h w (True = padding) -> logits Q C, boxes Q 4 (cx cy w h), of the last layer"""
    t, h, w, d = "transformer.", *mask.shape, c.d
    src = torch.einsum("chw,dc->hwd", x, p["input_proj.0.0.weight"][..., 0, 0]) + p["input_proj.0.0.bias"]
    groups = src.reshape(h * w, 32, d // 32)
    groups = (groups - groups.mean((0, 2), keepdim=True)) / (
        groups.var((0, 2), keepdim=True, unbiased=False) + 1e-5).sqrt()
    src = groups.reshape(h * w, d) * p["input_proj.0.1.weight"] + p["input_proj.0.1.bias"]
    pos = torch.zeros(h, w, d, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            for k, (count, last) in enumerate(((sum(not mask[r, j] for r in range(i + 1)), (~mask[:, j]).sum()),
                                               (sum(not mask[i, r] for r in range(j + 1)), (~mask[i]).sum()))):
                count, last = np.float32(count), np.float32(int(last))  # angles of padding are huge: in the same type
                angle = (count - np.float32(0.5)) / (last + np.float32(1e-6)) * np.float32(2) * np.float32(math.pi)
                pos[i, j, k * d // 2 : (k + 1) * d // 2] = wave(torch.tensor([float(angle)]), d // 2)
    pos = pos.reshape(h * w, d) + p[t + "level_embed"]
    hidden = mask.reshape(-1)
    for i in range(c.depths[0]):
        name = f"{t}encoder.layers.{i}"
        y = attention(p, name + ".self_attn", src + pos, src + pos, src, c.heads, hidden)
        src = norm(p, name + ".norm1", src + y)
        src = norm(p, name + ".norm2", src + feed_forward(p, name, src))

    g = src.T.reshape(d, h, w)
    def half(x, name):
        return F.conv2d(x[None], p[name + ".weight"], p[name + ".bias"], stride=2)[0]
    name = t + "enc_output_proj."
    coarse = half(g, name + "3.0").movedim(0, -1)
    coarse = F.gelu(norm(p, name + "3.1.ln", coarse)).movedim(-1, 0)
    maps = [F.conv_transpose2d(g[None], p[name + "0.0.weight"], p[name + "0.0.bias"], stride=2)[0], g,
            half(g, name + "2.0"), half(coarse, name + "3.3")]
    rows8, cols8 = maps[0].shape[1:]
    fine = [[bool(mask[i * h // rows8, j * w // cols8]) for j in range(cols8)] for i in range(rows8)]
    size = 8 * sum(not row[0] for row in zip(*fine, strict=True)), 8 * sum(not row[0] for row in fine)
    tokens, anchors = [], []
    for level, m in enumerate(maps):
        for i in range(m.shape[1]):
            for j in range(m.shape[2]):
                s, side = 8 * 2**level, 50 * 2**level
                box = [(j + 0.5) * s, (i + 0.5) * s, side, side]
                good = not mask[i * h // m.shape[1], j * w // m.shape[2]]
                good &= all(0.01 * n < value < 0.99 * n for value, n in zip(box, size * 2, strict=True))
                tokens.append(m[:, i, j] * good)
                anchors.append(box if good else [8 * max(rows8, cols8)] * 4)
    z = norm(p, t + "enc_output_norm", linear(p, t + "enc_output", torch.stack(tokens)))
    last = c.depths[1]
    scores = linear(p, f"class_embed.{last}", z)[:, 0]
    order = scores.argsort(descending=True, stable=True)[: c.queries]
    ref = refine(torch.tensor(anchors, dtype=torch.float64)[order], mlp(p, f"bbox_embed.{last}", z[order]), size)

    qpos = torch.cat([wave(2 * math.pi * ref[:, k], d // 2) for k in range(4)], -1)
    qpos = norm(p, t + "pos_trans_norm", linear(p, t + "pos_trans", qpos))[:, :d]
    o = p["query_embed.weight"][: c.queries]
    for i in range(last):
        name = f"{t}decoder.layers.{i}"
        z = norm(p, name + ".norm2", o)
        o = o + attention(p, name + ".self_attn", z + qpos, z + qpos, z, c.heads)
        z = norm(p, name + ".norm1", o) + qpos
        a = name + ".cross_attn."
        x1, x2, y1, y2 = (ref[:, k] + sign * ref[:, k + 2] / 2 for k in (0, 1) for sign in (-1, 1))
        across = torch.stack([torch.stack([x1 - 16 * (j + 0.5), x2 - 16 * (j + 0.5)], -1) for j in range(w)])
        down = torch.stack([torch.stack([y1 - 16 * (j + 0.5), y2 - 16 * (j + 0.5)], -1) for j in range(h)])
        bx, by = (linear(p, f"{a}cpb_mlp{k}.2", linear(p, f"{a}cpb_mlp{k}.0", x).relu())
                  for k, x in ((1, across), (2, down)))                                        # w Q A, h Q A
        bias = (bx[None] + by[:, None] - 100.0 * mask[..., None, None]).flatten(0, 1)          # (h w) Q A
        out, E = [], d // c.heads
        q, k, v = linear(p, a + "q", z), linear(p, a + "k", src + pos), linear(p, a + "v", src)
        for n in range(c.heads):
            part = slice(n * E, (n + 1) * E)
            out.append((q[:, part] @ k[:, part].T * E**-0.5 + bias[..., n].T).softmax(-1) @ v[:, part])
        o = o + linear(p, a + "proj", torch.cat(out, -1))
        o = o + feed_forward(p, name, norm(p, name + ".norm3", o))
        f = norm(p, t + "decoder.final_layer_norm", o)
        ref = refine(ref, mlp(p, f"bbox_embed.{i}", f), size)
    return linear(p, f"class_embed.{last - 1}", f), ref


def windowed(backbone, images, n):
    """The map of the whole image beside that of its windows, filled in patch by patch"""
    def columns(x):
        return torch.cat([f.patches.permute(0, 2, 1).reshape(1, -1, *f.grid) for f in backbone.layers(x, LAYERS)], 1)
    maps = []
    for x in images:
        H, W = x.shape[1:]
        wh, ww = (16 * math.ceil((side // n) / 16) for side in (H, W))
        out = torch.zeros(4 * VIT.width, H // 16, W // 16)
        for i in range(n):
            for j in range(n):
                top, left = i * wh, j * ww
                bottom, right = H if i == n - 1 else top + wh, W if j == n - 1 else left + ww
                out[:, top // 16 : bottom // 16, left // 16 : right // 16] = columns(x[None, :, top:bottom, left:right]
                                                                                     )[0]
        small = columns(F.interpolate(x[None], (wh, ww), mode="bilinear", antialias=True))
        maps.append(torch.cat([F.interpolate(small, out.shape[1:], mode="bilinear", align_corners=False)[0], out]))
    return torch.stack(maps)


@pytest.mark.parametrize("n", [3, 2, 0])
@torch.no_grad()
def test_a_file_answers_as_the_forward_pass_written_out(backbone, tmp_path, n):
    head = invented(VIT.width * (8 if n else 4))
    decoder = load_decoder(saved(head, tmp_path / "x.pth"), backbone, n_windows=n or None)
    torch.manual_seed(3)
    # of sizes at which no cell lies half in the padding: there the position has an angle of a million turns, and
    # float32 alone says where it ends
    images = [torch.randn(3, *size) for size in ((144, 224), (128, 192))]
    found = decoder(images)
    padded, mask = torch.zeros(2, 3, 144, 224), torch.ones(2, 9, 14, dtype=torch.bool)
    for x, m, image in zip(padded, mask, images, strict=True):
        x[:, : image.shape[1], : image.shape[2]] = image
        m[: image.shape[1] // 16, : image.shape[2] // 16] = False
    x = windowed(backbone, padded, n) if n else torch.cat([f.map() for f in backbone.layers(padded, LAYERS)], 1)
    tensors = {name: value.double() for name, value in head.state_dict().items()}
    single = head((x, mask)).layers[-1]
    double = head.double()((x.double(), mask)).layers[-1]
    for i, image in enumerate(images):
        logits, boxes = by_the_page(tensors, x[i].double(), mask[i], head.config)
        # measured: 4.0e-6, 7.0e-7; what is left is of positions, which are float32 in both
        assert distance(double.logits[i], logits) < 1.2e-5 and distance(double.boxes[i], boxes) < 2e-6
        assert distance(single.logits[i], logits) < 1.2e-4 and distance(single.boxes[i], boxes) < 2e-5  # 4.3e-5, 6.8e-6
        H, W = image.shape[1:]
        scores, index = logits.sigmoid().flatten().sort(descending=True)
        torch.testing.assert_close(found[i]["scores"].double(), scores, rtol=0, atol=1e-4)
        clear = (scores.diff().abs() > 1e-3).nonzero()[:, 0] + 1  # the others may change places
        clear = [k for k in clear.tolist() if k + 1 == len(scores) or scores[k] - scores[k + 1] > 1e-3]
        assert len(clear) > 10
        for k in clear:
            cx, cy, w, h = boxes[index[k] // 7].tolist()
            exact = [min(max(value, 0), n) for value, n in
                     ((cx - w / 2, W), (cy - h / 2, H), (cx + w / 2, W), (cy + h / 2, H))]
            assert found[i]["labels"][k] == index[k] % 7
            assert found[i]["boxes"][k].tolist() == pytest.approx(exact, abs=0.05)


def distance(found, exact):
    """Relative to the deviation from the mean"""
    return ((found - exact).norm() / (exact - exact.mean(0)).norm()).item()


def test_sizes_of_the_paper():
    for n, width in (129_070_745, 4096), (110_196_377, 1024):
        with torch.device("meta"):
            head = detr.DETR(detr.DETRConfig(8 * width))
        assert sum(p.numel() for p in head.parameters()) == n
        assert {name.partition(".")[0] for name in head.state_dict()} == {
            "input_proj", "query_embed", "class_embed", "bbox_embed", "transformer"}


def test_round_trip_under_second_names_and_in_wrappers(backbone, tmp_path, capsys):
    head = invented(VIT.width * 8)
    state = {name: x.clone() for name, x in head.state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    again = {"transformer.decoder." * name.startswith(("class_embed", "bbox_embed")) + name: x
             for name, x in state.items()}
    torch.save({"model": again | {"backbone.0._backbone.backbone.cls_token": torch.ones(1)}}, tmp_path / "y.pth")
    torch.save({"model": state | again | {"odd": torch.ones(1)}}, tmp_path / "z.pth")
    image = torch.randn(3, 112, 160)
    found = [load_decoder(tmp_path / f"{name}.pth", backbone)([image])[0] for name in "xyz"]
    assert all(torch.equal(found[0][key], each[key]) for each in found for key in ("scores", "labels", "boxes"))
    assert "1 tensors are not known and not read: odd" in capsys.readouterr().out
    back = load_decoder(tmp_path / "y.pth", backbone).head
    assert back.config.__dict__ | {"dropout": 0} == head.config.__dict__ | {"dropout": 0}
    assert all(torch.equal(x, back.state_dict()[name]) for name, x in state.items())


def test_windows_that_the_file_does_not_say(backbone, tmp_path):
    path = saved(invented(VIT.width * 8), tmp_path / "x.pth")
    assert load_decoder(path, backbone).head.config.windows == 3
    assert load_decoder(path, backbone, n_windows=2).head.config.windows == 2
    assert load_decoder(path, backbone).layers == LAYERS
    large = ViT(ViTConfig(depth=8, width=1024, heads=16, hidden=32)).eval()
    assert load_decoder(saved(invented(8 * 1024), tmp_path / "l.pth"), large).head.config.windows == 2
    assert load_decoder(saved(invented(VIT.width * 4), tmp_path / "y.pth"), backbone).head.config.windows == 0


@pytest.mark.parametrize("side, n, wanted", [(1536, 3, [0, 512, 1024, 1536]), (160, 3, [0, 64, 128, 160]),
                                             (112, 2, [0, 64, 112]), (48, 3, [0, 16, 32, 48]), (32, 1, [0, 32])])
def test_windows_are_whole_patches_and_the_last_takes_the_rest(side, n, wanted):
    assert detr.edges(side, n) == wanted


@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("query_embed.weight"), "query_embed.weight is missing, wanted one of 2 dimensions"),
    (lambda s: s.pop("transformer.level_embed"), "transformer.level_embed is missing, wanted .1, 64."),
    (lambda s: s.pop("bbox_embed.3.layers.2.bias"), "bbox_embed.3.layers.2.bias is missing"),
    (lambda s: s.update({"transformer.pos_trans.bias": torch.full((128,), math.nan)}), "pos_trans.bias holds nan"),
    (lambda s: s.update({"input_proj.0.0.weight": torch.zeros(64, 320, 1, 1)}), "width 40, this one has 32"),
])
def test_files_that_do_not_fit(backbone, tmp_path, change, says):
    state = invented(VIT.width * 8).state_dict()
    change(state)
    torch.save(dict(state), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=says):
        load_decoder(tmp_path / "x.pth", backbone)


def test_other_patches_and_images_too_small(backbone, tmp_path):
    path = saved(invented(VIT.width * 8), tmp_path / "x.pth")
    fine = ViT(ViTConfig(depth=8, width=32, heads=2, hidden=64, patch_size=8)).eval()
    with pytest.raises(ValueError, match="patches of 16 pixels, this one has 8"):
        load_decoder(path, fine)
    with pytest.raises(ValueError, match="64x64 pixels do not go into 3x3 windows"):
        load_decoder(path, backbone)([torch.zeros(3, 64, 64)])
    with pytest.raises(ValueError, match="images of 80x48 pixels; wanted at least 64 a side"):
        load_decoder(path, backbone)([torch.zeros(3, 40, 80), torch.zeros(3, 48, 48)])


def test_sides_need_not_be_whole_patches(backbone, tmp_path):
    decoder = load_decoder(saved(invented(VIT.width * 8), tmp_path / "x.pth"), backbone)
    (found,) = decoder([torch.randn(3, 110, 150)])
    low, high = found["boxes"].amin(0), found["boxes"].amax(0)
    assert len(found["scores"]) == 12 * 7 and low.min() >= 0 and high[2] <= 150 and high[3] <= 110


def test_two_branches_that_do_not_see_each_other():
    torch.manual_seed(0)
    head = invented(VIT.width * 4, dropout=0.0)
    x, padding = torch.randn(1, VIT.width * 4, 6, 8), torch.zeros(1, 6, 8, dtype=torch.bool)
    both, alone = head.train()((x, padding)), head.eval()((x, padding))
    assert not alone.repeated and len(both.repeated) == len(both.layers) == 3
    for a, b in zip(both.layers, alone.layers, strict=True):
        torch.testing.assert_close(a.boxes, b.boxes)
        torch.testing.assert_close(a.logits, b.logits)
    order = both.proposals.logits[0, :, 0].argsort(descending=True)
    assert torch.equal(both.repeated[0].before[0], both.proposals.boxes[0, order[12:24]])


def test_gradients_reach_a_layer_and_the_one_before_it():
    head = invented(VIT.width * 4)
    answers = head.train()((torch.randn(1, VIT.width * 4, 6, 8), torch.zeros(1, 6, 8, dtype=torch.bool)))
    answers.layers[2].boxes.sum().backward()
    moved = [head.bbox_embed[k].layers[2].bias.grad for k in range(4)]
    assert moved[0] is None and moved[3] is None and moved[1].abs().sum() > 0 and moved[2].abs().sum() > 0
    assert head.transformer.enc_output.weight.grad is None


def test_an_image_of_few_cells_has_fewer_queries():
    head = invented(VIT.width * 4, queries=100, repeated=100)
    x, padding = torch.randn(1, VIT.width * 4, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)
    assert head((x, padding)).layers[-1].boxes.shape == (1, 64 + 16 + 4 + 1, 4)

# --------------------------------------------------------------------------------
# Training's start and numbers


def test_start_values():
    torch.manual_seed(0)
    head = detr.Head(384, 91, 2)
    assert head.width == 384 and head.config.width == 8 * 384 and head.config.windows == 2
    assert detr.Head(128, 5, 0, 3).config.width == 3 * 128
    values = dict(head.named_parameters())
    assert all(values[f"class_embed.{k}.bias"].unique().tolist() == [pytest.approx(-math.log(99))] for k in range(7))
    assert all(not values[f"bbox_embed.{k}.layers.2.{x}"].any() for k in range(7) for x in ("weight", "bias"))
    for name, x in values.items():
        if "norm" in name or name.startswith("input_proj.0.1"):
            assert x.unique().tolist() == [float(name.endswith("weight"))], name
        elif name.startswith("transformer.decoder.") and x.ndim > 1:
            assert x.std().item() == pytest.approx(0.02, rel=0.1), name
    for name in "query_embed.weight", "transformer.level_embed":
        assert values[name].std().item() == pytest.approx(1, rel=0.15)
    most = (6 / (256 + 1024)) ** 0.5
    assert values["transformer.encoder.layers.0.linear1.weight"].max().item() == pytest.approx(most, rel=0.01)


def test_the_papers_stages():
    o365, large, coco = (detr.STAGES[name] for name in ("objects365", "objects365_large", "coco"))
    steps = {"o365": 1_718_750, "coco": 43_974}
    assert [rate(o365.recipe, 5e-5, k, steps["o365"]) for k in (0, 999, 10**6, 1_562_499, 1_562_500)] == pytest.approx(
        [5e-8, 5e-5, 5e-5, 5e-5, 5e-6])
    assert {rate(large.recipe, 2.5e-5, k, 312_500) for k in (0, 10**5, 312_499)} == {2.5e-5}
    assert [rate(coco.recipe, 2.5e-5, k, steps["coco"]) for k in (1999, 15_658, 29_316, 43_973)] == pytest.approx(
        [2.5e-5, 1.375e-5, 2.5e-6, 2.5e-6], rel=1e-3)
    for stage, lr, epochs, giou in (o365, 5e-5, 22, 2), (large, 2.5e-5, 4, 2), (coco, 2.5e-5, 12, 4):
        r = stage.recipe
        assert (r.lr, stage.epochs, stage.giou, r.weight_decay, r.batch, r.clip) == (lr, epochs, giou, 0.05, 32, 0.1)
    assert o365.of_classes is large.of_classes is objects.focal and coco.of_classes is objects.aware


def test_what_is_not_decayed():
    with torch.device("meta"):
        head = detr.Head(384, 91, 0)
    decayed, free = groups(head, detr.STAGES["coco"].recipe)
    names = {p: name for name, p in head.named_parameters()}
    assert decayed["weight_decay"] == 0.05 and free["weight_decay"] == 0
    free = {names[p] for p in free["params"]}
    assert all("cpb_mlp" in name or name.endswith(("bias", "level_embed")) or "norm" in name or name ==
               "input_proj.0.1.weight" or name.endswith("ln.weight") for name in free)
    assert sum("cpb_mlp" in name for name in free) == 6 * 2 * 3 and "query_embed.weight" not in free


def test_recomputing_changes_nothing():
    grads = []
    for recompute in True, False:
        head = invented(VIT.width * 4, dropout=0.5, recompute=recompute).train()
        torch.manual_seed(0)
        answers = head((some_map(6, 8), torch.zeros(1, 6, 8, dtype=torch.bool)))
        answers.layers[-1].boxes.sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in head.transformer.parameters() if p.grad is not None]))
    assert torch.equal(*grads)


def some_map(h, w):
    return torch.randn(1, VIT.width * 4, h, w, generator=torch.Generator().manual_seed(0))
