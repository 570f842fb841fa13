"""
Backbones to and from files.

    load_backbone   a run's folder, its teacher.safetensors, or a .pth with the same names -> ViT
    save_backbone   ViT -> safetensors that carry the configuration and the normalisation
"""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import SIZES, ViT, ViTConfig, build


def load_backbone(path, size=None):
    """
    The backbone that a file holds, in eval mode, float32, on the CPU.

    path    a run's folder or a .safetensors file that `save_backbone` wrote; a .pth with the released names
    size    a name of SIZES; needed for a .pth alone, which does not say
    raises  ValueError: no such file, not one of ours, or parameters that do not fit, by name
    """
    path = Path(path)
    if path.is_dir():
        path /= "teacher.safetensors"
    if not path.is_file():
        raise ValueError(f"--weights: {path} does not exist; name a run's folder, a .safetensors or a .pth file")
    if size is not None and path.suffix not in (".pth", ".pt"):
        raise ValueError(f"load_backbone: {path} says its own size; leave --size out")
    if size is not None and size not in SIZES:
        raise ValueError(f"load_backbone: unknown size {size!r}; choose one of {', '.join(SIZES)}")
    state, config = read_pth(path, size) if path.suffix in (".pth", ".pt") else read_safetensors(path)
    vit = build(lambda: ViT(config))
    own = vit.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misshapen = [f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
                 for key in own.keys() & state.keys() if state[key].shape != own[key].shape]
    if missing or unexpected or misshapen:
        raise ValueError(f"--weights: {path} does not fit: {len(missing)} missing {missing[:5]}, {len(unexpected)} "
                         f"unexpected {unexpected[:5]}, {len(misshapen)} of another shape {misshapen[:5]}")
    vit.load_state_dict(state)
    return vit.eval()


def read_safetensors(path):
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--weights: {path} cannot be read ({error}); is it cut short?") from error
    if "config" not in metadata:
        raise ValueError(f"--weights: {path} says nothing of its configuration; only files that train.py wrote do")
    try:
        config = json.loads(metadata["config"])
        return state, ViTConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in config.items()})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--weights: {path} has a configuration that this version cannot read: {error}") from error


def read_pth(path, size):
    if size is None:
        raise ValueError(f"--weights: {path} does not say its size; add --size, one of {', '.join(SIZES)}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler says of foreign bytes
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"--weights: {path} is no plain checkpoint: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"--weights: {path} holds no dict of tensors, name to parameter")
    return state, SIZES[size]


def save_backbone(vit, path, metadata=None, state=None):
    """
    Writes path whole or not at all.

    metadata  {str: anything}, kept beside the configuration and the commit: size, step
    state     the state dict to write instead of vit's own: gathered from shards
    """
    path = Path(path)
    state = {key: value.detach().cpu().contiguous() for key, value in (state or vit.state_dict()).items()}
    notes = {key: str(value) for key, value in (metadata or {}).items()}
    new = path.with_suffix(".new")
    save_file(state, new, notes | {"config": json.dumps(asdict(vit.config)), "commit": commit(), "format": "pt"})
    new.replace(path)


def commit():
    """The commit of this code, with a + if it has been changed since; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
