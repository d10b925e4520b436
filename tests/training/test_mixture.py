import dataclasses
import json

import pytest

from openvla_hf.cli import build_parser, main
from openvla_hf.cli.config_file import insert_config
from openvla_hf.cli.finetune import read_arguments
from openvla_hf.data import write_rlds
from openvla_hf.data.open_x import add_table, known_table
from openvla_hf.data.streams import EvaluationStream
from openvla_hf.data.table_cache import cache_folder
from openvla_hf.testing import fake_episode
from openvla_hf.training.arguments import FinetuneArguments, TrainingData, TrainingMixture
from openvla_hf.training.finetune import build_trainer
from openvla_hf.training.run_frames import load_datasets, read_frames
from openvla_hf.training.runs import check_output


SARA, SAILOR = "dlr_sara_pour_converted_externally_to_rlds", "austin_sailor_dataset_converted_externally_to_rlds"
SMALL = {"max_steps": 2, "batch_size": 2, "use_cpu": True, "lora_rank": 2, "dataloader_num_workers": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oxe")
    for name, count in ((SARA, 4), (SAILOR, 2)):
        episodes = [fake_episode(seed=seed, steps=5, size=32) for seed in range(count)]
        write_rlds(episodes, folder / name, episodes_per_file=1)
    (folder / "own.json").write_text(json.dumps({SARA: 1.0, SAILOR: 2.0, "kuka": 1.0}))
    return folder


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_a_run_draws_a_mixture_by_its_steps(base, data, cache, tmp_path, streaming):
    options = {"streaming": streaming, "shuffle_buffer": 6 * streaming}
    mixture = TrainingMixture(data / "own.json", data, options, allow_missing=True)
    arguments = FinetuneArguments(model=base, data=mixture, output=tmp_path / "run", settings=SMALL)
    trainer = build_trainer(arguments)
    assert arguments.weights == [1.0, 2.0]
    assert trainer.record["mixture"] == {
        SARA: {"weight": 1.0, "transitions": 20, "share": 0.5},
        SAILOR: {"weight": 2.0, "transitions": 10, "share": 0.5},
    }
    if streaming:  # the datasets share one buffer
        assert [part.shuffle_buffer for part, _ in trainer.train_dataset.parts] == [3, 3]
    reading = trainer.record["reading"][f"{data}/{SARA}"]
    assert (reading["robot"], reading["split"]) == (SARA, "train[:95%]")
    assert trainer.model.base_model.model.norm_stats.keys() == {SARA, SAILOR}
    assert {frame["dataset"] for frame, _ in zip(trainer.train_dataset, range(20), strict=False)} == {SARA, SAILOR}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("cameras = { full_image = 'imag' }", "Unknown field 'imag' in the row's cameras. Did you mean 'image'?"),
        ("state = 'observation.state'", "Unknown field 'observation.state' in the row's state. Choose from 'action'"),
        (
            "transform = ['action = action[:6], action[:1] | change']",
            "record 0, read by [datasets.own_arm] in {}: after the transform, the gripper goes",
        ),
        ("", None),
    ],
)
def test_a_dry_run_finds_a_mistake_in_a_row_from_the_first_episode(row, message, base, cache, tmp_path, capsys):
    entries = row if "cameras" in row else f"cameras = {{ full_image = 'image' }}\n{row}"
    (tmp_path / "own.toml").write_text(f"[datasets.own_arm]\n{entries}\n[mixtures.own]\nown_arm = 1")
    episode = fake_episode(steps=3, size=16)
    for frame, value in zip(episode, (0.0, -0.4, 0.4), strict=True):
        frame["action"][0] = value
    write_rlds([episode] * 2, tmp_path / "oxe" / "own_arm")
    command = ["finetune", "--model", str(base), "--mixture", "own", "--robots", str(tmp_path / "own.toml")]
    command += ["--data-dir", str(tmp_path / "oxe"), "--output", str(tmp_path / "run"), "--dry-run"]
    assert main(command) == (2 if message else 0)
    assert message is None or message.format(tmp_path / "own.toml") in capsys.readouterr().err
    known_table().datasets.pop("own_arm")
    known_table().mixtures.pop("own")


