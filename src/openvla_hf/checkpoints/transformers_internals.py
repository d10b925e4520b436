"""All undocumented parts of transformers that this folder uses.

`tests/checkpoints/test_transformers_internals.py` fails with the name of a part that has changed.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import LoadStateDictConfig, local_torch_dtype

from ..modeling.checkpoint_loading import refuse_foreign_weights


class PartLoader:
    """Load the weights of a model part by part. `from_pretrained` needs memory for the whole model.

    Args:
        model: Model on the meta device, with the quantiser's layers.
        quantizer: The quantiser of transformers; `None` to leave the weights as they are.
        dtype: Data type of the weights that are not quantised.
        source: Folder or Hub id of the checkpoint, for error messages.
    """

    def __init__(self, model: PreTrainedModel, quantizer: Any, dtype: torch.dtype, source: str | os.PathLike):
        self.model = model
        self.quantizer = quantizer
        self.source = source
        self._empty = dict(model.named_parameters())
        self._info: Any = None
        self._config = LoadStateDictConfig(
            pretrained_model_name_or_path=str(source),
            device_map={"": "cuda" if quantizer is not None and torch.cuda.is_available() else "cpu"},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            hf_quantizer=quantizer,
            weight_mapping=get_model_conversion_mapping(model, None, quantizer),
        )

    def load(self, part: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Load some weights, and return the tensors to save and the metadata of their file.

        Raises:
            ValueError: A weight can't be quantised, or has another shape than the model's.
        """
        info, _ = convert_and_load_state_dict_in_model(self.model, dict(part), self._config)
        if info.conversion_errors:
            raise ValueError(f"Cannot convert {self.source}: {next(iter(info.conversion_errors.values()))}")
        refuse_foreign_weights(self.source, (), (), info.mismatched_keys)
        if self._info is None:
            self._info = info
        self._info.missing_keys &= info.missing_keys
        self._info.unexpected_keys |= info.unexpected_keys
        loaded = _Loaded(self.model)
        tensors, metadata = (
            (None, {}) if self.quantizer is None else self.quantizer.get_state_dict_and_metadata(loaded)
        )
        tensors = loaded.tensors if tensors is None else tensors
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata

    def release(self) -> None:
        """Free the memory of the loaded weights."""
        for name, parameter in self._empty.items():
            module, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(module), leaf, parameter)

    def check_complete(self) -> None:
        """Check that the loaded parts together are all weights of the model.

        Raises:
            ValueError: A weight is missing or unexpected.
        """
        self.model._adjust_missing_and_unexpected_keys(self._info)
        refuse_foreign_weights(self.source, self._info.missing_keys, self._info.unexpected_keys)


class _Loaded:
    """The loaded part of a model's state dict, with the interface that quantisers expect of a model."""

    def __init__(self, model: PreTrainedModel):
        self.tensors = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.tensors


__all__ = ["PartLoader", "custom_object_save", "local_torch_dtype", "revert_weight_conversion"]
