import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from openvla_hf import load_adapter
from openvla_hf.checkpoints.describe import describe
from openvla_hf.checkpoints.merge import merge_adapter, merge_layers
from openvla_hf.checkpoints.quantize import quantization
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import fake_episode, tiny_config, tiny_processor, tiny_tokenizer
from openvla_hf.training.recipes import recipe


LOGITS = 1e-4  # as tests/parity
MERGED_LOGITS = 3e-4  # effect of another order of float32 sums in merging


@pytest.fixture
def published(recordings):
    """The adapter that the original code wrote, and its recordings."""
    return recordings("lora")


def check_recorded(model, processor, recorded, folder, kind, tolerance):
    """Compare the logits of every recorded step, and every action."""
    expected = load_file(folder / "expected.safetensors")
    cases = json.loads((folder / "cases.json").read_text())
    base = recorded("fused-224")
    for index, case in enumerate(cases["predictions"]):
        inputs = processor(cases["prompts"][case["prompt"]], base.images[case["image"]])
        details = model.predict_action(**inputs, unnorm_key=case["unnorm_key"], constrained=False, return_details=True)
        name = f"{kind}.predict.{index}"
        ids = expected[f"{name}.generated_ids"][-details.token_ids.shape[1] :]
        assert details.token_ids[0].tolist() == ids.tolist()
        torch.testing.assert_close(
            torch.from_numpy(details.actions[0]), expected[f"{name}.actions"].double(), rtol=0, atol=1e-9
        )
    for index in cases["forward_full"]:
        case = cases["predictions"][index]
        inputs = processor(cases["prompts"][case["prompt"]], base.images[case["image"]])
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1, base.columns]
        error = (logits - expected[f"{kind}.forward.{index}.logits_last"]).abs().max().item()
        assert error < tolerance, (index, error)


def test_a_published_adapter_gives_the_recorded_logits_and_actions(recorded, published):
    base = recorded("fused-224")
    model = load_adapter(base.load(), published / "adapter")
    check_recorded(model, base.processor, recorded, published, "unmerged", LOGITS)


def test_a_published_adapter_merges_to_the_recorded_model(recorded, published, tmp_path):
    base = recorded("fused-224")
    merge_adapter(published / "adapter", tmp_path / "merged", base=base.checkpoint, dtype="float32", **base.overrides)
    model = AutoModel.from_pretrained(tmp_path / "merged")
    assert not hasattr(model, "peft_config")
    check_recorded(
        model, AutoProcessor.from_pretrained(tmp_path / "merged"), recorded, published, "merged", MERGED_LOGITS
    )


def test_from_pretrained_on_a_published_adapter_finds_its_base(recorded, published, tmp_path):
    shutil.copytree(published / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(recorded("fused-224").checkpoint)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    base = recorded("fused-224")
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path / "adapter", dtype=torch.float32, **base.overrides)
    check_recorded(model, base.processor, recorded, published, "unmerged", LOGITS)


def rewrite(published, folder, change):
    folder.mkdir()
    shutil.copy(published / "adapter" / "adapter_config.json", folder)
    weights = load_file(published / "adapter" / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def test_a_weight_that_matches_no_layer_is_an_error(recorded, published, tmp_path):
    def add(weights):
        weights["base_model.model.language_model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(8, 128)

    with pytest.raises(ValueError, match=r"matches no layer.*layers\.9\.mlp\.up_proj"):
        load_adapter(recorded("fused-224").load(), rewrite(published, tmp_path / "adapter", add))


def test_half_an_adapter_is_an_error(recorded, published, tmp_path):
    def drop(weights):
        del weights["base_model.model.projector.fc1.lora_B.weight"]

    with pytest.raises(ValueError, match="does not fit this model"):
        load_adapter(recorded("fused-224").load(), rewrite(published, tmp_path / "adapter", drop))


@pytest.mark.parametrize(
    "layer",
    [
        "projector.fc1",
        "language_model.lm_head",
        "language_model.model.layers.1.mlp.up_proj",
        "vision_backbone.featurizer.blocks.0.attn.qkv",
        "vision_backbone.fused_featurizer.patch_embed.proj",
    ],
)
def test_a_published_adapter_without_a_layer_is_an_error(recorded, published, tmp_path, layer):
    def drop(weights):
        for side in ("lora_A", "lora_B"):
            del weights[f"base_model.model.{layer}.{side}.weight"]

    with pytest.raises(ValueError, match=r"does not fit this model: [26] weights of layers .* are missing"):
        load_adapter(recorded("fused-224").load(), rewrite(published, tmp_path / "adapter", drop))


@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 128)])
def test_a_head_of_another_shape_is_an_error(recorded, published, tmp_path, shape):
    def shrink(weights):
        weights["base_model.model.language_model.lm_head.base_layer.weight"] = torch.ones(shape)

    model = recorded("fused-224").load()
    before = model.lm_head.weight.clone()
    with pytest.raises(ValueError, match=r"lm_head\.base_layer\.weight' has the shape \(.*\) instead of"):
        load_adapter(model, rewrite(published, tmp_path / "adapter", shrink))
    assert torch.equal(model.lm_head.weight, before)


