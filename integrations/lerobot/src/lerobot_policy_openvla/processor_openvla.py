"""The pipelines around the policy, which makes OpenVLA's own inputs itself."""

from typing import Any

import torch
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME

from .configuration_openvla import OpenVLAConfig


def make_openvla_pre_post_processors(
    config: OpenVLAConfig, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]:
    """Make the pipelines from LeRobot's observations to the policy's, and from actions to the robot's.

    They contain the steps that LeRobot's commands expect in every pipeline. The normalisation passes values through,
    see `OpenVLAConfig`.
    """
    norm_map, outputs = config.normalization_mapping, config.output_features or {}
    return (
        PolicyProcessorPipeline[dict[str, Any], dict[str, Any]](
            steps=[
                RenameObservationsProcessorStep(rename_map={}),
                AddBatchDimensionProcessorStep(),
                DeviceProcessorStep(device=config.device),
                NormalizerProcessorStep(
                    features={**(config.input_features or {}), **outputs}, norm_map=norm_map, stats=dataset_stats
                ),
            ],
            name=POLICY_PREPROCESSOR_DEFAULT_NAME,
        ),
        PolicyProcessorPipeline[PolicyAction, PolicyAction](
            steps=[
                UnnormalizerProcessorStep(features=outputs, norm_map=norm_map, stats=dataset_stats),
                DeviceProcessorStep(device="cpu"),
            ],
            name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        ),
    )


__all__ = ["make_openvla_pre_post_processors"]
