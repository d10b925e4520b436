"""The original code's recorded outputs, reproduced: those kept here or, with `--golden DIR`, all of them.

README.md lists the kept recordings and the tolerances. Recorded tensors may be cut to `record.stride` and
`record.columns`.
"""

import contextlib
import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModel, AutoModelForImageTextToText

import openvla_hf
from openvla_hf.modeling.action_tokenizer import ActionTokenizer, normalize, unnormalize
from openvla_hf.training.collator import ActionCollator


CASES = ["fused-224", "siglip-224"]
CHECKPOINTS = [*CASES, "sharded"]  # "sharded" has the weights of the first case
PIXELS, FEATURES, PROJECTOR, LOGITS, NORMALIZED = 1e-6, 5e-5, 1e-4, 1e-4, 1e-6
LOSS, GRADIENT_NORM = 1e-5, 1e-4  # relative
BFLOAT16 = 0.02  # relative, for a whole tensor

DINOV2 = {
    r"\.patch_embed\.proj\.": ".embeddings.patch_embeddings.projection.",
    r"\.cls_token": ".embeddings.cls_token",
    r"\.reg_token": ".embeddings.register_tokens",
    r"\.pos_embed": ".embeddings.position_embeddings",
    r"\.blocks\.": ".encoder.layer.",
    r"\.attn\.proj\.": ".attention.o_proj.",
    r"\.attn\.qkv\.": ".attention.{}_proj.",
    r"\.ls(\d)\.scale_factor": r".layer_scale\1.lambda1",
}
SIGLIP = {
    r"\.patch_embed\.proj\.": ".embeddings.patch_embedding.",
    r"\.pos_embed": ".embeddings.position_embedding.weight",
    r"\.blocks\.": ".encoder.layers.",
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"\.attn\.proj\.": ".self_attn.out_proj.",
    r"\.attn\.qkv\.": ".self_attn.{}_proj.",
}


def error(actual, expected):
    assert actual.shape == expected.shape
    return (actual.float() - expected.float()).abs().max().item()


def relative_error(actual, expected):
    return abs(actual - expected) / abs(expected)


def in_published_layout(name, tensors, is_fused):
    """Convert our tensors of one published weight: stack q, k and v, and keep only the positions of patches."""
    name = name.removeprefix("language_model.") if name.startswith("language_model.lm_head") else f"model.{name}"
    name = name.replace("language_model.model.", "language_model.")
    if "vision_backbone" in name:
        for source, target in (SIGLIP if "fused_" in name or not is_fused else DINOV2).items():
            name = re.sub(source, target, name)
    if "{}" in name:
        return torch.cat([tensors[name.format(part)] for part in "qkv"])
    if name.endswith("position_embeddings"):
        return tensors[name][:, 1:]
    return tensors[name][None] if name.endswith("position_embedding.weight") else tensors[name]


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def record(recorded, case):
    return recorded(case)


# openvla_hf.AutoModelForVision2Seq is the second of these classes.
LOADERS = [AutoModel, AutoModelForImageTextToText, openvla_hf.OpenVLAForActionPrediction]


@pytest.mark.parametrize("case", CHECKPOINTS, indirect=True)
@pytest.mark.parametrize("trust_remote_code", [None, True])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_class_loads_published_weights_without_warnings(record, silent, loader, trust_remote_code):
    model, info = record.load(loader, trust_remote_code=trust_remote_code, output_loading_info=True)
    assert type(model) is openvla_hf.OpenVLAForActionPrediction
    assert not any(info.values()), info
    weights = model.state_dict()
    for name, tensor in record.model.state_dict().items():
        assert torch.equal(weights[name], tensor)


def test_the_name_of_the_original_auto_class_is_kept():
    assert openvla_hf.AutoModelForVision2Seq is AutoModelForImageTextToText


