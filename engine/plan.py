"""
What a training step of a config needs and costs. Arithmetic: nothing is started, read or written.

    python train.py --size 7b --plan --ranks 256 --device cuda --memory 80       a table; last, one JSON object

    Plan, main       the options that go with --plan; what it prints
    announce         the short form, before a run; stops one that cannot fit
    flops            of an image, by kind
    memory           bytes of a rank, by kind, and the most that is there at once
    wire, loader     bytes between ranks; images and the cores that prepare them
    bill             seconds, hours, kWh, CO2
    would_fit        what to change
    staying          whether the student's weights may stay gathered from forward to backward

Each kind is a term of its own, named for what it is; LOG.md has what was measured beside it. Here c is a TrainConfig,
`where` the kind and number of devices, `networks` the student on the meta device. Dimension letters: see model.py.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import ops
from data import draw_masks, read_resolutions
from engine import config as command_line
from engine import fp8
from engine.ranks import choose_precision
from engine.stages import gram_config
from engine.system import physical
from weights import empty

F32, BF16, GB = 4, 2, 1e9
H100 = 989.4e12                # bf16 FLOP/s, dense, of the data sheet
READ = 5.0e-3                  # seconds of a core for an image: read a JPEG of 500x375, cut 10 crops; LOG.md
COLOUR = 7e-9                  # the same for a pixel of the crops, where the host colours them: without a GPU
PROGRAM = 33e6                 # what the code of libraries takes once their functions run: a CPU's; LOG.md
TOP = 64 * 2 ** 20             # what glibc's malloc keeps at most for later: twice its largest mmap threshold
PUE, CO2 = 1.1, 0.385          # paper: §9: of the data centre; kg for a kWh, average of the USA
NODE = 8                       # ranks that share a machine
FULL = 0.75                    # share of a device's memory, by plan, up to which weights stay gathered; chosen by eye


@dataclass(frozen=True)
class Plan:
    ranks: int = 1             # [1, 1e6]: with --plan: devices, as torchrun would start them
    memory: float = 0.0        # [0, inf): with --plan: GB (1e9 bytes) of each device; 0 = what this machine has
    mfu: float = 0.185         # (0, 1]: with --plan: of an H100's 989 TFLOP/s; that of the released ViT-L's 14 h
    seconds: float = 0.0       # [0, inf): with --plan: of a step, as measured; 0 = by --mfu, on CUDA alone
    watts: float = 700.0       # (0, 1e6]: with --plan: of a device; an H100's


@dataclass(frozen=True)
class Where:
    kind: str = "cpu"          # of device
    ranks: int = 1             # S
    stays: bool = False        # whether the student's weights, once gathered, stay until its backward pass

    def fused(self, c, op):
        """Whether csrc runs the op: as it is built here, or, for a device that is not here, as it would be."""
        here = self.kind == "cpu" or torch.cuda.is_available()
        return c.kernels != "off" and ((op, self.kind) in ops.KERNELS if here else self.kind == "cuda")

# --------------------------------------------------------------------------------
# Shapes of a step


def each_resolution(c):
    """[(share, c with its sides alone)] of --resolutions; c, if there is no choice."""
    if not c.resolutions:
        return [(1.0, c)]
    return [(share, replace(c, resolutions="", global_size=large, local_size=small, gram_size=gram))
            for (large, small, gram), share in read_resolutions(c.resolutions)]


@dataclass(frozen=True)
class Crops:
    """One crop group on one rank."""
    images: float
    patches: int               # P
    tokens: int                # N
    kept: float                # share of the images that enter a branch


def crop_groups(c, samples):
    """The global crops, and the local ones if there are any, of so many samples."""
    groups = []
    for views, side in ((2, c.global_size), (c.n_local, c.local_size))[: 1 + bool(c.n_local)]:
        P, size = (side // c.patch_size) ** 2, views * c.group
        kept = max(int(size * (1 - c.drop_path)), 1) / size if c.drop_path else 1
        groups.append(Crops(views * samples, P, 1 + c.vit.n_registers + P, kept))
    return groups


def gram_crops(c, samples):
    """What the Gram teacher sees of so many samples."""
    own = gram_config(c)
    P = (c.gram_size // own.patch_size) ** 2
    return Crops(2 * samples, P, 1 + own.n_registers + P, 1)


def masked_patches(c):
    """Of an image's two global crops, on average."""
    side = c.global_size // c.patch_size
    masks = draw_masks(np.random.default_rng(0), 2 * c.group, side, side, c.mask_share, c.mask_ratio)
    return int(masks.sum()) / c.group  # every draw has as many


