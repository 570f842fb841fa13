"""
For torch.hub; nothing is fetched. The weights are a file or folder of any layout that weights.py reads:

    vit = torch.hub.load("path/to/nanodino", "vits16", source="local", weights="dinov3_vits16_pretrain_lvd1689m.pth")

Without weights the network is untrained, and a line says so. A decoder on its backbone, released or trained here,
takes images and gives answers:

    depth = torch.hub.load("path/to/nanodino", "decoder", source="local", weights="runs/s",
                           head="heads/head.safetensors")
"""

from functools import partial as _partial  # torch.hub lists every name without an underscore

dependencies = ["torch", "safetensors"]


def _load(size, weights=None):
    """A backbone in eval mode, float32.    weights  a file or folder; one of another size is an error"""
    from convnext import CONVNEXT_SIZES, ConvNeXt  # here, as importing this file should cost nothing
    from model import SIZES, ViT
    from weights import load_backbone
    if weights is not None:
        return load_backbone(weights, size)
    print(f"{size}: untrained; name a weights file, weights=PATH, for a trained network")
    return ViT(SIZES[size]).eval() if size in SIZES else ConvNeXt(CONVNEXT_SIZES[size]).eval()


def decoder(weights, head, **options):
    """See decoders.load_decoder.    weights  of the backbone    head  the decoder's file"""
    from decoders import load_decoder
    from weights import load_backbone
    return load_decoder(head, load_backbone(weights), **options)


vits16 = _partial(_load, "s")
vits16plus = _partial(_load, "s+")
vitb16 = _partial(_load, "b")
vitl16 = _partial(_load, "l")
vitl16plus = _partial(_load, "l+")
vith16plus = _partial(_load, "h+")
vit7b16 = _partial(_load, "7b")
convnext_tiny = _partial(_load, "convnext_t")
convnext_small = _partial(_load, "convnext_s")
convnext_base = _partial(_load, "convnext_b")
convnext_large = _partial(_load, "convnext_l")
