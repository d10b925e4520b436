"""Check the processor: its prompts, its images, and whether it belongs to the model."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...data.augmentation import Augmentation
from ...modeling.checkpoint_files import OFT_FILES
from ...modeling.model_inputs import prepare_prompts
from ...processing.image_processing_openvla import (
    DINOV2_MEAN,
    DINOV2_STD,
    LANCZOS3,
    SIGLIP_MEAN,
    SIGLIP_STD,
    read_published_config,
)
from ...processing.oft_presets import IMAGE_FIELDS
from ...processing.processing_openvla import PURE_PROMPT, REASONING_PROMPT, VICUNA_PROMPT, read_published_fields
from .findings import Finding, Subject, failed, passed, warned


PREPROCESSOR_FILE = "preprocessor_config.json"
TEMPLATES = (PURE_PROMPT, VICUNA_PROMPT, REASONING_PROMPT)
# Llama-2's empty piece, which precedes the action ids, and the end of the ids of Llama-2's text.
EMPTY_PIECE, LLAMA_VOCABULARY = 29871, 32000
# Kind of a tower -> mean and deviation of its images.
TOWER_STATISTICS = {
    "dinov2_with_registers": (DINOV2_MEAN, DINOV2_STD),
    "siglip_vision_model": (SIGLIP_MEAN, SIGLIP_STD),
}
# Statistics rounded to 16 bits differ by less.
STATISTICS_TOLERANCE = 0.01
# Beginning of the keys of policies that the original code fine-tuned on LIBERO, always with random crops.
LIBERO = "libero_"
AGAIN = "Load the checkpoint's own processor, with `AutoProcessor.from_pretrained`"


def check_agreement(subject: Subject) -> Finding:
    """Check that the processor makes inputs of the shapes, ids and dimensions that the model takes."""
    config, processor = subject.config, subject.processor
    side = config.vision_config.image_size
    pairs: dict[str, tuple[Any, Any]] = {
        "image size": (dict(processor.image_processor.size), {"height": side, "width": side}),
        "vision towers": (len(processor.image_processor.image_mean), len(config.vision_configs)),
        "image tokens": (processor.num_image_tokens, config.num_image_tokens),
        "id of image tokens": (processor.image_token_id, config.image_token_id),
        "id of padding": (processor.tokenizer.pad_token_id, config.pad_token_id),
        "cameras": (len(processor.cameras or [None]), config.num_images),
        "state dimensions": (processor.state_dim, config.proprio_dim),
    }
    if wrong := [name for name, (ours, models) in pairs.items() if ours != models]:
        found = "; ".join(f"{name}: {pairs[name][0]} instead of {pairs[name][1]}" for name in wrong)
        return failed("processor and model", f"The processor does not fit the model ({found}).", f"{AGAIN}.")
    if len(processor.tokenizer) > config.text_config.vocab_size:
        found = f"The tokenizer has {len(processor.tokenizer)} ids, the model {config.text_config.vocab_size}."
        return failed("processor and model", found, f"{AGAIN}.")
    cameras = f"cameras: {', '.join(processor.cameras)}" if processor.cameras else "one camera"
    return passed("processor and model", f"{side} px, {cameras}, weights in {str(subject.model.dtype)[6:]}.")


def check_prompt(subject: Subject) -> Iterator[Finding]:
    """Check the template, the case and the full stop of prompts, and the id before the action ids."""
    processor, config = subject.processor, subject.config
    expected = (read_published_fields(subject.raw_config) | subject.preparation).get("prompt_template")
    if config.reasoning or processor.prompt_template == REASONING_PROMPT:
        expected = REASONING_PROMPT if config.reasoning else expected or PURE_PROMPT
    template = processor.prompt_template
    if expected is not None and template != expected:
        fix = f"{AGAIN}" + (" and `reasoning=True`." if config.reasoning else ".")
        yield failed(
            "prompt template", f"{template!r} instead of {expected!r}, with which the policy was trained.", fix
        )
    elif template not in TEMPLATES and _is_llama(config):
        fix = "If the policy was not trained with this template, set `prompt_template` to one of OpenVLA's."
        yield warned("prompt template", f"{template!r} is not one of OpenVLA's templates.", fix)
    else:
        yield passed("prompt template", repr(template))
    yield _check_form(subject)
    yield _check_suffix(subject)


def _check_form(subject: Subject) -> Finding:
    """Check the case of instructions and their final full stop."""
    name, processor = "prompt form", subject.processor
    recorded = _select(subject.preparation, "lowercase_instruction", "strip_full_stop")
    case = "in lower case" if processor.lowercase_instruction else "as given"
    stop = "left out" if processor.strip_full_stop else "kept"
    found = f"Instructions are {case}, and a final full stop is {stop}"
    if wrong := {field: value for field, value in recorded.items() if getattr(processor, field) != value}:
        fix = f"Set {', '.join(f'`{field}={value}`' for field, value in wrong.items())} of the processor."
        return failed(name, f"{found}, unlike in training.", fix)
    if not processor.lowercase_instruction and "lowercase_instruction" not in recorded:
        fix = "Set `lowercase_instruction=True`, unless the policy was trained with capitals."
        return warned(name, "Capitals are kept, but OpenVLA's training data have none.", fix)
    if not processor.strip_full_stop and not recorded and "arguments" in subject.training:
        # The first trainings that recorded their arguments kept full stops, all later ones did not.
        fix = "Set `strip_full_stop=True`, unless the policy was trained with full stops."
        return warned(name, "A final full stop is kept, but most policies of this kind were trained without.", fix)
    return passed(name, f"{found} ({'as in training' if recorded else 'the training is not recorded'}).")


def _select(recorded: dict[str, Any], *fields: str) -> dict[str, Any]:
    """Return some fields of a record, as far as it contains them."""
    return {field: recorded[field] for field in fields if field in recorded}


def _is_llama(config: Any) -> bool:
    """Whether the language model has the vocabulary of Llama-2, as all published checkpoints."""
    return config.text_config.model_type == "llama" and config.action_vocab_end == LLAMA_VOCABULARY


def _check_suffix(subject: Subject) -> Finding:
    """Check that the prompts of a Llama-2 policy end in exactly one empty piece."""
    name, config = "prompt suffix", subject.config
    tokenizer = subject.processor.tokenizer
    recorded = _select(subject.preparation, "prompt_suffix_token_id")
    usual = EMPTY_PIECE if _is_llama(config) and not config.reasoning else None
    expected = recorded.get("prompt_suffix_token_id", usual)
    given = config.prompt_suffix_token_id
    if given != expected and (_is_llama(config) or config.reasoning or recorded):
        fix = f"Set `prompt_suffix_token_id` of the config to {expected}."
        return failed(name, f"Prompts end in id {given} instead of {expected}.", fix)
    row = tokenizer(subject.processor.build_prompt("open the drawer"))["input_ids"]
    ids = prepare_prompts(config, [row])[0][0].tolist()
    if given is not None and ids[-2] == given:
        return failed(name, f"Prompts end in id {given} twice.", "Load the checkpoint's own tokenizer.")
    bos = config.text_config.bos_token_id
    if bos is not None and (ids[0] != bos or ids.count(bos) != 1):
        found = f"Prompts begin with the ids {ids[:2]} instead of one {bos} (BOS)."
        return failed(name, found, "Load the checkpoint's own tokenizer, which adds BOS once.")
    known = "as in training" if recorded else "the training is not recorded"
    return passed(name, f"None ({known})." if given is None else f"Prompts end in id {given} once.")


def check_images(subject: Subject) -> Iterator[Finding]:
    """Check the resize, the crop and the normalisation of images."""
    images = subject.processor.image_processor
    yield _check_resize(subject, images)
    yield _check_crop(subject, images)
    yield _check_normalization(subject, images)


def _check_resize(subject: Subject, images: Any) -> Finding:
    published = subject.files.read_json(PREPROCESSOR_FILE) or {}
    expected = {}
    if published.get("image_processor_type") == "PrismaticImageProcessor":
        read = read_published_config(published)
        expected = {name: read[name] for name in ("image_resize_strategy", "resample")}
    elif strategy := subject.raw_config.get("image_resize_strategy"):
        expected = {"image_resize_strategy": strategy}
    if _is_oft(subject):
        expected["resample"] = LANCZOS3
    expected |= _select(subject.preparation, "image_resize_strategy", "resample")
    given = {"image_resize_strategy": images.image_resize_strategy, "resample": images.resample}
    if wrong := [name for name, value in expected.items() if given[name] != value]:
        found = ", ".join(f"{name}={given[name]!r} instead of {expected[name]!r}" for name in wrong)
        return failed("resize", f"Images are not resized as in training: {found}.", f"{AGAIN}.")
    known = "as in training" if expected else "the training is not recorded"
    return passed("resize", f"{images.image_resize_strategy}, filter {given['resample']} ({known}).")


def _is_oft(subject: Subject) -> bool:
    """Whether the files are those of OpenVLA-OFT's code, which always trains with crops."""
    return bool(subject.files.match(OFT_FILES))


