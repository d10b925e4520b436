"""Cameras, state and images of published OpenVLA-OFT checkpoints."""

import json
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from openvla_hf.modeling.checkpoint_files import OFT_FILES
from openvla_hf.modeling.configuration_openvla import OpenVLAConfig
from openvla_hf.processing import OpenVLAImageProcessor, OpenVLAProcessor
from openvla_hf.processing.oft_presets import COMPONENTS, PLATFORMS


HEAD, PROJECTOR = "action_head--150000_checkpoint.pt", "proprio_projector--latest_checkpoint.pt"
REPO = "someone/oft"
CASES = ["oft-l1", "oft-l1-aloha", "oft-discrete", "oft-diffusion", "oft-film"]

pytestmark = pytest.mark.usefixtures("silent")


def fields_of(processor):
    images = processor.image_processor
    return processor.cameras, processor.state_dim, images.resample, images.center_crop_area


def oft(platform, state_dim="own"):
    preset = PLATFORMS[platform]
    return list(preset.cameras), preset.state_dim if state_dim == "own" else state_dim, "lanczos3", 0.9


PLAIN = (None, None, Image.Resampling.BICUBIC, None)


@pytest.fixture
def publish(recordings, tokenizer):
    """Return a function that writes a published folder without weights."""

    def write(folder, dims=(7, 8), files=(HEAD, PROJECTOR)):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "preprocessor_config.json"):
            shutil.copyfile(recordings("fused-224") / "checkpoint" / name, folder / name)
        tokenizer.save_pretrained(folder)
        rows = {key: [0.0] * size for key, size in zip(("action", "proprio"), dims, strict=True)}
        statistics = {"some_robot": {name: {"q01": row, "q99": row} for name, row in rows.items()}}
        (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
        for name in files:
            (folder / name).write_bytes(b"")
        return folder

    return write


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_published_folder_is_recognised_by_its_statistics(publish, tmp_path, platform):
    action_dim, state_dim, _ = PLATFORMS[platform]
    folder = publish(tmp_path / "any name", (action_dim, state_dim))
    for loader in (AutoProcessor, OpenVLAProcessor):
        assert fields_of(loader.from_pretrained(folder)) == oft(platform)


def test_a_folder_without_the_components_is_a_plain_checkpoint(publish, tmp_path):
    folder = publish(tmp_path / "libero-oft", files=())
    assert fields_of(AutoProcessor.from_pretrained(folder)) == PLAIN
    discrete = AutoProcessor.from_pretrained(folder, resample="lanczos3", center_crop_area=0.9)
    assert fields_of(discrete) == (None, None, "lanczos3", 0.9)


def test_without_a_projector_there_is_no_state(publish, tmp_path):
    folder = publish(tmp_path / "oft", files=[HEAD])
    for options in ({}, {"platform": "libero"}):
        assert fields_of(AutoProcessor.from_pretrained(folder, **options)) == oft("libero", state_dim=None)


def test_given_fields_take_precedence(publish, tmp_path):
    folder = publish(tmp_path / "oft")
    given = {"cameras": ["a", "b", "c"], "state_dim": 3, "resample": 3, "center_crop_area": None}
    assert fields_of(AutoProcessor.from_pretrained(folder, **given)) == tuple(given.values())
    assert fields_of(AutoProcessor.from_pretrained(folder, platform="bridge")) == oft("bridge")
    one = AutoProcessor.from_pretrained(folder, platform="libero", cameras=["front"])
    assert fields_of(one) == (["front"], 8, "lanczos3", 0.9)


def test_a_checkpoint_without_components_is_named_and_has_a_single_camera(publish, tmp_path):
    folder = publish(tmp_path / "discrete", files=())
    with pytest.raises(ValueError, match=r"no component files of OpenVLA-OFT, so `platform='aloha'` does not apply"):
        AutoProcessor.from_pretrained(folder, platform="aloha")
    with pytest.raises(ValueError, match=r"Unknown `action_decoding` 'paralel'\. Did you mean 'parallel'\?"):
        AutoProcessor.from_pretrained(folder, action_decoding="paralel")
    parallel = {"action_decoding": "parallel"}
    assert fields_of(AutoProcessor.from_pretrained(folder, **parallel)) == (None, None, "lanczos3", 0.9)
    parallel["platform"] = "aloha"
    discrete = (["full_image"], None, "lanczos3", 0.9)
    assert fields_of(AutoProcessor.from_pretrained(folder, **parallel)) == discrete
    given = {"cameras": ["front"], "state_dim": 3, "resample": 3, "center_crop_area": None}
    assert fields_of(AutoProcessor.from_pretrained(folder, **parallel, **given)) == tuple(given.values())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"action_decoding": "parallel"}))
    assert fields_of(AutoProcessor.from_pretrained(folder, platform="aloha")) == discrete


