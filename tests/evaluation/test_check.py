"""`check` finds each planted mistake, and passes good checkpoints."""

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from openvla_hf.checkpoints.merge import merge_adapter
from openvla_hf.checkpoints.quantize import quantization
from openvla_hf.checkpoints.shared_files import package_code
from openvla_hf.cli import main
from openvla_hf.data import Gripper, Robot, from_episodes, write_lerobot
from openvla_hf.data.statistics import compute_statistics
from openvla_hf.evaluation.check import check, check_policy
from openvla_hf.evaluation.open_loop import load_options
from openvla_hf.modeling import modeling_openvla
from openvla_hf.modeling.action_decoding import action_pass
from openvla_hf.processing.processing_openvla import REASONING_PROMPT, VICUNA_PROMPT
from openvla_hf.tabletop.expert import record_demonstrations
from openvla_hf.tabletop.rollouts import TABLETOP_POLICY
from openvla_hf.testing import BRIDGE_LIKE_STATS, fake_episode, write_tiny_oft


ARM = Robot("arm", gripper=Gripper())
IMAGE_FIELDS = {"resample": "lanczos3", "center_crop_area": 0.9}


@pytest.fixture(scope="module")
def tabletop():
    """The tabletop's policy, in memory. Tests must not change it."""
    return AutoModel.from_pretrained(TABLETOP_POLICY), AutoProcessor.from_pretrained(TABLETOP_POLICY)


@pytest.fixture
def policy(tiny):
    """A plain policy with random weights to damage."""
    model, processor = tiny()
    return SimpleNamespace(model=model, processor=processor)


@pytest.fixture(scope="module")
def demonstrations():
    """Episodes of the tabletop's expert."""
    return list(record_demonstrations(["put"], range(4)))


@pytest.fixture(scope="module")
def oft_folder(tmp_path_factory):
    """A checkpoint of OpenVLA-OFT in the layout of the original."""
    folder = write_tiny_oft(tmp_path_factory.mktemp("oft"))
    AutoProcessor.from_pretrained(folder, **IMAGE_FIELDS).save_pretrained(folder)
    return folder


@pytest.fixture
def oft(oft_folder):
    """A policy of OpenVLA-OFT to damage."""
    model = AutoModel.from_pretrained(oft_folder)
    for bound, value in (("q01", 0.0), ("min", 0.0), ("q99", 1.0), ("max", 1.0)):  # of the gripper
        model.config.norm_stats["tiny"]["action"][bound][6] = value
    return SimpleNamespace(model=model, processor=AutoProcessor.from_pretrained(oft_folder))


@pytest.fixture
def published(recorded):
    """A checkpoint in the published layout."""
    record = recorded("fused-224")
    return SimpleNamespace(model=record.model, processor=copy.deepcopy(record.processor), checkpoint=record.checkpoint)


@pytest.fixture
def folder(tmp_path):
    """A copy of the tabletop's checkpoint to damage."""
    return shutil.copytree(TABLETOP_POLICY, tmp_path / "policy")


def found(report, name, status="failed"):
    """Return what a check found, with the fix, and require its status."""
    (one,) = (one for one in report.findings if one.check == name and one.status == status)
    assert one.fix
    return f"{one.found} {one.fix}"


def statuses(report):
    """Return the worst status of each check, of which some have a finding for each camera or tower."""
    ranks = ["skipped", "passed", "warned", "failed"]
    return {one.check: one.status for one in sorted(report.findings, key=lambda one: ranks.index(one.status))}


def change_frames(demonstrations, **changes):
    """Return the frames of a dataset, each with the fields that a function makes from its own."""
    return from_episodes(
        [[frame | {name: change(frame[name]) for name, change in changes.items()} for frame in episode]
         for episode in demonstrations],
        ARM,
        name="tabletop",
    )  # fmt: skip


# Good checkpoints


def test_the_tabletop_checkpoint_passes_also_on_its_data(tabletop, demonstrations):
    frames = from_episodes(demonstrations, ARM, name="tabletop")
    report = check_policy(*tabletop, TABLETOP_POLICY, frames=frames)
    assert set(statuses(report).values()) <= {"passed", "skipped"}, report.findings
    assert {statuses(report)[name] for name in ("gripper on the data", "key", "actions on the data")} == {"passed"}
    json.dumps(report.as_dict())


def test_a_published_checkpoint_passes(published):
    report = check_policy(published.model, published.processor, published.checkpoint)
    assert set(statuses(report).values()) <= {"passed", "skipped"}, report.findings


