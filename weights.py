"""
Backbones to and from files. Every layout that circulates comes in and goes out; no tensor is left unaccounted for.

    python weights.py IN                               what is it? size, normalisation, and a fingerprint to compare
    python weights.py IN OUT --to hf                   meta (.pth), hf (a folder), timm or nano (.safetensors)
    python weights.py IN OUT --to nano --in_chans 4    for images of more channels than RGB
    python weights.py IN OUT.onnx --to onnx            a program: images B C H W float32 -> cls B D, patches B P D
    python weights.py IN OUT.pt2 --to torch --half     the same for torch.export.load; float16 inside

    load_backbone     a run's folder, a file or folder of any layout -> ViT or ConvNeXt
    save_backbone     ViT or ConvNeXt -> a file or folder of any layout
    inflate           RGB weights -> weights for more channels                                     DINOv3 §8.1
    rearranged        weights -> the same for channels in another order
    fingerprint       what a network says of a picture that is a formula

The names are in layouts.py. A released file is never fetched: its licence asks for a request (see GATED).
"""

import json
import pickle
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from convnext import ConvNeXt, ConvNeXtConfig
from engine import config as command_line
from engine import layouts
from engine.layouts import LAYOUTS, STATISTICS, WEB, named, size_of, to_theirs, widen
from engine.ranks import free_memory
from engine.shards import Entry, write_tensors
from model import ViT, ViTConfig

PROGRAMS = {"onnx": ".onnx", "torch": ".pt2"}
SUFFIXES = {"meta": (".pth", ".pt", ".bin"), "timm": (".safetensors",), "nano": (".safetensors",)}  # hf: a folder
FOLDER = ("best.safetensors", "teacher.safetensors", "model.safetensors", "model.safetensors.index.json",
          "pytorch_model.bin")
INSIDE = "teacher", "model_ema", "model", "state_dict"  # of a .pth: dicts that may lie around the tensors
FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64
KINDS = "name a run's folder, a .safetensors or .pth file, or a folder of Hugging Face or timm"
GATED = ("released DINOv3 weights are licence-gated: request them at ai.meta.com/resources/models-and-libraries/"
         "dinov3-downloads or on the model's page at huggingface.co/facebook")


@dataclass(frozen=True)
class WeightsConfig:
    to: str = ""               # layout of OUT: meta, hf, timm, nano; or a program: onnx, torch
    size: str = ""             # s, b, convnext_t, ...: stop if IN is of another
    in_chans: int = 0          # [0, 1024]: channels of the images, beyond IN's three; 0 = as in IN
    half: bool = False         # of a program: float16 inside, between float32 images and features

# --------------------------------------------------------------------------------
# What is in a file


class Stored(NamedTuple):
    shape: tuple
    dtype: str
    read: Callable             # () -> tensor


class File(NamedTuple):
    path: Path
    layout: str                # of LAYOUTS
    config: ViTConfig | ConvNeXtConfig
    stored: dict               # {name without what wraps it: Stored}
    notes: list                # what the user should know


def find(path):
    """The files that hold the tensors: one, or shards."""
    if path.is_dir():
        path = next((path / name for name in FOLDER if (path / name).is_file()), path / FOLDER[1])
    files = [path]
    if path.name.endswith(".index.json") and path.is_file():
        shards = read_json(path).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(
                isinstance(name, str) and Path(name).name == name for name in shards.values()):
            raise ValueError(f"{path} has no weight_map, tensor to file beside it; download it again")
        files = [path.parent / name for name in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            gated = re.search(r"dinov3[_-](vit|convnext)", "/".join(path.parts[-2:]))
            raise ValueError(f"{file} does not exist; {GATED if gated else KINDS}")
        with file.open("rb") as opened:
            text = opened.read(40).lstrip()
        if text and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in text):
            raise ValueError(f"{file} holds no weights but a text that begins {text[:20]}; if a page or a pointer came "
                             "in their place, download it again, with a link that has not expired")
    return files


def read_json(path):
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON object: {error}") from error


def open_safetensors(file, stored):
    try:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():
                part = opened.get_slice(key)
                stored[key] = Stored(tuple(part.get_shape()), part.get_dtype(), partial(read_tensor, file, key))
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}); is it cut short?") from error


