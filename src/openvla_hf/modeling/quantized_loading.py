"""Quantised weights in `from_pretrained`: modules kept in 16 bits, and clear errors."""

import copy
import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig


HEADS_IN_16_BITS = ("lm_head", "action_head", "model.proprio_projector", "model.noisy_action_projector")
"""Modules that are always left as they are: they decide between neighbouring actions, or read the robot's state."""
KEPT_IN_16_BITS = (*HEADS_IN_16_BITS, "model.vision_backbone", "model.projector")
"""Modules left as they are by default.

The towers and the projector are a quarter of a 4-bit model's bytes, but cost little time: they run once for an action,
the language model once for each token.
"""
KEPT_FIELDS = {"bitsandbytes": "llm_int8_skip_modules", "torchao": "modules_to_not_convert"}
"""Quantisation method -> field of its config that names these modules."""
COMPUTE_CAPABILITY = {"Int4WeightOnlyConfig": (8, 0), "Float8DynamicActivationFloat8WeightConfig": (8, 9)}
"""Config of torchao -> compute capability that its kernels need."""
KERNELS_FOR_CPU = "opaque"
"""Packing of four bits that runs without a GPU."""
# Outputs and inputs of a layer must be multiples of these for bitsandbytes' kernel on CPUs with AVX512-BF16.
CPU_KERNEL_OUTPUTS, CPU_KERNEL_INPUTS = 32, 64


def with_defaults(quantization_config: Any) -> Any:
    """Add `KEPT_IN_16_BITS` to a config that names no modules to keep; raise `ValueError` if it can't run here."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    refuse_foreign_kernels(quantization_config)
    field = KEPT_FIELDS.get(getattr(quantization_config, "quant_method", ""))
    if field is None or getattr(quantization_config, field) is not None:
        return quantization_config
    quantization_config = copy.copy(quantization_config)
    setattr(quantization_config, field, list(KEPT_IN_16_BITS))
    return quantization_config


def refuse_second(repo: Any, stored: Any) -> None:
    """Raise `ValueError` if the stored weights are already quantised."""
    if stored is not None:
        raise ValueError(
            f"{repo} is already quantised: load it without `quantization_config`, or quantise its 16-bit checkpoint."
        )


def refuse_without_gpu(what: str, needed: tuple[int, int] | None) -> None:
    """Raise `ValueError` if no GPU has the compute capability that `what` needs; `None` needs no GPU."""
    if needed is None:
        return
    too_old = torch.cuda.is_available() and torch.cuda.get_device_capability() < needed
    if too_old or not torch.accelerator.is_available():
        raise ValueError(
            f"{what} needs a GPU of compute capability {needed[0]}.{needed[1]} or higher, but this machine has "
            "none: use '4bit' or 'int8', which run everywhere."
        )


def refuse_foreign_kernels(config: Any) -> None:
    """Raise `ValueError` if a quantisation config needs kernels of a GPU that is not available."""
    if config.quant_method != "torchao" or getattr(config.quant_type, "int4_packing_format", "") == KERNELS_FOR_CPU:
        return
    kind = type(config.quant_type).__name__
    refuse_without_gpu(f"Quantisation by {kind}", COMPUTE_CAPABILITY.get(kind))


def missing_package(repo: Any, error: ModuleNotFoundError) -> ImportError | None:
    """Make a clear error if the package that reads quantised weights is not installed; else return `None`."""
    package = (error.name or "").partition(".")[0]
    if package not in KEPT_FIELDS:
        return None
    return ImportError(f"The weights of {repo} need {package}: run `pip install {package}`.")


def prepare_quantized(model: PreTrainedModel) -> None:
    """Let a model that was quantised with bitsandbytes run on every machine, without warnings at each layer.

    Raises:
        ValueError: The kernels need a GPU that is not available.
    """
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return
    refuse_foreign_kernels(config)
    if config.quant_method != "bitsandbytes":
        return
    if config.load_in_8bit:
        # bitsandbytes warns at every layer of every pass that it casts to float16, although 8-bit layers always do so.
        # The logger's name is the only handle on this warning.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not model.hf_quantizer.param_needs_quantization(
            model, f"{name}.weight"
        ):
            continue
        if module.out_features % CPU_KERNEL_OUTPUTS or module.in_features % CPU_KERNEL_INPUTS:
            # The kernel fails on such a layer ("N must be divisible by block_n"); the general one does not.
            module.support_avx512bf16_for_cpu = False


__all__ = [
    "COMPUTE_CAPABILITY",
    "HEADS_IN_16_BITS",
    "KEPT_IN_16_BITS",
    "missing_package",
    "prepare_quantized",
    "refuse_second",
    "refuse_without_gpu",
    "with_defaults",
]
