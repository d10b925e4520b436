from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from openvla_hf.tabletop.env import CAMERAS, ENV_ID, HAND_NOISE, MAX_STEP, STATE_NAMES, TASKS, TabletopEnv
from openvla_hf.tabletop.expert import expert_action, rollout_expert
from openvla_hf.tabletop.scene import SHAPES, Goal, Scene, TableGripper, TableObject, draw_scene


OPEN, CLOSED = 1.0, 0.0


@pytest.fixture
def env() -> TabletopEnv:
    return TabletopEnv(TASKS, render_mode="rgb_array")


def act(x: float = 0.0, y: float = 0.0, z: float = 0.0, gripper: float = OPEN) -> np.ndarray:
    return np.array([x, y, z, 0.0, 0.0, 0.0, gripper])


def drive(env: TabletopEnv, until: Callable[[TabletopEnv], bool]) -> dict[str, Any]:
    """Let the expert act until a condition on the state holds, and return the last `info`."""
    for _ in range(env.max_steps):
        *_, info = env.step(expert_action(env))
        if until(env):
            return info
    raise AssertionError("the expert never got there")


def pixels_apart(a: np.ndarray, b: np.ndarray) -> int:
    """Count the pixels that differ clearly between two frames."""
    return int((np.abs(a.astype(int) - b.astype(int)).max(axis=-1) > 40).sum())


def test_registered_environment_keeps_gymnasiums_contract():
    env = gymnasium.make(ENV_ID, tasks=TASKS, render_mode="rgb_array")
    check_env(env.unwrapped)
    image, info = env.reset(seed=0)
    assert image.shape == (224, 224, 3)
    assert image.dtype == np.uint8
    assert info["task"] in TASKS
    assert info["is_success"] is False
    assert info["moved_object"] is None
    np.testing.assert_array_equal(env.render(), image)


def test_cameras_and_state_are_observed_on_request():
    env = gymnasium.make(ENV_ID, cameras=["wrist", "image"], state=True)
    check_env(env.unwrapped)
    observation, _ = env.reset(seed=0)
    assert list(observation) == ["wrist", "image", "state"]
    assert observation["wrist"].shape == (224, 224, 3)
    assert observation["state"].shape == (len(STATE_NAMES),)
    np.testing.assert_array_equal(observation["image"], TabletopEnv().reset(seed=0)[0])
    assert list(TabletopEnv(state=True).reset(seed=0)[0]) == ["image", "state"]


def test_watching_more_does_not_change_the_episode(env):
    def actions(env: TabletopEnv) -> list[np.ndarray]:
        return [frame.executed for frame in rollout_expert(env, 5, noise=0.01)]

    watched = TabletopEnv(TASKS, cameras=CAMERAS, state=True)
    np.testing.assert_array_equal(actions(watched), actions(env))


def test_state_is_where_the_hand_is_and_how_wide_the_fingers_are():
    env = TabletopEnv(("put",), hand_noise=0.0, state=True)
    observation, _ = env.reset(seed=0)
    before, action = observation["state"], act(x=0.02, y=-0.01, z=-0.01)
    observation, *_ = env.step(action)
    np.testing.assert_allclose(observation["state"] - before, [0.02, -0.01, -0.01, 0.0], atol=1e-6)
    opened = observation["state"][3]
    closed = env.step(act(gripper=CLOSED))[0]["state"][3]
    env.step(act())
    held = 0.0
    for _ in range(env.max_steps):
        observation, *_ = env.step(expert_action(env))
        if env.scene.gripper.held is not None:
            held = observation["state"][3]
            break
    assert 0 < closed < held < opened
    assert held > 2 * env.task.target.radius


def test_wrist_camera_moves_with_the_hand_and_shows_the_grasp():
    def frame(x: float, z: float, is_open: bool = True, holding: bool = False) -> np.ndarray:
        cube = TableObject("red", "cube", np.array([x if holding else 0.05, 0.02, z - 0.015 if holding else 0.0]))
        gripper = TableGripper(np.array([x, 0.02, z]), is_open, cube if holding else None)
        return draw_scene(Scene([cube], [Goal("blue", "mat", -0.12, 0.0)], gripper), "wrist")

    def place(image: np.ndarray) -> tuple[float, float]:
        rows, columns = np.nonzero((image[..., 0] > 150) & (image[..., 1:] < 120).all(-1))
        return float(rows.mean()), float(columns.mean())

    assert place(frame(0.05, 0.1))[1] == pytest.approx(112, abs=4)
    assert place(frame(0.02, 0.1))[1] > 130 > 94 > place(frame(0.08, 0.1))[1]
    assert pixels_apart(frame(0.05, 0.1), frame(0.05, 0.09)) > 100
    assert pixels_apart(frame(0.05, 0.1), frame(0.05, 0.1, is_open=False)) > 500
    assert pixels_apart(frame(0.05, 0.1, is_open=False), frame(0.05, 0.1, is_open=False, holding=True)) > 1000
    # A held object stays at the same place in the image.
    carried = (
        place(frame(0.05, 0.1, is_open=False, holding=True)),
        place(frame(-0.1, 0.1, is_open=False, holding=True)),
    )
    assert carried[0] == pytest.approx(carried[1], abs=1)


