import importlib.util
import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from openvla_hf.cli import build_parser, main, without_traceback
from openvla_hf.cli.common import PLATFORMS, image, print_json
from openvla_hf.cli.predict import camera_image
from openvla_hf.data import TrainingStream, load, write_lerobot, write_rlds
from openvla_hf.modeling import oft_loading
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.tabletop.expert import record_demonstrations
from openvla_hf.testing import (
    BRIDGE_LIKE_STATS,
    fake_episode,
    tiny_config,
    tiny_processor,
    tiny_tokenizer,
    write_tiny_oft,
)


BOUNDS = ("q01", "q99", "min", "max")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """An untrained saved policy for the tabletop's arm, and an image."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer()
    still = {bound: [*BRIDGE_LIKE_STATS[bound][:3], 0.0, 0.0, 0.0, *BRIDGE_LIKE_STATS[bound][6:]] for bound in BOUNDS}
    config = tiny_config(tokenizer, norm_stats={"tiny": {"action": BRIDGE_LIKE_STATS | still}})
    OpenVLAForActionPrediction(config).save_pretrained(folder)
    tiny_processor(tokenizer, config).save_pretrained(folder)
    Image.fromarray(fake_episode(steps=1)[0]["image"]).save(folder / "frame.png")
    return folder


def test_an_error_in_a_process_that_reads_data_is_told_without_its_traceback(tmp_path, cache):
    write_rlds([fake_episode(steps=2, size=16)], tmp_path / "arm")
    file = next(tmp_path.rglob("*.tfrecord*"))
    file.write_bytes(file.read_bytes()[:-9])
    frames = TrainingStream(load(tmp_path / "arm", streaming=True))
    with pytest.raises(ValueError, match="Original Traceback") as error:
        next(iter(torch.utils.data.DataLoader(frames, num_workers=1)))
    told = without_traceback(str(error.value))
    assert told == f"{file}, record 0 (byte 0): the file is cut short. Download it again."
    assert without_traceback(told) == told


def predict(policy, *more):
    image = ["--image", str(policy / "frame.png"), "--instruction", "pick up the red block"]
    return main(["predict", "--model", str(policy), *image, *more])


def test_predict_prints_the_action_as_json(policy, capsys):
    assert predict(policy, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["names"][-1] == "gripper"
    assert len(result["action"]) == len(result["token_ids"]) == len(result["probabilities"]) == 7
    assert np.isfinite(result["action"]).all()
    assert np.abs(result["normalized_action"]).max() <= 1


def test_predict_prints_a_table_for_people(policy, capsys):
    assert predict(policy) == 0
    table = capsys.readouterr().out
    assert "dx" in table
    assert "gripper" in table


def test_dimensions_have_the_names_from_the_policys_data(policy, capsys, tmp_path):
    joints = [f"joint{index}" for index in range(7)]
    shutil.copytree(policy, tmp_path / "named")
    config = json.loads((policy / "config.json").read_text())
    config["norm_stats"]["tiny"]["action"]["names"] = joints
    (tmp_path / "named/config.json").write_text(json.dumps(config))
    (tmp_path / "named/dataset_statistics.json").write_text(json.dumps(config["norm_stats"]))
    assert predict(tmp_path / "named") == 0
    table = capsys.readouterr().out
    assert all(name in table for name in joints)
    assert "dx" not in table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("frame.png", (None, "frame.png")),
        ("front=frame.png", ("front", "frame.png")),
        ("a=1.png", (None, "a=1.png")),
        ("folder/b=2.png", (None, "folder/b=2.png")),
        ("https://example.com/a?size=1", (None, "https://example.com/a?size=1")),
        ("front=https://example.com/a?size=1", ("front", "https://example.com/a?size=1")),
    ],
)
def test_an_image_may_name_its_camera(text, expected, policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("frame.png", "a=1.png", "folder/b=2.png"):
        shutil.copyfile(policy / "frame.png", name)
    assert camera_image(text) == expected


def test_the_platforms_are_those_of_the_model():
    assert set(PLATFORMS) == oft_loading.PLATFORMS.keys()


def test_images_and_states_that_a_plain_policy_does_not_take(policy, capsys):
    frame = str(policy / "frame.png")
    command = ["predict", "--model", policy, "--instruction", "x", "--image", frame]
    assert "Got 2 images, but this policy takes one: give --image once." in refusal(capsys, *command, "--image", frame)
    named = ["--image", f"front={frame}"]
    assert "give one CAMERA=IMAGE for each camera" in refusal(capsys, *command, *named)
    assert "Got images by camera name ('front')" in refusal(capsys, *command[:-2], *named)
    assert "the policy of this processor takes none: leave --state out" in refusal(
        capsys, *command, "--state", "0.1 -2e-3"
    )
    assert "argument --state: must be numbers separated by spaces, got 'home'" in refusal(
        capsys, *command, "--state", "home"
    )


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    """Return a function that gives the folder of a published OpenVLA-OFT checkpoint with some kind of head."""
    folder = tmp_path_factory.mktemp("oft")
    write_tiny_oft(folder / "l1")
    write_tiny_oft(folder / "none", head="none", proprio=False)
    return folder


def test_predict_prints_a_chunk_of_several_cameras_and_a_state(chunks, policy, capsys):
    frame = policy / "frame.png"
    cameras = ["--image", f"wrist_image={frame}", "--image", f"full_image={frame}"]
    command = ["predict", "--model", str(chunks / "l1"), "--instruction", "open"]
    state = ["--state", "0.1 -2e-3 0 0 0 0 0 1"]
    assert main([*command, *cameras, *state, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert np.shape(result["action"]) == np.shape(result["normalized_action"]) == (8, 7)
    assert (result["token_ids"], result["probabilities"]) == (None, None)
    assert main([*command, "--image", str(frame), "--image", str(frame), *state]) == 0
    table = capsys.readouterr().out
    assert "gripper" in table
    assert f"{result['action'][7][0]:+.4f}" in table
    assert "probability" not in table
    assert "has no image from 'full_image'" in refusal(capsys, *command, *cameras[:2], *state)
    assert "The state is missing: pass --state with the 8 dimensions" in refusal(capsys, *command, *cameras)


def test_predict_prints_a_chunk_of_tokens(chunks, policy, capsys):
    command = ["predict", "--model", str(chunks / "none"), "--instruction", "open", "--platform", "libero"]
    command += ["--image", str(policy / "frame.png")]
    assert "has no component files of OpenVLA-OFT, so --platform libero does not apply" in refusal(capsys, *command)
    command += ["--action-decoding", "parallel"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert np.shape(result["action"]) == np.shape(result["token_ids"]) == np.shape(result["probabilities"]) == (8, 7)
    assert main(command) == 0
    assert "probability" in capsys.readouterr().out


def test_a_wrong_key_is_reported_in_one_sentence(policy, capsys):
    assert predict(policy, "--unnorm-key", "tinny") == 2
    assert "Did you mean 'tiny'?" in capsys.readouterr().err


def refusal(capsys, *arguments):
    """Run a command that must fail, and return the line with the reason."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as error:
        status = error.code
    error = capsys.readouterr().err
    assert status == 2, error
    assert error.startswith("openvla-hf")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "command", ["serve someone/nope --port 0", "evaluate someone/nope", "doctor demos --model someone/nope"]
)
def test_a_hub_that_does_not_answer_is_asked_once_for_a_policy(owner, capsys, command):
    owner.faults["*"] = 0
    assert "Cannot read the files of someone/nope: the Hub does not answer" in refusal(capsys, *command.split())
    assert len(owner.requests) <= 3


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (0, r"the files of lab/kitchn: the Hub does not answer \(\w+\), and there is no folder of this name"),
        (503, r"the files of lab/kitchn: the Hub failed \(HTTP 503\)"),
        (404, "lab/kitchn is not a local folder, and the Hub has no such repository"),
    ],
)
def test_a_misspelt_folder_of_a_dataset_is_refused_in_one_line(owner, capsys, status, reason):
    if status != 404:
        owner.faults["*"] = status
    assert re.search(reason, refusal(capsys, "doctor", "lab/kitchn"))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
