import json
import re
import sys
import warnings

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from interpreters import WITHOUT_THE_PACKAGE
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging

from openvla_hf.modeling.configuration_openvla import OpenVLAConfig
from openvla_hf.processing import OpenVLAImageProcessor, OpenVLAProcessor
from openvla_hf.processing.processing_openvla import (
    IMAGE_TOKEN_ID,
    PURE_PROMPT,
    VICUNA_PROMPT,
    read_published_fields,
)


CASES = ["fused-224", "siglip-224", "sharded"]


pytestmark = pytest.mark.usefixtures("silent")


@pytest.fixture
def expected(recorded, case):
    """Return the recorded tensors. The shards share those of the whole checkpoint."""
    return recorded("fused-224" if case == "sharded" else case).tensors


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trust_remote_code", [None, True])
@pytest.mark.parametrize("loader", [AutoProcessor, OpenVLAProcessor])
def test_published_checkpoints_load(recordings, case, trust_remote_code, loader):
    processor = loader.from_pretrained(recordings(case) / "checkpoint", trust_remote_code=trust_remote_code)
    assert type(processor) is OpenVLAProcessor
    assert type(processor.image_processor) is OpenVLAImageProcessor
    assert type(processor.tokenizer) is PreTrainedTokenizerFast
    assert processor.prompt_template == (VICUNA_PROMPT if case == "siglip-224" else PURE_PROMPT)
    assert (processor.image_token_id, processor.num_image_tokens) == (32001, 256)
    tokenizer = processor.tokenizer
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.padding_side) == ("<PAD>", 32000, "left")


@pytest.mark.parametrize("trust_remote_code", [None, True])
def test_the_other_auto_classes_on_published_checkpoints(recordings, trust_remote_code):
    checkpoint = recordings("fused-224") / "checkpoint"
    image_processor = AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    assert type(image_processor) is OpenVLAImageProcessor
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    assert type(tokenizer) is PreTrainedTokenizerFast


@pytest.mark.parametrize("case", CASES)
def test_recorded_prompts(recorded, expected, case):
    record, stride = recorded(case), recorded("fused-224").stride
    processor, image = record.processor, record.images[0]
    for index, prompt in enumerate(record.cases["prompts"]):
        ids = expected[f"prompt.{index}.input_ids"]
        plain = processor(prompt, image, add_image_tokens=False)
        assert torch.equal(plain["input_ids"], ids)
        assert torch.equal(plain["attention_mask"], expected[f"prompt.{index}.attention_mask"])
        assert torch.equal(plain["pixel_values"][..., ::stride, ::stride], expected["pixel_values"][:1])
        assert processor.tokenizer(prompt)["input_ids"] == ids[0].tolist()
        with_image = processor(prompt, image)["input_ids"][0].tolist()
        assert with_image == [1] + [32001] * 256 + ids[0, 1:].tolist()


@pytest.mark.parametrize("case", CASES)
def test_instructions_build_the_recorded_prompts(recorded, case):
    record = recorded(case)
    for instruction, prompt in list(zip(record.cases["instructions"], record.cases["prompts"], strict=False))[:3]:
        assert record.processor.build_prompt(instruction) == prompt


@pytest.mark.parametrize("case", CASES)
def test_recorded_batch(recorded, expected, case):
    record, stride = recorded(case), recorded("fused-224").stride
    batch = record.processor(record.cases["prompts"][:3], record.images, padding=True, add_image_tokens=False)
    ids, mask = expected["batched.input_ids"], expected["batched.attention_mask"]
    assert batch["input_ids"].shape == ids.shape
    for row in range(3):  # the same tokens; the original has its padding on the right
        length = int(mask[row].sum())
        assert torch.equal(batch["input_ids"][row, -length:], ids[row, :length])
        assert batch["attention_mask"][row].tolist() == mask[row].flip(0).tolist()
        assert (batch["input_ids"][row, :-length] == 32000).all()
    assert torch.equal(batch["pixel_values"][..., ::stride, ::stride], expected["pixel_values"])


