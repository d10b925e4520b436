import json
import re
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from openvla_hf.cli import main
from openvla_hf.data import Gripper, Robot, from_episodes, load, write_lerobot, write_rlds
from openvla_hf.evaluation.doctor import examine, plot_actions


pytestmark = pytest.mark.usefixtures("cache")

ARM = Robot("arm", gripper=Gripper(), frequency=5.0)


def warnings_of(episodes, robot=ARM):
    return " ".join(examine(from_episodes(episodes, robot, name="arm"), robot)[0].warnings)


def test_a_sound_dataset_is_ready(make_episode, tmp_path):
    write_lerobot([make_episode(index, steps=8) for index in range(6)], tmp_path / "arm", frequency=5.0)
    report, frames = examine(tmp_path / "arm", ARM)
    assert report.warnings == []
    assert (report.episodes, report.frames, report.instructions) == (6, 48, 6) == (6, len(frames), 6)
    assert (report.shortest_episode, report.median_episode, report.longest_episode) == (8, 8, 8)
    assert report.frequency == 5.0
    assert report.gripper_open == 0.5
    assert [sum(counts) for counts in report.histograms] == [48] * 7
    json.dumps(report.as_dict())


def test_each_fault_is_found(make_episode, tmp_path):
    sound = [make_episode(index, steps=8) for index in range(6)]

    idle = [[{**frame, "action": np.r_[np.zeros(6), 1.0]} for frame in each] for each in sound[:3]]
    assert "move nothing" in warnings_of(sound[3:] + idle)
    still = [[{**frame, "image": each[0]["image"]} for frame in each] for each in sound]
    assert "equal the image before them" in warnings_of(still)
    short = [*sound, sound[0][:2]]
    assert "shortest episode has 2 frames" in warnings_of(short)
    flipped = [[{**f, "action": np.r_[f["action"][:6], 1 - f["action"][6]]} for f in each] for each in sound]
    assert "begin with an open gripper" in warnings_of(flipped)
    frozen = [[{**f, "action": np.r_[0.0, f["action"][1:]]} for f in each] for each in sound]
    assert "dimensions [0] are constant" in warnings_of(frozen)
    many = [make_episode(index, steps=30) for index in range(7)]
    many[2][4]["action"][1] = 3.0
    assert "Dimension 1 reaches 3, far outside" in warnings_of(many)
    assert "The meaning of the gripper's values is unknown" in warnings_of(sound, Robot("arm"))

    write_rlds([*sound, make_episode(9, instruction="")], tmp_path / "silent")
    assert "6 frames have no instruction" in " ".join(examine(tmp_path / "silent", ARM)[0].warnings)
    write_lerobot(sound, tmp_path / "fast", frequency=10.0)
    assert "at 10 Hz, but the robot 'arm' is at 5 Hz" in " ".join(examine(tmp_path / "fast", ARM)[0].warnings)
    sound[1][2]["action"][0] = np.nan
    write_rlds(sound, tmp_path / "broken")
    report, _ = examine(tmp_path / "broken", ARM)
    assert len(report.bad_episodes) == 1
    assert "record 1: 'action' contains NaN" in report.warnings[0]


def test_faults_of_the_state_and_of_each_camera_are_found_on_request(make_episode, tmp_path):
    episodes = [make_episode(index, steps=8) for index in range(15)]
    for frame in (frame for episode in episodes for frame in episode):
        frame["images"] = {"front": frame.pop("image"), "wrist": np.full((32, 32, 3), 90, np.uint8)}
        frame["state"][2] = 0.25
    episodes[2][4]["state"][1] = 40.0
    folder = write_lerobot(episodes, tmp_path / "arm")
    plain, _ = examine(folder, ARM, camera="observation.images.front")
    report, _ = examine(folder, ARM, cameras=["front", "wrist"], state=True)
    assert plain.warnings == []
    assert plain.duplicates == 0.0
    assert report.duplicates == 1.0
    assert "100% of the images equal the image before them" in report.warnings[0]
    assert report.warnings[1:] == [
        "State dimensions [2] are constant. Check whether they were recorded.",
        "State dimension 1 reaches 40, far outside its usual range. Check the recording.",
    ]