def read_tensor(file, key):
    """The file is opened again for each: its map in memory ends with it, so the peak is the network and one tensor."""
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(key).clone()


def open_pth(file, stored):
    """The tensors stay in the file, mapped, until they are touched."""
    try:
        state = torch.load(str(file), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # whatever the unpickler says of foreign bytes
        foreign = isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower()
        reason = "it holds Python objects, which may run code when they are opened" if foreign else \
            f"{str(error).partition('. ')[0]}; is it cut short?"
        raise ValueError(f"{file} is no plain checkpoint: {reason}") from error
    for _ in INSIDE:  # no more often: a dict may lie in itself
        if isinstance(state, dict) and (inner := [state[k] for k in INSIDE if isinstance(state.get(k), dict)]):
            state = inner[0]
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in state.items()):
        raise ValueError(f"{file} holds no dict of tensors, name to parameter, nor one under {', '.join(INSIDE)}")
    for key, x in state.items():
        stored[key] = Stored(tuple(x.shape), str(x.dtype).removeprefix("torch."), lambda x=x: x)
    return {}


def identify(path):
    """What a file or folder holds; layout and configuration are read off the names and shapes of its tensors."""
    path, stored, metadata = Path(path), {}, {}
    files = find(path)
    for file in files:
        metadata |= (open_safetensors if file.suffix == ".safetensors" else open_pth)(file, stored)
    stored = {plain: stored[name] for plain, name in layouts.unwrap(path, stored).items()}
    config, processor = (read_json(files[0].parent / name) for name in ("config.json", "preprocessor_config.json"))
    layout, found = layouts.recognise(path, {key: x.shape for key, x in stored.items()}, metadata | config)
    if layout == "meta" and "config" in metadata:
        return File(path, "nano", layouts.read_config(path, metadata["config"]), stored, [])
    if layout == "hf" and (wrong := layouts.contradictions(found, config)):
        raise ValueError(f"{path}: config.json and the tensors differ, {wrong}: they are not of one network")
    found, notes = layouts.with_statistics(found, path, metadata, config.get("pretrained_cfg", {}), processor)
    return File(path, layout, found, stored, notes)

# --------------------------------------------------------------------------------
# Reading


def load_backbone(path, size=None, dtype=torch.float32):
    """
    The backbone that a file or folder holds, in eval mode, on the CPU. Prints one line if there is something to know.

    path    of any layout, in any float dtype; with wrappers, prefixes, shards, older or newer names
    size    a name of SIZES or CONVNEXT_SIZES to check against: the tensors say it themselves
    dtype   of the parameters; None: as in the file. The periods of RoPE are float32 always
    raises  ValueError: no such file, of no layout, or tensors that are missing, unexpected, misshapen, of no floating
            point or not finite, by name
    """
    model, tensors = stream_backbone(path, size, dtype)
    model.load_state_dict(dict(tensors), assign=True)
    return model.eval()


def stream_backbone(path, size=None, dtype=torch.float32, in_chans=0):
    """
    load_backbone, one tensor at a time: the network without storage, and an iterator over (name, tensor) of all.

    in_chans  of the network, as `inflated` has it; 0 = the file's
    """
    file = identify(path)
    if size is not None and size != (found := size_of(file.config)):
        raise ValueError(f"{path} is {found}, not {size!r}; leave --size out, or name another file")
    model = empty(file.config)
    tensors = tensors_of(file, model, dtype)
    if in_chans in (0, file.config.in_chans):
        return model, tensors
    stem = stem_of(model.state_dict())
    return empty(inflated(file.config, in_chans)), (
        (key, inflated_stem(x, in_chans) if key == stem else x) for key, x in tensors)


def tensors_of(file, model, dtype):
    """(name, tensor) of all that a network without storage has, each read when it is asked for: see load_backbone"""
    own, lacking = model.state_dict(), layouts.account(*file, model)
    norm = gather(file, "norm.weight", own["norm.weight"], dtype)

    def read(key):
        return layouts.initial(model, key, norm.dtype) if key in lacking else gather(file, key, own[key], dtype)
    mended = {key: read(key) for key in own if key.endswith(("periods", "bias_mask", "qkv.bias"))}  # kilobytes
    mend(file, model, mended)
    if file.notes:
        print(f"{file.path}, read as {file.layout}, {size_of(file.config)}: {'; '.join(dict.fromkeys(file.notes))}")
    return ((key, mended[key] if key in mended else read(key)) for key in own)