def test_validation_gives_figures_of_each_dataset_that_depend_on_no_worker(base, cache, tmp_path):
    for number, name in enumerate((SARA, SAILOR)):
        episodes = [fake_episode(seed=11 * number + seed, steps=5, size=32) for seed in range(11)]
        write_rlds(episodes, tmp_path / "oxe" / name, episodes_per_file=4)
    mixture = TrainingMixture({SARA: 1.0, SAILOR: 1.0}, tmp_path / "oxe", {"streaming": True, "shuffle_buffer": 2})
    figures = []
    for workers in (0, 2):  # two workers share five frames of each dataset, so one of them adds frames
        settings = SMALL | {"dataloader_num_workers": workers, "per_device_eval_batch_size": 3}
        run = FinetuneArguments(model=base, data=mixture, output=tmp_path / "run", settings=settings, validation=True)
        trainer = build_trainer(run)
        read = [(frame["dataset"], frame["episode_index"]) for frame in EvaluationStream(trainer.eval_dataset)]
        assert read == [(SARA, 10)] * 5 + [(SAILOR, 10)] * 5
        figures.append(trainer.evaluate())
    for name in ("loss", "action_accuracy", "action_l1"):
        for key in (f"eval_{name}", f"eval_{name}/{SARA}", f"eval_{name}/{SAILOR}"):
            assert figures[0][key] == pytest.approx(figures[1][key], abs=1e-6)
    of_both = [figures[0][f"eval_loss/{name}"] for name in (SARA, SAILOR)]
    assert of_both[0] != of_both[1]
    assert figures[0]["eval_loss"] == pytest.approx(sum(of_both) / 2)
    run = FinetuneArguments(
        model=base, data=mixture, output=tmp_path / "run", settings=SMALL, validation=True, eval_frames=2
    )
    assert len(list(EvaluationStream(read_frames(run, 0, {}).evaluation))) == 4


@pytest.mark.parametrize("is_mixture", [False, True], ids=["dataset", "mixture"])
def test_a_dataset_without_a_robot_is_noted_once_with_the_way_out(base, cache, tmp_path, caplog, is_mixture):
    write_rlds([fake_episode(steps=2, size=16)] * 2, tmp_path / "own_arm")
    write_rlds([fake_episode(steps=2, size=16)] * 2, tmp_path / SARA)
    options = {"streaming": True}
    data = [TrainingData(tmp_path / name, options) for name in (SARA, "own_arm")]
    data = TrainingMixture({SARA: 1.0, "own_arm": 1.0}, tmp_path, options) if is_mixture else data
    run = FinetuneArguments(model=base, data=data, output=tmp_path / "run")
    load_datasets(run, 0, {})
    (note,) = (one.getMessage() for one in caplog.records if "No robot is known" in one.getMessage())
    assert "'own_arm'" in note
    assert "as --robots." in note
    assert ("choose a robot with --robot," in note) != is_mixture
    caplog.clear()
    chosen = TrainingData(tmp_path / "own_arm", options | {"robot": "generic"})
    load_datasets(dataclasses.replace(run, data=chosen), 0, {})
    assert not caplog.records


@pytest.mark.parametrize(
    ("before", "told"),
    [
        ({SARA: 2, SAILOR: 1}, f"'{SARA}' has the weight 1 instead of 2; '{SAILOR}' has the weight 0.5 instead of 1."),
        ({SARA: 1}, f"'{SAILOR}' is new."),
        ({SARA: 1, SAILOR: 0.5, "kuka": 1}, "'kuka' is missing."),
        ({SAILOR: 0.5, SARA: 1}, f"the order of the datasets is {SARA}, {SAILOR} instead of {SAILOR}, {SARA}."),
    ],
)
def test_another_mixture_is_refused_on_resume_by_the_datasets_that_differ(base, data, tmp_path, capsys, before, told):
    checkpoint = tmp_path / "out" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").touch()
    saved = {"weights": [*before.values()], "mixture": {name: {"weight": one} for name, one in before.items()}}
    (checkpoint / "training.json").write_text(json.dumps(saved))
    command = ["finetune", "--model", str(base), "--data-dir", str(data), "--output", str(tmp_path / "out")]
    assert main([*command, "--mixture", json.dumps({SARA: 1, SAILOR: 0.5}), "--resume"]) == 2
    printed = capsys.readouterr().err
    assert f"The mixture differs from that of {checkpoint}: {told} Resume with the former mixture, or start" in printed
    assert "--weights" not in printed