@pytest.mark.parametrize(
    "command",
    ["predict --image https://example.com/a.png --instruction x", "bench --random tiny", "evaluate", "demo", "serve"],
)
def test_a_device_that_is_not_there_is_refused_in_one_line(command, device, capsys):
    error = refusal(capsys, *command.split(), "--device", device)
    kind = device.split(":")[0].upper()
    assert f"PyTorch finds no {kind} device: leave --device out to run on the CPU." in error


@pytest.mark.parametrize("command", ["bench --random tiny", "evaluate", "quantize --report"])
def test_a_device_of_no_known_kind_is_refused_in_one_line(command, capsys):
    assert "'foo' is not a device: give a name such as cpu" in refusal(capsys, *command.split(), "--device", "foo")


@pytest.mark.parametrize(
    "command",
    [
        "predict --image https://example.com/a.png --instruction x",
        "bench",
        "merge a/b c",
        "quantize a/b c",
        "convert a/b c",
    ],
)
def test_an_unknown_dtype_is_refused_in_one_line(command, capsys):
    assert "--dtype: invalid choice: 'garbage'" in refusal(capsys, *command.split(), "--dtype", "garbage")


@pytest.mark.parametrize("value", ["-1", "1", "1.5", "nan", "much"])
def test_a_held_out_share_is_at_least_0_and_below_1(value, capsys):
    command = ["finetune", "--model", "a/b", "--data", "c/d", "--output", "e", f"--eval-share={value}"]
    assert "argument --eval-share: " in refusal(capsys, *command)


