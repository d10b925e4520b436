"""Settings of FSDP2 that the configuration files of accelerate can't contain."""

import os

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments


def reduce_in_float32(args: TrainingArguments) -> None:
    """Let the processes of `accelerate launch` with FSDP2 add up gradients in float32, as the original does.

    By default, accelerate adds them up in the type of the arithmetic.

    Args:
        args: Arguments to change. Without bfloat16 or FSDP2, they stay as they are.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION") == "2"
    if args.bf16 and launched:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        args.fsdp_plugin_args = {"mixed_precision_policy": policy}  # accelerate takes the rest from its configuration


__all__ = ["reduce_in_float32"]
