"""dinotxt.py beside a reference that is written from names and formulas alone; files; what is refused."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dinotxt import (
    DinoTxt,
    TowerConfig,
    Towers,
    ask,
    best_name,
    hidden_width,
    load_dinotxt,
    new_towers,
    save_towers,
)
from model import SIZES, Features, Noise, ViT, ViTConfig, build

VIT = ViTConfig(2, 64, 2, 128, patch_size=8, layerscale=1.0, init_std=0.2)
SMALL = TowerConfig(depth=2, width=128, context=9, vocabulary=40, head_blocks=2)


def invented(seed=0):
    """Tensors of the released names, none of them at a start value"""
    towers, g = new_towers(VIT, SMALL), torch.Generator().manual_seed(seed)
    state = {name: torch.randn(x.shape, generator=g) * (0.3 if x.ndim > 1 else 0.5) + (0.5 if "norm" in name else 0)
             for name, x in towers.state_dict().items()}
    return state | dict(logit_scale=torch.tensor([3.0]))


def backbone():
    return build(lambda: ViT(VIT)).eval()

# --------------------------------------------------------------------------------
# The reference, in float64: matrices by name


def layer_norm(x, state, name):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(x, state, name, heads, causal):
    """One image, one head, one query after the other"""
    N, D = x.shape
    q, k, v = (x @ part.T for part in state[f"{name}.qkv.weight"].split(D))
    out, E = torch.zeros_like(x), D // heads
    for head in range(heads):
        cols = slice(head * E, head * E + E)
        for i in range(N):
            upto = i + 1 if causal else N
            weight = torch.softmax(q[i, cols] @ k[:upto, cols].T / math.sqrt(E), 0)
            out[i, cols] = weight @ v[:upto, cols]
    return out @ state[f"{name}.proj.weight"].T + state[f"{name}.proj.bias"]


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def image_tokens(x, state, heads):
    for k in range(SMALL.head_blocks):
        at = f"visual_model.head.blocks.{k}"
        y = attention(layer_norm(x, state, f"{at}.norm1"), state, f"{at}.attn", heads, False)
        x = x + state[f"{at}.ls1.gamma"] * y
        z = layer_norm(x, state, f"{at}.norm2")
        gate = linear(z, state, f"{at}.mlp.w1")
        y = linear(gate * torch.sigmoid(gate) * linear(z, state, f"{at}.mlp.w2"), state, f"{at}.mlp.w3")
        x = x + state[f"{at}.ls2.gamma"] * y
    return layer_norm(x, state, "visual_model.head.ln_final")


def text_vector(ids, state):
    at = "text_model.backbone"
    x = state[f"{at}.token_embedding.weight"][ids] + state[f"{at}.positional_embedding"][: len(ids)]
    for k in range(SMALL.depth):
        block = f"{at}.blocks.{k}"
        x = x + attention(layer_norm(x, state, f"{block}.attention_norm"), state, f"{block}.attention", 2, True)
        y = linear(layer_norm(x, state, f"{block}.ffn_norm"), state, f"{block}.feed_forward.fc1")
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + linear(y, state, f"{block}.feed_forward.fc2")
    x = layer_norm(x, state, f"{at}.ln_final")
    return x[ids.tolist().index(max(ids.tolist()))] @ state["text_model.head.linear_projection.weight"].T


def apart(ours, theirs):
    """Largest difference, over the largest deviation from the mean"""
    theirs = theirs.float()
    return ((ours - theirs).abs().max() / (theirs - theirs.mean()).abs().max()).item()


def test_the_reference(tmp_path):
    state, net = invented(), backbone()
    torch.save(state, tmp_path / "towers.pth")
    model = load_dinotxt(tmp_path / "towers.pth", net)
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[38, 3, 7, 39, 0, 0, 0], [38, 5, 39, 39, 39, 1, 2], [38, 9, 2, 4, 6, 8, 39]])
    exact = {name: x.double() for name, x in state.items()}
    with torch.no_grad():
        f = net(images)
        tokens = torch.cat([f.cls[:, None], f.registers, f.patches], 1).double()
        seen = torch.stack([image_tokens(x, exact, VIT.heads) for x in tokens])
        patches = seen[:, 5:]
        assert apart(model.encode_patches(images), patches) < 2e-4                              # 8e-7 measured
        assert apart(model.encode_image(images), torch.cat([seen[:, 0], patches.mean(1)], 1)) < 2e-4  # 5e-7
        words = torch.stack([text_vector(row, exact) for row in ids])
        assert apart(model.encode_text(ids), words) < 2e-4                                      # 5e-7
    assert model.logit_scale.tolist() == [3.0] and not model.training
    changed = ids.clone()
    changed[0, 4:], changed[1, 5:] = 11, 0                           # behind the end nothing matters
    torch.testing.assert_close(model.encode_text(changed), model.encode_text(ids))

# --------------------------------------------------------------------------------
# Sizes and start values


def test_full_size():
    with torch.device("meta"):
        towers = Towers(SIZES["l"], TowerConfig(24, 1280, 77, 49408))
    n = [sum(p.numel() for p in part.parameters()) for part in (towers.text_model, towers.visual_model, towers)]
    assert n == [538_131_200, 25_326_336, 563_457_537] and towers.config.heads == 20
    assert hidden_width(1024) == 2752 and hidden_width(128) == 384


def test_start_values():
    config = TowerConfig(4, 256, 77, 500)
    towers = new_towers(VIT, config)
    text, t = towers.text_model["backbone"], 256
    for x, std in ((text.token_embedding.weight, 0.02), (text.positional_embedding, 0.01),
                   (text.blocks[1].attention.qkv.weight, t ** -0.5), (text.blocks[1].feed_forward.fc1.weight,
                                                                      (2 * t) ** -0.5),
                   (text.blocks[0].attention.proj.weight, (t * 8) ** -0.5),
                   (text.blocks[3].feed_forward.fc2.weight, (t * 8) ** -0.5),
                   (towers.text_model["head"]["linear_projection"].weight, t ** -0.5),
                   (towers.visual_model["head"].blocks[0].mlp.w3.weight, 0.02)):
        assert x.std().item() == pytest.approx(std, rel=0.05)
    assert towers.logit_scale.item() == pytest.approx(2.6593, abs=1e-4)
    assert towers.visual_model["head"].blocks[1].ls1.gamma.tolist() == pytest.approx([1e-5] * 64)
    again, other = new_towers(VIT, config), new_towers(VIT, config, seed=1)
    for (name, a), b, c in zip(towers.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and (torch.equal(a, c) == (len(a.unique()) == 1)), name


def test_drop_path_leaves_the_rest_as_it_is():
    """Of 4 samples 2 enter each branch, twice as strong; which, says the noise"""
    towers = new_towers(VIT, replace(SMALL, head_blocks=1))
    torch.nn.init.constant_(towers.visual_model["head"].blocks[0].ls1.gamma, 1.0)
    f = Features(torch.randn(4, 64), torch.randn(4, 4, 64), torch.randn(4, 6, 64), (2, 3))
    noise = Noise(0, 3, 0, 4, 4, 0.5)
    whole, dropped = towers.see(f), towers.see(f, noise)
    assert torch.equal(dropped.cls, towers.see(f, noise.draw(1, [4], [11])).cls)
    kept = noise.kept(0, 1, 1)[0][0]                                 # of the attention, of the MLP
    same = [torch.equal(a, b) for a, b in zip(whole.patches, dropped.patches, strict=True)]
    assert sum(kept[0]) == 2 and not any(same)
    still = towers.visual_model["head"].ln_final(f.patches)
    assert [torch.allclose(a, b, atol=1e-3) for a, b in zip(dropped.patches, still, strict=True)] == [
        not k for k in kept[0].tolist()]                             # the MLP's gamma is 1e-5


def test_without_blocks_there_is_a_norm():
    towers = new_towers(VIT, replace(SMALL, head_blocks=0))
    f = Features(torch.randn(2, 64), torch.randn(2, 4, 64), torch.randn(2, 6, 64), (2, 3))
    torch.testing.assert_close(towers.see(f).patches, F.layer_norm(f.patches, (64,)))

# --------------------------------------------------------------------------------
# Files


def test_a_file_comes_back(tmp_path):
    towers, net = new_towers(VIT, SMALL), backbone()
    save_towers(tmp_path / "text.safetensors", towers, [("a", "t</w>")], step=3)
    model = load_dinotxt(tmp_path, net)
    assert model.merges == [("a", "t</w>")] and model.towers.config == SMALL
    for (name, a), b in zip(towers.state_dict().items(), model.towers.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [path.name for path in tmp_path.iterdir()] == ["text.safetensors"]
    save_towers(tmp_path / "text.safetensors", towers, None)
    assert load_dinotxt(tmp_path, net).merges is None


def test_a_backbone_within_is_skipped_and_what_is_strange_is_named(tmp_path, capsys):
    more = {"visual_model.backbone.cls_token": torch.zeros(1, 1, 3), "logit_bias": torch.zeros(1)}
    torch.save(invented() | more, tmp_path / "towers.pth")
    load_dinotxt(tmp_path / "towers.pth", backbone())
    assert capsys.readouterr().out == f"{tmp_path}/towers.pth: 1 tensors are not known and not read: logit_bias\n"


@pytest.mark.parametrize("change, says", [
    (dict(logit_scale=None), "logit_scale is missing, wanted .1,.; of 60 tensors 1 do not fit"),
    ({"text_model.backbone.blocks.1.ffn_norm.bias": torch.zeros(3)}, r"blocks.1.ffn_norm.bias is \(3,\), wanted"),
    ({"text_model.backbone.ln_final.bias": torch.full((128,), math.nan)}, "ln_final.bias holds nan or inf"),
    ({"visual_model.head.ln_final.weight": torch.zeros(32)}, "is for a ViT of width 32, the weights are 64 wide; name"),
    ({"text_model.backbone.positional_embedding": None}, "has no text_model.backbone.positional_embedding; wanted the "
                                                         "towers of dino.txt")])
def test_what_does_not_fit_is_refused(change, says, tmp_path):
    state = {name: x for name, x in (invented() | change).items() if x is not None}
    torch.save(state, tmp_path / "towers.pth")
    with pytest.raises(ValueError, match=says):
        load_dinotxt(tmp_path / "towers.pth", backbone())


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="text.safetensors does not exist; name the folder of a run of text.py"):
        load_dinotxt(tmp_path, backbone())

# --------------------------------------------------------------------------------
# Classes in words


def test_classes_are_means_of_unit_vectors():
    model = DinoTxt(backbone(), new_towers(VIT, replace(SMALL, vocabulary=514, context=77)), [])
    names, sentences = [["cat"], ["sky", "wall"]], ["a {}", "{} {}!"]
    vectors, classes = ask(model, names, sentences, slice(64, None))
    assert classes.tolist() == [0, 1, 1] and vectors.shape == (3, 64)
    for vector, name in zip(vectors, ("cat", "sky", "wall"), strict=True):
        each = [F.normalize(model.encode_words([text])[0, 64:], dim=0) for text in (f"a {name}", f"{name} {name}!")]
        torch.testing.assert_close(vector, F.normalize((each[0] + each[1]) / 2, dim=0))


def test_the_best_name_counts():
    scores = torch.tensor([[0.1, 0.5, 0.2], [0.9, 0.0, 0.3]])
    assert torch.equal(best_name(scores, torch.tensor([0, 1, 1]), 2), torch.tensor([[0.1, 0.5], [0.9, 0.3]]))
