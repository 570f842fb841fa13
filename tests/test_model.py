"""
model.py: parity with transformers on the same random weights; what RoPE, masks and crop packing promise; stochastic
depth that skips work and does not know the number of ranks; initialisation; errors that name what is wrong.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree
from transformers import DINOv3ViTConfig, DINOv3ViTModel

import model
from model import SIZES, Noise, ProjectionHead, ViT, ViTConfig, build, rope_tables
from ops import attention, rotate

COUNTS = {"tiny": 1_290_624, "s": 21_601_152, "s+": 28_697_472, "b": 85_669_632, "l": 303_154_176, "l+": 403_915_776,
          "h+": 840_633_600, "7b": 6_716_043_264}
SMALL = ViTConfig(3, 32, 2, 48, patch_size=4, n_registers=2)
RENAMED = [  # ours, transformers
    ("storage_tokens", "embeddings.register_tokens"), ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"), ("patch_embed.proj", "embeddings.patch_embeddings"),
    ("blocks.", "model.layer."), ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1"),
    ("attn.proj", "attention.o_proj"), ("mlp.fc1", "mlp.up_proj"), ("mlp.fc2", "mlp.down_proj"),
    ("mlp.w1", "mlp.gate_proj"), ("mlp.w2", "mlp.up_proj"), ("mlp.w3", "mlp.down_proj"),
]


def shaken(config):
    """A network whose every parameter matters: no zeros, no gamma of 1e-5, no norm that is the identity."""
    vit, generator = ViT(config), torch.Generator().manual_seed(0)
    for name, p in vit.named_parameters():
        fan_in = p[0].numel() if name.endswith("weight") and p.ndim > 1 else 16
        noise = torch.randn(p.shape, generator=generator) * fan_in ** -0.5
        p.data = noise + (name.endswith("gamma") or "norm" in name and name.endswith("weight"))
    return vit.eval()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(features):
    """All that a network says of its images, as one tensor."""
    return torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)  # B N D


def error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()

# --------------------------------------------------------------------------------
# The same function as transformers' DINOv3ViTModel


def transformers_twin(vit):
    c, state = vit.config, {}
    hf = DINOv3ViTModel(DINOv3ViTConfig(
        hidden_size=c.width, num_hidden_layers=c.depth, num_attention_heads=c.heads, intermediate_size=c.hidden,
        patch_size=c.patch_size, num_register_tokens=c.n_registers, attn_implementation="eager",
        use_gated_mlp=c.ffn == "swiglu", hidden_act="silu" if c.ffn == "swiglu" else "gelu",
        query_bias=c.qkv_bias, value_bias=c.qkv_bias))
    for name, x in vit.state_dict().items():
        for ours, theirs in RENAMED:
            name = name.replace(ours, theirs)
        parts = zip("qkv", x.chunk(3), strict=True) if "qkv" in name else [("", x)]
        state |= {name.replace("attn.qkv", f"attention.{part}_proj"): third for part, third in parts}
    state["embeddings.mask_token"] = state["embeddings.mask_token"][None]  # 1 1 D
    hf.load_state_dict({name: state[name] for name in hf.state_dict()})
    return hf.eval()


@pytest.mark.parametrize("size", [(224, 224), (160, 224)])
@pytest.mark.parametrize("config", [
    ViTConfig(4, 96, 3, 128), ViTConfig(4, 64, 1, 96, "swiglu"), ViTConfig(3, 96, 2, 64, "swiglu", qkv_bias=False),
], ids=["mlp", "swiglu", "no qkv bias"])
@torch.no_grad()
def test_same_as_transformers(config, size):
    vit, images = shaken(config), randn(2, 3, *size)
    hf, found, masks = transformers_twin(vit), [], randn(2, size[0] * size[1] // 256, seed=1) > 0
    masked = hf(images, bool_masked_pos=masks).last_hidden_state
    for layer in hf.model.layer:
        layer.register_forward_hook(lambda _, __, out: found.append(out))
    plain = hf(images).last_hidden_state
    out, order = vit(images), [2, 0, 1]
    # measured, over all cases: 7.2e-7 at most
    assert error(tokens(out), plain) < 2e-5 and error(tokens(vit(images, masks)), masked) < 2e-5
    for i, ours in zip(order, vit.layers(images, order), strict=True):
        assert error(tokens(ours), hf.norm(found[i])) < 2e-5
    assert torch.equal(out.map().flatten(2).mT, out.patches) and out.map().shape[2:] == out.grid == (size[0] // 16, 14)
    assert error(masked, plain) > 0.1 and error(hf.norm(found[0]), plain) > 0.1  # else the above says little


@pytest.mark.parametrize("N", [21, 128, 129])  # below and above where bfloat16 on a CPU changes its way
def test_attention_in_bfloat16(N):
    q, k, v = randn(3, 2, 2, N, 16).bfloat16()
    scores = np.einsum("bane,bame->banm", q.double().numpy(), k.double().numpy()) / 4  # sqrt(E)
    exact = torch.tensor(np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)) @ v.double()
    assert error(attention(q, k, v).double(), exact) < 2e-2 and attention(q, k, v).dtype == q.dtype  # measured: 1.24e-2

# --------------------------------------------------------------------------------
# RoPE, masks, packed crops


def test_rope_is_the_equation_in_float32():
    """By hand, on a grid that is not square: rows first, then columns; cls and registers do not turn."""
    h, w, periods = 3, 5, [100 ** (j / 4) for j in range(4)]
    cos, sin = rope_tables(h, w, 2, torch.tensor(periods), [1.0, 0.7])
    assert cos.shape == sin.shape == (2, 2 + h * w, 1, 1, 8) and cos.dtype == sin.dtype == torch.float32
    x = randn(2, 2 + h * w, 2, 2, 16).bfloat16()
    turned = rotate(x, cos[0], sin[0])
    assert torch.equal(turned, rotate(x.float(), cos[0], sin[0]).bfloat16()) and turned.dtype == torch.bfloat16
    assert torch.equal(turned[:, :2], x[:, :2]) and not torch.equal(turned[:, 2:], x[:, 2:])
    for s, i, j in np.ndindex(2, h, w):
        y, x = ((1.0, 0.7)[s] * ((at + 0.5) / side * 2 - 1) for at, side in ((i, h), (j, w)))
        angles = [2 * math.pi * coordinate / period for coordinate in (y, x) for period in periods]
        at = s, 2 + i * w + j, 0, 0
        assert cos[at].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-5)  # measured: 3.2e-7
        assert sin[at].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-5)


def test_scores_depend_on_differences_of_coordinates_only():
    cos, sin = rope_tables(4, 6, 0, 100 ** (torch.arange(4) / 4), [1.0])
    everywhere = [randn(16, seed=seed).expand(1, 4 * 6, 1, 1, 16) for seed in (0, 1)]
    q, k = (rotate(x, cos[0], sin[0]).view(4, 6, 16) for x in everywhere)
    scores = torch.einsum("ije,kle->ijkl", q, k)
    assert torch.allclose(scores[1:, :, 1:], scores[:-1, :, :-1], atol=1e-5)               # measured: 1.9e-6
    assert torch.allclose(scores[:, 1:, :, 1:], scores[:, :-1, :, :-1], atol=1e-5)
    assert scores[0, 0].std() > 0.1                                                        # and do depend on them


def test_masked_pixels_are_not_seen():
    vit, images, masks = shaken(SMALL), randn(2, 3, 8, 12), torch.zeros(2, 6, dtype=torch.bool)
    masks[0, 4] = True                                                                     # row 1, column 1
    hidden, seen = images.clone(), images.clone()
    hidden[0, :, 4:8, 4:8] = seen[0, :, 4:8, 8:12] = 9
    out = tokens(vit(images, masks))
    assert torch.equal(out, tokens(vit(hidden, masks))) and torch.equal(out[1], tokens(vit(images))[1])
    assert error(tokens(vit(seen, masks))[0], out[0]) > 0.01 and error(tokens(vit(images))[0], out[0]) > 0.01


@pytest.mark.parametrize("local_norm, training", [(False, False), (False, True), (True, False), (True, True)])
@torch.no_grad()
def test_packed_crops_equal_separate_forwards(local_norm, training):
    """cls and registers of local crops have a final norm of their own, in training; nothing else differs."""
    vit = shaken(replace(SMALL, local_norm=local_norm)).train(training)
    crops, masks = [randn(4, 3, 16, 12), randn(6, 3, 8, 8)], [randn(4, 12, seed=2) > 0, None]
    packed, separate = vit(crops, masks), [vit(*each) for each in zip(crops, masks, strict=True)]
    own = vit.local_cls_norm if local_norm and training else vit.norm
    prefix = (tokens(separate[1])[:, :3] - vit.norm.bias) / vit.norm.weight * own.weight + own.bias
    assert error(tokens(packed[0]), tokens(separate[0])) < 1e-5                            # measured: 0
    assert error(tokens(packed[1]), torch.cat([prefix, separate[1].patches], 1)) < 1e-5    # measured: 1.3e-7

# --------------------------------------------------------------------------------
# Noise


@pytest.mark.parametrize("group, drop_path", [(8, 0.4), (4, 0.3), (2, 0.9), (1, 0.5)])
def test_each_group_keeps_its_share(group, drop_path):
    mask, scale = Noise(0, 5, 16, 8, group, drop_path).kept(0, n_views=3, depth=4)
    n_kept = max(int(3 * group * (1 - drop_path)), 1)
    assert (mask.reshape(4, 2, 3, 8 // group, group).sum(axis=(2, 4)) == n_kept).all() and scale == 3 * group / n_kept
    assert len({m.tobytes() for m in mask.reshape(8, -1)}) > 1                 # blocks and branches draw their own


@torch.no_grad()
def test_stochastic_depth_skips_and_is_the_masked_sum():
    """Running branches on the kept images alone gives x + mask n/kept branch(x), with the branch run on every image."""
    vit, images, seen = shaken(SMALL), [randn(8, 3, 16, 16), randn(12, 3, 8, 8)], []
    hooks = [part.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
             for block in vit.blocks for part in (block.attn, block.mlp)]
    noise = Noise(1, 2, 4, 4, 4, drop_path=0.45, rope_rescale=2.0)
    packed = vit(images, noise=noise)
    assert seen == [4 * (3 + 16) + 6 * (3 + 4)] * len(hooks)  # int(8 x .55), int(12 x .55)
    for i, (image, out) in enumerate(zip(images, packed, strict=True)):
        n, (mask, scale) = len(image), noise.kept(i, len(image) // 4, SMALL.depth)
        weight = torch.tensor(mask * scale).float()[..., None, None]                         # depth 2 n 1 1
        rope = rope_tables(*out.grid, 3, vit.rope_embed.periods, noise.rope_scales(i, SMALL.depth)[0])
        prefix = torch.cat([vit.cls_token, vit.storage_tokens], 1).expand(n, -1, -1)
        x = torch.cat([prefix, vit.patch_embed(image)], 1)                                   # n N D
        for block, (attn, mlp), *tables in zip(vit.blocks, weight, *rope, strict=True):
            x = x + attn * block.ls1.gamma * block.attn(block.norm1(x).flatten(0, 1), [n], [tables]).view_as(x)
            x = x + mlp * block.ls2.gamma * block.mlp(block.norm2(x))
        assert error(tokens(out), vit.norm(x)) < 1e-5                                        # measured: 0


@torch.no_grad()
def test_expectation_over_draws_is_the_full_network():
    vit, images, added = shaken(replace(SMALL, depth=1)), randn(4, 3, 8, 8), []
    vit.blocks[0].ls2.gamma.zero_()                               # else a branch of a branch: not linear in the draws
    vit.blocks[0].register_forward_hook(lambda _, args, x: added.append((x - args[0]).view(4, -1)))
    for noise in [None] + [Noise(0, step, 0, 4, 4, drop_path=0.5) for step in range(200)]:
        vit(images, noise=noise)
    share = (torch.stack(added[1:]).mean(0) * added[0]).sum(1) / (added[0] ** 2).sum(1)
    assert share.tolist() == pytest.approx([1] * 4, abs=5 / math.sqrt(200))    # 5 standard errors
    assert share.mean().item() == pytest.approx(1, abs=1e-5)                   # every draw keeps 2 of the 4


@pytest.mark.parametrize("group", [2, 4, 8])
@torch.no_grad()
def test_two_ranks_keep_what_one_keeps(group):
    vit, noise = shaken(SMALL), Noise(3, 7, 0, 8, group, drop_path=0.4, rope_rescale=2.0)
    crops = [randn(2, 8, 3, 16, 16), randn(3, 8, 3, 8, 8)]                     # views, samples
    together = vit([c.flatten(0, 1) for c in crops], noise=noise)
    for half in (slice(0, 4), slice(4, 8)):
        apart = vit([c[:, half].flatten(0, 1) for c in crops], noise=replace(noise, first=half.start, samples=4))
        for i, c in enumerate(crops):
            expected = tokens(together[i]).unflatten(0, (len(c), 8))[:, half].flatten(0, 1)
            assert error(tokens(apart[i]), expected) < 1e-5                    # measured: 0


def test_a_rank_may_keep_nothing():
    """Of a group that spans ranks one rank may hold none of the kept samples: its branches add nothing."""
    vit, images = shaken(replace(SMALL, depth=1)), randn(1, 3, 8, 8)
    noise = next(n for n in (Noise(0, s, 0, 1, 8, 0.9) for s in range(99)) if not n.kept(0, 1, 1)[0].any())
    embedded = torch.cat([vit.cls_token, vit.storage_tokens, vit.patch_embed(images)], 1)
    assert error(tokens(vit(images, noise=noise)), vit.norm(embedded)) < 1e-6


def test_without_drop_path_noise_is_the_jitter_alone():
    vit, images = shaken(SMALL), randn(4, 3, 16, 16)
    jittered = Noise(0, 0, 0, 4, 4, rope_rescale=2.0)
    assert torch.equal(tokens(vit(images, noise=Noise(0, 0, 0, 4, 4))), tokens(vit(images)))
    assert error(tokens(vit(images, noise=jittered)), tokens(vit(images))) > 0.01
    scales = np.log2([replace(jittered, first=f, step=s).rope_scales(c, 40) for s in range(10) for c in range(2)
                      for f in (0, 4)])
    assert len(np.unique(scales)) == scales.size                  # every block, crop group, step and rank its own
    assert np.abs(scales).max() <= 1 and abs(scales.mean()) < 0.08 and abs(scales.std() - 3 ** -0.5) < 0.05

# --------------------------------------------------------------------------------
# Heads, initialisation, gradients, errors


def everything():
    """Parts of every kind."""
    mlp, swiglu = replace(SMALL, local_norm=True), replace(SMALL, ffn="swiglu", qkv_bias=False)
    return nn.ModuleDict({"mlp": ViT(mlp), "swiglu": ViT(swiglu), "head": ProjectionHead(32, 64, 16, 512)})


def test_projection_head_under_autocast():
    head, x = build(lambda: ProjectionHead(32, 24, 16, 40)), randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        z, logits = head.bottleneck(x), head(x)
    assert z.shape == (5, 16) and logits.shape == (5, 40) and logits.dtype == torch.bfloat16
    assert head.bottleneck(x).norm(dim=-1).tolist() == pytest.approx([1] * 5, abs=1e-6)
    assert z.float().norm(dim=-1).tolist() == pytest.approx([1] * 5, abs=4e-3)  # bfloat16 rounds at 2^-9
    assert error(logits.float(), head(x)) < 0.03                                # measured: 0.0061
    assert torch.equal(head(x), head.bottleneck(x) @ head.last_layer.weight.T)  # prototypes as they are


def test_parameter_counts():
    with torch.device("meta"):
        assert {name: sum(p.numel() for p in ViT(SIZES[name]).parameters()) for name in SIZES} == COUNTS


def test_start_values():
    unknown = nn.ParameterDict({"new": torch.zeros(3)})
    assert build(lambda: unknown)["new"].isnan().all()                         # what initialise does not know shows
    for name, x in build(everything).state_dict().items():
        part, leaf = name.split(".")[-2:]
        if x.ndim == 4 or name.endswith("patch_embed.proj.bias"):
            assert 0.8 * 48 ** -0.5 < x.abs().max() <= 48 ** -0.5, name
        elif leaf in ("cls_token", "storage_tokens") or x.ndim == 2 and leaf != "mask_token":
            assert x.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * x.numel())), name
        elif leaf == "bias_mask":
            assert x.tolist() == [1] * 32 + [0] * 32 + [1] * 32
        elif leaf == "periods":
            assert x.tolist() == pytest.approx([100 ** (2 * j / 8) for j in range(4)])
        else:
            assert (x == (1e-5 if leaf == "gamma" else "norm" in part and leaf == "weight")).all(), name


def test_start_values_are_functions_of_seed_and_name():
    one, same, other = (build(everything, seed=s).state_dict() for s in (0, 0, 1))
    alone = build(lambda: nn.ModuleDict({"swiglu": everything()["swiglu"]})).state_dict()
    drawn = [name for name, x in one.items() if x.unique().numel() > 2 and not name.endswith("periods")]
    assert all(torch.equal(one[n], same[n]) for n in one) and not any(torch.equal(one[n], other[n]) for n in drawn)
    assert all(torch.equal(x, one[name]) for name, x in alone.items())         # whatever else is built beside it
    assert len({one[n].flatten()[:8].numpy().tobytes() for n in drawn}) == len(drawn) > 20


def test_every_parameter_learns():
    parts, crops = everything().train(), [randn(4, 3, 16, 16), randn(4, 3, 8, 8)]
    for vit in (parts["mlp"], parts["swiglu"]):
        big, little = vit(crops, [randn(4, 16) > 0, None], Noise(0, 0, 0, 4, 4, 0.3, 2.0))
        parts["head"](torch.cat([tokens(big), tokens(little)], 1)).log_softmax(-1)[..., 0].mean().backward()
    for name, p in parts.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    assert (parts["mlp"].blocks[0].attn.qkv.bias.grad.chunk(3)[1] == 0).all()  # the keys' third


@pytest.mark.parametrize("call, says", [
    (lambda: ViT(SMALL)(torch.zeros(1, 4, 8, 8)), r"ViT.*\(1, 4, 8, 8\).*\(batch, 3, height, width\)"),
    (lambda: ViT(SMALL)(torch.zeros(1, 3, 8, 3)), "ViT.*8x3.*one patch is 4x4"),
    (lambda: ViT(SMALL)(torch.zeros(1, 3, 10, 8)), "ViT.*10x8.*patches of 4x4.*to 8x8"),
    (lambda: ViT(SMALL).layers(torch.zeros(1, 3, 8, 8), [0, -1]), "layers: no block -1.*0 to 2"),
    (lambda: ViTConfig(1, 32, 2, 64, "gelu"), "ViTConfig: ffn is 'gelu'.*'mlp' or 'swiglu'"),
    (lambda: ViTConfig(1, 36, 6, 64), "ViTConfig: width 36 over 6 heads.*multiple of 4"),
])
def test_mistakes_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_fsdp2_finds_the_tensors_of_features():
    """its hooks walk what a module returns as a pytree; before torch 2.12 they know no dataclass"""
    features = build(lambda: ViT(SMALL))([randn(2, 3, 16, 16), randn(2, 3, 24, 16)], [None, None])
    leaves, spec = _pytree.tree_flatten(features)
    assert len(leaves) == 6 and all(isinstance(x, torch.Tensor) for x in leaves)
    again = _pytree.tree_unflatten(leaves, spec)
    assert [f.grid for f in again] == [f.grid for f in features] and again[1].patches is features[1].patches


def test_noise_drawn_ahead_is_the_noise():
    vit, noise, images = shaken(SMALL), Noise(3, 7, 0, 4, 4, drop_path=0.4, rope_rescale=2.0), randn(8, 3, 16, 16)
    P = 16 // SMALL.patch_size
    ahead = noise.draw(SMALL.depth, [8], [1 + SMALL.n_registers + P * P])
    assert torch.equal(vit(images, noise=ahead).patches, vit(images, noise=noise).patches)
    assert not torch.equal(vit(images).patches, vit(images, noise=noise).patches)


@pytest.mark.parametrize("rows, ranks", [(7, 1), (7, 3), (3, 4), (8, 4), (1, 4)])
def test_shards_are_those_of_torch(monkeypatch, rows, ranks):
    """equal parts, the last ones shorter or empty, as torch.chunk cuts"""
    x, found = torch.randn(rows, 2), []
    for rank in range(ranks):
        class Sharded(torch.Tensor):
            device_mesh = SimpleNamespace(ndim=1, size=lambda _: ranks, get_local_rank=lambda _, rank=rank: rank)

            def to_local(self, rank=rank):
                return (*x.chunk(ranks), *[x[:0]] * ranks)[rank]
        monkeypatch.setattr(model, "DTensor", Sharded)
        local, first = model.shard(x.as_subclass(Sharded))
        assert torch.equal(local, x[first : first + len(local)])
        found.append(local)
    assert torch.equal(torch.cat(found), x)