def test_another_row_is_refused_on_resume_by_its_dataset_and_both_values(base, cache, tmp_path):
    rows = tmp_path / "own.toml"
    episode = [
        frame | {"images": dict.fromkeys(("image", "wrist"), frame["image"])} for frame in fake_episode(steps=3)
    ]
    write_rlds([episode] * 2, tmp_path / "own_arm")
    checkpoint = tmp_path / "out" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").touch()

    def record(row, more="", **options):
        rows.write_text(f"[datasets.own_arm]\ncameras = {{ {row} }}\n{more}")
        add_table(rows)
        mixture = TrainingMixture({"own_arm": 1.0}, tmp_path, {"streaming": True, **options})
        run = FinetuneArguments(model=base, data=mixture, output=tmp_path / "out")
        return {"base_model": "base", "arguments": {}, **read_frames(run, 0, {}).record}

    def resume(*args, **options):
        return check_output(tmp_path / "out", record(*args, **options), resume=True)

    (checkpoint / "training.json").write_text(json.dumps(record("full_image = 'image'")))
    # Neither a camera that is not read nor the place of the data changes a frame.
    assert resume("full_image = 'image', wrist = 'wrist'", "source = 'a shelf'") == str(checkpoint)
    told = rf"The dataset {tmp_path}/own_arm is read differently than for {checkpoint}: "
    with pytest.raises(
        ValueError, match=rf"{told}camera is '\S*wrist' instead of '\S*image'\. Resume with the former"
    ):
        resume("full_image = 'wrist'")
    with pytest.raises(ValueError, match=rf"{told}transform is \('action = .*',\) instead of \(\)\. Resume"):
        resume("full_image = 'image'", "transform = ['action = action[:6], action[-1:] | invert']")
    (checkpoint / "training.json").write_text(json.dumps(record("full_image = 'image'", cameras=["full_image"])))
    with pytest.raises(ValueError, match=rf"{told}.*cameras is .*wrist.* instead of .*image"):
        resume("full_image = 'wrist'", cameras=["full_image"])
    known_table().datasets.pop("own_arm")


def test_too_few_episodes_for_validation_are_told_before_the_statistics_are_computed(base, data, cache, tmp_path):
    mixture = TrainingMixture({SARA: 1.0}, data, {"streaming": True})
    run = FinetuneArguments(model=base, data=mixture, output=tmp_path / "run", settings=SMALL, validation=True)
    with pytest.raises(ValueError, match=r"train\[95%:\].* contains no episodes, since 4 is too few") as refused:
        read_frames(run, 0, {})
    assert "hold out a larger share with `eval_share` (without `streaming`), or leave the evaluation out." in str(
        refused.value
    )
    assert not list(cache_folder().glob("statistics-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (f"--data {{}}/{SARA} --eval-share 0.5", f"'{SARA}' has 1 episode, so none can be held out. Set --eval-share"),
        (f"--mixture {SARA} --data-dir {{}} --validation", "[95%:]' of {} contains no episodes"),
        (f"--mixture {SARA} --data-dir {{}} --validation --streaming --world-size 2", "[95%:]' of {} contains no"),
    ],
)
def test_a_dry_run_finds_too_few_episodes_for_the_evaluation(options, message, base, cache, tmp_path, capsys):
    folder = write_rlds([fake_episode(steps=2, size=16)], tmp_path / SARA)
    command = ["finetune", "--model", str(base), "--output", str(tmp_path / "run"), "--dry-run"]
    assert main([*command, *options.format(tmp_path).split()]) == 2
    assert message.format(folder) in capsys.readouterr().err


def test_the_command_line_and_a_config_file_give_a_mixture(base, data, tmp_path, capsys):
    config = tmp_path / "run.toml"
    config.write_text(f'''
model = "{base}"
data-dir = "{data}"
allow-missing = true
streaming = false
eval_share = 0.25
cameras = ["full_image"]
[mixture]
{SARA} = 1
kuka = 0.5
[set]
lora_rank = 4
''')
    argv = ["finetune", "--config", str(config), "--output", "out", "--eval-share", "0.5"]
    arguments = read_arguments(build_parser().parse_args(insert_config(argv)))
    assert arguments.data == TrainingMixture(
        f'{{"{SARA}": 1, "kuka": 0.5}}',
        str(data),
        {"split": None, "every": None, "drop_idle": None, "skip_bad_episodes": False, "streaming": False,
         "shuffle_buffer": 0, "cameras": ["full_image"]},
        allow_missing=True,
    )  # fmt: skip
    assert (arguments.eval_share, arguments.settings["lora_rank"]) == (0.5, 4)
    assert [one.weight for one in arguments.datasets] == [1]

    own = str(data / "own.json")
    command = ["finetune", "--model", str(base), "--mixture", own, "--data-dir", str(data), "--output", "out"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "kuka: gs://gresearch/robotics/kuka" in message
    assert "Pass --allow-missing to go on without them." in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--mixture kuka", "--mixture needs the folder of its datasets. Give it as --data-dir."),
        ("--mixture kuka --data-dir d --weights 2", "--weights does not apply to --mixture."),
        ("--data a --data-dir d", "--data-dir needs --mixture."),
        ("--data a --allow-missing", "--allow-missing needs --mixture."),
        ("--mixture kuka --data-dir d --streaming --eval-share 0.1", "can't hold out episodes of a stream."),
        ("--mixture roboset --data-dir d", "'roboset' can't be trained on"),
        ("--config missing.toml", "There is no file 'missing.toml' with the options of a run"),
    ],
)
def test_contradicting_options_of_a_mixture_are_told(options, message, base, capsys):
    command = ["finetune", "--model", str(base), "--output", "out", *options.split()]
    assert main(command) == 2
    assert message in capsys.readouterr().err
