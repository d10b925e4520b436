"""LeRobot, unmodified, evaluates, trains and deploys policies of this package.

`make test-lerobot` runs these tests.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import draccus
import numpy as np
import pytest
import torch
from lerobot.envs import make_env, preprocess_observation
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins
from lerobot_policy_openvla import OpenVLAConfig, TabletopEnvConfig
from lerobot_policy_openvla.modeling_openvla import OpenVLAPolicy
from lerobot_policy_openvla.statistics import read_statistics, summarize_dataset, to_opening

from openvla_hf.data import write_lerobot
from openvla_hf.serving.policy import Observation, ServedPolicy
from openvla_hf.tabletop.env import TabletopEnv
from openvla_hf.tabletop.expert import record_demonstrations
from openvla_hf.tabletop.rollouts import FIRST_UNSEEN_SEED, TABLETOP_POLICY, load_policy, run_episodes


HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "integrations.md"
INSTRUCTION = "open the drawer"
CPU = ("--policy.device=cpu",)
ONE = ("--eval.n_episodes=1", "--eval.batch_size=1")


def lerobot(command, *arguments, folder):
    """Run a command of LeRobot in a folder."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
    subprocess.run([Path(sys.executable).parent / command, *arguments], cwd=folder, env=environment, check=True)


def evaluate(*arguments, folder, output="evaluation"):
    """Run `lerobot-eval` on the tabletop, and return whether each episode succeeded."""
    lerobot(
        "lerobot-eval",
        "--env.type=openvla_tabletop",
        "--eval.use_async_envs=false",
        f"--seed={FIRST_UNSEEN_SEED}",
        f"--output_dir={output}",
        *CPU,
        *arguments,
        folder=folder,
    )
    (task,) = json.loads((folder / output / "eval_info.json").read_text())["per_task"]
    return task["metrics"]["successes"]


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    """A LeRobot dataset of two cameras, with the robot's state."""
    folder = tmp_path_factory.mktemp("data") / "demonstrations"
    write_lerobot(record_demonstrations(["put"], range(3), cameras=["image", "wrist"], state=True), folder)
    return folder


def train(dataset, *arguments, folder, output="run"):
    """Run `lerobot-train` for two steps, and return the folder of the checkpoint."""
    lerobot(
        "lerobot-train",
        "--dataset.repo_id=lab/demonstrations",
        f"--dataset.root={dataset}",
        "--dataset.video_backend=pyav",
        "--policy.push_to_hub=false",
        "--num_workers=0",
        "--batch_size=2",
        "--steps=2",
        "--log_freq=1",
        f"--output_dir={output}",
        *CPU,
        *arguments,
        folder=folder,
    )
    return folder / output / "checkpoints" / "last" / "pretrained_model"


def test_lerobot_eval_runs_the_episodes_that_the_policy_runs_without_it(tmp_path):
    found = evaluate(
        "--policy.type=openvla",
        f"--policy.checkpoint={TABLETOP_POLICY}",
        "--eval.n_episodes=4",
        "--eval.batch_size=2",
        folder=tmp_path,
    )
    served = ServedPolicy.load(str(TABLETOP_POLICY))
    rollouts = run_episodes(
        load_policy(served.model, served.processor), range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + 4), batch_size=2
    )
    expected = {rollout.seed: rollout.success for rollout in rollouts}
    assert found == [expected[FIRST_UNSEEN_SEED + index] for index in range(4)]
    assert sum(found) >= 3


def test_lerobot_train_trains_openvla_resumes_and_saves_what_lerobot_eval_loads(demonstrations, tmp_path):
    checkpoint = train(
        demonstrations,
        "--policy.type=openvla",
        f"--policy.checkpoint={TABLETOP_POLICY}",
        "--policy.cameras={image: observation.images.image}",
        folder=tmp_path,
    )
    config = json.loads((checkpoint / "config.json").read_text())
    assert (config["type"], config["unnorm_key"]) == ("openvla", "lab/demonstrations")
    recorded = json.loads((demonstrations / "meta" / "stats.json").read_text())["action"]
    np.testing.assert_allclose(config["statistics"]["action"]["q99"], recorded["q99"], rtol=1e-5)
    before, after = (ServedPolicy.load(str(each)) for each in (TABLETOP_POLICY, checkpoint / "openvla"))
    weights = [dict(each.model.named_parameters())["lm_head.weight"] for each in (before, after)]
    assert not torch.equal(*weights)
    assert after.default_key == "lab/demonstrations"

    lerobot(
        "lerobot-train", f"--config_path={checkpoint}/train_config.json", "--resume=true", "--steps=3", folder=tmp_path
    )
    resumed = tmp_path / "run" / "checkpoints" / "000003" / "pretrained_model"
    assert (
        len(evaluate(f"--policy.path={resumed}", "--eval.n_episodes=1", "--eval.batch_size=1", folder=tmp_path)) == 1
    )


