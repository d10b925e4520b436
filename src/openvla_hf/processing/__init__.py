"""Conversion of prompts and images to model inputs."""

from .image_processing_openvla import OpenVLAImageProcessor
from .processing_openvla import OpenVLAProcessor


__all__ = ["OpenVLAImageProcessor", "OpenVLAProcessor"]