@pytest.mark.parametrize("head", ["l1", "diffusion", "none"])
def test_an_oft_checkpoint_passes(oft_folder, tmp_path, head):
    source, loading = oft_folder, {}
    if head != "l1":
        source = write_tiny_oft(tmp_path, head=head)
        loading = {"platform": "libero"} | ({"action_decoding": "parallel"} if head == "none" else {})
        AutoProcessor.from_pretrained(source, **IMAGE_FIELDS, **loading).save_pretrained(source)
    report = check(source, loading=loading)
    assert report.passed, report.failures
    assert statuses(report)["attention mask"] == statuses(report)["image"] == "passed"


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_checkpoint_passes(bits):
    pytest.importorskip("bitsandbytes")
    report = check(TABLETOP_POLICY, loading={"quantization_config": quantization(bits)})
    assert report.passed, report.failures
    assert statuses(report)["decoding loop"] == "passed"


def test_a_policy_that_reasons_passes(tiny):
    model, processor = tiny(reasoning=True)
    assert "and `reasoning=True`" in found(check_policy(model, processor), "prompt template")
    processor.prompt_template = REASONING_PROMPT
    report = check_policy(model, processor)
    assert report.passed, report.failures


def test_rounding_to_16_bits_is_not_a_mistake():
    report = check(TABLETOP_POLICY, loading={"dtype": "bfloat16"})
    assert report.passed, report.failures


# Inputs, masks, weights and decoding


def test_an_ignored_image_is_found(policy):
    policy.model.model.projector.fc3.weight.data.zero_()
    report = check_policy(policy.model, policy.processor)
    assert "ignores the image. Another image changes the logits by 0" in found(report, "image")
    assert "have one value everywhere (for example 'model.projector.fc3.weight')" in found(report, "weights")


def test_pixels_that_do_not_depend_on_the_image_are_found(policy):
    black = policy.processor.image_processor.resize
    policy.processor.image_processor.resize = lambda image: black(image.point(lambda level: 0))
    report = check_policy(policy.model, policy.processor)
    assert "`pixel_values` reach the model" in found(report, "image")
    assert statuses(report)["instruction"] == "passed"


def test_an_ignored_instruction_is_found(policy):
    policy.processor.build_prompt = lambda instruction: "In: put the red cube on the blue plate\nOut:"
    report = check_policy(policy.model, policy.processor)
    assert "the prompt contains the instruction" in found(report, "instruction")
    assert [one.check for one in report.failures] == ["instruction"]


def test_an_ignored_camera_and_an_ignored_state_are_found(oft):
    state = oft.model.model.proprio_projector
    state.fc2.weight.data.zero_()
    encode = oft.model.model.vision_backbone.forward
    oft.model.model.vision_backbone.forward = lambda pixels, text=None: encode(
        torch.cat([pixels[:, :6], torch.zeros_like(pixels[:, 6:])], dim=1), text
    )
    report = check_policy(oft.model, oft.processor)
    assert "Another image of wrist_image" in found(report, "image")
    assert "Another state changes the actions by 0" in found(report, "state")
    assert statuses(report)["instruction"] == "passed"


@pytest.mark.parametrize("tower", ["featurizer", "fused_featurizer"])
def test_an_ignored_tower_is_found(policy, tower):
    backbone = getattr(policy.model.model.vision_backbone, tower)
    encode = backbone.forward
    backbone.forward = lambda pixel_values, **options: encode(torch.zeros_like(pixel_values), **options)
    report = check_policy(policy.model, policy.processor)
    number = ["featurizer", "fused_featurizer"].index(tower)
    assert f"Zero in place of the pixels of tower {number}" in found(report, "vision tower")
    assert [one.check for one in report.failures] == ["vision tower"]


def test_wrong_rotary_frequencies_are_found(policy):
    rotary = policy.model.model.language_model.rotary_emb
    rotary.to(torch.bfloat16)
    assert statuses(check_policy(policy.model, policy.processor))["positions"] == "passed"
    rotary.inv_freq.mul_(3)
    report = check_policy(policy.model, policy.processor)
    assert "The frequencies of rotary_emb (`inv_freq`)" in found(report, "positions")
    rotary.inv_freq[0] = float("nan")
    assert "rotary_emb.inv_freq" in found(check_policy(policy.model, policy.processor), "weights")