def test_wrist_camera_draws_objects_behind_it():
    for y in (-0.2, 0.0, 0.2):
        for height in (0.015, 0.2):
            objects = [
                TableObject("red", shape, np.array([0.0, place, 0.05])) for shape in SHAPES for place in (-0.17, 0.17)
            ]
            scene = Scene(objects, [Goal("blue", "plate", 0.0, -0.13)], TableGripper(np.array([0.0, y, height])))
            assert draw_scene(scene, "wrist").shape == (224, 224, 3)


def test_seed_determines_the_episode(env):
    def episode(seed: int) -> list[Any]:
        return list(rollout_expert(env, seed, noise=0.01))

    first, second, other = episode(3), episode(3), episode(4)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.executed, b.executed)
        assert a.instruction == b.instruction
    assert pixels_apart(first[0].image, other[0].image) > 100


def test_scenes_are_unambiguous_and_spaced(env):
    for seed in range(60):
        env.reset(seed=seed)
        names = [thing.name for thing in env.scene.objects]
        goals = [goal.name for goal in env.scene.goals]
        assert len(set(names)) == len(names) >= 2
        assert len(set(goals)) == len(goals) == 2
        places = [thing.position[:2] for thing in env.scene.objects] + [goal.xy for goal in env.scene.goals]
        gaps = [np.linalg.norm(a - b) for k, a in enumerate(places) for b in places[:k]]
        assert min(gaps) >= 0.1


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("task", TASKS)
def test_expert_solves_every_family(env, task, noise):
    lengths = []
    for seed in range(30):
        frames = list(rollout_expert(env, seed, noise=noise, options={"task": task}))
        if frames[-1].success:
            lengths.append(len(frames))
        assert all(env.action_space.contains(frame.action) for frame in frames)
    assert len(lengths) >= 29
    assert np.median(lengths) <= 35


@pytest.mark.parametrize("task", TASKS)
def test_expert_recovers_from_being_shoved_off_course(env, task):
    for seed in range(10):
        env.reset(seed=seed, options={"task": task})
        for step in range(env.max_steps):
            action = expert_action(env)
            if 4 <= step < 8:
                action[:3] = (MAX_STEP, -MAX_STEP, MAX_STEP / 2)
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                break
        assert terminated, f"{task} with seed {seed}"


@pytest.mark.parametrize("task", TASKS)
def test_swapped_target_is_the_same_scene_with_another_instruction(env, task):
    for seed in range(5):
        image, info = env.reset(seed=seed, options={"task": task})
        target, distractor = (thing.name for thing in env.scene.objects[:2])
        swapped_image, swapped_info = env.reset(seed=seed, options={"task": task, "swap_target": True})
        np.testing.assert_array_equal(image, swapped_image)
        assert swapped_info["instruction"] == info["instruction"].replace(target, distractor, 1)

        final = drive(env, lambda env: env.is_success())
        assert final["is_success"]
        assert final["moved_object"] == distractor


def test_gripper_one_is_open_and_carries_what_it_closed_on(env):
    env.hand_noise = 0.0
    env.reset(seed=0, options={"task": "put"})
    target = env.task.target
    drive(env, lambda env: env.scene.gripper.held is not None)
    assert not env.scene.gripper.is_open
    assert env.scene.gripper.held is target

    before = target.position.copy()
    env.step(act(x=0.01, z=0.03, gripper=0.4))
    np.testing.assert_allclose(target.position - before, [0.01, 0.0, 0.03], atol=1e-9)
    env.step(act(gripper=0.6))
    assert env.scene.gripper.is_open
    assert env.scene.gripper.held is None
    assert target.position[2] < 0.01


def test_closing_away_from_objects_grasps_nothing(env):
    env.reset(seed=0, options={"task": "put"})
    env.step(act(gripper=CLOSED))
    assert not env.scene.gripper.is_open
    assert env.scene.gripper.held is None
    assert expert_action(env)[6] == OPEN


def test_translation_is_clipped_and_rotation_ignored(env):
    env.hand_noise = 0.0
    env.reset(seed=0)
    env.scene.gripper.position[:] = (0.0, 0.0, 0.15)
    env.step(np.array([1.0, -1.0, -0.01, 3.0, -3.0, 3.0, OPEN]))
    np.testing.assert_allclose(env.scene.gripper.position, [MAX_STEP, -MAX_STEP, 0.14], atol=1e-9)


