"""What is wrong with an input or a checkpoint is said in one sentence, with the way out."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from openvla_hf.checkpoint_info import describe
from openvla_hf.testing import BRIDGE_LIKE_STATS, fake_episode


SEVERAL = {"bridge_orig": {"action": BRIDGE_LIKE_STATS}, "fractal": {"action": BRIDGE_LIKE_STATS}}


@pytest.mark.parametrize(
    ("norm_stats", "arguments", "message"),
    [
        (SEVERAL, {}, "several action statistics: pass `unnorm_key=`, one of 'bridge_orig', 'fractal'"),
        (SEVERAL, {"unnorm_key": "bridge"}, "Unknown `unnorm_key` 'bridge'. Did you mean 'bridge_orig'"),
        ({}, {}, "no action statistics.*put a `dataset_statistics.json` beside its weights"),
        (SEVERAL, {"unnorm_key": ["fractal"]}, "Got 1 `unnorm_key`s for 2 observations: give one, or one for each"),
    ],
)
def test_statistics(tiny, norm_stats, arguments, message):
    model, processor = tiny(norm_stats=norm_stats)
    images = [frame["image"] for frame in fake_episode(steps=2)]
    with pytest.raises(ValueError, match=message):
        model.predict_action(**processor(images, instruction="open"), **arguments)


NAN = BRIDGE_LIKE_STATS | {"q99": [float("nan")] * 7}


@pytest.mark.parametrize("stats", [{}, {"q01": [0.0] * 7}, NAN, BRIDGE_LIKE_STATS | {"mask": ["False"] * 7}])
def test_damaged_statistics_do_not_act(tiny, stats):
    model, processor = tiny()
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
    with pytest.raises(ValueError, match="`stats`"):
        model.predict_action(**inputs, stats=stats)
    with pytest.raises(ValueError, match="`norm_stats`, 'action' of 'mine'"):
        model.norm_stats = {"mine": {"action": stats}}
    model.config.norm_stats = {"mine": {"action": stats}}
    with pytest.raises(ValueError, match="`norm_stats`, 'action' of 'mine'"):
        model.predict_action(**inputs)


def test_more_images_than_prompts(tiny):
    model, processor = tiny()
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
    pixel_values = inputs.pop("pixel_values").repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match="Got 2 images for 1 prompts: give one image with each prompt"):
        model.predict_action(**inputs, pixel_values=pixel_values)
    with pytest.raises(ValueError, match=r"must hold 16 image placeholders \(id \d+\) for each image: found 16 for 2"):
        model(**inputs, pixel_values=pixel_values)


@pytest.mark.parametrize("shape", [(1, 3, 56, 56), (6, 56, 56)])
def test_pixels_of_another_model(tiny, shape):
    model, processor = tiny()
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
    with pytest.raises(ValueError, match=r"must be \(batch, 6, height, width\) for 2 vision .* own processor"):
        model(**inputs | {"pixel_values": torch.zeros(shape)})


@torch.no_grad()
def test_ids_and_embeddings(tiny):
    model, processor = tiny()
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    for arguments in ({}, {"input_ids": inputs["input_ids"], "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="Give either `input_ids` or `inputs_embeds`"):
            model(**arguments)
    with pytest.raises(ValueError, match="`pixel_values` need `input_ids`, whose image placeholders say where"):
        model(inputs_embeds=embeddings, pixel_values=inputs["pixel_values"])


# Checkpoints


@pytest.fixture
def checkpoint(tiny, tmp_path):
    tiny()[0].save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "content",
    ["", '{"mine": {"act', "null", "{}", '{"mine": {}}', json.dumps({"mine": {"action": NAN}})],
)
def test_a_damaged_file_of_statistics(checkpoint, content):
    (checkpoint / "dataset_statistics.json").write_text(content)
    for read in (AutoModel.from_pretrained, describe):
        with pytest.raises(ValueError, match=r"dataset_statistics\.json"):
            read(checkpoint)


def test_damaged_statistics_in_a_config(checkpoint):
    (checkpoint / "dataset_statistics.json").unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"norm_stats": {"mine": {"action": NAN}}}))
    for read in (AutoModel.from_pretrained, describe):
        with pytest.raises(ValueError, match="'action' of 'mine': 'q99' must be a list of finite numbers"):
            read(checkpoint)


@pytest.mark.parametrize("file", ["action_head--150000_checkpoint.pt", "proprio_projector--50000_checkpoint.pt"])
def test_an_oft_checkpoint(checkpoint, file):
    (checkpoint / file).touch()
    with pytest.raises(ValueError, match=f"OpenVLA-OFT checkpoint .it holds '{file}'.*run it with the code of"):
        AutoModel.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.update({"action_head.fc1.weight": torch.zeros(2)}), "1 unexpected .*action_head.fc1"),
        (lambda weights: weights.pop("lm_head.weight"), "1 missing weights, such as 'lm_head.weight'"),
    ],
)
def test_weights_that_are_too_many_or_missing(checkpoint, change, message):
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{message}.*OpenVLA-OFT"):
        AutoModel.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: data[:4], lambda data: b"{}" * 99]
)
def test_a_damaged_file(checkpoint, damage):
    path = checkpoint / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match=r"corrupt or was cut short.*download it again, with `force_download=True`"):
        AutoModel.from_pretrained(checkpoint)


def test_a_missing_file(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors.*Copy the weights beside the config"):
        AutoModel.from_pretrained(checkpoint)


def test_pickled_weights_are_not_read(checkpoint):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            AutoModel.from_pretrained(checkpoint, **options)


def test_a_missing_shard(tiny, tmp_path):
    tiny()[0].save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[1]
    (tmp_path / shard).unlink()
    with pytest.raises(OSError, match=shard):
        AutoModel.from_pretrained(tmp_path)
