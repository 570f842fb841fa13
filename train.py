"""
Pretrain a DINOv3 ViT, and what comes after.

    python train.py                                                  tiny, on the generated `shapes`, on anything
    python train.py --size s --data PHOTOS --out runs/s              one GPU, or patience
    python train.py --recipe photos --data PHOTOS --out runs/s       ViT-S or -B (--size b) on one GPU of 24 GB
    python train.py --size l --recipe released --data IMAGENET       ViT-L as the released code trains it from scratch
    python train.py --stage adapt --init WEIGHTS --data PHOTOS       released weights to your photos, unbroken
    python train.py --out runs/s --resume                            go on, bit for bit; --resume auto: or begin
    torchrun --nproc-per-node 8 train.py --size 7b --data PHOTOS     FSDP2, any number of ranks and nodes
    torchrun --nproc-per-node 8 -- train.py --start RUN ...          with -- torchrun does not take --start for its own
    python train.py --stage gram --start runs/s --gram_teacher runs/s@40000 --out runs/s-gram        Gram anchoring
    python train.py --stage highres --start runs/s-gram --out runs/s-highres                         high resolution

    schedule               values for all steps, as arrays
    teacher_targets        balanced assignments of the global crops      DINOv3 §3.2
    loss_terms             DINO, iBOT, KoLeo; stages.py has Gram         DINOv3 eq. 1, eq. 3
    train                  the loop

Everything random in a step is a function of (seed, step, sample or block). Dimension letters: see the top of model.py.
"""

import math
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import ops
from convnext import ConvNeXt, ConvNeXtConfig
from data import Batches, colour_batch, loader
from engine import config as command_line
from engine import fp8, plan
from engine.adam import AdamW16
from engine.adapt import Regression, apart
from engine.channels import reader
from engine.checkpoint import begin_state, check_space, load_checkpoint
from engine.interrupt import Interrupt, Peers, Verdicts
from engine.meters import health
from engine.profile import tracer
from engine.progress import Progress, open_log
from engine.ranks import choose_precision, count_workers, start_ranks
from engine.saver import Saver
from engine.sources import open_source
from engine.stages import describe, first_state, gram_term, make_gram_teacher, refresh, refreshes
from losses import balanced, dino_losses, ibot_loss, koleo_loss
from model import Noise, ProjectionHead, ViT, initialise, to_device
from recipes import configure, find_recipe, fingerprint, size_for

# --------------------------------------------------------------------------------
# Networks and optimizer


def schedule(start, peak, end, warmup, steps, cosine_warmup=False):
    """
    Values for all steps, float64: linear, or by half a cosine, from start to peak over `warmup` steps, then a cosine to
    end at the last step.

    differs: the first value is one step up from start, so that a learning rate that warms up from 0 is never 0, and the
             peak is that of the first step after the warm-up; the released code's begins with start, and stops one
             step short of end
    """
    ramp = np.arange(1, warmup + 1) / (warmup + 1)
    ramp = start + (peak - start) * ((1 - np.cos(np.pi * ramp)) / 2 if cosine_warmup else ramp)
    t = np.linspace(0, 1, max(steps - warmup, 1))
    return np.concatenate([ramp, end + (peak - end) * (1 + np.cos(np.pi * t)) / 2])[:steps]


def settle(c, ranks):
    """c with the precision that this machine has in place of auto. Raises ValueError for fp8 where it has none."""
    if c.precision == "fp8":
        fp8.check(ranks.device)
    return replace(c, precision=choose_precision(c.precision, ranks.device))


def make_networks(c):
    D, stds = c.vit.width, (c.vit.init_std, c.prototype_std)
    return nn.ModuleDict(dict(
        backbone=(ConvNeXt if isinstance(c.vit, ConvNeXtConfig) else ViT)(c.vit),
        dino_head=ProjectionHead(D, c.dino_hidden, c.dino_bottleneck, c.dino_prototypes, *stds),
        ibot_head=ProjectionHead(D, c.ibot_hidden, c.ibot_bottleneck, c.ibot_prototypes, *stds),
    ))


