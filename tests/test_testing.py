import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from openvla_hf.testing import BRIDGE_LIKE_STATS, fake_episode, tiny_config, tiny_processor, tiny_tokenizer


def test_the_tokenizer_has_the_layout_of_openvlas():
    tokenizer = tiny_tokenizer(["open the drawer"])
    config = tiny_config(tokenizer)
    first, end = config.action_vocab_end - config.n_action_bins, config.action_vocab_end
    assert tokenizer.convert_ids_to_tokens([first, end - 1]) == ["<action_0>", "<action_255>"]
    assert (tokenizer.pad_token_id, config.image_token_id) == (end, end + 1)
    assert tokenizer("open")["input_ids"][0] == tokenizer.bos_token_id
    assert (
        tokenizer.decode(tokenizer("In: Öffne it\nOut:")["input_ids"], skip_special_tokens=True)
        == "In: Öffne it\nOut:"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"fused": False},
        {"image_size": 28, "patch_size": 7, "vision_width": 16, "vision_layers": 2, "text_layers": 1, "heads": 4},
    ],
)
def test_tiny_parts_predict_and_load_again(fields, tmp_path):
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer, **fields)
    model, processor = AutoModel.from_config(config), tiny_processor(tokenizer, config)
    frame = fake_episode()[0]
    inputs = processor(frame["image"], instruction=frame["instruction"])
    assert (inputs["input_ids"] == config.image_token_id).sum() == config.num_image_tokens
    action = model.predict_action(**inputs)
    assert action.shape == frame["action"].shape
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)(frame["image"], instruction=frame["instruction"])
    assert all(torch.equal(again[name], value) for name, value in inputs.items())
    assert np.array_equal(AutoModel.from_pretrained(tmp_path).predict_action(**again), action)


def test_episodes_repeat_with_their_seed_and_are_within_the_statistics():
    episode, again, other = fake_episode(seed=1), fake_episode(seed=1), fake_episode(seed=2)
    assert len(episode) == 5
    for frame, same, differs in zip(episode, again, other, strict=True):
        assert np.array_equal(frame["image"], same["image"])
        assert np.array_equal(frame["action"], same["action"])
        assert not np.array_equal(frame["action"], differs["action"])
        assert (frame["image"].dtype, frame["image"].shape) == (np.uint8, (64, 64, 3))
        assert (frame["action"] >= BRIDGE_LIKE_STATS["q01"]).all()
        assert (frame["action"] <= BRIDGE_LIKE_STATS["q99"]).all()
        assert frame["action"][-1] in (0, 1)