def head_rows(c, samples):
    """(teacher's rows, student's rows) of each head."""
    M = masked_patches(c) * samples
    return dict(dino_head=(2 * samples, (2 + c.n_local) * samples), ibot_head=(M, M))


def head_sizes(c, name):
    """H, Z, K"""
    return [getattr(c, f"{name[:4]}_{part}") for part in ("hidden", "bottleneck", "prototypes")]

# --------------------------------------------------------------------------------
# Arithmetic


def flops(c):
    """
    FLOPs of an image of the batch, by kind: matrix products, two for each multiplication with its addition. A backward
    pass is twice its forward; there is none to the images. `model` is what a MFU is reckoned by, `recomputed` what
    checkpointing adds, `float8` what of `model` is in float8. Of several resolutions, what they take on average.

    paper: at 7B, 30.17e12 in all are what its hours amount to at 0.864 s a step
    """
    found = [(share, flops_of(now)) for share, now in each_resolution(c)]
    return {kind: round(sum(share * counts[kind] for share, counts in found)) for kind in found[0][1]}


def linears(v, group, share=1):
    """Of a ViT's blocks."""
    each = 4 * v.width ** 2 + (3 if v.ffn == "swiglu" else 2) * v.width * v.hidden
    return group.images * share * v.depth * 2 * group.tokens * each


def blocks(v, group, share=1):
    return linears(v, group, share) + group.images * share * v.depth * 4 * group.tokens ** 2 * v.width


def embedding(v, group):
    """Of pixels to patches."""
    return 2 * group.images * group.patches * v.in_chans * v.patch_size ** 2 * v.width


def flops_of(c):
    """flops() of one resolution."""
    v, groups, heads = c.vit, crop_groups(c, 1), head_rows(c, 1)

    def head(name):
        H, Z, K = head_sizes(c, name)
        return 2 * (v.width * H + H * H + H * Z + Z * K)
    once, pixels = sum(blocks(v, group, group.kept) for group in groups), sum(embedding(v, group) for group in groups)
    found = dict(
        student_forward=once + pixels,
        student_backward=2 * once + pixels,
        teacher=blocks(v, groups[0]) + embedding(v, groups[0]),
        heads=sum((teacher + 3 * student) * head(name) for name, (teacher, student) in heads.items()),
    )
    if c.gram_teacher:  # its forward; similarities, of both networks, forward and backward, and what they are worth
        own, large = gram_config(c), gram_crops(c, 1)
        pairs = 2 * groups[0].images * groups[0].patches ** 2 * (3 * v.width + 2 * own.width)
        found["gram"] = blocks(own, large) + embedding(own, large) + pairs
    again = once if c.checkpointing == "full" else 0  # selective: no product, nothing that would be counted
    twice = 2 * sum(linears(v, group, group.kept) for group in groups)  # forward, and the input's gradient
    float8 = twice + linears(v, groups[0]) if c.precision == "fp8" else 0
    found |= dict(model=sum(found.values()), recomputed=again, float8=float8)
    return found

# --------------------------------------------------------------------------------
# Memory


@dataclass(frozen=True)
class Piece:
    """A part of the student in the order of its forward pass; the backward pass goes the other way."""
    parameters: float          # whose gradients it leaves
    kept: float                # bytes that it keeps for its backward
    work: float                # bytes that its backward needs for a while