def test_a_causal_mask_in_an_oft_policy_is_found(oft, monkeypatch):
    monkeypatch.setattr(modeling_openvla, "bidirectional_mask", lambda config, embeds, mask: mask)
    report = check_policy(oft.model, oft.processor)
    assert found(report, "attention mask").startswith("Causal, but this policy decodes in parallel. Later tokens")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_bidirectional_mask_in_a_plain_policy_is_found(folder, implementation):
    model = AutoModel.from_pretrained(folder, attn_implementation=implementation)
    forward = model.model.language_model.forward

    def see_everything(inputs_embeds, attention_mask=None, **kwargs):
        rows, length = inputs_embeds.shape[:2]
        mask = torch.zeros(rows, 1, length, length) if attention_mask is None or attention_mask.ndim == 2 else None
        return forward(inputs_embeds=inputs_embeds, attention_mask=attention_mask if mask is None else mask, **kwargs)

    model.model.language_model.forward = see_everything
    report = check_policy(model, AutoProcessor.from_pretrained(folder))
    assert found(report, "attention mask").startswith("Bidirectional, but this policy decodes token by token.")


def test_weights_that_are_not_finite_are_found(policy):
    layers = policy.model.model.language_model.layers
    layers[0].mlp.up_proj.weight.data[3, 5] = 1e30
    layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    layers[1].mlp.gate_proj.weight.data[3, 5] = float("inf")
    report = check_policy(policy.model, policy.processor)
    weights = found(report, "weights")
    assert "2 are not finite (for example 'model.language_model.layers.1.mlp.gate_proj.weight')" in weights
    assert "1 are huge (for example 'model.language_model.layers.0.mlp.up_proj.weight')" in weights
    assert "The logits are not finite. See the finding on the weights." in found(report, "image")
    frames = from_episodes([fake_episode()], ARM, name="tiny")
    assert statuses(check_policy(policy.model, policy.processor, frames=frames))["data"] == "skipped"


def test_a_broken_cached_loop_is_found(policy):
    def lose_positions(model, input_ids, pixels, mask, position_ids, *args):
        return action_pass(model, input_ids, pixels, mask, torch.zeros_like(position_ids), *args)

    policy.model.action_pass = lose_positions
    report = check_policy(policy.model, policy.processor)
    assert "The logits of the cached loop are off by" in found(report, "decoding loop")
    assert [one.check for one in report.failures] == ["decoding loop"]


# Statistics


def write_statistics(folder, statistics):
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))


def test_missing_statistics_are_found(folder):
    (folder / "dataset_statistics.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_stats": None}))
    report = check(folder, unnorm_key="tabletop")
    assert "actions can't be turned into robot units" in found(report, "statistics")


@pytest.mark.parametrize(
    ("bound", "value", "message"),
    [
        ("q99", float("nan"), "'q99' must be a list of finite numbers"),
        ("q01", 0.5, "'q01' is above 'q99' in dimension 2"),
    ],
)
def test_statistics_that_are_not_finite_or_out_of_order_are_found(folder, bound, value, message):
    statistics = json.loads((folder / "dataset_statistics.json").read_text())
    statistics["tabletop"]["action"][bound][2] = value
    write_statistics(folder, statistics)
    report = check(folder)
    assert message in found(report, "statistics")
    assert message in found(report, "loading")


def test_files_with_different_statistics_of_a_key_are_found(folder):
    assert statuses(check(folder))["statistics files"] == "passed"
    statistics = json.loads((folder / "dataset_statistics.json").read_text())
    statistics["tabletop"]["action"]["q99"][0] *= 2
    write_statistics(folder, statistics)
    message = found(check(folder), "statistics files")
    assert "config.json and dataset_statistics.json disagree on 'tabletop'" in message
    assert "save the policy again with `save_pretrained`" in message
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    assert statuses(check(folder))["statistics files"] == "passed"


def test_statistics_of_another_dimension_are_found(oft):
    oft.model.config.norm_stats["tiny"]["action"] = {"q01": [-0.1] * 14, "q99": [0.1] * 14}
    report = check_policy(oft.model, oft.processor)
    assert "'tiny' has 14 action dimensions, but the policy has 7" in found(report, "statistics")


def test_keys_are_counted_whatever_their_names(policy):
    statistics = policy.model.norm_stats.popitem()[1]
    policy.model.norm_stats = {f"left, right, {number}": statistics for number in range(3)}
    report = check_policy(policy.model, policy.processor)
    (one,) = (one for one in report.findings if one.check == "statistics")
    assert one.found == "Finite and in order: left, right, 0 (7), left, right, 1 (7), left, right, 2 (7)."


def test_one_dimension_in_other_units_is_found(tabletop, demonstrations):
    for scale in (1000.0, 180 / np.pi, np.pi / 180, 0.001):
        units = np.array([1.0, scale, 1.0, 1.0, 1.0, 1.0, 1.0])
        scaled = change_frames(demonstrations, action=lambda action, units=units: action * units)
        report = check_policy(*tabletop, frames=scaled)
        assert "but hardly in dimension 1. Check the units" in found(report, "key", "warned")