CHECKPOINT_COMMANDS = [
    "predict --image https://example.com/a.png --instruction x --model {}",
    "evaluate --model {}",
    "bench --model {}",
    "serve {}",
    "doctor lab/kitchen --model {}",
    "finetune --data lab/kitchen --output out --model {}",
    "info {}",
    "check {}",
    "export {} out",
    "convert {} out",
    "quantize {} out",
    "merge {} out",
    "merge a/b out --base {}",
]


@pytest.mark.parametrize("command", CHECKPOINT_COMMANDS)
def test_a_source_that_is_neither_a_folder_nor_a_hub_id_is_refused_in_one_line(command, capsys):
    error = refusal(capsys, *command.format("/no/where").split())
    assert error.endswith(": '/no/where' is neither a folder nor a Hub id (user/name).\n")


@pytest.mark.parametrize("command", CHECKPOINT_COMMANDS)
def test_a_folder_without_a_config_is_not_a_checkpoint(command, capsys, tmp_path):
    error = refusal(capsys, *command.format(tmp_path).split())
    assert (
        f"'{tmp_path}' is not a checkpoint: the folder has neither a config.json nor an adapter_config.json" in error
    )


def test_an_image_that_is_not_there_is_refused_in_one_line(capsys):
    assert "argument --image: There is no file '/no/frame.png'." in refusal(
        capsys, "predict", "--image", "/no/frame.png", "--instruction", "x"
    )


