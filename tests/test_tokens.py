"""engine/tokens.py: a backbone's tokens of each image, once; broken images, another run, a full disk."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from engine import tokens
from engine.ranks import Ranks

C = SimpleNamespace(out="", workers=0)


class Source:
    """Five images, of which the third is broken"""

    def __len__(self):
        return 5

    def name(self, i):
        return f"image {i}"

    def captions(self, i):
        return [f"caption {i}"]

    def digest(self):
        return "five"


def view(i):
    if i == 2:
        raise OSError("image 2 is broken")
    return torch.full((3, 4, 4), i, dtype=torch.uint8)


def say(images):
    return images.float()[:, :, :2, 0] + torch.tensor([0.1, 0.2])                              # B 3 2


def kept(folder, see=say, about="weights", dtype=torch.float32):
    c = SimpleNamespace(out=str(folder), workers=0)
    return tokens.keep(c, Ranks(), Source(), view, see, (3, 2), dtype, about)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_stand_where_pixels_did(dtype, tmp_path):
    found = kept(tmp_path, dtype=dtype)
    for i in 0, 1, 3, 4:
        assert torch.equal(found.load(i), say(view(i)[None])[0].to(dtype))
    with pytest.raises(OSError, match="image 2: it could not be read when its tokens were computed"):
        found.load(2)
    assert (len(found), found.name(1), found.captions(4)) == (5, "image 1", ["caption 4"])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [""]


def test_once(tmp_path):
    one = kept(tmp_path)
    again = kept(tmp_path, see=lambda images: 1 / 0)
    assert torch.equal(one.load(3), again.load(3))
    with pytest.raises(ZeroDivisionError):
        kept(tmp_path, see=lambda images: 1 / 0, about="other weights")


def test_ranks_share_the_work(tmp_path):
    """Two ranks, one after the other: each writes every second row"""
    found = tokens.Kept(Source(), tmp_path / "file", (3, 2), torch.float32)
    (tmp_path / "file").write_bytes(bytes(5 * found.size))
    for rank in 0, 1:
        tokens.write_share(C, Ranks(rank, 2), found, tmp_path / "file", view, say)
        assert found.load(3 - 3 * rank)[0, 0].item() == pytest.approx((0.0, 0.1)[rank])        # not yet; whole
    assert found.load(3)[0, 0].item() == pytest.approx(3.1) and found.load(4)[0, 1].item() == pytest.approx(4.2)


def test_a_full_disk_is_said_before_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match="tokens of 5 images take 120 bytes, 10 are free; make room, or take"):
        kept(tmp_path)
    assert not list(tmp_path.iterdir())


def test_tokens_come_apart_again():
    x = torch.arange(2 * 9 * 3).view(2, 9, 3)
    f = tokens.split(x, 2, (2, 3))
    assert torch.equal(torch.cat([f.cls[:, None], f.registers, f.patches], 1), x) and f.registers.shape == (2, 2, 3)
