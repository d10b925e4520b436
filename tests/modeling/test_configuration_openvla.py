import json
import re

import pytest
from transformers import AutoConfig, Dinov2WithRegistersConfig, LlamaConfig, SiglipVisionConfig

from openvla_hf import OpenVLAConfig
from openvla_hf.modeling import configuration_openvla
from openvla_hf.modeling.configuration_openvla import (
    AUTO_MAP,
    OFT_FIELDS,
    PUBLISHED_ONLY_FIELDS,
    PUBLISHED_VISION_BACKBONES,
)
from openvla_hf.testing import tiny_config


PUBLISHED = {
    "model_type": "openvla",
    "vision_backbone_id": "dinosiglip-vit-so-224px",
    "llm_backbone_id": "llama2-7b-pure",
    "arch_specifier": "no-align+fused-gelu-mlp",
    "use_fused_vision_backbone": True,
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "image_sizes": [224, 224],
    "image_resize_strategy": "resize-naive",
    "hf_llm_id": "meta-llama/Llama-2-7b-hf",
    "llm_max_length": 2048,
    "output_projector_states": False,
    "pad_token_id": 32000,
    "pad_to_multiple_of": 64,
    "text_config": {"model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 32064},
    "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
}


def test_a_published_config_names_the_published_model():
    config = OpenVLAConfig.from_dict(PUBLISHED)
    dinov2, siglip = config.vision_configs
    assert (type(dinov2), type(siglip)) == (Dinov2WithRegistersConfig, SiglipVisionConfig)
    assert (dinov2.hidden_size, dinov2.num_hidden_layers, dinov2.num_register_tokens) == (1024, 24, 4)
    assert (siglip.hidden_size, siglip.num_hidden_layers, siglip.intermediate_size) == (1152, 27, 4304)
    assert (dinov2.hidden_act, siglip.hidden_act) == ("gelu", "gelu")
    assert (dinov2.layer_norm_eps, siglip.layer_norm_eps) == (1e-6, 1e-6)
    assert type(config.text_config) is LlamaConfig
    assert (config.text_config.rms_norm_eps, config.text_config.max_position_embeddings) == (1e-6, 2048)
    assert config.text_config.hidden_size == 4096
    assert (config.num_image_tokens, config.action_vocab_end, config.image_token_id) == (256, 32000, 32001)
    assert [config.vision_layers_built(tower) for tower in config.vision_configs] == [23, 26]


@pytest.mark.parametrize("backbone_id", PUBLISHED_VISION_BACKBONES)
def test_every_published_backbone_is_known(backbone_id):
    config = OpenVLAConfig.from_dict(PUBLISHED | {"vision_backbone_id": backbone_id})
    assert len(config.vision_configs) == 1 + backbone_id.startswith("dinosiglip")
    size = config.vision_config.image_size
    assert size == int(backbone_id.split("-")[-1].removesuffix("px") if "px" in backbone_id else 224)
    assert config.num_image_tokens == (size // config.vision_config.patch_size) ** 2


@pytest.mark.parametrize("config", [OpenVLAConfig.from_dict(PUBLISHED), tiny_config(), tiny_config(fused=False)])
def test_round_trip(config, tmp_path):
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not set(PUBLISHED_ONLY_FIELDS) & set(saved)
    assert saved["auto_map"] == AUTO_MAP
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is OpenVLAConfig
    again._name_or_path = config._name_or_path
    assert again.to_dict() == config.to_dict()


def test_a_dict_overrides_single_fields_of_a_tower():
    config = OpenVLAConfig.from_dict(PUBLISHED, vision_config={"num_hidden_layers": 4})
    assert (config.vision_config.num_hidden_layers, config.vision_config.hidden_size) == (4, 1024)
    assert config.fused_vision_config.num_hidden_layers == 27


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"vision_backbone_id": "resnet-50"},
            r"Unknown `vision_backbone_id` 'resnet-50'; this package builds dinosiglip-.*give `vision_config`",
        ),
        ({"vision_feature_layer": 1}, "counts from the last block and must be negative, got 1"),
        ({"vision_feature_layer": -25}, "reads below the first block of a tower of 24 layers"),
        ({"vision_config": {"image_size": 112}}, r"the same number of patches, got \[64, 256\]"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        OpenVLAConfig.from_dict(PUBLISHED | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_action_bins": 0}, "`n_action_bins` must be an integer from 2"),
        ({"n_action_bins": "256"}, "got '256'"),
        ({"n_action_bins": 32064}, "from 2 to 32063"),
        ({"n_action_bins": 32063}, "`n_action_bins=32063` does not fit a vocabulary of 32064 ids"),
        ({"pad_to_multiple_of": -5}, "`pad_to_multiple_of` must be an integer from 0"),
        ({"pad_to_multiple_of": 32000}, "of which `pad_to_multiple_of=32000` are padding"),
        ({"image_token_index": 99999}, "`image_token_index` must be an integer from 0 to 32063"),
        ({"image_token_index": 31900}, r"is an action id \(these are 31744 to 31999\)"),
        ({"prompt_suffix_token_id": -1}, "`prompt_suffix_token_id` must be an integer from 0"),
    ],
)
def test_ids_that_would_be_other_actions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OpenVLAConfig.from_dict(PUBLISHED | fields)