def reaching(index, still=0, steps=24):
    """Make the frames of an arm with two joints, which stands still and then follows targets with a lag."""
    targets = np.concatenate([np.zeros(still), np.sin(np.linspace(0, 3, steps) + index)])[:, None] * [1.0, -0.5]
    states = np.concatenate([targets[:1], targets[:-1]])
    rng = np.random.default_rng(index)
    image = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return [
        {"image": np.roll(image, step, 0), "instruction": "reach", "action": target, "state": state}
        for step, (target, state) in enumerate(zip(targets, states, strict=True))
    ]


def test_absolute_actions_are_recognised_by_the_state(tmp_path):
    def warnings_about(episodes, robot):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return " ".join(examine(write_rlds(episodes, folder), robot)[0].warnings)

    targets = [reaching(index) for index in range(4)]
    movements = [[{**frame, "action": frame["action"] - frame["state"]} for frame in each] for each in targets]
    for robot in (Robot("arm"), Robot("arm", space="joint_deltas")):
        assert "look like targets: in dimensions [0, 1]" in warnings_about(targets, robot)
        assert "target" not in warnings_about(movements, robot)
    joints = Robot("arm", space="joint_positions")
    for robot in (joints, replace(joints, as_delta=True)):
        assert "target" not in warnings_about(targets, robot)
        assert "movements" not in warnings_about(targets, robot)
    assert "do not follow the state. Check whether they are movements" in warnings_about(movements, joints)
    assert "already look like movements" in warnings_about(movements, replace(joints, as_delta=True))


def test_motionless_starts_are_recognised_by_the_state_and_go_without_idle_frames():
    joints = Robot("arm", space="joint_positions")
    episodes = [reaching(0, still=16), reaching(1, still=16)]
    assert "of the frames come before the robot starts to move" in warnings_of(episodes, joints)
    report, frames = examine(from_episodes(episodes, joints, name="arm"), joints)
    assert 0.35 < report.motionless_start < 0.45
    assert 0.3 < report.idle < 0.45
    kept = from_episodes(episodes, joints, name="arm", drop_idle=True)
    report, _ = examine(kept, joints)
    assert len(frames) == 80 > len(kept) > 40
    assert report.motionless_start < 0.05
    assert report.idle < 0.1


