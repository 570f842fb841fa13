"""Recipes by name, field by field, and the networks that they name."""

import json
from dataclasses import asdict, replace

import pytest
import torch

import recipes
import train
from model import SIZES, ViT, ViTConfig, build
from weights import load_backbone, save_backbone

RELEASED = dict(  # ViT-L on ImageNet-1k, as the released code trains it
    size="l", recipe="released", steps=125_000, batch=2048, group=64, koleo_group=64, drop_path=0.3,
    n_registers=0, key_bias=True, norm_eps=1e-6, rope_rescale=1.0, patch_size=16, depth=24,
    global_size=224, local_size=96, n_local=8, global_scale=(0.32, 1.0), local_scale=(0.05, 0.32), ratio=(3 / 4, 4 / 3),
    flip=0.5, turns=False, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grey=0.2,
    blur_global_1=0.0, blur_global_2=0.9, blur_local=0.5, blur_sigma=(0.1, 2.0), solarize=0.2, mask_share=0.5,
    mask_ratio=(0.1, 0.5),
    dino_hidden=2048, dino_bottleneck=256, dino_prototypes=65_536, ibot_hidden=2048, ibot_bottleneck=256,
    ibot_prototypes=65_536, prototype_std=0.02, lr=1e-3, lr_warmup=12_500, weight_decay=0.04, weight_decay_end=0.4,
    momentum=0.992, momentum_end=1.0, teacher_temp_start=0.04, teacher_temp=0.07, teacher_temp_warmup=37_500,
    student_temp=0.1, beta1=0.9, beta2=0.999, clip=3.0, layer_decay=0.9, patch_embed_lr=0.2, freeze_last_layer=1250,
    backbone_lr=1.0, freeze_backbone=0, local_weight=1.0, ibot_weight=1.0, koleo_weight=0.1, save_every=3750,
    keep=3, keep_every=0, sinkhorn_iterations=3, moments="fp32")
OWN = {"lr_end", "out", "data", "init", "resume", "stage", "n_shapes", "seed", "device", "kernels", "precision",
       "workers", "log_every", "log", "profile", "stop_after", "checkpointing", "in_chans", "mean", "std",
       "bands", "scale", "percentiles", "nodata", "max_pixels", "data_changed",
       "accumulate", "replicas", "compile", "order",  # of the run; lr_end is below; and of stages:
       "start", "began", "gram_teacher", "gram_size", "gram_weight", "gram_warmup", "gram_refresh", "gram_refreshes",
       "local_weight_start", "cosine_warmup", "resolutions"}


def test_released_vit_l_field_by_field(tmp_path):
    c = recipes.configure(["--size", "l", "--recipe", "released", "--out", str(tmp_path)])
    assert {name: value for name, value in asdict(c).items() if name not in OWN} == RELEASED
    lr = train.schedule(0, c.lr, c.lr_end, c.lr_warmup, c.steps) * c.lr_factor
    assert lr.max() == pytest.approx(1e-3 * 4 * 2 ** 0.5) and lr[-1] == pytest.approx(1e-6)  # its end is not scaled
    with torch.device("meta"):
        released, own = (ViT(each) for each in (c.vit, SIZES["l"]))
    assert not [name for name in released.state_dict() if name.endswith("bias_mask")]
    assert {part.eps for part in released.modules() if isinstance(part, torch.nn.LayerNorm)} == {1e-6}
    assert sum(p.numel() for p in own.parameters()) - sum(p.numel() for p in released.parameters()) == 4 * 1024


def test_its_run_keeps_the_network(tmp_path):
    """registers, eps and the keys' bias are in what it saves, and a run that starts from that has them too"""
    words = """--depth 1 --batch 2 --n_shapes 4 --n_local 1 --global_size 32 --local_size 16 --steps 1 --workers 0
               --device cpu --dino_hidden 32 --dino_prototypes 32 --ibot_hidden 32 --ibot_prototypes 32""".split()
    out = tmp_path / "run"
    train.main(["--size", "l", "--recipe", "released", *words, "--out", str(out)])
    config = load_backbone(out).config
    assert config == replace(SIZES["l"], depth=1, n_registers=0, key_bias=True, norm_eps=1e-6)
    assert json.loads((out / "config.json").read_text())["recipe"] == "released"
    c = recipes.configure(["--init", str(out), "--out", str(tmp_path / "next")])
    assert c.vit == config and c.recipe == ""
    train.main(["--out", str(out), "--resume", "--steps", "2"])


@pytest.mark.parametrize("words", [["--size", "s", "--recipe", "released"], ["--size", "l", "--recipe", "relaesed"]])
def test_a_recipe_that_is_not_there(words, tmp_path):
    with pytest.raises(ValueError, match="has no recipe '.*'; leave it out, or write --size l --recipe released"):
        recipes.configure([*words, "--out", str(tmp_path)])


