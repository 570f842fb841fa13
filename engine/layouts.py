"""
What the layouts of weight files call each tensor, and what names and shapes tell of a network. No file is touched here.

    VIT, CONVNEXT         one row for each tensor, one column for each layout; both directions read them
    LACKING, BESIDES      what a file may lack or hold besides, and what becomes of it; nothing else is let pass
    to_ours, to_theirs    names, and a tensor, from one column to the other; lay_out: all of a network's
    recognise             names and shapes -> the layout and the configuration
    account               every tensor of a file and of a network has its counterpart, or an error names those without
    size_of, hf_config    the configuration in a word, and as transformers writes it

Dimension letters: see the top of model.py.
"""

import json
import re
from collections import Counter
from dataclasses import replace
from functools import cache

import torch

from convnext import CONVNEXT_SIZES, ConvNeXtConfig
from engine import config as command_line
from model import SIZES, ViTConfig, initial_value

LAYOUTS = {"meta": 0, "hf": 1, "timm": 2, "nano": 0}  # column of the tables; nano: Meta's names, and the config
VIT = [  # a number: #    weight or bias: *    queries, keys, values in a tensor each; one not kept is zero: {q,,v}
    # ours are Meta's              Hugging Face                              timm
    ("cls_token",                  "embeddings.cls_token",                   "cls_token"),
    ("storage_tokens",             "embeddings.register_tokens",             "reg_token"),
    ("mask_token",                 "embeddings.mask_token",                  None),
    ("patch_embed.proj.*",         "embeddings.patch_embeddings.*",          "patch_embed.proj.*"),
    ("rope_embed.periods",         None,                                     None),
    ("blocks.#.norm1.*",           "layer.#.norm1.*",                        "blocks.#.norm1.*"),
    ("blocks.#.norm2.*",           "layer.#.norm2.*",                        "blocks.#.norm2.*"),
    ("blocks.#.attn.qkv.weight",   "layer.#.attention.{q,k,v}_proj.weight",  "blocks.#.attn.qkv.weight"),
    ("blocks.#.attn.qkv.bias",     "layer.#.attention.{q,,v}_proj.bias",     "blocks.#.attn.{q,,v}_bias"),
    ("blocks.#.attn.qkv.bias_mask", None,                                    None),
    ("blocks.#.attn.proj.*",       "layer.#.attention.o_proj.*",             "blocks.#.attn.proj.*"),
    ("blocks.#.ls1.gamma",         "layer.#.layer_scale1.lambda1",           "blocks.#.gamma_1"),
    ("blocks.#.ls2.gamma",         "layer.#.layer_scale2.lambda1",           "blocks.#.gamma_2"),
    ("blocks.#.mlp.fc1.*",         "layer.#.mlp.up_proj.*",                  "blocks.#.mlp.fc1.*"),
    ("blocks.#.mlp.fc2.*",         "layer.#.mlp.down_proj.*",                "blocks.#.mlp.fc2.*"),
    ("blocks.#.mlp.w1.*",          "layer.#.mlp.gate_proj.*",                "blocks.#.mlp.fc1_g.*"),
    ("blocks.#.mlp.w2.*",          "layer.#.mlp.up_proj.*",                  "blocks.#.mlp.fc1_x.*"),
    ("blocks.#.mlp.w3.*",          "layer.#.mlp.down_proj.*",                "blocks.#.mlp.fc2.*"),
    ("norm.*",                     "norm.*",                                 "norm.*"),
    ("local_cls_norm.*",           None,                                     None),
]
CONVNEXT = [
    ("downsample_layers.0.#.*",    "stages.0.downsample_layers.#.*",         "stem.#.*"),
    ("downsample_layers.#.#.*",    "stages.#.downsample_layers.#.*",         "stages.#.downsample.#.*"),
    ("stages.#.#.dwconv.*",        "stages.#.layers.#.depthwise_conv.*",     "stages.#.blocks.#.conv_dw.*"),
    ("stages.#.#.norm.*",          "stages.#.layers.#.layer_norm.*",         "stages.#.blocks.#.norm.*"),
    ("stages.#.#.pwconv1.*",       "stages.#.layers.#.pointwise_conv1.*",    "stages.#.blocks.#.mlp.fc1.*"),
    ("stages.#.#.pwconv2.*",       "stages.#.layers.#.pointwise_conv2.*",    "stages.#.blocks.#.mlp.fc2.*"),
    ("stages.#.#.gamma",           "stages.#.layers.#.gamma",                "stages.#.blocks.#.gamma"),
    ("norm.*",                     "layer_norm.*",                           "head.norm.*"),
]
LACKING = {  # of our names: what a file may lack, and what it then is
    r"mask_token": "zeros",                                                # timm has none
    r"rope_embed\.periods": "computed",                                    # as Hugging Face and timm do
    r"blocks\.\d+\.attn\.qkv\.bias_mask": "1, 0, 1 over queries, keys, values",
    r"blocks\.\d+\.attn\.qkv\.bias": "zeros, which released ones amount to",  # if it is lacking in every block
}
BESIDES = {  # of the file's names: what is left out
    r"(dino|ibot)_head\..+": "a head of the pretraining losses",
    r"norms\.3\.(weight|bias)": "ConvNeXt's norm under a second name",     # as Meta's may have it: not seen here
}
WRAPPING = re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
                      r"|^((teacher|model|model_ema|backbone)\.)+")        # "model.": newer Hugging Face files too
