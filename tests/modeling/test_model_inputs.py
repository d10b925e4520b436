import pytest
import torch

from openvla_hf.modeling.model_inputs import append_prompt_suffix, insert_image_tokens, left_pad
from openvla_hf.testing import tiny_config


BOS, EOS, A, B = 1, 2, 10, 11


@pytest.fixture(scope="module")
def config():
    return tiny_config()


def row(*ids):
    return torch.tensor([ids])


def test_an_image_goes_after_bos_and_mask_and_labels_grow_with_it(config):
    pad, image = config.pad_token_id, [config.image_token_id] * config.num_image_tokens
    input_ids = torch.cat([row(pad, BOS, A, B), row(BOS, A, B, EOS), row(BOS, A, pad, pad)])
    mask = input_ids.ne(pad).long()
    labels = input_ids.masked_fill(mask == 0, -100)
    grown_ids, grown_mask, grown_labels = insert_image_tokens(config, input_ids, mask, labels)
    assert grown_ids.tolist() == [[pad, BOS, *image, A, B], [BOS, *image, A, B, EOS], [BOS, *image, A, pad, pad]]
    assert torch.equal(grown_mask, grown_ids.ne(pad).long())
    assert torch.equal(grown_labels != -100, grown_mask.bool() & (grown_ids != config.image_token_id))
    assert insert_image_tokens(config, input_ids[1:2])[0].tolist() == grown_ids[1:2].tolist()


def test_an_image_that_is_there_stays(config):
    image = [config.image_token_id] * config.num_image_tokens
    assert insert_image_tokens(config, row(BOS, *image, A))[0].tolist() == [[BOS, *image, A]]


def test_a_prompt_longer_than_an_image_gets_one(config):
    prompt = [BOS] + [A] * (2 * config.num_image_tokens)
    ids, _, _ = insert_image_tokens(config, row(*prompt))
    assert (ids[0, 1 : 1 + config.num_image_tokens] == config.image_token_id).all()
    assert ids.shape[1] == len(prompt) + config.num_image_tokens


def test_every_row_ends_in_its_last_token(config):
    pad = config.pad_token_id
    ids = torch.cat([row(BOS, A, pad, pad), row(pad, BOS, A, pad), row(pad, pad, BOS, A), row(BOS, A, B, EOS)])
    padded, mask = left_pad(ids, ids.ne(pad).long())
    assert padded.tolist() == [[pad, pad, BOS, A]] * 3 + [[BOS, A, B, EOS]]
    assert torch.equal(mask, padded.ne(pad).long())


def test_only_rows_without_the_suffix_get_it(config):
    config = tiny_config()
    pad, config.prompt_suffix_token_id = config.pad_token_id, B
    ids = torch.cat([row(BOS, A, A), row(BOS, A, B), row(pad, BOS, A)])
    grown, mask = append_prompt_suffix(config, ids, ids.ne(pad).long())
    assert grown.tolist() == [[BOS, A, A, B], [pad, BOS, A, B], [pad, BOS, A, B]]
    assert torch.equal(mask, grown.ne(pad).long())
    again = append_prompt_suffix(config, grown, mask)
    assert torch.equal(again[0], grown)
    config.prompt_suffix_token_id = None
    assert torch.equal(append_prompt_suffix(config, ids, mask)[0], ids)