def test_an_image_that_cannot_be_read_is_refused_in_one_line(policy, capsys, tmp_path, monkeypatch, recwarn):
    def refused(image):
        return refusal(capsys, "predict", "--model", str(policy), "--image", str(image), "--instruction", "x")

    data = (policy / "frame.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    assert "cut.png' is damaged, truncated or closed" in refused(tmp_path / "cut.png")
    assert "could not be downloaded: [Errno" in refused("http://127.0.0.1:9/frame.png")
    for pixels in (3000, 1000):  # the image has 64 x 64; PIL warns of it, and then raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
        assert f"too large: resize or crop it to at most {pixels} pixels" in refused(policy / "frame.png")
    assert "DecompressionBombWarning" not in {warning.category.__name__ for warning in recwarn}


def test_the_scheme_of_an_image_url_may_be_in_capitals():
    assert image("HTTPS://example.com/a.png") == "HTTPS://example.com/a.png"


def test_settings_may_be_given_in_parts():
    command = "finetune --model a/b --data c --output d --set lora_rank=4 --set seed=1 dtype=float32"
    given = build_parser().parse_args(command.split()).set
    assert given == [("lora_rank", 4), ("seed", 1), ("dtype", "float32")]


def test_a_file_that_is_not_an_image_is_refused_in_one_line(capsys):
    error = refusal(capsys, "predict", "--image", __file__, "--instruction", "x")
    assert f"argument --image: {__file__!r} is not an image that PIL can read." in error


@pytest.mark.parametrize("command", ["doctor a/b", "quantize --report", "finetune --model a/b --data c --output d"])
def test_a_file_of_robots_that_is_not_there_is_refused_in_one_line(command, capsys):
    assert "argument --robots: There is no file 'no.py'." in refusal(capsys, *command.split(), "--robots", "no.py")


def test_a_policy_is_not_an_adapter_to_merge(policy, capsys, tmp_path):
    error = refusal(capsys, "merge", policy, tmp_path / "merged")
    assert "is not an adapter: the folder has no adapter_config.json." in error


@pytest.mark.parametrize(
    "command",
    [
        "quantize {} out",
        "quantize {} out --format 8bit",
        "quantize --report {}",
        "finetune --model {} --data lab/kitchen --output out",
        "finetune --model {} --data lab/kitchen --output out --dry-run",
        "export {} out",
    ],
)
def test_an_adapter_must_be_merged_first(command, capsys, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b", "peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").touch()
    error = refusal(capsys, *command.format(tmp_path).split())
    assert error.startswith(f"openvla-hf: {tmp_path} is an adapter. Merge it first with `openvla-hf merge {tmp_path}")


@pytest.mark.parametrize("command", ["doctor {0}", "finetune --model {0} --data {0} --output {1}"])
def test_a_checkpoint_is_not_taken_for_a_dataset(command, policy, capsys, tmp_path):
    status = main(command.format(policy, tmp_path / "out").split())
    assert status == 2
    assert f"'{policy}' is a checkpoint, not a dataset" in capsys.readouterr().err.splitlines()[-1]


def test_errors_name_options_by_their_flags(capsys, policy, tmp_path):
    several = shutil.copytree(policy, tmp_path / "several")
    config = json.loads((several / "config.json").read_text())
    config["norm_stats"] = dict.fromkeys(("one", "two"), config["norm_stats"]["tiny"])
    (several / "config.json").write_text(json.dumps(config))
    (several / "dataset_statistics.json").write_text(json.dumps(config["norm_stats"]))
    command = ["predict", "--model", several, "--image", policy / "frame.png", "--instruction", "x"]
    error = refusal(capsys, *command)
    assert "pass --unnorm-key, one of 'one', 'two'" in error
    assert "Unknown --unnorm-key 'three'" in refusal(capsys, *command, "--unnorm-key", "three")


@pytest.mark.parametrize(
    ("command", "message", "told"),
    [
        ("push . a/b", "give its Hub id as base_model.", "give its Hub id as --base-model."),
        ("push . a/b", "There is no /home/base_model/base_model.bin.", "There is no /home/base_model/base_model.bin."),
        ("merge a/b c", "give it with `base=`. Try `dtype='float32'`.", "give it with --base. Try --dtype float32."),
        ("doctor a/b", "pass camera=, one of 'a'; the camera is", "pass --camera, one of 'a'; the camera is"),
        ("doctor a/b", "The model's data set `data_set` has no name.", "The model's data set `data_set` has no name."),
        ("finetune --model a/b --data c --output d", "load with streaming=True.", "load with --streaming."),
        ("finetune --model a/b --data c --output d", "with weights=[1.0, 2.0], and", "with --weights 1.0 2.0, and"),
        ("finetune --model a/b --data c --output d", "give eval_share=0.1.", "give --eval-share 0.1."),
    ],
)
def test_only_the_options_of_the_command_become_flags(command, message, told):
    assert build_parser().parse_args(command.split()).in_flags(message) == told


def test_piped_output_is_not_wrapped(policy, capsys, tmp_path):
    instruction = "push the red block " * 20
    assert main(["predict", "--image", str(policy / "frame.png"), "--instruction", instruction.strip()]) == 0
    assert instruction.strip() in capsys.readouterr().out.splitlines()
    folder = shutil.copytree(policy, tmp_path / ("a-long-name-" * 10))
    assert main(["info", str(folder)]) == 0
    assert str(folder) in capsys.readouterr().out.splitlines()


def test_brackets_in_an_instruction_are_printed(policy, capsys):
    instruction = "[bold]push[/] the [/red] block"
    assert main(["predict", "--image", str(policy / "frame.png"), "--instruction", instruction]) == 0
    assert instruction in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_output_contains_only_numbers_that_json_allows(value, capsys):
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"action": [value]})
    assert capsys.readouterr().out == ""


