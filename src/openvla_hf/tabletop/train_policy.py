"""Train the small tabletop policy from scratch.

    python -m openvla_hf.tabletop.train_policy --output outputs/tabletop

The policy is OpenVLA at a few million parameters: both towers, the projector, Llama and a tokenizer of its own.
OpenVLA starts from pretrained towers and a pretrained language model. Here nothing is pretrained, and it would take
millions of frames to learn from the actions alone that a name refers to an object in the image. Training therefore has
two phases, the first of which teaches what pretraining would give:

1. Seeing: the towers and the projector learn which object is in each patch, and how to express it in the language
   model's own embeddings of the names. This continues in the second phase.
2. Acting: everything learns the expert's actions. Some attention heads are also shown where to look (from a name to
   the patch of its object; from the action to the names, the gripper and its shadow), and positions are read from the
   hidden states.

The extra heads and losses (`teaching.py`) are discarded: the result is a plain policy. The expert's episodes are
generated during training and each is used once, so nothing is stored and nothing repeats. Running the command again
with the same output folder resumes from the last checkpoint.
"""

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from ..checkpoints.model_card import TRAINING_FILE
from ..checkpoints.preparation import describe_preparation
from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..processing.processing_openvla import OpenVLAProcessor
from ..testing import tiny_config, tiny_processor, tiny_tokenizer
from ..training.collator import ActionCollator
from ..training.trainer import last_checkpoint
from .env import DIRECTIONS, TabletopEnv, Task
from .expert import Frame, demonstrated_action, plan, rollout_expert
from .rollouts import FIRST_UNSEEN_SEED
from .scene import COLOURS, Scene, image_positions
from .teaching import GOALS, NAMES, SEEN, SIDE, TEXT_WIDTH, THINGS, Acting, Seeing


UNNORM_KEY = "tabletop"
# Position of an object that is not in the image.
NOWHERE = -1.0
PATCH_SIZE = 14
POLICY_IMAGE_SIZE = SIDE * PATCH_SIZE
# Width of each of two towers. A single tower of the second width gives a policy with as many parameters.
VISION_WIDTH, SINGLE_VISION_WIDTH = 96, 156
# Peak learning rate of the first phase.
SEEING_LEARNING_RATE = 1.5e-3


@dataclass
class TrainPolicyArguments:
    """Options of `train`.

    Attributes:
        output: Folder for the policy and the trainer's checkpoints.
        seeing_steps: Optimizer steps of the first phase.
        steps: Optimizer steps of the second phase.
        batch_size: Frames in a batch.
        learning_rate: Peak learning rate of the second phase, except for the towers.
        tower_learning_rate: Peak learning rate of the towers in the second phase.
        noise: Standard deviation of the noise on the executed actions, metres; the labels have none.
        live_episodes: Number of episodes that are mixed. With fewer of them, consecutive batches show the same scenes.
        workers: Number of processes that generate episodes.
        save_steps: Optimizer steps between two checkpoints.
        seed: Seed of the initialisation.
        towers: 2 for both towers, 1 for a single, wider SigLIP tower. The number of parameters is about the same.
    """

    output: str = "outputs/tabletop"
    seeing_steps: int = 900
    steps: int = 3400
    batch_size: int = 48
    learning_rate: float = 1e-3
    tower_learning_rate: float = 3e-4
    noise: float = 0.0075
    live_episodes: int = 1024
    workers: int = 1
    save_steps: int = 250
    seed: int = 7
    towers: int = 2


# Data


def instructions() -> list[str]:
    """List every instruction that the tabletop can give for `put`, `push` and `stack`."""
    put = [f"put the {thing} on the {goal}" for thing, goal in itertools.product(THINGS, GOALS)]
    push = [f"push the {thing} to the {way}" for thing, way in itertools.product(THINGS, DIRECTIONS)]
    stack = [f"stack the {thing} on the {colour} cube" for thing, colour in itertools.product(THINGS, COLOURS)]
    return put + push + stack


class UndrawnEnv(TabletopEnv):
    """A tabletop without images, because drawing them takes most of the time of a step."""

    def _observe(self) -> np.ndarray:
        return np.empty(0)


