"""decoders/vggt.py: tokens, blocks and losses against loops in float64; frames in any order; vggt-omega's backbone."""

import math
from dataclasses import replace

import pytest
import torch

from decoders import dpt, vggt
from decoders.fit import needs
from decoders.vggt import VGGT, VGGTConfig
from model import Features, ViTConfig

SMALL = VGGTConfig(width=8, d=16, heads=2, pairs=2, registers=3, channels=4, hidden=4)
VIT = ViTConfig(depth=4, width=128, heads=2, hidden=64, n_registers=16)


def network(c=SMALL, seed=0):
    """With weights large enough that every part counts"""
    torch.manual_seed(seed)
    net = VGGT(c)
    for name, p in net.named_parameters():
        if "depth_head" not in name:
            torch.nn.init.normal_(p, std=0.4)
    return net.eval()


def features(B=2, frames=3, grid=(2, 3), width=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [Features(*(torch.randn(*shape, width, generator=rng) for shape in
                       ((B, frames), (B, frames, 4), (B, frames, grid[0] * grid[1]))), grid) for _ in range(4)]


def picked(found, frames):
    return [Features(f.cls[:, frames], f.registers[:, frames], f.patches[:, frames], f.grid) for f in found]

# --------------------------------------------------------------------------------
# The network


def turned(x, h, w, prefix):
    """Queries or keys n E of h w patches after the prefix, turned as RoPE does: pairs of channels E/2 apart"""
    E, out = x.shape[1], x.clone()
    for n in range(h * w):
        place = [(n // w + 0.5) / h * 2 - 1, (n % w + 0.5) / w * 2 - 1]
        angles = [2 * math.pi * at / 100 ** (j / (E // 4)) for at in place for j in range(E // 4)]
        for j, angle in enumerate(angles):
            a, b = x[prefix + n, j], x[prefix + n, j + E // 2]
            out[prefix + n, j] = a * math.cos(angle) - b * math.sin(angle)
            out[prefix + n, j + E // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def norm(x, part, eps=1e-5):
    mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    return (x - mean) / (var + eps).sqrt() * part["weight"] + part["bias"]


def block(x, p, heads, grid, prefix, frames):
    """Tokens n d of `frames` frames, one after the other, through a block with the parameters p"""
    def part(name):
        return {key: p[f"{name}.{key}"] for key in ("weight", "bias")}

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
    bias = p["attn.qkv.bias"] * p["attn.qkv.bias_mask"]
    q, k, v = (norm(x, part("norm1")) @ p["attn.qkv.weight"].T + bias).chunk(3, 1)
    N, E, out = len(x) // frames, x.shape[1] // heads, []
    for a in range(heads):
        qa, ka = (torch.cat([turned(y[f * N : (f + 1) * N, a * E : (a + 1) * E], *grid, prefix) for f in range(frames)])
                  for y in (q, k))
        out.append((qa @ ka.T / math.sqrt(E)).softmax(1) @ v[:, a * E : (a + 1) * E])
    x = x + p["ls1.gamma"] * linear(torch.cat(out, 1), "attn.proj")
    hidden = linear(norm(x, part("norm2")), "mlp.fc1")
    return x + p["ls2.gamma"] * linear(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))), "mlp.fc2")


def middle(n, h, w):
    return torch.tensor([(n // w + 0.5) / h * 2 - 1, (n % w + 0.5) / w * 2 - 1]).double()


def found_in(patches, first, h, w):
    """P P likeness; P 5: how far, down and right, from where it lies a patch is found; where it lies; how sure"""
    likeness, out = [], []
    for n, x in enumerate(patches):
        likeness.append(torch.stack([20 * (x @ y / (x.norm() * y.norm())) for y in first]))
        weights = likeness[-1].softmax(0)
        mean = sum(weights[k] * middle(k, h, w) for k in range(h * w))
        out.append(torch.cat([mean - middle(n, h, w), middle(n, h, w), weights.max()[None]]))
    return torch.stack(likeness), torch.stack(out)


def reference(net, found):
    """aggregate(...) and the cameras, one scene and one frame after the other, float64"""
    p, c = {name: x.double() for name, x in net.state_dict().items()}, net.config
    grid, frames, out = found[0].grid, found[0].patches.shape[1], []

    def of(prefix):
        return {name.removeprefix(prefix): x for name, x in p.items() if name.startswith(prefix)}
    for b in range(len(found[0].patches)):
        tokens = []
        for f in range(frames):
            patches = torch.cat([each.patches[b, f].double() for each in found], 1)
            own = min(f, 1)
            x = patches @ p["reduce.weight"].T + p["reduce.bias"]
            if c.sought:
                places = torch.stack([middle(n, *grid) for n in range(len(x))])
                x = x + places @ p["sought.place.weight"].T + p["sought.place.bias"]
            tokens.append(torch.cat([p["cls_token"][own], p["storage_tokens"][own], x]))
        for k in range(c.pairs):
            tokens = [block(x, of(f"frame_blocks.{k}."), c.heads, grid, 1 + c.registers, 1) for x in tokens]
            over = block(torch.cat(tokens), of(f"global_blocks.{k}."), c.heads, grid, 1 + c.registers, frames)
            both = [torch.cat(pair, 1) for pair in zip(tokens, over.chunk(frames), strict=True)]
            tokens = list(over.chunk(frames))
            if c.sought and k == c.pairs // 2:
                heads = [x[: 1 + c.registers] for x in tokens]
                tokens = [x[1 + c.registers :] for x in tokens]
                seen = [norm(x, of("sought.norm.")) @ p["sought.project.weight"].T + p["sought.project.bias"]
                        for x in tokens]
                alike, at = (torch.stack(x) for x in zip(*(found_in(x, seen[0], *grid) for x in seen), strict=True))
                tokens = [torch.cat([head, x + here @ p["sought.flow.weight"].T + p["sought.flow.bias"]])
                          for head, x, here in zip(heads, tokens, at, strict=True)]
        mean = torch.stack([torch.cat([x[0], x[1 + c.registers :].mean(0)]) for x in both])
        hidden = norm(mean, of("camera_head.0.")) @ p["camera_head.1.weight"].T
        hidden = hidden + p["camera_head.1.bias"]
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        cameras = hidden @ p["camera_head.3.weight"].T + p["camera_head.3.bias"]
        cameras[:, 3] += 1
        out.append((cameras, torch.stack(both), alike if c.sought else torch.zeros(0)))
    return (torch.stack(x) for x in zip(*out, strict=True))


@pytest.mark.parametrize("sought", [0, 5])
def test_it_is_what_is_written_out(sought):
    net, found = network(replace(SMALL, sought=sought, pairs=4 if sought else 2)), features()
    cameras, both, alike = reference(net, found)
    ours, likeness = net.aggregate(found)
    assert len(ours) == 4 and ours[0].grid == (2, 3)
    last = torch.cat([ours[3].cls[:, :, None], ours[3].registers, ours[3].patches], 2)
    assert (last - both).norm() / both.norm() < 1e-5                                           # measured: 4e-7
    found = net(found)
    assert (found["cameras"] - cameras).norm() / cameras.norm() < 1e-5                         # measured: 4e-7
    if sought:
        assert torch.equal(found["likeness"], likeness) and (likeness - alike).norm() / alike.norm() < 1e-5
    else:
        assert likeness is None and list(found) == ["cameras", "depth", "confidence"]


def test_shapes_and_counts():
    out = network()(features(grid=(3, 4)))
    assert out["cameras"].shape == (2, 3, 9) and out["depth"].shape == out["confidence"].shape == (2, 3, 64, 64)
    assert (out["depth"] > 0).all() and (out["confidence"] > 1).all()
    with torch.device("meta"):
        large = vggt.Head(1024)
    n = {name: sum(p.numel() for p in getattr(large, name).parameters()) for name in
         ("reduce", "frame_blocks", "global_blocks", "depth_head", "camera_head")}
    assert n["reduce"] == 4 * 1024 * 1024 + 1024 and n["frame_blocks"] == n["global_blocks"] == 24 * 12_598_272
    assert large.config.pairs == 24 and dpt.blocks(24) == [4, 11, 17, 23] and large.config.registers == 4
    assert sum(p.numel() for p in large.parameters()) == 628_957_419
    small = vggt.Head(128).config
    assert (small.d, small.pairs, small.sought) == (96, 3, 64) and not large.config.sought
    assert vggt.recipe(1024).lr == 1e-4                      # App. D.12


def test_frames_after_the_first_may_come_in_any_order():
    net, found = network(), features(frames=4)
    with torch.no_grad():
        one, two = net(found), net(picked(found, [0, 2, 3, 1]))
        other = net(picked(found, [1, 0, 2, 3]))["cameras"]
    for name in one:
        torch.testing.assert_close(one[name][:, [0, 2, 3, 1]], two[name], rtol=1e-4, atol=1e-5)
    assert (one["cameras"][:, [1, 0, 2, 3]] - other).abs().max() > 0.1  # the first is the world


def test_frames_see_one_another_in_global_blocks_alone():
    net, found = network(), features()
    with torch.no_grad():
        alone, beside = net(picked(found, [0]))["cameras"][:, 0], net(found)["cameras"][:, 0]
        assert not torch.allclose(alone, beside, rtol=1e-2)
        for each in net.global_blocks:
            each.ls1.gamma.zero_()
        alone, beside = net(picked(found, [0]))["cameras"][:, 0], net(found)["cameras"][:, 0]
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-5)


def test_it_begins_with_cameras_that_do_not_turn():
    torch.manual_seed(3)
    first = VGGT(SMALL)
    torch.manual_seed(3)
    again, other = VGGT(SMALL), VGGT(SMALL)
    torch.manual_seed(4)
    other = VGGT(SMALL)
    cameras = first(features())["cameras"]
    assert (cameras - torch.eye(9)[3]).abs().max() < 0.1
    for (name, x), y, z in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y) and x.isfinite().all()
        assert name.endswith(("bias", "gamma", "weight")) and x.ndim == 1 or not torch.equal(x, z)


def test_what_it_sees_is_one_frame_after_the_other():
    class Frozen:
        layers = [0, 1, 2, 3]

        def network_input(self, images):
            return torch.stack(images).float()

        def network(self, x, layers):
            return [Features(x[:, :, 0, 0] + k, x[:, :0], x.flatten(2).transpose(1, 2) * k, tuple(x.shape[2:]))
                    for k in layers]
    frames = torch.arange(2 * 3 * 3 * 4, dtype=torch.uint8).view(2, 3, 3, 4)
    found = network().see(Frozen(), [frames.flatten(0, 1), frames.flip(0).flatten(0, 1)])
    assert len(found) == 4 and found[0].grid == (3, 4)
    assert found[2].patches.shape == (2, 2, 12, 3) and found[1].cls.tolist()[0] == [[1, 13, 25], [37, 49, 61]]
    torch.testing.assert_close(found[2].patches[0, 1], 2.0 * frames[1].flatten(1).T)
    torch.testing.assert_close(found[2].patches[1, 0], 2.0 * frames[1].flatten(1).T)


def test_what_is_computed_twice_has_the_same_gradients():
    c, found = replace(SMALL, recompute="none"), features()
    nets = network(c).train(), network(replace(c, recompute="full")).train()
    for net in nets:
        net(found)["cameras"].square().sum().backward()
    for one, two in zip(*(net.parameters() for net in nets), strict=True):
        assert one.grad is None and two.grad is None or torch.equal(one.grad, two.grad)


def test_a_moved_picture_is_found_where_it_went(monkeypatch):
    """The second frame is the first, moved by a patch to the left: its patches are found one to the right."""
    monkeypatch.setattr(vggt, "SHARP", 100.0)
    sought = vggt.Sought(replace(SMALL, d=32, sought=32))
    with torch.no_grad():
        sought.project.weight.copy_(torch.eye(32))
        sought.flow.weight.zero_()[:5] = torch.eye(5)
    first = torch.randn(1, 1, 24, 32, generator=torch.Generator().manual_seed(0))
    both = torch.cat([first, first.unflatten(2, (4, 6)).roll(-1, 3).flatten(2, 3)], 1)
    likeness, flow = sought(both, 4, 6)
    assert likeness.shape == (1, 2, 24, 24) and likeness[0, 1, :5].argmax(1).tolist() == [1, 2, 3, 4, 5]
    found = (flow - sought.flow.bias)[0].unflatten(1, (4, 6))
    assert found[0, :, :, :2].abs().max() < 0.05 and found[1, :, :5, 0].abs().max() < 0.05
    assert (found[1, :, :5, 1] - 2 / 6).abs().max() < 0.05 and found[1, ..., 4].min() > 0.9
    assert found[1, 0, 0, 2:4].tolist() == pytest.approx([-0.75, -5 / 6], abs=1e-5)


def test_the_memory_of_a_training_is_counted():
    with torch.device("meta"):
        head = vggt.Head(128)
    found = needs(head, VIT, [0, 1, 2, 3], (12, 96, 128), 4)
    n = sum(p.numel() for p in head.parameters())
    assert found["gradients"] == 4 * n and found["features"] == 4 * 4 * 4 * 4 * (1 + 16 + 48) * 128
    assert found["outputs"] == 4 * 4 * 4 * 4 * (9 + 2 * 96 * 128 + 48 * 48)

# --------------------------------------------------------------------------------
# Losses


def test_losses_are_the_sums():
    torch.manual_seed(0)
    depth, confidence, truth = torch.rand(2, 3, 4) + 0.5, torch.rand(2, 3, 4) + 1, torch.rand(2, 3, 4) + 0.5
    truth[0, 1, 2] = truth[1, 0] = 0
    total, steps, known = 0.0, [], 0
    for f in range(2):
        off = [[(depth[f, y, x] - truth[f, y, x]).item() if truth[f, y, x] > 0 else None for x in range(4)]
               for y in range(3)]
        for y in range(3):
            for x in range(4):
                if off[y][x] is not None:
                    c = confidence[f, y, x].item()
                    total, known = total + c * abs(off[y][x]) - 0.2 * math.log(c), known + 1
        down = [(off[y + 1][x], off[y][x]) for y in range(2) for x in range(4)]
        across = [(off[y][x + 1], off[y][x]) for y in range(3) for x in range(3)]
        there = sum(x is not None for row in off for x in row)
        steps.append(sum(abs(a - b) for a, b in down + across if None not in (a, b)) / there)
    exact = total / known + sum(steps) / 2
    assert vggt.depth_loss(depth, confidence, truth).item() == pytest.approx(exact, rel=1e-5)
    cameras, others = torch.rand(2, 9), torch.rand(2, 9)
    weights = [5, 5, 5, 25, 25, 25, 25, 2.5, 2.5]
    apart = sum(abs(cameras[f, k] - others[f, k]).item() * weights[k] for f in range(2) for k in range(9)) / 18
    assert vggt.camera_loss(cameras, others).item() == pytest.approx(apart, rel=1e-5)
    out = dict(cameras=cameras[None], depth=depth[None], confidence=confidence[None])
    truths = [dict(cameras=others, depth=truth)]
    assert vggt.loss(out, truths).item() == pytest.approx(apart + exact, rel=1e-5)
    twice = vggt.loss({name: torch.cat([x, x]) for name, x in out.items()}, truths * 2)
    assert twice.item() == pytest.approx(apart + exact, rel=1e-5)


def test_where_patches_are_seen_is_shared_by_the_four_around():
    """A grid of 2 3: a place between four middles, one on a middle, one in the corner, three that are not known."""
    nan, third = math.nan, 2 / 3
    places = torch.tensor([[0.1, 0.2], [0.5, -third], [-1, -1], [nan, nan], [nan, nan], [nan, nan]]).view(1, 2, 3, 2)
    places = torch.cat([torch.zeros(1, 2, 3, 2), places])  # the first frame's own do not count
    logits = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0))
    logs = logits[1].log_softmax(1)
    shares = torch.zeros(3, 6)
    shares[0] = torch.tensor([0, 0.4 * 0.7, 0.4 * 0.3, 0, 0.6 * 0.7, 0.6 * 0.3])
    shares[1, 3] = shares[2, 0] = 1
    exact = -(shares * logs[:3]).sum() / 3
    assert vggt.sought_loss(logits, places).item() == pytest.approx(exact.item(), rel=1e-5)
    assert vggt.sought_loss(logits, places * nan) == 0
    out = dict(cameras=torch.zeros(1, 2, 9), depth=torch.ones(1, 2, 2, 3), confidence=2 * torch.ones(1, 2, 2, 3))
    truths = [dict(cameras=torch.zeros(2, 9), depth=torch.ones(2, 2, 3), places=places)]
    more = vggt.loss(out | dict(likeness=logits[None]), truths) - vggt.loss(out, truths)
    assert more.item() == pytest.approx(exact.item(), rel=1e-5)


def test_nothing_known_is_no_loss_of_depth():
    depth = torch.ones(1, 4, 4, requires_grad=True)
    loss = vggt.depth_loss(depth, depth + 1, torch.zeros(1, 4, 4))
    loss.backward()
    assert loss == 0 and depth.grad.abs().sum() == 0


def test_it_learns_what_it_is_not_sure_of():
    """Where the truth is noise the confidence falls to 1; where it is not it rises."""
    torch.manual_seed(0)
    logits = torch.zeros(1, 8, 8, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.1)
    for _ in range(200):
        truth = torch.full((1, 8, 8), 2.0)
        truth[:, :4] += torch.rand(1, 4, 8) - 0.5
        optimizer.zero_grad()
        vggt.depth_loss(torch.full((1, 8, 8), 2.01), 1 + logits.exp(), truth).backward()
        optimizer.step()
    sure = 1 + logits.exp()
    assert sure[:, :4].mean() < 1.2 and sure[:, 4:].mean() > 5
