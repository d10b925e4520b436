"""`assemble` joins pretrained towers and a language model, each of which computes what it computed before."""

import json
import shutil

import pytest
import torch
from model_parts import DINOV2_TIMM, SIGLIP_TIMM, llama_tokenizer, write_dinov2, write_llama, write_siglip, write_timm
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoProcessor, Dinov2WithRegistersModel, LlamaForCausalLM

from openvla_hf.checkpoints import policy_writing
from openvla_hf.checkpoints.assemble import assemble
from openvla_hf.checkpoints.describe import describe
from openvla_hf.cli import main
from openvla_hf.testing import fake_episode


PIXELS = torch.linspace(-2, 2, 6 * 56 * 56).sin().reshape(1, 6, 56, 56)


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder, function):
    weights = load_file(folder / "model.safetensors")
    function(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of the parts, in both layouts of the towers. DINOv2 is for larger images than the policy."""
    folder = tmp_path_factory.mktemp("parts")
    towers = write_dinov2(folder / "dinov2"), write_siglip(folder / "siglip", hidden_act="gelu")
    for name, tower, architecture in zip(("dinov2", "siglip"), towers, (DINOV2_TIMM, SIGLIP_TIMM), strict=True):
        write_timm(folder / f"{name}-timm", tower, architecture)
    write_llama(folder / "llama")
    # Llama-2's files have such weights, which are computed today.
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    change_weights(folder / "llama", lambda weights: weights.update(frequencies))
    return folder


@pytest.fixture(scope="module")
def features(parts):
    """The features of the second-to-last blocks, by transformers' own towers, for each activation of SigLIP."""
    dinov2 = Dinov2WithRegistersModel.from_pretrained(parts / "dinov2")
    found = {}
    for activation in ("gelu", "gelu_pytorch_tanh"):
        siglip = write_siglip(parts / activation, hidden_act=activation)
        with torch.no_grad():
            outputs = [
                dinov2(PIXELS[:, :3], output_hidden_states=True),
                siglip(PIXELS[:, 3:], output_hidden_states=True),
            ]
        found[activation] = torch.cat([output.hidden_states[-2][:, -16:] for output in outputs], -1)
    return found


@pytest.fixture
def assembled(parts, tmp_path):
    """Return a function that assembles parts: `assembled(siglip="siglip-tanh")`."""

    def call(dinov2="dinov2", siglip="siglip", language_model="llama", **options):
        named = {"dinov2": dinov2, "siglip": siglip, "language_model": language_model}
        sources = {name: None if one is None else parts / one for name, one in named.items()}
        return assemble(tmp_path / "policy", **sources, **{"image_size": 56, "dtype": "float32"} | options)

    return call


# What is written


@pytest.mark.parametrize(
    ("dinov2", "siglip", "activation"),
    [
        ("dinov2", "siglip", "gelu"),
        ("dinov2-timm", "siglip-timm", "gelu"),
        ("dinov2", "gelu_pytorch_tanh", "gelu_pytorch_tanh"),
    ],
)
def test_each_tower_computes_the_features_of_transformers(assembled, features, dinov2, siglip, activation):
    """DINOv2's position embedding is interpolated from 7 x 7 patches to 4 x 4."""
    model = AutoModel.from_pretrained(assembled(dinov2, siglip))
    with torch.no_grad():
        found = model.model.vision_backbone(PIXELS)
    assert found.shape == (1, 16, 64)
    assert (features["gelu"] - features["gelu_pytorch_tanh"]).abs().max() > 5e-5
    torch.testing.assert_close(found, features[activation], rtol=0, atol=1e-5)


def test_the_position_embeddings_of_both_towers_are_interpolated_alike(parts, tmp_path):
    dinov2 = write_dinov2(tmp_path / "dinov2")
    write_siglip(tmp_path / "siglip", image_size=98)
    path = tmp_path / "siglip/model.safetensors"
    weights = load_file(path)
    name = "vision_model.embeddings.position_embedding.weight"
    weights[name] = dinov2.embeddings.position_embeddings[0, 1:].detach().contiguous()
    save_file(weights, path, {"format": "pt"})
    folder = assemble(
        tmp_path / "policy",
        dinov2=tmp_path / "dinov2",
        siglip=tmp_path / "siglip",
        language_model=parts / "llama",
        image_size=132,
    )
    backbone = AutoModel.from_pretrained(folder).model.vision_backbone
    expected = backbone.featurizer.embeddings.position_embeddings[0, 1:]
    assert torch.equal(backbone.fused_featurizer.embeddings.position_embedding.weight, expected)
    assert len(expected) == (132 // 14) ** 2


@pytest.mark.parametrize("tied", [False, True])
def test_the_language_model_gives_the_same_logits(assembled, parts, tmp_path, tied):
    write_llama(parts / f"llama-{tied}", shards=True, tie_word_embeddings=tied)
    llama = LlamaForCausalLM.from_pretrained(parts / f"llama-{tied}").eval()
    model = AutoModel.from_pretrained(assembled(language_model=f"llama-{tied}")).eval()
    ids = AutoProcessor.from_pretrained(tmp_path / "policy").tokenizer("pick up the block", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        expected = llama(ids).logits
        found = model(ids).logits
    assert torch.equal(found[..., : expected.shape[-1]], expected)
    assert model.config.text_config.rms_norm_eps == 1e-5


def test_the_actions_are_the_last_tokens_of_the_text_and_padding_follows(assembled):
    folder = assembled()
    config, processor = AutoModel.from_pretrained(folder).config, AutoProcessor.from_pretrained(folder)
    words = processor.tokenizer.get_vocab()
    last = words["<rare_255>"]
    assert config.action_vocab_end == last + 1
    assert (processor.tokenizer.pad_token_id, config.image_token_id) == (last + 1, last + 2)
    assert config.text_config.vocab_size % 64 == 0
    assert config.prompt_suffix_token_id == words["▁"]
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="pick up the block")
    assert inputs["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    assert (inputs["input_ids"] == config.image_token_id).sum() == 16
    assert processor.image_processor.image_mean[0] == [0.485, 0.456, 0.406]


def test_special_tokens_after_those_of_the_text_keep_their_ids(assembled, parts):
    """Llama-3 has its special tokens at the end of the vocabulary."""
    tokenizer = llama_tokenizer()
    last = len(tokenizer) - 1
    tokenizer.add_special_tokens({"eos_token": "<|end|>", "additional_special_tokens": ["<|one|>", "<|two|>"]})
    write_llama(parts / "llama-3", tokenizer)
    folder = assembled(language_model="llama-3")
    config, processor = AutoModel.from_pretrained(folder).config, AutoProcessor.from_pretrained(folder)
    assert config.action_vocab_end == last + 1
    assert config.text_config.eos_token_id == processor.tokenizer.eos_token_id == last + 1
    assert config.pad_token_id == last + 4
    tokenizer = llama_tokenizer()
    tokenizer.eos_token = "<rare_200>"
    write_llama(parts / "llama-eos", tokenizer)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"special token '<rare_200>' has the id \d+, but the actions need the ids"):
        assembled(language_model="llama-eos")


def test_the_projector_is_that_of_the_originals_seed_and_new_rows_are_random(assembled):
    state = AutoModel.from_pretrained(assembled()).state_dict()
    torch.manual_seed(64)  # the width of the towers
    layers = [nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 64)]
    for index, layer in enumerate(layers, 1):
        assert torch.equal(state[f"model.projector.fc{index}.weight"], layer.weight)
        assert torch.equal(state[f"model.projector.fc{index}.bias"], layer.bias)
    pad = len(llama_tokenizer())
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        assert 0.01 < state[name][pad:].std() < 0.03


def test_a_policy_may_have_one_tower(assembled, features):
    model = AutoModel.from_pretrained(assembled(dinov2=None))
    assert model.config.fused_vision_config is None
    assert model.model.projector.fc3 is None
    with torch.no_grad():
        found = model.model.vision_backbone(PIXELS[:, 3:])
    torch.testing.assert_close(found, features["gelu"][..., 32:], rtol=0, atol=1e-5)


def test_shards_hold_the_same_weights_in_every_call(assembled, monkeypatch, tmp_path):
    whole = load_file(assembled() / "model.safetensors")
    (tmp_path / "policy").rename(tmp_path / "first")
    monkeypatch.setattr(policy_writing, "SHARD_BYTES", 100_000)
    progress = []
    folder = assembled(on_progress=lambda done, total: progress.append((done, total)))
    shards = sorted(folder.glob("*.safetensors"))
    assert progress == [(index, len(shards)) for index in range(1, len(shards) + 1)]
    weights = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert len(shards) > 2
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole.items())