def test_the_wrong_key_for_the_data_is_found(policy, demonstrations):
    tabletop = json.loads((TABLETOP_POLICY / "dataset_statistics.json").read_text())
    policy.model.norm_stats = {"bridge_orig": {"action": BRIDGE_LIKE_STATS}} | tabletop
    frames = from_episodes(demonstrations, ARM, name="table")
    report = check_policy(policy.model, policy.processor, frames=frames, unnorm_key="bridge_orig")
    assert "Pass unnorm_key='tabletop'." in found(report, "key")
    report = check_policy(policy.model, policy.processor, frames=frames)
    assert "'tabletop' is the nearest" in found(report, "key", "warned")
    with pytest.raises(ValueError, match="bridge_org"):
        check_policy(policy.model, policy.processor, unnorm_key="bridge_org")


def test_a_key_that_is_not_named_is_a_warning(policy, demonstrations):
    statistics = policy.model.norm_stats["tiny"]
    policy.model.norm_stats = {"left": statistics, "right": statistics}
    report = check_policy(policy.model, policy.processor, frames=change_frames(demonstrations))
    assert "none is that of the data" in (message := found(report, "key", "warned"))
    assert "--unnorm-key" in message


def test_a_short_recording_of_the_training_data_fits_its_statistics(policy):
    rng = np.random.default_rng(0)
    long, short = (
        [frame | {"action": np.append(rng.laplace(scale=scale, size=6), step % 2)}
         for step, frame in enumerate(fake_episode(steps=200))]
        for scale in (0.1, 0.02)
    )  # fmt: skip
    statistics = compute_statistics(from_episodes([long, short], ARM, name="arm"))
    policy.model.norm_stats = {"tiny": statistics["arm"]}
    report = check_policy(policy.model, policy.processor, frames=from_episodes([short], ARM, name="short"))
    message = found(report, "key", "warned")
    assert int(message.partition("overlap by ")[2].partition("%")[0]) < 30
    assert "hardly in dimension" not in message
    assert "A short recording also has a small overlap." in message


def test_data_of_another_dimension_and_other_units_are_found(tabletop, demonstrations):
    wide = [[frame | {"action": np.append(frame["action"], 0.0)} for frame in each] for each in demonstrations]
    report = check_policy(*tabletop, frames=from_episodes(wide, ARM, name="wide"))
    assert "'tabletop' have 7 dimensions, but the data has 8." in found(report, "key")
    assert statuses(report)["gripper on the data"] == statuses(report)["actions on the data"] == "skipped"
    for scale in (1000.0, 0.001):
        units = np.array([scale] * 6 + [1.0])
        scaled = change_frames(demonstrations, action=lambda action, units=units: action * units)
        assert "check its units" in found(check_policy(*tabletop, frames=scaled), "key")


def test_an_oft_policy_is_compared_with_the_cameras_and_the_state_of_its_data(oft, make_episode):
    frames = make_episode(0, steps=24)
    for frame in frames:
        image = frame.pop("image")
        frame |= {"images": {"full_image": image, "wrist_image": image[::-1]}, "state": np.append(frame["state"], 0)}
    reading = load_options(oft.model, oft.processor)
    data = from_episodes([frames], ARM, name="arm", **reading)
    oft.model.norm_stats = {"tiny": compute_statistics(data)["arm"]}
    report = check_policy(oft.model, oft.processor, frames=data)
    assert statuses(report)["image"] == "passed"
    told = {one.check: one.found for one in report.findings}
    chunked = int(np.sum([frame["chunk_mask"].sum() for frame in data]))
    assert chunked > len(data)
    assert f"of {chunked} actions, of which" in told["gripper on the data"]
    assert "On 24 frames, the mean error" in told["actions on the data"]
    narrow = [frame | {"state": frame["state"][:7]} for frame in frames]
    data = from_episodes([narrow], ARM, name="arm", **reading)
    report = check_policy(oft.model, oft.processor, frames=data)
    assert "'tiny' have 8 dimensions, but the data has 7" in found(report, "key of the state")
    told = {one.check: one.found for one in report.findings if one.status == "skipped"}
    assert "states of 7 numbers, but the policy needs 8" in told["gripper on the data"]
    assert "See the failure of the key" in told["actions on the data"]


def scale_gripper(model):
    for statistics in model.norm_stats.values():
        statistics["action"]["mask"] = [True] * 7


def test_a_gripper_that_is_scaled_by_mistake_is_found(demonstrations):
    model, processor = (auto.from_pretrained(TABLETOP_POLICY) for auto in (AutoModel, AutoProcessor))
    scale_gripper(model)
    report = check_policy(model, processor, frames=change_frames(demonstrations))
    assert "The statistics scale dimension 6, the gripper" in found(report, "gripper on the data")
    assert "Dimension 6 of 'tabletop' goes from 0 to 1" in found(report, "gripper", "warned")


