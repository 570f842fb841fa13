"""Balanced sampling: by hand, and what holds of any numbers."""

import numpy as np
import pytest

from engine.balance import balanced, grouped, kl_to_uniform, pour, sizes_of


def test_water_by_hand():
    rng = np.random.default_rng(0)
    assert pour([1, 5, 9], 9, rng).tolist() == [1, 4, 4]
    assert pour([1, 5, 9], 15, rng).tolist() == [1, 5, 9] and pour([1, 5, 9], 0, rng).tolist() == [0, 0, 0]
    assert pour([0, 3], 3, rng).tolist() == [0, 3]
    with pytest.raises(ValueError, match="16 of 15 cannot be kept"):
        pour([1, 5, 9], 16, rng)


def test_what_is_left_over_goes_to_some_of_the_higher_ones():
    found = np.array([pour([1, 5, 9], 8, np.random.default_rng(seed)) for seed in range(40)])
    assert set(map(tuple, found.tolist())) == {(1, 4, 3), (1, 3, 4)}


@pytest.mark.parametrize("seed", range(5))
def test_sums_are_exact_and_heights_alike(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 50, 30)
    for total in rng.integers(0, sizes.sum() + 1, 20):
        found = pour(sizes, total, rng)
        assert found.sum() == total and (found <= sizes).all() and (found >= 0).all()
        partial = found[found < sizes]
        assert len(partial) == 0 or found.max() - partial.min() <= 1


def tree():
    """20 images in 4 clusters of 1, 2, 7, 10; the first two in one of two above"""
    return [(np.repeat(np.arange(4), [1, 2, 7, 10]), 4), (np.array([0, 0, 1, 1]), 2)]


def test_from_the_top_down():
    levels = tree()
    assert [sizes.tolist() for sizes in sizes_of(levels)] == [[1, 2, 7, 10], [3, 17]]
    rows = balanced(levels, 6, 0)
    assert np.bincount(levels[0][0][rows]).tolist() in ([1, 2, 1, 2], [1, 2, 2, 1])
    assert (np.diff(rows) > 0).all()
    assert np.bincount(levels[0][0][balanced(levels, 13, 0)]).tolist() == [1, 2, 5, 5]


def test_it_is_a_function_of_the_seed():
    assert (balanced(tree(), 8, 3) == balanced(tree(), 8, 3)).all()
    assert len({tuple(balanced(tree(), 8, seed)) for seed in range(8)}) > 1
    assert len({tuple(balanced(tree(), 20, seed)) for seed in range(3)}) == 1
    one = [(np.zeros(20, int), 1)]
    assert len({tuple(balanced(one, 5, seed)) for seed in range(8)}) > 4


def test_groups_and_divergence():
    assert [rows.tolist() for rows in grouped(np.array([2, 0, 2]), 4)] == [[1], [], [0, 2], []]
    assert kl_to_uniform(np.array([3, 3])) == 0 and kl_to_uniform(np.array([5, 0])) == pytest.approx(np.log(2))
    assert kl_to_uniform(np.array([3, 1])) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
