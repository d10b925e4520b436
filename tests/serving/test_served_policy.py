import dataclasses
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModel, AutoProcessor

from openvla_hf.checkpoints.identity import digest_checkpoint
from openvla_hf.checkpoints.quantize import quantization
from openvla_hf.serving.policy import Observation, ServedPolicy


def predict(policy, *observations):
    return policy.predict([policy.prepare(one) for one in observations])


def test_an_answer_equals_a_call_of_the_model(plain_policy, make_observation):
    seen = make_observation(plain_policy)
    inputs = plain_policy.processor(seen.images["image"], instruction=seen.instruction)
    expected = plain_policy.model.predict_action(**inputs, unnorm_key="tiny")
    (prediction,) = predict(plain_policy, seen)
    np.testing.assert_array_equal(prediction.actions, expected[None])
    assert prediction.unnorm_key == "tiny"


@pytest.fixture(scope="module")
def base(plain_policy, tmp_path_factory):
    """The folder of the plain policy."""
    folder = tmp_path_factory.mktemp("derived") / "base"
    plain_policy.model.save_pretrained(folder)
    plain_policy.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def quantised(base):
    """A checkpoint in 4 bits."""
    pytest.importorskip("bitsandbytes")
    config = quantization("4bit")
    config.bnb_4bit_compute_dtype = torch.float32
    folder = base.with_name("quantised")
    AutoModel.from_pretrained(base, quantization_config=config).save_pretrained(folder)
    AutoProcessor.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base):
    """A LoRA adapter, which names its base."""
    model = AutoModel.from_pretrained(base)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    folder = base.with_name("adapter")
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["quantised", "adapter"])
def test_quantised_checkpoints_and_adapters_are_served_as_they_act(kind, request, plain_policy, make_observation):
    folder = request.getfixturevalue(kind)
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    policy = ServedPolicy.load(str(folder), unnorm_key="tiny")
    seen = [
        make_observation(policy, 0),
        dataclasses.replace(make_observation(policy, 1), instruction="open the top drawer", unnorm_key="half"),
    ]
    inputs = processor([one.images["image"] for one in seen], instruction=[one.instruction for one in seen])
    expected = model.predict_action(**inputs, unnorm_key=["tiny", "half"])
    together = predict(policy, *seen)
    for one, answer, actions in zip(seen, together, expected, strict=True):
        (alone,) = predict(policy, one)
        np.testing.assert_allclose(answer.actions[0], actions, atol=1e-6)
        np.testing.assert_allclose(alone.actions[0], actions, atol=1e-5)
    unchanged = predict(plain_policy, *seen)
    assert any((one.token_ids != other.token_ids).any() for one, other in zip(together, unchanged, strict=True))
    described = policy.describe()
    assert (described["model_id"], described["digest"]) == (folder.name, digest_checkpoint(folder))
    assert (described["base"] or {}).get("model_id") == ("base" if kind == "adapter" else None)


@pytest.mark.parametrize("name", ["plain_policy", "chunk_policy"])
def test_a_batch_of_different_robots_gives_each_its_own_actions(name, request, make_observation):
    policy = request.getfixturevalue(name)
    keys = list(policy.model.norm_stats)
    seen = [
        dataclasses.replace(
            make_observation(policy, seed), instruction=f"task {'very ' * seed}", unnorm_key=keys[seed % len(keys)]
        )
        for seed in range(5)
    ]
    together = predict(policy, *seen)
    for one, answer in zip(seen, together, strict=True):
        (alone,) = predict(policy, one)
        np.testing.assert_allclose(answer.actions, alone.actions, atol=1e-5)
        assert answer.unnorm_key == one.unnorm_key
    assert len({answer.actions.tobytes() for answer in together}) == len(seen)


def test_sessions_draft_the_next_action_which_stays_the_same(plain_policy, make_observation):
    session, seen = plain_policy.open_session(), make_observation(plain_policy)
    (first,) = predict(plain_policy, session.observe(seen))
    session.receive(first)
    other = make_observation(plain_policy, 1)
    drafted, fresh = predict(plain_policy, session.observe(seen), other)
    (alone,) = predict(plain_policy, other)
    np.testing.assert_array_equal(drafted.actions, first.actions)
    np.testing.assert_array_equal(fresh.actions, alone.actions)
    (again,) = predict(plain_policy, session.observe(seen))
    assert again.forward_passes < first.forward_passes
    assert session.observe(dataclasses.replace(seen, instruction="another task")).draft is None


def test_chunks_are_cut_to_the_actions_to_execute(chunk_policy, make_observation):
    policy = ServedPolicy(chunk_policy.model, chunk_policy.processor, execute=3)
    (prediction,) = predict(policy, make_observation(policy))
    actions = policy.open_session().receive(prediction)
    np.testing.assert_array_equal(actions, prediction.actions[:3])
    assert policy.describe()["action_horizon"] == 3


def test_temporal_ensembling_equals_that_of_the_models_own_stream(chunk_policy, make_observation):
    policy = ServedPolicy(chunk_policy.model, chunk_policy.processor, ensemble=0.1)
    session, stream = policy.open_session(), policy.model.action_stream("tiny", ensemble=0.1)
    for seed in range(4):
        seen = session.observe(make_observation(policy, seed))
        (prediction,) = predict(policy, seen)
        inputs = policy.processor(seen.images, instruction=seen.instruction, state=seen.state)
        (action,) = session.receive(prediction)
        np.testing.assert_array_equal(action, stream.predict_action(**inputs))