@pytest.mark.parametrize("stays_open", [False, True])
def test_a_gripper_that_training_scaled_passes(demonstrations, stays_open):
    model, processor = (auto.from_pretrained(TABLETOP_POLICY) for auto in (AutoModel, AutoProcessor))
    encode, largest = model.predict_action, 0.98

    def predict_scaled(**inputs):
        details = encode(**inputs)
        opening = (details.normalized_actions[..., 6] > 0.5) | stays_open
        details.normalized_actions[..., 6], details.actions[..., 6] = np.where(opening, 1.0, -1.0), opening * largest
        return details

    model.predict_action = predict_scaled
    scale_gripper(model)
    data = demonstrations
    if stays_open:
        data = [[frame for frame in episode if frame["action"][6] > 0.5] for episode in demonstrations]
    report = check_policy(model, processor, frames=change_frames(data))
    assert statuses(report)["gripper on the data"] == ("skipped" if stays_open else "passed")


# The policy's actions beside the recorded ones


def mirror_height(policy):
    stats = policy.model.norm_stats["tabletop"]["action"]
    stats["q01"][2], stats["q99"][2] = -stats["q99"][2], -stats["q01"][2]


def end_in_another_id(policy):
    policy.model.config.prompt_suffix_token_id = 7


def blind_a_tower(policy):
    for parameter in policy.model.model.vision_backbone.fused_featurizer.parameters():
        parameter.data.zero_()


def ask_in_another_template(policy):
    policy.processor.prompt_template = VICUNA_PROMPT


def turn_faster(policy):
    policy.model.model.language_model.rotary_emb.inv_freq.mul_(3)


@pytest.mark.parametrize("damage", [blind_a_tower, ask_in_another_template, turn_faster])
def test_actions_that_do_not_follow_the_recording_are_found(demonstrations, damage):
    model, processor = (auto.from_pretrained(TABLETOP_POLICY) for auto in (AutoModel, AutoProcessor))
    damage(SimpleNamespace(model=model, processor=processor))
    report = check_policy(model, processor, frames=change_frames(demonstrations))
    assert "The policy does not follow the recording. On 24 frames" in found(report, "actions on the data")


@pytest.mark.parametrize("damage", [mirror_height, end_in_another_id])
def test_actions_that_are_far_from_the_recording_but_related_to_it_are_a_warning(demonstrations, damage):
    model, processor = (auto.from_pretrained(TABLETOP_POLICY) for auto in (AutoModel, AutoProcessor))
    damage(SimpleNamespace(model=model, processor=processor))
    report = check_policy(model, processor, frames=change_frames(demonstrations))
    assert "far from the recorded ones. On 24 frames" in found(report, "actions on the data", "warned")


def add_noise(demonstrations, scale, keep=1.0):
    """Return the frames with noise on the translation, in metres, of which a share is kept."""
    rng = np.random.default_rng(0)
    return change_frames(
        demonstrations,
        action=lambda action: np.append(action[:3] * keep + rng.normal(scale=scale, size=3), action[3:]),
    )


def test_noisy_demonstrations_are_not_a_mistake(tabletop, demonstrations):
    report = check_policy(*tabletop, frames=add_noise(demonstrations, 0.04))
    message = found(report, "actions on the data", "warned")
    assert float(message.partition("actions is ")[2].partition(" ")[0]) > 1
    assert "Noisy demonstrations also" in message
    report = check_policy(*tabletop, frames=add_noise(demonstrations, 0.04, keep=0.0))
    assert "does not follow the recording" in found(report, "actions on the data")


def test_few_frames_are_not_judged(tabletop, demonstrations):
    report = check_policy(*tabletop, frames=change_frames([demonstrations[0][:23]]))
    assert statuses(report)["actions on the data"] == "skipped"


def test_images_that_are_turned_are_found(tabletop, demonstrations):
    turned = change_frames(demonstrations, image=lambda image: np.ascontiguousarray(image[::-1, ::-1]))
    report = check_policy(*tabletop, frames=turned)
    assert "does not follow the recording" in found(report, "actions on the data")