def build_networks(c, ranks, make=make_networks, stays=False):
    """Student or teacher: the same start values; sharded over the ranks, block by block, if there are several."""
    with torch.device("meta"):
        networks = make(c)
    networks["backbone"].checkpointing = c.checkpointing
    if not c.n_local and getattr(c.vit, "local_norm", False):
        networks["backbone"].local_cls_norm.requires_grad_(False)  # no crop passes it
    if c.precision == "fp8":
        fp8.convert(networks["backbone"])
    if c.compile:
        for block in networks["backbone"].blocks:
            block.compile()
    prototypes = [head.last_layer for name, head in networks.items() if name.endswith("_head")]
    shard_parts(c, ranks, [*networks["backbone"].blocks, *prototypes, *networks.values()], stays)
    return initialise(networks.to_empty(device=ranks.device), c.seed)


def shard_parts(c, ranks, parts, stays=False):
    """
    Cuts each part's parameters over the ranks, in place, if there are several; inner parts come first.

    stays  what a forward has gathered stays until the backward pass: for a network that has one
    """
    if ranks.group is None:
        return
    if c.replicas == 1:
        mesh = DeviceMesh.from_group(ranks.group, ranks.device.type)
    else:
        mesh = init_device_mesh(ranks.device.type, (c.replicas, ranks.count // c.replicas),
                                mesh_dim_names=("replicas", "shards"))
    # autocast computes in bf16; the shards stay float32, and travel as bf16 where that is what will be used
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = bf16 if c.precision != "fp32" and ranks.device.type == "cuda" else MixedPrecisionPolicy()
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=not stays)


