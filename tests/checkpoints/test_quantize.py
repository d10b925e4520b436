import gc
import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from interpreters import WITHOUT_THE_PACKAGE
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    TorchAoConfig,
)

from openvla_hf.checkpoints.model_card import read_training
from openvla_hf.checkpoints.quantize import FORMATS, expected_weight_bytes, quantization, quantize, weight_bytes
from openvla_hf.cli import main
from openvla_hf.data import write_lerobot
from openvla_hf.evaluation.fidelity import compare
from openvla_hf.modeling.action_decoding import action_pass
from openvla_hf.modeling.configuration_openvla import OpenVLAConfig
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.tabletop.rollouts import TABLETOP_POLICY, run_episodes
from openvla_hf.testing import fake_episode
from openvla_hf.training.finetune import FinetuneArguments, build_trainer, train


bitsandbytes = pytest.importorskip("bitsandbytes")
BNB = ("4bit", "8bit")
HERE = [name for name in FORMATS if importlib.util.find_spec(FORMATS[name].package) and name not in ("int4", "float8")]
GB = 10**9
FEATURES = Features({"image": Image(), "instruction": Value("string"), "action": List(Value("float64"))})
FULL_SIZE = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


@pytest.fixture
def policy(tiny, tmp_path, request):
    """A saved policy: folder, model, processor, inputs of one observation. A test may give fields of its config."""
    model, processor = tiny(text_width=128, **getattr(request, "param", {}))
    folder = tmp_path / "policy"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    image = fake_episode(steps=1)[0]["image"]
    inputs = processor(image, instruction="pick up the red block")
    return SimpleNamespace(folder=folder, model=model, processor=processor, image=image, inputs=inputs)


def exact(name):
    """Make the config of a format with float32 arithmetic, in which no row depends on the others of its batch."""
    config = quantization(name)
    config.bnb_4bit_compute_dtype = torch.float32
    config.llm_int8_threshold = 0.0
    return config


def kinds(model):
    """Return the class names of the linear layers in each part of the model."""
    parts = {"head": model.lm_head, "vision": model.model.vision_backbone, "projector": model.model.projector}
    parts["text"] = model.model.language_model
    return {
        part: {type(layer).__name__ for layer in module.modules() if isinstance(layer, nn.Linear)}
        for part, module in parts.items()
    }


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


# Loading


@pytest.mark.parametrize("loader", [AutoModel, AutoModelForImageTextToText, OpenVLAForActionPrediction])
@pytest.mark.parametrize("bits", [4, 8])
def test_by_default_head_towers_and_projector_stay_in_16_bits(policy, loader, bits):
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = loader.from_pretrained(policy.folder, quantization_config=config)
    layer = {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    assert kinds(model) == {"head": {"Linear"}, "vision": {"Linear"}, "projector": {"Linear"}, "text": {layer}}
    assert config.llm_int8_skip_modules is None, "the user's own config was changed"
    assert np.isfinite(model.predict_action(**policy.inputs)).all()


def test_a_config_as_a_dict_has_the_same_defaults(policy):
    model = AutoModel.from_pretrained(policy.folder, quantization_config={"load_in_4bit": True})
    assert kinds(model) == {"head": {"Linear"}, "vision": {"Linear"}, "projector": {"Linear"}, "text": {"Linear4bit"}}


def test_only_the_modules_that_the_user_names_are_kept(policy):
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "model.projector"])
    model = AutoModel.from_pretrained(policy.folder, quantization_config=config)
    assert kinds(model)["projector"] == kinds(model)["head"] == {"Linear"}
    assert kinds(model)["vision"] == kinds(model)["text"] == {"Linear4bit"}
    everything = AutoModel.from_pretrained(policy.folder, quantization_config=quantization("4bit", towers=True))
    assert kinds(everything)["projector"] == {"Linear4bit"}
    assert kinds(everything)["head"] == {"Linear"}