def test_an_axis_in_the_opposite_direction_is_found(tabletop, demonstrations):
    signs = np.array([-1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    report = check_policy(*tabletop, frames=change_frames(demonstrations, action=lambda action: action * signs))
    assert "Dimension 0 moves against the recording" in found(report, "actions on the data", "warned")


def test_actions_are_compared_without_a_gripper_that_moves(tabletop):
    pushes = list(record_demonstrations(["push"], range(200, 202)))
    report = check_policy(*tabletop, frames=change_frames(pushes))
    assert statuses(report)["actions on the data"] == "passed"
    assert statuses(report)["gripper on the data"] == "skipped"


def test_a_flipped_gripper_is_found(tabletop, demonstrations):
    flipped = [
        [frame | {"action": np.append(frame["action"][:6], 1 - frame["action"][6])} for frame in each]
        for each in demonstrations
    ]
    report = check_policy(*tabletop, frames=from_episodes(flipped, ARM, name="flipped"))
    assert "Inverted. The gripper is as recorded in" in found(report, "gripper on the data")
    report = check_policy(*tabletop, frames=from_episodes(flipped, Robot("raw"), name="flipped"))
    assert "Inverted." in found(report, "gripper on the data")


@pytest.mark.parametrize(
    ("closed", "of_good", "of_flipped"),
    [(0, "skipped", "skipped"), (1, "passed", "warned"), (3, "passed", "warned"), (4, "passed", "failed")],
)
def test_a_gripper_that_hardly_moves_fails_no_policy(tabletop, demonstrations, closed, of_good, of_flipped):
    frames = [frame for episode in demonstrations for frame in episode]
    opened, shut = ([frame for frame in frames if (frame["action"][6] > 0.5) == state] for state in (True, False))
    few = [opened + shut[:closed]]
    flipped = change_frames(few, action=lambda action: np.append(action[:6], 1 - action[6]))
    for data, status in ((change_frames(few), of_good), (flipped, of_flipped)):
        report = check_policy(*tabletop, frames=data)
        assert statuses(report)["gripper on the data"] == status
    if of_flipped == "warned":
        assert f"On only {2 * closed} frames: Inverted." in found(report, "gripper on the data", "warned")


def test_a_gripper_from_minus_one_to_one_is_found(policy, demonstrations):
    signed = [
        [frame | {"action": np.append(frame["action"][:6], 2 * frame["action"][6] - 1)} for frame in each]
        for each in demonstrations
    ]
    for data, status, message in (
        (signed, "failed", "The data's gripper goes from -1 to 1. OpenVLA's gripper is 0 for closed"),
        (demonstrations, "warned", "does not say that dimension 6 is the gripper. The gripper is as recorded"),
        (demonstrations, "warned", "(`--robot`, `robot=`)"),
    ):
        report = check_policy(policy.model, policy.processor, frames=from_episodes(data, Robot("raw"), name="raw"))
        assert message in found(report, "gripper on the data", status)
    policy.model.norm_stats = {"tiny": {"action": BRIDGE_LIKE_STATS | {"min": [-1.0] * 7}}}
    report = check_policy(policy.model, policy.processor)
    assert "goes from -1 to 1" in found(report, "gripper", "warned")


# Prompts and images


def test_a_missing_suffix_is_found(published, monkeypatch):
    monkeypatch.setattr(published.model.config, "prompt_suffix_token_id", None)
    report = check_policy(published.model, published.processor, published.checkpoint)
    assert "Prompts end in id None instead of 29871. Set `prompt_suffix_token_id`" in found(report, "prompt suffix")


def test_another_prompt_template_is_found(published):
    published.processor.prompt_template = VICUNA_PROMPT
    report = check_policy(published.model, published.processor, published.checkpoint)
    assert "with which the policy was trained" in found(report, "prompt template")
    published.processor.prompt_template = "Robot, {instruction}!"
    assert "not one of OpenVLA's" in found(
        check_policy(published.model, published.processor), "prompt template", "warned"
    )


def test_capitals_and_full_stops_are_found(policy, demonstrations):
    policy.processor.lowercase_instruction = policy.processor.strip_full_stop = False
    told = [[frame | {"instruction": "Put it there."} for frame in each] for each in demonstrations]
    with pytest.warns(UserWarning, match="ends in a full stop"):
        report = check_policy(policy.model, policy.processor, frames=from_episodes(told, ARM, name="tabletop"))
    assert "Capitals are kept" in found(report, "prompt form", "warned")
    assert "1 of 1 end in a full stop" in found(report, "instructions of the data", "warned")


def test_a_missing_crop_of_an_oft_policy_is_found(oft, oft_folder):
    oft.processor.image_processor.center_crop_area = None
    report = check_policy(oft.model, oft.processor, oft_folder)
    assert "no crop, but the training had random crops. Pass `center_crop_area=0.9`" in found(report, "crop")


def test_a_crop_can_be_saved_beside_the_files_of_a_published_policy(published, tmp_path):
    shutil.copytree(published.checkpoint, tmp_path, dirs_exist_ok=True)
    processor = AutoProcessor.from_pretrained(tmp_path, center_crop_area=0.9)
    assert AutoProcessor.from_pretrained(tmp_path).image_processor.center_crop_area is None
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).image_processor.center_crop_area == 0.9
    report = check_policy(published.model, AutoProcessor.from_pretrained(tmp_path), tmp_path)
    assert report.passed, report.failures


def test_a_missing_crop_of_a_fine_tuned_policy_is_found(folder):
    (folder / "training.json").write_text(json.dumps({"arguments": {"augment": True}}))
    assert "the training had random crops" in found(check(folder), "crop")


def test_another_crop_of_a_policy_for_libero_is_found(policy):
    policy.model.norm_stats = {"libero_spatial": {"action": BRIDGE_LIKE_STATS}}
    for area, status in ((None, "warned"), (0.5, "warned"), (0.9, "passed")):
        policy.processor.image_processor.center_crop_area = area
        assert statuses(check_policy(policy.model, policy.processor))["crop"] == status


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("crop", "center_crop_area", 0.9),
        ("crop", "center_crop_area", 0.3),
        ("resize", "resample", "lanczos3"),
        ("prompt template", "prompt_template", VICUNA_PROMPT),
        ("prompt form", "lowercase_instruction", False),
        ("prompt form", "strip_full_stop", False),
    ],
)
def test_a_preparation_that_differs_from_the_record_of_training_is_found(tabletop, name, field, value):
    processor = copy.deepcopy(tabletop[1])
    setattr(processor.image_processor if name in ("crop", "resize") else processor, field, value)
    report = check_policy(tabletop[0], processor, TABLETOP_POLICY)
    assert [one.check for one in report.failures] == [name]


