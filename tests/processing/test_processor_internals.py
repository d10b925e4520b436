"""The private parts of transformers that the processor uses."""

import inspect

import pytest
from transformers import ProcessorMixin


PARAMETERS = {
    "_get_arguments_from_pretrained": ["pretrained_model_name_or_path", "processor_dict"],
    "_merge_kwargs": ["self", "ModelProcessorKwargs"],
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_transformers_has_the_private_methods_of_processors(name):
    told = f"transformers has changed ProcessorMixin.{name}: adapt openvla_hf/processing/processing_openvla.py to it."
    assert hasattr(ProcessorMixin, name), told
    parameters = list(inspect.signature(getattr(ProcessorMixin, name)).parameters)
    assert parameters[: len(PARAMETERS[name])] == PARAMETERS[name], told


def test_transformers_builds_the_parts_of_a_processor_in_the_overridden_method():
    assert "cls._get_arguments_from_pretrained(" in inspect.getsource(ProcessorMixin.from_pretrained), (
        "ProcessorMixin.from_pretrained no longer calls _get_arguments_from_pretrained: adapt "
        "openvla_hf/processing/processing_openvla.py."
    )
