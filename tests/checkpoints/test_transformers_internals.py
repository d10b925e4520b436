"""The parts of transformers on which `openvla_hf.checkpoints.transformers_internals` relies.

If one of these tests fails after an update of transformers, adapt that module. Nothing else in `checkpoints/` uses
these parts.
"""

import importlib
import inspect
from dataclasses import fields

import pytest


FUNCTIONS = {
    "conversion_mapping.get_model_conversion_mapping": ["model", "key_mapping", "hf_quantizer"],
    "core_model_loading.convert_and_load_state_dict_in_model": ["model", "state_dict", "load_config"],
    "core_model_loading.revert_weight_conversion": ["model", "state_dict"],
    "dynamic_module_utils.custom_object_save": ["obj", "folder"],
    "modeling_utils.local_torch_dtype": ["dtype"],
    "modeling_utils.PreTrainedModel._get_dtype_plan": ["self", "dtype"],
    "modeling_utils.PreTrainedModel._adjust_missing_and_unexpected_keys": ["self", "loading_info"],
    "quantizers.base.HfQuantizer.get_state_dict_and_metadata": ["self", "model"],
    "quantizers.base.HfQuantizer.preprocess_model": ["self", "model"],
    "quantizers.base.HfQuantizer.validate_environment": ["self"],
}
FIELDS = {
    "modeling_utils.LoadStateDictConfig": {
        "pretrained_model_name_or_path", "device_map", "dtype", "dtype_plan", "hf_quantizer", "weight_mapping",
    },
    "modeling_utils.LoadStateDictInfo": {"missing_keys", "unexpected_keys", "mismatched_keys", "conversion_errors"},
}  # fmt: skip


def find(path):
    """Look up a path in transformers, such as `modeling_utils.PreTrainedModel._get_dtype_plan`."""
    parts = path.split(".")
    count = next(index for index, part in enumerate(parts) if part != part.lower() or index == len(parts) - 1)
    found = importlib.import_module(".".join(["transformers", *parts[:count]]))
    for part in parts[count:]:
        found = getattr(found, part, None)
        assert found is not None, f"transformers no longer has {path}: adapt checkpoints/transformers_internals.py."
    return found


@pytest.mark.parametrize("path", FUNCTIONS)
def test_transformers_has_the_functions_that_quantising_and_exporting_call(path):
    parameters = list(inspect.signature(find(path)).parameters)
    assert parameters[: len(FUNCTIONS[path])] == FUNCTIONS[path], (
        f"The parameters of transformers' {path} have changed: adapt checkpoints/transformers_internals.py."
    )


@pytest.mark.parametrize("path", FIELDS)
def test_transformers_has_the_fields_that_quantising_reads_and_sets(path):
    assert FIELDS[path] <= {field.name for field in fields(find(path))}, (
        f"The fields of transformers' {path} have changed: adapt checkpoints/transformers_internals.py."
    )
