"""Pretrain on a mixture of three robots, and on each robot alone with the same number of samples.

    python benchmarks/pretraining.py --output outputs/pretraining                        # every policy
    python benchmarks/pretraining.py --output outputs/pretraining --policies mixture     # one, to use several cores
    python benchmarks/pretraining.py --output outputs/trial --steps 4 --episodes 2 --rollouts 2   # a quick trial

Three robots lift objects from the tabletop. They have the same physics, but each has its own units, axes, gripper
values, control (movements or target poses) and camera. Each records its own episodes in its own form, and its row in
`three_robots.toml` standardises them. All policies start from the same weights (`--start`). Each is evaluated with
every robot on unseen episodes: in the simulator, and on the expert's actions.

Running the command again resumes the training from the last checkpoint and leaves out what is finished.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoProcessor, set_seed

from openvla_hf.data import load, write_rlds
from openvla_hf.data.open_x import add_table
from openvla_hf.data.optional_packages import import_extra
from openvla_hf.data.whole_statistics import whole_statistics
from openvla_hf.evaluation.open_loop import evaluate_open_loop
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.suites.play import play
from openvla_hf.suites.policies import model_policy
from openvla_hf.suites.results import mcnemar, success_by_task
from openvla_hf.suites.simulator import open_simulators
from openvla_hf.tabletop.env import TabletopEnv
from openvla_hf.tabletop.expert import demonstrated_action, rollout_expert
from openvla_hf.tabletop.rollouts import FIRST_UNSEEN_SEED, TABLETOP_POLICY
from openvla_hf.tabletop.suite import PROTOCOL, TabletopSuite
from openvla_hf.training.checkpoint_saving import last_checkpoint
from openvla_hf.training.finetune import FinetuneArguments, TrainingMixture, finetune


ROWS = Path(__file__).with_name("three_robots.toml")
MIXTURE = "three_robots"
TASKS = ("lift",)
# What differs from the recipe for a model of a billion parameters on a GPU.
SETTINGS: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "warmup_steps": 30,
    "dtype": "bfloat16",
    "save_total_limit": 1,
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
}
EVALUATION_STEPS = 50


# The robots


class Arm:
    """A robot over the tabletop, here with standard actions: movements in metres, and 1 = open.

    Attributes:
        unit: Units of its positions in a metre.
        state: State that it records, or `None`.
    """

    unit: ClassVar[float] = 1.0
    state: np.ndarray | None = None

    def reset(self, hand: np.ndarray) -> None:
        """Start an episode with an open hand at a position (3,) in the tabletop's frame."""

    def see(self, image: np.ndarray) -> np.ndarray:
        """Return what its camera sees, for a frame of the tabletop's camera."""
        return image

    def command(self, action: np.ndarray) -> np.ndarray:
        """Convert a standard action (7,), with positions in the robot's unit, to the form that its dataset has."""
        return action

    def execute(self, command: np.ndarray) -> np.ndarray:
        """Convert an action in the form that its dataset has to the tabletop's (7,), and follow it."""
        return command


class PoseArm(Arm):
    """Target poses in a frame with z down, x away from the camera and y to the right, and 1 = closed.

    The pose is the sum of the movements so far. Like a controller without feedback, it does not notice disturbances.
    """

    DOWN = (1.0, 0.0, 0.0, 0.0)  # quaternion x, y, z, w of a gripper that points down

    def reset(self, hand: np.ndarray) -> None:
        self.state = np.array([*self._turn(hand), *self.DOWN])

    def see(self, image: np.ndarray) -> np.ndarray:
        return image[::-1, ::-1]

    def command(self, action: np.ndarray) -> np.ndarray:
        return np.array([*(self.state[:3] + self._turn(action[:3])), *self.DOWN, 1 - action[6]])

    def execute(self, command: np.ndarray) -> np.ndarray:
        movement = self._turn(command[:3] - self.state[:3])
        self.state = command[:7]
        return np.array([*movement, 0, 0, 0, 1 - command[7]])

    @staticmethod
    def _turn(vector: np.ndarray) -> np.ndarray:
        """Turn a vector (3,) from the tabletop's frame to the robot's, or back."""
        x, y, z = vector
        return np.array([y, x, -z])


