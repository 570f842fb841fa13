"""tasks/canopy.py: blocks and R2 by hand, the loss in a loop, heads that are trained, kept, released."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_labels import photo, write

import evaluate
from decoders import dpt, load_decoder
from decoders.depth import mean_of_bins, mixed
from engine.features import load
from engine.images import resize
from tasks import canopy


def run(*words):
    words = " ".join(map(str, ("--task canopy --device cpu --workers 0", *words)))
    return evaluate.evaluate(evaluate.configure(words.split()))


def test_blocks_are_the_means_of_fifty_pixels_once_three_are_cut():
    heights = torch.rand(256, 160, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = torch.rand(256, 160, generator=torch.Generator().manual_seed(1)) > 0.3
    known[3:53, 53:103] = False
    found = canopy.blocks(heights, known)
    assert len(found) == 5 * 3
    for k, value in enumerate(found.tolist()):
        top, left = 3 + 50 * (k // 3), 3 + 50 * (k % 3)
        values = [heights[y, x].item() for y in range(top, top + 50) for x in range(left, left + 50) if known[y, x]]
        assert (value != value) == (not values) == (k == 1)
        assert not values or value == pytest.approx(sum(values) / len(values))


def test_r2():
    truth, found = torch.tensor([1.0, 2, 3, 6]), torch.tensor([1.0, 3, 3, 4])
    assert canopy.r2(found, truth)["block_r2"] == pytest.approx(1 - 5 / 14)
    assert canopy.r2(found, torch.ones(4)) == {} and canopy.r2(truth, truth) == dict(block_r2=1)


def test_the_loss_is_the_mean_error_of_what_is_known():
    out = torch.randn(2, 256, 3, 4)
    truths = [torch.full((6, 8), 5.0), torch.full((6, 8), torch.nan)]
    truths[0][2:, 3] = torch.nan
    metres = F.interpolate(mean_of_bins(out[:1], mixed(0.001, 96, 256), 1e-8)[None], (6, 8), mode="bilinear")[0, 0]
    errors = [abs(metres[y, x].item() - 5) for y in range(6) for x in range(8) if x != 3 or y < 2]
    assert canopy.mean_error(out, truths).item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    for nothing_known in out.requires_grad_(), list(out):
        loss = canopy.mean_error(nothing_known, [truths[1]] * 2)
        assert loss == 0 and loss.requires_grad  # a step of it changes nothing, and is no error


@pytest.mark.parametrize("mean", [7.5, 30.0])
def test_a_head_begins_with_the_mean_height(mean):
    """For every pixel, with a share left for every bin: none of them is dead"""
    torch.manual_seed(0)
    shares = canopy.shares_of(mean, 256)
    assert (shares @ mixed(0.001, 96, 256) / shares.sum()).item() == pytest.approx(mean, rel=1e-3)
    assert (shares > 0).all() and (shares.diff() < 0).all()
    vit, head = load("untrained:tiny"), canopy.begun(128, mean)
    with torch.no_grad():
        found = canopy.decode(head(vit.layers(torch.randn(1, 3, 64, 96), [0, 2, 3, 5])))
    assert found.shape == (1, 64, 96) and (found / mean - 1).abs().max() < 0.03              # measured: 0.007


@pytest.fixture
def land(tmp_path):
    for split in "train", "test":
        for i in range(2):
            write(tmp_path / f"{split}/rgb_{i}.png", photo(i, (112, 112)))
            truth = np.linspace(0, 20, 112, dtype=np.float32)[None].repeat(112, 0)
            truth[:5] = np.nan
            write(tmp_path / f"{split}/height_{i}.tif", truth)
    return tmp_path


def test_a_head_is_trained_kept_and_read(land):
    words = "--weights untrained:tiny --resolution 64 --data", land
    trained = run(*words, "--iterations 2 --out", land / "out")
    assert trained["n_blocks"] == 2 * 4 and trained["n_train"] == 2 and "mean_height" not in trained
    assert trained["lr"] == 3e-4  # that of its form
    assert trained["chance_mae"] == pytest.approx(5.045, abs=0.01) and (land / "out/canopy.png").is_file()
    again = run(*words, "--head", land / "out/head.safetensors")
    assert (again["mae"], again["block_r2"]) == (trained["mae"], trained["block_r2"])
    decoder = load_decoder(land / "out/head.safetensors", load("untrained:tiny"))
    assert decoder.heights and decoder.bins[-1] == 96
    with pytest.raises(ValueError, match="has metric 'mae', this command 'rmse'"):
        evaluate.main(["--task", "depth", "--decoder", "dpt", "--weights", "untrained:tiny", "--head",
                       str(land / "out/head.safetensors")])


@pytest.mark.parametrize("weights", ["untrained:tiny", "pixels"])
def test_a_linear_head_is_trained_kept_and_read(weights, land):
    """Of stored patches, pixels' too; its heights worked out again: a bin's share is its logit, if that is above 0"""
    words = "--weights", weights, "--decoder linear --resolution 64 --data", land
    trained = run(*words, "--iterations 3 --out", land / "out")
    assert (trained["n_blocks"], trained["n_train"], trained["iterations"]) == (8, 2, 3)
    assert trained["chance_mae"] == pytest.approx(5.045, abs=0.01) and trained["mae"] != trained["chance_mae"]
    head = land / "out/head.safetensors"
    again = run(*words, "--head", head)
    assert (again["mae"], again["block_r2"]) == (trained["mae"], trained["block_r2"])
    net, stored, errors = load(weights), load_file(head), []
    mean, std = (torch.tensor(v)[:, None, None] for v in (net.config.mean, net.config.std))
    norm = [stored[f"norm.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    for i in range(2):
        view = (resize(torch.from_numpy(photo(i, (112, 112))).permute(2, 0, 1), 64, 64) / 255 - mean) / std
        with torch.no_grad():
            x = net(view[None]).patches[0]                                                         # P D
        x = (x - norm[0]) / (norm[1] + 1e-5).sqrt() * norm[2] + norm[3]
        shares = (x @ stored["linear.weight"].T + stored["linear.bias"]).relu() + 1e-8             # P 256
        metres = ((shares @ mixed(0.001, 96, 256)) / shares.sum(1)).view(1, 1, 4, 4)
        found = F.interpolate(metres, (112, 112), mode="bilinear")[0, 0]
        errors.append((found - torch.linspace(0, 20, 112))[5:].abs().mean().item())
        if weights != "pixels":
            decoder = load_decoder(head, net)
            assert decoder.heights and torch.allclose(decoder(view[None]), metres[0], rtol=1e-4)
    assert trained["mae"] == pytest.approx(np.mean(errors), rel=2e-3)  # features are kept as float16


@pytest.mark.parametrize("canopies", [True, False])
def test_a_released_head(canopies, land):
    torch.manual_seed(0)
    head = dpt.DPT(dpt.DPTConfig(128, (8,) * 4, 8, hidden=8, class_token=canopies))
    torch.save(head.state_dict(), land / "x.pth")
    words = "--weights untrained:tiny --resolution 64 --data", land, "--head", land / "x.pth"
    if not canopies:
        with pytest.raises(ValueError, match="x.pth answers with no heights; name a head of canopies"):
            run(*words)
        return
    found = run(*words)
    vit, errors = load("untrained:tiny"), []
    mean, std = (torch.tensor(v)[:, None, None] for v in (vit.config.mean, vit.config.std))
    for i in range(2):
        view = resize(torch.from_numpy(photo(i, (112, 112))).permute(2, 0, 1), 64, 64)
        metres = load_decoder(land / "x.pth", vit)(((view / 255 - mean) / std)[None])
        metres = F.interpolate(metres[None], (112, 112), mode="bilinear")[0, 0]
        errors.append((metres - torch.linspace(0, 20, 112))[5:].abs().mean().item())
    assert found["mae"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert found["chance_mae"] == pytest.approx(10, abs=0.01)  # of no trees at all: what it was trained on is not known


def test_pixels_and_what_is_planned(capsys):
    with pytest.raises(ValueError, match="no class token is as wide as a patch; name --decoder linear"):
        run("--weights pixels --limit 2 --resolution 64")
    with pytest.raises(ValueError, match="--plan: linear learns from features on disk"):
        evaluate.main("--task canopy --weights untrained:l --data land --plan --memory 80 --decoder linear".split())
    evaluate.main("--task canopy --weights untrained:l --data land --plan --memory 80".split())
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["outputs_bytes"] == 4 * 4 * 16 * 256 * 512 * 512 and said["room_bytes"] == 80e9
