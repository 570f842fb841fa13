"""
The backbone in a file of vggt-omega (2026): a ViT-L/16 of this family, 16 registers, coordinates of the longer side.

    load_embedding   path -> LongestSide
"""

from pathlib import Path

import torch

from engine.layouts import vit_config
from model import ViT, rope_tables
from weights import File, open_pth, open_safetensors, tensors_of


class LongestSide(ViT):
    """A ViT whose RoPE divides both coordinates by the longer side of the grid: as the corner of a square"""
    def embed(self, images, masks, noise):
        x, packing, grids = super().embed(images, masks, noise)
        prefix, tables = torch.arange(1 + self.config.n_registers), []
        for h, w in grids:
            side = max(h, w)
            inside = torch.arange(side**2).view(side, side)[:h, :w].flatten()
            rows = torch.cat([prefix, len(prefix) + inside]).to(x.device)
            tables.append([x[0, rows] for x in rope_tables(side, side, len(prefix), self.rope_embed.periods, None)])
        packing.rope = [tables] * self.config.depth
        return x, packing, grids


def load_embedding(path):
    """
    path     a file of vggt-omega, .pth or .safetensors: somewhere in it is a ViT of this family, in Meta's names
    returns  LongestSide, in eval mode, float32;  raises ValueError if there is none, or what load_backbone says of it

    Its own is a ViT-L/16 with 16 registers. Never run on that file
    """
    stored = {}
    (open_safetensors if Path(path).suffix == ".safetensors" else open_pth)(Path(path), stored)
    marks = [name for name in stored if name.endswith("storage_tokens")]
    if len(marks) != 1:
        raise ValueError(f"{path} holds {len(marks)} backbones, by their storage_tokens; wanted one")
    prefix = marks[0].removesuffix("storage_tokens")
    own = {name.removeprefix(prefix): x for name, x in stored.items() if name.startswith(prefix)}
    file = File(Path(path), "meta", vit_config({name: x.shape for name, x in own.items()}, {}), own, [])
    with torch.device("meta"):
        net = LongestSide(file.config)
    net.load_state_dict(dict(tensors_of(file, net, torch.float32)), assign=True)
    return net.eval()
