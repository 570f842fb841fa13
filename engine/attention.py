"""
What one token attends to, recomputed outside of the network, whose fused attention keeps no such thing.

    attention_row    images, block, token -> softmax(q k^T / sqrt(E)) of that query, for each head

    row = attention_row(vit, images, layer=11)          # the class token's, in the last block of a ViT-S
    patches = row[..., 1 + vit.config.n_registers :]    # B A P; .unflatten(-1, grid) makes it maps

Dimension letters: see the top of model.py. `python visualize.py attention` makes pictures of it.
"""

import torch

from model import ViT
from ops import rotate


@torch.no_grad()
def attention_row(vit, images, layer, token=0):
    """
    One row of the attention matrix of block `layer`, 0-based. The block's input comes from running those before it; the
    scores of one query are A N numbers for each image, not A N N, so that it works at any resolution.

    images   B C H W, normalised as in training
    token    the query: 0 is the class token, then R registers, then patches, row-major over the grid
    returns  B A N float32, over the same tokens; rows sum to 1
    raises   ValueError for a network without attention, a block or a token that it does not have

    paper:   Caron et al. 2021 (DINO), Fig. 1 shows the class token's row of the last block
    """
    if not isinstance(vit, ViT):
        raise ValueError(f"attention: these weights are a {type(vit).__name__}, which has none; use pca or similarity")
    if not 0 <= layer < vit.config.depth:
        raise ValueError(f"attention: no block {layer}; this network has blocks 0 to {vit.config.depth - 1}")
    x, packing, _ = vit.embed([images], [None], None)                                          # (B N) D
    [N] = packing.n_tokens
    if not 0 <= token < N:
        raise ValueError(f"attention: no token {token}; these images have tokens 0 to {N - 1}")
    for block, rope, subsets in list(zip(vit.blocks, packing.rope, packing.subsets, strict=True))[:layer]:
        x = block(x, rope, subsets)
    block, [tables] = vit.blocks[layer], packing.rope[layer]
    qkv = block.attn.qkv(block.norm1(x)).view(len(images), N, 3, vit.config.heads, -1)         # B N 3 A E
    q, k = rotate(qkv[:, :, :2], *tables).float().unbind(2)                                    # 2 of B N A E
    scores = torch.einsum("bae,bnae->ban", q[:, token], k) * q.shape[-1] ** -0.5               # B A N
    return scores.softmax(-1)