@pytest.fixture
def command_line(interpreters):
    """Return a function that starts a command in a new process."""

    def start(*arguments, **env):
        environment = os.environ | {"HF_HUB_OFFLINE": "1"} | env
        return interpreters.start("-m", "openvla_hf.cli", *map(str, arguments), env=environment)

    return start


def test_a_terminal_without_unicode_gets_escapes(policy, command_line):
    frame = ["--image", policy / "frame.png", "--instruction", "pousse le dé “rouge”"]
    process = command_line("predict", "--model", policy, *frame, PYTHONIOENCODING="ascii")
    assert process.wait() == 0, process.errors()
    assert "pousse le d\\xe9 \\u201crouge\\u201d" in process.output()
    assert process.output().isascii()


@pytest.mark.slow
def test_fine_tuning_hides_deprecation_warnings_of_other_libraries(policy, interpreters, tmp_path):
    write_lerobot([fake_episode(steps=6)], tmp_path / "kitchen")
    common = ["--model", str(policy), "--data", str(tmp_path / "kitchen"), "--steps", "1", "--workers", "0"]
    recipes = ["lora", "qlora"] if importlib.util.find_spec("bitsandbytes") else ["lora"]
    small = ["--set", "batch_size=2", "lora_rank=2"]
    commands = [["finetune", *common, "--output", f"{tmp_path}/{one}", "--recipe", one, *small] for one in recipes]
    code = f"from openvla_hf.cli import main\nprint([main(command) for command in {commands}])"
    result = interpreters.run("-c", code, env=os.environ | {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "0"})
    error = result.stderr
    assert result.stdout.splitlines()[-1] == str([0] * len(recipes)), error
    assert "deprecated" not in error
    assert "Warning" not in error
    assert "incompatible" not in error
    assert "Failed to load" not in error


def test_ctrl_c_ends_a_command_in_one_line(command_line):
    process = command_line("evaluate", "--episodes", "5000", "--batch-size", "1")
    while process.poll() is None and "done" not in process.errors():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 130
    assert process.output() == ""
    assert process.errors().splitlines()[-1] == "openvla-hf: Interrupted."
    assert "Traceback" not in process.errors()


