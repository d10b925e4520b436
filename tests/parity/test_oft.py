"""OpenVLA-OFT's recorded outputs, reproduced. These tests need `--golden DIR`; the tolerances are in README.md."""

import functools

import numpy as np
import pytest
import torch
from oft_recordings import COMPONENTS, RecordedOFT, our_name
from safetensors.torch import load_file
from test_parity import in_published_layout

from openvla_hf.modeling.action_heads import embed_time, noise_schedule
from openvla_hf.modeling.parallel_decoding import ParallelPass, decode_chunk, lay_out


TRAINING_CASES = ["oft-l1", "oft-l1-aloha", "oft-discrete", "oft-diffusion"]
# In a training batch with FiLM, the original's mean of the text includes padding, unlike ours.
CASES = [*TRAINING_CASES, "oft-film"]
IMPLEMENTATIONS = ["sdpa", "eager"]
PROPRIO_EMBEDDING, HIDDEN, ACTIONS, LOGITS = 1e-6, 1e-5, 5e-5, 1e-3
HIDDEN_DISCRETE = 3e-4  # the final norm of this checkpoint is not small
ACTIONS_BFLOAT16 = 0.07
DENOISED = {10: 1e-4, 50: 5e-4}  # steps -> tolerance
LOSS, GRADIENT = 1e-5, 1e-4  # relative
SMALLEST_CAUSAL_EFFECT = 0.5


@pytest.fixture(scope="module")
def recorded_oft(golden):
    return functools.cache(lambda case: RecordedOFT(golden / case))


@pytest.fixture(params=CASES)
def record(recorded_oft, request):
    return recorded_oft(request.param)


@pytest.fixture(params=IMPLEMENTATIONS)
def model(record, request):
    record.model.set_attn_implementation(request.param)
    yield record.model
    record.model.set_attn_implementation("sdpa")


def error(actual, expected):
    assert tuple(actual.shape) == tuple(expected.shape)
    return np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64)).max()


def compare(record, details, rows, name, tolerance):
    for row, k in enumerate(rows):
        assert error(details.normalized_actions[row], record.tensors[f"{name}.{k}.normalized_actions"]) <= tolerance
        assert error(details.actions[row], record.tensors[f"{name}.{k}.actions"]) <= tolerance
        if details.token_ids is not None:
            assert error(details.token_ids[row].reshape(-1), record.tensors[f"{name}.{k}.token_ids"]) == 0


def decoding(record, rows):
    """Return the arguments of the recorded predictions, and the tolerance of their actions."""
    if record.model.config.action_head != "diffusion":
        return "predict", {"constrained": False, "return_details": True}, ACTIONS
    noise = torch.stack([record.tensors[f"predict.{k}.initial_noise"] for k in rows])
    arguments = {"initial_noise": noise, "num_inference_steps": 10, "return_details": True}
    return "predict10", arguments, DENOISED[10]


def test_pixels(record):
    for i, pixels in enumerate(record.pixel_values):
        assert error(pixels[:, 3::8, 5::8], record.tensors[f"pixel_values.{i}.sample"]) <= 1e-6