def test_recognised_fields_are_saved(publish, tmp_path):
    AutoProcessor.from_pretrained(publish(tmp_path / "oft", (14, 14))).save_pretrained(tmp_path / "saved")
    for options in ({}, {"platform": "aloha"}):
        assert fields_of(AutoProcessor.from_pretrained(tmp_path / "saved", **options)) == oft("aloha")


def test_a_saved_processor_keeps_its_fields_and_refuses_another_platform(publish, tmp_path):
    given = {"resample": 3, "center_crop_area": None}
    AutoProcessor.from_pretrained(publish(tmp_path / "oft"), **given).save_pretrained(tmp_path / "saved")
    saved = (*oft("libero")[:2], Image.Resampling.BICUBIC, None)
    assert fields_of(AutoProcessor.from_pretrained(tmp_path / "saved", platform="libero")) == saved
    for platform, message in (
        ("aloha", "saved with 2 cameras and 8 state dimensions, but the platform 'aloha' has 3 and 14: leave out"),
        ("bridge", "the platform 'bridge' has 1 and 7"),
        ("liberoo", "Unknown platform 'liberoo'"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoProcessor.from_pretrained(tmp_path / "saved", platform=platform)


def test_the_processor_and_the_model_look_for_the_same_files():
    assert set(COMPONENTS) == set(OFT_FILES)


def test_saved_fields_take_precedence_over_the_components_beside_them(publish, tmp_path):
    folder = publish(tmp_path / "oft")
    AutoProcessor.from_pretrained(folder, cameras=["front"], state_dim=3, center_crop_area=0.8).save_pretrained(folder)
    assert fields_of(AutoProcessor.from_pretrained(folder)) == (["front"], 3, "lanczos3", 0.8)


def test_the_cameras_of_an_unknown_robot_must_be_given(publish, tmp_path):
    folder = publish(tmp_path / "oft", (10, 12))
    with pytest.raises(ValueError, match=r"10 action and 12 state dimensions, which no .* `cameras=` .* `platform=`"):
        AutoProcessor.from_pretrained(folder)
    loaded = AutoProcessor.from_pretrained(folder, cameras=["front", "left"])
    assert fields_of(loaded) == (["front", "left"], 12, "lanczos3", 0.9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no dataset_statistics\.json: pass `platform=` \('libero', 'aloha', 'bridge'\), or `cameras=`"),
        ("[", "is damaged or was cut short"),
        ("[]", "same number of action and proprio dimensions"),
        ("{}", "same number of action and proprio dimensions"),
        ('{"a": {"action": {"q01": [0]}}}', "same number of action and proprio dimensions"),
        (
            '{"a": {"action": {"q01": [0]}, "proprio": {"q01": [0]}},'
            ' "b": {"action": {"q01": [0, 1]}, "proprio": {"q01": [0]}}}',
            "same number of action and proprio dimensions for all datasets: pass `platform=`",
        ),
    ],
)
def test_statistics_that_do_not_determine_the_platform(publish, tmp_path, content, message):
    folder = publish(tmp_path / "oft")
    statistics = folder / "dataset_statistics.json"
    statistics.unlink() if content is None else statistics.write_text(content)
    with pytest.raises(ValueError, match=message):
        AutoProcessor.from_pretrained(folder)
    assert fields_of(AutoProcessor.from_pretrained(folder, platform="libero")) == oft("libero")


def test_an_unknown_platform(publish, tmp_path):
    with pytest.raises(ValueError, match=r"Unknown platform 'liberoo'. Did you mean 'libero'\? Choose from 'libero'"):
        AutoProcessor.from_pretrained(publish(tmp_path / "oft"), platform="liberoo")


@pytest.fixture
def published(publish, owner, monkeypatch):
    """A published repository on a Hub whose client retries without waiting."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    return publish(owner.root / REPO)


def test_a_repository_is_recognised_without_a_download_of_its_components(published, owner):
    assert fields_of(AutoProcessor.from_pretrained(REPO)) == oft("libero")
    assert [request for request in owner.requests if request.endswith(".pt")] == []


def test_a_folder_of_a_repository_is_recognised_by_its_own_files(published, publish, owner):
    publish(published / "aloha", (14, 14))
    publish(published / "plain", files=())
    assert fields_of(AutoProcessor.from_pretrained(REPO, subfolder="aloha")) == oft("aloha")
    assert fields_of(AutoProcessor.from_pretrained(REPO, subfolder="plain")) == PLAIN
    assert fields_of(AutoProcessor.from_pretrained(REPO)) == oft("libero")


@pytest.mark.parametrize(
    ("status", "files"), [(500, ()), (403, (HEAD, PROJECTOR)), (0, (HEAD, PROJECTOR))], ids=["plain", "oft", "broken"]
)
def test_a_list_of_files_that_cannot_be_read_is_not_taken_for_empty(published, publish, owner, status, files):
    publish(owner.root / "someone/other", files=files)
    # The list of a commit. transformers itself also asks for the list of chat templates.
    owner.faults["/api/models/someone/other/tree/*[0-9a-f]"] = status
    with pytest.raises(OSError, match=r"Cannot read the list of files of someone/other, .* HF_HUB_OFFLINE=1"):
        AutoProcessor.from_pretrained("someone/other")
    owner.faults.clear()
    assert fields_of(AutoProcessor.from_pretrained("someone/other")) == (oft("libero") if files else PLAIN)


@pytest.mark.parametrize("files", [(), (HEAD, PROJECTOR)], ids=["plain", "oft"])
def test_a_repository_that_was_loaded_once_is_recognised_without_the_hub(
    published, publish, owner, monkeypatch, files
):
    publish(owner.root / "someone/other", files=files)
    expected = oft("libero") if files else PLAIN
    assert fields_of(AutoProcessor.from_pretrained("someone/other")) == expected
    owner.faults["*"] = 500
    assert fields_of(OpenVLAProcessor.from_pretrained("someone/other")) == expected
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fields_of(OpenVLAProcessor.from_pretrained("someone/other")) == expected


def test_without_a_list_the_files_in_the_cache_count_in_offline_mode(published, owner, monkeypatch, tmp_path):
    AutoProcessor.from_pretrained(REPO)
    (listing,) = (tmp_path / "cache").rglob("trees/*.json")
    monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})
    listing.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fields_of(OpenVLAProcessor.from_pretrained(REPO)) == PLAIN
    (snapshot,) = (tmp_path / "cache").glob("models--someone--oft/snapshots/*")
    for name in (HEAD, PROJECTOR):
        (snapshot / name).write_bytes(b"")
    assert fields_of(OpenVLAProcessor.from_pretrained(REPO)) == oft("libero")


def test_a_saved_processor_needs_no_list_of_files(tokenizer, owner):
    folder = owner.root / "someone/good"
    OpenVLAProcessor(OpenVLAImageProcessor(), tokenizer, cameras=["front"], state_dim=3).save_pretrained(folder)
    OpenVLAConfig().save_pretrained(folder)
    owner.faults["/api/models/someone/good/tree/*[0-9a-f]"] = 500
    loaded = AutoProcessor.from_pretrained("someone/good")
    assert (loaded.cameras, loaded.state_dim) == (["front"], 3)


@pytest.mark.parametrize("case", CASES)
def test_recorded_pixels_and_prompts_of_the_original(golden, tmp_path, case):
    recording, checkpoint = golden / case, tmp_path / "checkpoint"
    checkpoint.mkdir()
    for file in [*(golden / "fused-224/checkpoint").glob("tokenizer.*"), *(recording / "checkpoint").iterdir()]:
        (checkpoint / file.name).symlink_to(file)
    cases, expected = json.loads((recording / "cases.json").read_text()), load_file(recording / "expected.safetensors")
    platform = json.loads((recording / "tiny_dims.json").read_text())["oft"]["platform"]
    is_discrete = case == "oft-discrete"  # without component files
    fields = {"resample": "lanczos3", "center_crop_area": 0.9, "cameras": ["full_image"]} if is_discrete else {}
    processor = AutoProcessor.from_pretrained(checkpoint, **fields)
    assert fields_of(processor) == ((["full_image"], None, "lanczos3", 0.9) if is_discrete else oft(platform))
    uncropped = AutoProcessor.from_pretrained(checkpoint, **fields | {"resample": 3, "center_crop_area": None})
    state = None if is_discrete else np.zeros(processor.state_dim)

    def read(path):
        return Image.open(recording / path).convert("RGB")

    for index, (observation, processed) in enumerate(zip(cases["observations"], cases["processed"], strict=True)):
        cameras = {name: read(path) for name, path in observation.items()}
        prepared = dict(zip(processor.cameras, map(read, processed), strict=True))
        wanted = expected[f"pixel_values.{index}.sample"]
        for row, instruction in enumerate(cases["instructions"][:3]):
            inputs = uncropped(prepared, instruction=instruction, state=state, add_image_tokens=False)
            assert torch.equal(inputs["input_ids"][0], expected[f"prompt.{row}.input_ids"])
            assert torch.equal(inputs["pixel_values"][0, :, 3::8, 5::8], wanted)
        # The original compresses an image as JPEG unless it has the model's size.
        if all(image.size == (224, 224) for image in cameras.values()):
            pixels = processor(cameras, instruction="open", state=state)["pixel_values"]
            assert torch.equal(pixels, inputs["pixel_values"])
