"""Sharded training: settings that the configuration files of accelerate can't contain, and sharded checkpoints."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer


def configure_sharding(args: TrainingArguments, model: nn.Module) -> None:
    """Complete the configuration of `accelerate launch` with FSDP2 for a model.

    Each block of the model is sharded by itself. Processes add up gradients in float32, as in the original, while
    accelerate adds them up in the type of the arithmetic by default.

    Args:
        args: Arguments to change. Without FSDP2, they stay as they are.
        model: Model to train, whose blocks depend on its towers.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") != "true" or os.environ.get("FSDP_VERSION") != "2":
        return
    blocks = {type(module).__name__ for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
    # accelerate takes the rest from its configuration.
    args.fsdp_plugin_args = {"transformer_cls_names_to_wrap": sorted(blocks)}
    if args.bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        args.fsdp_plugin_args["mixed_precision_policy"] = policy


@contextmanager
def in_its_own_class(model: nn.Module) -> Iterator[None]:
    """Give a sharded model its own class while it is saved, since `fully_shard` has replaced the class.

    Checkpoints contain the name and the source of the model's class.
    """
    current = type(model)
    model.__class__ = next(one for one in current.__mro__ if not issubclass(one, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = current


def check_sharding(checkpoint: str, shards: bool) -> None:
    """Check that a checkpoint can be resumed.

    Args:
        checkpoint: Folder of the checkpoint.
        shards: Whether the processes shard the model (FSDP2 or HSDP).

    Raises:
        ValueError: The checkpoint is sharded and the run is not, or the other way round.
    """
    is_sharded = next(Path(checkpoint).glob(f"{FSDP_MODEL_NAME}*"), None) is not None
    if is_sharded and not shards:
        raise ValueError(
            f"{checkpoint} is sharded. Resume it with `accelerate launch` and fsdp2.yaml or hsdp.yaml; on one GPU, "
            "with fsdp2.yaml and --num_processes 1."
        )
    if shards and not is_sharded:
        raise ValueError(
            f"{checkpoint} was saved by a run that does not shard the model. Resume it with the configuration of that "
            "run."
        )


__all__ = ["check_sharding", "configure_sharding", "in_its_own_class"]
