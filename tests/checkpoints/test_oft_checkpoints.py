"""OpenVLA-OFT checkpoints: quantised, described, pushed, loaded without the package, and with merged adapters."""

import json
import shutil

import numpy as np
import pytest
import torch
from interpreters import WITHOUT_THE_PACKAGE
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoProcessor

from openvla_hf import load_adapter
from openvla_hf.checkpoints.describe import describe
from openvla_hf.checkpoints.merge import merge_adapter, merge_layers
from openvla_hf.checkpoints.push import push
from openvla_hf.checkpoints.quantize import quantization, quantize
from openvla_hf.cli import main
from openvla_hf.evaluation.fidelity import compare
from openvla_hf.testing import fake_episode, write_tiny_oft


KINDS = {
    "l1": {},
    "aloha": {"platform": "aloha"},
    "diffusion": {"head": "diffusion"},
    "film": {"film": True},
    "discrete": {"head": "none", "proprio": False},
}


def load(folder, kind="l1", **options):
    parallel = {"action_decoding": "parallel", "platform": "libero"} if kind == "discrete" else {}
    return AutoModel.from_pretrained(folder, **parallel, **options)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return a function that gives a published checkpoint of some kind. Tests must not change its folder."""
    root = tmp_path_factory.mktemp("published")

    def folder(kind):
        if not (root / kind).exists():
            write_tiny_oft(root / kind, **KINDS[kind])
        return root / kind

    return folder


def observe(folder):
    """The inputs of one observation."""
    processor = AutoProcessor.from_pretrained(folder)
    images = [frame["image"] for frame in fake_episode(steps=len(processor.cameras))]
    state = {} if processor.state_dim is None else {"state": np.linspace(-0.4, 0.4, processor.state_dim)}
    images = images if len(images) > 1 else images[0]
    return processor(images, instruction="pick up the red block", **state)


def predict(model, inputs):
    """Predict a chunk, from the same noise in every call."""
    noise = {}
    if model.config.action_head == "diffusion":
        shape = (model.config.action_horizon, model.config.action_dim)
        noise = {"initial_noise": torch.linspace(-1, 1, shape[0] * shape[1]).view(shape), "num_inference_steps": 5}
    return model.predict_action(**inputs, **noise)


REMOTE = (
    WITHOUT_THE_PACKAGE
    + """
import json, sys

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor

image, *folders = sys.argv[1:]
trusted = {"trust_remote_code": True}
for folder in folders:
    processor = AutoProcessor.from_pretrained(folder, **trusted)
    count = len(processor.cameras)
    state = {} if processor.state_dim is None else {"state": np.linspace(-0.4, 0.4, processor.state_dim)}
    images = [image] * count if count > 1 else image
    inputs = processor(images, instruction="pick up the red block", **state)
    model = AutoModel.from_pretrained(folder, **trusted)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    noise = {"num_inference_steps": 5} if model.config.action_head == "diffusion" else {}
    torch.manual_seed(0)
    print(json.dumps(model.predict_action(**inputs, **noise).tolist()))
