"""Prepare instructions and camera images as the inputs of OpenVLA."""

import json
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, logging

from .image_processing_openvla import OpenVLAImageProcessor, find_file, select_hub_kwargs
from .observations import ObservationInputs, flatten_observations, read_state, refuse_several_cameras
from .oft_presets import IMAGE_FIELDS, check_saved_fields, is_parallel, read_oft_fields


QUESTION = "What action should the robot take to"
PURE_PROMPT = f"In: {QUESTION} {{instruction}}?\nOut:"
VICUNA_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    f"USER: {QUESTION} {{instruction}}? ASSISTANT:"
)

# Embodied Chain-of-Thought: the model continues with the task, its reasoning and the action.
REASONING_PROMPT = f"{VICUNA_PROMPT} TASK:"

# The row after <PAD> in the embedding, which is padded to a multiple of 64; no text has this id.
IMAGE_TOKEN_ID = 32001

logger = logging.get_logger(__name__)


class OpenVLAProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Options of a call, flat or in `text_kwargs` and `images_kwargs`, and their defaults."""

    _defaults = {  # noqa: RUF012
        "text_kwargs": {"padding": True, "truncation": False},
        "common_kwargs": {"return_tensors": "pt"},
    }


# The options of `ProcessingKwargs` that a call takes.
TEXT_OPTIONS = (
    "padding", "truncation", "max_length", "pad_to_multiple_of", "padding_side", "return_tensors",
    "return_mm_token_type_ids",
)  # fmt: skip
IMAGE_OPTIONS = ("return_tensors",)
PADDING = (True, False, "longest", "max_length", "do_not_pad")
RETURN_TYPES = ("pt", "np", None)


class OpenVLAProcessor(ProcessorMixin):
    r"""Convert images and instructions to `input_ids`, `attention_mask` and `pixel_values`.

    An image takes `num_image_tokens` placeholders after the BOS token, which the model replaces with the image's
    features.

    ```python
    inputs = processor(image, instruction="pick up the red block")  # fills the checkpoint's prompt template
    inputs = processor(prompt, image)  # a whole prompt, used as it is
    # With cameras=["full_image", "wrist_image"] and state_dim=8, as for OpenVLA-OFT on LIBERO:
    inputs = processor([image, wrist], instruction="pick up the red block", state=state)
    ```

    `from_pretrained` finds the cameras, the state and the evaluation's image options (`resample="lanczos3"`,
    `center_crop_area=0.9`) of a published OpenVLA-OFT checkpoint by its component files and the dimensions of its
    statistics. `platform="libero"`, `"aloha"` or `"bridge"` decides if the statistics do not. A policy without
    component files, which predicts action tokens in parallel, also needs `action_decoding="parallel"`, like the model.
    Prepare images as the original's clients do: turn those of LIBERO by 180 degrees, and stretch those of ALOHA to
    256 x 256 pixels with PIL's bicubic filter.

    `from_pretrained(..., reasoning=True)` uses the prompt of Embodied-CoT, whose checkpoints are otherwise saved like
    openvla-7b.

    Args:
        image_processor: Makes `pixel_values`.
        tokenizer: A tokenizer with a pad token. It is set to pad on the left: every row ends in its prompt.
        prompt_template: Text with `{instruction}` in it.
        lowercase_instruction: Whether `instruction=` is converted to lower case, as in OpenVLA's training data.
        strip_full_stop: Whether a final full stop of `instruction=` is left out. A full stop changes the actions of a
            checkpoint that was trained without one. OpenVLA's own training kept the full stops of its data; `finetune`
            leaves them out.
        image_token: Name of the placeholder; it is removed from instructions.
        image_token_id: Id of the placeholder. By default the tokenizer's own id of `image_token` if it knows
            it, else 32001, a row of the padded embedding that OpenVLA's tokenizer does not know.
        num_image_tokens: Patches of an image (256 at 224 pixels).
        cameras: Names of the cameras, whose images the model takes in this order; `None` for a single image.
        state_dim: Dimensions of the robot's state, in robot units; `None` if the model takes no state.

    Raises:
        ValueError: The template has no `{instruction}`, the tokenizer has no pad token, or the cameras are not
            different names.
    """

    def __init__(
        self,
        image_processor: OpenVLAImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        prompt_template: str = PURE_PROMPT,
        lowercase_instruction: bool = True,
        strip_full_stop: bool = False,
        image_token: str = "<image>",
        image_token_id: int | None = None,
        num_image_tokens: int = 256,
        cameras: Sequence[str] | None = None,
        state_dim: int | None = None,
    ):
        super().__init__(image_processor, tokenizer)
        if "{instruction}" not in prompt_template:
            raise ValueError(f"`prompt_template` must contain '{{instruction}}', got {prompt_template!r}.")
        if tokenizer.pad_token is None:
            raise ValueError(
                "The tokenizer has no pad token: call `tokenizer.add_special_tokens({'pad_token': '<PAD>'})`."
            )
        tokenizer.padding_side = "left"
        self.prompt_template = prompt_template
        self.lowercase_instruction = lowercase_instruction
        self.strip_full_stop = strip_full_stop
        self.image_token = image_token
        known_id: Any = tokenizer.convert_tokens_to_ids(image_token)
        if known_id in (None, tokenizer.unk_token_id):
            known_id = IMAGE_TOKEN_ID
        self.image_token_id: int = known_id if image_token_id is None else image_token_id
        self.num_image_tokens = num_image_tokens
        if cameras is not None and (
            not is_text(cameras) or isinstance(cameras, str) or len({*cameras}) < len(cameras)
        ):
            raise ValueError(f"`cameras` must be a list of different names, got {cameras!r}.")
        self.cameras = None if cameras is None else list(cameras)
        if state_dim is not None and not (isinstance(state_dim, int) and state_dim >= 1):
            raise ValueError(f"`state_dim` must be at least 1, or None for a model without state, got {state_dim!r}.")
        self.state_dim = state_dim

    def __call__(
        self,
        *args: Any,
        images: ImageInput | None = None,
        text: str | Sequence[str] | None = None,
        instruction: str | Sequence[str] | None = None,
        state: Any = None,
        add_image_tokens: bool = True,
        **kwargs: Unpack[OpenVLAProcessorKwargs],
    ) -> BatchFeature:
        """Prepare a batch of observations with one text each.

        Args:
            *args: The images with `instruction=`; else text and images in either order (if both are strings,
                the text comes first, as in the original).
            images: One observation or a list of them. Without `cameras`, an observation is an image, see
                `OpenVLAImageProcessor`. With `cameras`, it is a list of images in their order, or a dict from camera
                names to images.
            text: Whole prompts, which are not changed. A text without the prompt template's words gives a warning.
            instruction: Task of the robot, put into the prompt template. One str serves a whole batch. A final full
                stop gives a warning; with `strip_full_stop` it is left out, which is logged once.
            state: The robot's state (P,) or (B, P) in robot units, if `state_dim` is set: an array, a tensor or a
                list, which is copied.
            add_image_tokens: Whether to insert the placeholders; if not, the model inserts them.
            **kwargs: Options, flat or in `text_kwargs`, as in other processors of transformers:

                - padding: `True` (the default) to the longest, `"max_length"`, or `False`.
                - truncation: whether the end of a prompt that is longer than `max_length` is cut off.
                - max_length: tokens of a row with its placeholders; the tokenizer's limit by default.
                - pad_to_multiple_of, padding_side: as in the tokenizer's `pad`.
                - return_tensors: "pt" (the default), "np" or `None` for lists.
                - return_mm_token_type_ids: whether to add `mm_token_type_ids`, 1 for placeholders and 0 for text.

        Returns:
            `input_ids` and `attention_mask` (B, T), and `pixel_values` (B, 3 * towers * cameras, height, width) with
            all channels of the first camera first. With a state, `state` (B, P) float64, which `to` leaves as it is.

        Raises:
            ValueError: An image, a camera, a state or a text is missing or empty, their numbers differ, a state has
                another length or is not finite, a whole prompt is given as `instruction`, or a text contains an image
                placeholder besides the inserted ones.
            TypeError: There are too many arguments, or one has the wrong type.
        """
        text_kwargs, images_kwargs = self._read_options(**kwargs)
        images, text = self._sort_arguments(args, images, text, instruction)
        if instruction is None and not all(map(self._follows_template, as_list(text))):
            warnings.warn(
                f"The text does not follow this checkpoint's prompt template {self.prompt_template!r}. To fill the "
                "template, call processor(images, instruction=...).",
                stacklevel=2,
            )
        if instruction is not None and any(one.rstrip().endswith(".") for one in as_list(instruction)):
            if self.strip_full_stop:
                logger.warning_once(
                    "The final full stop of an instruction is left out, since this checkpoint was trained without one."
                )
            else:
                warnings.warn(
                    "The instruction ends in a full stop, which changes the actions of a checkpoint that was trained "
                    "without one. Leave it out, or set `strip_full_stop=True` for this processor.",
                    stacklevel=2,
                )
        pixel_values = self._process_observations(images, **images_kwargs)
        batch_size = len(pixel_values)
        prompts = as_list(text) * batch_size if isinstance(text, str) else as_list(text)
        if len(prompts) != batch_size:
            kind = "images" if self.cameras is None else "observations"
            raise ValueError(
                f"Got {len(prompts)} texts for {batch_size} {kind}: give one of the {kind} for each text, or a single "
                "text (a str) for all."
            )
        states = read_state(state, self.state_dim, batch_size)
        num_placeholders = self.num_image_tokens * len(self.cameras or [None]) if add_image_tokens else 0
        inputs = self._encode(prompts, num_placeholders, text_kwargs) | {"pixel_values": pixel_values}
        if states is not None:
            inputs["state"] = states
        return ObservationInputs(inputs, tensor_type=text_kwargs.get("return_tensors"))

    def _encode(self, prompts: list[str], num_placeholders: int, text_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Encode prompts as lists of ids and masks, with placeholders, truncated and padded as the options require."""
        placeholders = [self.image_token_id] * num_placeholders
        rows = self.tokenizer(prompts, verbose=False)["input_ids"]
        if placeholders and any(self.image_token_id in row for row in rows):
            raise ValueError(
                f"The text contains {self.image_token!r}, which this tokenizer reads as an image placeholder. Leave "
                "it out: the processor inserts the placeholders."
            )
        max_length = text_kwargs.get("max_length")
        if text_kwargs["truncation"]:
            room = (max_length or self.tokenizer.model_max_length) - len(placeholders)
            if room < 1:
                raise ValueError(
                    f"`max_length={max_length}` leaves no room for text after {len(placeholders)} image tokens."
                )
            rows = [row[:room] for row in rows]
        rows = [self._insert(placeholders, row) for row in rows]
        padding = text_kwargs["padding"]
        text_inputs = self.tokenizer.pad(
            {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]},
            padding=padding,
            max_length=max_length if padding == "max_length" else None,
            pad_to_multiple_of=text_kwargs.get("pad_to_multiple_of"),
            padding_side=text_kwargs.get("padding_side"),
        )
        if text_kwargs.get("return_mm_token_type_ids"):
            text_inputs["mm_token_type_ids"] = [
                [int(one == self.image_token_id) for one in row] for row in text_inputs["input_ids"]
            ]
        return text_inputs

    def _process_observations(self, images: Any, **images_kwargs: Any) -> Any:
        """Return the pixels (B, 3 * towers * cameras, height, width) of one observation or a batch."""
        if self.cameras is None:
            refuse_several_cameras(images)
            return self.image_processor(images, **images_kwargs)["pixel_values"]
        images = flatten_observations(images, self.cameras)
        pixel_values = self.image_processor(images, **images_kwargs)["pixel_values"]
        batch_size = len(images) // len(self.cameras)
        return pixel_values.reshape(batch_size, -1, *pixel_values.shape[2:])

    def _read_options(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split the options of a call into those for the text and those for the images."""
        groups = {"text_kwargs": TEXT_OPTIONS, "images_kwargs": IMAGE_OPTIONS, "common_kwargs": IMAGE_OPTIONS}
        given = [(kwargs.get(name, {}), known) for name, known in groups.items()]
        given.append(({name: value for name, value in kwargs.items() if name not in groups}, TEXT_OPTIONS))
        for options, known in given:  # transformers would only warn about unknown ones
            if not isinstance(options, dict):
                raise TypeError(f"Options of the processor must be a dictionary, got {options!r:.80}.")
            if unknown := sorted({*options} - {*known}):
                raise TypeError(f"The processor has no option {unknown[0]!r} here: give one of {', '.join(known)}.")
            if options.get("return_tensors") not in RETURN_TYPES:
                raise ValueError(
                    f"`return_tensors` must be 'pt', 'np' or None, got {options['return_tensors']!r:.80}."
                )
            if options.get("padding", True) not in PADDING:
                raise ValueError(f"`padding` must be True, False or 'max_length', got {options['padding']!r:.80}.")
        # Private, but the method by which all processors of transformers read their options.
        merged = self._merge_kwargs(OpenVLAProcessorKwargs, **kwargs)
        return merged["text_kwargs"], merged["images_kwargs"]

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Count the placeholders of images (height, width), for engines that plan their memory before a call.

        All images are resized to the same size, so they have the same number of placeholders. An observation has the
        placeholders of one image for each camera.
        """
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    def build_prompt(self, instruction: str) -> str:
        """Fill the prompt template, for prediction and training alike.

        Raises:
            ValueError: The instruction is empty or already a whole prompt.
            TypeError: The instruction is not a string.
        """
        if not isinstance(instruction, str):
            raise TypeError(f"An instruction must be a str, got {type(instruction).__name__}.")
        # An error rather than a warning: no model is trained on a prompt within a prompt.
        if self._is_whole_prompt(instruction):
            raise ValueError(
                f"The instruction is already a whole prompt: {instruction!r:.200}. Pass a whole prompt as `text=`, or "
                "only the task as `instruction=`."
            )
        if self.lowercase_instruction:
            instruction = instruction.lower()
        # The placeholder's name is removed, as in the original. A removal may form another one.
        while self.image_token in instruction:
            instruction = instruction.replace(self.image_token, "")
        instruction = instruction.strip()
        if self.strip_full_stop:
            instruction = instruction.rstrip(". ")
        if not instruction:
            raise ValueError("The instruction is empty: give a task, such as 'pick up the red block'.")
        return self.prompt_template.replace("{instruction}", instruction)

    def _template_parts(self) -> tuple[str, str]:
        """Return the prompt template's text before and after the instruction."""
        before, _, after = self.prompt_template.partition("{instruction}")
        return before.strip(), after.strip()

    def _follows_template(self, text: str) -> bool:
        """Return whether a text has the template's words around an instruction; more text may follow."""
        before, after = self._template_parts()
        start = text.find(before)
        return start >= 0 and text.find(after, start + len(before)) >= 0

    def _is_whole_prompt(self, instruction: str) -> bool:
        """Return whether an instruction looks like a filled template, ours or a published one; case is ignored."""
        before, after = (part.lower() for part in self._template_parts())
        instruction = instruction.strip().lower()
        if QUESTION.lower() in instruction:
            return True
        return before != "" and instruction.startswith(before) and instruction.endswith(after)

    def _sort_arguments(
        self, args: tuple[Any, ...], images: Any, text: Any, instruction: Any
    ) -> tuple[Any, str | list[str]]:
        """Find the images and the prompts among the accepted forms of a call."""
        if instruction is not None and text is not None:
            raise ValueError("Give `instruction=` (fills the template) or `text=` (a whole prompt), not both.")
        rest = list(args)
        if rest and text is None and instruction is None:
            text_second = len(rest) == 2 and not is_text(rest[0]) and is_text(rest[1])
            text = rest.pop(1 if text_second else 0)
        if rest and images is None:
            images = rest.pop(0)
        if rest:
            raise TypeError(
                "Too many arguments: call processor(images, instruction=...) or processor(prompt, images)."
            )
        texts = text if instruction is None else instruction
        if images is None or texts is None:
            raise ValueError(
                "An image or a text is missing: call processor(images, instruction=...) or processor(prompt, images). "
                "To process only one of them, use processor.image_processor or processor.tokenizer."
            )
        if not is_text(texts):
            raise TypeError(f"A text must be a str or a list of them, got {texts!r:.80}.")
        if instruction is None:
            if not all(each.strip() for each in as_list(texts)):
                raise ValueError(
                    "The text is empty: give a whole prompt, or `instruction=` to fill the prompt template."
                )
            return images, texts
        is_single = isinstance(texts, str)
        return images, self.build_prompt(texts) if is_single else [self.build_prompt(each) for each in texts]

    def _insert(self, placeholders: list[int], row: list[int]) -> list[int]:
        start = 1 if row[:1] == [self.tokenizer.bos_token_id] else 0
        return row[:start] + placeholders + row[start:]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, but `cameras` and `state_dim` only if they are set."""
        unset = {name for name in ("cameras", "state_dim") if getattr(self, name) is None}
        return {name: value for name, value in super().to_dict().items() if name not in unset}

    @classmethod
    def get_processor_dict(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        platform: str | None = None,
        action_decoding: str | None = None,
        reasoning: bool = False,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read our `processor_config.json`, or derive the fields from published files; given fields override both."""
        hub_kwargs = select_hub_kwargs(kwargs)
        find_file(pretrained_model_name_or_path, PROCESSOR_NAME, **hub_kwargs)  # raises if the Hub refuses the file
        fields, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        is_published = "prompt_template" not in fields
        config = {}
        if is_published or platform is not None:
            config_file = find_file(pretrained_model_name_or_path, CONFIG_NAME, **hub_kwargs)
            if config_file is not None:
                with open(config_file, encoding="utf-8") as file:
                    config = json.load(file)
        parallel = is_parallel(action_decoding, config)
        if is_published:
            fields |= read_published_fields(config)
            fields |= read_oft_fields(pretrained_model_name_or_path, platform, parallel, kwargs.keys(), **hub_kwargs)
        else:
            check_saved_fields(pretrained_model_name_or_path, platform, parallel, fields)
        if reasoning:
            fields["prompt_template"] = REASONING_PROMPT
        return fields, kwargs

    @classmethod
    def _get_arguments_from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        processor_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        # The Auto classes are not used: for published files they ask whether to trust remote code, and build a
        # LlamaTokenizer, which splits some texts differently from tokenizer.json. There is no other public way to
        # build the parts of a processor.
        saved = (processor_dict or {}).get("image_processor", {})
        image_fields = {name: saved[name] for name in IMAGE_FIELDS if name in saved}
        return [
            OpenVLAImageProcessor.from_pretrained(pretrained_model_name_or_path, **image_fields | kwargs),
            PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **select_hub_kwargs(kwargs)),
        ]


def read_published_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Derive the processor's fields from a published `config.json`.

    A language model that was trained from Vicuna (openvla-v01-7b) has Vicuna's chat prompt. The number of image tokens
    follows from the image size and the patch size in the towers' names.
    """
    fields: dict[str, Any] = {}
    if language_model := config.get("llm_backbone_id"):
        fields["prompt_template"] = VICUNA_PROMPT if language_model.startswith("vicuna") else PURE_PROMPT
    patch_size = re.search(r"patch(\d+)", "".join(config.get("timm_model_ids") or []))
    if patch_size and config.get("image_sizes"):
        fields["num_image_tokens"] = (config["image_sizes"][0] // int(patch_size[1])) ** 2
    return fields


def as_list(texts: str | Sequence[str]) -> list[str]:
    """Return a text or a batch of texts as a list."""
    return [texts] if isinstance(texts, str) else list(texts)


def is_text(value: Any) -> bool:
    """Return whether a value is a text or a batch of texts."""
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(each, str) for each in value)
    )


OpenVLAProcessor.register_for_auto_class()

__all__ = ["OpenVLAProcessor"]
