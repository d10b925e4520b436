"""Streams that play chunks of actions. test_action_decoding.py tests those of plain models."""

import numpy as np
import pytest
import torch

from openvla_hf import ActionStream, ChunkStream
from openvla_hf.testing import BRIDGE_LIKE_STATS


K, A = 4, 7


@pytest.fixture
def model(tiny):
    parallel = {"action_decoding": "parallel", "action_head": "l1", "action_horizon": K, "action_dim": A}
    return tiny(**parallel)[0]


def observations(rows=1):
    """Yield different inputs for `predict_action`."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield {
            "input_ids": torch.tensor([[1, 5, 6]] * rows),
            "pixel_values": torch.randn(rows, 6, 56, 56, generator=generator),
        }


def test_the_kind_of_stream_follows_the_model(model, tiny):
    assert type(model.action_stream()) is ChunkStream
    plain = tiny()[0]
    assert type(plain.action_stream("tiny")) is ActionStream
    for given in ({"execute": 1}, {"ensemble": 0.1}):
        with pytest.raises(ValueError, match="need a model that predicts chunks"):
            plain.action_stream(**given)


@pytest.mark.parametrize("key", ["other", ["tiny", "other"]])
def test_an_unknown_key_is_refused_before_the_first_action(model, tiny, key):
    for policy in (model, tiny()[0]):
        with pytest.raises(ValueError, match="'other'"):
            policy.action_stream(key)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("execute", [None, 1, 3])
def test_a_stream_plays_each_chunk_in_order(model, execute, rows):
    stream, images = model.action_stream("tiny", execute=execute), observations(rows)
    played = execute or K
    for _ in range(2):
        assert stream.needs_observation
        seen = next(images)
        chunk = model.predict_action(**seen)
        for step in range(played):
            assert stream.needs_observation == (step == 0)
            action = stream.predict_action(**seen) if step == 0 else stream.predict_action()
            assert action.shape == ((A,) if rows == 1 else (rows, A))
            assert np.array_equal(action, chunk[..., step, :])
            assert stream.forward_passes == (step == 0)


@pytest.mark.parametrize("options", [{}, {"execute": 2, "ensemble": 0.1}])
def test_another_prompt_or_key_ends_the_chunk(model, options):
    model.norm_stats = {"tiny": model.norm_stats["tiny"], "other": {"action": BRIDGE_LIKE_STATS | {"q99": [9.0] * A}}}
    stream, seen = model.action_stream("tiny", **options), next(observations())
    stream.predict_action(**seen)
    other_prompt = seen | {"input_ids": torch.tensor([[1, 5, 7]])}
    for changed in (other_prompt, other_prompt | {"unnorm_key": "other"}, seen):
        expected = model.predict_action(**{"unnorm_key": "tiny"} | changed)
        assert np.array_equal(stream.predict_action(**changed), expected[0])
        assert stream.forward_passes == 1
        replayed = stream.predict_action()
        assert stream.forward_passes == 0
        if not options:
            assert np.array_equal(replayed, expected[1])
            assert np.array_equal(stream.predict_action(**changed), expected[2])
    stream.predict_action(**seen)
    with pytest.raises(ValueError, match="predicts a new chunk"):
        stream.predict_action(unnorm_key="other")


@pytest.mark.parametrize("name", ["return_details", "stats", "draft_token_ids", "instruction"])
def test_a_stream_refuses_arguments_that_it_would_drop(model, name):
    stream, seen = model.action_stream(), next(observations())
    stream.predict_action(**seen)
    with pytest.raises(ValueError, match=f"does not take `{name}`: leave it out, or call the model's"):
        stream.predict_action(**seen, **{name: True})


def test_observations_of_replayed_steps_are_ignored(model):
    stream, images = model.action_stream(), observations()
    first = next(images)
    chunk = model.predict_action(**first)
    stream.predict_action(**first)
    assert np.array_equal(stream.predict_action(**next(images)), chunk[1])
    assert stream.forward_passes == 0


def test_a_reset_or_another_number_of_robots_starts_again(model):
    stream = model.action_stream()
    one, two = next(observations()), next(observations(2))
    stream.predict_action(**one)
    stream.reset()
    assert stream.needs_observation
    stream.predict_action(**one)
    assert np.array_equal(stream.predict_action(**two), model.predict_action(**two)[:, 0])
    assert stream.forward_passes == 1


@pytest.mark.parametrize("execute", [None, 2])
def test_temporal_ensembling_averages_the_chunks_with_exponential_weights(model, execute):
    stream, images = model.action_stream(execute=execute, ensemble=0.5), observations()
    chunks = {}
    for step in range(7):
        looks = step % (execute or 1) == 0
        assert stream.needs_observation == looks
        seen = next(images)
        if looks:
            chunks[step] = model.predict_action(**seen)
        action = stream.predict_action(**seen)
        current = [chunk[step - start] for start, chunk in chunks.items() if step - start < K]
        weights = np.exp(-0.5 * np.arange(len(current)))
        expected = sum(weight * one for weight, one in zip(weights, current, strict=True)) / weights.sum()
        np.testing.assert_allclose(action, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"execute": 0}, r"`execute` must be an integer from 1 to 4 \(the actions of a chunk\), got 0"),
        ({"execute": K + 1}, "got 5"),
        ({"execute": 2.0}, "got 2.0"),
        ({"ensemble": float("nan")}, "`ensemble` must be a finite number of at least 0, got nan"),
        ({"ensemble": float("inf")}, "got inf"),
        ({"ensemble": -1e9}, "got -1000000000.0"),
        ({"ensemble": True}, "got True"),
        ({"ensemble": "0.1"}, "got '0.1'"),
    ],
)
def test_options_that_do_not_fit_are_refused(model, given, message):
    with pytest.raises(ValueError, match=message):
        model.action_stream(**given)


def test_a_missing_observation_is_refused(model):
    stream = model.action_stream()
    with pytest.raises(ValueError, match="predicts a new chunk: pass the processor's output"):
        stream.predict_action()
    stream.predict_action(**next(observations()))
    stream.predict_action()
