"""Chunks of actions in one bidirectional pass, on tiny random models."""

import itertools

import numpy as np
import pytest
import torch
from transformers import BitsAndBytesConfig

from openvla_hf import OpenVLAConfig
from openvla_hf.modeling.action_heads import NoiseSchedule
from openvla_hf.modeling.action_tokenizer import normalize_state
from openvla_hf.modeling.configuration_openvla import BIDIRECTIONAL_LANGUAGE_MODELS
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.modeling.parallel_decoding import ParallelPass, chunk_loss, lay_out
from openvla_hf.testing import BRIDGE_LIKE_STATS, tiny_config


K, A, S = 3, 7, 2
STATE_STATS = {"q01": [-1.0, 0.0], "q99": [1.0, 4.0], "min": [-2.0, -1.0], "max": [2.0, 5.0]}
STATISTICS = {
    "tiny": {"action": BRIDGE_LIKE_STATS, "proprio": STATE_STATS},
    "other": {
        "action": BRIDGE_LIKE_STATS | {"q99": [0.1] * 6 + [1.0]},
        "proprio": STATE_STATS | {"q99": [2.0, 2.0]},
    },
}
PARALLEL = {"action_decoding": "parallel", "action_horizon": K, "action_dim": A, "norm_stats": STATISTICS}
MODELS = {
    "l1": {"action_head": "l1", "num_images": 2, "proprio_dim": S},
    "film": {"action_head": "l1", "num_images": 2, "proprio_dim": S, "use_film": True},
    "none": {"action_head": "none"},
    "diffusion": {"action_head": "diffusion", "num_images": 2, "proprio_dim": S, "diffusion_steps": 10},
}
IMPLEMENTATIONS = ["sdpa", "eager"]


