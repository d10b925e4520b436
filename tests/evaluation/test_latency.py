import importlib.util
import io
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModel

from openvla_hf.cli import main
from openvla_hf.evaluation.checks.findings import Subject
from openvla_hf.evaluation.checks.preparation import check_agreement
from openvla_hf.evaluation.latency import latency_tables, measure_latency, peak_memory
from openvla_hf.evaluation.latency_floor import Floor, Work
from openvla_hf.evaluation.random_models import RANDOM_SIZES, chunk_model, random_model
from openvla_hf.modeling.checkpoint_files import CheckpointFiles
from openvla_hf.testing import BRIDGE_LIKE_STATS, tiny_config, tiny_processor, write_tiny_oft


STEPS = 7
WITH_STATE = {"tiny": {"action": BRIDGE_LIKE_STATS, "proprio": {"q01": [-0.5] * 8, "q99": [1.0] * 8}}}
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def numel(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("size", "billions"), [("7b", 6.48), ("0.5b", 0.51), ("tiny", 0.0006)])
def test_random_models_have_the_size_of_their_name(size, billions):
    """Only the language model's layers count. The two large models are built without memory."""
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


def test_the_processor_of_random_weights_fits_the_model():
    model, processor = random_model("tiny", num_images=2, proprio_dim=8)
    finding = check_agreement(Subject(model, processor, CheckpointFiles(None)))
    assert finding.status == "passed", finding.found


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
    reading = Floor(model, batch=4, prompt=280, bandwidth=4.0, matmul=math.inf).token_by_token(STEPS)
    assert reading["vision"] == vision
    assert reading["prefill"] == language + head
    assert reading["decode"] == (STEPS - 1) * (language + head)
    assert reading["accepted draft"] == vision + language + head
    computing = Floor(model, batch=4, prompt=280, bandwidth=math.inf, matmul=2.0).token_by_token(STEPS)
    assert computing["vision"] == 4 * 256 * vision
    assert computing["prefill"] == 4 * (280 * language + head)
    assert computing["accepted draft"] == 4 * (256 * vision + 286 * language + STEPS * head)
    assert computing["predict_action"] == computing["vision"] + computing["prefill"] + computing["decode"]
    assert Work(weight_bytes=10, operations=6).seconds(bandwidth=5.0, matmul=1.0) == 6.0


def test_the_floor_of_a_chunk_counts_all_slots_in_each_pass():
    chunked = chunk_model(random_model("tiny", num_images=2)[0], 8)
    language = numel(chunked.model.language_model) - chunked.get_input_embeddings().weight.numel()
    vision = numel(chunked.model.vision_backbone) + numel(chunked.model.projector)
    head = numel(chunked.action_head)
    reading = Floor(chunked, batch=4, prompt=540, bandwidth=4.0, matmul=math.inf).chunk(passes=1)
    assert reading == {"vision": vision, "chunk": language + head, "predict_action": vision + language + head}
    computing = Floor(chunked, batch=4, prompt=540, bandwidth=math.inf, matmul=2.0).chunk(passes=50)
    assert computing["vision"] == 4 * 512 * vision
    assert computing["chunk"] == 50 * 4 * ((540 + 8 * STEPS + 1) * language + 8 * head)


def test_the_floor_of_film_multiplies_its_weights_with_one_embedding():
    config = tiny_config(action_decoding="parallel", action_dim=STEPS, use_film=True)
    film, plain = (
        Floor(AutoModel.from_config(one), batch=1, prompt=1, bandwidth=math.inf, matmul=2.0).chunk(1)["vision"]
        for one in (config, tiny_config(action_decoding="parallel", action_dim=STEPS))
    )
    layers, towers, inputs, width = 2, 2, 64, 32
    assert film - plain == layers * towers * 2 * (inputs + 1) * width