def test_a_suffix_is_as_in_training_only_if_that_is_recorded(tabletop):
    for source, known in ((TABLETOP_POLICY, "as in training"), (None, "the training is not recorded")):
        (one,) = (one for one in check_policy(*tabletop, source).findings if one.check == "prompt suffix")
        assert one.found == f"None ({known})."


def test_another_suffix_than_that_of_training_is_found():
    model, processor = (auto.from_pretrained(TABLETOP_POLICY) for auto in (AutoModel, AutoProcessor))
    model.config.prompt_suffix_token_id = 7
    assert "Prompts end in id 7" in found(check_policy(model, processor, TABLETOP_POLICY), "prompt suffix")


def test_a_full_stop_that_finetune_left_out_is_found(folder):
    processor = AutoProcessor.from_pretrained(folder)
    processor.strip_full_stop = False
    processor.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({"arguments": {"augment": False}}))
    message = found(check(folder), "prompt form", "warned")
    assert "Set `strip_full_stop=True`, unless the policy was trained with full stops." in message


def test_another_resize_is_found(published):
    published.processor.image_processor.image_resize_strategy = "letterbox"
    report = check_policy(published.model, published.processor, published.checkpoint)
    assert "image_resize_strategy='letterbox' instead of 'resize-naive'" in found(report, "resize")


def test_normalisation_for_the_other_tower_is_found(published):
    images = published.processor.image_processor
    images.image_mean, images.image_std = images.image_mean[::-1], images.image_std[::-1]
    report = check_policy(published.model, published.processor)
    assert "Tower 0 (dinov2_with_registers) gets images normalised for siglip" in found(report, "normalisation")


def test_a_processor_of_another_model_is_found(policy, published):
    report = check_policy(policy.model, published.processor)
    assert "image tokens: 256 instead of 16" in found(report, "processor and model")
    assert statuses(report)["image"] == "skipped"


# Adapters and code


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """The tabletop's policy as `base`, an `adapter` for it, and both merged."""
    folder = tmp_path_factory.mktemp("adapted")
    shutil.copytree(TABLETOP_POLICY, folder / "base")
    model = AutoModel.from_pretrained(folder / "base")
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "fc1"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "adapter")
    AutoProcessor.from_pretrained(folder / "base").save_pretrained(folder / "adapter")
    base_of(folder / "adapter", folder / "base")
    merge_adapter(folder / "adapter", folder / "merged", dtype="float32")
    return folder


def base_of(adapter, base, **fields):
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": str(base), **fields}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def test_an_adapter_and_its_merged_weights_pass(adapted, tmp_path):
    report = check(adapted / "adapter")
    assert report.passed, report.failures
    assert statuses(report)["adapter"] == "passed"
    shutil.copytree(adapted / "merged", tmp_path, dirs_exist_ok=True)
    shutil.copytree(adapted / "adapter", tmp_path / "lora_adapter")
    assert statuses(check(tmp_path))["adapter"] == "passed"


