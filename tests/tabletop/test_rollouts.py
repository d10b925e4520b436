import itertools

import numpy as np
import pytest
from PIL import Image

from openvla_hf.data import load_statistics
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.tabletop.env import MAX_STEP, TabletopEnv
from openvla_hf.tabletop.expert import ACTION_GRID, record_demonstrations
from openvla_hf.tabletop.pictures import draw_strip, save_gif
from openvla_hf.tabletop.rollouts import TABLETOP_POLICY, load_policy, run_episodes, success_by_task
from openvla_hf.testing import BRIDGE_LIKE_STATS, tiny_config, tiny_processor, tiny_tokenizer


SEEDS = range(1_000_000, 1_000_006)


def wander(images, instructions):
    """Act depending only on the image and the instruction."""
    level = np.array([image.mean() for image in images]) / 255 + np.array([len(text) for text in instructions])
    rest = [*np.zeros((3, len(images))), (level * 10).astype(int) % 2]
    return np.stack([0.03 * np.sin(level), 0.03 * np.cos(7 * level), np.full_like(level, -0.01), *rest], axis=1)


def outcome(episodes):
    return {one.seed: (one.task, one.instruction, one.success, one.moved_target, one.steps) for one in episodes}


def test_playing_many_at_a_time_changes_no_episode():
    assert outcome(run_episodes(wander, SEEDS, batch_size=4)) == outcome(run_episodes(wander, SEEDS, batch_size=1))


def test_a_chunk_is_played_to_its_end_before_the_policy_looks_again():
    chunk = np.stack([wander([np.full((2, 2), level)], ["go"])[0] for level in (10, 90, 170)])
    looked = []

    def plan(images, instructions):
        looked.append(len(images))
        return np.stack([chunk] * len(images))

    episodes = list(run_episodes(plan, SEEDS, batch_size=4))
    assert sum(looked) == sum(one.predictions for one in episodes)
    assert all(one.predictions == -(-one.steps // 3) for one in episodes)
    actions = itertools.cycle(chunk)
    alone = list(run_episodes(lambda images, instructions: next(actions)[None], SEEDS[:1]))
    assert outcome(alone).items() <= outcome(episodes).items()
    assert alone[0].predictions == alone[0].steps


def test_a_policy_may_see_both_cameras_and_the_state_of_the_same_episodes():
    def look(observations, instructions):
        assert all(list(one) == ["image", "wrist", "state"] for one in observations)
        return wander([one["image"] for one in observations], instructions)

    watched = list(
        run_episodes(look, SEEDS, cameras=("image", "wrist"), state=True, keep_frames=SEEDS[:1].__contains__)
    )
    assert outcome(watched) == outcome(run_episodes(wander, SEEDS))
    shown = next(one for one in watched if one.seed == SEEDS[0])
    np.testing.assert_array_equal(shown.frames[0], TabletopEnv().reset(seed=SEEDS[0])[0])


def test_every_seed_is_played_once_and_only_the_frames_asked_for_are_kept():
    episodes = list(run_episodes(wander, SEEDS, keep_frames=lambda seed: seed == SEEDS[2]))
    assert sorted(one.seed for one in episodes) == list(SEEDS)
    assert {one.seed: len(one.frames) for one in episodes if one.frames} == {
        SEEDS[2]: next(one for one in episodes if one.seed == SEEDS[2]).steps + 1
    }


def test_swapping_names_the_distractor_in_the_same_scene():
    told = outcome(run_episodes(wander, SEEDS))
    swapped = outcome(run_episodes(wander, SEEDS, condition="swapped"))
    for seed in SEEDS:
        assert told[seed][0] == swapped[seed][0]
        assert told[seed][1] != swapped[seed][1]


def test_the_black_condition_shows_the_policy_nothing():
    seen = []

    def watch(images, instructions):
        seen.extend(images)
        return wander(images, instructions)

    list(run_episodes(watch, SEEDS[:2], condition="black"))
    assert not np.any(seen)


def test_the_black_condition_keeps_the_state():
    def watch(observations, instructions):
        for one in observations:
            assert not one["image"].any()
            assert not one["wrist"].any()
            assert one["state"].any()
        return wander([one["image"] for one in observations], instructions)

    assert list(run_episodes(watch, SEEDS[:1], condition="black", cameras=("image", "wrist"), state=True))


def test_an_unknown_condition_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'upside down'.*as told, swapped, black"):
        next(run_episodes(wander, SEEDS, condition="upside down"))


def test_a_model_with_its_processor_is_a_policy():
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer, norm_stats=load_statistics(TABLETOP_POLICY))
    model, processor = OpenVLAForActionPrediction(config).eval(), tiny_processor(tokenizer, config)
    with pytest.raises(ValueError, match="execute=2 is not between 1 and 1"):
        load_policy(model, processor, execute=2)
    policy = load_policy(model, processor)
    image, info = TabletopEnv().reset(seed=0)
    assert policy([image], [info["instruction"]]).shape == (1, 7)
    assert policy([image] * 3, [info["instruction"]] * 3).shape == (3, 7)
    assert policy.forward_passes % 4 == 0  # summed over the observations
    assert policy.forward_passes <= 4 * 7
    assert policy.seconds > 0


def test_a_model_with_two_cameras_is_a_policy_that_sees_both():
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer, norm_stats=load_statistics(TABLETOP_POLICY))
    config.num_images = 2
    processor = tiny_processor(tokenizer, config)
    processor.cameras = ["wrist", "image"]
    model = OpenVLAForActionPrediction(config).eval()
    policy = load_policy(model, processor)
    observation, info = TabletopEnv(cameras=("image", "wrist")).reset(seed=0)
    action = policy([observation] * 2, [info["instruction"]] * 2)
    images = [observation["wrist"], observation["image"]]
    expected = model.predict_action(**processor(images, instruction=info["instruction"]))
    np.testing.assert_array_equal(action, [expected, expected])


