"""engine/order.py: every image once an epoch at any size, exact shares, and nothing that the past or a rank decides."""

import math
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from engine.order import Order, Part, deal, permutation, windows

KEY = 7, 5, 3, 0
SIZES = 1, 2, 3, 5, 12, 65_536, 65_537, 10**6 + 3
PAPER = 1_689_000_000  # images


class Plain:
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

# --------------------------------------------------------------------------------
# Permutations


@pytest.mark.parametrize("size", SIZES)
def test_every_image_comes_once(size):
    found = permutation(size, *KEY)(np.arange(size))
    assert np.array_equal(np.sort(found), np.arange(size))
    assert size < 12 or (found != permutation(size, 7, 5, 4, 0)(np.arange(size))).mean() > 0.8


def test_short_ranges_are_numpys():
    assert np.array_equal(permutation(65_536, *KEY)(np.arange(65_536)), np.random.default_rng(KEY).permutation(65_536))


def by_hand(i, size, keys):
    """The network and its walk, line by line."""
    side = math.isqrt(size - 1) + 1
    while True:
        left, right = i // side, i % side
        for key in keys:
            z = right ^ key
            z = ((z ^ z >> 30) * 0xbf58476d1ce4e5b9) % 2**64
            z = ((z ^ z >> 27) * 0x94d049bb133111eb) % 2**64
            z = z ^ z >> 31
            left, right = right, (left + (z // 2**32 * side // 2**32) % side) % side
        i = left * side + right
        if i < size:
            return i


@pytest.mark.parametrize("size", [65_537, 257**2, PAPER, 2**40 + 1])
def test_the_network_is_the_formula(size):
    places, keys = [*range(50), size // 2, size - 1], np.random.SeedSequence(KEY).generate_state(6, "u8").tolist()
    expected = [by_hand(i, size, keys) for i in places]
    assert permutation(size, *KEY)(np.array(places)).tolist() == expected
    assert [permutation(size, *KEY)(i) for i in places] == expected


def test_neighbours_are_torn_apart():
    """Lag 1 uncorrelated, and pairs even over 16 x 16 cells: within three sigma, 255 +- 3 sqrt(2 x 255)."""
    size = 400_000
    found = permutation(size, *KEY)(np.arange(size))
    x = found / size
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 3 / math.sqrt(size)                          # measured 1.1 sigma
    cells = np.bincount(found[1:] * 16 // size * 16 + found[:-1] * 16 // size, minlength=256)
    assert abs(((cells - (size - 1) / 256) ** 2 / ((size - 1) / 256)).sum() - 255) < 3 * math.sqrt(510)


def test_no_table_at_the_papers_size():
    tracemalloc.start()
    order = Order(Plain(PAPER), 0, 4096)
    drawn = [next(order(step, i)) for step in (0, 10**6) for i in range(2500)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(drawn)) > 4990 and 0 <= min(drawn) and max(drawn) < PAPER
    assert peak < 4e6                                                        # bytes; measured 2.2e6, a block of `deal`


def test_an_index_costs_microseconds():
    """Of process time, with room for a machine that is busy: measured 80 ns of many at once, 4.8 us one by one."""
    shuffled, many = permutation(PAPER, *KEY), np.arange(100_000) * 1000
    start = time.process_time()
    shuffled(many)
    assert (time.process_time() - start) / len(many) < 1e-6
    start = time.process_time()
    for i in range(3000):
        shuffled(i)
    assert (time.process_time() - start) / 3000 < 60e-6


@pytest.mark.parametrize("size", [1, 5, 63, 64, 65, 1000, 70_000])
def test_windows_visit_every_image_once_and_64_neighbours_in_a_row(size):
    found = np.array([windows(size, *KEY)(i) for i in range(size)])
    assert np.array_equal(np.sort(found), np.arange(size))
    runs = [set(found[i : i + 64] // 64) for i in range(0, size - 127, 64)]
    assert sum(len(run) == 1 for run in runs) >= len(runs) - 1           # but where the last, shorter one was drawn
    if size == 70_000:
        starts = found[::64] // 64
        assert abs(np.corrcoef(starts[1:], starts[:-1])[0, 1]) < 0.1     # 1094 windows, sigma 0.03
        inside = [(found[i : i + 64] % 64).tolist() for i in (0, 64)]
        assert inside[0] != inside[1] and sorted(inside[0]) == list(range(64)) != inside[0]
        assert [windows(size, 7, 5, 4, 0)(i) for i in range(64)] != found[:64].tolist()

# --------------------------------------------------------------------------------
# Shares


def test_a_deal_is_exact_in_every_block():
    counts = [3, 0, 50, 11]
    dealt = [deal(n, counts, 1, 2) for n in range(64 * 5)]
    blocks = [[kind for kind, _ in dealt[64 * block : 64 * block + 64]] for block in range(5)]
    assert all([kinds.count(k) for k in range(4)] == counts for kinds in blocks) and blocks[0] != blocks[1]
    for kind in range(4):
        assert [before for k, before in dealt if k == kind] == list(range(5 * counts[kind]))  # in order, none left out
    assert dealt != [deal(n, counts, 1, 3) for n in range(64 * 5)]
    assert deal(64 * 4 + 9, counts, 1, 2) == dealt[64 * 4 + 9]


def test_of_one_kind_nothing_is_dealt():
    assert [deal(n, [0, 1000], 0) for n in (0, 1, 999, 1000, 12_345)] == [(1, n) for n in (0, 1, 999, 1000, 12_345)]


def drawn(order, steps, batch):
    return [[next(order(step, i)) for i in range(batch)] for step in steps]


def test_a_plain_source_is_read_epoch_by_epoch_as_numpy_shuffles_it():
    found = sum(drawn(Order(Plain(12), 7, 8), range(6), 8), [])
    assert found == [i for epoch in range(4) for i in np.random.default_rng([7, 5, epoch]).permutation(12)]


def mixture():
    """A tenth of the steps of the first part alone; of the others' samples a quarter and three."""
    parts = [Part(6, 0, 100), Part(40, 16_384), Part(1000, 49_152)]
    return SimpleNamespace(parts=parts)


def test_a_mixture_keeps_its_shares():
    steps = np.array(drawn(Order(mixture(), 3, 8), range(2000), 8))
    pure = (steps < 6).all(1)
    assert ((steps < 6).any(1) == pure).all() and [pure[:1000].sum(), pure[1000:].sum()] == [100, 100]
    epochs = steps[pure].ravel()[: 6 * 266].reshape(-1, 6)
    assert (np.sort(epochs) == np.arange(6)).all()                                # whole epochs, and another order each
    assert len(np.unique(epochs, axis=0)) > 200
    mixed = steps[~pure].ravel()
    few = mixed[mixed < 46]
    assert abs(len(few) / len(mixed) - 0.25) < 0.02                              # 14,400 of a deal of 65,536
    assert (np.sort(few[:3560].reshape(-1, 40)) == np.arange(6, 46)).all()
    many = mixed[mixed >= 46]
    assert len(set(many[:1000])) == 1000 and steps.max() == 1045


def test_a_mixture_is_a_function_of_seed_step_and_sample():
    whole = drawn(Order(mixture(), 3, 8), range(40), 8)
    later = Order(mixture(), 3, 8)
    assert [next(later(step, i)) for step in (39, 7) for i in (5, 2)] == [whole[39][5], whole[39][2], whole[7][5],
                                                                           whole[7][2]]
    assert drawn(Order(mixture(), 4, 8), range(40), 8) != whole


@pytest.mark.parametrize("size, tries", [(5, 5), (1000, 64)])
def test_the_next_in_the_order_stand_in(size, tries):
    order = Order(Plain(size), 0, 4)
    found = list(order(1, 3))
    epoch = np.random.default_rng([0, 5, 7 // size]).permutation(size)
    assert found == [epoch[(7 + k) % size] for k in range(tries)]


def test_stand_ins_are_of_the_same_part():
    order = Order(mixture(), 3, 8)
    step = next(step for step in range(1000) if next(order(step, 0)) < 6)
    assert sorted(order(step, 0)) == list(range(6))


def test_parts_have_orders_of_their_own():
    twins = SimpleNamespace(parts=[Part(30, 32_768), Part(30, 32_768)])
    found = sum(drawn(Order(twins, 3, 8), range(30), 8), [])
    one, two = [i for i in found if i < 30][:30], [i - 30 for i in found if i >= 30][:30]
    assert sorted(one) == sorted(two) == list(range(30)) and one != two


def test_windows_by_name():
    source = Plain(640)
    near, far = ([next(Order(source, 0, 64, name)(0, i)) // 64 for i in range(64)] for name in ("windows", "random"))
    assert len(set(near)) == 1 and len(set(far)) == 10
