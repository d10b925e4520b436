"""Published OpenVLA-OFT checkpoints: fields that their files determine, fields to give, and refused checkpoints."""

import functools
import json
import os
import re
import shutil

import pytest
import torch
from film_reference import needs_export
from recordings import read_tower_overrides
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from openvla_hf import OpenVLAConfig
from openvla_hf.checkpoints.quantize import quantize
from openvla_hf.modeling.checkpoint_files import CheckpointFiles
from openvla_hf.modeling.film import film_backbone_weights
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.modeling.oft_loading import PLATFORMS, read_components, resolve_fields
from openvla_hf.processing import OpenVLAProcessor, oft_presets
from openvla_hf.testing import tiny_config, tiny_processor, write_tiny_oft


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a function that gives the folder of a checkpoint with some options, written once."""
    folder = tmp_path_factory.mktemp("written")
    return functools.cache(
        lambda options: write_tiny_oft(folder / "-".join(str(value) for _, value in options), **dict(options))
    )


@pytest.fixture
def oft(written, tmp_path):
    """Return a function that copies a checkpoint into the folder "oft", which may already contain files."""

    def copy(**options):
        source = written(tuple(sorted(options.items())))
        return shutil.copytree(source, tmp_path / "oft", dirs_exist_ok=True)

    return copy


LOADERS = [AutoModel, OpenVLAForActionPrediction]


def components(folder):
    return read_components(CheckpointFiles.locate(folder))


def fields(folder, platform=None, **given):
    return resolve_fields(components(folder), platform, given, folder)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("head", ["l1", "diffusion"])
def test_files_and_shapes_name_the_platform(oft, platform, head):
    expected = PLATFORMS[platform] | {"action_decoding": "parallel", "action_head": head, "use_film": False}
    assert fields(oft(platform=platform, head=head)) == expected


def test_weights_get_our_names_and_keep_their_values(oft):
    folder = oft(head="diffusion")
    head = torch.load(folder / "action_head--latest_checkpoint.pt")
    weights = components(folder).weights
    assert len(weights) == 16 + 4 + 4
    for ours, published in {
        "action_head.fc1.weight": "fc1.weight",
        "action_head.blocks.1.norm.bias": "mlp_resnet_blocks.1.ffn.0.bias",
        "action_head.blocks.0.linear.weight": "mlp_resnet_blocks.0.ffn.1.weight",
    }.items():
        assert torch.equal(weights[ours], head[f"module.noise_predictor.mlp_resnet.{published}"])
    assert weights["model.proprio_projector.fc1.weight"].shape == (64, 8)
    assert weights["model.noisy_action_projector.fc1.weight"].dtype == torch.float32


def test_given_fields_take_precedence_over_the_platform(oft):
    resolved = fields(oft(), "libero", num_images=1, action_horizon=4, action_normalization="bounds")
    assert (resolved["num_images"], resolved["action_horizon"], resolved["action_normalization"]) == (1, 4, "bounds")
    assert fields(oft(), num_images=1)["action_horizon"] == 8


def test_without_a_component_the_platform_must_be_named(oft):
    folder = oft(head="none", proprio=False)
    assert fields(folder, "libero", action_decoding="parallel") == PLATFORMS["libero"] | {
        "action_decoding": "parallel",
        "action_head": "none",
        "num_images": 1,
        "proprio_dim": None,
        "use_film": False,
    }
    with pytest.raises(ValueError, match=r"does not state `action_horizon`: pass `platform=`, one of 'libero', "):
        fields(folder, action_decoding="parallel")


def test_an_ambiguous_platform_is_asked_for(oft):
    folder = oft(proprio=False)
    message = (
        "oft does not state `num_images`, and several platforms have action_dim=7: pass `platform=`, one of "
        "'libero', 'bridge', or `num_images=`"
    )
    with pytest.raises(ValueError, match=message):
        fields(folder, proprio_dim=None)
    assert fields(folder, "bridge", proprio_dim=None)["action_horizon"] == 5


def test_two_arms_belong_to_one_platform(oft):
    resolved = fields(oft(platform="aloha", proprio=False), proprio_dim=None)
    assert (resolved["num_images"], resolved["proprio_dim"]) == (3, None)


def test_dimensions_of_no_platform_are_refused(oft):
    folder = oft()
    path = folder / "proprio_projector--latest_checkpoint.pt"
    torch.save(torch.load(path) | {"module.fc1.weight": torch.ones(64, 9)}, path)
    with pytest.raises(ValueError, match="no known platform has action_dim=7 and proprio_dim=9"):
        fields(folder)
    stated = {"num_images": 2, "action_horizon": 6, "action_normalization": "q99"}
    assert fields(folder, **stated)["proprio_dim"] == 9
    with pytest.raises(ValueError, match=r"is for proprio_dim=9, but the platform 'libero' has 8: pass another"):
        fields(folder, "libero")
    assert fields(folder, "libero", proprio_dim=9)["action_horizon"] == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"action_dim": 6}, r"`action_dim=6` contradicts action_head--latest_checkpoint.pt .* for action_dim=7"),
        ({"proprio_dim": None}, r"`proprio_dim=None` contradicts proprio_projector--latest_checkpoint.pt"),
        ({"action_head": "diffusion"}, r"`action_head='diffusion'` contradicts action_head--latest"),
        ({"action_decoding": "autoregressive"}, r"`action_decoding='autoregressive'` contradicts action_head--latest"),
        ({"use_film": True}, r"`use_film=True` needs a file vision_backbone--\*_checkpoint.pt, which .* lacks"),
        ({"platform": "liberoo"}, r"Unknown `platform` 'liberoo'. Did you mean 'libero'"),
    ],
)
def test_fields_that_contradict_the_files(oft, given, message):
    with pytest.raises(ValueError, match=message):
        fields(oft(), **given)


def test_a_missing_projector_of_the_state_is_not_left_out(oft):
    folder = oft()
    (folder / "proprio_projector--latest_checkpoint.pt").unlink()
    with pytest.raises(ValueError, match=r"no file proprio_projector--\*_checkpoint.pt: copy .*`proprio_dim=None`"):
        fields(folder, "libero")
    assert fields(folder, "libero", proprio_dim=None)["proprio_dim"] is None


def test_a_head_and_a_projector_of_noise_belong_together(oft):
    folder = oft(head="diffusion")
    projector = folder / "noisy_action_projector--latest_checkpoint.pt"
    content = projector.read_bytes()
    projector.unlink()
    with pytest.raises(ValueError, match=r"has a diffusion head .* without a file noisy_action_projector--\*"):
        components(folder)
    (oft(head="l1") / projector.name).write_bytes(content)
    with pytest.raises(ValueError, match=r"action_head--latest_checkpoint.pt is not a diffusion head"):
        components(folder)
    (folder / "action_head--latest_checkpoint.pt").unlink()
    with pytest.raises(ValueError, match=r"has noisy_action_projector--latest_checkpoint.pt, but has no action head"):
        components(folder)


def test_two_files_of_one_component(oft):
    oft(step="100")
    with pytest.raises(ValueError, match=r"2 files of the action_head \(action_head--100_.*, action_head--200_"):
        components(oft(step="200"))


@pytest.mark.parametrize("name", ["action_head--5.pt", "action_head--5_checkpoint.safetensors"])
def test_a_component_with_another_ending(oft, name):
    folder = oft(head="none", proprio=False)
    (folder / name).touch()
    with pytest.raises(ValueError, match=r"rename the file to action_head--STEP_checkpoint\.pt"):
        components(folder)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_component_does_not_run(oft, tmp_path):
    folder = oft()
    torch.save({"module.fc1.weight": Touch(tmp_path / "ran")}, folder / "proprio_projector--latest_checkpoint.pt")
    with pytest.raises(ValueError, match="could run code"):
        components(folder)
    assert not (tmp_path / "ran").exists()


def test_a_component_that_was_cut_short(oft):
    path = oft() / "action_head--latest_checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(OSError, match=r"action_head--latest_checkpoint\.pt is damaged or was cut short"):
        components(path.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, "is not a state dict"),
        (lambda state: state | {"module.step": 3}, "is not a state dict"),
        (
            lambda state: state | {"module.model.fc9.weight": torch.ones(2)},
            "has the unknown weight 'model.fc9.weight'",
        ),
        (lambda state: state | {"module.fc1.weight": torch.ones(2)}, "has the unknown weight 'fc1.weight'"),
        (lambda state: {"module.model.fc1.weight": torch.ones(2, 2)}, "lacks 'model.fc1.bias'"),
    ],
)
def test_weights_of_another_head(oft, change, message):
    path = oft() / "action_head--latest_checkpoint.pt"
    torch.save(change(torch.load(path)), path)
    with pytest.raises(ValueError, match=message):
        components(path.parent)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("head", ["l1", "diffusion"])
def test_a_loaded_model_has_the_weights_of_all_files(oft, silent, load, head):
    folder = oft(head=head)
    model, info = load.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert not model.training
    assert (model.config.action_head, model.config.num_images, model.config.action_horizon) == (head, 2, 8)
    state = model.state_dict()
    for name, tensor in components(folder).weights.items():
        assert torch.equal(state[name], tensor.float()), name
    plain = load_file(folder / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.items())
    assert len(state) == len(plain) + len(components(folder).weights)


@needs_export
def test_a_backbone_with_film_replaces_the_vision_weights_of_the_main_file(oft, silent):
    folder = oft(film=True)
    model = AutoModel.from_pretrained(folder)
    assert model.config.use_film
    backbone = model.model.vision_backbone
    published = torch.load(folder / "vision_backbone--latest_checkpoint.pt")
    expected = film_backbone_weights(backbone, published, "the file")
    assert set(expected) == set(dict(backbone.named_parameters()))
    assert all(torch.equal(parameter, expected[name]) for name, parameter in backbone.named_parameters())
    with pytest.raises(ValueError, match=r"`use_film=False` contradicts vision_backbone--latest_checkpoint\.pt"):
        AutoModel.from_pretrained(folder, use_film=False)


@pytest.mark.parametrize("load", LOADERS)
def test_fields_that_the_caller_gives_count_even_if_they_are_the_defaults(oft, load):
    config = load.from_pretrained(oft(), num_images=1).config
    assert (config.num_images, config.action_horizon) == (1, 8)
    given = {"platform": "aloha", "action_horizon": 1, "action_normalization": "q99"}
    config = load.from_pretrained(oft(platform="aloha"), **given).config
    assert (config.num_images, config.action_horizon, config.action_normalization) == (3, 1, "q99")
    assert "given_fields" not in config.to_dict()


@pytest.mark.parametrize("load", LOADERS)
def test_without_a_head_a_policy_of_parallel_tokens_is_named(oft, load):
    folder = oft(head="none", proprio=False)
    named = {"action_decoding": "parallel", "platform": "libero"}
    assert load.from_pretrained(folder).config.action_decoding == "autoregressive"
    config = load.from_pretrained(folder, **named, action_stop_token=False).config
    assert (config.action_decoding, config.action_head, config.num_images) == ("parallel", "none", 1)
    assert (config.action_horizon, config.proprio_dim, config.action_stop_token) == (8, None, False)
    with pytest.raises(ValueError, match="does not state `action_horizon`: pass `platform=`"):
        load.from_pretrained(folder, action_decoding="parallel")


@pytest.mark.parametrize("load", [*LOADERS, AutoProcessor, OpenVLAProcessor])
@pytest.mark.parametrize("given", [{}, {"action_decoding": "autoregressive"}])
def test_a_plain_checkpoint_has_no_platform(tmp_path, load, given):
    config = tiny_config()
    OpenVLAForActionPrediction(config).save_pretrained(tmp_path)
    tiny_processor(config=config).save_pretrained(tmp_path)
    load.from_pretrained(tmp_path, **given)
    message = r"`platform='libero'` does not apply\. Leave it out for a plain .* pass `action_decoding='parallel'`"
    with pytest.raises(ValueError, match=message):
        load.from_pretrained(tmp_path, platform="libero", **given)
    load.from_pretrained(tmp_path, platform="libero", action_decoding="parallel")


def test_a_recognised_platform_gives_a_warning_unless_it_is_named(oft, caplog):
    folder = oft()
    fields(folder)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in ("num_images=2, action_horizon=8, action_normalization='q99'", "Pass `platform='libero'`"):
        assert part in record.getMessage()
    caplog.clear()
    fields(folder, "libero")
    fields(folder, num_images=1, action_horizon=8, action_normalization="q99")
    assert caplog.records == []


def test_statistics_of_the_base_are_not_taken_for_those_of_the_policy(oft):
    folder = oft()
    path = folder / "dataset_statistics.json"
    statistics = json.loads(path.read_text())
    path.unlink()
    assert "norm_stats" in json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"has no dataset_statistics\.json, and the statistics in the config\.json"):
        AutoModel.from_pretrained(folder)
    assert AutoModel.from_pretrained(folder, norm_stats=statistics).norm_stats == statistics


def test_statistics_of_a_state_that_never_changes_are_refused(oft):
    path = oft() / "dataset_statistics.json"
    statistics = json.loads(path.read_text())
    statistics["tiny"]["proprio"] |= {"q01": [0.0] * 8, "q99": [0.0] * 8}
    path.write_text(json.dumps(statistics))
    with pytest.raises(ValueError, match="'proprio' of 'tiny': all dimensions are constant"):
        AutoModel.from_pretrained(path.parent)
    statistics["tiny"]["proprio"]["q99"][0] = 1.0
    path.write_text(json.dumps(statistics))
    AutoModel.from_pretrained(path.parent)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"action_dim": 6}, "`action_dim=6` contradicts action_head--latest_checkpoint.pt"),
        ({"platform": "kitchen"}, "Unknown `platform` 'kitchen'"),
        ({"action_normalization": "normal"}, "Unknown `action_normalization` 'normal'. Choose from 'q99', 'bounds'"),
    ],
)
def test_bad_fields_are_refused_whichever_class_loads(oft, load, given, message):
    with pytest.raises(ValueError, match=message):
        load.from_pretrained(oft(), **given)


def test_a_head_for_a_language_model_of_another_width(oft):
    path = oft() / "action_head--latest_checkpoint.pt"
    state = torch.load(path)
    torch.save(state | {"module.model.layer_norm1.weight": torch.ones(7 * 32)}, path)
    with pytest.raises(
        ValueError, match=r"another model: 'layer_norm1.weight' has the shape \(224,\) instead of \(448,\)"
    ):
        AutoModel.from_pretrained(path.parent)


def test_a_saved_model_is_one_checkpoint_that_states_all_its_fields(oft, tmp_path, silent):
    model = AutoModel.from_pretrained(oft())
    model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.pt"))
    for options in (
        {},
        {"platform": "libero"},
        {"device_map": "auto"},
        {"low_cpu_mem_usage": True},
        {"dtype": "auto"},
    ):
        again = AutoModel.from_pretrained(tmp_path / "saved", **options)
        assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
    for platform, message in (
        ("aloha", "states num_images=2 .*, but the platform 'aloha' has 3: leave out"),
        ("bridge", "states num_images=2 .*, but the platform 'bridge' has 1: leave out"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoModel.from_pretrained(tmp_path / "saved", platform=platform)


def test_a_saved_policy_without_a_state_has_its_platform(oft, tmp_path):
    named = {"action_decoding": "parallel", "platform": "libero"}
    AutoModel.from_pretrained(oft(head="none", proprio=False), **named).save_pretrained(tmp_path / "saved")
    assert AutoModel.from_pretrained(tmp_path / "saved", platform="libero").config.proprio_dim is None
    with pytest.raises(ValueError, match=r"states action_horizon=8 .*, but the platform 'bridge' has 5: leave out"):
        AutoModel.from_pretrained(tmp_path / "saved", platform="bridge")


@pytest.fixture(scope="module")
def saved(written, tmp_path_factory):
    """Checkpoints in our own layout: one of OpenVLA-OFT, and one of plain OpenVLA."""
    folder = tmp_path_factory.mktemp("saved")
    OpenVLAForActionPrediction.from_pretrained(written(())).save_pretrained(folder / "oft")
    torch.manual_seed(0)
    OpenVLAForActionPrediction(tiny_config()).save_pretrained(folder / "plain")
    return folder


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("given", "of_oft", "of_plain"),
    [
        ({"action_decoding": "paralel"}, "trained with action_decoding='parallel'", "Did you mean 'parallel'"),
        ({"action_head": "l1"}, None, "`action_head='l1'` needs `action_decoding='parallel'`"),
        ({"action_head": "none"}, "trained with action_head='l1'", None),
        ({"action_horizon": 0}, "`action_horizon=0` contradicts the config.json", "must be a positive integer, got 0"),
        ({"action_horizon": 4}, "trained with action_horizon=8", "`action_horizon=4` needs `action_decoding="),
        ({"action_normalization": "q98"}, "trained with action_normalization='q99'", "Did you mean 'q99'"),
        ({"num_images": "2"}, "`num_images='2'` contradicts", "`num_images` must be a positive integer, got '2'"),
        ({"action_decoding": "autoregressive"}, "trained with action_decoding='parallel'", None),
        ({"action_stop_token": False}, "trained with action_stop_token=True", None),
        ({"use_film": "yes"}, "trained with use_film=False", "`use_film` must be True or False, got 'yes'"),
    ],
)
def test_a_saved_policy_is_not_loaded_as_another(saved, silent, load, given, of_oft, of_plain):
    for kind, message in (("oft", of_oft), ("plain", of_plain)):
        if message is None:
            load.from_pretrained(saved / kind, **given)
            continue
        with pytest.raises(ValueError, match=re.escape(message)):
            load.from_pretrained(saved / kind, **given)


def test_a_config_that_contradicts_the_stored_one_is_refused(saved):
    config = OpenVLAConfig.from_pretrained(saved / "oft")
    assert OpenVLAForActionPrediction.from_pretrained(saved / "oft", config=config).config.num_images == 2
    config.num_images = 1
    with pytest.raises(ValueError, match=r"`num_images=1` contradicts the config.json of .*: leave out `num_images`"):
        OpenVLAForActionPrediction.from_pretrained(saved / "oft", config=config)


def test_several_images_without_parallel_decoding_stay_as_they_were_saved(tmp_path):
    OpenVLAForActionPrediction(tiny_config(num_images=2)).save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.num_images == 2
    with pytest.raises(ValueError, match="trained with num_images=2: leave out"):
        AutoModel.from_pretrained(tmp_path, num_images=1)


def test_a_model_saved_over_its_source_replaces_the_components(oft):
    folder = oft()
    model = AutoModel.from_pretrained(folder)
    torch.nn.init.ones_(model.action_head.fc2.bias)
    head = (folder / "action_head--latest_checkpoint.pt").read_bytes()
    model.save_pretrained(folder)
    assert not list(folder.glob("*.pt"))
    assert AutoModel.from_pretrained(folder).action_head.fc2.bias.eq(1).all()
    (folder / "action_head--latest_checkpoint.pt").write_bytes(head)
    with pytest.raises(ValueError, match=r"has the weights of the action_head twice, .*: delete action_head--"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"device_map": "auto"}, {"device_map": "cpu"}])
def test_components_get_the_data_type_and_device_of_the_model(oft, silent, options):
    model = AutoModel.from_pretrained(oft(head="diffusion"), **options)
    assert {parameter.dtype for parameter in model.parameters()} == {options.get("dtype", torch.float32)}
    expected = components(oft(head="diffusion")).weights["model.proprio_projector.fc1.weight"]
    assert torch.equal(model.model.proprio_projector.fc1.weight, expected.to(model.dtype))


def test_an_offloaded_head_is_not_left_empty(oft, tmp_path):
    device_map = {"model": "cpu", "lm_head": "cpu", "action_head": "disk"}
    with pytest.raises(
        ValueError, match=r"can't be loaded into a module that `device_map` offloads: .*save_pretrained"
    ):
        AutoModel.from_pretrained(oft(), device_map=device_map, offload_folder=tmp_path / "offloaded")


def test_a_checkpoint_with_components_is_saved_before_it_is_quantised_on_disk(oft, tmp_path):
    with pytest.raises(
        ValueError, match=r"component files \(action_head--.*save it with `save_pretrained`, and quantise"
    ):
        quantize(oft(), tmp_path / "small", "8bit")


def test_model_and_processor_agree_on_the_platforms():
    ours = {name: (one["action_dim"], one["proprio_dim"], one["num_images"]) for name, one in PLATFORMS.items()}
    assert ours == {name: (*one[:2], len(one.cameras)) for name, one in oft_presets.PLATFORMS.items()}


RECORDED = {
    "oft-l1": {},
    "oft-film": {},
    "oft-l1-aloha": {},
    "oft-diffusion": {},
    "oft-discrete": {"platform": "libero", "action_decoding": "parallel"},
}


@pytest.mark.parametrize("case", RECORDED)
def test_recorded_checkpoints_load_with_the_fields_of_their_training(golden, tmp_path, silent, case):
    folder = golden / case
    facts = json.loads((folder / "tiny_dims.json").read_text())["oft"]
    model = AutoModel.from_pretrained(folder / "checkpoint", **read_tower_overrides(folder), **RECORDED[case])
    config = model.config
    assert model.dtype == torch.bfloat16
    assert config.action_head == facts["head"].replace("discrete", "none")
    assert config.action_normalization == facts["normalization"].removeprefix("bounds_")
    names = {"num_images": "num_images", "action_horizon": "chunk", "action_dim": "action_dim"}
    for ours, original in (names | {"proprio_dim": "proprio_dim", "use_film": "use_film"}).items():
        assert getattr(config, ours) == facts[original], ours
    assert model.norm_stats == json.loads((folder / "checkpoint" / "dataset_statistics.json").read_text())
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    again = AutoModel.from_pretrained(tmp_path, device_map="auto")
    assert again.norm_stats == model.norm_stats
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
