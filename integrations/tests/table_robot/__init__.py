"""A robot of LeRobot that moves in the simulated table, for the tests."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lerobot.robots import Robot, RobotConfig

from openvla_hf.tabletop.env import TabletopEnv


ACTIONS = tuple(f"{name}.pos" for name in ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"))


@RobotConfig.register_subclass("table_robot")
@dataclass
class TableRobotConfig(RobotConfig):
    """Configuration of the robot: the seed of its episode, and the file that it writes in the end."""

    seed: int = 0
    log: str = "robot.json"


class TableRobot(Robot):
    """The arm of the simulated table."""

    config_class = TableRobotConfig
    name = "table_robot"

    def __init__(self, config):
        super().__init__(config)
        self.config, self.env = config, TabletopEnv()
        self.image, self.success = None, False

    @property
    def observation_features(self):
        return {"image": (224, 224, 3)}

    @property
    def action_features(self):
        return dict.fromkeys(ACTIONS, float)

    @property
    def is_connected(self):
        return self.image is not None

    @property
    def is_calibrated(self):
        return True

    def connect(self, calibrate=True):
        self.image, _ = self.env.reset(seed=self.config.seed)

    def calibrate(self):
        pass

    def configure(self):
        pass

    def get_observation(self):
        return {"image": self.image}

    def send_action(self, action):
        if not self.success:
            self.image, _, self.success, _, _ = self.env.step(np.array([action[name] for name in ACTIONS]))
        return action

    def disconnect(self):
        Path(self.config.log).write_text(json.dumps({"success": bool(self.success)}))