def changed(folder, weights=None, **fields):
    """Put other weights into an adapter, and other values into its config."""
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), **(weights or {})}, file)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.fixture(scope="module")
def make_adapter(tmp_path_factory):
    """Saves a base and an adapter of ours whose B is not zero, once for each recipe: folder, inputs and logits."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        tokenizer = tiny_tokenizer()
        config = tiny_config(tokenizer)
        torch.manual_seed(0)
        model = OpenVLAForActionPrediction(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        model.save_pretrained(folder / "base")
        processor = tiny_processor(tokenizer, config)
        processor.save_pretrained(folder / "base")
        base = OpenVLAForActionPrediction.from_pretrained(folder / "base")
        model = recipe(name, dtype="float32", lora_rank=4).prepare(base).eval()
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        processor.save_pretrained(folder / "adapter")
        stats = {"mine": base.norm_stats["tiny"]}
        (folder / "adapter" / "dataset_statistics.json").write_text(json.dumps(stats))
        frame = fake_episode(steps=1)[0]
        inputs = processor(frame["image"], instruction=frame["instruction"])
        with torch.no_grad():
            return folder, inputs, model(**inputs).logits

    return make


@pytest.fixture
def trained(make_adapter, tmp_path):
    """A test's own copy of a base, in `base`, and of its adapter; inputs with the resulting logits."""

    def copy(name="lora"):
        folder, inputs, logits = make_adapter(name)
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        changed(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
        return tmp_path / "adapter", inputs, logits

    return copy


@pytest.mark.parametrize("name", ["lora", "lora-paper"])
@pytest.mark.parametrize("loader", [AutoModel, OpenVLAForActionPrediction])
def test_an_adapter_repository_is_a_policy_ready_to_act(trained, loader, name):
    folder, inputs, expected = trained(name)
    model = loader.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    frame = fake_episode(steps=1)[0]
    inputs = processor(frame["image"], instruction=frame["instruction"])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)
    assert list(model.norm_stats) == ["mine"]
    assert model.predict_action(**inputs).shape == (7,)


def test_an_adapter_without_its_base_says_so(trained, tmp_path):
    folder, _, _ = trained()
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(OSError, match=r"load the base yourself.*load_adapter"):
        OpenVLAForActionPrediction.from_pretrained(folder)


def test_merging_keeps_the_logits_and_a_fault_writes_nothing(trained, tmp_path, monkeypatch):
    folder, inputs, expected = trained("lora-paper")
    assert merge_adapter(folder, tmp_path / "merged", max_shard_size="200KB") < 1e-5
    merged = AutoModel.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=0, atol=1e-5)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1

    def forget_one(model):
        merge_layers(model)
        model.model.projector.fc1.weight.data.mul_(1.1)

    monkeypatch.setattr("openvla_hf.checkpoints.merge.merge_layers", forget_one)
    with pytest.raises(ValueError, match="nothing was written"):
        merge_adapter(folder, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_damaged_processor_of_an_adapter_is_not_replaced_by_the_base_s(trained, tmp_path):
    folder, _, _ = trained()
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.center_crop_area = 0.9
    processor.save_pretrained(folder)
    merge_adapter(folder, tmp_path / "cropped")
    assert AutoProcessor.from_pretrained(tmp_path / "cropped").image_processor.center_crop_area == 0.9
    config = folder / "processor_config.json"
    config.write_text(config.read_text()[:-20])
    with pytest.raises((OSError, ValueError), match=r"processor_config\.json"):
        merge_adapter(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_leaves_other_folders_alone_and_no_trace_of_itself(trained, tmp_path):
    folder, _, _ = trained()
    (tmp_path / "merged_unfinished").mkdir()
    (tmp_path / "merged_unfinished" / "notes.txt").write_text("mine")
    before = sorted(path.name for path in tmp_path.iterdir())
    merge_adapter(folder, tmp_path / "merged")
    assert (tmp_path / "merged_unfinished" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "merged"])
    assert (tmp_path / "merged").stat().st_mode == (tmp_path / "merged_unfinished").stat().st_mode


def test_the_second_of_two_merges_into_one_folder_is_refused(trained, tmp_path, monkeypatch):
    folder, _, _ = trained()
    model_of_first = []

    def merge_the_other_meanwhile(model):
        monkeypatch.undo()
        merge_adapter(folder, tmp_path / "merged")
        model_of_first.append((tmp_path / "merged" / "model.safetensors").stat().st_ino)
        merge_layers(model)

    monkeypatch.setattr("openvla_hf.checkpoints.merge.merge_layers", merge_the_other_meanwhile)
    with pytest.raises(OSError, match=r"merged is not empty"):
        merge_adapter(folder, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").stat().st_ino == model_of_first[0]
    assert not list(tmp_path.glob(".merged*"))


@pytest.mark.parametrize("kind", ["file", "full"])
def test_merging_into_something_that_exists_is_refused(trained, tmp_path, kind):
    folder, _, _ = trained()
    output = tmp_path / "notes.txt" if kind == "file" else tmp_path / "base"
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match=r"is not (empty|a folder)"):
        merge_adapter(folder, output)


def test_a_base_in_few_bits_is_refused(trained, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder, _, _ = trained()
    small = OpenVLAForActionPrediction.from_pretrained(
        tmp_path / "base", dtype=torch.bfloat16, quantization_config=quantization("4bit")
    )
    small.save_pretrained(tmp_path / "small")
    tiny_processor().save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"is quantised.*`base=`"):
        merge_adapter(folder, tmp_path / "merged", base=tmp_path / "small")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["lora", "lora-paper"])