def kept_of_block(c, where, tokens):
    """Bytes that a block keeps for its backward, by kind.    tokens  of a rank that enter a branch"""
    v, a = c.vit, activation(c)
    D, F, gates = v.width, v.hidden, 4 if v.ffn == "swiglu" else 2
    alone = where.kind == "cpu" and where.fused(c, "rope_attention")  # no attention but our kernel's
    branch = a + F32 if c.drop_path else F32 if where.kind == "cuda" else a  # autocast's addcmul is float32 on CUDA
    each = dict(
        stream=2 * (D + 2) * F32,                    # before both norms; mean and 1 / std
        linears=2 * D * a,                           # into qkv, into the MLP
        attention=4 * D * a + v.heads * F32,         # q, k, v, the result, log-sum-exp of each head
        turned=0 if alone else 3 * D * a,            # q and k turned, the result in one piece
        mlp=gates * F * a,                           # between its linears: before and after GELU, or w1, silu, w2, both
        branches=2 * D * branch,                     # what LayerScale multiplies; index_add keeps the product, too
    )
    return {kind: tokens * size for kind, size in each.items()}


def activation(c):
    """Bytes of a number between linears; the residual stream and norms are float32 always."""
    return F32 if c.precision == "fp32" else BF16


def travels_as_bf16(c, where):
    """Whether shards are gathered in bf16; else autocast makes copies that stay until the backward pass."""
    return c.precision != "fp32" and where.kind == "cuda" and where.ranks > 1


def pieces(c, where, networks):
    """The student, piece by piece."""
    v, a, samples = c.vit, activation(c), c.batch / where.ranks / c.accumulate
    groups = crop_groups(c, samples)
    T = sum(g.images * g.tokens for g in groups)                      # all tokens
    t = sum(g.images * g.tokens * g.kept for g in groups)             # that enter a branch
    cast = BF16 if c.precision != "fp32" and not travels_as_bf16(c, where) else 0
    n = {name: sum(p.numel() for p in part.parameters()) for name, part in networks.items()}
    block = sum(p.numel() for p in networks["backbone"].blocks[0].parameters())
    inside = sum(kept_of_block(c, where, t).values()) + cast * block * (c.precision != "fp8")  # linears keep weights
    stream, gates = T * v.width * F32, 2 if v.ffn == "swiglu" else 1
    backward = gates * t * v.hidden * a + 2 * stream                  # gradients within the MLP, and of the stream
    backward += t * v.hidden * (F32 + 1) if c.precision == "fp8" else 0  # one of the former, scaled and quantised
    again = inside - (0 if c.drop_path else stream)                   # a block's input need not be kept twice
    gated = 2 if v.ffn == "swiglu" else 1
    products = stream + t * ((6 * v.width + gated * v.hidden) * a + v.heads * F32)  # qkv, attention, projection, MLP's
    kept, work = dict(none=(inside, backward), full=(stream, again + backward),
                      selective=(products, again - products + stream + backward))[c.checkpointing]
    pixels = sum(g.images * g.patches for g in groups) * v.patch_size ** 2 * v.in_chans
    found = [Piece(n["backbone"] - v.depth * block, pixels * (a if a == BF16 else 0), 2 * stream)]
    found += [Piece(block, kept, work)] * v.depth
    found.append(Piece(0, stream + 2 * T * F32, 2 * stream))    # the last norm
    for name, (teacher, rows) in head_rows(c, samples).items():
        H, Z, K = head_sizes(c, name)
        found.append(Piece(n[name], rows * ((v.width + 4 * H + Z) * a + Z * F32) + cast * n[name],
                           rows * (2 * H + v.width + K) * a))
        if where.fused(c, "assignment_loss"):                         # logits, which their gradient replaces
            found.append(Piece(0, rows * K * a, 0))
        else:                                                         # logarithms and targets; two gradients
            found.append(Piece(0, (rows + teacher) * K * F32, 2 * rows * K * F32))
    return found


def memory(c, where, networks):
    """
    Bytes of a rank, by kind, and `peak`: the most at once, in the backward pass: gradients come as activations go.
    `copy`, beside it: on the host, where it has the room, of what a checkpoint writes while steps run; see `copied`.

    Not in it: what the process has before its networks, processes that read images; on CUDA, the context and what the
    allocator and NCCL keep, which nobody has measured yet. Of several resolutions, the one that takes the most.
    """
    return max((memory_of(now, where, networks) for _, now in each_resolution(c)), key=lambda found: found["peak"])