def test_lerobot_train_gives_a_plain_openvla_a_head_that_predicts_chunks(demonstrations, tmp_path):
    checkpoint = train(
        demonstrations,
        "--policy.type=openvla",
        f"--policy.checkpoint={TABLETOP_POLICY}",
        "--policy.action_head=l1",
        "--policy.chunk_size=4",
        "--policy.use_state=true",
        folder=tmp_path,
    )
    served = ServedPolicy.load(str(checkpoint / "openvla"))
    assert (served.execute, served.cameras, served.state_dim) == (4, ["image", "wrist"], 4)
    observed = ("--env.cameras=[image, wrist]", "--env.state=true")
    found = evaluate(f"--policy.path={checkpoint}", *ONE, *observed, folder=tmp_path)
    assert len(found) == 1


def refer_to_tabletop_policy(folder, *options):
    """Write the folder `base`, which refers to the tabletop's policy."""
    module = [sys.executable, "-m", "lerobot_policy_openvla"]
    subprocess.run(
        [*module, "base", f"--checkpoint={TABLETOP_POLICY}", "--device=cpu", *options], cwd=folder, check=True
    )


def test_lerobot_train_adapts_a_checkpoint_with_lora(demonstrations, tmp_path):
    refer_to_tabletop_policy(tmp_path, "--cameras={image: observation.images.image}")
    assert not list((tmp_path / "base").rglob("*.py"))
    adapter = train(demonstrations, "--policy.path=base", "--peft.method_type=LORA", "--peft.r=2", folder=tmp_path)
    assert (adapter / "adapter_model.safetensors").is_file()
    assert not (adapter / "openvla").exists()
    found = evaluate(f"--policy.path={adapter}", *ONE, folder=tmp_path)
    assert len(found) == 1


def test_lerobot_rollout_drives_a_robot(tmp_path):
    refer_to_tabletop_policy(tmp_path)
    lerobot(
        "lerobot-rollout",
        "--policy.path=base",
        "--robot.discover_packages_path=table_robot",
        "--robot.type=table_robot",
        f"--robot.seed={FIRST_UNSEEN_SEED}",
        "--robot.log=robot.json",
        f"--task={TabletopEnv().reset(seed=FIRST_UNSEEN_SEED)[1]['instruction']}",
        "--fps=10",
        "--duration=20",
        "--device=cpu",
        "--return_to_initial_position=false",
        folder=tmp_path,
    )
    assert json.loads((tmp_path / "robot.json").read_text())["success"]


# In this process


@pytest.fixture(scope="module", autouse=True)
def plugins():
    register_third_party_plugins()


LIBERO = {"full_image": "observation.images.image", "wrist_image": "observation.images.image2"}


def libero_batch(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        **{key: torch.randint(0, 256, (rows, 3, 48, 64), generator=generator) / 255 for key in LIBERO.values()},
        "observation.state": torch.randn(rows, 8, generator=generator),
        "task": [f"{INSTRUCTION} {row}" for row in range(rows)],
    }


def config_of(oft, **fields):
    return OpenVLAConfig(
        checkpoint=str(oft), platform="libero", device="cpu", **{"cameras": LIBERO, "gripper": "libero"} | fields
    )


def test_chunks_are_played_to_their_end_row_by_row(oft):
    policy = OpenVLAPolicy(config_of(oft, n_action_steps=3))
    batches = [libero_batch(2, seed) for seed in range(5)]
    played = torch.stack([policy.select_action(batch) for batch in batches], dim=1).numpy()

    served = ServedPolicy.load(str(oft), loading={"platform": "libero"}, gripper="libero", execute=3)
    for row in range(2):
        session, expected = served.open_session(), []
        for batch in (batches[0], batches[3]):
            images = {
                camera: (batch[key][row] * 255).round().byte().permute(1, 2, 0).numpy()
                for camera, key in LIBERO.items()
            }
            state = batch["observation.state"][row].double().numpy()
            (prediction,) = served.predict([served.prepare(Observation(images, batch["task"][row], state))])
            expected.extend(session.receive(prediction))
        np.testing.assert_allclose(played[row], expected[:5], atol=1e-5)
    assert {*played[..., -1].ravel()} <= {-1.0, 1.0}
    assert policy.config.chunk_size == 8


def test_reset_forgets_the_chunk(oft):
    policy = OpenVLAPolicy(config_of(oft))
    first = policy.select_action(libero_batch(1))
    policy.reset()
    assert torch.equal(policy.select_action(libero_batch(1)), first)


def test_a_missing_camera_state_or_checkpoint_is_an_error(oft):
    policy = OpenVLAPolicy(config_of(oft, cameras={}))
    with pytest.raises(ValueError, match="no image for the policy's camera 'full_image'"):
        policy.select_action(libero_batch(1))
    policy = OpenVLAPolicy(config_of(oft))
    batch = libero_batch(1)
    del batch["observation.state"]
    with pytest.raises(ValueError, match=r"no 'observation\.state'"):
        policy.select_action(batch)
    with pytest.raises(ValueError, match="no OpenVLA checkpoint"):
        OpenVLAPolicy(OpenVLAConfig(device="cpu"))