class MillimetreArm(Arm):
    """Movements in millimetres in the order y, x, z, and commands to close (1) and to open (-1) the gripper."""

    unit = 1000.0
    is_open = True

    def reset(self, hand: np.ndarray) -> None:
        self.is_open = True

    def see(self, image: np.ndarray) -> np.ndarray:
        return (0.6 * image[24:216, 16:208]).astype(np.uint8)

    def command(self, action: np.ndarray) -> np.ndarray:
        x, y, z = action[:3]
        opens = action[6] >= 0.5
        return np.array([y, x, z, 0 if opens == self.is_open else -1 if opens else 1])

    def execute(self, command: np.ndarray) -> np.ndarray:
        y, x, z, gripper = command
        self.is_open = gripper < 0 if gripper else self.is_open
        return np.array([x / self.unit, y / self.unit, z / self.unit, 0, 0, 0, self.is_open])


ARMS: dict[str, type[Arm]] = {"metre_arm": Arm, "pose_arm": PoseArm, "millimetre_arm": MillimetreArm}
POLICIES = ["mixture", *ARMS]


class ArmEnv(gymnasium.Wrapper):
    """The tabletop as a robot sees it, which takes standard actions with positions in the robot's unit."""

    def __init__(self, env: TabletopEnv, arm: Arm) -> None:
        super().__init__(env)
        self.arm = arm

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        image, info = self.env.reset(**options)
        self.arm.reset(self.env.unwrapped.scene.gripper.position)
        return self.arm.see(image), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        image, *outcome = self.env.step(self.arm.execute(self.arm.command(action)))
        return self.arm.see(image), *outcome


@dataclass(frozen=True)
class ArmSuite(TabletopSuite):
    """The tabletop with one of the robots."""

    arm: str = "metre_arm"

    def make(self, environment: str) -> gymnasium.Env:
        return ArmEnv(TabletopEnv(self.families, max_steps=self.protocol.max_steps), ARMS[self.arm]())

    def check_policy(self, low: Sequence[float], high: Sequence[float]) -> None:
        """Accept any limits, since units differ."""


# Data


class OnGrid(gymnasium.ActionWrapper):
    """Execute what is recorded: movements in whole centimetres."""

    def action(self, action: np.ndarray) -> np.ndarray:
        return demonstrated_action(action)


def record(arm: Arm, seeds: Sequence[int], noise: float = 0.0075) -> Iterator[list[dict[str, Any]]]:
    """Yield the expert's episodes in a robot's own form. Failed episodes are left out."""
    for seed in seeds:
        table = TabletopEnv(TASKS, hand_noise=0.0)
        frames = list(rollout_expert(OnGrid(table), seed, noise=noise))
        if not frames[-1].success:
            continue
        arm.reset(frames[0].state[0].gripper.position)
        rows = []
        for frame in frames:
            action = demonstrated_action(frame.action)
            action[:3] *= arm.unit
            command, state = arm.command(action), arm.state
            arm.execute(command)
            rows.append(
                {
                    "image": arm.see(frame.image),
                    "instruction": frame.instruction,
                    "action": command,
                    "state": state,
                }
            )
        if arm.state is not None:  # the pose that the last action reaches
            rows.append(rows[-1] | {"state": arm.state})
        yield rows


def record_all(options: argparse.Namespace) -> None:
    """Record every robot's episodes unless they exist: other scenes for each in training, the same for evaluation."""
    for number, (name, arm) in enumerate(ARMS.items()):
        first = number * options.demonstrations
        for folder, seeds in (
            ("oxe", range(first, first + options.demonstrations)),
            ("held-out", range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + options.episodes)),
        ):
            if not (options.output / folder / name).exists():
                write_rlds(record(arm(), seeds), options.output / folder / name)