LOAD_IN_SILENCE = """
import json, sys, warnings
import torch
import openvla_hf
from transformers import AutoModel, AutoProcessor

checkpoint, overrides, image = sys.argv[1:]
for trust in (None, True):
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=trust, **json.loads(overrides))
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=trust)
    inputs = processor(image, instruction="pick up the red block")
    print(model.predict_action(**inputs, unnorm_key="bridge_orig").shape)
"""


def test_loading_asks_no_question_on_the_terminal(recorded, run_python):
    record = recorded("fused-224")
    image = record.folder / record.cases["images"][0]
    result = run_python(LOAD_IN_SILENCE, record.checkpoint, json.dumps(record.overrides), image)
    assert result.stdout == "(7,)\n" * 2
    assert result.stderr == ""


@pytest.mark.parametrize("case", CHECKPOINTS, indirect=True)
def test_every_published_weight_lands(record, recorded, case):
    """Each tensor of the files equals one of ours bit for bit, or is never read by the original."""
    ours, landed = record.model.state_dict(), 0
    unread = set(recorded("siglip-224" if case == "siglip-224" else "fused-224").expected["train"]["grad_none"])
    for path in record.checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name not in unread:
                    published = in_published_layout(name, ours, case != "siglip-224")
                    assert torch.equal(published, file.get_tensor(name).float()), name
                    landed += published.numel()
    class_position = 0 if case == "siglip-224" else record.overrides["vision_config"]["hidden_size"]
    assert landed == sum(parameter.numel() for parameter in record.model.parameters()) - class_position


def test_shards_hold_the_same_model(recorded):
    whole, sharded = recorded("fused-224"), recorded("sharded")
    assert len(list(sharded.checkpoint.glob("*.safetensors"))) == 4
    weights = sharded.model.state_dict()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(weights[name], tensor)
    assert (sharded.checkpoint / "config.json").read_text() == (whole.checkpoint / "config.json").read_text()
    assert torch.equal(sharded.pixel_values, whole.pixel_values)


def test_a_checkpoint_like_openvla_v01_has_one_tower_two_projector_layers_and_the_prompt_of_vicuna(recorded):
    """Every test here with "siglip-224" covers this checkpoint."""
    record = recorded("siglip-224")
    published = json.loads((record.checkpoint / "config.json").read_text())
    assert (published["vision_backbone_id"], published["llm_backbone_id"]) == ("siglip-vit-so400m", "vicuna-v15-7b")
    assert [tower.model_type for tower in record.model.config.vision_configs] == ["siglip_vision_model"]
    assert record.pixel_values.shape[1:] == (3, 224, 224)
    assert record.model.model.projector.fc3 is None
    prompt = record.processor.build_prompt("push")
    assert prompt.startswith("A chat between a curious user and an artificial intelligence assistant. ")
    assert prompt.endswith("USER: What action should the robot take to push? ASSISTANT:")


def test_pixels(record):
    pixels = record.pixel_values[..., :: record.stride, :: record.stride]
    assert error(pixels, record.tensors["pixel_values"]) <= PIXELS


@torch.no_grad()
def test_features_and_projector(record):
    names = [name for name in ("dino_features", "siglip_features") if name in record.tensors]
    features = record.model.model.vision_backbone(record.pixel_values)[:, :: record.stride]
    assert error(features, torch.cat([record.tensors[name] for name in names], dim=-1)) <= FEATURES
    projected = record.model.get_image_features(record.pixel_values)[:, :: record.stride]
    assert error(projected, record.tensors["projector_output"]) <= PROJECTOR


@torch.no_grad()
def test_forward(record):
    """Hidden states and logits of prompts without actions, with and without an image."""
    tensors, stride, columns = record.tensors, record.stride, record.columns
    compared = set()
    for k, prediction in enumerate(record.cases["predictions"][:12]):
        recordings = {name for name in tensors if name.startswith(f"forward.{k}.")}
        if not recordings:
            continue
        inputs = record.inputs(prediction)
        hidden = record.model.model(**inputs).last_hidden_state[0]
        logits = record.model(**inputs).logits[0, :, columns]
        actual = {"hidden_last": hidden[::stride], "hidden_text": hidden[257:][::stride], "logits_last": logits[-1]}
        if (at := tensors.get(f"forward.{k}.logits_positions")) is not None:
            actual["logits_at_positions"] = logits[at]
        for name, value in actual.items():
            if f"forward.{k}.{name}" in recordings:
                assert error(value, tensors[f"forward.{k}.{name}"]) <= LOGITS
                compared.add(name)
    assert compared == {*actual, "logits_at_positions"}
    logits = record.model(input_ids=record.prompt(0)).logits[0, -1, columns]
    assert error(logits, tensors["unimodal.0.logits_last"]) <= LOGITS


