"""Describe how a policy's prompts and images are prepared, for the record of its training."""

from typing import Any


OF_PROMPTS = ("prompt_template", "lowercase_instruction", "strip_full_stop")
OF_IMAGES = ("image_resize_strategy", "resample", "center_crop_area")
OF_MODEL = ("prompt_suffix_token_id",)


def describe_preparation(processor: Any, config: Any) -> dict[str, Any]:
    """Return the fields of a processor and of a config that change the model's inputs, ready for JSON.

    Args:
        processor: An `OpenVLAProcessor`, as it prepares inputs for predictions.
        config: An `OpenVLAConfig`.
    """
    sources = ((processor, OF_PROMPTS), (processor.image_processor, OF_IMAGES), (config, OF_MODEL))
    return {name: getattr(source, name) for source, names in sources for name in names}


__all__ = ["describe_preparation"]