def test_training_prompts_are_the_originals(recorded, recordings):
    samples = json.loads((recordings("action-tokenizer") / "expected.json").read_text())["training_samples"]
    for case, builder in (("fused-224", "pure"), ("siglip-224", "vicuna")):
        processor = recorded(case).processor
        for sample in samples:
            if sample["builder"] != builder or sample["instruction"] != sample["instruction"].strip():
                continue  # the original keeps outer spaces
            ids = processor.tokenizer(processor.build_prompt(sample["instruction"]))["input_ids"]
            action = sample["action_token_ids"]
            assert [*ids, 29871, *action, 2] == sample["input_ids"]


def test_all_call_forms_are_equal(processor, images):
    image, prompt = images[0], "In: What action should the robot take to pick up the red block?\nOut:"
    expected = processor(image, instruction=" Pick up the Red block ")
    for other in (
        processor(images=image, instruction="pick up the red block"),
        processor([image], instruction=["pick up the red block"]),
        processor(prompt, image),
        processor(image, prompt),
        processor([prompt], [image]),
        processor(images=image, text=prompt),
        processor(prompt, images=image),
        processor(image, text=prompt),
    ):
        assert list(other) == ["input_ids", "attention_mask", "pixel_values"]
        for key, value in expected.items():
            assert torch.equal(other[key], value)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "max_length", "max_length": 300},
        {"padding": False, "return_tensors": None},
        {"truncation": True, "max_length": 260, "return_tensors": "np"},
    ],
)
def test_options_may_be_in_text_kwargs_as_in_other_processors(processor, images, options):
    flat = processor(images[0], instruction="open the drawer", **options)
    grouped = processor(images[0], instruction="open the drawer", text_kwargs=options)
    assert type(flat["input_ids"]) is type(grouped["input_ids"])
    assert np.array_equal(np.asarray(flat["input_ids"]), np.asarray(grouped["input_ids"]))


def test_placeholders_can_be_told_from_text(processor, images):
    inputs = processor(images, instruction=["open", "red block", "up"], return_mm_token_type_ids=True)
    assert torch.equal(inputs["mm_token_type_ids"], (inputs["input_ids"] == processor.image_token_id).long())
    multiple = processor(images[0], instruction="open", pad_to_multiple_of=64, padding_side="right")["input_ids"][0]
    assert (len(multiple) % 64, int(multiple[0])) == (0, processor.tokenizer.bos_token_id)


def test_engines_learn_the_number_of_placeholders_before_a_call(processor, images):
    counted = processor._get_num_multimodal_tokens(image_sizes=[(480, 640), (224, 224)])
    rows = processor(images[:2], instruction="open")["input_ids"]
    assert counted.num_image_tokens == (rows == processor.image_token_id).sum(1).tolist()
    assert counted.num_image_patches == [1, 1]
    assert processor._get_num_multimodal_tokens().num_image_tokens is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"paddding": True}, TypeError, "no option 'paddding' here: give one of padding, truncation"),
        ({"text_kwargs": {"size": 3}}, TypeError, "no option 'size' here"),
        ({"images_kwargs": {"size": 3}}, TypeError, "no option 'size' here: give one of return_tensors"),
        ({"videos_kwargs": {}}, TypeError, "no option 'videos_kwargs' here"),
        ({"text_kwargs": 3}, TypeError, "must be a dictionary, got 3"),
        ({"return_tensors": "tf"}, ValueError, "must be 'pt', 'np' or None, got 'tf'"),
        ({"padding": "all"}, ValueError, "`padding` must be True, False or 'max_length', got 'all'"),
    ],
)
def test_options_that_the_processor_does_not_have(processor, images, options, error, message):
    with pytest.raises(error, match=message):
        processor(images[0], instruction="open", **options)


