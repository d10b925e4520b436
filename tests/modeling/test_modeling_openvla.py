import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    Dinov2WithRegistersConfig,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from openvla_hf import OpenVLAConfig, OpenVLAForActionPrediction
from openvla_hf.modeling.modeling_openvla import OpenVLAVisionBackbone
from openvla_hf.testing import BRIDGE_LIKE_STATS, fake_episode, tiny_config


INSTRUCTIONS = [
    "pick up the red block",
    "open",
    "put the carrot on the plate",
    "open the top drawer and place the apple inside",
    "stack the green cup",
    "close the drawer, then wipe the table with the towel",
    "turn left",
    "sweep",
]
TWO_ARMS = {name: values * 2 for name, values in BRIDGE_LIKE_STATS.items()}
SEVERAL = {"one_arm": {"action": BRIDGE_LIKE_STATS}, "two_arms": {"action": TWO_ARMS}}
STEPS = len(BRIDGE_LIKE_STATS["q01"])


def observations(count=8, size=64):
    return [frame["image"] for frame in fake_episode(steps=count, size=size)]


def first_step_logits(model, processor, image, text="pick up the red block"):
    return model(**processor(image, instruction=text)).logits[0, -1]


# The image matters


@torch.no_grad()
def test_a_black_and_a_noisy_frame_give_different_logits(recorded):
    record = recorded("fused-224")
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    black, noisy = (first_step_logits(record.model, record.processor, im) for im in (np.zeros_like(noise), noise))
    assert (black - noisy).abs().max() > 1


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_every_channel_of_the_pixels_matters(tiny, fused):
    model, processor = tiny(fused=fused)
    inputs = processor(observations(1), instruction="open")
    logits = model(**inputs).logits[0, -1]
    for channel in range(inputs["pixel_values"].shape[1]):
        changed = inputs["pixel_values"].clone()
        changed[:, channel] += 1
        assert not torch.allclose(model(**inputs | {"pixel_values": changed}).logits[0, -1], logits, atol=1e-3)


@pytest.mark.parametrize("decoding", [{}, {"constrained": False}, {"do_sample": True}, {"num_beams": 3}])
def test_each_tower_runs_once_for_an_action(tiny, decoding):
    model, processor = tiny()
    runs = []
    for tower in model.model.vision_backbone.towers:
        tower.register_forward_hook(lambda module, *_: runs.append(type(module)))
    model.predict_action(**processor(observations(1), instruction="open"), **decoding)
    assert runs == [type(tower) for tower in model.model.vision_backbone.towers]


# Batches and forms of input


@pytest.fixture(params=["golden", "tiny", "tiny one tower"])
def policy(request, tiny):
    """Return a function that builds (model, processor), recorded or tiny, for an attention implementation."""

    def build(attention="sdpa"):
        if request.param == "golden":
            record = request.getfixturevalue("recorded")("fused-224")
            model, processor = record.load(attn_implementation=attention), record.processor
            model.norm_stats = {"tiny": model.norm_stats["bridge_orig"]}
        else:
            model, processor = tiny(fused=request.param == "tiny")
            model.set_attn_implementation(attention)
            model.config.prompt_suffix_token_id = processor.tokenizer.convert_tokens_to_ids("Ġ")
        return model, processor

    return build


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("constrained", [True, False])
def test_a_batch_equals_its_rows(policy, attention, constrained):
    model, processor = policy(attention)
    assert model.model.language_model.config._attn_implementation == attention
    images = observations()
    inputs = processor(images, instruction=INSTRUCTIONS)
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 4
    batch = model.predict_action(**inputs, constrained=constrained, return_details=True)
    for row, (image, text) in enumerate(zip(images, INSTRUCTIONS, strict=True)):
        single = model.predict_action(
            **processor(image, instruction=text), constrained=constrained, return_details=True
        )
        assert np.array_equal(batch.token_ids[row], single.token_ids[0])
        assert np.abs(batch.probabilities[row] - single.probabilities[0]).max() <= 1e-4
        assert np.array_equal(batch.actions[row], single.actions[0])