def empty(config):
    with torch.device("meta"):
        return (ConvNeXt if isinstance(config, ConvNeXtConfig) else ViT)(config)


def gather(file, key, like, dtype):
    """Our tensor, from what the layout keeps of it; a third that it does not keep is zero."""
    parts = [name and sound(file, name) for name in to_theirs(key, like, file.config, file.layout)]
    x = torch.cat([torch.zeros_like(parts[0]) if x == "" else x for x in parts]) if len(parts) > 1 else parts[0]
    return x.reshape(like.shape).to(dtype or x.dtype)


def sound(file, name):
    """A tensor of the file. Raises ValueError for one that a network cannot compute with."""
    x = file.stored[name].read()
    if x.dtype not in FLOATS or x.layout != torch.strided or x.is_meta:
        kind = "without numbers" if x.is_meta else f"{x.dtype}, {x.layout}".replace("torch.", "")
        raise ValueError(f"{file.path}: {name} is {kind}, where dense numbers of floating point belong; "
                         "name a file of weights that were trained, not quantised or packed")
    # the least and the largest say it without a copy: nan is both
    if x.numel() and not name.endswith("bias_mask") and not all(side.isfinite() for side in x.aminmax()):
        raise ValueError(f"{file.path}: {name} holds nan or inf, so that all features would; it comes of a run that "
                         "diverged, or is damaged: take an earlier checkpoint")
    return x


def take(module, file, strange=None):
    """
    Fills a module without storage with the tensors of a file that have its names, float32; returns it, in eval mode.

    strange  what is done with the names that it lacks; None: they are an error
    raises   ValueError: tensors that are missing, misshapen, or not known, by name
    """
    own, shapes = module.state_dict(), {name: x.shape for name, x in file.stored.items()}
    wrong = [name for name in own if shapes.get(name) != tuple(own[name].shape)]
    if wrong:
        raise ValueError(f"{file.path}: {wrong[0]} is {shapes.get(wrong[0], 'missing')}, wanted "
                         f"{tuple(own[wrong[0]].shape)}; of {len(own)} tensors {len(wrong)} do not fit")
    if unknown := [name for name in shapes if name not in own]:
        said = f"{file.path}: {len(unknown)} tensors are not known and not read: {', '.join(unknown[:5])}"
        if strange is None:
            raise ValueError(said.replace(" and not read", ""))
        strange(said)
    module.load_state_dict({name: sound(file, name).float() if x.is_floating_point() else file.stored[name].read()
                            for name, x in own.items()}, assign=True)
    return module.eval()


def mend(file, model, state):
    """In place: periods that were only rounded; bias masks that are not 1, 0, 1 (some are NaN in files, or all 0)."""
    for key in [key for key in state if key in file.stored and key.endswith(("periods", "bias_mask"))]:
        stored, fresh = file.stored[key].read(), layouts.initial(model, key, torch.float32)
        if key.endswith("periods"):
            state[key] = fresh if torch.equal(fresh.to(stored.dtype), stored) else stored.float()
        elif not torch.equal(stored.float(), fresh):
            bias = state[key.removesuffix("_mask")]
            shown = stored.float().nan_to_num(1).masked_fill(fresh == 0, 1)  # the keys' third never has an effect
            state |= {key: fresh.to(bias.dtype), key.removesuffix("_mask"): (bias * shown).to(bias.dtype)}
            file.notes.append("bias_mask was not 1, 0, 1: now it is, and biases that it hid are 0")

# --------------------------------------------------------------------------------
# Writing