def test_paths_as_images(processor, images, tmp_path):
    path = str(tmp_path / "image.png")
    images[1].save(path)
    prompt = processor.build_prompt("open the drawer")
    expected = processor(images[1], prompt)
    for other in (processor(prompt, path), processor(images=path, text=prompt)):
        assert torch.equal(other["pixel_values"], expected["pixel_values"])
        assert torch.equal(other["input_ids"], expected["input_ids"])
    assert torch.equal(processor(path, instruction="open")["pixel_values"], expected["pixel_values"])


def test_whole_prompts_are_taken_as_they_are(processor, images):
    processor.prompt_template = "{instruction}"
    upper = processor("Red ", images[0], add_image_tokens=False)["input_ids"][0]
    assert processor.tokenizer.convert_ids_to_tokens(upper) == ["<s>", "Red"]
    processor.lowercase_instruction = False
    assert "Red" in processor.build_prompt("Red block")


def test_batches_are_padded_on_the_left_with_the_placeholders_after_bos(processor, images):
    instructions = ["pick up the red block", "open the drawer", "open"]
    batch = processor(images, instruction=instructions)
    width = batch["input_ids"].shape[1]
    for row, (image, instruction) in enumerate(zip(images, instructions, strict=True)):
        single = processor(image, instruction=instruction)
        length = single["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, width - length :], single["input_ids"][0])
        assert (batch["input_ids"][row, : width - length] == processor.tokenizer.pad_token_id).all()
        assert batch["attention_mask"][row].tolist() == [0] * (width - length) + [1] * length
        assert single["input_ids"][0, 0] == processor.tokenizer.bos_token_id
        assert (single["input_ids"][0, 1:257] == IMAGE_TOKEN_ID).all()
        assert (single["input_ids"] == IMAGE_TOKEN_ID).sum() == 256
        assert torch.equal(batch["pixel_values"][row], single["pixel_values"][0])


BARE = "does not follow this checkpoint's prompt template 'In: .* call processor.images, instruction="


@pytest.mark.parametrize(
    "text", ["pick up the red block", "In: pick up the block\nOut:", PURE_PROMPT[:-4], VICUNA_PROMPT]
)
def test_a_bare_instruction_given_as_text_warns_once(processor, images, text):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            inputs = processor(text, images[0])
        processor([processor.build_prompt("open"), text], images[:2])
    assert [re.search(BARE, str(one.message)) is not None for one in caught] == [True, True]  # a call each
    assert {one.filename for one in caught} == {__file__}
    assert torch.equal(inputs["input_ids"][0, 257:], torch.tensor(processor.tokenizer(text)["input_ids"][1:]))


def test_a_prompt_followed_by_more_text_is_still_a_prompt(processor, images):
    for more in ("", " ", " red block"):
        processor(processor.build_prompt("open") + more, images[0])


@pytest.mark.parametrize("template", [PURE_PROMPT, VICUNA_PROMPT, "In: {instruction}\nOut:", "Robot, {instruction}"])
@pytest.mark.parametrize("change", [str, str.upper, "\n{} ".format])
def test_a_whole_prompt_given_as_instruction_is_refused(processor, images, template, change):
    processor.prompt_template = template
    for published in (template, PURE_PROMPT, VICUNA_PROMPT):
        prompt = change(published.replace("{instruction}", "open the drawer"))
        with pytest.raises(ValueError, match=r"is already a whole prompt: .* Pass a whole prompt as `text=`"):
            processor(images[0], instruction=prompt)
        with pytest.raises(ValueError, match="The instruction is already a whole prompt"):
            processor(images[:2], instruction=["open", prompt])


STRIPPED = "The final full stop of an instruction is left out, since this checkpoint was trained without one."
FULL_STOP = "ends in a full stop, which changes the actions .* set `strip_full_stop=True`"


def test_a_final_full_stop_warns_once_or_is_stripped(processor, images, caplog):
    expected = processor(images[0], instruction="open the drawer")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            kept = processor(images[0], instruction="Open the drawer. ")
    assert [re.search(FULL_STOP, str(one.message)) is not None for one in caught] == [True]
    assert not torch.equal(kept["input_ids"], expected["input_ids"])
    processor.strip_full_stop = True
    logging.warning_once.cache_clear()  # another test may have caused this warning
    for instruction in ("open the drawer.", "Open the drawer . ", "open the drawer"):
        stripped = processor(images[0], instruction=instruction)
        assert torch.equal(stripped["input_ids"], expected["input_ids"])
    assert caplog.messages == [STRIPPED]
    assert processor.build_prompt("a 0.5 m drawer!").count(".") == 1
    with pytest.raises(ValueError, match="instruction is empty"):
        processor.build_prompt(". .")


IMAGE_NAMES = ["<IMAGE> open <image>", "<im<image>age> open", "open <<image>image>", "<im<im<IMAGE>age>age>open"]


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("instruction", IMAGE_NAMES)
def test_no_instruction_can_form_a_placeholder(processor, tokenizer, images, instruction, lowercase):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    own = OpenVLAProcessor(processor.image_processor, tokenizer, lowercase_instruction=lowercase, num_image_tokens=4)
    ids = own(images[0], instruction=instruction)["input_ids"][0]
    assert (ids == own.image_token_id).tolist() == [False] + [True] * 4 + [False] * (len(ids) - 5)
    ids = own(images[0], instruction=instruction, add_image_tokens=False)["input_ids"][0]
    assert not (ids == own.image_token_id).any()


def test_a_placeholder_in_a_whole_prompt_is_refused(processor, tokenizer, images):
    prompt = "<image>" + processor.build_prompt("open")
    assert (processor(prompt, images[0])["input_ids"] == processor.image_token_id).sum() == 256  # here it is text
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    own = OpenVLAProcessor(processor.image_processor, tokenizer, num_image_tokens=4)
    with pytest.raises(ValueError, match="contains '<image>', which this tokenizer reads as an image placeholder"):
        own(prompt, images[0])
    expanded = own("<image>" * 4 + own.build_prompt("open"), images[0], add_image_tokens=False)
    assert torch.equal(expanded["input_ids"], own(images[0], instruction="open")["input_ids"])


def test_one_instruction_serves_a_batch(processor, images):
    batch = processor(images, instruction="open the drawer")
    assert len(batch["input_ids"]) == 3
    assert (batch["input_ids"] == batch["input_ids"][0]).all()


def test_padding_and_truncation(processor, images):
    padded = processor(images[0], instruction="open", padding="max_length", max_length=300)
    assert padded["input_ids"].shape == (1, 300)
    cut = processor(images[0], instruction="open", truncation=True, max_length=260)
    assert cut["input_ids"].shape == (1, 260)
    assert torch.equal(cut["input_ids"], processor(images[0], instruction="open")["input_ids"][:, :260])
    assert processor(images[0], instruction="block " * 3000, truncation=True)["input_ids"].shape == (1, 2048)
    processor.prompt_template = "{instruction}"
    ragged = processor(images, ["open", "red block", "up"], padding=False, return_tensors=None)["input_ids"]
    assert [len(row) for row in ragged] == [258, 259, 258]
    arrays = processor(images[0], instruction="open", return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in arrays.values())


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (("image",), {"instruction": ""}, ValueError, "instruction is empty"),
        (("image",), {"instruction": " <image> "}, ValueError, "instruction is empty"),
        (("image",), {"instruction": ["open", "open"]}, ValueError, "Got 2 texts for 1 images"),
        (("image", "image"), {"instruction": "open"}, TypeError, "Too many arguments"),
        ((["image", "image"],), {"instruction": ["open"]}, ValueError, "Got 1 texts for 2 images"),
        (("image",), {"instruction": 3}, TypeError, "A text must be a str or a list of them, got 3"),
        (("image",), {"instruction": []}, TypeError, "A text must be a str"),
        (("image",), {}, ValueError, "An image or a text is missing"),
        (("open",), {}, ValueError, "An image or a text is missing"),
        ((), {"instruction": "open"}, ValueError, "An image or a text is missing"),
        ((PURE_PROMPT, "no_file.png"), {}, ValueError, "'no_file.png' is not a file"),
        (("image",), {"instruction": "open", "text": "open"}, ValueError, "not both"),
        (("image",), {"instruction": "open", "truncation": True, "max_length": 256}, ValueError, "leaves no room"),
        (("", "image"), {}, ValueError, "The text is empty: give a whole prompt, or `instruction=` to fill"),
        (("image",), {"text": " \n"}, ValueError, "The text is empty"),
        ((["image"] * 2,), {"text": [PURE_PROMPT, ""]}, ValueError, "The text is empty"),
    ],
)
def test_errors(processor, images, args, kwargs, error, message):
    def fill(value):
        return [fill(each) for each in value] if isinstance(value, list) else images[0] if value == "image" else value

    with pytest.raises(error, match=message):
        processor(*map(fill, args), **kwargs)