# Acting


@pytest.mark.parametrize("name", BNB)
def test_batches_drafts_details_and_streams_give_the_action(policy, name):
    model = AutoModel.from_pretrained(policy.folder, quantization_config=exact(name), dtype=torch.float32)
    alone = model.predict_action(**policy.inputs, return_details=True)
    batch = policy.processor([policy.image] * 2, instruction=["open the drawer now", "pick up the red block"])
    np.testing.assert_array_equal(model.predict_action(**batch)[1], alone.actions[0])
    for draft in (alone.token_ids, alone.token_ids - 1):
        drafted = model.predict_action(**policy.inputs, draft_token_ids=draft, return_details=True)
        np.testing.assert_array_equal(drafted.token_ids, alone.token_ids)
    assert model.predict_action(
        **policy.inputs, draft_token_ids=alone.token_ids, return_details=True
    ).forward_passes == 1  # fmt: skip
    stream = model.action_stream()
    for _ in range(2):
        np.testing.assert_array_equal(stream.predict_action(**policy.inputs), alone.actions[0])
    assert stream.forward_passes == 1
    generated = model.predict_action(**policy.inputs, do_sample=False)
    np.testing.assert_array_equal(generated, alone.actions[0])


# With as few layers as there can be: a compiler takes a while for each.
@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", [{"vision_layers": 2, "text_layers": 1, "fused": False}], indirect=True, ids=["small"]
)
@pytest.mark.parametrize("name", BNB)
def test_the_compiled_pass_is_one_graph_and_gives_the_same_tokens(policy, name):
    model = AutoModel.from_pretrained(policy.folder, quantization_config=quantization(name), dtype=torch.bfloat16)
    expected = model.predict_action(**policy.inputs, return_details=True)
    model.action_pass = torch.compile(action_pass, backend="aot_eager", fullgraph=True, dynamic=False)
    compiled = model.predict_action(**policy.inputs, return_details=True)
    torch.compiler.reset()
    np.testing.assert_array_equal(compiled.token_ids, expected.token_ids)


# Saving


REMOTE = (
    WITHOUT_THE_PACKAGE
    + """
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

inputs, output, *folders = sys.argv[1:]
inputs = load_file(inputs)
logits = {}
for folder in folders:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        logits[folder] = model(**inputs).logits
save_file(logits, output)
"""
)


