import importlib.util
import io
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console

from openvla_hf.cli import main
from openvla_hf.evaluation.latency import (
    Work,
    floor,
    latency_tables,
    measure_latency,
    peak_memory,
)
from openvla_hf.evaluation.random_models import RANDOM_SIZES, random_model


STEPS = 7
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def numel(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("size", "billions"), [("7b", 6.48), ("0.5b", 0.51), ("tiny", 0.0006)])
def test_random_models_have_the_size_of_their_name(size, billions):
    """Layers of the language model; the first two without taking memory."""
    model, _ = random_model(size, torch.bfloat16, "cpu" if size == "tiny" else "meta")
    assert numel(model.model.language_model.layers) / 1e9 == pytest.approx(billions, rel=0.05)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_random_model_can_be_shallower_and_its_size_stays_as_it_is():
    shallow, _ = random_model("7b", device="meta", text_config={"num_hidden_layers": 2})
    assert len(shallow.model.language_model.layers) == 2
    full, _ = random_model("7b", device="meta")
    assert len(full.model.language_model.layers) == 32


def test_an_unknown_size():
    with pytest.raises(
        ValueError, match=r"Unknown size '70b'\. Did you mean '7b'\? Choose from '7b', '0\.5b', 'tiny'"
    ):
        random_model("70b")


@torch.no_grad()
def test_random_weights_compute(tiny):
    model, processor = random_model("tiny")
    inputs = processor(torch.zeros(3, 64, 64, dtype=torch.uint8).numpy(), instruction="open")
    details = model.predict_action(**inputs, return_details=True)
    assert details.token_ids.shape == (1, STEPS)
    assert details.entropy.min() > 0
    assert inputs["pixel_values"].shape[-1] == 224
    other = model.predict_action(**inputs | {"pixel_values": inputs["pixel_values"] + 1}, return_details=True)
    assert abs(other.probabilities - details.probabilities).max() > 0


def test_the_floor_counts_weights_and_operations():
    model, _ = random_model("tiny")
    head = 256 * model.config.text_config.hidden_size
    language = numel(model.model.language_model) - model.get_input_embeddings().weight.numel()
    vision = numel(model.model.vision_backbone) + numel(model.model.projector)
    reading = floor(model, batch=4, prompt=280, steps=STEPS, bandwidth=4.0, matmul=math.inf)
    assert reading["vision"] == vision
    assert reading["prefill"] == language + head
    assert reading["decode"] == (STEPS - 1) * (language + head)
    assert reading["accepted draft"] == vision + language + head
    computing = floor(model, batch=4, prompt=280, steps=STEPS, bandwidth=math.inf, matmul=2.0)
    assert computing["vision"] == 4 * 256 * vision
    assert computing["prefill"] == 4 * (280 * language + head)
    assert computing["accepted draft"] == 4 * (256 * vision + 286 * language + STEPS * head)
    assert computing["predict_action"] == computing["vision"] + computing["prefill"] + computing["decode"]
    assert Work(weight_bytes=10, operations=6).seconds(bandwidth=5.0, matmul=1.0) == 6.0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is counted on Linux only")
def test_peak_memory_is_what_a_call_takes():
    cpu = torch.device("cpu")
    # The kernel counts pages in batches for each processor, so a little is missing at times.
    assert 60 << 20 <= peak_memory(lambda: torch.ones(64 << 20, dtype=torch.uint8), cpu) <= 96 << 20


def test_what_is_measured(tiny):
    model, processor = tiny()
    compared = measure_latency(model, processor, batch_sizes=[1, 2], repeats=2)
    assert [batch.batch_size for batch in compared.batches] == [1, 2]
    assert compared.bandwidth > 0
    assert compared.matmul > 0
    for batch in compared.batches:
        assert batch.same_tokens
        assert batch.forward_passes == {"predict_action": STEPS, "accepted draft": 1}
        assert set(batch.timings) == {"generate", "predict_action", "accepted draft"}
        for timing in batch.timings.values():
            assert timing["p95"] >= timing["median"] > 0
            assert timing["hz"] == pytest.approx(batch.batch_size / timing["median"])
        # The parts of an action are the whole of it.
        parts = batch.parts["vision"] + batch.parts["prefill"] + batch.parts["decode"]
        assert parts == pytest.approx(batch.timings["predict_action"]["median"])
    assert json.loads(json.dumps(asdict(compared)))["batches"][1]["prompt_tokens"] > 16
    console = Console(width=120, file=io.StringIO(), record=True)
    for table in latency_tables(compared):
        console.print(table)
    text = console.export_text()
    assert "accepted draft" in text
    assert "same tokens as generate" in text


def test_the_command_prints_json(tiny, capsys, tmp_path):
    model, processor = tiny()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert main(["bench", "--model", str(tmp_path), "--repeats", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["batches"][0]["same_tokens"]
    assert result["parameters"] == numel(model)
    assert set(RANDOM_SIZES) == {"7b", "0.5b", "tiny"}
    with pytest.raises(SystemExit):
        main(["bench", "--model", str(tmp_path), "--random", "tiny"])


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmarks are not installed")
def test_drafts_on_rollouts(tiny, capsys, tmp_path):
    pytest.importorskip("gymnasium")
    spec = importlib.util.spec_from_file_location("drafts", BENCHMARKS / "drafts.py")
    drafts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drafts)
    model, processor = tiny()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert drafts.main(["--model", str(tmp_path), "--observations", "6", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["observations_with_other_tokens_than_generate"] == 0
    assert sum(result["passes"].values()) == 6
    assert 1 <= result["mean_passes"] <= result["passes_without_draft"] == STEPS