def test_bad_fields(processor, tokenizer):
    with pytest.raises(ValueError, match=r"must contain '.instruction.', got"):
        OpenVLAProcessor(processor.image_processor, tokenizer, prompt_template="Do it!")
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        OpenVLAProcessor(processor.image_processor, tokenizer)


def test_the_tokenizers_own_image_token_is_used(processor, tokenizer, images):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    own = OpenVLAProcessor(processor.image_processor, tokenizer, num_image_tokens=4)
    assert own.image_token_id == len(tokenizer) - 1
    assert own(images[0], instruction="open")["input_ids"][0, :6].tolist()[1:5] == [own.image_token_id] * 4
    assert OpenVLAProcessor(processor.image_processor, tokenizer, image_token_id=7).image_token_id == 7


def test_fields_of_published_configs():
    fields = read_published_fields(
        {
            "llm_backbone_id": "llama2-7b-pure",
            "image_sizes": [384, 384],
            "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_384"],
        }
    )
    assert fields == {"prompt_template": PURE_PROMPT, "num_image_tokens": 27 * 27}
    assert read_published_fields({}) == {}


def test_round_trip(tokenizer, images, tmp_path):
    processor = OpenVLAProcessor(
        OpenVLAImageProcessor("letterbox", 112, center_crop_area=0.9),
        tokenizer,
        prompt_template="Do {instruction}, {now}!",
        lowercase_instruction=False,
        strip_full_stop=True,
        image_token_id=30,
        num_image_tokens=64,
    )
    processor.save_pretrained(tmp_path)
    saved = {path.name for path in tmp_path.iterdir()}
    assert saved == {
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "image_processing_openvla.py",
        "image_resizing.py",
        "observations.py",
        "oft_presets.py",
        "processing_openvla.py",
    }
    expected = processor(images, instruction=["Red", "open", "up."])
    for loader in (AutoProcessor, OpenVLAProcessor):
        again = loader.from_pretrained(tmp_path)
        for key, value in again(images, instruction=["Red", "open", "up."]).items():
            assert torch.equal(value, expected[key])
        assert again.strip_full_stop
    assert AutoImageProcessor.from_pretrained(tmp_path).center_crop_area == 0.9
    changed = AutoProcessor.from_pretrained(tmp_path, prompt_template="{instruction}", center_crop_area=0.5)
    assert (changed.prompt_template, changed.image_processor.center_crop_area) == ("{instruction}", 0.5)