@pytest.mark.parametrize("placeholders", [True, False])
def test_every_step_of_every_prediction(record, placeholders):
    """Ids and actions are equal, logits close; the last prompt already ends in 29871."""
    tensors, compared, suffixes = record.tensors, 0, set()
    for k, prediction in enumerate(record.expected["predictions"]):
        key = prediction["unnorm_key"]
        inputs = record.inputs(prediction, add_image_tokens=placeholders)
        details = record.model.predict_action(**inputs, unnorm_key=key, constrained=False, return_details=True)
        assert details.token_ids.tolist() == [prediction["action_token_ids"]]
        assert np.array_equal(details.normalized_actions[0], tensors[f"predict.{k}.normalized_actions"])
        assert np.array_equal(details.actions[0], tensors[f"predict.{k}.actions"])
        assert np.array_equal(record.model.decode_actions(details.token_ids[0], key), details.actions[0])
        suffixes.add(prediction["appended_29871"])
        if (tail := tensors.get(f"predict.{k}.step_logits_tail")) is None:
            continue
        probabilities = tail[:, : record.model.action_tokenizer.n_bins].flip(-1).softmax(-1)
        assert error(torch.from_numpy(details.probabilities[0]), probabilities) <= LOGITS

        suffix = torch.tensor([[29871] * prediction["appended_29871"]], dtype=torch.long)
        outputs = record.model.generate(
            torch.cat([inputs["input_ids"], suffix], dim=1),
            pixel_values=inputs["pixel_values"],
            max_new_tokens=prediction["n_steps"],
            output_logits=True,
            return_dict_in_generate=True,
        )
        generated = outputs.sequences[0]
        assert torch.equal(generated[generated != 32001], tensors[f"predict.{k}.generated_ids"])
        logits = torch.cat(outputs.logits)
        assert error(logits[:, 31744:], tail) <= LOGITS
        if f"predict.{k}.step_logits_full" in tensors:
            assert error(logits[:, record.columns], tensors[f"predict.{k}.step_logits_full"]) <= LOGITS
        compared += 1
    assert compared >= 7
    assert suffixes == {True, False}


def complete_head(model, record, supervised):
    """Include the head's dropped rows in the loss, until the returned hook is removed.

    Args:
        model: The checkpoint, whose head has zeros in these rows.
        record: Contains the slope and the offset of their logit for each supervised position, but not in full
            recordings.
        supervised: (B, T) positions whose logits the loss reads.
    """
    plane = record.tensors.get("train.left_out")
    if plane is None:
        return contextlib.nullcontext()
    left_out = torch.ones(model.lm_head.out_features, dtype=torch.bool)
    left_out[record.columns] = False

    def fill(head, arguments, logits):
        states = arguments[0][supervised].float()
        values = (states * plane[:, :-1]).sum(-1, keepdim=True) + plane[:, -1:]
        logits = logits.clone()
        logits[supervised] = torch.where(left_out, values.to(logits.dtype), logits[supervised])
        return logits

    return model.lm_head.register_forward_hook(fill)


def forward_of_training_batch(record, model):
    batch = record.training_batch
    pixel_values = record.pixel_values[[sample["image"] for sample in record.cases["train"]]]
    labels = batch["labels"][:, 1:]
    with complete_head(model, record, supervised=pad(labels != -100, (256, 1))):
        outputs = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
            pixel_values=pixel_values.to(model.dtype),
        )
    return labels, outputs.logits[:, 256:-1], outputs.loss