def play(
    seeds: list[range], arguments: TrainPolicyArguments, env_class: type[TabletopEnv] = TabletopEnv
) -> Iterator[Frame]:
    """Yield frames of the expert's episodes, with `live_episodes` mixed at a time; each seed is used once."""
    seed_iterator = itertools.chain.from_iterable(seeds)
    rng = np.random.default_rng(seeds[0].start)

    def start() -> Iterator[Frame]:
        # The executed actions have noise of their own.
        return rollout_expert(env_class(hand_noise=0.0), next(seed_iterator), noise=arguments.noise)

    live = [start() for _ in range(arguments.live_episodes)]
    while True:
        slot = int(rng.integers(len(live)))
        frame = next(live[slot], None)
        if frame is None:
            live[slot] = start()
        else:
            yield frame


def demonstrations(seeds: list[range], arguments: TrainPolicyArguments) -> Iterator[dict[str, Any]]:
    """Yield the expert's frames, and repeat some frames with an empty hand under another instruction.

    Besides `image`, `instruction` and `action`, each frame has `positions` (len(SEEN), 2) in fractions of the image;
    `target` and `goal`, indices into `SEEN` (goal is -1 for a push); and `offsets` (6,), metres from the hand to the
    target and to the goal.
    """
    rng = np.random.default_rng(seeds[0].start + 1)
    for frame in play(seeds, arguments):
        scene, task = frame.state
        yield example(frame.image, scene, task)
        if scene.gripper.held is None and rng.random() < 0.25:
            yield example(frame.image, scene, other_task(scene, rng))


def other_task(scene: Scene, rng: np.random.Generator) -> Task:
    """Draw another task for a scene: any object to any goal or in any direction."""
    thing = scene.objects[int(rng.integers(len(scene.objects)))]
    if rng.random() < 0.6:
        goal = scene.goals[int(rng.integers(len(scene.goals)))]
        return Task("put", f"put the {thing.name} on the {goal.name}", thing, goal=goal)
    way = list(DIRECTIONS)[int(rng.integers(len(DIRECTIONS)))]
    return Task("push", f"push the {thing.name} to the {way}", thing, direction=way)


def example(image: np.ndarray, scene: Scene, task: Task) -> dict[str, Any]:
    """Build one frame of `demonstrations`."""
    positions = np.full((len(SEEN), 2), NOWHERE, dtype=np.float32)
    for name, position in image_positions(scene).items():
        positions[SEEN.index(name)] = position
    offsets = np.zeros(6, dtype=np.float32)
    offsets[:3] = task.target.position - scene.gripper.position
    if task.goal is not None:
        offsets[3:] = np.append(task.goal.xy, task.goal.thickness) - scene.gripper.position
    return {
        "image": image,
        "instruction": task.instruction,
        "action": demonstrated_action(plan(scene, task)),
        "positions": positions,
        "target": SEEN.index(task.target.name),
        "goal": -1 if task.goal is None else SEEN.index(task.goal.name),
        "offsets": offsets,
    }


def action_statistics(arguments: TrainPolicyArguments, frames: int = 2000) -> dict[str, Any]:
    """Compute statistics of the expert's actions over the first frames, in the form of `dataset_statistics.json`."""
    stream = play([range(FIRST_UNSEEN_SEED)], arguments, UndrawnEnv)
    actions = np.stack([frame.action for frame in itertools.islice(stream, frames)]).astype(np.float64)
    return {
        UNNORM_KEY: {
            "action": {
                "mean": actions.mean(0).tolist(),
                "std": actions.std(0).tolist(),
                "min": actions.min(0).tolist(),
                "max": actions.max(0).tolist(),
                "q01": np.quantile(actions, 0.01, axis=0).tolist(),
                "q99": np.quantile(actions, 0.99, axis=0).tolist(),
                "mask": [True] * 6 + [False],
            },
            "num_transitions": frames,
            "num_trajectories": arguments.live_episodes,
        }
    }


class GuidedCollator(ActionCollator):
    """Add the positions of objects to the usual batch."""

    def __call__(self, frames: Any) -> dict[str, torch.Tensor]:
        """Collate frames of `demonstrations`; `input_ids` contain prompt and action, as for any policy."""
        batch = super().__call__(frames)
        for name in ("positions", "target", "goal", "offsets"):
            batch[name] = torch.tensor(np.stack([frame[name] for frame in frames]))
        return batch


