"""OpenVLA-OFT's action head, state and noise schedule, compared with the recordings that are kept here."""

import numpy as np
import pytest
import torch
from make_fixture import read
from recordings import KEPT

from openvla_hf.modeling.action_heads import ActionHead, InputProjector, NoiseSchedule, embed_time
from openvla_hf.modeling.action_tokenizer import RANGE_MARGIN, normalize_state, unnormalize
from openvla_hf.testing import tiny_config


STEPS = 10  # of the recorded denoising, in a schedule of 50


@pytest.fixture(scope="module")
def recorded():
    return read(KEPT / "oft-heads" / "expected.safetensors")


def load(module, recorded, prefix):
    weights = {name.removeprefix(prefix): one.float() for name, one in recorded.items() if name.startswith(prefix)}
    module.load_state_dict(weights, strict=True)
    return module


def error(actual, expected):
    assert tuple(actual.shape) == tuple(expected.shape)
    return np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64)).max()


@torch.no_grad()
def test_the_action_head_gives_the_recorded_actions(recorded):
    config = tiny_config(action_decoding="parallel", action_head="l1", action_horizon=8, action_dim=7)
    head = load(ActionHead(config), recorded, "action_head.")
    normalized = head(recorded["readout_hidden.1"][None])[0]
    assert error(normalized, recorded["normalized_actions.1"]) <= 1e-5


@pytest.mark.parametrize("k", [0, 1])
def test_actions_in_robot_units(recorded, k):
    stats = {name: recorded[f"action.{name}"] for name in ("q01", "q99", "mask")}
    actions = unnormalize(recorded[f"normalized_actions.{k}"].numpy(), stats, margin=RANGE_MARGIN)
    assert error(actions, recorded[f"actions.{k}"]) <= 1e-7  # the original adds 1 in float32


@torch.no_grad()
@pytest.mark.parametrize("k", [0, 1])
def test_the_state_normalised_and_embedded(recorded, k):
    stats = {name: recorded[f"proprio.{name}"] for name in ("q01", "q99")}
    normalized = normalize_state(recorded[f"state.{k}"].numpy(), stats)
    np.testing.assert_allclose(normalized, recorded[f"proprio_normalized.{k}"], rtol=1e-12, atol=1e-12)
    assert (np.abs(normalized) == 1).any() == (k == 1)
    projector = load(InputProjector(8, 64), recorded, "model.proprio_projector.")
    embedded = projector(torch.from_numpy(normalized)[None])[0]
    assert error(embedded, recorded[f"proprio_embedding.{k}"]) <= 1e-6


def test_the_noise_schedule(recorded):
    schedule = NoiseSchedule(50)
    assert error(schedule.betas, recorded["scheduler.betas"]) <= 1e-7
    assert error(schedule.alphas_cumprod, recorded["scheduler.alphas_cumprod"]) <= 1e-7
    assert schedule.timesteps(STEPS) == recorded["predict10.0.timesteps"].tolist()
    times = embed_time(recorded["predict10.0.timesteps"], 64)
    assert error(times, recorded["denoising.time_embeddings"]) <= 1e-6


def test_each_denoising_step(recorded):
    schedule = NoiseSchedule(50)
    noisy, noise = recorded["denoising.noisy_actions"], recorded["denoising.predicted_noise"]
    following = [*noisy[1:], recorded["denoising.actions"]]
    for step, timestep in enumerate(schedule.timesteps(STEPS)):
        result = schedule.step(noisy[step : step + 1], noise[step : step + 1], timestep, STEPS)
        assert error(result[0], following[step]) <= 1e-6