def test_a_saved_published_checkpoint_is_ours(recorded, tmp_path):
    processor = recorded("siglip-224").processor
    processor.save_pretrained(tmp_path)
    assert "ismatic" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))
    assert AutoProcessor.from_pretrained(tmp_path).prompt_template == VICUNA_PROMPT


def test_a_remote_copy_and_the_installed_package_coexist(processor, images, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    saved = tmp_path / "saved"
    processor.save_pretrained(saved)
    remote_class = get_class_from_dynamic_module("processing_openvla.OpenVLAProcessor", str(saved))
    assert remote_class is not OpenVLAProcessor
    assert type(AutoProcessor.from_pretrained(saved, trust_remote_code=True)) is OpenVLAProcessor
    expected = processor(images[0], instruction="open")
    for key, value in remote_class.from_pretrained(saved)(images[0], instruction="open").items():
        assert torch.equal(value, expected[key])


REMOTE = (
    WITHOUT_THE_PACKAGE
    + """
import sys

import numpy as np
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoProcessor

first, second, *paths = sys.argv[1:]
images = [Image.open(path) for path in paths]
for folder, target in ((first, second), (second, second + "/results")):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(processor).__module__.startswith("transformers_modules."), type(processor)
    image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images, instruction=["pick up the red block", "open"])
    assert (image_processor(images)["pixel_values"] == inputs["pixel_values"]).all()
    processor.save_pretrained(target)
    save_file({key: value.contiguous() for key, value in inputs.items()}, target + "/inputs.safetensors")
"""
)


def test_saved_code_works_without_the_package(processor, images, tmp_path, run_python):
    folders = [tmp_path / "saved", tmp_path / "saved_again", tmp_path / "saved_again" / "results"]
    processor.save_pretrained(folders[0])
    paths = [tmp_path / f"{index}.png" for index in range(2)]
    for path, image in zip(paths, images, strict=False):
        image.save(path)
    run_python(REMOTE, *folders[:2], *paths)
    expected = processor(images[:2], instruction=["pick up the red block", "open"])
    for folder in folders[1:]:
        inputs = load_file(folder / "inputs.safetensors")
        for key, value in expected.items():
            assert torch.equal(inputs[key], value)
        for name in ("image_processing_openvla.py", "processing_openvla.py", "processor_config.json"):
            assert (folder / name).read_text() == (folders[0] / name).read_text()


@pytest.fixture
def cropping(tokenizer, owner, monkeypatch):
    """A repository with two different image processor files, on a Hub whose client retries without waiting."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    folder = owner.root / "someone/good"
    OpenVLAImageProcessor().save_pretrained(folder)
    OpenVLAProcessor(OpenVLAImageProcessor(center_crop_area=0.9), tokenizer, strip_full_stop=True).save_pretrained(
        folder
    )
    OpenVLAConfig().save_pretrained(folder)
    assert (folder / "preprocessor_config.json").is_file()
    return folder


@pytest.mark.parametrize(
    ("loader", "status"),
    [
        (AutoProcessor, 403),
        (OpenVLAImageProcessor, 403),
        *((OpenVLAProcessor, status) for status in (401, 429, 500, 0)),
    ],
)
def test_a_processor_config_that_cannot_be_read_is_not_taken_for_absent(cropping, owner, loader, status):
    owner.faults["/someone/good/*/processor_config.json"] = status
    with pytest.raises(OSError, match="someone/good"):
        loader.from_pretrained("someone/good")
    owner.faults.clear()
    loaded = loader.from_pretrained("someone/good")
    assert getattr(loaded, "image_processor", loaded).center_crop_area == 0.9


def test_a_published_config_that_cannot_be_read_does_not_give_another_prompt(cropping, owner):
    (cropping / "processor_config.json").unlink()
    config = {"model_type": "openvla", "llm_backbone_id": "vicuna-v15-7b"}
    (cropping / "config.json").write_text(json.dumps(config))
    owner.faults["/someone/good/*/config.json"] = 403
    with pytest.raises(OSError, match=r"Cannot read config\.json of someone/good"):
        OpenVLAProcessor.from_pretrained("someone/good")
    owner.faults.clear()
    assert OpenVLAProcessor.from_pretrained("someone/good").prompt_template == VICUNA_PROMPT


def test_a_cached_checkpoint_without_a_processor_config_loads_without_the_hub(cropping, owner, monkeypatch):
    (cropping / "processor_config.json").unlink()
    OpenVLAProcessor.from_pretrained("someone/good")
    owner.faults["*"] = 500
    OpenVLAProcessor.from_pretrained("someone/good")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    OpenVLAProcessor.from_pretrained("someone/good")