"""
)


def test_without_the_package_a_saved_policy_gives_the_same_chunk(published, run_python, tmp_path):
    image, pixels = tmp_path / "image.png", fake_episode(steps=1)[0]["image"]
    Image.fromarray(pixels).save(image)
    folders, expected = [], []
    for kind in ("l1", "diffusion", "film", "discrete"):
        folders.append(tmp_path / kind)
        model = load(published(kind), kind)
        processor = AutoProcessor.from_pretrained(published(kind))
        model.save_pretrained(folders[-1], max_shard_size="200KB")
        processor.save_pretrained(folders[-1])
        count = len(processor.cameras)
        state = {} if processor.state_dim is None else {"state": np.linspace(-0.4, 0.4, processor.state_dim)}
        inputs = processor([pixels] * count if count > 1 else pixels, instruction="pick up the red block", **state)
        noise = {"num_inference_steps": 5} if kind == "diffusion" else {}
        torch.manual_seed(0)
        chunk = model.predict_action(**inputs, **noise)
        assert chunk.shape == (model.config.action_horizon, model.config.action_dim)
        expected.append(chunk.tolist())
    result = run_python(REMOTE, image, *folders)
    # Some CPUs round differently where another process places its matrices.
    for chunk, right in zip(result.stdout.splitlines(), expected, strict=True):
        np.testing.assert_allclose(json.loads(chunk), right, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "kind"), [("4bit", "l1"), ("4bit", "diffusion"), ("8bit", "film"), ("8bit", "discrete")]
)
def test_quantised_policies_keep_their_heads_in_16_bits(published, kind, bits):
    pytest.importorskip("bitsandbytes")
    inputs = observe(published(kind))
    model = load(published(kind), kind, quantization_config=quantization(bits), dtype=torch.bfloat16)
    for name in ("action_head", "model.proprio_projector", "model.noisy_action_projector"):
        if name in dict(model.named_modules()):
            layers = [layer for layer in model.get_submodule(name).modules() if isinstance(layer, nn.Linear)]
            assert {type(layer).__module__.split(".")[0] for layer in layers} <= {
                "torch",
                model.__module__.split(".")[0],
            }
            assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    text = {type(layer).__name__ for layer in model.model.language_model.modules() if isinstance(layer, nn.Linear)}
    assert text == {{"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[bits]}
    assert np.isfinite(predict(model, inputs)).all()


@pytest.mark.parametrize(("bits", "kind"), [("8bit", "l1"), ("4bit", "film"), ("4bit", "discrete")])
def test_a_saved_policy_is_quantised_on_disk(published, kind, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    here = load(published(kind), kind, dtype=torch.float32)
    here.save_pretrained(tmp_path / "saved")
    processor = AutoProcessor.from_pretrained(published(kind))
    processor.save_pretrained(tmp_path / "saved")
    quantize(tmp_path / "saved", tmp_path / "small", bits, dtype=torch.float32)
    small = AutoModel.from_pretrained(tmp_path / "small")
    inputs = observe(tmp_path / "small")
    assert np.isfinite(predict(small, inputs)).all()
    if here.action_head is not None:
        assert torch.equal(small.action_head.fc1.weight, here.action_head.fc1.weight)
        assert np.abs(predict(small, inputs) - predict(here, inputs)).max() < 0.2


def test_a_report_on_a_policy_that_predicts_chunks_is_refused(published, tmp_path):
    load(published("l1")).save_pretrained(tmp_path)
    for folder in (published("l1"), tmp_path):
        with pytest.raises(
            ValueError, match=r"A report compares the tokens of one action .* predicts chunks of actions"
        ):
            compare(folder, ["8bit"], fake_episode(steps=1))


def test_a_checkpoint_is_described_without_reading_its_components(published, capsys):
    l1, aloha, diffusion, film, discrete = (describe(published(kind)).oft for kind in KINDS)
    fields = {"num_images": 2, "action_horizon": 8, "action_dim": 7, "proprio_dim": 8, "action_normalization": "q99"}
    head = {"action_decoding": "parallel", "action_head": "l1", "use_film": False, "platform": "libero"}
    assert l1 == fields | head
    assert (aloha["platform"], aloha["num_images"], aloha["action_normalization"]) == ("aloha", 3, "bounds")
    assert (diffusion["action_head"], film["use_film"], discrete) == ("diffusion", True, None)
    assert describe(published("l1")).layout == "openvla-oft"
    assert main(["info", str(published("aloha"))]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for row in (
        "decoding │ parallel",
        "images │ 3",
        "chunk │ 25 actions",
        "action head │ l1",
        "state │ 14 dimensions",
    ):
        assert row in told.replace("|", "│"), told
    assert "aloha (from the statistics)" in told


def test_an_unknown_platform_is_reported(published, tmp_path, capsys):
    folder = shutil.copytree(published("l1"), tmp_path / "oft")
    (folder / "dataset_statistics.json").unlink()
    assert describe(folder).oft["platform"] is None
    assert main(["info", str(folder)]) == 0
    assert "unknown: pass `platform=` or `action_horizon=`" in " ".join(capsys.readouterr().out.split())


def test_a_pushed_policy_has_a_card_that_describes_cameras_chunk_and_state(published, owner, tmp_path):
    folder = published("aloha")
    with pytest.raises(ValueError, match="has weights in pickled files, which are not pushed"):
        push(folder, "someone/policy")
    model = load(folder)
    push(model, "someone/policy", processor=AutoProcessor.from_pretrained(folder))
    files = {path.name for path in (owner.root / "someone/policy").iterdir()}
    assert {"oft_loading.py", "action_heads.py", "parallel_decoding.py", "film.py"} <= files
    card = (owner.root / "someone/policy/README.md").read_text()
    for text in (
        "it takes 3 camera images, the robot's state and an instruction, and predicts the next 25 actions of a robot",
        "processor([full_image, left_wrist_image, right_wrist_image], instruction=",
        "state=state",
        "`actions` is a float64 array (25, dimensions)",
        "from (minimum) | to (maximum)",
        "| decoding | parallel, l1 head |",
    ):
        assert text in card, card
    again = AutoModel.from_pretrained("someone/policy")
    inputs = observe(folder)
    # Some CPUs round differently where the weights lie elsewhere in memory.
    np.testing.assert_allclose(predict(again, inputs), predict(model, inputs), rtol=0, atol=1e-5)
    assert describe("someone/policy").oft["action_horizon"] == 25


def test_damaged_statistics_of_the_state_are_refused(published, tmp_path):
    folder = shutil.copytree(published("aloha"), tmp_path / "oft")
    path = folder / "dataset_statistics.json"
    statistics = json.loads(path.read_text())

    def change(kind, **columns):
        of_dataset = statistics["tiny"]
        changed = {name: one for name, one in (of_dataset[kind] | columns).items() if one is not None}
        path.write_text(json.dumps({"tiny": of_dataset | {kind: changed}}))

    for kind in ("action", "proprio"):
        change(kind, min=None)
        with pytest.raises(
            ValueError, match=f"'{kind}' of 'tiny': 'min' is missing, which the normalisation 'bounds'"
        ):
            load(folder)
    change("proprio", q99=[0.0] * 13)
    with pytest.raises(ValueError, match=r"'proprio' of 'tiny': .* has 1[34] values, but 'q01' has 14"):
        load(folder)


# Adapters


@pytest.fixture
def adapted(published, tmp_path):
    """A published checkpoint with its adapter, in the folder of the original, and the adapter elsewhere."""
    folder = shutil.copytree(published("l1"), tmp_path / "oft")
    model = load(folder)
    before = model.lm_head.weight.detach().clone()
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    # Older versions of peft also store the whole weight of the head.
    stored = load_file(weights) | {"base_model.model.lm_head.base_layer.weight": before}
    save_file(stored, weights, metadata={"format": "pt"})
    merge_layers(model)
    assert not torch.equal(model.lm_head.weight, before)
    merged = load_file(folder / "model.safetensors") | {"lm_head.weight": model.lm_head.weight.detach()}
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(tmp_path / "adapter", folder / "lora_adapter")
    return folder


TWICE = "already contain the adapter in its folder 'lora_adapter', and loading it would apply it twice"


def test_the_adapter_beside_merged_weights_is_not_loaded(adapted, published, tmp_path):
    inside = adapted / "lora_adapter"
    config = json.loads((inside / "adapter_config.json").read_text())
    (inside / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(adapted)}))
    for apply in (
        lambda: load_adapter(load(adapted), inside),
        lambda: load_adapter(load(adapted), adapted, subfolder="lora_adapter"),
        lambda: AutoModel.from_pretrained(inside),
        lambda: merge_adapter(inside, tmp_path / "merged", base=adapted),
    ):
        with pytest.raises(ValueError, match=TWICE):
            apply()
    assert not (tmp_path / "merged").exists()


def test_the_adapter_beside_merged_weights_on_the_hub_is_not_loaded(adapted, owner):
    shutil.copytree(adapted, owner.root / "someone/oft")
    model = AutoModel.from_pretrained("someone/oft")
    with pytest.raises(ValueError, match=f"The weights of someone/oft {TWICE}"):
        load_adapter(model, "someone/oft", subfolder="lora_adapter")


def test_merged_weights_are_recognised_wherever_the_adapter_is(adapted, published, tmp_path):
    with pytest.raises(
        ValueError, match=r"The weights of this model already contain the adapter in .* .see 'lm_head'"
    ):
        load_adapter(load(adapted), tmp_path / "adapter")
    unmerged = load_adapter(load(published("l1")), tmp_path / "adapter")
    merge_layers(unmerged)
    assert torch.equal(unmerged.lm_head.weight, load(adapted).lm_head.weight)