def memory_of(c, where, networks):
    """memory() of one resolution."""
    parts, v, a = pieces(c, where, networks), c.vit, activation(c)
    S = where.ranks // c.replicas                                     # that share a copy of it all
    P = sum(p.numel() for p in networks.parameters())
    groups, unit = crop_groups(c, c.batch / where.ranks), largest_unit(networks)  # all parts; the student has one
    moved = F32 if not travels_as_bf16(c, where) else BF16
    rows = head_rows(c, c.batch / where.ranks)
    gathered = unit * (2 * moved + moved + F32)                       # two units; gradients of one, and to be added up
    if where.stays:
        gathered += P * moved - 2 * unit * moved
    found = dict(
        weights=P * F32 / S,
        gradients=P * F32 / S,
        adam=2 * P * (BF16 if c.moments == "bf16" else F32) / S,
        teacher=P * F32 / S,
        gathered=gathered if S > 1 else 0,
        parts=P * F32 if S > 1 and c.accumulate > 1 else 0,           # their gradients, whole until the last one's
        batch=sum(g.images * g.patches for g in groups) * v.patch_size ** 2 * v.in_chans * F32,
        features=groups[0].images * groups[0].tokens * v.width * F32 / c.accumulate,  # of global crops, for the meters
        targets=sum(teacher * head_sizes(c, name)[2] for name, (teacher, _) in rows.items()) * a,  # teacher's logits
        activations=sum(piece.kept for piece in parts),
        workspace=max(piece.work for piece in parts),
        process=PROGRAM + TOP if where.kind == "cpu" else 0,
    )
    gram_work = 0
    if c.gram_teacher:
        own, large = gram_config(c), gram_crops(c, c.batch / where.ranks / c.accumulate)
        T, gates = large.images * large.tokens, 3 if own.ffn == "swiglu" else 2
        found["gram"] = gram_parameters(c) * (BF16 if S == 1 and c.precision != "fp32" else F32) / S
        found["batch"] += c.accumulate * large.images * c.gram_size ** 2 * own.in_chans * F32
        found["features"] += large.images * groups[0].patches * own.width * F32              # its maps, as resized
        gram_work = T * (3 * own.width * F32 + max(4 * own.width, gates * own.hidden) * a)   # of one block
    held = sum(found.values()) - sum(found[kind] for kind in ("gradients", "activations", "workspace"))
    left, peak, done = found["activations"], held + found["activations"] + gram_work, 0
    for piece in reversed(parts):
        done += piece.parameters * F32 / S
        peak = max(peak, held + left + done + piece.work)
        left -= piece.kept
    copy = sum(found.get(kind, 0) for kind in ("weights", "adam", "teacher", "gram"))
    return {kind: round(size) for kind, size in (found | dict(peak=peak, copy=copy)).items()}


def gram_parameters(c):
    with torch.device("meta"):
        return sum(p.numel() for p in empty(gram_config(c)).parameters())


def largest_unit(networks):
    """Parameters of the largest part that FSDP gathers at once: a block, a head's prototypes, a network's rest."""
    sizes = []
    for part in networks.values():
        apart = list(getattr(part, "blocks", None) or [part.last_layer])
        sizes += [sum(p.numel() for p in each.parameters()) for each in apart]
        sizes.append(sum(p.numel() for p in part.parameters()) - sum(sizes[-len(apart):]))
    return max(sizes)

# --------------------------------------------------------------------------------
# Between ranks, and before them


