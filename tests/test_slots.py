"""What workers hand over arrives as it was made, in memory that is used again once nobody has it."""

import gc
import io

import numpy as np
import pytest
import torch

from data import loader
from engine import slots
from engine.slots import ALIGN, KNOWN, SLOTS, Lending, Pickler, lent

ODD = ([], torch.zeros(0, 3), "a", 7, dict(x=torch.tensor(True), y=(torch.arange(3, dtype=torch.int16), None)),
       [torch.full((2, 3), 1.5, dtype=torch.bfloat16), torch.arange(24.0).view(2, 3, 4)[:, :, ::2]], np.arange(3))


class Items:
    def __init__(self, make):
        self.make = make

    def __getitem__(self, i):
        return self.make(i)


def of_size(i):
    """As long as its number says"""
    return dict(i=i, x=torch.full((1 + 100 * i,), i, dtype=torch.uint8))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return np.array_equal(a, b)


@pytest.mark.parametrize("workers", [1, 2])
def test_items_arrive_as_they_are(workers):
    found = [*loader(Items(lambda i: ODD if i % 2 else "nothing but words"), range(6), workers)]
    assert all(same(item, ODD if i % 2 else "nothing but words") for i, item in enumerate(found))
    assert not KNOWN


def test_items_that_are_kept_stay_as_they_are():
    """more of them than there are slots; of sizes that outgrow these"""
    kept = [*loader(Items(of_size), range(40), 2)]
    assert all(item["i"] == i and item["x"].shape == (1 + 100 * i,) and (item["x"] == i).all()
               for i, item in enumerate(kept))
    views = [item["x"][-1:] for item in loader(Items(of_size), range(20), 1)]  # of tensors that are gone themselves
    assert [int(x) for x in views] == [*range(20)]


def test_a_slot_is_used_again_when_its_last_tensor_is_gone():
    with lent(Items(lambda i: (torch.full((5,), i), torch.tensor(i)))) as items:
        def get(i):
            sent = items[i].where
            return sent[2], sent[3] is not None, slots.receive(*sent)
        slot, new, (x, y) = get(1)
        assert (slot, new) == (0, True)
        part = x[1:3]
        slot, new, other = get(2)
        assert (slot, new) == (1, True)         # the first is in use
        del x, y
        assert get(3)[:2] == (2, True)          # by `part` alone, still
        del part
        gc.collect()
        slot, new, again = get(4)
        assert (slot, new) == (0, False)        # not sent a second time
        assert same(again, (torch.full((5,), 4), torch.tensor(4)))
        assert same(other, (torch.full((5,), 2), torch.tensor(2)))


def test_when_all_slots_are_in_use_an_item_goes_its_own_way():
    with lent(Items(lambda i: torch.tensor([i]))) as items:
        kept = [slots.receive(*items[i].where) for i in range(SLOTS)]
        assert torch.equal(items[9], torch.tensor([9])) and len(items.slots) == SLOTS
        assert torch.cat(kept).tolist() == [*range(SLOTS)]
        del kept[2]
        assert items[9].where[2] == 2


def test_a_slot_too_small_is_replaced_and_what_lay_in_it_is_not_touched():
    with lent(Items(of_size)) as items:
        small = slots.receive(*items[1].where)
        assert items[9].where[2] == 1
        free = small["x"].clone()
        del small
        number, worker, slot, new, notes = items[50].where
        assert slot == 0 and len(new) >= 5001 + ALIGN and same(slots.receive(number, worker, slot, new, notes),
                                                                       of_size(50))
        assert (free == 1).all()


def test_where_tensors_lie():
    notes = Pickler(io.BytesIO())
    notes.dump([torch.zeros(65, dtype=torch.uint8), torch.zeros(()), torch.zeros(0)])
    assert [place[0] for place, _ in notes.tensors] == [ALIGN, 3 * ALIGN, 4 * ALIGN] and notes.end == 4 * ALIGN


def test_what_arrives_late_is_dropped():
    with lent(Items(of_size)) as items:
        sent = items[1].where
    assert slots.receive(*sent) is None


def test_errors_come_as_ever():
    def fail(i):
        raise ValueError("no such thing")
    with pytest.raises(ValueError, match="^no such thing$"):
        [*loader(Items(fail), range(2), 1)]
    assert isinstance(Lending(Items(lambda i: OSError("gone")), 0)[0], OSError)