def test_the_doctor_judges_the_data_at_the_requested_rate(make_episode, tmp_path, capsys):
    episodes = [make_episode(index, steps=20) for index in range(4)]
    for each in episodes:
        for frame in each[:5]:
            frame["action"] = np.r_[np.zeros(6), 1.0]
    write_lerobot(episodes, tmp_path / "arm", frequency=50.0)
    command = ["doctor", str(tmp_path / "arm"), "--robot", "tabletop", "--every", "5", "--drop-idle", "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["frequency"] == 10.0
    assert not any("at 10 Hz" in warning for warning in report["warnings"]), "the recording's rate is compared"
    assert report["frames"] == 4 * 3
    assert report["idle"] == 0.0


JOINTS = [f"joint{index}" for index in range(7)]


@pytest.mark.parametrize("names", [JOINTS, {"motors": JOINTS}, {name: place for place, name in enumerate(JOINTS)}])
def test_dimensions_have_the_names_that_the_data_gives(make_episode, tmp_path, capsys, names):
    episodes = [make_episode(index, steps=30) for index in range(7)]
    episodes[2][4]["action"][1] = 3.0
    write_lerobot(episodes, tmp_path / "arm", action_names=JOINTS)
    info = tmp_path / "arm/meta/info.json"
    described = json.loads(info.read_text())
    assert described["features"]["action"]["names"] == JOINTS
    described["features"]["action"]["names"] = names
    info.write_text(json.dumps(described))
    assert main(["doctor", str(tmp_path / "arm")]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in JOINTS)
    assert "Dimension 1 (joint1) reaches 3" in printed
    with pytest.raises(ValueError, match="The action has 7 dimensions but 2 names"):
        write_lerobot(episodes, tmp_path / "other", action_names=["a", "b"])


def test_unnamed_joints_are_numbered_and_not_called_an_end_effector(make_episode, tmp_path, capsys):
    write_lerobot([make_episode(index, steps=8) for index in range(3)], tmp_path / "arm")
    register = "import openvla_hf.data as data\ndata.register_robot(data.Robot('seven', space='joint_deltas'))\n"
    (tmp_path / "robots.py").write_text(register)
    assert main(["doctor", str(tmp_path / "arm"), "--robots", str(tmp_path / "robots.py"), "--robot", "seven"]) == 0
    printed = capsys.readouterr().out
    assert "a6" in printed
    assert "droll" not in printed


def test_a_saved_table_has_the_adapter_that_load_gives_it(tmp_path):
    rows = {
        "image": [np.zeros((8, 8, 3), np.uint8)] * 4,
        "action": [[0.1] * 6 + [-1.0]] * 4,
        "instruction": ["go"] * 4,
    }
    features = Features({"image": ImageFeature(), "action": List(Value("float64")), "instruction": Value("string")})
    Dataset.from_dict(rows, features).save_to_disk(tmp_path / "libero_spatial")
    report, frames = examine(tmp_path / "libero_spatial")
    loaded = load(tmp_path / "libero_spatial")
    assert (report.robot, report.name) == ("libero_spatial", "libero_spatial")
    assert frames[0]["action"].tolist() == loaded[0]["action"].tolist() == [0.1] * 6 + [1.0]


def test_a_robot_without_a_gripper_is_not_asked_for_one(make_episode):
    joints = Robot("arm", space="joint_deltas", gripper=Gripper(dimensions=()))
    report, _ = examine(from_episodes([make_episode(0)], joints, name="arm"), joints)
    assert report.gripper_open is None
    assert "gripper" not in " ".join(report.warnings)


def test_another_number_of_dimensions_than_the_models_is_refused(make_episode):
    with pytest.raises(ValueError, match="7 dimensions, but the model's statistics have 2"):
        examine(from_episodes([make_episode(0)]), stats={"q01": [0, 0], "q99": [1, 1]})


def test_the_histograms_are_drawn(make_episode, tmp_path):
    report, _ = examine(from_episodes([make_episode(0)], ARM), ARM)
    assert Image.open(plot_actions(report, tmp_path / "actions.png")).size[0] > 400


def test_the_bars_of_a_histogram_stand_on_zero(make_episode, tmp_path):
    report, _ = examine(from_episodes([make_episode(0)], ARM), ARM)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        svg = plot_actions(report, tmp_path / "actions.svg").read_text()
    zeros = re.findall(r"<text>\s*<tspan[^>]*>0</tspan>\s*</text>", svg)
    assert len(zeros) == len(report.q01)


def test_the_command_prints_a_table_or_json(make_episode, tmp_path, capsys, tiny):
    write_lerobot([make_episode(index, steps=8) for index in range(3)], tmp_path / "arm")
    assert main(["doctor", str(tmp_path / "arm"), "--robot", "tabletop", "--plot", str(tmp_path / "plot.png")]) == 0
    printed = capsys.readouterr().out
    assert "episodes, frames, instructions" in printed
    assert "3, 24, 3" in printed
    assert (tmp_path / "plot.png").exists()
    model, processor = tiny()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    command = ["doctor", str(tmp_path / "arm"), "--json", "--model", str(tmp_path / "model"), "--frames", "4"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["frames"] == 24
    assert report["model"]["frames"] == 4
    assert main(["doctor", str(tmp_path / "nowhere")]) == 2
    assert "no dataset at" in capsys.readouterr().err