@pytest.mark.parametrize(
    ("gripper", "opening", "expected"),
    [("policy", 0.7, 0.7), ("binary", 0.7, 1.0), ("binary", 0.2, 0.0), ("libero", 0.7, -1.0), ("libero", 0.2, 1.0)],
)
def test_the_gripper_is_converted_last(plain_policy, make_observation, gripper, opening, expected):
    policy = ServedPolicy(plain_policy.model, plain_policy.processor, unnorm_key="tiny", gripper=gripper)
    (prediction,) = predict(policy, make_observation(policy))
    prediction.actions[:, -1] = opening
    assert policy.open_session().receive(prediction)[0, -1] == expected
    assert policy.describe()["gripper"]["convention"] == gripper


@pytest.mark.parametrize("widest", [30.0, 0.08], ids=["degrees", "metres"])
def test_a_gripper_convention_is_refused_for_other_ranges(plain_policy, monkeypatch, widest):
    stats = plain_policy.model.norm_stats["tiny"]["action"]
    monkeypatch.setitem(stats, "q99", [*stats["q99"][:-1], widest])
    with pytest.raises(ValueError, match=f"last action dimension of 'tiny' goes from 0 to {widest:g}"):
        ServedPolicy(plain_policy.model, plain_policy.processor, unnorm_key="tiny", gripper="libero")


def test_a_gripper_convention_is_refused_for_two_arms(plain_policy, monkeypatch):
    stats = plain_policy.model.norm_stats["tiny"]["action"]
    monkeypatch.setitem(
        plain_policy.model.norm_stats["tiny"], "action", {name: row * 2 for name, row in stats.items()}
    )
    with pytest.raises(ValueError, match="the 14 dimensions of 'tiny' are more than those of one arm"):
        ServedPolicy(plain_policy.model, plain_policy.processor, unnorm_key="tiny", gripper="binary")


def test_a_request_for_other_statistics_gets_no_gripper_of_another_range(plain_policy, make_observation, monkeypatch):
    stats = plain_policy.model.norm_stats["half"]["action"]
    monkeypatch.setitem(stats, "q99", [*stats["q99"][:-1], 30.0])
    policy = ServedPolicy(plain_policy.model, plain_policy.processor, unnorm_key="tiny", gripper="libero")
    policy.prepare(make_observation(policy))
    with pytest.raises(ValueError, match=r"last action dimension of 'half' goes from 0 to 30"):
        policy.prepare(make_observation(policy, unnorm_key="half"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": {}}, "sees one camera, 'image', got images from none"),
        ({"instruction": " "}, "instruction is empty"),
        ({"instruction": "red " * 2000}, "exceed the 512 positions"),
        ({"unnorm_key": "tiney"}, "tiny"),
        ({"unnorm_key": ""}, "''"),
        ({"state": np.zeros(3)}, "takes none"),
        ({"images": {"image": np.zeros((5, 6, 4), np.uint8)}}, "has four channels: send only the three colours"),
        ({"images": {"image": np.zeros((4, 5, 6), np.float32)}}, "'image' has four channels"),
    ],
)
def test_an_observation_that_does_not_fit_is_refused_before_it_enters_a_batch(
    plain_policy, make_observation, fields, message
):
    with pytest.raises(ValueError, match=message):
        plain_policy.prepare(dataclasses.replace(make_observation(plain_policy), **fields))


def test_a_description_names_the_cameras_the_state_and_the_keys(plain_policy, chunk_policy):
    plain, chunks = plain_policy.describe(), chunk_policy.describe()
    assert plain["unnorm_keys"] == ["tiny", "half"]
    assert plain["default_unnorm_key"] == "tiny"
    assert (plain["action_horizon"], chunks["action_horizon"]) == (1, 8)
    assert [camera["name"] for camera in chunks["cameras"]] == ["full_image", "wrist_image"]
    assert (plain["state_dim"], chunks["state_dim"]) == (None, 8)
    assert plain["action_bounds"]["half"]["high"] == plain_policy.model.norm_stats["half"]["action"]["q99"]
    assert (plain["temporal_ensemble"], plain["engine"]) == (None, "transformers")
    json.dumps([plain, chunks], allow_nan=False)


@pytest.mark.parametrize(
    ("strategy", "resample", "expected"),
    [
        ("resize-naive", 3, "stretch, bicubic"),
        ("letterbox", 1, "pad, lanczos"),
        ("resize-crop", "lanczos3", "crop, lanczos3"),
    ],
)
def test_a_description_says_how_images_are_resized(plain_policy, monkeypatch, strategy, resample, expected):
    monkeypatch.setattr(plain_policy.processor.image_processor, "image_resize_strategy", strategy)
    monkeypatch.setattr(plain_policy.processor.image_processor, "resample", resample)
    assert plain_policy.describe()["cameras"][0]["resize"] == expected


@pytest.mark.slow
def test_a_policy_that_reasons_returns_the_text_of_each_robot(taught):
    policy = ServedPolicy(taught.model, taught.processor, unnorm_key="bridge_orig")
    seen = [Observation({"image": image}, instruction) for instruction, image in taught.images.items()]
    for observation, answer in zip(seen, predict(policy, *seen), strict=True):
        text, action = taught.lessons[observation.instruction]
        assert answer.text == taught.processor.tokenizer.decode(text)
        assert answer.token_ids.tolist() == [action]