def test_closed_gripper_pushes_straight_and_never_overlaps(env):
    env.hand_noise = 0.0
    env.reset(seed=0)
    ball = TableObject("red", "ball", np.array([0.0, 0.0, 0.0]))
    env.scene.objects[:] = [ball]
    env._start = {ball.name: ball.position.copy()}
    env.scene.gripper = TableGripper(np.array([-0.08, 0.01, 0.02]), is_open=False)
    for _ in range(3):
        env.step(act(x=MAX_STEP, gripper=CLOSED))
        assert np.linalg.norm((ball.position - env.scene.gripper.position)[:2]) > ball.radius
    assert ball.position[0] > 0.05
    assert ball.position[1] == 0.0


def test_an_object_dropped_off_the_edge_of_another_lands_beside_it(env):
    env.reset(seed=0)
    cube = TableObject("blue", "cube", np.array([0.0, 0.0, 0.0]))
    held = TableObject("red", "cube", np.array([0.03, 0.0, 0.08]))
    env.scene.objects[:], env.scene.goals[:] = [cube, held], []
    env._start = {thing.name: thing.position.copy() for thing in env.scene.objects}
    env.scene.gripper = TableGripper(np.array([0.03, 0.0, 0.095]), is_open=False, held=held)
    env.step(act())
    assert held.position[2] == 0.0
    assert held.position[0] >= cube.radius + held.radius - 1e-6


def test_frame_shows_the_state_an_action_depends_on():
    def frame(z: float, is_open: bool, holding: bool = False) -> np.ndarray:
        cube = TableObject("red", "cube", np.array([0.05, 0.02, z - 0.015 if holding else 0.0]))
        gripper = TableGripper(np.array([0.05, 0.02, z]), is_open, cube if holding else None)
        return draw_scene(Scene([cube], [Goal("blue", "mat", -0.12, 0.0)], gripper))

    assert pixels_apart(frame(0.1, True), frame(0.1, False)) > 100
    assert pixels_apart(frame(0.1, True), frame(0.085, True)) > 100
    assert pixels_apart(frame(0.1, False), frame(0.1, False, holding=True)) > 200
    assert pixels_apart(frame(0.015, True), frame(0.015, False, holding=True)) > 50


def test_episode_is_truncated():
    env = TabletopEnv(max_steps=2)
    env.reset(seed=0)
    assert env.step(act())[3] is False
    assert env.step(act())[3] is True


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(6), r"shape \(7,\), got \(6,\)"),
        (np.zeros((1, 7)), r"shape \(7,\), got \(1, 7\)"),
        (act(x=np.nan), "must be finite"),
        (act(gripper=np.inf), "must be finite"),
    ],
)
def test_bad_actions_are_refused(env, action, message):
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)


def test_unknown_names_are_refused(env):
    with pytest.raises(ValueError, match=r"'fold'\. Choose from put, push, stack, lift"):
        TabletopEnv(("put", "fold"))
    with pytest.raises(ValueError, match=r"'fold'\. Choose from put, push, stack, lift"):
        env.reset(seed=0, options={"task": "fold"})
    with pytest.raises(ValueError, match="Choose from 'task', 'swap_target'"):
        env.reset(seed=0, options={"swap": True})
    with pytest.raises(ValueError, match="render_mode"):
        TabletopEnv(render_mode="human")
    with pytest.raises(ValueError, match="empty"):
        TabletopEnv(())
    with pytest.raises(ValueError, match=r"Unknown camera 'front'\. Choose from image, wrist"):
        TabletopEnv(cameras=("front",))
    with pytest.raises(ValueError, match="names a camera twice"):
        TabletopEnv(cameras=("wrist", "wrist"))
    with pytest.raises(ValueError, match="cameras is empty"):
        TabletopEnv(cameras=())
    with pytest.raises(ValueError, match="max_steps"):
        TabletopEnv(max_steps=0)
    with pytest.raises(ValueError, match="hand_noise must not be negative"):
        TabletopEnv(hand_noise=-0.001)
    with pytest.raises(ValueError, match="noise"):
        next(rollout_expert(env, 0, noise=-0.1))


def test_the_hand_is_about_where_it_is_sent_and_its_noise_repeats():
    def walk():
        env = TabletopEnv()
        env.reset(seed=3)
        env.scene.objects.clear()
        env.scene.gripper.position[:] = (0.0, 0.0, 0.15)
        path = [env.scene.gripper.position.copy()]
        for _ in range(40):
            env.step(act())
            path.append(env.scene.gripper.position.copy())
        return np.diff(path, axis=0)

    moves = walk()
    np.testing.assert_array_equal(moves, walk())
    assert 0.5 * HAND_NOISE < moves[:, :2].std() < 1.5 * HAND_NOISE