def test_demo_writes_pictures_and_evaluate_counts(policy, capsys, tmp_path):
    more = ["--model", str(policy), "--episodes", "2", "--json"]
    assert main(["demo", *more, "--output", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["results"]["as told"]["all"]["episodes"] == 2
    assert Image.open(result["gif"]).n_frames > 10
    assert Image.open(result["strip"]).width > 1000
    assert main(["evaluate", *more, "--condition", "swapped"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["results"]) == ["swapped"]
    assert 1 < report["forward_passes_per_action"] <= 7
    assert report["actions_per_second"] > 0


def test_options_of_the_other_evaluation_are_refused(policy, capsys):
    model = ["--model", str(policy)]
    assert main(["evaluate", *model, "--frames", "3"]) == 2
    assert "--frames is for recorded data: give --data." in capsys.readouterr().err
    assert main(["evaluate", *model, "--execute", "2"]) == 2
    assert "--execute 2 is not between 1 and 1" in capsys.readouterr().err
    assert main(["evaluate", *model, "--data", "there", "--task", "put"]) == 2
    assert "--task is for the tabletop: leave out --data." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (["--report", "--robot", "nope"], "--robot is for recorded data: give --data."),
        (["--report", "--camera", "nope"], "--camera is for recorded data: give --data."),
        (["--report", "--drop-idle"], "--drop-idle is for recorded data: give --data."),
        (["new", "--drop-idle"], "--drop-idle is for a report: give --report."),
        (["new", "--data", "lab/kitchen"], "--data is for a report: give --report."),
        (
            ["new", "--report"],
            "A report writes no checkpoint. Leave out 'new', or leave out --report to write the checkpoint.",
        ),
    ],
)
def test_options_that_quantize_would_ignore_are_refused(policy, capsys, option, told):
    assert told in refusal(capsys, "quantize", policy, *option)


@pytest.mark.parametrize("kind", ["lerobot", "rlds"])
def test_recorded_demonstrations_can_be_loaded(kind, capsys, tmp_path):
    folder = tmp_path / "tabletop_lift"
    assert main(["record", str(folder), "--task", "lift", "--episodes", "2", "--format", kind, "--json"]) == 0
    frames = load(json.loads(capsys.readouterr().out)["folder"], "tabletop")
    assert frames[0]["instruction"].startswith("lift the")
    assert np.asarray(frames[0]["image"]).shape == (224, 224, 3)
    assert main(["record", str(folder) + "2", "--task", "fold"]) == 2
    assert "Choose from put, push, stack, lift" in capsys.readouterr().err


def test_both_cameras_and_the_state_are_recorded_on_request(capsys, tmp_path):
    folder = tmp_path / "tabletop_lift"
    options = ["--task", "lift", "--episodes", "1", "--cameras", "image", "wrist", "--state"]
    assert main(["record", str(folder), *options, "--json"]) == 0
    image, wrist = (load(folder, "tabletop", camera=f"observation.images.{name}") for name in ("image", "wrist"))
    recorded = next(record_demonstrations(["lift"], [0], cameras=["image", "wrist"], state=True))
    assert len(image) == len(wrist) == len(recorded)
    for index, truth in enumerate(recorded):
        np.testing.assert_array_equal(image[index]["state"], truth["state"])
        for frames, name in ((image, "image"), (wrist, "wrist")):
            assert np.abs(frames[index]["image"].astype(float) - truth["images"][name]).mean() < 6
    assert json.loads((folder / "meta/info.json").read_text())["features"]["observation.state"]["names"] == [
        "x",
        "y",
        "z",
        "opening",
    ]


@pytest.mark.parametrize(
    ("command", "count"), [("demo", 1), ("evaluate", 4), ("predict", 1), ("record", 1), ("check", 3), ("doctor", 3)]
)
def test_help_shows_groups_of_options_and_examples(command, count, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    options, examples = capsys.readouterr().out.split("\nexamples:\n" if count > 1 else "\nexample:\n")
    assert examples.count(f"  openvla-hf {command} ") == count
    if count > 1:
        assert len(re.findall(r"^[a-z ]+:$", options, re.MULTILINE)) > 3
