import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from openvla_hf.tabletop.env import MAX_STEP
from openvla_hf.tabletop.expert import ACTION_GRID
from openvla_hf.tabletop.teaching import CLOSED, NAMES, OPEN, SEEN, Acting, Seeing, in_patches
from openvla_hf.tabletop.train_policy import (
    UNNORM_KEY,
    GuidedCollator,
    TrainPolicyArguments,
    build,
    demonstrations,
    instructions,
    seed_ranges,
    train,
)


SMALL = TrainPolicyArguments(live_episodes=4, seeing_steps=1, steps=1, batch_size=2, workers=0, save_steps=1)


def frames(count: int, last_seed: int = 100) -> list[dict]:
    return list(itertools.islice(demonstrations([range(last_seed)], SMALL), count))


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    model, processor = build(SMALL)
    name_ids = torch.tensor(processor.tokenizer.convert_tokens_to_ids([f" {name}" for name in NAMES]))
    collator = GuidedCollator(processor, model.action_tokenizer, model.get_action_stats(UNNORM_KEY))
    return model, name_ids, collator(frames(8))


def test_demonstrations_are_repeatable_and_on_the_grid():
    for one, other in zip(frames(30), frames(30), strict=True):
        assert one["instruction"] == other["instruction"]
        np.testing.assert_array_equal(one["action"], other["action"])
        np.testing.assert_array_equal(one["image"], other["image"])
        in_grid = one["action"][:3] / ACTION_GRID
        np.testing.assert_allclose(in_grid, np.round(in_grid), atol=1e-6)
        assert np.abs(one["action"][:3]).max() <= MAX_STEP + 1e-9


def test_an_image_comes_with_more_than_one_instruction():
    told = {}
    for frame in frames(60):
        told.setdefault(frame["image"].tobytes(), set()).add(frame["instruction"])
    assert max(map(len, told.values())) == 2


def test_every_instruction_is_known_to_the_tokenizer():
    assert {frame["instruction"] for frame in frames(60)} <= set(instructions())


def test_a_frame_says_where_its_things_are():
    for frame in frames(20):
        there, _, _ = in_patches(torch.tensor(frame["positions"]))
        assert there[[OPEN, CLOSED]].sum() <= 1
        assert there[frame["target"]]
        assert SEEN[frame["target"]] in frame["instruction"]
        if frame["goal"] >= 0:
            assert frame["instruction"].endswith(f"on the {SEEN[frame['goal']]}")
            assert there[frame["goal"]]
        assert np.linalg.norm(frame["offsets"][:3]) < 0.7


def test_learning_to_see_reaches_towers_and_projector_only(policy):
    model, name_ids, batch = policy
    model.zero_grad()
    Seeing(model, name_ids)(**batch)["loss"].backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved
    assert all(name.startswith(("model.vision_backbone.", "model.projector.")) for name in moved)


def test_the_parts_of_the_loss_are_those_of_the_policy(policy):
    model, name_ids, batch = policy
    acting = Acting(Seeing(model, name_ids))
    guided = acting(**batch)
    plain = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels", "pixel_values")}).logits
    wanted = batch["labels"][:, 1:]
    nll = torch.nn.functional.cross_entropy(plain[:, :-1].transpose(1, 2), wanted, reduction="none", ignore_index=-100)
    dx = torch.stack([row[ids != -100][0] for row, ids in zip(nll, wanted, strict=True)]).mean()
    torch.testing.assert_close(guided["nll_dx"], dx)


def test_attention_that_looks_where_it_should_costs_nothing(policy):
    model, name_ids, batch = policy
    acting = Acting(Seeing(model, name_ids))
    optimizer = torch.optim.AdamW(acting.parameters(), lr=2e-3)
    first = None
    for _ in range(12):
        parts = acting(**batch)
        first = first or parts["attention"].item()
        parts["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert parts["attention"].item() < 0.8 * first


def test_workers_play_different_seeds():
    first, second = seed_ranges(500_000, 2)
    assert not set(first) & set(second)
    assert max(second) < 1_000_000


def test_a_single_tower_has_as_many_parameters_as_two_and_learns_in_the_same_way(policy):
    single, processor = build(replace(SMALL, towers=1))
    sizes = [sum(one.numel() for one in model.parameters()) for model in (single, policy[0])]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.005)
    assert single.config.fused_vision_config is None
    collator = GuidedCollator(processor, single.action_tokenizer, single.get_action_stats(UNNORM_KEY))
    Acting(Seeing(single, policy[1]))(**collator(frames(2)))["loss"].backward()
    assert all(one.grad is not None for one in single.model.projector.parameters())
    with pytest.raises(ValueError, match="1 or 2 towers, got towers=3"):
        build(replace(SMALL, towers=3))


@pytest.mark.slow
def test_the_recipe_ends_in_a_policy_that_loads(tmp_path):
    train(replace(SMALL, output=str(tmp_path), workers=1))
    model = AutoModel.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    frame = frames(1)[0]
    action = model.predict_action(**processor(frame["image"], instruction=frame["instruction"]))
    assert action.shape == (7,)