def test_a_new_process_without_the_package_computes_identical_logits(policy, run_python, tmp_path):
    expected = {}
    for name, towers in zip(BNB, (False, True), strict=True):
        config = quantization(name, towers=towers)
        model = AutoModel.from_pretrained(policy.folder, quantization_config=config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        expected[str(tmp_path / name)] = logits(model, policy.inputs)
    save_file({key: value.contiguous() for key, value in policy.inputs.items()}, tmp_path / "inputs.safetensors")
    output = tmp_path / "logits.safetensors"
    run_python(REMOTE, tmp_path / "inputs.safetensors", output, *expected)
    actual = load_file(output)
    for folder, value in expected.items():
        assert torch.equal(actual[folder], value), folder


@pytest.mark.parametrize("name", BNB)
@pytest.mark.parametrize("case", ["fused-224", "sharded"])
def test_a_published_checkpoint_is_quantised_saved_and_reloaded_alike(recorded, tmp_path, name, case):
    record = recorded(case)
    # The towers too: their fused weights are split on the way, and one has odd sizes.
    model = record.load(quantization_config=quantization(name, towers=True), dtype=torch.bfloat16)
    assert kinds(model)["vision"] == kinds(model)["text"]
    model.save_pretrained(tmp_path)
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    inputs = record.processor(record.cases["prompts"][0], record.images[0])
    assert torch.equal(logits(again, inputs), logits(model, inputs))


# Rewriting a checkpoint


def read_all(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("towers", [False, True])
def test_quantize_writes_the_same_as_loading_and_saving(policy, tmp_path, name, towers):
    config = quantization(name, towers=towers)
    model = AutoModel.from_pretrained(policy.folder, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    quantize(policy.folder, tmp_path / "written", name, towers=towers, shard_bytes=200_000)
    saved, written = read_all(tmp_path / "saved"), read_all(tmp_path / "written")
    assert len(list((tmp_path / "written").glob("*.safetensors"))) > 2
    assert written.keys() == saved.keys()
    for key, value in saved.items():
        assert torch.equal(written[key].view(torch.uint8), value.view(torch.uint8)), key
    again = AutoModel.from_pretrained(tmp_path / "written")
    processor = AutoProcessor.from_pretrained(tmp_path / "written")
    inputs = processor(policy.image, instruction="pick up the red block")
    assert torch.equal(logits(again, inputs), logits(model, policy.inputs))
    assert again.norm_stats == model.norm_stats
    files = {path.name for path in (tmp_path / "saved").iterdir() if path.suffix in (".py", ".json")}
    assert files <= {path.name for path in (tmp_path / "written").iterdir()}


def test_quantize_keeps_the_record_of_the_training(policy, tmp_path):
    (policy.folder / "training.json").write_text('{"recipe": "full"}', encoding="utf-8")
    written = quantize(policy.folder, tmp_path / "written", "8bit")
    assert read_training(written) == {"recipe": "full"}


def test_quantize_reads_a_published_sharded_checkpoint(recorded, tmp_path):
    record = recorded("sharded")
    config = AutoConfig.from_pretrained(record.checkpoint, **record.overrides)
    quantize(record.checkpoint, tmp_path / "written", "4bit", towers=True, config=config, shard_bytes=300_000)
    model = record.load(quantization_config=quantization("4bit", towers=True), dtype=torch.bfloat16)
    inputs = record.processor(record.cases["prompts"][0], record.images[0])
    again = AutoModel.from_pretrained(tmp_path / "written")
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def tensor_bytes():
    """Count the bytes of all tensors in memory. `isinstance` would make some objects import modules or warn."""
    real = [
        one
        for one in gc.get_objects()
        if type(one) in (torch.Tensor, nn.Parameter, bitsandbytes.nn.Int8Params) and not one.is_meta
    ]
    return sum({one.data_ptr(): one.untyped_storage().nbytes() for one in real}.values())


def test_quantize_holds_one_shard_in_memory(policy, tmp_path):
    del policy.model
    whole, shard = (policy.folder / "model.safetensors").stat().st_size // 2, 200_000
    gc.collect()
    before, held = tensor_bytes(), []
    quantize(
        policy.folder, tmp_path / "out", "8bit", shard_bytes=shard,
        on_progress=lambda done, total: held.append(tensor_bytes() - before),
    )  # fmt: skip
    assert len(held) > 3
    assert max(held) < 2 * shard < whole


def test_quantize_leaves_nothing_behind_when_it_fails(policy, tmp_path):
    weights = policy.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(OSError, match="corrupt or was cut short"):
        quantize(policy.folder, tmp_path / "out" / "here", "4bit")
    assert not list((tmp_path / "out").rglob("*"))


def test_quantize_refuses_weights_of_another_model(policy, tmp_path):
    weights = policy.folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["lm_head.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weight is missing \(for example 'lm_head\.weight'\)"):
        quantize(policy.folder, tmp_path / "out", "4bit")


# Size


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("towers", [False, True])
def test_weights_take_the_computed_size(policy, name, towers):
    config = quantization(name, towers=towers)
    model = AutoModel.from_pretrained(policy.folder, quantization_config=config, dtype=torch.bfloat16)
    # The description of each 4-bit layer takes some hundred bytes, which matters at this size.
    assert weight_bytes(model) == pytest.approx(expected_weight_bytes(model.config, name, towers=towers), rel=0.05)


@pytest.mark.parametrize(
    ("name", "towers", "most"), [("4bit", False, 5.7), ("4bit", True, 4.8), ("8bit", False, 8.7), ("8bit", True, 8.1)]
)
def test_a_7b_policy_fits(name, towers, most):
    config = OpenVLAConfig(vision_backbone_id="dinosiglip-vit-so-224px", text_config=dict(FULL_SIZE))
    assert expected_weight_bytes(config) == pytest.approx(15 * GB, rel=0.001)
    assert expected_weight_bytes(config, name, towers=towers) <= most * GB


# Adapters


def test_qlora_saves_only_an_adapter_that_runs_on_4_and_on_16_bits(policy, tmp_path):
    # Arithmetic in bfloat16 differs a little between the kernels for training and for predicting.
    in_4 = quantization("4bit", dtype=torch.float32)
    steps = fake_episode(steps=8)
    columns = {name: [step[name] for step in steps] for name in FEATURES}
    of_recipe = {"dtype": "float32", "lora_rank": 4, "batch_size": 4, "learning_rate": 1e-2, "augment": False}
    quick = {"max_steps": 4, "save_steps": 4, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}
    trainer = build_trainer(
        FinetuneArguments(
            model=policy.folder,
            data=Dataset.from_dict(columns, features=FEATURES),
            output=tmp_path / "adapter",
            statistics=policy.model.norm_stats,
            recipe="qlora",
            settings={**of_recipe, **quick, "dataloader_num_workers": 0},
            model_kwargs={"quantization_config": in_4},
        )
    )
    assert kinds(trainer.model.get_base_model())["projector"] == {"Linear"}
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    train(trainer)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = trainer.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert [path.name for path in (tmp_path / "adapter").glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))

    def load(**kwargs):
        return OpenVLAForActionPrediction.from_pretrained(tmp_path / "adapter", dtype=torch.float32, **kwargs)

    on_4 = load(quantization_config=in_4)
    trained = trainer.model.eval()
    torch.testing.assert_close(logits(on_4, policy.inputs), logits(trained, policy.inputs), rtol=0, atol=1e-4)
    on_16 = load()
    assert isinstance(on_16.model.language_model.layers[0].self_attn.q_proj.get_base_layer(), nn.Linear)
    assert kinds(AutoModel.from_pretrained(policy.folder))["text"] == {"Linear"}
    assert not torch.allclose(logits(on_16, policy.inputs), logits(policy.model, policy.inputs), atol=1e-2)
    for model in (on_4, on_16):
        assert np.isfinite(model.predict_action(**policy.inputs)).all()


# Fidelity


def test_the_report_compares_the_predictions_of_the_models(tiny, tmp_path):
    model, processor = tiny()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    frames = fake_episode(steps=6)[::2]
    plain, four = compare(tmp_path, ["4bit"], frames, towers=[True], device="cpu")
    assert (plain.format, plain.token_agreement, plain.action_agreement, plain.gripper_flips) == ("16-bit", 1, 1, 0)
    assert plain.l1 == [0.0] * 7
    assert four.weight_bytes < 0.8 * plain.weight_bytes

    def answers(config):
        model = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config)
        details = [
            model.predict_action(**processor(one["image"], instruction=one["instruction"]), return_details=True)
            for one in frames
        ]
        return [np.concatenate([getattr(one, name) for one in details]) for name in ("actions", "token_ids")]

    actions, ids = answers(quantization("4bit", towers=True))
    should_act, should_give = answers(None)
    np.testing.assert_allclose(four.l1, np.abs(actions - should_act).mean(axis=0))
    assert four.token_agreement == (ids == should_give).mean() < 1
    assert four.action_agreement == (ids == should_give).all(axis=1).mean()
    assert four.gripper_flips == ((actions > 0.5) != (should_act > 0.5))[:, 6].mean()


@pytest.mark.slow
def test_the_report_counts_episodes_lost_and_won(monkeypatch):
    pytest.importorskip("gymnasium")
    episodes, dtype = 2, torch.float32
    told, vision, solved = [], [], []

    def watch(policy, seeds):
        vision.append(kinds(policy.model)["vision"])
        solved.append(set())
        for rollout in run_episodes(policy, seeds):
            solved[-1].update([rollout.seed] if rollout.success else [])
            yield rollout

    monkeypatch.setattr("openvla_hf.tabletop.rollouts.run_episodes", watch)
    results = compare(
        TABLETOP_POLICY, ["4bit"], fake_episode(steps=1), towers=[True], device="cpu", dtype=dtype, episodes=episodes,
        on_progress=told.append,
    )  # fmt: skip
    assert told == ["32-bit"] * (1 + episodes) + ["4bit + towers"] * (1 + episodes)
    assert vision == [{"Linear"}, {"Linear4bit"}]
    plain, four = solved
    assert [one.success for one in results] == [len(plain) / episodes, len(four) / episodes]
    assert [(one.lost, one.won) for one in results] == [(0, 0), (len(plain - four), len(four - plain))]


def test_the_command_writes_checkpoints_and_reports(policy, tmp_path, capsys):
    assert main(["quantize", str(policy.folder), str(tmp_path / "four"), "--bits", "4", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert AutoModel.from_pretrained(written["folder"]).config.quantization_config.load_in_4bit
    pytest.importorskip("gymnasium")
    more = ["--report", "--format", "8bit", "--frames", "2", "--output", str(tmp_path / "report"), "--json"]
    assert main(["quantize", str(policy.folder), *more]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["format"] for row in report["results"]] == ["16-bit", "8bit"]
    assert json.loads((tmp_path / "report" / "fidelity.json").read_text()) == report["results"]
    assert (tmp_path / "report" / "fidelity.png").stat().st_size > 1000
    assert main(["quantize", str(policy.folder)]) == 2
    assert "a new folder" in capsys.readouterr().err


def test_formats_are_compared_with_a_quantised_baseline_where_16_bits_do_not_fit(policy, tmp_path, capsys):
    pytest.importorskip("gymnasium")
    more = ["--report", "--baseline", "8bit", "--format", "4bit", "--frames", "1", "--output", str(tmp_path), "--json"]
    assert main(["quantize", str(policy.folder), *more]) == 0
    first, other = json.loads(capsys.readouterr().out)["results"]
    assert (first["format"], other["format"]) == ("8bit", "4bit")
    assert first["token_agreement"] == 1
    assert first["weight_bytes"] < weight_bytes(policy.model) / 1.5


def test_the_report_reads_data_as_training_does(policy, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    joints = [f"joint{index}" for index in range(7)]
    write_lerobot([fake_episode(steps=6)], tmp_path / "kitchen", action_names=joints)
    robots = tmp_path / "robots.py"
    robots.write_text(
        "from openvla_hf.data import Gripper, Robot, register_robot\n"
        "register_robot(Robot('lab_arm', action_dim=7, gripper=Gripper(open=1.0, closed=0.0)))\n"
    )
    more = ["--report", "--format", "8bit", "--frames", "2", "--output", str(tmp_path / "report"), "--json"]
    more += ["--data", str(tmp_path / "kitchen"), "--robot", "lab_arm"]
    assert main(["quantize", str(policy.folder), *more]) == 2
    assert "'lab_arm'" in capsys.readouterr().err
    more += ["--robots", str(robots)]
    assert main(["quantize", str(policy.folder), *more, "--camera", "wrist"]) == 2
    assert "'wrist'" in capsys.readouterr().err
    assert main(["quantize", str(policy.folder), *more, "--camera", "observation.images.front"]) == 0
    assert json.loads(capsys.readouterr().out)["observations"] == 2
    more.remove("--json")
    assert main(["quantize", str(policy.folder), *more, "--camera", "observation.images.front"]) == 0
    table = capsys.readouterr().out
    assert all(f"L1 of {name}" in table for name in joints)


# Bad input


def test_an_unknown_format_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean '4bit'"):
        quantization("4bits")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["int4", "float8"])
def test_a_format_that_needs_a_gpu_says_so(name):
    with pytest.raises(ValueError, match=r"needs a GPU of compute capability .* use '4bit' or 'int8'"):
        quantization(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_config_whose_kernels_need_a_gpu_says_so(policy, torchao):
    config = TorchAoConfig(torchao.quantization.Int4WeightOnlyConfig(group_size=32))
    with pytest.raises(ValueError, match=r"Int4WeightOnlyConfig needs a GPU .* use '4bit' or 'int8'"):
        AutoModel.from_pretrained(policy.folder, quantization_config=config)


NO_BITSANDBYTES = """
import importlib.util, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Refuse())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "bitsandbytes" else find_spec(name, *args)

import openvla_hf
from transformers import AutoModel, BitsAndBytesConfig

for bits in ("4", "8"):
    try:
        AutoModel.from_pretrained(
            sys.argv[1], quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
        )
    except ImportError as error:
        print(error)
"""


def test_without_bitsandbytes_a_users_own_config_names_it(policy, run_python):
    lines = run_python(NO_BITSANDBYTES, policy.folder).stdout.splitlines()
    assert len(lines) == 2
    assert all("pip install -U bitsandbytes" in line for line in lines)


def test_weights_are_quantised_once(policy, tmp_path):
    quantize(policy.folder, tmp_path / "four", "4bit")
    for loader in (AutoModel, OpenVLAForActionPrediction):
        with pytest.raises(ValueError, match="already quantised: load it without `quantization_config`"):
            loader.from_pretrained(tmp_path / "four", quantization_config=quantization("8bit"))
    with pytest.raises(ValueError, match="already quantised"):
        quantize(tmp_path / "four", tmp_path / "eight", "8bit")
    with pytest.raises(ValueError, match="already quantised"):
        compare(tmp_path / "four", ["8bit"], fake_episode(steps=1), device="cpu")
    with pytest.raises(FileExistsError, match="is not empty"):
        quantize(policy.folder, tmp_path / "four", "4bit")


def test_a_missing_package_is_named(policy, tmp_path, monkeypatch):
    AutoModel.from_pretrained(policy.folder, quantization_config=quantization("4bit")).save_pretrained(
        tmp_path / "four"
    )
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    monkeypatch.setattr("openvla_hf.checkpoints.quantize.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs bitsandbytes\. Run `pip install bitsandbytes`"):
        quantization("4bit")
    with pytest.raises(ImportError, match=r"pip install .*bitsandbytes"):
        AutoModel.from_pretrained(tmp_path / "four")

    config_file = tmp_path / "four" / "config.json"
    config = json.loads(config_file.read_text())
    config["quantization_config"] = {"quant_method": "torchao", "quant_type": {"default": {}}}
    config_file.write_text(json.dumps(config))
    for module in ("torchao", "torchao.core.config"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="need torchao: run `pip install torchao`"):
        AutoModel.from_pretrained(tmp_path / "four")


def test_sizes_that_the_cpu_kernel_rejects_use_the_general_kernel(tiny, tmp_path, monkeypatch):
    """On a CPU with AVX512-BF16 such a layer fails with "N must be divisible by block_n"."""
    model, processor = tiny(text_width=48)
    model.save_pretrained(tmp_path)
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="pick up the red block")
    plain = AutoModel.from_pretrained(tmp_path, quantization_config=quantization("4bit"))
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    config = quantization("4bit")
    model = AutoModel.from_pretrained(tmp_path, quantization_config=config)
    np.testing.assert_array_equal(model.predict_action(**inputs), plain.predict_action(**inputs))
