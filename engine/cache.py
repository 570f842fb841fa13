"""
What a frozen teacher says, on disk: a later run over the same batches reads it, and the teacher stays idle.

    folder_of    where the words of one teacher are kept     distill.py --cache DIR
    Cached       training batches, with those words beside

A file is named after what the teacher looks at, pixels, colours and masks: another seed, other crops, a photo that was
replaced or can no longer be read give it another name; other students, rates and numbers of steps do not.
"""

import hashlib
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from data import Batches

SAID = "cls", "patches"  # teacher_says in distill.py


def folder_of(c, teacher, device):
    """A folder in --cache for this teacher and its arithmetic, made; raises ValueError if it cannot be."""
    digest = hashlib.sha1(repr((teacher["backbone"].config, c.mode, c.precision, device.type,
                                c.teacher_scale)).encode())
    for name, x in teacher.state_dict().items():
        digest.update(name.encode() + x.flatten()[:1024].float().cpu().numpy().tobytes())
    folder = Path(c.cache, digest.hexdigest()[:16])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--cache {c.cache}: {error.strerror}; name a folder that can be written") from error
    return folder


class Cached(Batches):
    """
    cached[step] -> the batch; beside it `path`, the file for what the teacher says of it, and what is in that file, if
    it is there and whole. The arguments are those of Batches, and the folder.
    """
    full = False

    def __init__(self, config, source, first, samples, folder):
        super().__init__(config, source, first, samples)
        self.folder = folder

    def __getitem__(self, step):
        batch, digest = super().__getitem__(step), hashlib.sha1()
        for x in (batch["global_crops"], batch["colours"][0], batch["masked"]):
            digest.update(x.numpy())
        path = self.folder / digest.hexdigest()
        try:
            said = load_file(path)
        except (OSError, SafetensorError):  # not there, or damaged: the teacher says it again, and it is replaced
            said = {}
        return batch | said | dict(path=str(path))

    def keep(self, path, batch):
        """Writes what the teacher says of a batch, whole or not at all; a full disk ends that, and not the run."""
        new = Path(f"{path}.{os.getpid()}")
        try:
            if not self.full:
                new.write_bytes(save({name: batch[name].cpu().contiguous() for name in SAID}))
                new.replace(path)
        except OSError as error:
            self.full = True
            new.unlink(missing_ok=True)
            print(f"--cache {self.folder}: {error.strerror}; nothing more is kept, the run goes on", flush=True)

    def describe(self, batch):
        """What it takes on disk, in words.    batch  of this rank, with what the teacher says"""
        c, free = self.config, shutil.disk_usage(self.folder).free
        size = sum(batch[name].nbytes for name in SAID) * c.batch // self.samples
        return (f"the cache takes {size:,} bytes for each step, {size * c.steps:,} for the run; "
                f"{free:,} are free in {self.folder}")