def make_inputs(model, rows=1, seed=0, lengths=(5, 9, 3)):
    """Make arguments of `predict_action` for prompts of different lengths, padded on the right."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    width = max(lengths[:rows])
    mask = torch.arange(width) < torch.tensor(lengths[:rows])[:, None]
    ids = torch.randint(3, 200, (rows, width), generator=generator)
    ids[:, 0] = config.text_config.bos_token_id
    side = config.vision_config.image_size
    inputs = {
        "input_ids": ids.where(mask, config.pad_token_id),
        "attention_mask": mask.long(),
        "pixel_values": torch.randn(rows, 6 * config.num_images, side, side, generator=generator),
        "unnorm_key": ["tiny", "other", "tiny"][:rows],
    }
    if config.proprio_dim is not None:
        inputs["state"] = torch.randn(rows, S, generator=generator).numpy()
    return inputs


def row_of(inputs, row):
    length = int(inputs["attention_mask"][row].sum())
    one = {name: value[row : row + 1] for name, value in inputs.items()}
    return one | {name: one[name][:, :length] for name in ("input_ids", "attention_mask")}


def noise_of(model, rows=1):
    if model.config.action_head != "diffusion":
        return {}
    return {"initial_noise": torch.randn(rows, K, A, generator=torch.Generator().manual_seed(1))}


def training_inputs(model, rows=3):
    inputs = make_inputs(model, rows)
    del inputs["unnorm_key"]
    if (state := inputs.pop("state", None)) is not None:
        inputs["proprio"] = torch.from_numpy(state)
    return inputs | {"actions": torch.rand(rows, K, A, generator=torch.Generator().manual_seed(2)) * 2 - 1}


@pytest.fixture(params=MODELS)
def model(request, tiny):
    return tiny(**PARALLEL | MODELS[request.param])[0]


@pytest.fixture
def l1(tiny):
    return tiny(**PARALLEL | MODELS["l1"])[0]


@pytest.fixture
def discrete(tiny):
    return tiny(**PARALLEL | MODELS["none"])[0]


@pytest.fixture
def diffusion(tiny):
    return tiny(**PARALLEL | MODELS["diffusion"])[0]


def test_one_observation_gives_a_chunk_and_a_batch_gives_chunks(model):
    noise = noise_of(model)
    chunk = model.predict_action(**row_of(make_inputs(model), 0), **noise)
    assert (chunk.shape, chunk.dtype) == ((K, A), np.float64)
    chunks = model.predict_action(**make_inputs(model, 3), **noise_of(model, 3))
    assert chunks.shape == (3, K, A)
    assert np.isfinite(chunks).all()


def test_rows_of_a_batch_get_what_they_get_alone(model):
    inputs, noise = make_inputs(model, 3), noise_of(model, 3)
    chunks = model.predict_action(**inputs, **noise)
    for row in range(3):
        own = {name: value[row] for name, value in noise.items()}
        np.testing.assert_allclose(chunks[row], model.predict_action(**row_of(inputs, row), **own), atol=2e-5)


def test_padding_on_the_left_and_on_the_right_agree(model):
    inputs, noise = make_inputs(model, 3), noise_of(model, 3)
    on_the_left = dict(inputs)
    for name in ("input_ids", "attention_mask"):
        shifted = [
            row.roll(len(row) - int(mask.sum()))
            for row, mask in zip(inputs[name], inputs["attention_mask"], strict=True)
        ]
        on_the_left[name] = torch.stack(shifted)
    expected = model.predict_action(**inputs, **noise)
    assert np.array_equal(model.predict_action(**on_the_left, **noise), expected)


def test_the_ids_may_already_contain_the_placeholders_of_the_images(model):
    inputs, noise = row_of(make_inputs(model), 0), noise_of(model)
    expected = model.predict_action(**inputs, **noise)
    count = model.config.num_images * model.config.num_image_tokens
    for length in (count, model.config.num_prefix_tokens):
        placeholders = torch.full((1, length), model.config.image_token_id)
        ids = torch.cat([inputs["input_ids"][:, :1], placeholders, inputs["input_ids"][:, 1:]], dim=1)
        filled = inputs | {"input_ids": ids, "attention_mask": None}
        assert np.array_equal(model.predict_action(**filled, **noise), expected)


def watch(module):
    """Record the input embeddings and the output hidden states of a language model in its last call."""
    seen = {}

    def keep(_, args, kwargs, output):
        seen.update(kwargs, hidden=output.last_hidden_state)

    module.register_forward_hook(keep, with_kwargs=True)
    return seen


def test_the_sequence_is_laid_out_as_in_the_original(model):
    """BOS, images, state, time, prompt, slots, EOS; a slot is predicted at the position before it."""
    seen, inputs, noise = watch(model.model.language_model), make_inputs(model, 2), noise_of(model, 2)
    details = model.predict_action(**inputs, **noise, return_details=True)
    config, embed = model.config, model.get_input_embeddings()
    lengths = inputs["attention_mask"].sum(1)
    total = config.num_prefix_tokens + int(lengths.max()) + K * A + 1
    assert seen["inputs_embeds"].shape[:2] == (2, total)
    for row, length in enumerate(lengths):
        padding = int(lengths.max() - length)
        embeds = seen["inputs_embeds"][row, padding:]
        assert seen["position_ids"][row, padding:].tolist() == list(range(total - padding))
        prompt = embed(inputs["input_ids"][row, :length])
        after_prefix = 1 + config.num_prefix_tokens
        end = after_prefix + int(length) - 1
        assert torch.equal(embeds[0], prompt[0])
        assert torch.equal(embeds[after_prefix:end], prompt[1:])
        assert torch.equal(embeds[-1], embed(torch.tensor(config.text_config.eos_token_id)))
        text = torch.cat([prompt, embeds[-1:]]).mean(0, keepdim=True) if config.use_film else None
        own = model.get_image_features(inputs["pixel_values"][row : row + 1], text)[0]
        torch.testing.assert_close(embeds[1 : 1 + len(own)], own, atol=1e-5, rtol=0)
        is_zero = bool((embeds[end : end + K * A] == 0).all())
        assert is_zero == (config.action_head != "diffusion")
        if config.action_head == "l1":
            readout = seen["hidden"][row, padding:][end - 1 : end - 1 + K * A]
            expected = model.action_head(readout[None])[0].detach()
            np.testing.assert_allclose(details.normalized_actions[row], expected, atol=1e-6)
        elif config.action_head == "none":
            readout = seen["hidden"][row, padding:][end - 1 : end - 1 + K * A]
            first, last = model.action_tokenizer.first_id, model.action_tokenizer.vocab_end
            chances = model.lm_head(readout)[:, first:last].softmax(-1).flip(-1).detach()
            np.testing.assert_allclose(details.probabilities[row].reshape(K * A, -1), chances, atol=1e-6)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, pytest.param("flex_attention", marks=pytest.mark.slow)])
@torch.no_grad()
def test_every_position_sees_every_other(l1, implementation):
    """The state at the start of the sequence depends on the last token, and no padding matters."""
    l1.set_attn_implementation(implementation)
    embeds = torch.randn(2, 6, l1.config.text_config.hidden_size)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    hidden = l1.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    for changed, row in itertools.product(range(6), range(2)):
        other = embeds.clone()
        other[row, changed] += 1
        moved = (l1.model(inputs_embeds=other, attention_mask=mask).last_hidden_state - hidden).abs().amax(-1)[row]
        if mask[row, changed]:
            assert (moved > 1e-4).all()
        else:
            assert (moved[mask[row].bool()] == 0).all()


def with_language_model(kind, **fields):
    plain = tiny_config()
    text = {
        "model_type": kind,
        "hidden_size": 64,
        "head_dim": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        **{name: getattr(plain.text_config, name) for name in ("vocab_size", "pad_token_id", "eos_token_id")},
    }
    return OpenVLAConfig(**plain.to_dict() | PARALLEL | fields | {"text_config": text})


@pytest.mark.parametrize("kind", BIDIRECTIONAL_LANGUAGE_MODELS)
@torch.no_grad()
def test_the_listed_language_models_see_ahead(kind):
    config = with_language_model(kind)
    for implementation in IMPLEMENTATIONS:
        if (kind, implementation) == ("gemma2", "sdpa"):  # Gemma 2 does not support SDPA
            continue
        torch.manual_seed(0)
        model = OpenVLAForActionPrediction._from_config(config, attn_implementation=implementation).eval()
        embeds, mask = torch.randn(1, 8, 64), torch.ones(1, 8)
        hidden = model.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        embeds[0, -1] = torch.randn(64)
        moved = (model.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state - hidden).abs().amax(-1)
        assert (moved > 1e-4).all(), implementation


def test_a_language_model_that_may_stay_causal_is_refused():
    with pytest.raises(ValueError, match="not tested with the language model 'gpt_neox', whose attention may stay"):
        with_language_model("gpt_neox")
    assert with_language_model("gpt_neox", action_decoding="autoregressive", action_horizon=1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_causal_mask_would_show(l1, implementation, monkeypatch):
    """The check above has a failing case: without our mask, attention is causal."""
    l1.set_attn_implementation(implementation)
    inputs = row_of(make_inputs(l1), 0)
    expected = l1.predict_action(**inputs)
    monkeypatch.setattr("openvla_hf.modeling.modeling_openvla.bidirectional_mask", lambda config, embeds, mask: None)
    assert np.abs(l1.predict_action(**inputs) - expected).max() > 1e-3


def test_attention_implementations_agree(model):
    inputs, noise = make_inputs(model, 3), noise_of(model, 3)
    expected = model.predict_action(**inputs, **noise)
    model.set_attn_implementation("eager")
    np.testing.assert_allclose(model.predict_action(**inputs, **noise), expected, atol=2e-5)


@pytest.mark.slow
def test_flex_attention_agrees(l1):
    inputs = make_inputs(l1, 3)
    expected = l1.predict_action(**inputs)
    l1.set_attn_implementation("flex_attention")
    np.testing.assert_allclose(l1.predict_action(**inputs), expected, atol=2e-5)


def test_an_attention_implementation_without_a_bidirectional_mask_is_refused(l1):
    l1.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' does not take the bidirectional mask"):
        l1.predict_action(**row_of(make_inputs(l1), 0))


def test_the_state_and_every_image_matter(l1):
    inputs = row_of(make_inputs(l1), 0)
    expected = l1.predict_action(**inputs)
    assert not np.allclose(l1.predict_action(**inputs | {"state": inputs["state"] + 0.3}), expected)
    for camera in range(2):
        pixels = inputs["pixel_values"].clone()
        pixels[:, 6 * camera : 6 * camera + 6] += 0.3
        assert not np.allclose(l1.predict_action(**inputs | {"pixel_values": pixels}), expected)


def test_the_state_is_normalised_by_each_rows_statistics_and_not_changed(l1):
    state = np.array([0.5, 9.0])
    assert normalize_state(state, STATE_STATS).tolist() == pytest.approx([0.5, 1.0])
    assert normalize_state(state, STATE_STATS, "bounds").tolist() == pytest.approx([0.25, 1.0])
    assert normalize_state(np.array([3.0]), {"q01": [3.0], "q99": [3.0]}).tolist() == [-1.0]
    inputs = make_inputs(l1, 2)
    before = inputs["state"].copy()
    l1.predict_action(**inputs)
    assert np.array_equal(inputs["state"], before)


@pytest.mark.parametrize("bounds", ["q99", "bounds"])
def test_actions_are_in_robot_units(l1, bounds):
    l1.config.action_normalization = bounds
    details = l1.predict_action(**row_of(make_inputs(l1), 0), return_details=True)
    names = {"q99": ("q01", "q99"), "bounds": ("min", "max")}[bounds]
    low, high = (np.array(BRIDGE_LIKE_STATS[name]) for name in names)
    expected = 0.5 * (details.normalized_actions + 1) * (high - low + 1e-8) + low
    expected[..., 6] = details.normalized_actions[..., 6]
    np.testing.assert_allclose(details.actions, expected, rtol=1e-12)


def test_details_of_a_head_without_tokens(l1):
    details = l1.predict_action(**make_inputs(l1, 3), return_details=True)
    assert details.actions.shape == details.normalized_actions.shape == (3, K, A)
    assert (details.token_ids, details.probabilities, details.entropy) == (None, None, None)
    assert details.forward_passes == 1


def test_details_of_tokens(discrete):
    details = discrete.predict_action(**make_inputs(discrete, 3), return_details=True)
    assert details.token_ids.shape == (3, K, A)
    assert details.probabilities.shape == (3, K, A, 256)
    np.testing.assert_allclose(details.probabilities.sum(-1), 1, rtol=1e-5)
    tokenizer = discrete.action_tokenizer
    best = tokenizer.bin_values[details.probabilities.argmax(-1)]
    assert np.array_equal(best, details.normalized_actions)
    assert np.array_equal(tokenizer.decode(details.token_ids), details.normalized_actions)
    assert discrete.decode_actions(details.token_ids[0], "tiny") == pytest.approx(details.actions[0])


def test_unconstrained_tokens_come_from_the_whole_vocabulary(discrete):
    inputs = row_of(make_inputs(discrete), 0)
    best = discrete.predict_action(**inputs, return_details=True).token_ids
    discrete.lm_head.weight.data[10] = 2 * discrete.lm_head.weight.data[int(best[0, 0, 0])]
    free = discrete.predict_action(**inputs, constrained=False, return_details=True)
    bound = discrete.predict_action(**inputs, return_details=True)
    first, end = discrete.action_tokenizer.first_id, discrete.action_tokenizer.vocab_end
    assert ((bound.token_ids >= first) & (bound.token_ids < end)).all()
    assert free.token_ids[0, 0, 0] == 10
    assert free.normalized_actions[0, 0, 0] == discrete.action_tokenizer.decode([10])


def test_a_variant_without_a_stop_token_acts_differently(tiny):
    with_stop, without = (tiny(**PARALLEL | MODELS["l1"], action_stop_token=stop)[0] for stop in (True, False))
    inputs = make_inputs(with_stop, 3)
    chunks = without.predict_action(**inputs)
    assert not np.allclose(with_stop.predict_action(**inputs), chunks)
    for row in range(3):
        np.testing.assert_allclose(chunks[row], without.predict_action(**row_of(inputs, row)), atol=2e-5)


@torch.no_grad()
def test_without_a_stop_token_the_sequence_ends_in_the_last_slot(tiny):
    """The chunk of each row equals a pass over a sequence that is built by hand."""
    model = tiny(**PARALLEL | MODELS["none"], action_stop_token=False)[0]
    inputs = make_inputs(model, 2)
    details = model.predict_action(**inputs, return_details=True)
    embed, lengths = model.get_input_embeddings(), inputs["attention_mask"].sum(1).tolist()
    images = model.get_image_features(inputs["pixel_values"])
    for row, length in enumerate(lengths):
        padding, prompt = max(lengths) - length, embed(inputs["input_ids"][row, :length])
        before = embed(torch.full((padding,), model.config.pad_token_id))
        sequence = torch.cat([before, prompt[:1], images[row], prompt[1:], torch.zeros(K * A, 64)])
        is_token = torch.arange(len(sequence)) >= padding
        hidden = model.model.language_model(
            inputs_embeds=sequence[None],
            attention_mask=is_token.expand(1, 1, len(sequence), -1),
            position_ids=(is_token.cumsum(0) - 1).clamp(min=0)[None],
            use_cache=False,
        ).last_hidden_state[0]
        assert len(sequence) == max(lengths) + model.config.num_image_tokens + K * A
        logits = model.lm_head(hidden[-K * A - 1 : -1])
        first, last = model.action_tokenizer.first_id, model.action_tokenizer.vocab_end
        assert (logits[:, first:last].argmax(-1) + first).tolist() == details.token_ids[row].flatten().tolist()
        chances = logits[:, first:last].softmax(-1).flip(-1)
        np.testing.assert_allclose(details.probabilities[row].reshape(K * A, -1), chances, atol=1e-6)


def test_the_initial_noise_decides_the_chunk(diffusion):
    inputs, noise = row_of(make_inputs(diffusion), 0), noise_of(diffusion)["initial_noise"]
    details = diffusion.predict_action(**inputs, initial_noise=noise, return_details=True)
    assert details.forward_passes == 10
    assert np.array_equal(diffusion.predict_action(**inputs, initial_noise=noise[0]), details.actions[0])
    assert not np.allclose(diffusion.predict_action(**inputs, initial_noise=-noise), details.actions[0])
    torch.manual_seed(0)
    drawn = diffusion.predict_action(**inputs)
    torch.manual_seed(0)
    assert np.array_equal(diffusion.predict_action(**inputs), drawn)
    few = diffusion.predict_action(**inputs, initial_noise=noise, num_inference_steps=2, return_details=True)
    assert few.forward_passes == 2


def test_denoising_the_true_noise_gives_the_actions_back():
    schedule = NoiseSchedule(50)
    actions, noise = torch.rand(4, K, A) * 2 - 1, torch.randn(4, K, A)
    levels = torch.tensor([0, 10, 30, 45])
    noisy = schedule.add_noise(actions, noise, levels)
    torch.testing.assert_close(schedule.remove_noise(noisy, noise, levels), actions, atol=1e-3, rtol=0)
    for count in (1, 5, 50):
        timesteps = schedule.timesteps(count)
        sample = schedule.add_noise(actions, noise, torch.full((4,), timesteps[0]))
        for timestep in timesteps:
            sample = schedule.step(sample, noise, timestep, count)
        torch.testing.assert_close(sample, actions, atol=1e-3, rtol=0)


def test_training_predicts_what_prediction_does(l1):
    inputs = make_inputs(l1, 3)
    details = l1.predict_action(**inputs, return_details=True)
    stats = [STATISTICS[key]["proprio"] for key in inputs["unnorm_key"]]
    proprio = np.stack([normalize_state(*one) for one in zip(inputs["state"], stats, strict=True)])
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    outputs = l1(**given, proprio=torch.from_numpy(proprio))
    assert outputs.loss is None
    np.testing.assert_allclose(outputs.actions.detach(), details.normalized_actions, atol=1e-5)


def test_losses_are_means_over_the_actions_that_count(l1, discrete):
    inputs = training_inputs(l1)
    mask = torch.tensor([[True] * 3, [True, True, False], [True, False, False]])
    outputs = l1(**inputs, action_mask=mask)
    errors = (outputs.actions - inputs["actions"]).abs()
    torch.testing.assert_close(outputs.loss, errors[mask].mean())
    torch.testing.assert_close(l1(**inputs).loss, errors.mean())
    torch.testing.assert_close(l1(**inputs, num_items_in_batch=10).loss, errors.sum() / 10)

    inputs = training_inputs(discrete)
    outputs = discrete(**inputs, action_mask=mask)
    ids = torch.from_numpy(discrete.action_tokenizer.encode(inputs["actions"])).flatten(1)
    targets = torch.cat([ids, torch.full((3, 1), discrete.config.text_config.eos_token_id)], dim=1)
    chances = outputs.logits.log_softmax(-1).take_along_dim(targets.unsqueeze(-1), -1).squeeze(-1)
    counts = torch.cat([mask.repeat_interleave(A, dim=1), torch.ones(3, 1, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(outputs.loss, -chances[counts].mean())


def test_the_diffusion_loss_compares_noise(diffusion):
    inputs, noise = training_inputs(diffusion), torch.randn(3, K, A)
    levels = torch.tensor([0, 4, 9])
    outputs = diffusion(**inputs, noise=noise, timesteps=levels)
    torch.manual_seed(5)
    drawn = diffusion(**inputs).loss
    torch.manual_seed(5)
    assert torch.equal(diffusion(**inputs).loss, drawn)
    assert not torch.equal(outputs.loss, drawn)
    ids, mask = lay_out(diffusion.config, inputs["input_ids"], inputs["attention_mask"], 3)
    parallel = ParallelPass(diffusion, ids, inputs["pixel_values"], mask, inputs["proprio"])
    again = chunk_loss(diffusion, parallel, inputs["actions"], noise=noise, timesteps=levels)
    torch.testing.assert_close(again.loss, outputs.loss)
    assert outputs.actions.abs().max() <= 1


def test_every_new_weight_learns(model):
    model(**training_inputs(model)).loss.backward()
    parts = ("action_head.", "model.proprio_projector.", "model.noisy_action_projector.")
    names = {name for name, _ in model.named_parameters() if name.startswith(parts)}
    assert {name.partition(".fc")[0] for name in names if "projector" in name} == {
        f"model.{name}"
        for name, has in (
            ("proprio_projector", model.config.proprio_dim is not None),
            ("noisy_action_projector", model.config.action_head == "diffusion"),
        )
        if has
    }
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in names)


def test_several_images_and_the_state_also_enter_autoregressive_decoding(tiny):
    model = tiny(num_images=2, proprio_dim=S, norm_stats=STATISTICS)[0]
    inputs = make_inputs(model, 3)
    actions = model.predict_action(**inputs)
    assert actions.shape == (3, A)
    details = model.predict_action(**inputs, return_details=True)
    for row in range(3):
        np.testing.assert_allclose(actions[row], model.predict_action(**row_of(inputs, row)), atol=1e-5)
    generated = model.predict_action(**inputs, do_sample=False, return_details=True)
    assert np.array_equal(generated.token_ids, details.token_ids)
    assert not np.array_equal(
        model.predict_action(**inputs | {"state": inputs["state"] + 1}, return_details=True).probabilities,
        details.probabilities,
    )
    stream = model.action_stream()
    assert np.array_equal(stream.predict_action(**inputs), actions)


BAD_CALLS = [
    ({"state": None}, "robot's state is missing: pass 2 numbers"),
    ({"state": np.zeros((1, 3))}, r"`state` has shape \(1, 3\), but this model needs \(1, 2\)"),
    ({"state": np.zeros((2, 2))}, r"`state` has shape \(2, 2\), but this model needs \(1, 2\)"),
    ({"state": np.array([np.nan, 0.0])}, "`state` contains NaN or infinity"),
    ({"state": ["left", "right"]}, "`state` is neither a tensor nor an array of numbers"),
    ({"pixel_values": torch.zeros(1, 6, 56, 56)}, "contains 1 image for each observation, but this model sees 2"),
    ({"pixel_values": torch.zeros(1, 18, 56, 56)}, "contains 3 images for each observation, but this model sees 2"),
    ({"pixel_values": torch.full((1, 12, 56, 56), torch.nan)}, "output is not finite for observation 0"),
    ({"initial_noise": np.zeros((K, A))}, "need a diffusion head, which this model lacks: leave them out"),
    ({"num_inference_steps": 5}, "need a diffusion head"),
    ({"do_sample": True}, "Parallel decoding does not take 'do_sample': leave it out"),
    ({"do_sample": True, "top_k": 5}, "does not take 'do_sample', 'top_k': leave them out"),
    ({"draft_token_ids": [1] * A}, "Parallel decoding does not take 'draft_token_ids'"),
    ({"stats": {"q01": [0.0], "q99": [1.0]}}, "describe 1 action dimensions, but this model predicts 7"),
    ({"input_ids": torch.arange(480)[None] % 200 + 3, "attention_mask": None}, "exceed the 512 positions"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CALLS)
def test_inputs_that_do_not_fit_are_refused(l1, change, message):
    with pytest.raises(ValueError, match=message):
        l1.predict_action(**row_of(make_inputs(l1), 0) | change)


def test_statistics_without_the_state_are_refused(l1):
    inputs = row_of(make_inputs(l1), 0)
    l1.config.norm_stats = {"tiny": {"action": BRIDGE_LIKE_STATS}}
    with pytest.raises(ValueError, match="The statistics of 'tiny' have no 'proprio'"):
        l1.predict_action(**inputs)
    l1.config.norm_stats = {"tiny": {"action": BRIDGE_LIKE_STATS, "proprio": {"q01": [0.0], "q99": [1.0]}}}
    with pytest.raises(ValueError, match="describe 1 state dimensions, but this model sees 2"):
        l1.predict_action(**inputs)
    l1.config.norm_stats = {"tiny": {"action": BRIDGE_LIKE_STATS, "proprio": {"q01": [0.0] * 2}}}
    with pytest.raises(ValueError, match="'proprio' of 'tiny': 'q99' is missing"):
        l1.predict_action(**inputs)


def test_a_model_that_does_not_see_the_state_refuses_it(discrete, tiny):
    plain = tiny()[0]
    for model in (discrete, plain):
        with pytest.raises(ValueError, match="does not take a state"):
            model.predict_action(**make_inputs(model), state=np.zeros(2))
    with pytest.raises(ValueError, match="does not take a state"):
        plain(torch.tensor([[1, 5]]), torch.zeros(1, 6, 56, 56), proprio=torch.zeros(1, 2))


def test_noise_that_does_not_fit_is_refused(diffusion):
    inputs = row_of(make_inputs(diffusion), 0)
    for noise in (np.zeros((K, A + 1)), np.full((K, A), np.inf)):
        with pytest.raises(ValueError, match="`initial_noise` must be finite numbers of shape"):
            diffusion.predict_action(**inputs, initial_noise=noise)
    for steps in (0, 3, 6, 11, 2.0, True):
        with pytest.raises(ValueError, match=r"must divide the 10 training steps \(choose from 1, 2, 5, 10\), got"):
            diffusion.predict_action(**inputs, num_inference_steps=steps)


def test_training_inputs_that_do_not_fit_are_refused(l1, diffusion, tiny):
    inputs = training_inputs(l1)
    for change, message in (
        ({"actions": inputs["actions"][:, :2]}, r"`actions` has shape \(3, 2, 7\), but this model needs"),
        ({"action_mask": torch.ones(3, K)}, "`action_mask` must be bools"),
        ({"action_mask": torch.ones(3, 1, dtype=torch.bool)}, r"got torch.bool of shape \(3, 1\)"),
        ({"labels": inputs["input_ids"]}, "does not take `labels`"),
        ({"output_hidden_states": True}, "does not take `output_hidden_states`: leave it out"),
        ({"logits_to_keep": 1}, "does not take `logits_to_keep`"),
        ({"logits_to_keep": torch.tensor([0])}, "does not take `logits_to_keep`"),
        ({"state": inputs["proprio"]}, "does not take `state`: leave it out.* the normalised state as `proprio`"),
        ({"proprio": None}, "robot's state is missing"),
        ({"proprio": torch.zeros(3, 5)}, r"`proprio` has shape \(3, 5\), but this model needs \(3, 2\)"),
        ({"pixel_values": None}, "needs both `input_ids` and `pixel_values`"),
    ):
        with pytest.raises(ValueError, match=message):
            l1(**inputs | change)
    off = {"output_hidden_states": False, "output_attentions": None, "logits_to_keep": 0, "use_cache": False}
    assert torch.equal(l1(**inputs | off).loss, l1(**inputs).loss)
    with pytest.raises(ValueError, match="has no loss without `actions`"):
        diffusion(**training_inputs(diffusion) | {"actions": None})
    with pytest.raises(ValueError, match="Only a model with parallel decoding learns from `actions`"):
        tiny()[0](torch.tensor([[1, 5]]), torch.zeros(1, 6, 56, 56), actions=inputs["actions"])


def test_generation_and_compilation_are_refused(l1):
    with pytest.raises(ValueError, match="generates no text: call `predict_action`"):
        l1.generate(input_ids=torch.tensor([[1, 5]]))
    with pytest.raises(ValueError, match="predict without `compile_for_actions`"):
        l1.compile_for_actions()
    with pytest.raises(ValueError, match="leave `past_key_values` out"):
        l1.model(inputs_embeds=torch.zeros(1, 2, 64), past_key_values=object())


def test_a_saved_checkpoint_gives_the_same_chunk(model, tmp_path):
    inputs, noise = make_inputs(model, 2), noise_of(model, 2)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert np.array_equal(again.predict_action(**inputs, **noise), model.predict_action(**inputs, **noise))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_loading_leaves_heads_and_projectors_in_16_bits(model, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    model.bfloat16().save_pretrained(tmp_path)
    inputs, noise = make_inputs(model, 2), noise_of(model, 2)
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    quantized = type(model).from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    layer = {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    text = [one for one in quantized.model.language_model.modules() if isinstance(one, torch.nn.Linear)]
    assert {type(one).__name__ for one in text} == {layer}
    parts = (quantized.action_head, quantized.model.proprio_projector, quantized.model.noisy_action_projector)
    for part in [part for part in parts if part is not None]:
        assert {type(one).__name__ for one in part.modules() if isinstance(one, torch.nn.Linear)} == {"DefaultLinear"}
        assert all(parameter.dtype == torch.bfloat16 for parameter in part.parameters())
    assert np.isfinite(quantized.predict_action(**inputs, **noise)).all()


def test_new_heads_start_as_pytorch_initialises_them(tiny):
    model = tiny(**PARALLEL | MODELS["l1"])[0]
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
        parameter._is_hf_initialized = False
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    weight = model.action_head.fc1.weight
    bound = weight.shape[1] ** -0.5
    assert 0.9 * bound < weight.abs().max() <= bound
    assert model.model.proprio_projector.fc1.bias.abs().max() > 0
