"""`convert` turns a training run of Prismatic into an ordinary checkpoint, and reports what is wrong with a run."""

import json
import shutil

import numpy as np
import pytest
import torch
from prismatic_runs import FUSED, SINGLE, as_trained, write_run
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from openvla_hf import OpenVLAForActionPrediction
from openvla_hf.checkpoints import convert as module
from openvla_hf.checkpoints import policy_writing
from openvla_hf.checkpoints.convert import BASE_MODELS, convert
from openvla_hf.checkpoints.describe import describe
from openvla_hf.checkpoints.published_weights import published_state_dict
from openvla_hf.cli import main
from openvla_hf.modeling.configuration_openvla import PUBLISHED_VISION_BACKBONES, OpenVLAConfig
from openvla_hf.processing.processing_openvla import VICUNA_PROMPT
from openvla_hf.testing import fake_episode


@pytest.fixture
def policy(tiny):
    return tiny()


@pytest.fixture
def parts(policy):
    return as_trained(published_state_dict(policy[0]))


@pytest.fixture
def run(policy, parts, tmp_path):
    """A training run of a tiny model, and its tokenizer in `tokenizer`."""
    policy[1].tokenizer.save_pretrained(tmp_path / "tokenizer")
    return write_run(tmp_path / "run", parts, policy[0].norm_stats)


@pytest.fixture
def sizes(policy):
    """The fields in which the tiny model's config differs from the base model's."""
    config = policy[0].config.to_dict()
    names = ("image_token_index", "prompt_suffix_token_id", "pad_token_id")
    return {name: config[name] for name in (*names, "vision_config", "fused_vision_config", "text_config")}


@pytest.fixture
def converted(run, sizes, tmp_path):
    """Return a function that converts the run: `converted(checkpoint=...)`."""

    def call(source=run, **options):
        shutil.rmtree(tmp_path / "converted", ignore_errors=True)
        options = {"tokenizer": tmp_path / "tokenizer", "dtype": "float32"} | sizes | options
        return convert(source, tmp_path / "converted", **options)

    return call


def weights_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


# What is written


@pytest.mark.parametrize(("case", "base"), [("fused-224", FUSED), ("siglip-224", SINGLE)])
def test_a_run_with_the_recorded_weights_becomes_the_recorded_checkpoint(recorded, case, base, tmp_path):
    """Weights, config and processor are those of the published checkpoint, bit for bit."""
    record = recorded(case)
    published = load_file(record.checkpoint / "model.safetensors")
    statistics = json.loads((record.checkpoint / "dataset_statistics.json").read_text())
    run = write_run(tmp_path / "run", as_trained(published), statistics, base)
    text_config = json.loads((record.checkpoint / "config.json").read_text())["text_config"]
    folder = convert(run, tmp_path / "out", tokenizer=record.checkpoint, text_config=text_config, **record.overrides)
    model, expected = AutoModel.from_pretrained(folder), record.load(dtype="auto")
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        name: tensor.dtype for name, tensor in expected.state_dict().items()
    }
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    fields = [one.config.to_dict() | {"_name_or_path": None} for one in (model, expected)]
    assert fields[0] == fields[1]
    processor = AutoProcessor.from_pretrained(folder)
    prediction = record.cases["predictions"][0]
    prompt, image = record.cases["prompts"][prediction["prompt"]], record.images[prediction["image"]]
    for name, tensor in record.inputs(prediction).items():
        assert torch.equal(processor(prompt, image)[name], tensor), name
    assert processor.prompt_template == record.processor.prompt_template
    assert processor.image_processor.image_mean == record.processor.image_processor.image_mean


def test_a_converted_run_acts_like_the_model_that_was_trained(policy, converted):
    model, processor = policy
    folder = converted()
    frame = fake_episode(steps=1)[0]
    inputs = processor(frame["image"], instruction=frame["instruction"])
    action = model.predict_action(**inputs)
    again = AutoProcessor.from_pretrained(folder)(frame["image"], instruction=frame["instruction"])
    assert np.array_equal(AutoModel.from_pretrained(folder).predict_action(**again), action)
    info = describe(folder)
    assert (info.layout, info.dtype, info.has_code, info.action_dims) == ("openvla-hf", "float32", True, {"tiny": 7})


def test_shards_hold_the_same_weights(converted, monkeypatch):
    whole = weights_of(converted())
    monkeypatch.setattr(policy_writing, "SHARD_BYTES", 50_000)
    progress = []
    folder = converted(on_progress=lambda done, total: progress.append((done, total)))
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert progress == [(index, len(shards)) for index in range(1, len(shards) + 1)]
    weights = weights_of(folder)
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole.items())
    assert not any(OpenVLAForActionPrediction.from_pretrained(folder, output_loading_info=True)[1].values())