# The untrained policy


def sine_cosine_positions(side: int, width: int) -> torch.Tensor:
    """Compute a two-dimensional sine and cosine position embedding, (side * side, width)."""
    frequency = 100.0 ** -(np.arange(width // 4) / (width // 4))
    rows, columns = np.mgrid[:side, :side].reshape(2, -1, 1)
    waves = [wave(axis * frequency) for axis in (rows, columns) for wave in (np.sin, np.cos)]
    return torch.tensor(np.concatenate(waves, axis=1), dtype=torch.float32)


def build(arguments: TrainPolicyArguments) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor]:
    """Build the untrained policy and its processor.

    Raises:
        ValueError: If the number of towers is neither 1 nor 2.
    """
    if arguments.towers not in (1, 2):
        raise ValueError(f"A policy has 1 or 2 towers, got towers={arguments.towers}.")
    fused = arguments.towers == 2
    vision_width = VISION_WIDTH if fused else SINGLE_VISION_WIDTH
    # Each name is one token, so that one embedding says which object a patch shows.
    tokenizer = tiny_tokenizer(instructions(), merges=128, phrases=[f" {name}" for name in NAMES])
    config = tiny_config(
        tokenizer,
        image_size=POLICY_IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_width=vision_width,
        vision_layers=5,
        text_width=TEXT_WIDTH,
        text_layers=4,
        heads=3,
        fused=fused,
        norm_stats=action_statistics(arguments),
    )
    text = config.text_config
    text.num_attention_heads = text.num_key_value_heads = 6
    text.head_dim = TEXT_WIDTH // 6
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e5}
    # The usual 0.02 suits wider layers.
    config.vision_config.initializer_range, text.initializer_range = 0.04, 0.06
    model = OpenVLAForActionPrediction(config)
    # The teaching reads attention weights, and on a CPU the fused kernel's backward pass takes half of a step.
    model.set_attn_implementation("eager")
    backbone, projector = model.model.vision_backbone, model.model.projector
    with torch.no_grad():
        # Towers know the position of a patch from the first step on.
        table = sine_cosine_positions(SIDE, vision_width)
        siglip = backbone.featurizer
        if fused:
            siglip = backbone.fused_featurizer
            backbone.featurizer.embeddings.position_embeddings[0, 1:] = table
        siglip.embeddings.position_embedding.weight.copy_(table)
        for layer in projector.children():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=1.2 * layer.in_features**-0.5)
    processor = tiny_processor(tokenizer, config)
    processor.prompt_template = "In: {instruction}\nOut:"
    processor.strip_full_stop = True  # the tabletop's instructions have none
    # The table is bright and even: normalising by its own statistics raises the contrast of the objects.
    processor.image_processor.image_mean = [[0.82, 0.81, 0.79]] * arguments.towers
    processor.image_processor.image_std = [[0.2, 0.2, 0.2]] * arguments.towers
    return model, processor


# Training


