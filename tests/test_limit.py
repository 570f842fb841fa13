"""engine/limit.py: the products that are replayed are those of the network, counted by hand, and nothing else."""

import json

import pytest
import torch

import bench
import ops
from engine import limit
from model import ViT, ViTConfig

B, D, A, H, DEPTH = 2, 64, 2, 96, 3


def operations(calls):
    """Multiplications and additions of matrix products."""
    total = 0
    for function, args, _ in calls:
        name = function._schema.name
        if name == "aten::convolution":
            x, weight = args[:2]
            total += 2 * x.numel() * len(weight)                            # patches do not overlap
        else:
            a, b = args[-2:] if name == "aten::addmm" else args[:2]
            total += 2 * a.numel() * b.shape[-1]
    return total


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_products_of_a_forward_pass(choice):
    vit = ViT(ViTConfig(DEPTH, D, A, H)).eval()
    images, T = torch.randn(B, 3, 32, 48), B * (1 + 4 + 6)
    products = limit.Products(vit.parameters())
    ops.use_kernels(choice)
    with torch.no_grad(), products:
        vit(images)
    ops.use_kernels("auto")
    assert operations(products.linear_calls) == 2 * images.numel() * D + DEPTH * 2 * T * D * (4 * D + 2 * H)
    assert [call[1][0].shape for call in products.attention_calls] == [(B, A, T // B, D // A)] * DEPTH
    own = {p.data_ptr() for p in vit.parameters()}
    assert all(any(isinstance(x, torch.Tensor) and x.data_ptr() in own for x in args)
               for _, args, _ in products.linear_calls)                     # each weight in its own place
    products()


def test_products_of_a_backward_pass():
    vit = ViT(ViTConfig(DEPTH, D, A, H))
    products = limit.Products(vit.parameters())
    with products:
        vit(torch.randn(B, 3, 32, 32)).cls.sum().backward()
    names = [function._schema.name for function, *_ in products.linear_calls]
    T = B * (1 + 4 + 4)
    linears = [call for call in products.linear_calls if "convolution" not in call[0]._schema.name]
    assert operations(linears) == 3 * DEPTH * 2 * T * D * (4 * D + 2 * H)   # forward, and both gradients
    assert names.count("aten::convolution") == names.count("aten::convolution_backward") == 1
    assert len(products.attention_calls) == 2 * DEPTH
    before = [p.detach().clone() for p in vit.parameters()]
    products()
    assert all(map(torch.equal, before, vit.parameters()))


def test_parts_add_up():
    a, b = torch.randn(300, 300), torch.randn(300, 300)
    rows = limit.parts(lambda: (a @ b).erf())
    assert sum(share for _, _, share, _ in rows) == pytest.approx(1)
    kinds = {name: kind for name, _, _, kind in rows}
    assert kinds["linear products"] == "linear" and kinds["aten::erf"] == "rest"
    assert all(seconds >= 0 for _, seconds, *_ in rows)


def test_the_table_is_made_in_one_call(tmp_path):
    bench.main(["limit", "--dry", "--json", str(tmp_path / "limit.json")])
    tables = json.loads((tmp_path / "limit.json").read_text())["tables"]
    found = {row["what"]: {} for row in tables["limit"]}
    for row in tables["limit"]:
        found[row["what"]][row["way"]] = row["over_products"]
    assert [*found] == [*(f"forward {name}" for name in limit.FORWARDS), "training step tiny"]
    assert all(ways["products alone"] == 1 and ways["ours"] > 1 for ways in found.values())
    assert {row["what"] for row in tables["parts"]} == set(found)
