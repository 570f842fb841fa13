"""decoders/mask2former.py: beside the forward pass written out again in float64, on invented weights; files, sizes."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_adapter import features

from decoders import load_decoder, mask2former
from decoders.mask2former import Mask2Former, Mask2FormerConfig
from model import ViT, ViTConfig

VIT = ViTConfig(depth=8, width=32, heads=2, hidden=64)
SMALL = Mask2FormerConfig(32, n_out=5, decoder=64, hidden=48, queries=7, encoder_layers=2, layers=4, stem=4)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return ViT(VIT).eval()


def invented(module, seed=1):
    """Parameters and statistics of which none is a start value"""
    g = torch.Generator().manual_seed(seed)
    for name, x in module.state_dict().items():
        if x.is_floating_point():
            x.copy_(torch.randn(x.shape, generator=g) * (1.0 if "offsets.bias" in name else 0.15)
                    + ("var" in name) * 1.5 + 0.5 * (x.dim() == 1 and name.endswith("weight")))
            if "var" in name:
                x.abs_()
    return module.eval()

# --------------------------------------------------------------------------------
# The forward pass once more: functions of a dict of float64 tensors, places in loops, nothing shared


class Reference:
    def __init__(self, tensors):
        self.p = {name: x.double().detach() for name, x in tensors.items()}

    def linear(self, name, x):
        return x @ self.p[name + ".weight"].T + self.p[name + ".bias"]

    def norm(self, name, x, eps):
        mean = x.mean(-1, keepdim=True)
        x = (x - mean) / ((x - mean).pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return x * self.p[name + ".weight"] + self.p[name + ".bias"]

    def conv(self, name, x, stride=1):
        weight = self.p[name + ".weight"]
        return F.conv2d(x, weight, self.p.get(name + ".bias"), stride, weight.shape[-1] // 2)

    def batch(self, name, x):
        mean, var, scale, shift = (self.p[f"{name}.{k}"][:, None, None]
                                   for k in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    def group(self, name, x):
        parts = []
        for part in x.chunk(32, 1):
            mean = part.mean((1, 2, 3), keepdim=True)
            parts.append((part - mean) / ((part - mean).pow(2).mean((1, 2, 3), keepdim=True) + 1e-5).sqrt())
        return torch.cat(parts, 1) * self.p[name + ".weight"][:, None, None] + self.p[name + ".bias"][:, None, None]

    def deformable(self, name, queries, places, features, sizes):
        """One image: queries N d, features S d"""
        values = self.linear(name + ".value_proj", features)
        E = values.shape[1] // 16
        offsets = self.linear(name + ".sampling_offsets", queries).view(len(queries), 16, len(sizes), 4, 2)
        weights = self.linear(name + ".attention_weights", queries).view(len(queries), 16, -1).softmax(-1)
        weights = weights.view(len(queries), 16, len(sizes), 4)
        offsets, weights, out, first = offsets.numpy(), weights.numpy(), np.zeros((len(queries), 16, E)), 0
        for level, (h, w) in enumerate(sizes):
            maps = values[first : first + h * w].view(h, w, 16, E).numpy()
            first += h * w
            for n, a, k in product(range(len(queries)), range(16), range(4)):
                x = (places[n][0] + offsets[n, a, level, k, 0] / w) * w - 0.5
                y = (places[n][1] + offsets[n, a, level, k, 1] / h) * h - 0.5
                left, top = math.floor(x), math.floor(y)
                for i, j in product((top, top + 1), (left, left + 1)):
                    if 0 <= i < h and 0 <= j < w:
                        share = (1 - abs(x - j)) * (1 - abs(y - i))
                        out[n, a] += weights[n, a, level, k] * share * maps[i, j, a]
        return self.linear(name + ".output_proj", torch.from_numpy(out).flatten(1))

    def places(self, sizes):
        return [((j + 0.5) / w, (i + 0.5) / h) for h, w in sizes for i in range(h) for j in range(w)]

    def adapter(self, features, image):
        """features: (patches P D, (h, w)) of four layers;  image 1 3 H W -> four maps 1 D . ."""
        s = "segmentation_model.0."
        x, c = image, []
        for conv, norm, stride in ((0, 1, 2), (3, 4, 1), (6, 7, 1)):
            x = F.relu(self.batch(f"{s}spm.stem.{norm}", self.conv(f"{s}spm.stem.{conv}", x, stride)))
        c.append(F.max_pool2d(x, 3, 2, 1))
        for k in 2, 3, 4:
            c.append(F.relu(self.batch(f"{s}spm.conv{k}.1", self.conv(f"{s}spm.conv{k}.0", c[-1], 2))))
        c = [self.conv(f"{s}spm.fc{k + 1}", m) for k, m in enumerate(c)]
        sizes = [m.shape[2:] for m in c[1:]]
        tokens = torch.cat([m[0].flatten(1).T + self.p[s + "level_embed"][k] for k, m in enumerate(c[1:])])

        def extract(name, tokens, feature):
            f, grid = feature
            tokens = tokens + self.deformable(name + ".attn", self.norm(name + ".query_norm", tokens, 1e-6),
                                              self.places(sizes), self.norm(name + ".feat_norm", f, 1e-6), [grid])
            x = self.linear(name + ".ffn.fc1", self.norm(name + ".ffn_norm", tokens, 1e-6))
            parts, first = [], 0
            for h, w in sizes:
                m = x[first : first + h * w].T.reshape(1, -1, h, w)
                first += h * w
                weight = self.p[name + ".ffn.dwconv.dwconv.weight"]
                m = F.conv2d(m, weight, self.p[name + ".ffn.dwconv.dwconv.bias"], padding=1, groups=len(weight))
                parts.append(m[0].flatten(1).T)
            x = torch.cat(parts)
            x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
            return tokens + self.linear(name + ".ffn.fc2", x)
        for i, feature in enumerate(features):
            tokens = extract(f"{s}interactions.{i}.extractor", tokens, feature)
        for i in 0, 1:
            tokens = extract(f"{s}interactions.3.extra_extractors.{i}", tokens, features[3])
        maps, first = [], 0
        for h, w in sizes:
            maps.append(tokens[first : first + h * w].T.reshape(1, -1, h, w))
            first += h * w
        up = F.conv_transpose2d(maps[0], self.p[s + "up.weight"], self.p[s + "up.bias"], stride=2)
        maps = [up + c[0], *maps]
        for k, (f, (h, w)) in enumerate(features):
            m = f.T.reshape(1, -1, h, w)
            maps[k] = self.batch(f"{s}norm{k + 1}", maps[k] + F.interpolate(
                m, maps[k].shape[2:], mode="bilinear", align_corners=False))
        return maps

    def sine(self, h, w, d):
        out = torch.zeros(h, w, d, dtype=torch.float64)
        for i in range(h):
            for j in range(w):
                y, x = (i + 1) / (h + 1e-6) * 2 * math.pi, (j + 1) / (w + 1e-6) * 2 * math.pi
                for k in range(d // 2):
                    T = 10000 ** (2 * (k // 2) / (d / 2))
                    wave = math.cos if k % 2 else math.sin
                    out[i, j, k], out[i, j, d // 2 + k] = wave(y / T), wave(x / T)
        return out.view(h * w, d)

    def pixels(self, maps):
        s = "segmentation_model.1.pixel_decoder."
        levels = [self.group(f"{s}input_convs.{k}.1", self.conv(f"{s}input_convs.{k}.0", m))
                  for k, m in enumerate((maps[3], maps[2], maps[1]))]
        sizes, d = [m.shape[2:] for m in levels], levels[0].shape[1]
        y = torch.cat([m[0].flatten(1).T for m in levels])
        p = torch.cat([self.sine(h, w, d) + self.p[s + "encoder.level_encoding"][k] for k, (h, w) in enumerate(sizes)])
        for i in range(SMALL.encoder_layers):
            t = f"{s}encoder.encoder.layers.{i}."
            y = self.norm(t + "norm1", y + self.deformable(t + "self_attn", y + p, self.places(sizes), y, sizes), 1e-5)
            y = self.norm(t + "norm2", y + self.linear(t + "linear2", F.relu(self.linear(t + "linear1", y))), 1e-5)
        out, first = [], 0
        for h, w in sizes:
            out.append(y[first : first + h * w])
            first += h * w
        m2 = out[2].T.reshape(1, d, *sizes[2])
        o = self.group(s + "lateral_convs.0.norm", self.conv(s + "lateral_convs.0", maps[0]))
        o = o + F.interpolate(m2, maps[0].shape[2:], mode="bilinear", align_corners=False)
        o = F.relu(self.group(s + "output_convs.0.norm", self.conv(s + "output_convs.0", o)))
        return out, sizes, self.conv(s + "mask_feature", o)[0]

    def attend(self, name, q, k, v, allowed=None):
        d = q.shape[1]
        weight, bias = self.p[name + ".in_proj_weight"], self.p[name + ".in_proj_bias"]
        q, k, v = (x @ weight[n * d : (n + 1) * d].T + bias[n * d : (n + 1) * d] for n, x in enumerate((q, k, v)))
        heads, E = [], d // 16
        for a in range(16):
            own = slice(a * E, (a + 1) * E)
            scores = q[:, own] @ k[:, own].T / math.sqrt(E)
            if allowed is not None:
                scores = scores.masked_fill(~allowed, -math.inf)
            heads.append(scores.softmax(1) @ v[:, own])
        return self.linear(name + ".out_proj", torch.cat(heads, 1))

    def predictions(self, memory, sizes, mask_features):
        s = "segmentation_model.1.predictor."
        out, e = self.p[s + "query_feat.weight"], self.p[s + "query_embed.weight"]

        def predict(out):
            z = self.norm(s + "post_norm", out, 1e-5)
            m = z
            for k in 0, 1, 2:
                m = self.linear(f"{s}mask_embed.layers.{k}", m)
                m = F.relu(m) if k < 2 else m
            return self.linear(s + "class_embed", z), torch.tensordot(m, mask_features, 1)
        found = [predict(out)]
        for i in range(SMALL.layers):
            level = i % 3
            small = F.interpolate(found[-1][1][None], sizes[level], mode="bilinear", align_corners=False)[0]
            allowed = small.sigmoid().flatten(1) >= 0.5
            for row in allowed:
                if not row.any():
                    row[:] = True
            v = memory[level] + self.p[s + "level_embed.weight"][level]
            t = f"{s}transformer_cross_attention_layers.{i}."
            k = v + self.sine(*sizes[level], v.shape[1])
            out = self.norm(t + "norm", out + self.attend(t + "multihead_attn", out + e, k, v, allowed), 1e-5)
            t = f"{s}transformer_self_attention_layers.{i}."
            out = self.norm(t + "norm", out + self.attend(t + "self_attn", out + e, out + e, out), 1e-5)
            t = f"{s}transformer_ffn_layers.{i}."
            out = self.norm(t + "norm", out + self.linear(t + "linear2", F.relu(self.linear(t + "linear1", out))), 1e-5)
            found.append(predict(out))
        return found

    def __call__(self, features, image):
        memory, sizes, mask_features = self.pixels(self.adapter(features, image))
        return self.predictions(memory, sizes, mask_features)


def relative(found, exact):
    return ((found - exact).norm() / (exact - exact.mean()).norm()).item()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    head = invented(Mask2Former(SMALL))
    path = tmp_path_factory.mktemp("head") / "head.pth"
    torch.save({name: x.clone() for name, x in head.state_dict().items()}, path)
    return path, head


@torch.no_grad()
def test_a_file_answers_as_the_forward_pass_written_out(backbone, file):
    path, head = file
    decoder = load_decoder(path, backbone)
    images = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(5))
    found, scores = decoder(images), decoder.semantic(images)
    answers = head((backbone.layers(images, [1, 3, 5, 7]), images))
    assert found["logits"].shape == (2, 7, 6) and found["masks"].shape == (2, 7, 8, 16)
    assert torch.equal(found["masks"], answers.masks[-1]) and len(answers.logits) == len(answers.masks) == 5
    reference = Reference(head.state_dict())
    worst, blocked = 0, 0
    for b in 0, 1:
        seen = [(f.patches[b].double(), f.grid) for f in backbone.layers(images, [1, 3, 5, 7])]
        exact = reference(seen, images[b : b + 1].double())
        for i, (logits, masks) in enumerate(exact):
            worst = max(worst, relative(answers.logits[i][b], logits), relative(answers.masks[i][b], masks))
            blocked += (masks < 0).sum().item()
        full = F.interpolate(exact[-1][1][None], (32, 64), mode="bilinear", align_corners=False)[0].sigmoid()
        dense = torch.tensordot(exact[-1][0].softmax(1)[:, :-1].T, full, 1)
        worst = max(worst, relative(scores[b], dense))
    assert blocked > 1000 and worst < 5e-6, worst  # measured: 8.8e-7


def test_sizes_of_the_paper():
    """Of parameters; facts of the released file"""
    with torch.device("meta"):
        adapter, head = Mask2Former(mask2former.sized(4096)).segmentation_model
    assert [sum(p.numel() for p in part.parameters()) for part in (adapter, head)] == [227_084_736, 700_335_639]
    assert [mask2former.blocks(n) for n in (12, 24, 32, 40)] == [
        [2, 5, 8, 11], [4, 11, 17, 23], [7, 15, 23, 31], [9, 19, 29, 39]]


def test_windows_of_the_paper():
    """App. D.10: 896 and 596; of other sides in proportion"""
    assert [mask2former.stride(side) for side in (896, 448, 1280, 160)] == [596, 298, 851, 106]


def test_shapes_of_the_released_file():
    with torch.device("meta"):
        state = Mask2Former(mask2former.sized(4096)).state_dict()
    wanted = {
        "0.level_embed": (3, 4096), "0.spm.stem.6.weight": (64, 64, 3, 3), "0.spm.stem.7.running_var": (64,),
        "0.spm.conv4.0.weight": (256, 256, 3, 3), "0.spm.fc2.bias": (4096,), "0.up.weight": (4096, 4096, 2, 2),
        "0.interactions.3.extra_extractors.1.attn.sampling_offsets.weight": (128, 4096),
        "0.interactions.0.extractor.attn.attention_weights.bias": (64,), "0.norm4.num_batches_tracked": (),
        "0.interactions.2.extractor.attn.value_proj.weight": (2048, 4096),
        "0.interactions.2.extractor.ffn.dwconv.dwconv.weight": (1024, 1, 3, 3),
        "1.pixel_decoder.input_convs.2.1.bias": (2048,), "1.pixel_decoder.encoder.level_encoding": (3, 2048),
        "1.pixel_decoder.encoder.encoder.layers.5.self_attn.sampling_offsets.weight": (384, 2048),
        "1.pixel_decoder.encoder.encoder.layers.5.linear1.weight": (4096, 2048),
        "1.pixel_decoder.lateral_convs.0.norm.weight": (2048,),
        "1.pixel_decoder.output_convs.0.weight": (2048, 2048, 3, 3),
        "1.predictor.query_embed.weight": (100, 2048), "1.predictor.level_embed.weight": (3, 2048),
        "1.predictor.class_embed.bias": (151,), "1.predictor.mask_embed.layers.2.weight": (2048, 2048),
        "1.predictor.transformer_cross_attention_layers.8.multihead_attn.in_proj_weight": (6144, 2048),
        "1.predictor.transformer_self_attention_layers.8.self_attn.out_proj.bias": (2048,),
        "1.predictor.transformer_ffn_layers.8.linear2.weight": (2048, 4096)}
    for name, shape in wanted.items():
        assert tuple(state.pop(f"segmentation_model.{name}").shape) == shape, name
    assert not any(name.endswith(("lateral_convs.0.bias", "output_convs.0.bias")) for name in state)


def test_round_trip(backbone, file, tmp_path):
    path, head = file
    decoder = load_decoder(path, backbone)
    torch.save({f"module.{k}": v for k, v in decoder.head.state_dict().items()}
               | {"module.segmentation_model.0.backbone.cls_token": torch.ones(3)}, tmp_path / "x.pth")
    again = load_decoder(tmp_path / "x.pth", backbone)
    images = torch.randn(1, 3, 32, 64)
    assert all(torch.equal(x, y) for x, y in zip(decoder(images).values(), again(images).values(), strict=True))


@pytest.mark.parametrize("heads", [2, 4, 16])
def test_a_file_says_how_many_heads_look(backbone, tmp_path, heads):
    torch.save(Mask2Former(replace(SMALL, heads=heads)).state_dict(), tmp_path / "x.pth")
    adapter, segmenter = load_decoder(tmp_path / "x.pth", backbone).head.segmentation_model
    found = {module.heads for module in (*adapter.modules(), *segmenter.modules()) if hasattr(module, "heads")}
    assert found == {heads}


@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("segmentation_model.0.up.bias"), r"0.up.bias is missing, wanted \(32,\)"),
    (lambda s: s.pop("segmentation_model.1.predictor.class_embed.weight"), "class_embed.weight is missing, wanted one"),
    (lambda s: s.update({"segmentation_model.0.level_embed": torch.zeros(3, 40)}),
     "for a backbone of width 40, this one has 32"),
    (lambda s: s.update({"segmentation_model.1.odd": torch.zeros(1)}), "1 tensors are not known: segm.*odd"),
    (lambda s: s.update({"segmentation_model.1.predictor.class_embed.bias": torch.full((6,), math.nan)}), "holds nan"),
])
def test_files_that_do_not_fit(backbone, file, tmp_path, change, says):
    state = dict(file[1].state_dict())
    change(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=says):
        load_decoder(tmp_path / "x.pth", backbone)


def test_other_blocks(backbone, file):
    with pytest.raises(ValueError, match="layers 1, 8, 2, 3; this backbone has blocks 0 to 7"):
        load_decoder(file[0], backbone, layers=[1, 8, 2, 3])
    images = torch.randn(1, 3, 32, 32)
    found = load_decoder(file[0], backbone, layers=[0, 1, 2, 3])(images)["masks"]
    assert not torch.equal(found, load_decoder(file[0], backbone)(images)["masks"])


def test_a_query_whose_mask_is_empty_sees_everything():
    found = torch.full((1, 2, 8, 8), -3.0)
    found[0, 1, :4, :4] = 9.0
    inside = mask2former.allowed(found, (4, 4))
    assert inside[0, 0].all() and inside[0, 1].view(4, 4)[:2, :2].all() and inside[0, 1].sum() == 4


def test_at_first_masks_are_neither_sure_nor_alike():
    torch.manual_seed(0)
    head = mask2former.Head(128, 13)
    g = torch.Generator().manual_seed(1)
    found = head((features(2, 128, (4, 6)), torch.randn(2, 3, 64, 96, generator=g)))
    assert [tuple(x.shape) for x in found.logits] == [(2, 24, 14)] * 4
    assert 0.1 < found.masks[-1].std() < 10 and found.logits[-1].softmax(2).max() < 0.95
