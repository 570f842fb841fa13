"""
What a training by decoders/fit.py must be, whatever the decoder.    trained(ranks=, stop=, out=) -> parameters, flat;
loss on held-out images.  It stands in a module, as other processes read it; stop  a SIGTERM before so many views
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from decoders.fit import FILE
from engine.ranks import Ranks


def as_rank(rank, folder, trained):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    torch.save(trained(ranks=Ranks(rank, 2, group=dist.group.WORLD)), f"{folder}/{rank}")
    dist.destroy_process_group()


def two_ranks_are_one(trained, folder):
    exact, loss = trained()
    mp.spawn(as_rank, (folder, trained), nprocs=2)
    for rank in range(2):
        found, same = torch.load(folder / f"{rank}")
        assert (found - exact).norm() / exact.norm() < 1e-5 and same == pytest.approx(loss, rel=1e-4)


def goes_on_where_it_was(trained, folder, capsys):
    exact, loss = trained(out=str(folder))
    with pytest.raises(KeyboardInterrupt):
        trained(out=str(folder), stop=8)
    assert (folder / FILE).is_file()
    found, same = trained(out=str(folder))
    assert "goes on from step" in capsys.readouterr().out and torch.equal(found, exact) and same == loss