class GuidedTrainer(Trainer):
    """A `Trainer` that also logs the parts of the loss."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.parts: dict[str, list[torch.Tensor]] = defaultdict(list)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the loss, and keep its parts until they are logged."""
        outputs = model(**inputs)
        for name, value in outputs.items():
            if name != "loss":
                self.parts[name].append(value.detach())
        return outputs["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the means of the parts since the last call, along with the figures of `Trainer.log`."""
        means = {name: round(torch.stack(values).mean().item(), 4) for name, values in self.parts.items()}
        self.parts.clear()
        super().log(logs | means, *args, **kwargs)


class SavePolicy(TrainerCallback):
    """Save the policy itself with each checkpoint, so that it can be evaluated during training."""

    def __init__(self, save: Callable[[], None]):
        self.save = save

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Save the policy."""
        self.save()


def save_policy(model: OpenVLAForActionPrediction, processor: OpenVLAProcessor, folder: str | Path) -> None:
    """Save model and processor, remote code included, with weights in float16, and how inputs are prepared.

    Rounding to float16 halves the file. The config keeps the model's dtype, so the weights load in float32 again.
    """
    model.save_pretrained(folder, state_dict={name: weight.half() for name, weight in model.state_dict().items()})
    processor.save_pretrained(folder)
    record = {"preparation": describe_preparation(processor, model.config)}
    Path(folder, TRAINING_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@dataclass
class Phase:
    """One of the two phases of the training.

    Attributes:
        name: Name of its folder in the output.
        module: `Seeing` or `Acting`.
        steps: Optimizer steps.
        groups: Parameter groups of the optimizer.
        first_seed: Seed of the first episode.
    """

    name: str
    module: nn.Module
    steps: int
    groups: list[dict[str, Any]]
    first_seed: int


def train(arguments: TrainPolicyArguments) -> None:
    """Train a policy and save it to `arguments.output`."""
    set_seed(arguments.seed)
    model, processor = build(arguments)
    collator = GuidedCollator(processor, model.action_tokenizer, model.get_action_stats(UNNORM_KEY))

    def save() -> None:
        save_policy(model, processor, arguments.output)

    seeing = Seeing(model, torch.tensor(processor.tokenizer.convert_tokens_to_ids([f" {name}" for name in NAMES])))
    eyes = [model.model.vision_backbone, model.model.projector, seeing.read, seeing.place]
    learned = [parameter for eye in eyes for parameter in eye.parameters()]
    groups = [{"params": learned, "lr": SEEING_LEARNING_RATE}]
    run_phase(
        Phase("seeing", seeing, arguments.seeing_steps, groups, FIRST_UNSEEN_SEED // 2), arguments, collator, save
    )

    acting = Acting(seeing)
    towers = list(model.model.vision_backbone.parameters())
    is_tower = {id(parameter) for parameter in towers}
    rest = [parameter for parameter in acting.parameters() if id(parameter) not in is_tower]
    groups = [
        {"params": towers, "lr": arguments.tower_learning_rate},
        {"params": rest, "lr": arguments.learning_rate},
    ]
    run_phase(Phase("acting", acting, arguments.steps, groups, 0), arguments, collator, save)
    save()


def run_phase(
    phase: Phase, arguments: TrainPolicyArguments, collator: GuidedCollator, save: Callable[[], None]
) -> None:
    """Train one phase, from its last checkpoint if there is one."""
    if not phase.steps:
        return
    folder = Path(arguments.output, phase.name)
    checkpoint = last_checkpoint(folder)
    first_seed = phase.first_seed
    if checkpoint:  # continue with seeds that were not used
        done = TrainerState.load_from_json(Path(checkpoint, TRAINER_STATE_NAME)).global_step
        first_seed += done * arguments.batch_size
    stream = IterableDataset.from_generator(
        demonstrations, gen_kwargs={"seeds": seed_ranges(first_seed, arguments.workers), "arguments": arguments}
    )
    GuidedTrainer(
        model=phase.module,
        args=TrainingArguments(
            output_dir=str(folder),
            ignore_data_skip=True,
            max_steps=phase.steps,
            per_device_train_batch_size=arguments.batch_size,
            lr_scheduler_type="cosine",
            warmup_steps=min(100, phase.steps // 10),
            use_cpu=not torch.cuda.is_available(),
            dataloader_num_workers=arguments.workers,
            dataloader_prefetch_factor=4 if arguments.workers else None,
            remove_unused_columns=False,
            logging_steps=50,
            save_steps=arguments.save_steps,
            save_total_limit=1,
            report_to="none",
            seed=arguments.seed,
        ),
        train_dataset=stream,
        data_collator=collator,
        optimizers=(torch.optim.AdamW(phase.groups, betas=(0.9, 0.98), weight_decay=0.05, fused=True), None),
        callbacks=[SavePolicy(save)],
    ).train(resume_from_checkpoint=checkpoint)


def seed_ranges(first: int, workers: int) -> list[range]:
    """Divide the seeds from `first` to the end of its half of the training seeds into a range for each worker."""
    half = FIRST_UNSEEN_SEED // 2
    cuts = np.linspace(first, (first // half + 1) * half, max(workers, 1) + 1).astype(int).tolist()
    return [range(*pair) for pair in itertools.pairwise(cuts)]


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"defaults: {TrainPolicyArguments()}",
    )
    for field in fields(TrainPolicyArguments):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    train(TrainPolicyArguments(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
