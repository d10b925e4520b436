import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from openvla_hf.evaluation.tabletop import MAX_STEP
from openvla_hf.training.tabletop_policy import (
    ACTION_GRID,
    SEEN,
    Recipe,
    SceneReader,
    build,
    demonstrations,
    instructions,
    scenes,
    train,
)


SMALL = Recipe(live_episodes=4, seeing_steps=1, steps=1, batch_size=2)


def test_demonstrations_are_repeatable_and_on_the_grid():
    frames = [list(itertools.islice(demonstrations([range(0, 100)], SMALL), 30)) for _ in range(2)]
    for one, other in zip(*frames, strict=True):
        assert one["instruction"] == other["instruction"]
        np.testing.assert_array_equal(one["action"], other["action"])
        np.testing.assert_array_equal(one["image"], other["image"])
        grid = ACTION_GRID / 4 if one["instruction"].startswith("point") else ACTION_GRID
        np.testing.assert_allclose(one["action"][:3] / grid, np.round(one["action"][:3] / grid), atol=1e-6)
        assert np.abs(one["action"][:3]).max() <= MAX_STEP + 1e-9


def test_every_instruction_is_known_to_the_tokenizer():
    known = set(instructions())
    assert {frame["instruction"] for frame in itertools.islice(demonstrations([range(0, 100)], SMALL), 60)} <= known


def test_a_scene_says_where_its_things_are():
    frame = next(scenes([range(0, 10)], SMALL))
    there = ~np.isnan(frame["positions"]).any(-1)
    assert there[[SEEN.index("open gripper"), SEEN.index("closed gripper")]].sum() == 1
    assert 4 <= there[: SEEN.index("open gripper")].sum() <= 8
    assert (frame["positions"][there] < 1.2).all()


def test_learning_to_see_reaches_the_towers_only():
    model, processor = build(SMALL)
    reader = SceneReader(model.model.vision_backbone, width=192, side=8)
    frames = list(itertools.islice(scenes([range(0, 10)], SMALL), 4))
    pixels = processor.image_processor([frame["image"] for frame in frames])["pixel_values"]
    reader(pixels, torch.tensor(np.stack([frame["positions"] for frame in frames])))["loss"].backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved
    assert all(name.startswith("model.vision_backbone.") for name in moved)


@pytest.mark.slow
def test_the_recipe_ends_in_a_policy_that_loads(tmp_path):
    train(Recipe(output=str(tmp_path), live_episodes=4, seeing_steps=1, steps=1, batch_size=2))
    model = AutoModel.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    frame = next(demonstrations([range(0, 10)], SMALL))
    action = model.predict_action(**processor(frame["image"], instruction=frame["instruction"]))
    assert action.shape == (7,)
    assert model.dtype == torch.bfloat16
