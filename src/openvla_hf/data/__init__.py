"""Read datasets of robot episodes in any known format as frames."""

from .adapters import Robot
from .augmentation import Augmentation
from .episodes import BadEpisodeError
from .feature_names import FirstOf
from .gripper import Gripper
from .loading import load
from .mixtures import MIXTURES, load_mixture, mix
from .python_episodes import from_episodes
from .robots import register_robot, registered_robots
from .statistics import compute_statistics, load_statistics, save_statistics
from .streams import TrainingStream
from .writing import write_lerobot, write_rlds


__all__ = [
    "MIXTURES",
    "Augmentation",
    "BadEpisodeError",
    "FirstOf",
    "Gripper",
    "Robot",
    "TrainingStream",
    "compute_statistics",
    "from_episodes",
    "load",
    "load_mixture",
    "load_statistics",
    "mix",
    "register_robot",
    "registered_robots",
    "save_statistics",
    "write_lerobot",
    "write_rlds",
]