def freeze(c, ranks, network, parts=None):
    """
    A network that is not trained, on the meta device -> on this rank's, empty, its parts sharded. What is whole there
    is bfloat16 where autocast rounds it.    parts  None = its blocks, then itself
    """
    shard_parts(c, ranks, [*network.blocks, network] if parts is None else parts)
    rounded = [part for part in network.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    for part in rounded if c.precision in ("bf16", "fp8") else ():
        if not isinstance(part.weight, DTensor):
            part.bfloat16()
    return network.to_empty(device=ranks.device).requires_grad_(False).eval()


def parameter_groups(c, student):
    """
    AdamW's groups, of equal lr factor and equal decay.

    lr factor  layer_decay^(L+1-layer)    decay  none for biases, norms, LayerScale: all that is not a matrix
    still      first steps, of the stage, in which it does not move
    """
    groups, depths = {}, getattr(c.vit, "depths", [c.vit.depth])
    for name, p in filter(lambda pair: pair[1].requires_grad, student.named_parameters()):
        stem = name.startswith(("backbone.patch_embed.", "backbone.downsample_layers.0."))
        factor = c.layer_decay ** (sum(depths) + 1 - layer_of(name, depths)) * (c.patch_embed_lr if stem else 1)
        still = c.freeze_backbone * name.startswith("backbone.") or c.freeze_last_layer * ("last_layer" in name)
        factor *= c.backbone_lr if name.startswith("backbone.") else 1
        groups.setdefault((factor, p.ndim > 1, still), []).append(p)
    return [dict(params=params, lr_factor=factor, decays=decays, still=still)
            for (factor, decays, still), params in groups.items()]


def make_optimizer(c, student):
    groups, betas = parameter_groups(c, student), (c.beta1, c.beta2)
    if c.moments == "bf16":
        return AdamW16(groups, {p: name for name, p in student.named_parameters()}, betas, c.seed)
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def layer_of(name, depths):
    """0 = embeddings and tokens, block i = i+1, L+1 = final norm and heads; a downsampling: that of the block before"""
    where, part, *place = name.split(".")
    if where != "backbone" or "norm" in part:
        return sum(depths) + 1
    before = sum(depths[: int(place[0])]) if part in ("stages", "downsample_layers") else 0
    return before + (int(place[part == "stages"]) + 1 if part in ("blocks", "stages") else 0)


def set_schedules(optimizer, lr, weight_decay, step):
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if step < group["still"] else lr * group["lr_factor"]
        group["weight_decay"] = weight_decay * group["decays"]


def clip_gradients(student, clip):
    """Backbone and heads each to norm `clip`; returns their norms, 0-dim float32."""
    norms = {}
    for name, part in student.items():
        norm = nn.utils.clip_grad_norm_(part.parameters(), clip or math.inf)
        norms[f"grad_norm_{name}"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms


def share_gradients(student, last):
    """Whether ranks add up their gradients in the next backward pass: in that of the last part."""
    for part in student.values():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(last)


@torch.no_grad()
def update_ema(teacher, student, momentum):
    """teacher <- momentum teacher + (1 - momentum) student, in place, each rank its shards (even or not)."""
    local = [[p.to_local() if isinstance(p, DTensor) else p for p in n.parameters()] for n in (teacher, student)]
    assert all(a.shape == b.shape for a, b in zip(*local, strict=True))
    torch._foreach_lerp_(*local, 1 - momentum)

# --------------------------------------------------------------------------------
# Objective


def teacher_targets(teacher, parts, temperature, group, n_iterations=3):
    """
    Assignments of the two global crops, unmasked, balanced over all parts of the batch; for each part a dict of

        dino  G B K    ibot  M K                                                         paper: §3.2
    """
    dino, ibot = [], []
    for batch in parts:
        features = teacher["backbone"](batch["global_crops"])
        dino.append(teacher["dino_head"](features.cls))                                  # (G B) K
        ibot.append(teacher["ibot_head"](features.patches.flatten(0, 1).index_select(0, batch["masked"])))  # M K
    dino, ibot = (balanced(logits, temperature, n_iterations=n_iterations, group=group) for logits in (dino, ibot))
    return [dict(dino=d.unflatten(0, (2, -1)), ibot=i) for d, i in zip(dino, ibot, strict=True)]


def loss_terms(c, student, batch, targets, noise, group):
    """
    The unweighted terms of eq. 1, 0-dim float32 each, and the features of the global crops.

    dino_global  a global crop predicts the other one    dino_local  every local crop predicts both
    """
    crops, masks = [batch["global_crops"]], [batch["masks"]]
    if c.n_local:
        crops, masks = [*crops, batch["local_crops"]], [*masks, None]
    features = student["backbone"](crops, masks, noise)
    g, B, weights = features[0], len(batch["indices"]), term_weights(c)
    logits = student["dino_head"](torch.cat([f.cls for f in features])).unflatten(0, (-1, B))    # G+L B K
    ibot = student["ibot_head"](g.patches.flatten(0, 1).index_select(0, batch["masked"]))        # M K
    cls = g.cls.unflatten(0, (2, B))                                                             # G B D
    dino_global, dino_local = dino_losses(logits, targets["dino"], 2, c.student_temp,
                                          (weights["dino_global"], weights["dino_local"]))
    terms = dict(
        dino_global=dino_global,
        ibot=ibot_loss(ibot, targets["ibot"], batch["weights"], 2 * B, c.student_temp, weights["ibot"]),
        koleo=sum(koleo_loss(crop, group, c.koleo_group) for crop in cls),
    )
    if c.n_local:
        terms["dino_local"] = dino_local
    return terms, g


def term_weights(c):
    """Of the sum over terms and parts. The DINO terms share 1 by their number of pairs: 2 global, 2 L local ones."""
    pairs = 2 + 2 * c.n_local
    weights = dict(dino_global=2 / pairs, dino_local=2 * c.n_local / pairs * c.local_weight, ibot=c.ibot_weight,
                   koleo=c.koleo_weight, gram=c.gram_weight)
    return {name: weight / c.accumulate for name, weight in weights.items()}

# --------------------------------------------------------------------------------
# Reports


def print_plan(c, ranks, source, student):
    n = {name: sum(p.numel() for p in part.parameters()) for name, part in student.items()}
    where = f"{ranks}, {ops.describe(ranks.device)}"
    side = c.global_size // c.patch_size
    name = f"{c.size} {c.recipe}".strip()
    print(f"{name}, {c.stage}: backbone {n['backbone']:,} parameters, heads {n['dino_head'] + n['ibot_head']:,}; "
          f"{len(source):,} images of {c.data}; {where}, {c.precision}")
    print(f"{c.steps:,} steps of {c.batch} images: 2 crops of {c.global_size} px ({side}x{side} patches), "
          f"{c.n_local} of {c.local_size} px")
    print(f"lr {c.lr:g} x 4 sqrt({c.batch}/1024) = {c.lr * c.lr_factor:.3g} after {c.lr_warmup} steps, to "
          f"{c.lr_end * c.lr_factor:.3g}; last layer fixed for {c.freeze_last_layer}; teacher temperature "
          f"{c.teacher_temp_start} to {c.teacher_temp} over {c.teacher_temp_warmup}")
    for line in describe(c):
        print(line)
    print(f"uniform predictions would be at dino ln K = {math.log(c.dino_prototypes):.3f}, "
          f"ibot x {c.mask_share:g} = {c.mask_share * math.log(c.ibot_prototypes):.3f}; writing to {c.out}", flush=True)

# --------------------------------------------------------------------------------
# The loop


def train(c, ranks, interrupt):
    """Trains; returns whether all steps are done, False after an interrupt.    paper: §3.2"""
    samples = plan.samples_of_a_part(c, ranks.count)
    stays = plan.announce(c, ranks, make_networks)
    source, held = apart(open_source(c.data, c.n_shapes, c.seed, reader(c, c)), c)
    student, teacher = build_networks(c, ranks, stays=stays), build_networks(c, ranks)
    teacher.requires_grad_(False).eval()
    optimizer = make_optimizer(c, student)
    begin_state(optimizer)
    gram = make_gram_teacher(c, partial(freeze, c, ranks))
    state = student, teacher, optimizer, gram
    start = (load_checkpoint if c.resume else first_state)(c, ranks, *state)
    ranks.together(lambda: ranks.main and begin(c, ranks, start, source, *state))

    lr = schedule(0, c.lr, c.lr_end, c.lr_warmup, c.steps, c.cosine_warmup) * c.lr_factor
    weight_decay = schedule(0, c.weight_decay, c.weight_decay_end, 0, c.steps)
    momentum = schedule(0, c.momentum, c.momentum_end, 0, c.steps)
    teacher_temp = schedule(c.teacher_temp_start, c.teacher_temp, c.teacher_temp, c.teacher_temp_warmup, c.steps)
    K = c.accumulate
    batches = Batches(c, source, ranks.rank * K * samples, samples, partial(draw_noise, c, samples), K)
    batches.read(start, 0, [])  # if nothing can be read, say so here and not from a worker
    stream = loader(batches, range(start * K, c.end * K), count_workers(c.workers),
                    pin_memory=ranks.device.type == "cuda")
    verdicts = Verdicts(ranks, interrupt, source.name)
    saver = Saver(c, ranks, *state, failed=interrupt.leave)
    regression = Regression(c, ranks, held, gram, start)
    progress, trace = Progress(c, ranks, start, c.end), tracer(c, ranks, c.end - start)
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=c.precision != "fp32")

    for step in range(start, c.end + 1):
        # save: at the end, once in a while, and before leaving
        leave = step == c.end or step == start + c.stop_after > start or verdicts.leave
        if step > start and (leave or step % c.save_every == 0):
            verdicts.settle()
            saver.settle()
            regression.look(step, teacher["backbone"])
            saver(step, wait=leave)
        trace(leave)
        if leave:
            break

        # a batch, in parts, and this step's numbers; t counts the steps of the stage
        parts = [on_device(c, ranks, progress.next(stream)) for _ in range(K)]
        t, now = step - c.began, c.at(step)
        weights = term_weights(now)
        set_schedules(optimizer, lr[t], weight_decay[t], t)
        if refreshes(c, step):
            refresh(gram, teacher)

        # the teacher sees the global crops whole and leaves no graph
        with autocast, torch.no_grad():
            targets = teacher_targets(teacher, parts, teacher_temp[t], ranks.group, c.sinkhorn_iterations)

        # forward and backward, part by part
        found = []
        for k, batch in enumerate(parts):
            with autocast:
                terms, features = loss_terms(now, student, batch, targets[k], batch["noise"], ranks.group)
                terms |= gram_term(c, gram, batch, features)
            loss = sum(weights[name] * term for name, term in terms.items())
            share_gradients(student, k == K - 1)
            loss.backward()
            found.append(dict(loss=K * loss.detach(), **terms))

        # update, unless a number is not finite; the teacher follows the student's new weights
        norms = clip_gradients(student, c.clip)
        means = verdicts.judge(step, mean_of(found), norms, torch.cat([batch["indices"] for batch in parts]))
        optimizer.found_inf, optimizer.at = verdicts.skip, step
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(teacher, student, momentum[t])
        interrupt.collect(step)

        # log: the only lines that make the host wait for the device
        progress.bar.update()
        if step % c.log_every == 0 or step == c.end - 1:
            verdicts.settle()
            row = {name: x.item() for name, x in means.items()} | health(c, targets[-1], features, batch["masks"])
            row |= progress.speed(step)
            if ranks.main:
                progress.log(c.out, dict(step=step, **row, lr=lr[t], skipped=verdicts.skipped,
                                         unreadable=len(progress.unreadable)))
            progress.mark(step)

    progress.bar.close()
    report(c, ranks, step, progress.unreadable)
    regression.conclude(step == c.end)
    return step == c.end


def begin(c, ranks, start, source, student, teacher, optimizer, gram):
    """On main, before the first step: is it the same data, is there room; what will be done; config.json."""
    notes = fingerprint(c, source) | ({} if gram is None else dict(gram=asdict(gram.config)))
    check_space(c, start, student, teacher, optimizer, gram)
    print_plan(c, ranks, source, student)
    open_log(c, start, lr_scaled=c.lr * c.lr_factor, parameters=asdict(c.vit), **notes)


def mean_of(rows):
    """[{name: 0-dim tensor}] -> the mean of each, without a graph"""
    return {name: sum(row[name].detach() for row in rows) / len(rows) for name in rows[0]}


def draw_noise(c, samples, step, first):
    """What is random in the student's forward of a step; no function of the device, so it is drawn with the batch."""
    c = c.at(step)
    grids = [(side // c.patch_size) ** 2 for side in (c.global_size, c.local_size)][: 1 + bool(c.n_local)]
    noise = Noise(c.seed, step, first, samples, c.group, c.drop_path, c.rope_rescale)
    n_images = [2 * samples, c.n_local * samples][: len(grids)]
    return noise.draw(c.vit.depth, n_images, [1 + c.vit.n_registers + P for P in grids])


def on_device(c, ranks, batch):
    """The batch on this rank's device, coloured; its indices stay on the host."""
    stays = {k: batch.pop(k) for k in ("indices", "colours") if k in batch}
    return colour_batch(to_device(batch, ranks.device) | stays, c)


def report(c, ranks, step, unreadable):
    for name, reason in unreadable.items():
        print(f"rank {ranks.rank}: skipped unreadable {name}: {reason}")
    if ranks.main:
        print(f"{'finished' if step == c.end else f'stopped at step {step} of {c.end}, --resume goes on'}: "
              f"{c.out}/teacher.safetensors")


def main(argv):
    if "--help" in argv or "-h" in argv:
        size, name = (argv[argv.index(option) + 1] if option in argv[:-1] else default
                      for option, default in (("--size", ""), ("--recipe", "")))
        print(__doc__.strip(), command_line.describe(find_recipe(size or size_for(name), name)),
              "  --plan               print what a step needs and costs, and start nothing\n"
              + command_line.describe(plan.Plan()), sep="\n\n")
        return
    if "--plan" in argv:
        return plan.main(argv, partial(configure, starts=False), make_networks)
    c = configure(argv)
    with Interrupt() as interrupt, Peers(start_ranks(c.device)) as ranks:
        return train(settle(c, ranks), ranks, interrupt)


if __name__ == "__main__":
    command_line.run(main)