def test_an_adapter_without_a_layer_is_an_error(trained, name):
    folder, _, _ = trained(name)
    weights = load_file(folder / "adapter_model.safetensors")
    layers = sorted({key.partition(".lora_")[0] for key in weights})
    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
        kept = {key: weight for key, weight in weights.items() if not key.startswith(f"{layer}.lora_")}
        save_file(kept, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=r"does not fit this model: 2 weights of layers .* are missing"):
            OpenVLAForActionPrediction.from_pretrained(folder)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (4, 3)])
@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_adapter_weights_of_another_shape_are_an_error(trained, shape, side):
    folder, _, _ = trained()
    weights = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in sorted(weights) if f"projector.fc1.{side}" in key)
    save_file(weights | {key: torch.ones(shape)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not fit this model"):
        OpenVLAForActionPrediction.from_pretrained(folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "dataset_statistics.json"])
def test_a_file_of_an_adapter_that_was_cut_short_is_named(trained, name):
    folder, _, _ = trained()
    content = (folder / name).read_bytes()
    for length in (0, 20, len(content) // 2):
        (folder / name).write_bytes(content[:length])
        with pytest.raises((OSError, ValueError), match=rf"{name}.* (is corrupt|is damaged) or was cut short"):
            OpenVLAForActionPrediction.from_pretrained(folder)


def test_a_whole_weight_of_a_layer_that_is_not_adapted_is_refused(trained, tmp_path):
    folder, _, _ = trained()
    base = OpenVLAForActionPrediction.from_pretrained(tmp_path / "base")
    before = base.model.language_model.norm.weight.clone()
    key = "base_model.model.model.language_model.norm.base_layer.weight"
    with pytest.raises(ValueError, match="a layer without an adapter"):
        base.load_adapter(str(changed(folder, {key: torch.zeros_like(before)})))
    assert torch.equal(base.model.language_model.norm.weight, before)


def test_integer_adapter_weights_are_refused(trained):
    folder, _, _ = trained()
    integers = {key: weight.int() for key, weight in load_file(folder / "adapter_model.safetensors").items()}
    with pytest.raises(ValueError, match=r"in torch\.int32, but adapter weights must be floating-point numbers"):
        OpenVLAForActionPrediction.from_pretrained(changed(folder, integers))


@pytest.mark.parametrize(
    "key", ["model.projector.fc1.lora_magnitude_vector", "model.projector.fc1.bias", "lm_head.weight"]
)
def test_a_weight_of_another_kind_of_adapter_is_named_as_such(trained, key):
    folder, _, _ = trained()
    with pytest.raises(ValueError, match=f"contains 'base_model.model.{key}', which is not a LoRA weight"):
        OpenVLAForActionPrediction.from_pretrained(changed(folder, {f"base_model.model.{key}": torch.ones(3)}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_rslora", "no"),
        ("peft_type", "QUUX"),
        ("target_modules", "(("),
        ("target_modules", 5),
        ("rank_pattern", [1]),
        ("lora_alpha", None),
        ("r", 0),
    ],
)
def test_a_field_of_another_kind_in_an_adapter_config_is_named(trained, name, value):
    folder, _, _ = trained()
    with pytest.raises(
        ValueError, match=rf"adapter_config\.json has {name}=.*, which must be .*\. Correct the file\."
    ):
        OpenVLAForActionPrediction.from_pretrained(changed(folder, **{name: value}))


@pytest.mark.parametrize("base", [None, 5])
def test_an_adapter_that_names_no_base_says_so(trained, base):
    folder, _, _ = trained()
    assert describe(changed(folder, base_model_name_or_path=base)).base_model is None
    with pytest.raises(OSError, match=r"does not name its base: load the base yourself.*load_adapter"):
        OpenVLAForActionPrediction.from_pretrained(folder)