def test_training_loss_and_metrics(record):
    with torch.no_grad():
        labels, logits, loss = forward_of_training_batch(record, record.model)
    predictions, expected = logits.argmax(-1), record.expected["train"]
    assert relative_error(loss.item(), expected["loss"]) <= LOSS
    for row, losses in enumerate(expected["per_token_loss"]):
        of_row = labels[row] != -100
        actual = cross_entropy(logits[row][of_row], labels[row][of_row], reduction="none")
        assert error(actual, torch.tensor(losses)) <= LOGITS
    assert torch.equal(predictions, record.tensors["train.action_preds"])
    label_logits = logits[0, labels[0] != -100][:, record.columns]
    assert error(label_logits, record.tensors["train.0.label_logits"]) <= LOGITS
    tokenizer, is_action = record.model.action_tokenizer, labels >= record.model.action_tokenizer.first_id
    accuracy = (predictions == labels)[is_action].float().mean().item()
    l1 = np.abs(tokenizer.decode(predictions[is_action]) - tokenizer.decode(labels[is_action])).mean()
    assert accuracy == pytest.approx(expected["action_accuracy"])
    assert l1 == pytest.approx(expected["action_l1"], abs=1e-7)


def test_gradients(record, case):
    expected, stride = record.expected["train"], record.stride
    model, is_fused = record.load(), case == "fused-224"
    forward_of_training_batch(record, model)[2].backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in ours.values())
    for name, norm in expected["grad_norms"].items():
        assert relative_error(in_published_layout(name, ours, is_fused).norm().item(), norm) <= GRADIENT_NORM, name
    for name in expected["grad_none"]:
        with pytest.raises(KeyError):
            in_published_layout(name, ours, is_fused)
    stored = {name.removeprefix("grad."): t for name, t in record.tensors.items() if name.startswith("grad.")}
    head = "language_model.lm_head.weight"
    rows, at_rows = stored.pop(f"{head}.rows"), stored.pop(f"{head}.at_rows")
    assert error(ours["lm_head.weight"][rows], at_rows) <= GRADIENT_NORM * at_rows.abs().max()
    assert len(stored) == 2
    for name, gradient in stored.items():
        actual = in_published_layout(name, ours, is_fused)[::stride]
        assert error(actual, gradient) <= GRADIENT_NORM * gradient.abs().max()


@torch.no_grad()
def test_bfloat16_is_as_close_as_its_precision_allows(recorded):
    whole, sharded = recorded("fused-224"), recorded("sharded")
    model = sharded.load(dtype="auto")
    assert model.dtype == torch.bfloat16
    projected = model.get_image_features(whole.pixel_values[:1]).float()[:, :: whole.stride]
    reference = sharded.tensors["bf16.projector_output"]
    assert (projected - reference).norm() <= BFLOAT16 * reference.norm()
    for k in (0, 5, 10):
        logits = model(**whole.inputs(whole.cases["predictions"][k])).logits[0, -1, whole.columns].float()
        reference = sharded.tensors[f"bf16.forward.{k}.logits_last"]
        assert (logits - reference).norm() <= BFLOAT16 * reference.norm()
    loss = forward_of_training_batch(whole, model)[2].item()
    assert relative_error(loss, sharded.expected["bf16"]["train"]["loss"]) <= 0.01


def set_rms_norm_eps(model):
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-5


def set_dinov2_eps(model):
    for module in model.model.vision_backbone.featurizer.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5


def set_tanh_gelu(model):
    for layer in model.model.vision_backbone.featurizer.encoder.layer:
        layer.mlp.activation_fn = nn.GELU("tanh")


