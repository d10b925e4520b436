"""Errors about an input or a checkpoint say in one sentence what is wrong and what to do."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModel, GenerationConfig

from openvla_hf.checkpoints.describe import describe
from openvla_hf.checkpoints.quantize import quantize
from openvla_hf.modeling import action_tokenizer
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.processing.processing_openvla import OpenVLAProcessor
from openvla_hf.testing import BRIDGE_LIKE_STATS, fake_episode, tiny_config, tiny_processor


SEVERAL = {"bridge_orig": {"action": BRIDGE_LIKE_STATS}, "fractal": {"action": BRIDGE_LIKE_STATS}}


@pytest.mark.parametrize(
    ("norm_stats", "arguments", "message"),
    [
        (SEVERAL, {}, "several action statistics: pass `unnorm_key=`, one of 'bridge_orig', 'fractal'"),
        (SEVERAL, {"unnorm_key": "bridge"}, "Unknown `unnorm_key` 'bridge'. Did you mean 'bridge_orig'"),
        ({}, {}, "no action statistics.*put a `dataset_statistics.json` next to its weights"),
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


@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (6,), (7, 2)])
def test_ids_of_another_number_of_dimensions_are_not_decoded(tiny, shape):
    model, _ = tiny()
    with pytest.raises(ValueError, match="an action has 7 dimensions"):
        model.decode_actions(np.full(shape, model.config.action_vocab_end - 1))


def every_way_in(model):
    """Return all functions that take ids, images and a mask."""
    return [model, partial(model.generate, max_new_tokens=1), model.predict_action]


def test_more_images_than_prompts(tiny):
    model, processor = tiny()
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
    pixel_values = inputs.pop("pixel_values").repeat(2, 1, 1, 1)
    for call in every_way_in(model):
        with pytest.raises(ValueError, match="Got 2 observations for 1 prompt: pass one prompt for each observation"):
            call(**inputs, pixel_values=pixel_values)


@pytest.mark.parametrize("counts", [[15], [17], [3], [1], [32], [15, 17], [16, 0], [0, 16], [16, 16, 15]])
def test_placeholders_are_counted_in_each_row(tiny, counts):
    model, processor = tiny()
    assert model.config.num_image_tokens == 16
    inputs = processor([fake_episode(steps=1)[0]["image"]] * len(counts), instruction="open", add_image_tokens=False)
    rows = [
        [*row[:1], *[model.config.image_token_id] * count, *row[1:]]
        for row, count in zip(inputs["input_ids"].tolist(), counts, strict=True)
    ]
    inputs |= processor.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    row = next(i for i, count in enumerate(counts) if count != 16)
    for call in every_way_in(model):
        with pytest.raises(ValueError, match=rf"must have 16 image placeholders .* row {row} has {counts[row]}\."):
            call(**inputs)


@pytest.mark.parametrize("shape", [(1, 3, 56, 56), (6, 56, 56), (1, 6, 112, 112), (1, 6, 56, 70), (1, 6, 28, 28)])
def test_pixels_of_another_model(tiny, shape):
    model, processor = tiny()
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
    for call in every_way_in(model):
        with pytest.raises(
            ValueError, match=r"(must be .* of shape \(batch, 6, 56, 56\), got .* own pro|Got 6 observations)"
        ):
            call(**inputs | {"pixel_values": torch.zeros(shape)})


@pytest.mark.parametrize("tower", ["vision_config", "fused_vision_config"])
def test_a_single_tower_refuses_a_larger_image(tokenizer, tower):
    config = tiny_config(tokenizer)
    config.vision_config, config.fused_vision_config = getattr(config, tower), None
    model, processor = AutoModel.from_config(config).eval(), tiny_processor(tokenizer, config)
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
    model.predict_action(**inputs)
    larger = torch.nn.functional.pad(inputs["pixel_values"], (0, 56, 0, 56))
    for call in every_way_in(model):
        with pytest.raises(ValueError, match=r"of shape \(batch, 3, 56, 56\), got \(1, 3, 112, 112\)"):
            call(**inputs | {"pixel_values": larger})


def test_pixels_that_are_not_normalised(tiny):
    model, processor = tiny()
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
    with pytest.raises(ValueError, match=r"must be floating-point numbers .*, got .* of torch.uint8"):
        model.predict_action(**inputs | {"pixel_values": torch.zeros(1, 6, 56, 56, dtype=torch.uint8)})


@pytest.mark.parametrize("return_tensors", ["np", None])
@pytest.mark.parametrize("rows", [1, 3])
def test_arrays_and_lists_become_tensors(tiny, return_tensors, rows):
    model, processor = tiny()
    images = [frame["image"] for frame in fake_episode(steps=rows)]
    instructions = ["open", "pick up the red block", "push"][:rows]
    expected = model.predict_action(**processor(images, instruction=instructions))
    inputs = processor(images, instruction=instructions, return_tensors=return_tensors)
    assert not any(isinstance(value, torch.Tensor) for value in inputs.values())
    assert np.array_equal(model.predict_action(**inputs), expected)
    assert np.array_equal(model.action_stream().predict_action(**inputs), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float32])
def test_a_mask_of_ones_and_zeros_may_have_any_dtype(tiny, dtype):
    model, processor = tiny()
    images = [frame["image"] for frame in fake_episode(steps=2)]
    inputs = processor(images, instruction=["open", "pick up the red block"])
    expected = model.predict_action(**inputs)
    other = inputs | {"attention_mask": inputs["attention_mask"].to(dtype), "input_ids": inputs["input_ids"].int()}
    assert np.array_equal(model.predict_action(**other), expected)


@pytest.mark.parametrize("hidden", [slice(1, 17), slice(5, 6)])
def test_a_mask_that_hides_the_image_is_refused(tiny, hidden):
    model, processor = tiny()
    inputs = processor([frame["image"] for frame in fake_episode(steps=2)], instruction="open")
    inputs["attention_mask"][1, hidden] = 0
    with pytest.raises(ValueError, match="`attention_mask` hides tokens in the middle of row 1: "):
        model.predict_action(**inputs)


@pytest.mark.parametrize("add_image_tokens", [True, False])
@pytest.mark.parametrize("hidden", [0, -1, slice(-3, None)])
def test_a_mask_that_hides_bos_or_the_end_of_the_text_is_refused(tiny, add_image_tokens, hidden):
    model, processor = tiny()
    images = [frame["image"] for frame in fake_episode(steps=2)]
    inputs = processor(images, instruction="open", add_image_tokens=add_image_tokens)
    first = inputs["input_ids"][1, hidden].reshape(-1)[0]
    inputs["attention_mask"][1, hidden] = 0
    message = rf"`attention_mask` hides id {first} of row 1, which is not padding \(id {model.config.pad_token_id}\)"
    with pytest.raises(ValueError, match=message):
        model.predict_action(**inputs)


@pytest.mark.parametrize("add_image_tokens", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_its_mask_is_refused(tiny, side, add_image_tokens):
    model, processor = tiny()
    images = [frame["image"] for frame in fake_episode(steps=2)]
    texts = ["pick up the red block and the green cup", "open"]
    inputs = processor(images, instruction=texts, add_image_tokens=add_image_tokens)
    if side == "right":
        count = int(inputs["attention_mask"][1].sum())
        inputs["input_ids"][1] = inputs["input_ids"][1].roll(count)
    for mask in (None, torch.ones_like(inputs["input_ids"])):
        with pytest.raises(ValueError, match=r"Row 1 of `input_ids` contains padding .* that `attention_mask` does"):
            model.predict_action(inputs["input_ids"], inputs["pixel_values"], mask)
    alone = processor(images[0], instruction="open")
    expected = model.predict_action(**alone)
    assert np.array_equal(model.predict_action(alone["input_ids"], alone["pixel_values"]), expected)


@pytest.mark.parametrize("image_token_id", ["the next row", "an action", "a word"])
def test_a_processor_with_another_placeholder_is_refused(tiny, image_token_id):
    model, processor = tiny()
    config = model.config
    choices = {"the next row": config.image_token_id + 1, "an action": config.action_vocab_end - 5, "a word": 40}
    other = OpenVLAProcessor(
        processor.image_processor,
        processor.tokenizer,
        image_token_id=choices[image_token_id],
        num_image_tokens=config.num_image_tokens,
    )
    inputs = other([frame["image"] for frame in fake_episode(steps=2)], instruction=["open", "pick up"])
    with pytest.raises(ValueError, match=rf"contains {choices[image_token_id]} as image placeholders"):
        model.predict_action(**inputs)


@pytest.mark.parametrize("order", ["apart", "at the end", "after a word"])
def test_placeholders_elsewhere_are_refused(tiny, order):
    model, processor = tiny()
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
    bos, image, text = inputs["input_ids"][0].tensor_split([1, 17])
    rows = {
        "apart": [bos, image[:8], text[:1], image[8:], text[1:]],
        "at the end": [bos, text, image],
        "after a word": [bos, text[:1], image, text[1:]],
    }
    inputs["input_ids"] = torch.cat(rows[order])[None]
    for call in every_way_in(model) if order == "apart" else [model.predict_action]:
        with pytest.raises(ValueError, match=r"placeholders of row 0 .* are not side by side after the first token"):
            call(**inputs)


@pytest.mark.parametrize("name", ["input_ids", "pixel_values", "attention_mask"])
@pytest.mark.parametrize("change", [lambda one: one.to("meta"), lambda one: one.to_sparse()], ids=["meta", "sparse"])
def test_tensors_that_are_not_dense_values_are_refused(tiny, name, change):
    model, processor = tiny()
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=f"^`{name}` is a .*: pass a dense tensor with values"):
        model.predict_action(**inputs)


def test_a_stream_refuses_values_that_are_not_ids_at_every_step(tiny):
    model, processor = tiny()
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
    stream = model.action_stream()
    for _ in range(2):
        for wrong, message in ((None, "is neither a tensor nor"), (torch.tensor(3), "must be integers of shape")):
            with pytest.raises(ValueError, match=f"`input_ids` {message}"):
                stream.predict_action(wrong, inputs["pixel_values"])
        stream.predict_action(**inputs)


def test_statistics_are_checked_once_a_call_for_each_dataset(tiny, monkeypatch):
    model, processor = tiny(norm_stats=SEVERAL)
    checked = []
    check = action_tokenizer.check_action_stats
    monkeypatch.setattr(action_tokenizer, "check_action_stats", lambda *args: checked.append(args[1]) or check(*args))
    inputs = processor([frame["image"] for frame in fake_episode(steps=3)], instruction="open")
    model.predict_action(**inputs, unnorm_key=["fractal", "bridge_orig", "fractal"])
    assert len(checked) == 2
    model.get_action_stats("fractal")
    assert len(checked) == 2


@pytest.mark.parametrize("draft", ["draft", [None], [0.5], [[1], [2, 3]], np.zeros(7), {}, np.zeros((1, 2, 7), int)])
def test_a_draft_that_is_not_ids_is_refused(tiny, draft):
    model, processor = tiny()
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
    with pytest.raises(ValueError, match=r"`draft_token_ids` (of shape|is neither a tensor nor an array of numbers)"):
        model.predict_action(**inputs, draft_token_ids=draft)


@pytest.mark.parametrize("key", [{"tiny": 1}, ["tiny"], 3, b"tiny"])
def test_a_key_that_is_not_a_name_is_unknown(tiny, key):
    model, processor = tiny()
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
    with pytest.raises(ValueError, match="Unknown `unnorm_key`"):
        model.predict_action(**inputs, unnorm_key=[key])


@pytest.mark.parametrize(
    "decoding",
    [
        {"temprature": 0.5},
        {"num_beams": 0},
        {"temperature": "hot"},
        {"generation_config": 5},
        {"streamer": 5},
        {"past_key_values": 3},
    ],
)
def test_decoding_arguments_that_generate_does_not_take_are_named(tiny, decoding):
    model, processor = tiny()
    inputs = processor([fake_episode(steps=1)[0]["image"]] * 2, instruction="open")
    with pytest.raises(ValueError, match=rf"^`generate` rejected '{next(iter(decoding))}': .*\.$"):
        model.predict_action(**inputs, do_sample=True, **decoding)


def ragged(model, processor):
    images = [frame["image"] for frame in fake_episode(steps=2)]
    return processor(images, instruction=["open", "pick up"], padding=False, return_tensors=None)


def with_ids(change):
    def inputs(model, processor):
        inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
        return inputs | {"input_ids": change(inputs["input_ids"])}

    return inputs


def with_id(value):
    return with_ids(lambda ids: torch.cat([ids[:, :-1], torch.full_like(ids[:, -1:], value)], dim=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ragged, "`input_ids` is neither a tensor nor an array of numbers whose rows are equally long"),
        (with_ids(lambda ids: None), "`input_ids` is neither a tensor nor an array"),
        (with_ids(lambda ids: "open"), "`input_ids` is neither a tensor nor an array"),
        (with_ids(lambda ids: ids[0]), r"must be integers of shape \(batch, tokens\), got torch.int64 of shape"),
        (with_ids(lambda ids: ids.float()), r"must be integers of shape .*, got torch.float32"),
        (with_ids(lambda ids: ids[:0]), r"must be integers of shape .* of shape \(0, "),
        (with_ids(lambda ids: []), r"must be integers of shape .* of shape \(0,\)"),
        (with_id(31999), r"contains 31999, but this model's ids end at \d+: encode the prompt with"),
        (with_id(-1), "contains -1, but"),
    ],
)
def test_ids_of_another_kind_or_tokenizer(tiny, make, message):
    model, processor = tiny()
    with pytest.raises(ValueError, match=message):
        model.predict_action(**make(model, processor))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: mask[:, 1:], r"of shape \(2, \d+\) does not fit `input_ids` of shape \(2, \d+\)"),
        (lambda mask: torch.cat([mask, mask], dim=1), "does not fit `input_ids`"),
        (lambda mask: mask[:1], "does not fit `input_ids`"),
        (lambda mask: mask[:, None], "does not fit `input_ids`"),
        (lambda mask: (1.0 - mask) * torch.finfo(torch.float32).min, "must be 1 for tokens and 0 for padding"),
        (lambda mask: mask * 2, "must be 1 for tokens and 0 for padding"),
        (lambda mask: mask * torch.nan, "must be 1 for tokens and 0 for padding"),
        (lambda mask: mask * 0, "is 0 everywhere in row 0: mark its tokens with 1"),
        (lambda mask: mask * torch.tensor([[1], [0]]), "is 0 everywhere in row 1"),
    ],
)
@pytest.mark.parametrize("add_image_tokens", [True, False])
def test_masks_of_another_kind_or_length(tiny, change, message, add_image_tokens):
    model, processor = tiny()
    images = [frame["image"] for frame in fake_episode(steps=2)]
    inputs = processor(images, instruction=["open", "pick up"], add_image_tokens=add_image_tokens)
    with pytest.raises(ValueError, match=message):
        model.predict_action(**inputs | {"attention_mask": change(inputs["attention_mask"])})


def test_a_prompt_beyond_the_positions_of_the_language_model(tiny):
    model, processor = tiny()
    image, limit = fake_episode(steps=1)[0]["image"], model.config.text_config.max_position_embeddings
    steps = model.get_action_dim()
    length = processor(image, instruction="a")["input_ids"].shape[1]
    fits = limit - steps + 1
    inputs = processor(image, instruction="a" + "!" * (fits - length))
    assert inputs["input_ids"].shape[1] == fits
    assert model.predict_action(**inputs).shape == (steps,)
    inputs = processor([image] * 2, instruction=["open", "a" + "!" * (fits - length + 1)])
    for options in ({}, {"do_sample": True}):
        with pytest.raises(ValueError, match=f"{fits + 1} tokens, image included, .* exceed the {limit} positions"):
            model.predict_action(**inputs, **options)
    with pytest.raises(ValueError, match=f"and {steps} new tokens exceed the {limit} positions"):
        model.generate(**inputs, max_new_tokens=steps)
    assert model.generate(**inputs, max_new_tokens=steps - 1).shape == (2, limit + 1)
    with pytest.raises(ValueError, match=f"A prompt of {limit + 1} tokens.* and 1 new tokens exceed"):
        model.generate(input_ids=torch.full((1, limit + 1), 40))


def test_positions_are_not_an_argument_of_decoding(tiny):
    model, processor = tiny()
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
    with pytest.raises(ValueError, match="computes `position_ids` from `attention_mask`: leave them out"):
        model.predict_action(**inputs, position_ids=torch.zeros(1, 5))


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 2, "do_sample": True},
        {"num_return_sequences": 2, "num_beams": 2},
        {"generation_config": GenerationConfig(num_return_sequences=2, num_beams=2)},
    ],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_one_action_for_each_observation(tiny, options, rows):
    model, processor = tiny()
    inputs = processor([frame["image"] for frame in fake_episode(steps=rows)], instruction="open")
    with pytest.raises(ValueError, match=f"{2 * rows} actions for {rows} observations: leave out `num_return_seq"):
        model.predict_action(**inputs, **options)


def test_decoding_that_stops_early_is_refused(tiny):
    model, processor = tiny()
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
    with pytest.raises(ValueError, match=r"stopped after 1 of 7 action tokens: leave out .* such as `max_time`"):
        model.predict_action(**inputs, max_time=0.0)


def test_resizing_that_moves_the_action_ids(tiny):
    model, _ = tiny()
    rows, first_id = model.config.text_config.vocab_size, model.action_tokenizer.first_id
    for arguments in ((rows + 1,), (rows - 1,), (rows, 1000), (None, 1000)):
        for part in (model, model.model):
            with pytest.raises(ValueError, match=f"instead of {rows} would move the action ids"):
                part.resize_token_embeddings(*arguments)
    for arguments in ((), (rows,), (None, 1)):
        assert model.resize_token_embeddings(*arguments) is model.get_input_embeddings()
    assert (len(model.lm_head.weight), model.action_tokenizer.first_id) == (rows, first_id)


@torch.no_grad()
def test_ids_and_embeddings(tiny):
    model, processor = tiny()
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    for arguments in ({}, {"input_ids": inputs["input_ids"], "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="Give either `input_ids` or `inputs_embeds`"):
            model(**arguments)
    with pytest.raises(ValueError, match="`pixel_values` need `input_ids`, whose placeholders mark the place"):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.update({"action_head.fc1.weight": torch.zeros(2)}),
            "1 weight is unexpected .*action_head.fc1",
        ),
        (lambda weights: weights.pop("lm_head.weight"), r"1 weight is missing \(for example 'lm_head.weight'"),
    ],
)
def test_missing_or_unexpected_weights(checkpoint, change, message):
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{message}.*belong to different models"):
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
    with pytest.raises(OSError, match=r"no file named model\.safetensors.*copy the weights next to the config"):
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


@pytest.mark.parametrize(
    "name",
    [
        "w.bin",
        "../other.safetensors",
        "/else/w.safetensors",
        "inner/w.safetensors",
        "..\\w.safetensors",
        "",
        None,
        3,
    ],
)
@pytest.mark.parametrize("where", ["index", "config"])
def test_weights_are_safetensors_files_in_the_folder(tiny, tmp_path, name, where, monkeypatch):
    folder = tmp_path / "policy"
    model, processor = tiny()
    model.save_pretrained(folder, max_shard_size="100KB")
    processor.save_pretrained(folder)
    path = folder / ("model.safetensors.index.json" if where == "index" else "config.json")
    content = json.loads(path.read_text())
    if where == "index":
        content["weight_map"]["lm_head.weight"] = name
    else:
        content["transformers_weights"] = name
    path.write_text(json.dumps(content))
    opened = []
    for reader in ("torch.load", "safetensors.safe_open"):
        monkeypatch.setattr(reader, lambda *args, **kwargs: opened.append(args))
    for read in (AutoModel.from_pretrained, lambda source: quantize(source, tmp_path / "small", "8bit")):
        with pytest.raises(ValueError, match=rf"{path.name} of .* names the weights file .*only safetensors files"):
            read(folder)
    assert opened == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "b.safetensors"}}'])
def test_a_damaged_index(tiny, tmp_path, content):
    tiny()[0].save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json (of .*)?(is damaged|must contain)"):
        AutoModel.from_pretrained(tmp_path)


def test_weights_of_another_shape(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    for change in ({"lm_head.weight": weights["lm_head.weight"][:-1].contiguous()}, {"lm_head.weight": torch.ones(1)}):
        save_file(weights | change, checkpoint / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"1 weight has a different shape .*lm_head\.weight"):
            AutoModel.from_pretrained(checkpoint)


def test_a_folder_without_a_config(tiny, tmp_path):
    tiny()[0].save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    for read in (OpenVLAForActionPrediction.from_pretrained, describe):
        with pytest.raises((OSError, ValueError), match=r"is not an OpenVLA checkpoint: its config\.json is missing"):
            read(tmp_path)


def test_a_path_that_is_not_there():
    for read in (OpenVLAForActionPrediction.from_pretrained, describe):
        with pytest.raises(OSError, match=r"^/no/where is neither an existing folder nor a Hub id"):
            read("/no/where")


def test_consent_to_an_adapters_code_is_not_consent_to_that_of_its_base(tiny, tmp_path):
    model, _ = tiny()
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    model = AutoModel.from_pretrained(base)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(adapter)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "another"}))
    for path in base.glob("*.py"):
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(
        ValueError, match=r"is for 'another'\. The adapter .* load it yourself with `trust_remote_code=True`"
    ):
        OpenVLAForActionPrediction.from_pretrained(adapter, trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


def test_a_relative_base_that_is_elsewhere_is_named(tiny, tmp_path, owner):
    model, _ = tiny()
    model.save_pretrained(tmp_path / "base")
    model = AutoModel.from_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    for base, problem in (
        ("outputs/base", "is not a local folder"),
        ("../nowhere", "is neither an existing folder"),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
        with pytest.raises(
            OSError, match=rf"^Cannot load the base '{base}' that .* names: {base} {problem}.*yourself"
        ):
            OpenVLAForActionPrediction.from_pretrained(tmp_path / "adapter")
