"""OpenVLA and OpenVLA-OFT as a policy of LeRobot, and the tabletop as one of its environments.

LeRobot's commands import this package, which registers both.
"""

from .configuration_openvla import OpenVLAConfig
from .tabletop import TabletopEnvConfig


__all__ = ["OpenVLAConfig", "TabletopEnvConfig"]