def test_an_adapter_on_weights_that_contain_it_is_found(adapted, tmp_path):
    shutil.copytree(adapted / "adapter", tmp_path, dirs_exist_ok=True)
    base_of(tmp_path, adapted / "merged")
    assert "Applied twice: the weights of the base already contain it" in found(check(tmp_path), "adapter")


def test_an_adapter_that_was_merged_twice_is_found(adapted, tmp_path):
    shutil.copytree(adapted / "adapter", tmp_path / "again")
    base_of(tmp_path / "again", adapted / "merged")
    merge_adapter(tmp_path / "again", tmp_path / "twice", dtype="float32")
    shutil.copytree(adapted / "adapter", tmp_path / "twice" / "lora_adapter")
    assert "Merged more than once." in found(check(tmp_path / "twice"), "adapter")


def test_an_adapter_that_is_not_applied_is_found(adapted, tmp_path):
    shutil.copytree(adapted / "base", tmp_path, dirs_exist_ok=True)
    shutil.copytree(adapted / "adapter", tmp_path / "lora_adapter")
    assert found(check(tmp_path), "adapter").startswith("Missing. The weights contain the adapter in")
    model = AutoModel.from_pretrained(adapted / "adapter")
    model.disable_adapters()
    report = check_policy(model, AutoProcessor.from_pretrained(adapted / "adapter"))
    assert "loaded, but disabled" in found(report, "adapter")


def test_an_adapter_without_its_trained_modules_or_its_base_is_found(adapted, tmp_path):
    shutil.copytree(adapted / "adapter", tmp_path, dirs_exist_ok=True)
    base_of(tmp_path, adapted / "base", modules_to_save=["lm_head"])
    assert "modules that were trained in full are missing" in found(check(tmp_path), "loading")
    base_of(tmp_path, tmp_path / "nowhere", modules_to_save=None)
    assert "Cannot load the base" in found(check(tmp_path), "loading")


def test_an_adapter_that_changes_nothing_is_found(adapted, tmp_path):
    shutil.copytree(adapted / "adapter", tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    new = {name: one * 0 if "lora_B" in name else one for name, one in weights.items()}
    save_file(new, tmp_path / "adapter_model.safetensors")
    assert "The adapter changes nothing" in found(check(tmp_path), "adapter")


def test_old_and_incomplete_code_is_found(tabletop, tmp_path):
    tabletop[0].save_pretrained(tmp_path)
    tabletop[1].save_pretrained(tmp_path)
    assert statuses(check(tmp_path))["remote code"] == "passed"
    for name, lost in (("config.json", "AutoModel"), ("processor_config.json", "AutoProcessor")):
        content = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content.replace(f'"{lost}":', '"Other":'))
        assert f"The `auto_map` of {name} does not give" in found(check(tmp_path), "remote code")
        (tmp_path / name).write_text(content)
    module = tmp_path / "action_tokenizer.py"
    module.write_bytes(module.read_bytes() + b"\n# \xff\n")
    count = len(package_code("openvla-hf"))
    assert f"1 of {count} modules differ" in found(check(tmp_path), "remote code")
    module.unlink()
    missing = f"1 of {count} modules are missing (for example action_tokenizer.py)"
    assert missing in found(check(tmp_path), "remote code")


# The command


def test_the_command_prints_a_table_or_json_and_its_status_says_whether_a_check_failed(folder, capsys):
    assert main(["check", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "remote code" in printed
    assert "1 warned" in printed
    assert main(["check", str(folder), "--strict", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["passed"], report["counts"]["failed"], report["counts"]["warned"]) == (True, 0, 1)
    write_statistics(folder, {"tabletop": {"action": {"q01": [0.0]}}})
    assert main(["check", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [one["check"] for one in report["findings"] if one["status"] == "failed"] == ["loading", "statistics"]


def test_the_command_reads_data_with_a_robot(folder, demonstrations, tmp_path, cache, capsys):
    write_lerobot(demonstrations, tmp_path / "table", frequency=5.0)
    assert main(["check", str(folder), "--data", str(tmp_path / "table"), "--robot", "tabletop", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["data"] == "table"
    assert {one["check"]: one["status"] for one in report["findings"]}["gripper on the data"] == "passed"


def test_errors_of_the_caller_are_not_findings(folder, tmp_path, capsys):
    assert main(["check", str(folder), "--camera", "front"]) == 2
    assert "--camera is for recorded data: give --data." in capsys.readouterr().err
    assert main(["check", str(folder), "--data", str(tmp_path / "nothing")]) == 2
    assert "There is no dataset" in capsys.readouterr().err
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert main(["check", str(folder)]) == 2
    assert "is not an OpenVLA checkpoint" in capsys.readouterr().err