def test_the_tabletop_is_not_the_robot_of_another_policy(tiny):
    with pytest.raises(ValueError, match="The tabletop is not this policy's robot"):
        load_policy(*tiny())
    fourteen = {name: values * 2 for name, values in BRIDGE_LIKE_STATS.items()}
    with pytest.raises(ValueError, match="The tabletop is not this policy's robot"):
        load_policy(*tiny(norm_stats={"arms": {"action": fourteen}}))


def test_rates_are_by_task_and_over_all():
    episodes = list(run_episodes(wander, SEEDS))
    table = success_by_task(episodes)
    assert list(table)[-1] == "all"
    assert (
        table["all"]["episodes"] == len(SEEDS) == sum(row["episodes"] for task, row in table.items() if task != "all")
    )
    assert table["all"]["success"] == np.mean([one.success for one in episodes])


def test_pictures_hold_the_frames(tmp_path):
    episodes = list(run_episodes(wander, SEEDS[:3], keep_frames=lambda seed: True))
    strip = draw_strip(episodes, columns=4)
    first = np.asarray(strip)[30 : 30 + 224, 6 : 6 + 224]
    np.testing.assert_array_equal(first, episodes[0].frames[0])
    save_gif(episodes, tmp_path / "episodes.gif", frames_per_second=5)
    with Image.open(tmp_path / "episodes.gif") as gif:
        shown = []
        for index in range(gif.n_frames):  # repeated pictures are stored once, with a longer duration
            gif.seek(index)
            shown.append(gif.info["duration"])
    assert sum(shown) == 200 * (max(len(one.frames) for one in episodes) + 5)


def test_recorded_demonstrations_are_successes_on_the_grid():
    episodes = list(record_demonstrations(("lift",), range(5)))
    assert len(episodes) == 5
    for frames in episodes:
        assert {frame["instruction"].split()[0] for frame in frames} == {"lift"}
        moves = np.stack([frame["action"][:3] for frame in frames]) / ACTION_GRID
        np.testing.assert_allclose(moves, np.round(moves), atol=1e-4)
        assert frames[-1]["action"][2] == np.float32(MAX_STEP)  # at the end it goes up
    again = next(iter(record_demonstrations(("lift",), [3])))
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(again, episodes[3], strict=True))


WITHOUT_GYMNASIUM = """
import sys
sys.modules["gymnasium"] = None
from openvla_hf.cli import main
from openvla_hf.tabletop import pictures
from openvla_hf.tabletop.rollouts import TABLETOP_POLICY
assert (TABLETOP_POLICY / "config.json").is_file()
print(main(["record", "lessons", "--task", "lift"]))
"""


def test_without_gymnasium_only_the_environment_fails_and_names_the_extra(run_python):
    result = run_python(WITHOUT_GYMNASIUM)
    assert result.stdout.strip() == "2"
    assert 'The tabletop needs Gymnasium: run `pip install "openvla-hf[sim]"`.' in result.stderr
