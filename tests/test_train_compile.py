"""train.py --compile: the losses of the run without, on one rank and on two, and nothing is compiled again."""

import pytest
import torch
from test_train import rows, run, torchrun
from test_train_ranks import apart

pytestmark = pytest.mark.long  # a compiler at work


@pytest.mark.parametrize("words", ["", "--checkpointing full", "--kernels off"])
def test_compiled_is_eager(words, tmp_path):
    eager = run(tmp_path / "eager", *words.split())
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled, counts = [], []
    run(tmp_path / "compiled", "--compile", "--stop_after", "2", *words.split())
    counts.append(dict(torch._dynamo.utils.counters["stats"]))
    with torch._dynamo.config.patch(error_on_recompile=True):  # of blocks that have been compiled
        compiled = run(tmp_path / "whole", "--compile", *words.split())
    assert apart(eager, compiled) < 1e-4 and not torch._dynamo.utils.counters["graph_break"]
    print(counts, f"apart by {apart(eager, compiled):.1e}")


def test_two_ranks_compiled_are_one(tmp_path):
    eager = run(tmp_path / "one")
    torchrun(tmp_path / "two", "--compile")  # forked, the compiler's own processes would be lost
    assert apart(eager, rows(tmp_path / "two")) < 1e-4