def test_the_length_of_chunks_and_new_heads_must_fit(oft):
    with pytest.raises(ValueError, match="predicts 8 actions at a time, but `chunk_size` is 4"):
        OpenVLAPolicy(config_of(oft, chunk_size=4))
    with pytest.raises(ValueError, match="needs `chunk_size`"):
        config_of(oft, action_head="l1")
    with pytest.raises(ValueError, match="must be trained first"):
        OpenVLAPolicy(OpenVLAConfig(checkpoint=str(TABLETOP_POLICY), device="cpu", action_head="l1", chunk_size=8))


def recorded_statistics(low, high, dims=1):
    """LeRobot's statistics of actions with `dims` dimensions of the arm and a gripper."""
    arm = {"q01": -0.5, "min": -0.5, "q99": 0.5, "max": 0.5, "mean": 0.0, "std": 0.3}
    gripper = {"q01": low, "min": low, "q99": high, "max": high, "mean": (low + high) / 2, "std": (high - low) / 4}
    return {"action": {name: np.array([value] * dims + [gripper[name]]) for name, value in arm.items()}}


@pytest.mark.parametrize(
    ("gripper", "low", "high", "expected", "is_scaled"),
    [
        ("libero", -1.0, 1.0, (0.0, 1.0), False),
        ("policy", 0.0, 1.0, (0.0, 1.0), False),
        ("policy", 0, 100, (0, 100), True),
    ],
)
def test_statistics_are_those_of_openvlas_gripper(gripper, low, high, expected, is_scaled):
    action = read_statistics(summarize_dataset(recorded_statistics(low, high), gripper))["action"]
    assert (action["q01"][-1], action["q99"][-1]) == expected
    assert action["mask"] == [True, is_scaled]
    np.testing.assert_allclose(to_opening(np.array([-1.0, 1.0]), "libero"), [1.0, 0.0])


def test_a_dataset_without_quantiles_is_an_error():
    statistics = recorded_statistics(0.0, 1.0)
    del statistics["action"]["q99"]
    with pytest.raises(ValueError, match=r"no 'q99'.*augment_dataset_quantile_stats"):
        summarize_dataset(statistics, "policy")


def test_the_loss_falls_where_the_gripper_is_the_datasets(oft):
    statistics = recorded_statistics(-1.0, 1.0, dims=6)
    statistics["observation.state"] = {
        name: np.full(8, value)
        for name, value in {"q01": -2.0, "min": -3.0, "q99": 2.0, "max": 3.0, "mean": 0.0, "std": 1.0}.items()
    }
    policy = OpenVLAPolicy(config_of(oft, chunk_size=8), dataset_stats=statistics)
    batch = libero_batch(2)
    batch["action"] = torch.full((2, 8, 7), 0.25)
    batch["action"][..., -1] = -1.0  # open
    batch["action_is_pad"] = torch.zeros(2, 8, dtype=torch.bool)
    collated = policy.collator(policy._read_frames(batch))
    np.testing.assert_allclose(collated["actions"][..., :6], 0.5)
    assert (collated["actions"][..., -1] == 1.0).all()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss, _ = policy.forward(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    # The padding has no loss.
    batch["action_is_pad"][:, 4:] = True
    with torch.no_grad():
        part, _ = policy.forward(batch)
        batch["action"][:, 4:, :6] = -0.5
        assert policy.forward(batch)[0] == part


def test_a_weight_is_saved_and_loaded_with_its_configuration(oft, tmp_path):
    policy = OpenVLAPolicy(config_of(oft))
    expected = policy.select_action(libero_batch(2))
    policy.save_pretrained(tmp_path)
    loaded = OpenVLAPolicy.from_pretrained(tmp_path)
    assert torch.equal(loaded.select_action(libero_batch(2)), expected)
    gathered = {name: tensor + 0 for name, tensor in policy.state_dict().items()}
    policy.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    assert torch.equal(OpenVLAPolicy.from_pretrained(tmp_path / "gathered").select_action(libero_batch(2)), expected)


def test_the_tabletop_is_an_environment_of_lerobot():
    config = draccus.parse(TabletopEnvConfig, args=["--task=stack", "--cameras=[image, wrist]", "--state=true"])
    (environments,) = make_env(config, n_envs=2).values()
    observation, _ = environments[0].reset(seed=[0, 1])
    seen = preprocess_observation(observation)
    assert seen["observation.images.wrist"].shape == (2, 3, 224, 224)
    assert seen["observation.state"].shape == (2, 4)
    assert all(text.startswith("stack the ") for text in environments[0].call("task_description"))
    policy = make_policy(OpenVLAConfig(checkpoint=str(TABLETOP_POLICY), device="cpu"), env_cfg=TabletopEnvConfig())
    before, after = make_pre_post_processors(policy.config)
    batch = before({"observation.images.image": seen["observation.images.image"], "task": ["lift the red cube"] * 2})
    assert after(policy.select_action(batch)).shape == (2, 7)


def test_the_commands_of_the_page_have_known_options():
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    options = re.findall(r"--policy\.(\w+)", "".join(blocks))
    assert {*options} <= {*OpenVLAConfig.__dataclass_fields__, "type", "path"}
    assert len(options) > 5