def _check_crop(subject: Subject, images: Any) -> Finding:
    given, settings = images.center_crop_area, subject.training.get("arguments", {})
    area = IMAGE_FIELDS["center_crop_area"]
    shown = "no crop" if given is None else f"a centre crop of area {given:g}"
    if (recorded := _select(subject.preparation, "center_crop_area")) and given != recorded["center_crop_area"]:
        found = f"Images have {shown}, unlike in training."
        fix = f"Pass `center_crop_area={recorded['center_crop_area']}` to `AutoProcessor.from_pretrained`."
        return failed("crop", found, fix)
    if recorded:
        return passed("crop", f"Images have {shown}, as in training.")
    if "augment" in settings or _is_oft(subject):
        expected = area if _is_oft(subject) else Augmentation().crop_area if settings["augment"] else None
        if given != expected:
            found = f"Images have {shown}, but the training had {'random crops' if expected else 'none'}."
            return failed("crop", found, f"Pass `center_crop_area={expected}` to `AutoProcessor.from_pretrained`.")
        return passed("crop", f"Images have {shown}, as in training.")
    is_cropped = subject.config.is_parallel or any(key.startswith(LIBERO) for key in subject.model.norm_stats or ())
    if is_cropped and given != area:
        found = f"Images have {shown}, but policies of this kind are trained with random crops of area {area:g}."
        fix = f"Pass `center_crop_area={area}` to `AutoProcessor.from_pretrained`, unless this policy was not."
        return warned("crop", found, fix)
    return passed("crop", f"Images have {shown} (the training is not recorded).")