def save_backbone(model, path, layout="meta", metadata=None, state=None):
    """
    Writes path whole or not at all, in the parameters' dtype. Prints one line for what the layout has no place for.

    layout    "meta": .pth; "hf": a folder for transformers; "timm": .safetensors, for its `_qkvb` models if a bias is
              not zero; "nano": .safetensors that carries configuration, normalisation, commit
    metadata  {str: anything}, kept by "nano" alone: size, step
    state     the state dict to write instead of the model's own: gathered from shards
    """
    path, config = Path(path), model.config
    if layout not in LAYOUTS or path.suffix not in SUFFIXES.get(layout, [path.suffix]):
        choice = ", ".join(f"{name} ({' '.join(SUFFIXES.get(name, ['a folder']))})" for name in LAYOUTS)
        raise ValueError(f"save_backbone: {path} in layout {layout!r}; choose one of {choice}")
    if layout == "hf" and path.exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"save_backbone: {path} is there already; name a new folder")
    if layout != "nano" and (getattr(config, "key_bias", False) or getattr(config, "norm_eps", 1e-5) != 1e-5):
        raise ValueError(f"save_backbone: {layout} cannot say that keys have a bias, or that LayerNorm's eps is not "
                         "1e-5: read back, it would be another function; write nano")
    out, lost = layouts.lay_out(model, state or model.state_dict(), layout)
    mean, std = (widen(values, config.in_chans) for values in named(path) or WEB)
    if layout == "meta" and (config.mean, config.std) != (mean, std):
        lost.append(f"normalisation, mean {config.mean}, std {config.std}")
    if lost:
        print(f"{path}: {layout} has no place for {len(lost)} things: {'; '.join(lost[:5])}")
    new = path.with_name(path.name + ".new")
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {name: Entry(tuple(x.shape), x.dtype, partial(iter, [x])) for name, x in out.items()}
    if layout == "meta":
        torch.save(out, new)
    elif layout == "nano":
        notes = {key: str(value) for key, value in (metadata or {}).items()}
        write_tensors(new, entries, notes | {"config": json.dumps(asdict(config)), "commit": commit(), "format": "pt"})
    elif layout == "timm":
        notes = dict(heads=getattr(config, "heads", 0), mean=config.mean, std=config.std)
        write_tensors(new, entries, {key: json.dumps(value) for key, value in notes.items()} | {"format": "pt"})
    else:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        dtype = str(next(iter(out.values())).dtype).removeprefix("torch.")
        (new / "config.json").write_text(json.dumps(layouts.hf_config(config) | dict(torch_dtype=dtype), indent=2))
        (new / "preprocessor_config.json").write_text(json.dumps(layouts.hf_processor(config), indent=2))
        write_tensors(new / "model.safetensors", entries, {"format": "pt"})
    new.replace(path)


def commit():
    """The commit of this code, with a + if it has been changed since; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

# --------------------------------------------------------------------------------
# More channels, and the command


def inflate(model, in_chans):
    """
    The network for images of more channels: RGB first, then the new ones. It shares all other parameters with model.

    paper:  DINOv3 §8.1: the patch-embedding weight of a new channel is the mean of the three RGB ones; the paper says
            nothing of its mean and std: the mean of the three here too
    """
    wide, state = empty(inflated(model.config, in_chans)), model.state_dict()
    stem = stem_of(state)
    state[stem] = inflated_stem(state[stem], in_chans)
    wide.load_state_dict(state, assign=True)
    return wide.train(model.training)


def inflated(config, in_chans):
    """The configuration for images of more channels. Raises ValueError if it is for other images than RGB."""
    if config.in_chans != 3 or in_chans <= 3:
        raise ValueError(f"inflate: from {config.in_chans} to {in_chans} channels; it goes from 3 to more")
    return replace(config, in_chans=in_chans, mean=widen(config.mean, in_chans), std=widen(config.std, in_chans))


def stem_of(state):
    """The name of the patch embedding, or of a ConvNeXt's stem."""
    return next(key for key, x in state.items() if x.ndim == 4)


def inflated_stem(weight, in_chans):
    """D 3 p p -> D in_chans p p"""
    mean = weight.float().mean(1, keepdim=True).to(weight.dtype)
    return torch.cat([weight, *[mean] * (in_chans - 3)], dim=1)


def rearranged(model, channels):
    """The same network, of images whose channel k is what channels[k] was, from 0. It shares all other parameters."""
    state, (mean, std) = model.state_dict(), ([values[k] for k in channels] for values in (
        model.config.mean, model.config.std))
    other, stem = empty(replace(model.config, mean=tuple(mean), std=tuple(std))), stem_of(state)
    state[stem] = state[stem][:, channels]                                                     # D C p p
    other.load_state_dict(state, assign=True)
    return other.train(model.training)


