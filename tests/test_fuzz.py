"""Calls of a policy in forms that hypothesis generates.

A valid form gives the action of the reference call: one PIL image with its instruction. An invalid form raises one of
this package's own errors. This command runs more examples of each test, and counts the forms:

    OPENVLA_FUZZ_EXAMPLES=5000 pytest tests/test_fuzz.py --hypothesis-show-statistics
"""

import base64
import io
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, event, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModel

import openvla_hf
from openvla_hf.testing import BRIDGE_LIKE_STATS, tiny_config, tiny_processor


EXAMPLES = int(os.environ.get("OPENVLA_FUZZ_EXAMPLES", "30"))
# Failing examples are not shrunk, which would take hundreds of predictions.
bounded = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, phases=[Phase.explicit, Phase.generate]
)

KEYS = {"arm": BRIDGE_LIKE_STATS, "gripper": {name: values[4:] for name, values in BRIDGE_LIKE_STATS.items()}}
PACKAGE = Path(openvla_hf.__file__).parent
numbers = itertools.count()


@pytest.fixture(scope="module")
def policy(tokenizer):
    """Model and processor in float64, so that a batch differs from its rows by less than any two logits differ."""
    config = tiny_config(tokenizer, norm_stats={key: {"action": stats} for key, stats in KEYS.items()})
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model, tiny_processor(tokenizer, config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


def pick(draw, options):
    """Draw one of a few values. `st.sampled_from` would convert all of them to text, and some are large."""
    return options[draw(st.integers(0, len(options) - 1))]


# Valid forms


def write(levels, folder, suffix="png", **options):
    path = folder / f"{next(numbers)}.{suffix}"
    Image.fromarray(levels).save(path, **options)
    return path


def read(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def in_mode(mode):
    def form(levels, folder):
        gray = Image.fromarray(levels).convert("L")
        image = (gray if mode == "LA" else Image.fromarray(levels)).convert(mode)
        return image, np.asarray(image.convert("RGB"))

    return form


def as_photo(levels, folder):
    exif = Image.Exif()
    exif[0x0112] = 1 + int(levels[0, 0, 0]) % 8  # orientation
    path = write(levels, folder, "jpg", exif=exif)
    return path, read(path)


def with_overshoot(levels, folder):
    floats = levels / 255 * 1.2 - 0.1
    return floats, np.rint(floats.clip(0, 1) * 255).astype(np.uint8)


def as_text(levels, folder):
    data = io.BytesIO()
    Image.fromarray(levels).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode(), levels


def as_gray(levels, folder):
    gray = levels[..., 0]
    return [gray, gray[..., None]][int(levels[0, 0, 1]) % 2], np.stack([gray] * 3, -1)


def as_is(change):
    return lambda levels, folder: (change(levels), levels)


FORMS = {
    **{f"PIL {mode}": in_mode(mode) for mode in ("RGB", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "1")},
    "uint8": as_is(np.copy),
    "int32": as_is(np.int32),
    "uint16": as_is(np.uint16),
    "float32": as_is(lambda levels: (levels / 255).astype(np.float32)),
    "float16": as_is(lambda levels: (levels / 255).astype(np.float16)),
    "float64 to 255": as_is(np.float64),
    "overshoot": with_overshoot,
    "gray": as_gray,
    "RGBA array": as_is(lambda levels: np.concatenate([levels, levels[..., :1]], -1)),
    "batch of one": as_is(lambda levels: levels[None]),
    "Fortran order": as_is(np.asfortranarray),
    "read-only": as_is(lambda levels: np.broadcast_to(levels, levels.shape)),
    "tensor": as_is(lambda levels: torch.from_numpy(levels.copy())),
    "float tensor": as_is(lambda levels: torch.from_numpy(levels / 255).float().requires_grad_()),
    "path": as_is(lambda levels: levels),
    "photo": as_photo,
    "base64": as_text,
}
CHANNELS_FIRST = {"uint8", "int32", "float32", "RGBA array", "tensor", "float tensor", "overshoot"}


def image_forms(draw, folder):
    """Draw an image in some form, with its levels (H, W, 3)."""
    height, width = (draw(st.one_of(st.integers(5, 40), st.just(1), st.just(200))) for _ in range(2))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    highest = draw(st.integers(16, 255))
    levels = rng.integers(0, highest + 1, (height, width, 3), dtype=np.uint8)
    levels.flat[-3:] = 0, highest, highest
    name = pick(draw, sorted(FORMS))
    form, levels = FORMS[name](levels, folder)
    if name == "path":
        form = pick(draw, [str, Path])(write(levels, folder))
    if name in CHANNELS_FIRST and 1 not in (height, width) and draw(st.booleans()):
        form, name = (
            form.permute(2, 0, 1) if isinstance(form, torch.Tensor) else form.transpose(2, 0, 1),
            name + " CHW",
        )
    event(f"image: {name}")
    return form, levels


words = st.sampled_from(["pick", "up", "the", "red", "Block", "<image>", "<IMAGE>", "and", "{instruction}", "7"])
# A word at each end, so that an instruction is neither empty nor ends in a full stop.
instructions = st.one_of(st.lists(words, max_size=5).map(" ".join), st.text(max_size=16)).map("Open {} up".format)


def processor_calls(draw, processor, images, texts):
    """Draw the positional and named arguments of a call, for images and their instructions."""
    only_paths = all(isinstance(image, str) for image in images)  # of two texts, the prompt comes first
    if len(images) == 1:
        images = pick(draw, [images[0], images, tuple(images)])
    one_text = len(set(texts)) == 1 and draw(st.booleans())
    prompts = [processor.build_prompt(text) for text in texts]
    texts, prompts = (texts[0], prompts[0]) if one_text else (texts, prompts)
    calls = [
        ((images,), {"instruction": texts}),
        ((), {"images": images, "instruction": texts}),
        ((), {"images": images, "text": prompts}),
        ((prompts, images), {}),
        ((images, prompts), {}),
    ]
    return pick(draw, calls[:-1] if only_paths else calls)


def pad_right(inputs):
    """Move the padding of the rows from the left to the right."""
    starts = inputs["attention_mask"].argmax(1)
    for name in ("input_ids", "attention_mask"):
        rows = zip(inputs[name], starts.tolist(), strict=True)
        inputs[name] = torch.stack([row.roll(-start) for row, start in rows])


def other_inputs(draw, inputs):
    """Draw another form of the same inputs."""
    inputs = dict(inputs)
    if draw(st.booleans()):
        pad_right(inputs)
    if bool(inputs["attention_mask"].all()) and draw(st.booleans()):
        inputs["attention_mask"] = None
    else:
        mask_type = pick(draw, [torch.int64, torch.bool, torch.int32, torch.float32])
        inputs["attention_mask"] = inputs["attention_mask"].to(mask_type)
    inputs["input_ids"] = inputs["input_ids"].to(pick(draw, [torch.int64, torch.int32]))
    container = pick(draw, [None, torch.Tensor.numpy, torch.Tensor.tolist])
    return {name: one if one is None or container is None else container(one) for name, one in inputs.items()}


def predictions(draw, model, inputs, keys):
    """Call the model in some form, and return the actions (B, A)."""
    unnorm_key = keys[0] if len(set(keys)) == 1 and draw(st.booleans()) else keys
    whose = {"unnorm_key": unnorm_key}
    if len(set(keys)) == 1 and draw(st.booleans()):
        whose = {"stats": KEYS[keys[0]]}
    way = pick(draw, ["predict_action", "details", "generate", "stream", "draft"])
    event(f"call: {way}")
    if way == "stream":
        stream = model.action_stream(unnorm_key)
        first, second = stream.predict_action(**inputs), stream.predict_action(**inputs)
        assert np.array_equal(first, second, equal_nan=True)
        assert stream.forward_passes == 1
        return np.atleast_2d(second)
    if way == "draft":
        shape = pick(draw, [(len(keys), 7), (1, 3), (5,), (20,), (0,)])
        seed = draw(st.integers(0, 99))
        whose["draft_token_ids"] = np.random.default_rng(seed).integers(
            -9, model.config.text_config.vocab_size + 9, shape
        )
    if way == "generate":
        whose["do_sample"] = False
    details = model.predict_action(**inputs, **whose, return_details=way == "details")
    return np.atleast_2d(details.actions if way == "details" else details)


@bounded
@given(data=st.data())
def test_every_valid_form_acts_as_the_reference(policy, folder, data):
    model, processor = policy
    rows = data.draw(st.integers(1, 3))
    images, levels = zip(*[image_forms(data.draw, folder) for _ in range(rows)], strict=True)
    texts = data.draw(st.lists(instructions, min_size=rows, max_size=rows))
    if data.draw(st.booleans()):
        texts = texts[:1] * rows
    keys = [pick(data.draw, sorted(KEYS)) for _ in range(rows)]
    expected = [
        model.predict_action(**processor(Image.fromarray(one), instruction=text), unnorm_key=key)
        for one, text, key in zip(levels, texts, keys, strict=True)
    ]
    args, kwargs = processor_calls(data.draw, processor, list(images), texts)
    kwargs["add_image_tokens"] = data.draw(st.booleans())
    kwargs |= pick(data.draw, [{}, {"padding": "max_length", "max_length": 200}])
    inputs = other_inputs(data.draw, processor(*args, **kwargs))
    actions = predictions(data.draw, model, inputs, keys)
    assert actions.shape == (rows, max(map(len, expected)))
    for row, one in zip(actions, expected, strict=True):
        assert np.array_equal(row[: len(one)], one)
        assert np.isnan(row[len(one) :]).all()


# Invalid forms


def some_pixels(low, high, dtype=np.float32):
    return np.linspace(low, high, 10 * 12 * 3).reshape(10, 12, 3).astype(dtype)


def bad_arrays():
    shapes = st.lists(st.sampled_from([0, 2, 5, 6, 7]), max_size=5).filter(lambda s: len(s) != 2 or 0 in s)
    spoilt = st.sampled_from([np.nan, np.inf, -np.inf])
    return st.one_of(
        shapes.map(lambda shape: np.zeros(shape, np.uint8)),
        spoilt.map(lambda value: np.where(some_pixels(0, 1) == 1, value, some_pixels(0, 1)).astype(np.float32)),
        st.floats(1.13, 15.9).map(lambda high: some_pixels(0, high)),
        st.floats(-1e6, -0.13).map(lambda low: some_pixels(low, 1)),
        st.floats(256, 1e6).map(lambda high: some_pixels(0, high)),
        st.integers(256, 60000).map(lambda high: some_pixels(0, high, np.uint16)),
        st.integers(-30000, -1).map(lambda low: some_pixels(low, 100, np.int32)),
        st.sampled_from([np.int8, np.uint16, np.int64]).map(lambda dtype: some_pixels(0, 1.9, dtype)),
        st.sampled_from([bool, np.complex64, object, "U3", "S2", "datetime64[s]"]).map(some_pixels(0, 1).astype),
    ).flatmap(lambda one: st.sampled_from([one, as_tensor(one)]))


def as_tensor(array):
    return torch.from_numpy(array) if array.dtype.kind in "biufc" and array.dtype != np.uint16 else array


def bad_pil_images():
    size = st.sampled_from([(4, 4), (30, 20)])
    modes = st.sampled_from(["I", "F", "I;16", "I;16B", "La"])
    empty = st.sampled_from([(0, 0), (0, 7), (7, 0)])
    return st.one_of(st.builds(Image.new, modes, size), st.builds(Image.new, st.sampled_from(["RGB", "L"]), empty))


def bad_files(draw, folder):
    """Draw a path or text without a valid image; files may be cut short or have changed bytes."""
    kind = pick(draw, ["cut", "bytes", "text", "absent", "folder", "empty"])
    if kind == "absent":
        return draw(st.text(max_size=30).filter(lambda text: not os.path.isfile(text) and "://" not in text))
    if kind == "folder":
        return folder
    suffix = pick(draw, ["png", "jpg", "webp", "bmp"])
    path = write(some_pixels(0, 255, np.uint8), folder, suffix)
    data = path.read_bytes()
    data = {
        "cut": data[: draw(st.integers(1, len(data) // 2))],
        "bytes": draw(st.binary(max_size=50)),
        "text": b"No image.",
        "empty": b"",
    }[kind]
    path.write_bytes(data)
    return path


def bad_images(draw, folder):
    kind = pick(draw, ["array", "PIL", "file", "URL", "type"])
    event(f"image: {kind}")
    if kind == "file":
        image = bad_files(draw, folder)
    elif kind == "URL":
        image = pick(draw, ["http://", "http://[", "https://127.0.0.1:9/x.png", "http://127.0.0.1:9"])
    elif kind == "type":
        image = pick(draw, [None, 3, 0.5, b"bytes", {}, set(), object(), [[1, 2]], [None], [], [[]]])
    else:
        image = draw(bad_arrays() if kind == "array" else bad_pil_images())
    return pick(draw, [image, [image], [some_pixels(0, 255, np.uint8), image]])


def bad_processor_calls(draw, model, processor, folder):
    """Draw a call of the processor whose images or texts are wrong."""
    image = some_pixels(0, 255, np.uint8)
    kind = pick(draw, ["image", "image", "text", "number", "arguments", "length"])
    if kind == "image":
        bad = bad_images(draw, folder)
        texts = pick(draw, ["open", ["open", "close"]])
        return lambda: processor(images=bad, instruction=texts)
    if kind == "text":
        text = draw(
            st.sampled_from(["", " ", "<image>", "<ima<image>ge>", 3, None, [], [""], ["open", 3], b"open", {}])
        )
        name = pick(draw, ["instruction", "text"])
        assume(name == "instruction" or not (isinstance(text, str) and text.strip()))
        return lambda: processor(images=image, **{name: text})
    if kind == "number":
        images, texts = pick(draw, [(1, 2), (2, 1), (2, 3), (3, 2)])
        return lambda: processor([image] * images, instruction=["open"] * texts)
    if kind == "length":
        return lambda: processor(image, instruction="open", truncation=True, max_length=draw(st.integers(1, 16)))
    call = draw(
        st.sampled_from(
            [
                lambda: processor(image),
                lambda: processor(),
                lambda: processor("open"),
                lambda: processor(image, "open", "close"),
                lambda: processor(image, image, instruction="open"),
                lambda: processor(image, instruction="open", text="open"),
                lambda: processor(image, instruction=processor.build_prompt("open")),
            ]
        )
    )
    return call


def bad_ids(draw, model, inputs):
    ids = inputs["input_ids"]
    kind = pick(draw, ["range", "dtype", "shape", "few", "many", "type", "long", "placeholder", "padding"])
    event(f"ids: {kind}")
    if kind == "range":
        ids = ids.clone()
        ids[-1, -1] = draw(st.integers(-(2**31), -1) | st.integers(model.config.text_config.vocab_size, 2**31 - 1))
    elif kind == "dtype":
        ids = ids.to(pick(draw, [torch.float32, torch.bool, torch.complex64]))
    elif kind == "shape":
        ids = pick(draw, [ids[0], ids[None], ids[:, :0], ids[:0], ids[0, 0]])
    elif kind == "type":
        ids = pick(draw, [None, "open", ["open"], 3, {}, [[1, 2], [3]], [[None]], np.array("open")])
    elif kind == "padding":
        count, pad = draw(st.integers(1, 20)), model.config.pad_token_id
        padded = [torch.nn.functional.pad(ids, sides, value=pad) for sides in ((count, 0), (0, count))]
        ids = pick(draw, padded)
        return inputs | {"input_ids": ids, "attention_mask": pick(draw, [None, torch.ones_like(ids)])}
    elif kind == "placeholder":
        other = draw(st.integers(0, model.config.text_config.vocab_size - 1))
        assume(other != model.config.image_token_id)
        ids = ids.masked_fill(ids == model.config.image_token_id, other)
        return inputs | {"input_ids": ids}
    elif kind == "few":
        ids = ids.clone()
        places = (ids[-1] == model.config.image_token_id).nonzero().flatten()
        ids[-1, places[: draw(st.integers(1, len(places) - 1))]] = 5
    else:
        count = draw(st.integers(1, 20)) if kind == "many" else 600
        token = model.config.image_token_id if kind == "many" else 5
        ids = torch.cat([ids, torch.full((len(ids), count), token)], dim=1)
    return inputs | {"input_ids": ids, "attention_mask": None}


def bad_pixels(draw, model, inputs):
    pixels = inputs["pixel_values"].clone()
    kind = pick(draw, ["value", "dtype", "shape", "type"])
    event(f"pixels: {kind}")
    if kind == "value":
        pixels[draw(st.integers(0, len(pixels) - 1))].view(-1)[draw(st.integers(0, 99))] = draw(
            st.sampled_from([np.nan, np.inf, -np.inf])
        )
    elif kind == "dtype":
        pixels = pixels.to(pick(draw, [torch.uint8, torch.int64, torch.bool, torch.complex64]))
    elif kind == "shape":
        pad = torch.nn.functional.pad
        choices = [
            pixels[:, :3], pixels[0], pixels[None], pixels[..., :-1], pixels[:0], pixels[:, :, :28, :28],
            pad(pixels, (0, 14)), pad(pixels, (0, 56, 0, 56)), pixels.repeat(2, 1, 1, 1), pixels.permute(0, 2, 3, 1),
        ]  # fmt: skip
        pixels = pick(draw, choices)
    else:
        pixels = pick(draw, [None, "image", 3, [], [[1.0], [2.0, 3.0]], {}, np.array(None)])
    return inputs | {"pixel_values": pixels}


def bad_masks(draw, model, inputs):
    mask = inputs["attention_mask"]
    hiding = mask.masked_fill(inputs["input_ids"] == model.config.image_token_id, 0)
    end = mask.clone()
    end[-1, -draw(st.integers(1, mask.shape[1] - 1)) :] = 0
    additive = torch.zeros(mask.shape).masked_fill(mask == 0, torch.finfo(torch.float32).min)
    others = [
        torch.zeros_like(mask), mask[:, 1:], mask[:, :-20], torch.cat([mask, mask], 1), mask[0], mask[None],
        mask[:, None, None], mask * 2, mask - 1, mask.float() + 0.5, mask.float() * np.nan, additive, hiding, end,
        "mask", 3, torch.cat([mask[:-1], torch.zeros_like(mask[-1:])]), torch.cat([mask, mask]), {}, [[1], [1, 1]],
    ]  # fmt: skip
    return inputs | {"attention_mask": pick(draw, others)}


def bad_stats(draw):
    name = pick(draw, ["q01", "q99", "mask", "min", "max"])
    values = list(BRIDGE_LIKE_STATS[name])
    spoilt = pick(draw, [np.nan, np.inf, None, "False", [0.0], "0.5", {}])
    whole = [None, [], values[:-1], [*values, values[-1]], [values], "values", 3, {}, [*values[:-1], spoilt]]
    damaged = [BRIDGE_LIKE_STATS | {name: pick(draw, whole)}]
    damaged.append({key: value for key, value in BRIDGE_LIKE_STATS.items() if key not in ("q01", name)})
    damaged.append(BRIDGE_LIKE_STATS | {"q01": BRIDGE_LIKE_STATS["q99"], "q99": BRIDGE_LIKE_STATS["q01"]})
    low, high = pick(draw, [("q01", "q99"), ("min", "max")])
    widest = pick(draw, [1.7e308, float(np.finfo(np.float64).max), 10**308])  # finite bounds, an infinite range
    damaged.append(BRIDGE_LIKE_STATS | {low: [-widest] * 7, high: [widest] * 7})
    damaged.append(BRIDGE_LIKE_STATS | {high: [*values[:-1], pick(draw, [np.inf, -np.inf, 10**400])]})
    return pick(draw, [*damaged, {}, [], "stats", 3])


def bad_arguments(draw, model, inputs):
    rows = len(inputs["input_ids"])
    kind = pick(draw, ["key", "stats", "draft", "sequences", "unknown", "decoding"])
    event(f"argument: {kind}")
    if kind == "key":
        no_keys = [None, "", "ar", "ARM", 3, ["arm"] * (rows + 1), [], ["arm"] * (rows - 1) + ["leg"], [None] * rows,
                   {"arm": 1}, [["arm"]] * rows, b"arm"]  # fmt: skip
        return inputs | {"unnorm_key": pick(draw, no_keys)}
    if kind == "stats":
        return inputs | {"stats": bad_stats(draw)}
    if kind == "draft":
        drafts = ["draft", [[1], [2, 3]], np.zeros((rows + 1, 7), int), np.zeros((1, rows, 7), int), {}, [None], [0.5],
                  3, [np.nan], np.zeros(7), ["1"]]  # fmt: skip
        return inputs | {"draft_token_ids": pick(draw, drafts)}
    if kind == "sequences":
        return inputs | {"do_sample": True, "num_return_sequences": draw(st.integers(2, 3))}
    if kind == "unknown":
        return inputs | {pick(draw, ["temprature", "unnorm", "image"]): 0.5}
    decoding = [{"temperature": "hot"}, {"temperature": -1.0}, {"num_beams": 0}, {"num_beams": "two"}, {"top_k": -1},
                {"top_p": "all"}, {"temperature": 0.0}]  # fmt: skip
    return inputs | {"do_sample": True} | pick(draw, decoding)


def bad_predictions(draw, model, processor, folder):
    """Draw a call of the model in which one argument is wrong."""
    rows = draw(st.integers(1, 2))
    image = some_pixels(0, 255, np.uint8)
    inputs = {**processor([image] * rows, instruction=["open", "pick up the red block"][:rows]), "unnorm_key": "arm"}
    kinds = {"ids": bad_ids, "pixels": bad_pixels, "mask": bad_masks, "argument": bad_arguments}
    kind = pick(draw, sorted(kinds))
    inputs = kinds[kind](draw, model, inputs)
    event(f"input: {kind}")
    if kind == "argument" or draw(st.booleans()):
        return lambda: model.predict_action(**inputs)
    return lambda: model.action_stream().predict_action(**inputs)


@bounded
@given(data=st.data())
def test_every_invalid_form_is_refused_in_one_sentence(policy, folder, data):
    bad_calls = pick(data.draw, [bad_processor_calls, bad_predictions])
    call = bad_calls(data.draw, *policy, folder)
    with pytest.raises((ValueError, TypeError, OSError)) as refused:
        call()
    message = str(refused.value)
    assert message.endswith("."), message
    assert not message[0].islower(), message
    # Raised by this package, not by a library that it calls.
    assert PACKAGE in refused.traceback[-1].path.parents, message
    event(refused.type.__name__)
