"""
Heads that a task has trained: kept in --out, and read again with --head, when nothing is trained.

    head_of   the head of --head, or one that is trained and kept
    released  whether --head is no file of ours
    check     of --head, before anything is loaded: is it of this task, this decoder, a network of this size
    load, save

The file is safetensors: the parameters, and in its metadata what they answer, of which features, of which weights.
"""

import json
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from engine.layouts import size_of
from engine.shards import Entry, write_tensors

FILE = "head.safetensors"


def head_of(build, train, outputs, frozen, c):
    """
    build    width -> module    train  () -> (module, what is known of it: {name: number})    outputs  in words
    returns  the same of --head, or trained, and kept in --out;  raises ValueError if --head has other outputs
    """
    if c.head:
        return load(build, outputs, frozen, c)
    head, said = train()
    if c.out and frozen.ranks.main:
        save(head, said, outputs, frozen, c)
    return head, said


def asked(task, c, config):
    """What must agree between a file and a task."""
    return dict(metric=task.heads or task.metric, decoder=getattr(c, "decoder", "linear"), backbone=size_of(config),
                layers=getattr(c, "layers", ""), norm=str(getattr(c, "norm", True)))


def check(task, c, config):
    """What its file says. Raises ValueError."""
    if c.control or getattr(c, "shots", 0):
        raise ValueError("--head: nothing is trained, so --control and --shots mean nothing; leave them out")
    if getattr(c, "layers", "") == "each":
        raise ValueError("--head is of certain blocks, not of each one; name them, or leave out --layers")
    if released(task, c):
        return {}
    try:
        with safe_open(c.head, "pt") as file:
            about = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--head {c.head} cannot be read ({error}); wanted {FILE} of an earlier --out") from error
    for name, value in asked(task, c, config).items():
        if about.get(name) != value:
            raise ValueError(f"--head {c.head} has {name} {about.get(name)!r}, this command {value!r}; name a head "
                             "that was trained for it")
    return about


def released(task, c):
    """Whether --head is a file of other layouts, which the task gives to load_decoder"""
    return bool(c.head and task.released) and c.decoder in task.released and Path(c.head).suffix == ".pth"


def load(build, outputs, frozen, c):
    about = check(frozen.task, c, frozen.model.config)
    if about["outputs"] != outputs:
        raise ValueError(f"--head {c.head} answers in {about['outputs']}, {c.data} wants {outputs}")
    if about["weights"] != frozen.about["weights"]:
        print(f"--head {c.head} was trained on features of other weights than {c.weights}")
    head = build(int(about["width"]))
    with safe_open(c.head, "pt") as file:
        head.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    return head.to(frozen.device).eval(), json.loads(about["said"])


def save(head, said, outputs, frozen, c):
    about = asked(frozen.task, c, frozen.model.config) | dict(
        outputs=outputs, width=str(head.width), weights=frozen.about["weights"], said=json.dumps(said))
    path = Path(c.out, FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    entries = {name: Entry(tuple(x.shape), x.dtype, partial(iter, [x])) for name, x in head.state_dict().items()}
    write_tensors(new, entries, about | {"format": "pt"})
    new.replace(path)
    print(f"wrote {path}: --head reads it")
