"""engine/satellite.py: the paper's lengths, and whose runs they are of; as options of train.py: test_recipes.py."""

from types import SimpleNamespace

import pytest

from engine import satellite
from recipes import RECIPES, WARMUPS


def test_a_recipe_has_the_papers_steps_and_warm_ups_in_proportion():
    found = satellite.recipe(RECIPES["7b"], WARMUPS)
    assert (found.steps, found.lr_warmup, found.teacher_temp_warmup, found.freeze_last_layer) == (
        100_000, 10_000, 10_000, 500)
    assert (found.lr, found.batch, found.global_size) == (5e-5, 4096, 256) and found.recipe == "satellite"


@pytest.mark.parametrize("recipe, size, gram, highres", [
    ("satellite", "l", dict(steps=10_000),
     dict(steps=8000, resolutions="512x112x768*1", lr_warmup=2667)), ("satellite", "tiny", {}, {}), ("", "l", {}, {})])
def test_stages_are_changed_of_satellite_runs_alone(recipe, size, gram, highres):
    c = SimpleNamespace(recipe=recipe, size=size)
    assert (satellite.stage(c, "gram"), satellite.stage(c, "highres")) == (gram, highres)