def test_a_new_policy_can_be_described_but_not_act(assembled):
    folder = assembled()
    info = describe(folder)
    assert (info.layout, info.action_dims, info.statistics_file, info.has_code) == ("openvla-hf", {}, None, True)
    assert not (folder / "dataset_statistics.json").exists()
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="pick up the block")
    with pytest.raises(ValueError, match=r"no action statistics.* train it with `openvla-hf finetune`"):
        model.predict_action(**inputs)


# What is refused


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("dinov2", lambda folder: change(folder, model_type="dinov2"), "is a model of type 'dinov2', not DINOv2 with"),
        (
            "siglip",
            lambda folder: change(folder, model_type="siglip2"),
            "'siglip2', not SigLIP: .* or one of timm",
        ),
        (
            "llama",
            lambda folder: change(folder, model_type="mistral"),
            "'mistral', but only models of type 'llama'",
        ),
        ("llama", lambda folder: change(folder, quantization_config={"quant_method": "fp8"}), "is quantised: give"),
        (
            "llama",
            lambda folder: change(folder, vocab_size=500),
            "has the id 558, but its .* has only 500",
        ),
        (
            "llama",
            lambda folder: change(folder, intermediate_size=80),
            "6 weights have a different shape",
        ),
        (
            "llama",
            lambda folder: change_weights(folder, lambda weights: weights.pop("model.norm.weight")),
            r"1 weight is missing \(for example 'model\.language_model\.norm\.weight'\)",
        ),
        (
            "llama",
            lambda folder: change_weights(folder, lambda weights: weights.update({"v_head.weight": torch.ones(2)})),
            "1 weight is unexpected .*v_head",
        ),
        (
            "llama",
            lambda folder: change_weights(folder, lambda weights: weights.pop("model.embed_tokens.weight")),
            "lack the token embedding",
        ),
        (
            "siglip",
            lambda folder: change_weights(folder, lambda weights: weights.pop("vision_model.post_layernorm.bias")),
            "as OpenVLA: 1 weight is missing .*post_layernorm.bias",
        ),
        (
            "dinov2-timm",
            lambda folder: change(folder, architecture="vit_large_patch14_dinov2"),
            "Did you mean",
        ),
        ("dinov2-timm", lambda folder: change(folder, model_args={"act_layer": "relu"}), "changes 'act_layer' of"),
        (
            "siglip-timm",
            lambda folder: change_weights(folder, lambda weights: weights.pop("pos_embed")),
            "does not have the weights of 'vit_so400m_patch14_siglip_224'",
        ),
        (
            "siglip-timm",
            lambda folder: change_weights(folder, lambda weights: weights.pop("blocks.1.attn.qkv.bias")),
            "3 weights are missing .*fused_featurizer.encoder.layers.1.self_attn",
        ),
        (
            "siglip-timm",
            lambda folder: change_weights(folder, lambda weights: weights.update(pos_embed=torch.ones(1, 15, 32))),
            "has 15 patches, which are not a square",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(assembled, parts, tmp_path, part, damage, message):
    for source in (parts / part).iterdir():
        (tmp_path / "damaged" / source.name).parent.mkdir(exist_ok=True)
        (tmp_path / "damaged" / source.name).write_bytes(source.read_bytes())
    damage(tmp_path / "damaged")
    argument = {"llama": "language_model"}.get(part, part.partition("-")[0])
    with pytest.raises(ValueError, match=message):
        assembled(**{argument: tmp_path / "damaged"})
    assert not (tmp_path / "policy").exists()
    assert not list(tmp_path.glob("_unfinished*"))


def test_impossible_requests_are_refused(assembled, parts, tmp_path):
    with pytest.raises(ValueError, match="needs a vision tower: give `dinov2`, `siglip` or both"):
        assembled(dinov2=None, siglip=None)
    with pytest.raises(ValueError, match=r"14 pixels wide, so `image_size=10` is too small: .*such as 224"):
        assembled(image_size=10)
    with pytest.raises(OSError, match=r"has no config\.json: give a folder or Hub id of a SigLIP model"):
        assembled(siglip="")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/config.json").write_text((parts / "llama/config.json").read_text())
    with pytest.raises(OSError, match="Cannot load the tokenizer"):
        assembled(language_model=tmp_path / "pickled")
    for path in (parts / "llama").glob("token*"):
        (tmp_path / "pickled" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"harm")
    with pytest.raises(OSError, match=r"has no model\.safetensors, and only safetensors files are read"):
        assembled(language_model=tmp_path / "pickled")
    path = tmp_path / "pickled/tokenizer.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"post_processor": None}))
    with pytest.raises(ValueError, match="does not begin a text with its beginning-of-sequence token"):
        assembled(language_model=tmp_path / "pickled")


# The command line


def test_the_command_assembles_a_policy(parts, tmp_path, capsys):
    sources = ["--dinov2", str(parts / "dinov2-timm"), "--siglip", str(parts / "siglip"), "--language-model"]
    command = ["assemble", str(tmp_path / "out"), *sources, str(parts / "llama"), "--image-size", "56", "--json"]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["folder"], said["dtype"]) == (str(tmp_path / "out"), "bfloat16")
    assert said["weight_bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    assert main(["assemble", str(tmp_path / "other"), "--language-model", str(parts / "llama")]) == 2
    assert "give --dinov2, --siglip or both" in capsys.readouterr().err