def test_one_by_one(record, model):
    for k in range(len(record.predictions)):
        name, arguments, tolerance = decoding(record, [k])
        compare(record, model.predict_action(**record.inputs(k), **arguments), [k], name, tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
def test_in_a_batch_of_different_prompts_and_datasets(record, model, side):
    rows = range(len(record.predictions))
    name, arguments, tolerance = decoding(record, rows)
    compare(record, model.predict_action(**record.batch_inputs(rows, side), **arguments), rows, name, tolerance)


def test_in_fifty_denoising_steps(recorded_oft):
    record = recorded_oft("oft-diffusion")
    rows = [k for k in range(len(record.predictions)) if f"predict.{k}.actions" in record.tensors]
    noise = torch.stack([record.tensors[f"predict.{k}.initial_noise"] for k in rows])
    details = record.model.predict_action(**record.batch_inputs(rows), initial_noise=noise, return_details=True)
    assert details.forward_passes == 50
    compare(record, details, rows, "predict", DENOISED[50])


@torch.no_grad()
def test_hidden_states_and_embeddings(record, model):
    is_discrete = model.config.action_head == "none"
    for k in (0, 7):
        inputs, prefix = record.inputs(k), f"predict.{k}."
        proprio = model._normalize_state(inputs.get("state"), [inputs["unnorm_key"]])
        if proprio is not None:
            assert error(proprio[0], record.tensors[f"{prefix}proprio_normalized"]) <= 1e-6
            embedded = model.model.proprio_projector(proprio)[0]
            assert error(embedded, record.tensors[f"{prefix}proprio_embedding"]) <= PROPRIO_EMBEDDING
        ids, mask = lay_out(model.config, inputs["input_ids"], None, 1)
        parallel = ParallelPass(model, ids, inputs["pixel_values"], mask, proprio)
        noise = [None, None]
        if model.config.action_head == "diffusion":
            noise = [record.tensors[f"{prefix}initial_noise"][None], record.tensors["predict10.0.timesteps"][:1]]
        hidden = parallel.run(*noise)[0, : parallel.slots]
        assert error(hidden, record.tensors[f"{prefix}readout_hidden"]) <= (HIDDEN_DISCRETE if is_discrete else HIDDEN)
        assert parallel.attention_mask.shape[1] == record.predictions[k]["sequence_length"]
        if is_discrete:
            tail = model.lm_head(hidden)[:, -320:]
            assert error(tail, record.tensors[f"{prefix}logits_tail"]) <= LOGITS


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_mask_is_not_causal(recorded_oft, golden, implementation):
    record = recorded_oft("oft-l1")
    causal = load_file(golden / "oft-openvla-mask" / "expected.safetensors")
    record.model.set_attn_implementation(implementation)
    for k in range(0, len(record.predictions), 5):
        details = record.model.predict_action(**record.inputs(k), return_details=True)
        assert error(details.normalized_actions[0], causal[f"predict.{k}.normalized_actions"]) > SMALLEST_CAUSAL_EFFECT
    record.model.set_attn_implementation("sdpa")


def test_a_causal_mask_gives_the_recorded_wrong_actions(recorded_oft, golden, monkeypatch):
    """Only the mask differs from the recording above."""
    record = recorded_oft("oft-l1")
    causal = load_file(golden / "oft-openvla-mask" / "expected.safetensors")
    monkeypatch.setattr("openvla_hf.modeling.modeling_openvla.bidirectional_mask", lambda config, embeds, mask: mask)
    for k in (0, 7):
        details = record.model.predict_action(**record.inputs(k), return_details=True)
        assert error(details.normalized_actions[0], causal[f"predict.{k}.normalized_actions"]) <= ACTIONS


def test_the_noise_schedule(recorded_oft):
    tensors = recorded_oft("oft-diffusion").tensors
    schedule = noise_schedule(50)
    assert error(schedule.betas, tensors["scheduler.betas"]) <= 1e-7
    assert error(schedule.alphas_cumprod, tensors["scheduler.alphas_cumprod"]) <= 1e-7
    assert schedule.timesteps(10) == tensors["predict10.0.timesteps"].tolist()
    assert schedule.timesteps(50) == tensors["predict.0.timesteps"].tolist()
    times = embed_time(tensors["predict.0.timesteps"], 64)
    assert error(times, tensors["predict.0.time_embeddings"].reshape(times.shape)) <= 1e-5


@pytest.mark.parametrize("case", TRAINING_CASES)
def test_loss_and_gradients(recorded_oft, case):
    record = recorded_oft(case)
    model, tensors = record.load(), record.tensors
    draws = {}
    if model.config.action_head == "diffusion":
        draws = {"noise": tensors["train.noise"], "timesteps": tensors["train.timesteps"].flatten().long()}
    outputs = model(**record.training_inputs(), **draws)
    outputs.loss.backward()
    assert abs(outputs.loss.item() / record.expected["train"]["loss"] - 1) <= LOSS
    if "train.predicted_actions" in tensors:
        assert error(outputs.actions.detach(), tensors["train.predicted_actions"]) <= ACTIONS
    if "train.predicted_token_ids" in tensors:
        ids = outputs.logits[:, :-1].argmax(-1)
        assert error(ids, tensors["train.predicted_token_ids"].reshape(ids.shape)) == 0
        assert error(outputs.logits[:, -1, :8].detach(), tensors["train.stop_logits"]) <= LOGITS
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    norms = record.expected["train"]["grad_norms"]
    for name, norm in norms.items():
        if name.partition(".")[0] in COMPONENTS:
            gradient = gradients[our_name(*name.split(".", 1))]
        else:
            gradient = in_published_layout(name, gradients, is_fused=True)
        assert abs(gradient.norm().item() / norm - 1) <= GRADIENT, name
        if f"grad.{name}" in tensors:
            whole = tensors[f"grad.{name}"]
            assert error(gradient, whole) <= GRADIENT * whole.abs().max().item(), name
    assert len(gradients) >= len(norms)


def test_sampling_of_a_training_batch(recorded_oft):
    record = recorded_oft("oft-diffusion")
    inputs = record.training_inputs()
    proprio = inputs["proprio"]
    ids, mask = lay_out(record.model.config, inputs["input_ids"], inputs["attention_mask"], len(proprio))
    with torch.no_grad():
        noise = record.tensors["train.sampling_noise"]
        chunk = decode_chunk(record.model, ids, inputs["pixel_values"], mask, [7] * 3, proprio, initial_noise=noise)
    assert error(chunk.normalized_actions, record.tensors["train.sampled_actions"]) <= DENOISED[50]


def test_actions_in_bfloat16(recorded_oft):
    record = recorded_oft("oft-l1")
    tensors = load_file(record.folder / "expected_bf16.safetensors")
    model = record.load(torch.bfloat16)
    rows = range(len(record.predictions))
    details = model.predict_action(**record.batch_inputs(rows), return_details=True)
    for k in rows:
        for expected in (record.tensors, tensors):
            assert (
                error(details.normalized_actions[k], expected[f"predict.{k}.normalized_actions"]) <= ACTIONS_BFLOAT16
            )
