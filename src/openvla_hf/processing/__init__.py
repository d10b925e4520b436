"""Prompts and images to model inputs."""

from .image_processing_openvla import OpenVLAImageProcessor
from .processing_openvla import OpenVLAProcessor
from .registration import register_processing


__all__ = ["OpenVLAImageProcessor", "OpenVLAProcessor", "register_processing"]
