import pytest
import torch

from openvla_hf.modeling.model_inputs import insert_image_tokens, prepare_prompts
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


def test_existing_placeholders_stay(config):
    image = [config.image_token_id] * config.num_image_tokens
    assert insert_image_tokens(config, row(BOS, *image, A))[0].tolist() == [[BOS, *image, A]]


def test_a_prompt_longer_than_an_image_gets_one(config):
    prompt = [BOS] + [A] * (2 * config.num_image_tokens)
    ids, _, _ = insert_image_tokens(config, row(*prompt))
    assert (ids[0, 1 : 1 + config.num_image_tokens] == config.image_token_id).all()
    assert ids.shape[1] == len(prompt) + config.num_image_tokens


def test_every_row_ends_in_its_last_token(config):
    pad, image = config.pad_token_id, [config.image_token_id] * config.num_image_tokens
    rows = [(BOS, A, pad, pad), (pad, BOS, A, pad), (pad, pad, BOS, A), (BOS, A, B, EOS)]
    ids = torch.tensor(rows)
    padded, mask = prepare_prompts(config, ids, ids.ne(pad).long())
    assert padded.tolist() == [[pad, pad, BOS, *image, A]] * 3 + [[BOS, *image, A, B, EOS]]
    assert torch.equal(mask, padded.ne(pad).long())
    again = prepare_prompts(config, padded, mask)
    assert torch.equal(again[0], padded)
    assert torch.equal(again[1], mask)


def test_only_rows_without_the_suffix_get_it():
    config = tiny_config()
    pad, config.prompt_suffix_token_id = config.pad_token_id, B
    image = [config.image_token_id] * config.num_image_tokens
    ids = torch.tensor([(BOS, A, A), (BOS, A, B), (pad, BOS, A)])
    grown, mask = prepare_prompts(config, ids, ids.ne(pad).long())
    assert grown.tolist() == [[BOS, *image, A, A, B], [pad, BOS, *image, A, B], [pad, BOS, *image, A, B]]
    assert torch.equal(mask, grown.ne(pad).long())
    again = prepare_prompts(config, grown, mask)
    assert torch.equal(again[0], grown)
    config.prompt_suffix_token_id = None
    assert prepare_prompts(config, ids, ids.ne(pad).long())[0][:, -1].tolist() == [A, B, A]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int32])
def test_a_mask_of_any_dtype_marks_the_same_tokens(config, dtype):
    ids = torch.tensor([(config.pad_token_id, BOS, A), (BOS, A, B)])
    mask = ids.ne(config.pad_token_id)
    assert torch.equal(prepare_prompts(config, ids, mask.to(dtype))[1], prepare_prompts(config, ids, mask.long())[1])


def test_prompts_are_prepared_as_the_model_inserts_the_image(config):
    pad = config.pad_token_id
    ids = torch.tensor([(pad, BOS, A, B), (BOS, A, B, A)])
    mask = ids.ne(pad).long()
    for prepared, inserted in zip(
        prepare_prompts(config, ids, mask), insert_image_tokens(config, ids, mask)[:2], strict=True
    ):
        assert torch.equal(prepared, inserted)