def test_weights_are_rounded_once_to_the_wanted_type(policy, converted):
    exact = policy[0].lm_head.weight
    for dtype in ("bfloat16", "float16", "float32"):
        weights = weights_of(converted(dtype=dtype))
        assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, dtype)}
        assert torch.equal(weights["lm_head.weight"], exact.to(getattr(torch, dtype)))


def test_every_base_model_has_towers_and_a_prompt():
    for base in BASE_MODELS.values():
        assert base.vision_backbone_id in PUBLISHED_VISION_BACKBONES
        assert base.llm_backbone_id in module.TOKENIZERS
        assert OpenVLAConfig(vision_backbone_id=base.vision_backbone_id).vision_configs
    vicuna = module.read_published_fields({"llm_backbone_id": BASE_MODELS[SINGLE].llm_backbone_id})
    assert vicuna["prompt_template"] == VICUNA_PROMPT


def test_a_tokenizer_without_padding_gets_the_originals_token(policy, converted, tmp_path):
    path = tmp_path / "tokenizer/tokenizer_config.json"
    fields = json.loads(path.read_text())
    del fields["pad_token"]
    path.write_text(json.dumps(fields))
    assert AutoProcessor.from_pretrained(converted()).tokenizer.pad_token_id == policy[0].config.pad_token_id


# Which checkpoint


def test_the_last_step_is_converted_unless_another_is_named(run, converted, parts):
    early, late = "step-000009-epoch-00-loss=0.2.pt", "step-000100-epoch-01-loss=0.3.pt"
    for name, factor in ((early, 2), (late, 3), ("latest-checkpoint.pt", 4)):
        scaled = parts | {"projector": {key: factor * tensor for key, tensor in parts["projector"].items()}}
        torch.save({"model": scaled}, run / "checkpoints" / name)
    bias = parts["projector"]["projector.0.bias"]

    def factor(folder):
        return (weights_of(folder)["model.projector.fc1.bias"] / bias).mean().item()

    assert factor(converted()) == pytest.approx(3)
    assert factor(converted(checkpoint=early)) == pytest.approx(2)
    assert factor(converted(source=run / "checkpoints" / early)) == pytest.approx(2)
    with pytest.raises(ValueError, match=r"Unknown checkpoint 'step-1\.pt'\. Choose from 'latest"):
        converted(checkpoint="step-1.pt")
    with pytest.raises(ValueError, match="is a file: give the folder of the run"):
        converted(source=run / "checkpoints" / early, checkpoint=late)


def test_a_single_file_may_have_any_name_but_several_may_not(run, converted):
    (only,) = (run / "checkpoints").iterdir()
    only = only.rename(only.with_name("best.pt"))
    converted()
    shutil.copy(only, only.with_name("other.pt"))
    with pytest.raises(ValueError, match=r"None of the checkpoints 'best\.pt', 'other\.pt' has a step in its name"):
        converted()
    shutil.copy(only, only.with_name("latest-checkpoint.pt"))
    converted()