# Training


def save_start(parts: str, folder: Path) -> None:
    """Save the weights that every policy starts from: those of the shipped policy, or only of its eyes."""
    if folder.exists():
        return
    set_seed(7)
    model = shipped = AutoModel.from_pretrained(TABLETOP_POLICY)
    if parts == "eyes":
        model = OpenVLAForActionPrediction(shipped.config)
        for part in ("vision_backbone", "projector", "language_model.embed_tokens"):
            model.model.get_submodule(part).load_state_dict(shipped.model.get_submodule(part).state_dict())
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(TABLETOP_POLICY).save_pretrained(folder)


def train(policy: str, statistics: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Train a policy unless it has had its steps, from its last checkpoint if there is one."""
    folder = options.output / policy
    file = folder / "log.json"
    done = json.loads(file.read_text()) if file.exists() else {"steps": 0, "cpu_seconds": 0.0}
    if done["steps"] >= options.steps:
        return
    start = time.process_time()
    arguments = FinetuneArguments(
        model=options.output / "start",
        output=folder,
        data=TrainingMixture(
            MIXTURE if policy == "mixture" else {policy: 1.0}, options.output / "oxe", {"split": "train"}
        ),
        # Every policy gets the statistics of all robots, to act with those that it was not trained on.
        statistics=statistics,
        recipe="openx-small",
        settings=SETTINGS
        | {
            "batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "max_steps": options.steps,
            **dict.fromkeys(("save_steps", "eval_steps", "logging_steps"), min(EVALUATION_STEPS, options.steps)),
        },
        model_kwargs={"attn_implementation": "eager"},  # faster than the fused kernel on a CPU
        eval_data={name: held_out(name, options) for name in ARMS},
        resume=last_checkpoint(folder) is not None,
    )
    history = finetune(arguments).history
    seconds = done["cpu_seconds"] + time.process_time() - start
    file.write_text(json.dumps({"steps": options.steps, "cpu_seconds": seconds, "history": history}, indent=2))


# Evaluation


def held_out(robot: str, options: argparse.Namespace) -> Any:
    """Load the expert's unseen episodes with a robot."""
    return load(options.output / "held-out" / robot, name=robot)


def evaluate(policy: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluate a policy on unseen episodes of every robot. Robots with which it was evaluated are left out."""
    file = options.output / policy / "results.json"
    how = {"samples": options.steps * options.batch_size, "episodes": options.rollouts}
    results = [row for row in json.loads(file.read_text()) if how.items() <= row.items()] if file.exists() else []
    for robot in [name for name in ARMS if name not in {row["robot"] for row in results}]:
        model = AutoModel.from_pretrained(options.output / policy)
        processor = AutoProcessor.from_pretrained(options.output / policy)
        suite = ArmSuite("arms", ("arm",), PROTOCOL, 0, families=TASKS, observed=None, state=False, arm=robot)
        suite = suite.with_protocol(max_steps=options.max_steps)
        acting = model_policy(suite, model, processor, robot)
        seeds = range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + options.rollouts)
        with open_simulators(suite, 16, processes=False) as simulators:
            rollouts = [rollout for _, rollout in play(acting, suite.episodes_of(seeds), simulators)]
        results.append(
            {
                "policy": policy,
                "robot": robot,
                "samples": how["samples"],
                **success_by_task(rollouts)["all"],
                "solved": sorted(rollout.seed for rollout in rollouts if rollout.success),
                "open_loop": evaluate_open_loop(model, processor, held_out(robot, options)).as_dict(),
            }
        )
        file.write_text(json.dumps(results, indent=2))
    return results


def read_curves(log: Mapping[str, Any], batch_size: int) -> dict[str, list[tuple[int, float]]]:
    """Return the samples and the loss on held-out episodes of each robot, from the log of a run."""
    entries = [(f"eval_{name}_loss", name) for name in ARMS]
    return {
        name: [(batch_size * one["step"], one[key]) for one in log["history"] if key in one] for key, name in entries
    }


def summarize(folder: Path, batch_size: int) -> dict[str, Any]:
    """Collect the results of all policies that are done, and compare the mixture with each robot alone."""
    done = [name for name in POLICIES if (folder / name / "results.json").exists()]
    results = [row for name in done for row in json.loads((folder / name / "results.json").read_text())]
    logs = {name: json.loads((folder / name / "log.json").read_text()) for name in done}
    solved = {(row["policy"], row["robot"]): set(row["solved"]) for row in results}
    pairs = {robot: (solved.get(("mixture", robot)), solved.get((robot, robot))) for robot in ARMS}
    return {
        "results": results,
        "p_values": {
            robot: mcnemar(len(ours - alone), len(alone - ours))
            for robot, (ours, alone) in pairs.items()
            if ours is not None and alone is not None
        },
        "curves": {name: read_curves(log, batch_size) for name, log in logs.items()},
        "cpu_seconds": {name: log["cpu_seconds"] for name, log in logs.items()},
    }


def results_table(summary: Mapping[str, Any]) -> Table:
    """Make a table of the results."""
    table = Table(title="Unseen episodes")
    for column in ("trained on", "robot"):
        table.add_column(column)
    for column in ("success", "95% interval", "L1", "correct tokens", "gripper as the expert's", "steps"):
        table.add_column(column, justify="right")
    for row in summary["results"]:
        recorded = row["open_loop"]
        table.add_row(
            row["policy"],
            row["robot"],
            f"{row['success']:.1%} of {row['episodes']}",
            f"{row['low']:.1%} to {row['high']:.1%}",
            f"{recorded['l1']:.4f}",
            f"{recorded['token_accuracy']:.1%}",
            f"{recorded['gripper_agreement']:.1%}",
            f"{row['steps']:.1f}",
            end_section=row["robot"] == list(ARMS)[-1],
        )
    return table


def draw(curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], file: Path) -> None:
    """Draw the curves of all policies, with a panel for each robot."""
    figure = import_extra("matplotlib.figure", "data").Figure(figsize=(9, 3), layout="constrained")
    for robot, axes in zip(ARMS, figure.subplots(1, len(ARMS), sharey=True), strict=True):
        for policy, of_policy in curves.items():
            axes.plot(*zip(*of_policy[robot], strict=True), label=policy, lw=2.5 if policy == "mixture" else 1.2)
        axes.set(title=f"episodes of {robot}", xlabel="training samples", ylim=(0.4, 1.2))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("loss on held-out episodes")
    figure.axes[0].legend(title="trained on", frameon=False, fontsize="small")
    figure.savefig(file)


def main() -> None:
    """Record, train, evaluate, and print the table of all policies that are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/pretraining"))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument(
        "--start",
        choices=("eyes", "policy"),
        default="eyes",
        help="weights of the tabletop's policy to start from; with `eyes`, its language model starts at random",
    )
    parser.add_argument("--demonstrations", type=int, default=100, help="of each robot (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--episodes", type=int, default=16, help="of the expert, held out (default: %(default)s)")
    parser.add_argument("--rollouts", type=int, default=50, help="with each robot (default: %(default)s)")
    parser.add_argument("--max-steps", type=int, default=30, help="of a rollout (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the results and curves as JSON")
    options = parser.parse_args()
    add_table(ROWS)
    record_all(options)
    save_start(options.start, options.output / "start")
    statistics = {name: whole_statistics(options.output / "oxe" / name, name=name) for name in ARMS}
    for policy in options.policies:
        train(policy, statistics, options)
        evaluate(policy, options)
    summary = summarize(options.output, options.batch_size)
    draw(summary["curves"], options.output / "curves.svg")
    if options.json:
        print(json.dumps(summary, indent=2))
    else:
        Console(width=140).print(results_table(summary))


if __name__ == "__main__":
    main()