@torch.no_grad()
def fingerprint(model):
    """Eight values of cls and eight of the patches, evenly spaced, for a picture of triangle waves, 224 pixels wide."""
    c = model.config
    i, k = torch.arange(224 // c.patch_size * c.patch_size), torch.arange(c.in_chans)[:, None, None]
    picture = ((3 * i[:, None] + 5 * i + (i[:, None] * i) // 64 + 40 * k) % 256 - 128).abs() / 128  # C H W
    mean, std = (torch.tensor(values)[:, None, None] for values in (c.mean, c.std))
    out = model(((picture - mean) / std)[None])
    at = torch.arange(8)
    return out.cls[0, at * c.width // 8], out.patches[0, at * out.patches.shape[1] // 8, at * c.width // 8]


def show(model, path):
    file, mean, std = identify(path), model.config.mean, model.config.std
    name = next((name for name, pair in STATISTICS.items() if pair == (mean, std)), "its own")
    cls, patches = (" ".join(f"{x:.4f}" for x in values) for values in fingerprint(model))
    rows = dict(layout=file.layout, size=size_of(model.config), normalisation=f"{name}: mean {mean}, std {std}",
                parameters=f"{sum(p.numel() for p in model.parameters()):,}", cls=cls, patches=patches,
                dtype=", ".join(sorted({x.dtype for x in file.stored.values()})))
    print("\n".join(f"{name:14} {value}" for name, value in rows.items()))


def convert(model, target, layout):
    save_backbone(model, target, layout)
    a, b = model.state_dict(), load_backbone(target, dtype=None).state_dict()
    same = {key for key in a.keys() & b.keys() if torch.equal(a[key], b[key])}
    other = sorted((a.keys() | b.keys()) - same)
    print(f"{target}: read back, {len(same)} tensors are the same bit for bit, {len(other)} are not {other[:5]}")


def export(source, target, c):
    """A program of the network, which has been compared with it when this returns"""
    from engine import export as programs  # here, as torch.export takes a second to import

    dtype = torch.float16 if c.half else torch.float32
    skeleton, tensors = stream_backbone(source, c.size or None, torch.float32, c.in_chans)
    need, there = 4 * 3 * sum(x.numel() for x in skeleton.state_dict().values()), free_memory()

    def network():
        model = load_backbone(source)
        return inflate(model, c.in_chans) if c.in_chans else model
    if c.to == "torch":
        worst = programs.write_torch(target, network(), dtype)
    else:
        worst = programs.write_onnx(target, skeleton, tensors, dtype, network if need < there else None)
    said = (f"differs from the network by {worst:.2g} at most, at {len(programs.GRIDS)} sizes and "
            f"{len(programs.BATCHES)} batches" if worst is not None else
            f"not compared: that takes {need / 1e9:.3g} GB of memory, and {there / 1e9:.3g} are free")
    print(f"{target}: {size_of(skeleton.config)}, {said}")


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip(), command_line.describe(WeightsConfig()), sep="\n\n")
        return
    values, words = command_line.read_words(argv, command_line.types(WeightsConfig()))
    c = command_line.apply(WeightsConfig(), values)
    if len(words) != 1 + bool(c.to) or c.to not in ("", *LAYOUTS, *PROGRAMS):
        raise ValueError(f"{len(words)} names and --to {c.to!r}; write IN alone, or IN OUT --to "
                         f"{'|'.join([*LAYOUTS, *PROGRAMS])}")
    if c.to:
        command_line.writable(words[1], folder=c.to == "hf", option="OUT")
    if c.half and c.to not in PROGRAMS:
        raise ValueError(f"--half: of a program; write --to {' or '.join(PROGRAMS)}")
    if c.to in PROGRAMS:
        if Path(words[1]).suffix != PROGRAMS[c.to]:
            raise ValueError(f"{words[1]}: name a file that ends in {PROGRAMS[c.to]}")
        return export(*words, c)
    model = load_backbone(words[0], c.size or None, None if c.to else torch.float32)
    model = inflate(model, c.in_chans) if c.in_chans else model
    convert(model, words[1], c.to) if c.to else show(model, words[0])


if __name__ == "__main__":
    command_line.run(main)