def wire(c, where, networks):
    """
    Bytes that a rank sends in a step, in rings, by kind; `nodes`: its share of what leaves a node of eight; of replicas
    that are nodes only their sum of gradients does.
    """
    S, D, shards = where.ranks, c.vit.width, where.ranks // c.replicas
    P = sum(p.numel() for p in networks.parameters())
    weights = P * (BF16 if travels_as_bf16(c, where) else F32)
    K = c.dino_prototypes + c.ibot_prototypes
    spans = (c.batch // S) % c.koleo_group != 0                       # a set of KoLeo lies on several ranks
    share, inner = (S - 1) / S, (shards - 1) / shards
    found = dict(
        gather_teacher=weights * inner * c.accumulate,
        **(dict(gather_gram=gram_parameters(c) * weights / P * inner * c.accumulate) if c.gram_teacher else {}),
        gather_forward=weights * inner * c.accumulate,
        gather_backward=0 if where.stays else weights * inner * c.accumulate,
        reduce_gradients=P * F32 * inner,
        replicas=2 * P * F32 / shards * (c.replicas - 1) / c.replicas,
        sinkhorn=4 * K * F32 * 2 * share,                             # the largest, then three sums
        koleo=2 * spans * c.batch * D * F32 * 3 * share,              # gather, and its backward's sum
    )
    total = sum(found.values())
    between = found["replicas"] if c.replicas > 1 and shards <= NODE else total / NODE
    found |= dict(total=total, nodes=between if S > NODE else 0)
    return {kind: round(size) for kind, size in found.items()}


def loader(c, where, seconds):
    """Images a second, of all ranks, and cores for them: reading and cutting; colours too, where there is no GPU."""
    pixels = sum(share * sum(g.images * g.patches for g in crop_groups(now, 1)) * c.patch_size ** 2
                 for share, now in each_resolution(c))
    each = READ + (0 if where.kind == "cuda" else COLOUR * pixels)    # seconds of a core
    return dict(core_seconds=each, images_per_s=c.batch / seconds if seconds else None,
                cores=c.batch / seconds * each if seconds else None)


def bill(c, where, plan):
    """Seconds of a step, hours of all devices, kWh, kg of CO2; None where nobody knows how long a step takes."""
    seconds = plan.seconds or None
    if not seconds and where.kind == "cuda":
        seconds = c.batch * flops(c)["model"] / (where.ranks * H100 * plan.mfu)
    hours = seconds * c.steps * where.ranks / 3600 if seconds else None
    kwh = hours * plan.watts / 1000 * PUE if seconds else None
    return dict(seconds=seconds, device_hours=hours, kwh=kwh, co2_kg=kwh * CO2 if seconds else None)

# --------------------------------------------------------------------------------
# Does it fit


def device_memory(kind):
    """Bytes of a device of this machine, for one rank."""
    if kind == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    room = physical()
    for path in "memory.max", "memory/memory.limit_in_bytes":         # a container's, by cgroups 2 or 1
        limit = Path("/sys/fs/cgroup", path)
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            room = min(room, int(text))
    return room / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def copied(size, free):
    """Whether checkpoints are copied to the host's memory, and written while the next steps run: as much stays free."""
    return 2 * size <= free


def samples_of_a_part(c, n_ranks):
    """B of a part, on a rank. Raises ValueError if ranks or parts would cut what is drawn or compared at once."""
    if c.batch % n_ranks:
        near = max(c.batch // n_ranks, 1) * n_ranks
        raise ValueError(f"--batch {c.batch} is not divisible by {n_ranks} ranks; try {near}")
    if n_ranks % c.replicas:
        raise ValueError(f"--replicas {c.replicas} does not divide {n_ranks} ranks; each must have as many")
    if c.accumulate > 1 and not whole(c, n_ranks, c.accumulate):
        raise ValueError(f"--accumulate {c.accumulate}: {c.batch // n_ranks} images of a rank in so many parts; "
                         f"each must hold whole --group {c.group} and --koleo_group {c.koleo_group}")
    return c.batch // n_ranks // c.accumulate


def whole(c, n_ranks, parts):
    """Whether so many parts cut no group."""
    return not any(c.batch // n_ranks % (parts * size) for size in (c.group, c.koleo_group))


def would_fit(c, where, networks, room):
    """[(options, bytes)] of the smallest changes that fit: checkpointing; parts, ranks, batch, each also with it."""
    found, modes = [], list(ops.RECOMPUTED)
    for how in modes[modes.index(c.checkpointing) :]:
        less = replace(c, checkpointing=how)
        word = [f"--checkpointing {how}"] if how != c.checkpointing else []
        ranks = [S for S in (where.ranks * 2 ** k for k in range(1, 13)) if c.batch % S == 0
                 and (c.accumulate == 1 or whole(c, S, c.accumulate))]
        parts = [K for K in (c.accumulate * 2 ** k for k in range(1, 13)) if whole(c, where.ranks, K)]
        batches = [c.batch // 2 ** k for k in range(1, 20) if c.batch // 2 ** k % where.ranks == 0]
        ways = [[(word, less, where)]] if word else []
        ways.append([([f"--accumulate {K}", *word], replace(less, accumulate=K), where) for K in parts])
        ways.append([([f"--ranks {S}", *word], less, replace(where, ranks=S)) for S in ranks])
        ways.append([([f"--batch {B}", *word], smaller(less, B), where) for B in batches if B > 1])
        for way in ways:
            peaks = ((words, memory(*each, networks)["peak"]) for words, *each in way)
            found += [next(((words, peak) for words, peak in peaks if peak <= room), None)]
    found = [each for each in found if each]
    alone = [each for each in found if len(each[0]) == 1]
    return alone or found


def smaller(c, batch):
    """c with another batch, and with groups that divide it."""
    fits = {name: next(size for size in range(min(getattr(c, name), batch), 0, -1) if batch % size == 0)
            for name in ("group", "koleo_group")}
    return replace(c, batch=batch, **fits)


def staying(c, where, networks, room):
    """`where`, its weights staying gathered if there is room for that, and for what CUDA's allocator keeps besides."""
    stays = replace(where, stays=True)
    fits = where.ranks > c.replicas and memory(c, stays, networks)["peak"] <= FULL * room
    return stays if fits else where


def refuse(c, where, networks, room):
    """Raises ValueError if the memory is too small."""
    peak = memory(c, where, networks)["peak"]
    if peak > room:
        ways = [f"{' '.join(words)} ({size / GB:.3g} GB)" for words, size in would_fit(c, where, networks, room)]
        raise ValueError(f"{c.size}, {c.batch} images on {where.ranks} rank{'s' * (where.ranks > 1)} needs "
                         f"{peak / GB:.3g} GB on each, which has {room / GB:.3g}; what would fit: "
                         f"{', '.join(ways) or 'nothing short of another size'}")

# --------------------------------------------------------------------------------
# What is said


def meta(c, make_networks):
    with torch.device("meta"):
        return make_networks(c)


def announce(c, ranks, make_networks):
    """
    A line before a run, on main; returns whether the student's weights stay gathered. Raises ValueError, on every rank,
    if the run cannot fit.
    """
    where, networks = Where(ranks.device.type, ranks.count), meta(c, make_networks)
    room = min(ranks.together(lambda: device_memory(where.kind)))     # one answer for all
    where = staying(c, where, networks, room)
    needs, arithmetic = memory(c, where, networks), flops(c)
    host = device_memory("cpu") - (needs["peak"] if where.kind == "cpu" else 0)
    how = "written while the next steps run" if copied(needs["copy"], host) else "the steps wait while they are written"
    if ranks.main:
        print(f"{needs['peak'] / GB:.3g} GB wanted on each rank of the {room / GB:.3g} that are there; "
              f"{(arithmetic['model'] + arithmetic['recomputed']) / 1e12:.3g} TFLOP an image; checkpoints, "
              f"{needs['copy'] / GB:.3g} GB of each rank: {how}"
              + "; the student's weights stay gathered" * where.stays, flush=True)
    refuse(c, where, networks, room)
    return where.stays


def main(argv, configure, make_networks):
    """train.py's command line with --plan in it. Raises ValueError for what cannot be planned, and what cannot fit."""
    argv = [word for word in argv if word != "--plan"]
    own = command_line.types(Plan())
    rest, mine = [], []
    while argv:                                                       # an option with its value, if it has one
        n = 1 + next((i for i, word in enumerate(argv[1:]) if word.startswith("--")), len(argv) - 1)
        (mine if argv[0][2:].partition("=")[0] in own else rest).extend(argv[:n])
        argv = argv[n:]
    plan = command_line.apply(Plan(), command_line.read_words(mine, own)[0])
    c, where, room = settle(configure(rest), plan)
    networks = meta(c, make_networks)
    where = staying(c, where, networks, room)
    found = everything(c, where, plan, networks) | dict(room=room)
    print("\n".join(table(c, where, plan, found)))
    print(json.dumps(found), flush=True)
    refuse(c, where, networks, room)


def settle(c, plan):
    """c with its precision, where it is to run, and the bytes there. Raises ValueError if these cannot be known."""
    elsewhere = c.device == "cuda" and not torch.cuda.is_available()
    kind = c.device if elsewhere else command_line.choose_device(c.device).type
    if elsewhere and not plan.memory:
        raise ValueError("--device cuda is not here; say how many GB each device has, as in --memory 80")
    samples_of_a_part(c, plan.ranks)
    if c.precision == "fp8" and not elsewhere:
        fp8.check(torch.device(kind))
    precision = "bf16" if elsewhere and c.precision == "auto" else choose_precision(c.precision, torch.device(kind))
    return (replace(c, precision=precision), Where(kind, plan.ranks),
            plan.memory * GB if plan.memory else device_memory(kind))


def everything(c, where, plan, networks):
    """All of it, as one object."""
    cost = bill(c, where, plan)
    n = {name: sum(p.numel() for p in part.parameters()) for name, part in networks.items()}
    activations = {how: memory(replace(c, checkpointing=how), where, networks)["activations"] for how in ops.RECOMPUTED}
    return dict(size=c.size, stage=c.stage, device=where.kind, ranks=where.ranks, batch=c.batch, steps=c.steps,
                precision=c.precision, checkpointing=c.checkpointing, stays=where.stays,
                parameters=dict(backbone=n["backbone"], heads=n["dino_head"] + n["ibot_head"])
                | (dict(gram=gram_parameters(c)) if c.gram_teacher else {}),
                flops_image=flops(c), flops_step=sum(flops(c)[kind] for kind in ("model", "recomputed")) * c.batch,
                bytes=memory(c, where, networks), activations=activations,
                wire_bytes=wire(c, where, networks), loader=loader(c, where, cost["seconds"]), cost=cost)


def table(c, where, plan, found):
    """Lines for people."""
    cost, images = found["cost"], found["loader"]
    n, peak = found["parameters"], found["bytes"]["peak"]
    devices = f"{where.ranks} x {where.kind}"
    yield (f"{c.size} {c.stage}, {c.steps:,} steps of {c.batch} images on {devices}, {c.precision}, "
           f"checkpointing {c.checkpointing}: backbone {n['backbone']:,} parameters, "
           f"heads {n['heads']:,}" + (f", Gram teacher {n['gram']:,}" if c.gram_teacher else ""))
    yield from rows("GFLOP an image", found["flops_image"], 1e9)
    yield from rows("MB of a rank", found["bytes"], 1e6)
    each = ", ".join(f"{how} {size / 1e6:,.1f}" for how, size in found["activations"].items())
    yield (f"  {'':18} activations by --checkpointing: {each}; peak of {found['room'] / 1e6:,.0f} that are there: "
           f"{100 * peak / found['room']:.0f} %")
    if where.ranks > 1:
        yield from rows("MB sent by a rank", found["wire_bytes"], 1e6)
    yield f"a core prepares {1 / images['core_seconds']:.0f} images/s (JPEG of 500x375; measured, LOG.md)"
    if cost["seconds"] is None:
        yield f"seconds a step: not known for {where.kind}; measure some steps, then say --seconds S"
        return
    why = "as said" if plan.seconds else f"at {plan.mfu:g} of an H100's {H100 / 1e12:.0f} TFLOP/s, not measured here"
    yield (f"{cost['seconds']:.3g} s a step, {why}: {images['images_per_s']:,.0f} images/s, "
           f"{images['cores']:.1f} cores to prepare them")
    yield (f"{cost['device_hours']:,.0f} device hours, {cost['kwh'] / 1000:,.3g} MWh at {plan.watts:g} W x {PUE}, "
           f"{cost['co2_kg'] / 1000:,.3g} t CO2 at {CO2} kg/kWh")


def rows(title, values, unit):
    yield f"{title}:"
    for name, value in values.items():
        yield f"  {name:18} {value / unit:16,.1f}"