MUTATIONS = {
    "rms_norm_eps 1e-5 instead of 1e-6": set_rms_norm_eps,
    "dino LayerNorm eps 1e-05 instead of 1e-6": set_dinov2_eps,
    "dino GELU tanh instead of erf": set_tanh_gelu,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@torch.no_grad()
def test_the_tolerances_catch_mistakes_that_the_ids_do_not_show(recorded, mutation):
    record = recorded("fused-224")
    effect = json.loads((record.folder / "mutations.json").read_text())[mutation]
    model, inputs = record.load(), record.inputs(record.cases["predictions"][0])
    MUTATIONS[mutation](model)
    logits, reference = model(**inputs).logits[0, -1, record.columns], record.tensors["forward.0.logits_last"]
    assert effect["argmax_same"]
    assert logits.argmax() == reference.argmax()
    assert error(logits, reference) > LOGITS
    # As large as the same mistake in the original.
    assert 0.3 < error(logits, reference) / effect["logits"] < 3


# Actions


def test_action_tokens(recordings):
    expected = load_file(recordings("action-tokenizer") / "expected.safetensors")
    tokenizer = ActionTokenizer()
    assert np.array_equal(tokenizer.bins, expected["bins"])
    assert np.array_equal(tokenizer.bin_centers, expected["bin_centers"])
    assert np.array_equal(tokenizer.decode(np.arange(32064)), expected["all_token_ids_decoded"])
    for dtype in ("f32", "f64"):
        ids = tokenizer.encode(expected[f"actions_{dtype}"])
        assert np.array_equal(ids, expected[f"token_ids_{dtype}"])
        assert np.array_equal(tokenizer.decode(ids), expected[f"decoded_{dtype}"])


def test_training_samples(recorded, recordings):
    """Without its placeholders, every row of the collator equals the original's."""
    samples = json.loads((recordings("action-tokenizer") / "expected.json").read_text())["training_samples"]
    as_it_is = {name: [bound] * 7 for name, bound in (("q01", -1), ("q99", 1), ("min", -1), ("max", 1))}
    as_it_is |= {"mean": [0] * 7, "std": [1] * 7, "mask": [False] * 7}
    for case, builder in (("fused-224", "pure"), ("siglip-224", "vicuna")):
        collate = ActionCollator(recorded(case).processor, ActionTokenizer(), as_it_is, prompt_suffix_token_id=29871)
        # The original keeps outer spaces of an instruction.
        kept = [s for s in samples if s["builder"] == builder and s["instruction"] == s["instruction"].strip()]
        assert len(kept) > 20
        black = np.zeros((8, 8, 3), np.uint8)
        frames = [{"image": black, "instruction": s["instruction"], "action": s["action"]} for s in kept]
        for start in range(0, len(frames), 8):
            batch = collate(frames[start : start + 8])
            for row, sample in enumerate(kept[start : start + 8]):
                of_text = batch["attention_mask"][row].bool() & (batch["input_ids"][row] != 32001)
                assert batch["input_ids"][row, of_text].tolist() == sample["input_ids"]
                assert batch["labels"][row, of_text].tolist() == sample["labels"]
                assert (batch["labels"][row, ~of_text] == -100).all()


def test_normalisation(recordings):
    recorded = json.loads((recordings("normalisation") / "expected.json").read_text())["normalisation"]
    for recording in recorded:
        for name in ("action", "proprio"):
            statistics = recording["statistics"][name]
            actual = normalize(recording[name], statistics, recording["type"])
            expected = np.array(recording[f"normalized_{name}"])
            assert np.allclose(actual, expected, rtol=NORMALIZED, atol=NORMALIZED)


def test_normalising_is_the_inverse_of_unnormalising(record):
    """For the original's own actions, except for dimensions that never change, which normalise to 0."""
    for k, prediction in enumerate(record.cases["predictions"]):
        stats = record.model.get_action_stats(prediction["unnorm_key"])
        action = record.tensors[f"predict.{k}.actions"].numpy()
        normalized = record.tensors[f"predict.{k}.normalized_actions"].numpy()
        assert np.array_equal(unnormalize(normalized, stats), action)
        moves = np.array(stats["q01"]) != np.array(stats["q99"])
        assert np.abs((normalize(action, stats) - normalized)[moves]).max() <= NORMALIZED