@torch.no_grad()
def test_a_bias_of_the_keys_is_seen_where_tokens_turn():
    """softmax would not see it if RoPE did not turn it with each patch: masked or not, these are two functions"""
    config, images = ViTConfig(1, 32, 2, 48, patch_size=4, layerscale=1.0, init_std=0.2), torch.randn(2, 3, 8, 8)
    masked, open_ = (build(lambda own=own: ViT(replace(config, key_bias=own))) for own in (False, True))
    for vit in masked, open_:
        vit.blocks[0].attn.qkv.bias.fill_(2)
    assert (masked(images).patches - open_(images).patches).abs().max() > 1e-3


@pytest.mark.parametrize("own", [dict(key_bias=True), dict(norm_eps=1e-6)])
@pytest.mark.parametrize("layout, name", [("meta", "x.pth"), ("hf", "x"), ("timm", "x.safetensors")])
def test_layouts_that_cannot_say_it_refuse(tmp_path, layout, name, own):
    vit = ViT(ViTConfig(1, 32, 2, 48, patch_size=4, **own))
    with pytest.raises(ValueError, match=f"{layout} cannot say .*; write nano"):
        save_backbone(vit, tmp_path / name, layout)
    assert not list(tmp_path.iterdir())
    save_backbone(vit, tmp_path / "nano.safetensors", "nano")
    assert load_backbone(tmp_path / "nano.safetensors").config == vit.config


@pytest.mark.parametrize("n_images, batch, K", [
    (4096, 32, 256), (1_281_167, 2048, 65_536),           # tiny; ImageNet-1k
    (20, 128, 256), (50_000, 128, 2048), (10**6, 128, 8192), (10**6, 64, 4096), (10**9, 10**5, 65_536),
])
def test_prototypes_by_the_number_of_images(n_images, batch, K):
    assert recipes.suited_prototypes(n_images, batch) == K
    assert (recipes.RECIPES["tiny"].dino_prototypes, recipes.RECIPES["l"].dino_prototypes) == (256, 65_536)


def test_photos_is_for_one_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipes, "open_source", lambda *args: range(50_000))
    words = ["--recipe", "photos", "--out", str(tmp_path)]
    c = recipes.configure(words)
    b = recipes.configure([*words, "--size", "b", "--ibot_prototypes", "512", "--steps", "50"])
    assert (c.size, c.recipe, c.batch, c.dino_prototypes, c.ibot_prototypes) == ("s", "photos", 128, 2048, 2048)
    assert (b.size, b.batch, b.dino_prototypes, b.ibot_prototypes, b.lr_warmup) == ("b", 64, 2048, 512, 5)
    assert recipes.configure(["--recipe", "released", "--out", str(tmp_path)]).size == "l"
    for named in (each for (_, name), each in recipes.NAMED.items() if name == "photos"):
        shares = [getattr(named, name) / named.steps for name in recipes.WARMUPS]
        assert shares == [getattr(recipes.IMAGENET, name) / recipes.IMAGENET.steps for name in recipes.WARMUPS]
    train.main(["--help", "--recipe", "photos"])
    assert "--batch              128 " in capsys.readouterr().out


def test_satellite_is_there_for_every_size(tmp_path):
    """The paper's lengths, the web's warm-ups in proportion, its weights' statistics; tiny keeps its own length"""
    for size, own in recipes.RECIPES.items():
        c = recipes.configure(["--recipe", "satellite", "--size", size, "--out", str(tmp_path)])
        assert (c.mean, c.std, c.flip, c.turns) == ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143), 0.5, True)
        assert c.steps == (own.steps if size == "tiny" else 100_000)
        for name in recipes.WARMUPS:
            assert getattr(c, name) == round(getattr(own, name) * c.steps / own.steps)
        same = {name for name in vars(c) if name not in (*OWN, *recipes.WARMUPS)} - {
            "recipe", "steps", "flip", "turns", "patch_size", "depth"}
        assert all(getattr(c, name) == getattr(own, name) for name in same) and len(same) > 40
    assert recipes.configure(["--recipe", "satellite", "--out", str(tmp_path)]).size == "tiny"
    c = recipes.configure(["--recipe", "satellite", "--in_chans", "4", "--out", str(tmp_path)])
    assert c.mean == pytest.approx((0.430, 0.411, 0.296, 0.379)) and len(c.std) == 4


@pytest.mark.parametrize("size, lengths", [("7b", (10_000, 8000, 2667)), ("l", (10_000, 8000, 2667)),
                                           ("tiny", (600, 150, 50))])
def test_what_follows_a_satellite_run(size, lengths, tmp_path):
    """10k steps of Gram anchoring, 8k at 512 pixels; turned as before; of tiny, and of the web's, what it was"""
    words = ["--size", size, "--recipe", "satellite", "--out", str(tmp_path)]
    gram, high = (recipes.configure([*words, "--stage", stage], starts=False) for stage in ("gram", "highres"))
    assert (gram.steps, high.steps, high.lr_warmup) == lengths and gram.turns and high.turns
    web = recipes.STAGES[size, "highres"]["resolutions"]
    assert high.resolutions == (web if size == "tiny" else "512x112x768*1") and gram.mean == high.mean == c_mean(size)
    plain = recipes.configure([*words[:2], "--stage", "highres", "--out", str(tmp_path)], starts=False)
    assert plain.resolutions == web and not plain.turns


def c_mean(size):
    return recipes.NAMED[size, "satellite"].mean