def test_a_repository_is_converted_and_only_its_last_checkpoint_is_downloaded(owner, run, converted):
    shutil.copytree(run, owner.root / "lab/run")
    old = owner.root / "lab/run/checkpoints/step-000001-epoch-00-loss=1.0.pt"
    old.write_text("not read")
    expected = weights_of(converted())
    weights = weights_of(converted(source="lab/run"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert not any(old.name in request for request in owner.requests)


def test_a_repository_in_the_cache_is_converted_offline(owner, run, converted, monkeypatch):
    shutil.copytree(run, owner.root / "lab/run")
    expected = weights_of(converted(source="lab/run"))
    owner.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    weights = weights_of(converted(source="lab/run"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert owner.requests == []


# What is refused


def nothing_was_written(tmp_path):
    return not (tmp_path / "converted").exists() and not list(tmp_path.glob("_unfinished*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda parts: parts.pop("vision_backbone"), "has no weights of 'vision_backbone'"),
        (lambda parts: parts["projector"].clear(), "has no weights of 'projector'"),
        (lambda parts: parts["projector"].pop("projector.2.bias"), "1 weight is missing .*projector.fc2.bias"),
        (
            lambda parts: parts["llm_backbone"].update({"llm.model.extra.weight": torch.ones(1)}),
            "1 weight is unexpected .*extra.weight",
        ),
        (
            lambda parts: parts["llm_backbone"].update({"encoder.weight": torch.ones(1)}),
            "contains 'encoder.weight' in 'llm_backbone', which is not a weight of OpenVLA",
        ),
        (
            lambda parts: parts["projector"].update({"projector.0.bias": torch.ones(3)}),
            r"1 weight has a different shape .*projector.fc1.bias': \(3,\) instead of",
        ),
        (
            lambda parts: parts.update(state_encoder={"fc.weight": torch.ones(1)}),
            "contains 'state_encoder', which is not a part of OpenVLA",
        ),
        (lambda parts: parts.update(projector=torch.ones(1)), "has no weights of 'projector'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(run, policy, parts, converted, damage, message, tmp_path):
    damage(parts)
    write_run(run, parts, policy[0].norm_stats)
    with pytest.raises(ValueError, match=message):
        converted()
    assert nothing_was_written(tmp_path)


def test_a_tiny_run_needs_its_sizes(run, sizes, tmp_path):
    towers = {name: sizes.pop(name) for name in ("vision_config", "fused_vision_config")}
    towers["vision_config"] |= {"hidden_size": 64}
    with pytest.raises(ValueError, match="weights have a different shape"):
        convert(run, tmp_path / "converted", tokenizer=tmp_path / "tokenizer", **sizes, **towers)
    assert nothing_was_written(tmp_path)


@pytest.mark.parametrize("content", [None, {"weights": {}}, {"model": None}, {"model": {}}])
def test_a_file_without_a_model_is_refused(run, converted, content):
    (path,) = (run / "checkpoints").iterdir()
    torch.save(content or {}, path)
    with pytest.raises(ValueError, match=r"step-000010-epoch-00-loss=0\.1000\.pt has no weights of 'vision_backbone'"):
        converted()


def test_a_file_that_was_cut_short_is_refused(run, converted, tmp_path):
    (path,) = (run / "checkpoints").iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"\.pt is damaged or was cut short"):
        converted()
    assert nothing_was_written(tmp_path)


class Harmful:
    def __reduce__(self):
        return print, ("harm",)


def test_a_file_that_could_run_code_is_refused(run, parts, converted, capsys):
    (path,) = (run / "checkpoints").iterdir()
    torch.save({"model": parts, "more": Harmful()}, path)
    with pytest.raises(ValueError, match="reading it could run code"):
        converted()
    assert "harm" not in capsys.readouterr().out


def test_other_folders_and_base_models_are_refused(run, policy, converted, tmp_path):
    config = json.loads((run / "config.json").read_text())
    config["vla"]["base_vlm"] = "prism-dinosiglip-224px+13b"
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"'prism-dinosiglip-224px\+13b'\. Did you mean 'prism-dinosiglip-224px\+7b'"):
        converted()
    (run / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a training run of Prismatic: its config"):
        converted()
    policy[0].save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="It already loads with `from_pretrained`"):
        converted(source=tmp_path / "ours")
    write_run(run, {}, policy[0].norm_stats)
    with pytest.raises(ValueError, match="Unknown config field 'hidden'"):
        converted(hidden=3)
    with pytest.raises(FileExistsError, match="is not empty"):
        convert(run, run)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dataset_statistics.json", r"has no dataset_statistics\.json: copy it from the training run"),
        ("checkpoints", r"has no `\.pt` files in its folder `checkpoints`"),
    ],
)
def test_an_incomplete_run_is_refused(run, converted, name, message):
    (run / name).unlink() if name.endswith("json") else shutil.rmtree(run / name)
    with pytest.raises(OSError, match=message):
        converted()


def test_a_tokenizer_of_another_model_is_refused(converted, tmp_path):
    with pytest.raises(OSError, match=r"Cannot load the tokenizer of '.*nowhere' .*as `tokenizer=`\.$"):
        converted(tokenizer=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"pads with id \d+, but the model pads with 386: give the tokenizer"):
        converted(pad_token_id=386)


# The command line


def test_the_command_converts_with_the_fields_of_a_file(run, sizes, tmp_path, capsys):
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    command = ["convert", str(run), str(tmp_path / "out"), "--config", str(tmp_path / "sizes.json"), "--json"]
    assert main([*command, "--tokenizer", str(tmp_path / "tokenizer"), "--dtype", "float16"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["folder"] == str(tmp_path / "out")
    assert said["weight_bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    assert AutoModel.from_pretrained(tmp_path / "out").dtype == torch.float16


def test_a_run_must_be_converted_first(run, capsys):
    told = f"is a training run of the original's code: convert it first with `openvla-hf convert {run} NEW_FOLDER`."
    with pytest.raises(ValueError, match="is a training run of the original's code"):
        OpenVLAForActionPrediction.from_pretrained(run)
    assert main(["info", str(run)]) == 2
    assert told in capsys.readouterr().err