def test_the_default_config_has_the_published_language_model():
    default, published = OpenVLAConfig(), OpenVLAConfig.from_dict(PUBLISHED)
    assert (default.text_config.vocab_size, default.action_vocab_end) == (32064, 32000)
    assert default.text_config.max_position_embeddings == published.text_config.max_position_embeddings == 2048


@pytest.mark.parametrize(
    ("name", "hint"),
    [("gelo", "Did you mean 'gelu'"), ("warp", "Choose from 'gelu', "), (None, "Choose from"), (3, "Choose from")],
)
def test_an_unknown_activation_is_named(name, hint):
    with pytest.raises(ValueError, match=rf"^Unknown `projector_hidden_act` {name!r}. {hint}"):
        OpenVLAConfig.from_dict(PUBLISHED | {"projector_hidden_act": name})


OLD_TRANSFORMERS = """
import importlib.util, sys, types

sys.modules["transformers"] = types.ModuleType("transformers")  # has none of what is imported later
sys.modules["transformers"].__version__ = "4.57.0"
spec = importlib.util.spec_from_file_location("configuration_openvla", sys.argv[1])
try:
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
except ImportError as error:
    print(error)
"""


def test_an_old_version_of_transformers_gets_a_clear_error(run_python):
    result = run_python(OLD_TRANSFORMERS, configuration_openvla.__file__)
    assert result.stdout == (
        "This OpenVLA needs transformers >= 5.20, but 4.57.0 is installed: run `pip install -U transformers`.\n"
    )


OFT = {
    "num_images": 2,
    "action_decoding": "parallel",
    "action_head": "l1",
    "action_horizon": 8,
    "action_dim": 7,
    "proprio_dim": 8,
}


def test_a_plain_config_is_saved_without_the_fields_of_oft(tmp_path):
    config = tiny_config()
    assert not set(OFT_FIELDS) & set(config.to_dict())
    config.save_pretrained(tmp_path)
    assert not set(OFT_FIELDS) & set(json.loads((tmp_path / "config.json").read_text()))
    again = OpenVLAConfig.from_pretrained(tmp_path)
    assert (again.num_images, again.action_decoding, again.action_head) == (1, "autoregressive", "none")
    assert again.num_prefix_tokens == again.num_image_tokens


@pytest.mark.parametrize("fields", [OFT, {"num_images": 2}, {"proprio_dim": 3, "action_normalization": "bounds"}])
def test_a_config_with_fields_of_oft_keeps_all_of_them(tmp_path, fields):
    config = tiny_config(**fields)
    config.save_pretrained(tmp_path)
    assert set(OFT_FIELDS) <= set(json.loads((tmp_path / "config.json").read_text()))
    again = OpenVLAConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in OFT_FIELDS} == {name: getattr(config, name) for name in OFT_FIELDS}
    assert {name: getattr(again, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("fields", "extra"),
    [({}, 1), ({"proprio_dim": None}, 0), ({"action_head": "none"}, 1), ({"action_head": "diffusion"}, 2)],
)
def test_the_prefix_contains_all_images_the_state_and_the_diffusion_time(fields, extra):
    config = tiny_config(**OFT | fields)
    assert config.num_prefix_tokens == 2 * config.num_image_tokens + extra


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"action_decoding": "paralel"}, "Unknown `action_decoding` 'paralel'. Did you mean 'parallel'?"),
        ({"action_head": "L1"}, "Unknown `action_head` 'L1'"),
        ({"action_normalization": "normal"}, "Choose from 'q99', 'bounds'"),
        ({"num_images": 0}, "`num_images` must be a positive integer, got 0"),
        ({"action_horizon": True}, "`action_horizon` must be a positive integer, got True"),
        ({"proprio_dim": -1}, "`proprio_dim` must be a positive integer, got -1"),
        ({"diffusion_steps": 1.5}, "`diffusion_steps` must be a positive integer, got 1.5"),
        ({"action_dim": None}, "give `action_dim`"),
        ({"action_decoding": "autoregressive"}, "`action_head='l1'` needs `action_decoding='parallel'`"),
        (
            {"action_decoding": "autoregressive", "action_head": "none"},
            "`action_horizon=8` needs `action_decoding='parallel'`",
        ),
        ({"text_config": {"model_type": "llama", "vocab_size": 32064, "eos_token_id": None}}, "give `eos_token_id`"),
    ],
)
def test_fields_of_oft_that_do_not_fit_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OpenVLAConfig(**OFT | fields)