@torch.no_grad()
def test_a_chunk_model_shares_all_weights_but_its_head():
    model, processor = random_model("tiny", num_images=2, proprio_dim=8)
    image = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    inputs = processor([image, image], instruction="open", state=[0.0] * 8)
    assert model.predict_action(**inputs).shape == (STEPS,)
    for head in ("l1", "none"):
        chunked = chunk_model(model, 4, head)
        own = {id(parameter) for parameter in chunked.parameters()} - {id(one) for one in model.parameters()}
        assert own == {id(one) for name, one in chunked.named_parameters() if name.startswith("action_head.")}
        assert bool(own) == (head == "l1")
        assert chunked.predict_action(**inputs).shape == (4, STEPS)
    assert not model.config.is_parallel


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is counted on Linux only")
def test_peak_memory_is_what_a_call_takes():
    cpu = torch.device("cpu")
    # Linux counts pages in batches for each processor, so the figure may be slightly too low.
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
        # The parts of an action add up to the whole.
        parts = batch.parts["vision"] + batch.parts["prefill"] + batch.parts["decode"]
        assert parts == pytest.approx(batch.timings["predict_action"]["median"])
    assert json.loads(json.dumps(asdict(compared)))["batches"][1]["prompt_tokens"] > 16
    console = Console(width=120, file=io.StringIO(), record=True)
    for table in latency_tables(compared):
        console.print(table)
    text = console.export_text()
    assert "accepted draft" in text
    assert "same tokens as generate" in text


def test_a_chunk_is_compared_with_one_action_at_a_time():
    config = tiny_config(num_images=2, proprio_dim=8, norm_stats=WITH_STATE)
    model = AutoModel.from_config(config).eval()
    chunks = {"chunk, L1": chunk_model(model, 8), "chunk, tokens": chunk_model(model, 8, "none")}
    measured = measure_latency(model, tiny_processor(config=config), batch_sizes=[2], repeats=1, chunk_models=chunks)
    (result,) = measured.batches
    rows = latency_tables(measured)[1].columns
    assert "0.125" in list(rows[5].cells)
    assert result.same_tokens
    assert list(result.timings) == ["generate", "predict_action", "accepted draft", *chunks]
    for name in chunks:
        timing = result.timings[name]
        assert (result.forward_passes[name], result.actions_per_call[name]) == (1, 8)
        assert result.passes_per_action[name] == 1 / 8
        assert timing["hz"] == pytest.approx(2 * 8 / timing["median"])
        assert timing["speedup"] == pytest.approx(timing["hz"] / result.timings["generate"]["hz"])
        assert result.floor[name] > result.floor["vision"]
    assert result.passes_per_action["predict_action"] == STEPS


@pytest.mark.parametrize(("kind", "passes"), [({"film": True}, 1), ({"head": "diffusion"}, 50)])
def test_the_command_measures_a_policy_that_predicts_chunks(kind, passes, capsys, tmp_path):
    folder = str(write_tiny_oft(tmp_path, **kind))
    assert main(["bench", "--model", folder, "--repeats", "1", "--json"]) == 0
    batch = json.loads(capsys.readouterr().out)["batches"][0]
    assert list(batch["timings"]) == ["predict_action"]
    assert (batch["forward_passes"], batch["actions_per_call"]) == ({"predict_action": passes}, {"predict_action": 8})
    assert batch["passes_per_action"] == {"predict_action": passes / 8}
    timing = batch["timings"]["predict_action"]
    assert timing["hz"] == pytest.approx(8 / timing["median"])
    assert "speedup" not in timing
    assert batch["same_tokens"] is None
    assert batch["parts"]["vision"] + batch["parts"]["chunk"] == pytest.approx(timing["median"])


def test_compiled_passes_of_a_policy_that_predicts_chunks_are_refused(capsys, tmp_path):
    write_tiny_oft(tmp_path)
    assert main(["bench", "--model", str(tmp_path), "--compile"]) == 2
    assert "Compiled passes are for decoding an action token by token" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--chunk", "--cameras", "--state-dim"])
def test_options_of_random_models_are_refused_for_a_checkpoint(option, tiny, capsys, tmp_path):
    tiny()[0].save_pretrained(tmp_path)
    assert main(["bench", "--model", str(tmp_path), option, "2"]) == 2
    assert f"{option} is for random weights: give --random." in capsys.readouterr().err


def test_a_platform_is_for_a_checkpoint_whose_files_do_not_determine_it(capsys, tmp_path):
    write_tiny_oft(tmp_path, head="none", proprio=False)
    command = ["bench", "--model", str(tmp_path), "--platform", "libero", "--repeats", "1", "--json"]
    assert main(command) == 2
    assert "pass --action-decoding parallel" in capsys.readouterr().err
    assert main([*command, "--action-decoding", "parallel"]) == 0
    assert json.loads(capsys.readouterr().out)["batches"][0]["actions_per_call"] == {"predict_action": 8}
    assert main(["bench", "--random", "tiny", "--platform", "libero"]) == 2
    assert "--platform is for a checkpoint: give --model." in capsys.readouterr().err


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