WEB = ViTConfig.mean, ViTConfig.std
STATISTICS = {"lvd1689m": WEB, "sat493m": ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))}  # as names of files say
NORMS = r"(blocks\.\d+\.)?norm\d?\..*"

# --------------------------------------------------------------------------------
# Names


def table_of(config):
    return CONVNEXT if isinstance(config, ConvNeXtConfig) else VIT


def thirds(pattern):
    """"a.{q,,v}_b" -> ["a.q_b", "", "a.v_b"];  "a" -> ["a"];  None -> []"""
    head, brace, rest = (pattern or "").partition("{")
    letters, _, tail = rest.partition("}")
    return [letter and head + letter + tail for letter in letters.split(",")] if brace else [head] * bool(head)


@cache
def regex(pattern):
    return re.compile(re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", "(weight|bias)"))


def fill(pattern, words):
    words = iter(words)
    return re.sub(r"[#*]", lambda _: next(words), pattern)


def unwrap(path, names):
    """{a name without what wrappers put before and into it: the name}; a student beside its teacher is left out."""
    if any(name.startswith("teacher.") for name in names):
        names = [name for name in names if not name.startswith("student.")]
    plain = {WRAPPING.sub("", name): name for name in names}
    twice = [name for name in names if name not in plain.values()]
    if twice:
        raise ValueError(f"{path} holds {len(twice)} tensors under two prefixes, {twice[:5]}; keep one network in it")
    return plain


def to_ours(names, table, layout):
    """{a file's name: ours}, of those that a layout has; mlp.w2 and w3 as fc1 and fc2 where they share a name."""
    rows = [(regex(name), row[0]) for row in table for name in thirds(row[LAYOUTS[layout]]) if name]
    found = {}
    for name in names:
        for pattern, ours in rows:
            if name not in found and (match := pattern.fullmatch(name)):
                found[name] = fill(ours, match.groups())
    return found


def to_theirs(key, x, config, layout):
    """Our tensor as a layout keeps it: {its name: x}; thirds of x, under "" one that it does not keep; or {}."""
    row, match = next((row, match) for row in table_of(config) if (match := regex(row[0]).fullmatch(key)))
    names = [fill(name, match.groups()) for name in thirds(row[LAYOUTS[layout]])]
    x = x[None] if names == ["embeddings.mask_token"] else x               # 1 1 D
    return dict(zip(names, x.chunk(len(names)), strict=True)) if names else {}

def lay_out(model, state, layout):
    """{a layout's name: tensor}; and what is lost: has no place there, and reading will not make it up alike."""
    out, lost = {}, []
    bare = layout == "timm" and not any(x.any() for key, x in state.items() if key.endswith("qkv.bias"))
    for key, x in state.items():
        x = x.detach().cpu()
        parts = {} if bare and key.endswith("qkv.bias") else to_theirs(key, x, model.config, layout)
        if not parts and not torch.equal(x.float(), initial(model, key, x.dtype).float()):
            lost.append(key)
        if parts.pop("", x[:0]).any():
            lost.append(f"the keys' third of {key}, which has no effect")
        out |= {name: part.contiguous() if len(parts) == 1 else part.clone(memory_format=torch.contiguous_format)
                for name, part in parts.items()}
    return out, lost


def initial(model, key, dtype):
    """What `initialise` starts a tensor of the model with; the periods in float32."""
    path, _, leaf = key.rpartition(".")
    x = torch.empty(model.state_dict()[key].shape, device="cpu")
    initial_value(model.get_submodule(path), leaf, x, None)
    return x if leaf == "periods" else x.to(dtype)

# --------------------------------------------------------------------------------
# What names and shapes tell


def recognise(path, shapes, beside):
    """
    The layout that has the most of the names, and the configuration.

    shapes   {name without wrappers: shape}
    beside   what may say the number of heads, which the tensors show in Meta's layout alone
    returns  layout, config;  raises ValueError if no layout has half of the names, or they tell no network
    """
    readings = [(to_ours(shapes, table, layout), table, layout)
                for table in (VIT, CONVNEXT) for layout in ("meta", "hf", "timm")]
    ours, table, layout = max(readings, key=lambda reading: len(reading[0]))
    known = {ours[name]: shapes[name] for name in ours}
    if 2 * len(ours) < len(shapes) or not commonest(known, NORMS, 0):
        raise ValueError(f"{path} is of no known layout: of its {len(shapes)} tensors, {len(ours)} have names of "
                         f"{layout}; it begins with {list(shapes)[:5]}")
    try:
        return layout, vit_config(known, beside) if table is VIT else convnext_config(known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def commonest(shapes, pattern, axis, default=0):
    """The commonest size along an axis of the tensors so named: one that is damaged does not outvote the rest."""
    sizes = Counter(s[axis] for key, s in shapes.items() if re.fullmatch(pattern, key) and s[axis:])
    return sizes.most_common(1)[0][0] if sizes else default


def count(shapes, pattern):
    """1 + the largest number that the pattern finds."""
    return 1 + max((int(found[1]) for key in shapes if (found := re.match(pattern, key))), default=-1)


def vit_config(shapes, beside):
    D = commonest(shapes, NORMS, 0)
    hidden = commonest(shapes, r"blocks\.\d+\.mlp\.(fc1|w1|w2)\.weight", 0, 4 * D)
    ffn = "swiglu" if any(".mlp.w1." in key for key in shapes) else "mlp"
    known = [c for c in SIZES.values() if (c.width, c.hidden, c.ffn) == (D, hidden, ffn)]
    E = 128 if D == 4096 else 64                                           # of all released sizes
    periods = commonest(shapes, r"rope_embed\.periods", 0)                 # E/4
    said = beside.get("num_attention_heads", beside.get("heads"))
    if said is not None and not re.fullmatch(r"\d{1,4}", str(said)):
        raise ValueError(f"the number of heads is {said!r}")
    heads = D // (4 * periods) if periods else int(said) if said else known[0].heads if known else max(1, D // E)
    base = known[0] if known else ViTConfig(0, D, heads, hidden, ffn, qkv_bias=False)
    return replace(
        base, heads=heads, depth=count(shapes, r"blocks\.(\d+)\."),
        qkv_bias=base.qkv_bias or any(key.endswith("qkv.bias") for key in shapes),
        local_norm=any(key.startswith("local_cls_norm.") for key in shapes),
        patch_size=commonest(shapes, r"patch_embed\.proj\.weight", 2, base.patch_size),
        n_registers=commonest(shapes, "storage_tokens", 1, base.n_registers),
        in_chans=commonest(shapes, r"patch_embed\.proj\.weight", 1, base.in_chans))


def convnext_config(shapes):
    return ConvNeXtConfig(
        depths=tuple(count(shapes, rf"stages\.{i}\.(\d+)\.") for i in range(4)),
        dims=tuple(commonest(shapes, rf"stages\.{i}\.\d+\.(norm|dwconv)\..*", 0) for i in range(4)),
        in_chans=commonest(shapes, r"downsample_layers\.0\.0\.weight", 1, 3))


def size_of(config):
    """"s", or "s, 2 of 12 layers", or numbers."""
    def width(c): return [getattr(c, name, None) for name in ("width", "heads", "hidden", "ffn", "dims")]
    def depth(c): return getattr(c, "depths", c.depth)
    near = {name: depth(c) for name, c in (SIZES | CONVNEXT_SIZES).items() if width(c) == width(config)}
    same = [name for name in near if near[name] == depth(config)]
    cut = [f"{name}, {depth(config)} of {near[name]} layers" for name in near]
    return [*same, *cut, f"of no known size, depth {depth(config)}, width {getattr(config, 'dims', config.width)}"][0]

def account(path, layout, config, stored, notes, model):
    """Accounts for every tensor of the file and of the model, or raises. Returns what the file rightly lacks."""
    expected, lacking, there = {}, set(), dict(stored)
    biases = any(key.endswith("qkv.bias") for key in to_ours(there, table_of(config), layout).values())
    for key, like in model.state_dict().items():
        parts = to_theirs(key, like, config, layout)
        why = next((why for pattern, why in LACKING.items() if re.fullmatch(pattern, key)), None)
        if why and not parts.keys() & there.keys() and not (biases and key.endswith("qkv.bias")):
            lacking.add(key)
            notes.append(f"no {re.sub('[0-9]+', '#', key)} in it: {why}")
        else:
            expected |= {name: tuple(part.shape) for name, part in parts.items() if name}
    for key in there.keys() - expected.keys():
        for why in (why for pattern, why in BESIDES.items() if re.fullmatch(pattern, key)):
            notes.append(f"{key.partition('.')[0]}.* left out: {why}")
            del there[key]
    missing, unexpected = sorted(expected.keys() - there.keys()), sorted(there.keys() - expected.keys())
    misshapen = [f"{key} is {there[key].shape}, not {shape}" for key, shape in sorted(expected.items())
                 if key in there and there[key].shape != shape]
    if missing or unexpected or misshapen:
        raise ValueError(f"{path}, read as {layout}, {size_of(config)}, does not fit: of {len(expected)} tensors, "
                         f"{len(missing)} missing {missing[:5]}, {len(unexpected)} unexpected {unexpected[:5]}, "
                         f"{len(misshapen)} of another shape {misshapen[:5]}")
    return lacking


def read_config(path, text):
    """The configuration that a file of layout nano carries."""
    try:
        config = {key: tuple(v) if isinstance(v, list) else v for key, v in json.loads(text).items()}
        return check((ConvNeXtConfig if "depths" in config else ViTConfig)(**config))
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path} has a configuration that this version cannot read: {error}") from error


def check(config):
    """config, if its types, its ranges and the numbers of its channels are those of a network; else a ValueError."""
    like = CONVNEXT_SIZES["convnext_t"] if isinstance(config, ConvNeXtConfig) else SIZES["s"]
    for name in vars(config):
        old, value = getattr(like, name), getattr(config, name)
        n = config.in_chans if name in ("mean", "std") else len(old) if type(old) is tuple else 0
        if not command_line.fits(value, (0,) * n or old):
            raise ValueError(f"{name} is {value!r}, where {f'{n} numbers' if n else type(old).__name__} belong")
    for name, legal in command_line.ranges(type(config)).items():
        if not command_line.lies_in(getattr(config, name), legal):
            raise ValueError(f"{name} is {getattr(config, name)}; it must be in {legal}")
    return config


def with_statistics(config, path, metadata, timm, processor):
    """The normalisation that the file says, or what lies beside it, or its name, or else the web's; and notes on it."""
    places = (metadata, "mean", "std"), (processor, "image_mean", "image_std"), (timm, "mean", "std")
    given = [(place[mean], place[std]) for place, mean, std in places
             if isinstance(place, dict) and mean in place and std in place]
    try:
        given = [tuple(tuple(map(float, json.loads(x) if isinstance(x, str) else x)) for x in pair) for pair in given]
        if any(not values for pair in given for values in pair):
            raise ValueError("one is empty")
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: mean and std are no lists of numbers: {error}") from error
    notes = [] if given or named(path) else ["it says no normalisation, so the web's (LVD-1689M) is taken"]
    if given and given[0] != (named(path) or given[0]):
        notes.append(f"its name says other statistics than the mean and std {given[0]} that came with it, which hold")
    mean, std = given[0] if given else named(path) or WEB
    found = replace(config, mean=widen(mean, config.in_chans), std=widen(std, config.in_chans))
    try:
        return check(found), notes
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def named(path):
    """The statistics that the name of a file or of its folder says, or None."""
    return next((pair for name, pair in STATISTICS.items() if name in "/".join(path.parts[-2:])), None)


def widen(values, n):
    """Numbers for RGB as numbers for n channels: the mean of the three for each that is new."""
    return (*values, *(sum(values) / len(values),) * (n - len(values)))[:n]

# --------------------------------------------------------------------------------
# As transformers writes it


def hf_config(config):
    """config.json; one that lies beside tensors must say the same, but for what is OPEN."""
    both = dict(num_channels=config.in_chans, image_size=224)
    if isinstance(config, ConvNeXtConfig):
        return both | dict(
            model_type="dinov3_convnext", architectures=["DINOv3ConvNextModel"], depths=list(config.depths),
            hidden_sizes=list(config.dims), hidden_act="gelu", layer_norm_eps=1e-6,
            layer_scale_init_value=config.layerscale)
    gated = config.ffn == "swiglu"
    return both | dict(
        model_type="dinov3_vit", architectures=["DINOv3ViTModel"], num_hidden_layers=config.depth,
        hidden_size=config.width, num_attention_heads=config.heads, intermediate_size=config.hidden,
        use_gated_mlp=gated, hidden_act="silu" if gated else "gelu", patch_size=config.patch_size,
        num_register_tokens=config.n_registers, query_bias=config.qkv_bias, key_bias=False, value_bias=config.qkv_bias,
        mlp_bias=True, proj_bias=True, layer_norm_eps=1e-5, rope_theta=100.0, layerscale_value=config.layerscale)


OPEN = {"architectures", "image_size", "query_bias", "value_bias", "layerscale_value", "layer_scale_init_value"}


def hf_processor(config):
    """preprocessor_config.json"""
    return dict(
        image_processor_type="DINOv3ViTImageProcessorFast", do_resize=True, size=dict(height=224, width=224),
        resample=2, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=config.mean,
        image_std=config.std)


def contradictions(config, theirs):
    """{what config.json says: (its value, the tensors')}, where they differ."""
    ours = hf_config(config) if str(theirs.get("model_type")).startswith("dinov3") else {}
    same = {key for key in ours if theirs.get(key, ours[key]) == ours[key]} | OPEN
    return {key: (theirs[key], ours[key]) for key in ours if key not in same}