def _check_normalization(subject: Subject, images: Any) -> Finding:
    """Compare the mean and deviation of each tower's images with those of its kind."""
    unknown = []
    for index, (tower, *values) in enumerate(
        zip(subject.config.vision_configs, images.image_mean, images.image_std, strict=False)
    ):
        given = np.array(values)
        near = [
            kind
            for kind, known in TOWER_STATISTICS.items()
            if np.abs(given - np.array(known)).max() < STATISTICS_TOLERANCE
        ]
        if tower.model_type in TOWER_STATISTICS and near and tower.model_type not in near:
            found = f"Tower {index} ({tower.model_type}) gets images normalised for {near[0]}."
            return failed("normalisation", found, "Give `image_mean` and `image_std` in the order of the towers.")
        if not near:
            unknown.append(f"tower {index}: mean {given[0].round(3).tolist()}, deviation {given[1].round(3).tolist()}")
    if unknown and not _is_llama(subject.config):  # a policy that was trained from scratch
        return passed("normalisation", f"The policy's own values ({'; '.join(unknown)}).")
    if unknown:
        fix = "Give the mean and the deviation with which the tower was trained."
        return warned("normalisation", f"Not the values of the published towers ({'; '.join(unknown)}).", fix)
    return passed("normalisation", "Each tower gets the mean and the deviation of its kind.")


__all__ = ["check_agreement", "check_images", "check_prompt"]