@pytest.mark.parametrize("add_image_tokens", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_side_of_padding_and_placeholders_make_no_difference(policy, side, add_image_tokens):
    model, processor = policy()
    images, expected = observations(), None
    inputs = processor(images, instruction=INSTRUCTIONS)
    expected = model.predict_action(**inputs, return_details=True)
    if not add_image_tokens:
        inputs = processor(images, instruction=INSTRUCTIONS, add_image_tokens=False)
    if side == "right":
        for row, length in enumerate(inputs["attention_mask"].sum(1)):
            for name in ("input_ids", "attention_mask"):
                inputs[name][row] = inputs[name][row].roll(int(length))
    assert (inputs["attention_mask"][:, 0] == 1).all() == (side == "right")
    actual = model.predict_action(**inputs, return_details=True)
    assert np.array_equal(actual.token_ids, expected.token_ids)
    assert np.abs(actual.probabilities - expected.probabilities).max() <= 1e-4


def test_rows_that_end_in_the_suffix_and_rows_that_do_not(policy):
    model, processor = policy()
    images = observations(4)
    rows = [processor.tokenizer(processor.build_prompt(text))["input_ids"] for text in INSTRUCTIONS[:4]]
    suffixed = [[*row, model.config.prompt_suffix_token_id] if i % 2 else row for i, row in enumerate(rows)]
    pixel_values = processor.image_processor(images)["pixel_values"]
    expected, actual = (
        model.predict_action(**processor.tokenizer.pad({"input_ids": ids}, return_tensors="pt"), **pixels)
        for ids in (rows, suffixed)
        for pixels in [{"pixel_values": pixel_values}]
    )
    assert np.array_equal(actual, expected)


def test_a_prompt_longer_than_the_image(policy):
    model, processor = policy()
    text = "pick up " + "the " * model.config.num_image_tokens
    plain = processor(observations(1), instruction=text, add_image_tokens=False)
    assert plain["input_ids"].shape[1] > model.config.num_image_tokens
    filled = processor(observations(1), instruction=text)
    assert np.array_equal(model.predict_action(**plain), model.predict_action(**filled))


@torch.no_grad()
def test_placeholders_make_no_difference_to_the_loss(policy):
    model, processor = policy()
    losses = []
    for add_image_tokens in (True, False):
        inputs = processor(observations(2), instruction=INSTRUCTIONS[2:4], add_image_tokens=add_image_tokens)
        labels = inputs["input_ids"].clone()
        labels[:, :-3] = -100
        losses.append(model(**inputs, labels=labels).loss)
    assert losses[0] == losses[1]


def test_each_row_has_its_own_statistics(tiny):
    model, processor = tiny(norm_stats=SEVERAL)
    inputs = processor(observations(3), instruction=INSTRUCTIONS[:3])
    keys = ["one_arm", "two_arms", "one_arm"]
    mixed = model.predict_action(**inputs, unnorm_key=keys, return_details=True)
    assert mixed.actions.shape == (3, 2 * STEPS)
    assert np.isnan(mixed.actions[[0, 2], STEPS:]).all()
    assert np.isnan(mixed.normalized_actions[[0, 2], STEPS:]).all()
    for row, key in enumerate(keys):
        single = model.predict_action(**{name: value[row : row + 1] for name, value in inputs.items()}, unnorm_key=key)
        assert single.shape == (model.get_action_dim(key),)
        assert np.array_equal(mixed.actions[row, : len(single)], single)


# Composition


def number_of_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("vision_config", "unread"),
    [
        (Dinov2WithRegistersConfig, ["encoder.layer.3.", "layernorm.", "embeddings.mask_token"]),
        (SiglipVisionConfig, ["encoder.layers.3.", "post_layernorm.", "head."]),
        (CLIPVisionConfig, ["encoder.layers.3."]),
    ],
)
@torch.no_grad()
def test_a_tower_stops_at_the_layer_that_is_read(vision_config, unread):
    """The tower computes hidden_states[-2] of the whole tower, and has no weights that this does not need."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    whole = AutoModel.from_config(vision_config(**sizes)).eval()
    config = tiny_config(image_size=28, fused=False)
    config.vision_config = whole.config
    backbone = OpenVLAVisionBackbone(config).eval()
    names = set(dict(whole.named_parameters()))
    left_out = {name for name in names if any(part in name for part in unread)}
    assert set(dict(backbone.featurizer.named_parameters())) == names - left_out
    backbone.featurizer.load_state_dict(whole.state_dict(), strict=False)
    pixel_values = torch.randn(2, 3, 28, 28)
    expected = whole(pixel_values, output_hidden_states=True).hidden_states[-2][:, -4:]
    torch.testing.assert_close(backbone(pixel_values), expected)


@pytest.mark.parametrize("fused", [True, False])
def test_number_of_parameters(tiny, fused):
    model, _ = tiny(fused=fused)
    towers = model.model.vision_backbone.towers
    vision, width = 32 * len(towers), 64
    # DINOv2 also has LayerScale and extra tokens; both have 16 patches of 14 x 14 x 3.
    block = 12 * 32**2 + 13 * 32
    patches = (14 * 14 * 3 + 1) * 32
    expected = {
        "OpenVLADinov2Tower": 2 * (block + 2 * 32) + patches + (1 + 4 + 17) * 32,
        "OpenVLASiglipTower": 2 * block + patches + 16 * 32,
    }
    for tower in towers:
        assert number_of_parameters(tower) == expected[type(tower).__name__]
    fc1, fc2, fc3 = 4 * vision * (vision + 1), (4 * vision + 1) * width, (width + 1) * width
    projector = fc1 + fc2 + fc3 if fused else (vision + 1) * width + fc3
    assert number_of_parameters(model.model.projector) == projector


@pytest.mark.parametrize("text_config", [Qwen2Config, MistralConfig])
def test_other_towers_and_language_models_compose(text_config, tmp_path):
    tower = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = text_config(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = OpenVLAConfig(
        vision_config=CLIPVisionConfig(**tower, intermediate_size=64),
        fused_vision_config=SiglipVisionConfig(**tower, intermediate_size=48, vision_use_head=False),
        text_config=text,
        image_token_index=321,
        pad_token_id=320,
        prompt_suffix_token_id=9,
        norm_stats={"tiny": {"action": BRIDGE_LIKE_STATS}},
    )
    model = AutoModel.from_config(config)
    inputs = {"input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]]), "pixel_values": torch.randn(2, 6, 28, 28)}
    actions = model.predict_action(**inputs)
    assert actions.shape == (2, STEPS)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again.model.language_model) is type(model.model.language_model)
    assert np.array_equal(again.predict_action(**inputs), actions)


# predict_action


def test_details(tiny):
    model, processor = tiny()
    inputs = processor(observations(2), instruction=INSTRUCTIONS[:2])
    details = model.predict_action(**inputs, return_details=True)
    expected = {
        "actions": ((2, STEPS), np.float64),
        "normalized_actions": ((2, STEPS), np.float64),
        "token_ids": ((2, STEPS), np.int64),
        "probabilities": ((2, STEPS, 256), np.float32),
        "entropy": ((2, STEPS), np.float32),
    }
    for name, (shape, dtype) in expected.items():
        value = getattr(details, name)
        assert (value.shape, value.dtype) == (shape, dtype)
    assert details.forward_passes == STEPS
    tokenizer = model.action_tokenizer
    assert np.allclose(details.probabilities.sum(-1), 1, atol=1e-5)
    assert np.array_equal(details.probabilities.argmax(-1), tokenizer.vocab_end - 1 - details.token_ids)
    values = tokenizer.bin_values[details.probabilities.argmax(-1)]
    assert np.array_equal(values, details.normalized_actions)
    entropy = -(details.probabilities * np.log(details.probabilities)).sum(-1)
    assert np.allclose(details.entropy, entropy, atol=1e-4)
    assert np.array_equal(model.predict_action(**inputs), details.actions)
    assert np.array_equal(model.decode_actions(details.token_ids), details.actions)


def test_one_observation_gives_one_action(tiny):
    model, processor = tiny()
    inputs = processor(observations(1), instruction="open")
    action = model.predict_action(**inputs)
    assert (action.shape, action.dtype) == ((STEPS,), np.float64)
    # The original's form of the call, with a positional key and greedy decoding.
    original_form = model.predict_action(
        inputs["input_ids"], pixel_values=inputs["pixel_values"], unnorm_key="tiny", do_sample=False
    )
    assert np.array_equal(original_form, action)


def test_constrained_decoding_gives_action_ids_only(tiny):
    model, processor = tiny()
    tokenizer, inputs = model.action_tokenizer, processor(observations(1), instruction="open")
    with torch.no_grad():
        model.lm_head.weight[tokenizer.first_id : tokenizer.vocab_end] *= 1e-3

    def is_action(**decoding):
        ids = model.predict_action(**inputs, return_details=True, **decoding).token_ids
        return (ids >= tokenizer.first_id) & (ids < tokenizer.vocab_end)

    assert not is_action(constrained=False).any()
    assert is_action().all()
    assert is_action(do_sample=True).all()
    assert is_action(num_beams=2).all()


def test_sampling_repeats_with_its_seed(tiny):
    model, processor = tiny()
    inputs, samples = processor(observations(2), instruction="open"), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(model.predict_action(**inputs, do_sample=True, temperature=5.0))
    assert np.array_equal(samples[0], samples[1])
    assert not np.array_equal(samples[0], samples[2])


def test_decoding_without_sampling_is_deterministic(tiny):
    model, processor = tiny()
    inputs = processor(observations(2), instruction="open")
    greedy = model.predict_action(**inputs)
    assert np.array_equal(model.predict_action(**inputs, do_sample=False, use_cache=True), greedy)


def test_beams_give_the_probabilities_of_their_tokens(tiny):
    model, processor = tiny()
    inputs = processor(observations(2), instruction=INSTRUCTIONS[:2])
    details = model.predict_action(**inputs, num_beams=4, return_details=True)
    assert details.probabilities.shape == (2, STEPS, 256)
    # One pass over the chosen tokens gives the same.
    teacher = torch.cat([inputs["input_ids"], torch.from_numpy(details.token_ids)], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, STEPS), value=1)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(teacher, inputs["pixel_values"], mask, position_ids=position_ids).logits[:, -STEPS - 1 : -1]
    tokenizer = model.action_tokenizer
    of_actions = logits[..., tokenizer.first_id : tokenizer.vocab_end].flip(-1).softmax(-1).numpy()
    assert np.abs(of_actions - details.probabilities).max() <= 1e-4


def test_given_statistics_replace_the_checkpoints(tiny):
    model, processor = tiny(norm_stats=SEVERAL)
    inputs = processor(observations(1), instruction="open")
    stats = {"q01": [0.0] * 3, "q99": [2.0] * 3}
    details = model.predict_action(**inputs, stats=stats, return_details=True)
    assert np.allclose(details.actions, details.normalized_actions + 1)
    assert details.actions.shape == (1, 3)


def test_plain_generate_gives_the_unconstrained_ids(tiny):
    model, processor = tiny()
    inputs = processor(observations(2), instruction=INSTRUCTIONS[:2])
    details = model.predict_action(**inputs, constrained=False, return_details=True)
    generated = model.generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS)
    assert torch.equal(generated[:, -STEPS:], torch.from_numpy(details.token_ids))
    plain = processor(observations(2), instruction=INSTRUCTIONS[:2], add_image_tokens=False)
    assert torch.equal(model.generate(**plain, max_new_tokens=STEPS, min_new_tokens=STEPS), generated)
    beams = model.generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, num_beams=3)
    assert beams.shape == generated.shape


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("fused", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(tiny, fused):
    model, processor = tiny(fused=fused)
    inputs = processor(observations(2), instruction=INSTRUCTIONS[:2])

    def gradients(model):
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected, checkpointed = gradients(copy.deepcopy(model)), copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable()
    for name, gradient in gradients(checkpointed).items():
        torch.testing.assert_close(gradient, expected[name])


def test_the_base_model_of_a_policy_is_found(tiny):
    model, _ = tiny()
    assert model.base_model is model.model
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    assert isinstance(model, OpenVLAForActionPrediction)
