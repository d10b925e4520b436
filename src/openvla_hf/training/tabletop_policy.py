"""Train the small tabletop policy from scratch.

    python -m openvla_hf.training.tabletop_policy --output outputs/tabletop

The policy is OpenVLA at a few million parameters: both towers, projector, Llama, its own tokenizer. As OpenVLA's
towers arrive pretrained, its towers first learn to see: what is in each patch, and where each thing is. Then the
whole policy learns from the scripted expert's demonstrations, mixed with frames in which it points to a thing.
Episodes are played while it trains, each once, so nothing is stored and nothing repeats.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from ..evaluation.rollouts import FIRST_UNSEEN_SEED
from ..evaluation.tabletop import DIRECTIONS, MAX_STEP, TabletopEnv, rollout_expert
from ..evaluation.tabletop_scene import COLOURS, GOAL_KINDS, SHAPES, TABLE_HALF, draw_scene, image_positions
from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..processing.processing_openvla import OpenVLAProcessor
from ..testing import tiny_config, tiny_processor, tiny_tokenizer
from .collator import ActionCollator


UNNORM_KEY = "tabletop"
THINGS = [f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)]
GOALS = [f"{colour} {kind}" for colour, kind in itertools.product(COLOURS, GOAL_KINDS)]
SEEN = [*THINGS, *GOALS, "open gripper", "closed gripper", "shadow"]
# The expert's moves are rounded to centimetres: a few actions that can be told apart, rather than 256 that can't.
ACTION_GRID = 0.01


@dataclass
class Recipe:
    """What is trained and how.

    seeing_steps: Steps in which the towers alone learn to see.
    tower_learning_rate: Of the towers, once the whole policy learns.
    noise: Metres of noise (standard deviation) on what the expert executes; its labels stay clean.
    pointing: Share of frames in which the policy points to a thing.
    live_episodes: Episodes that are played at a time, so that a batch mixes as many.
    """

    output: str = "outputs/tabletop"
    tasks: tuple[str, ...] = ("put", "push")
    seeing_steps: int = 1500
    steps: int = 5000
    batch_size: int = 64
    learning_rate: float = 1e-3
    tower_learning_rate: float = 2e-4
    noise: float = 0.0075
    pointing: float = 0.25
    live_episodes: int = 256
    seed: int = 7


def instructions() -> list[str]:
    """Every instruction that the tabletop can give, and those of pointing."""
    put = [f"put the {thing} on the {goal}" for thing, goal in itertools.product(THINGS, GOALS)]
    push = [f"push the {thing} to the {way}" for thing, way in itertools.product(THINGS, DIRECTIONS)]
    stack = [f"stack the {thing} on the {colour} cube" for thing, colour in itertools.product(THINGS, COLOURS)]
    return put + push + stack + [f"point to the {thing}" for thing in (*THINGS, *GOALS, "gripper")]


def play(seeds: list[range], recipe: Recipe) -> Iterator[tuple[TabletopEnv, Any]]:
    """Frames of the expert's episodes with their environments, `live_episodes` mixed; each seed is played once."""
    seed_iterator = itertools.chain.from_iterable(seeds)
    rng = np.random.default_rng(seeds[0].start)

    def start() -> tuple[TabletopEnv, Iterator[Any]]:
        env = TabletopEnv(recipe.tasks)
        return env, rollout_expert(env, next(seed_iterator), noise=recipe.noise)

    live = [start() for _ in range(recipe.live_episodes)]
    while True:
        slot = int(rng.integers(len(live)))
        env, frames = live[slot]
        frame = next(frames, None)
        if frame is None:
            live[slot] = start()
        else:
            yield env, frame


def scenes(seeds: list[range], recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Frames as `image` and `positions` (len(SEEN), 2): fractions of the image, NaN for what is absent."""
    for env, _ in play(seeds, recipe):
        positions = np.full((len(SEEN), 2), np.nan, dtype=np.float32)
        for name, position in image_positions(env.scene).items():
            positions[SEEN.index(name)] = position
        yield {"image": draw_scene(env.scene), "positions": positions}


def demonstrations(seeds: list[range], recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Frames with the expert's action, and now and then one that asks to point: the action is where the thing is."""
    rng = np.random.default_rng(seeds[0].start + 1)
    to_action = MAX_STEP / np.array([*TABLE_HALF, 0.2])
    for env, frame in play(seeds, recipe):
        if rng.random() < recipe.pointing:
            scene = env.scene
            places = {thing.name: thing.position for thing in scene.objects}
            places |= {goal.name: np.array([goal.x, goal.y, 0.0]) for goal in scene.goals}
            places["gripper"] = scene.gripper.position
            name = list(places)[int(rng.integers(len(places)))]
            pointed = np.round(places[name] * to_action / (ACTION_GRID / 4)) * ACTION_GRID / 4
            action = np.array([*pointed, 0.0, 0.0, 0.0, float(scene.gripper.is_open)])
            yield {"image": draw_scene(scene), "instruction": f"point to the {name}", "action": action}
        action = frame.action.astype(np.float64)
        action[:3] = np.round(action[:3] / ACTION_GRID) * ACTION_GRID
        yield {"image": frame.image, "instruction": frame.instruction, "action": action}


def action_statistics(recipe: Recipe, frames: int = 4000) -> dict[str, Any]:
    """Statistics of the expert's actions over the first frames, as `dataset_statistics.json` holds them."""
    stream = play([range(FIRST_UNSEEN_SEED)], recipe)
    actions = np.stack([frame.action for _, frame in itertools.islice(stream, frames)]).astype(np.float64)
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
            "num_trajectories": recipe.live_episodes,
        }
    }


class SceneReader(nn.Module):
    """The towers with two linear heads, which are thrown away afterwards.

    One says of each patch what is in it and how far from the patch's centre; the other says of the whole image
    what is there and where, from the mean over the patches.
    """

    def __init__(self, backbone: nn.Module, width: int, side: int):
        super().__init__()
        self.backbone, self.side = backbone, side
        self.of_patch = nn.Linear(width, 3 * len(SEEN))
        self.of_image = nn.Linear(width, 3 * len(SEEN))

    def forward(self, pixel_values: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """`pixel_values` (B, 6, H, W) and `positions` (B, things, 2) in fractions, NaN if absent, to the loss."""
        features = self.backbone(pixel_values)
        in_patches = positions.nan_to_num(-1.0) * self.side
        present = ((in_patches >= 0) & (in_patches < self.side)).all(-1)
        cell = in_patches.clamp(0, self.side - 1e-3).long()
        patch = (cell[..., 1] * self.side + cell[..., 0]).unsqueeze(-1)  # (B, things, 1)

        of_patch = self.of_patch(features).float().unflatten(-1, (len(SEEN), 3)).transpose(1, 2)
        target = torch.zeros_like(of_patch[..., 0]).scatter_(2, patch, present.float().unsqueeze(-1))
        is_here = nn.functional.binary_cross_entropy_with_logits(
            of_patch[..., 0], target, pos_weight=torch.tensor(10.0, device=target.device)
        )
        offset = of_patch[..., 1:].gather(2, patch.unsqueeze(-1).expand(-1, -1, 1, 2)).squeeze(2)
        how_far = (offset - (in_patches - cell - 0.5)).abs().mean(-1)[present].mean()

        of_image = self.of_image(features.mean(1)).float().unflatten(-1, (len(SEEN), 3))
        is_there = nn.functional.binary_cross_entropy_with_logits(of_image[..., 0], present.float())
        where = (of_image[..., 1:] - (in_patches / self.side - 0.5) * 3).abs().mean(-1)[present].mean()
        return {"loss": 10 * is_here + how_far + is_there + 2 * where}


def sine_cosine_positions(side: int, width: int) -> torch.Tensor:
    """(side * side, width) two-dimensional sine and cosine position embedding."""
    frequency = 100.0 ** -(np.arange(width // 4) / (width // 4))
    rows, columns = np.mgrid[:side, :side].reshape(2, -1, 1)
    waves = [wave(axis * frequency) for axis in (rows, columns) for wave in (np.sin, np.cos)]
    return torch.tensor(np.concatenate(waves, axis=1), dtype=torch.float32)


@torch.no_grad()
def start_positions(model: OpenVLAForActionPrediction, side: int, width: int) -> None:
    """Let both towers know where a patch is from the first step on."""
    table = sine_cosine_positions(side, width)
    backbone = model.model.vision_backbone
    backbone.featurizer.embeddings.position_embeddings[0, 1:] = table
    backbone.fused_featurizer.embeddings.position_embedding.weight.copy_(table)


@torch.no_grad()
def start_projector(model: OpenVLAForActionPrediction, pixel_values: torch.Tensor) -> None:
    """Start the projector so that what varies between patches is what the language model sees.

    The towers' features have a large mean: left in, it hides the image behind a constant.
    """
    features = model.model.vision_backbone(pixel_values).flatten(0, 1)
    projector = model.model.projector
    for layer in (projector.fc1, projector.fc2, projector.fc3):
        if layer is not None:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
    projector.fc1.weight /= features.std(0)
    projector.fc1.bias.copy_(-projector.fc1.weight @ features.mean(0))


def build(recipe: Recipe) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor]:
    """The untrained policy and its processor."""
    tokenizer = tiny_tokenizer(instructions(), merges=128, phrases=[*THINGS, *GOALS])
    config = tiny_config(
        tokenizer,
        image_size=112,
        vision_width=96,
        vision_layers=5,
        text_width=192,
        text_layers=4,
        heads=3,
        norm_stats=action_statistics(recipe),
    )
    # The usual 0.02 suits wide layers.
    config.vision_config.initializer_range, config.text_config.initializer_range = 0.04, 0.06
    model = OpenVLAForActionPrediction(config)
    # On a CPU the backward pass of the fused kernel takes half of a step at these lengths.
    model.set_attn_implementation("eager")
    start_positions(model, side=112 // 14, width=96)
    processor = tiny_processor(tokenizer, config)
    # The table is bright and even: normalised by its own statistics, what stands on it stands out.
    processor.image_processor.image_mean = [[0.82, 0.81, 0.79]] * 2
    processor.image_processor.image_std = [[0.2, 0.2, 0.2]] * 2
    return model, processor


def train(recipe: Recipe) -> None:
    """Train and save model and processor, remote code included, to `recipe.output`."""
    set_seed(recipe.seed)
    model, processor = build(recipe)
    towers = model.model.vision_backbone

    def arguments(name: str, steps: int, learning_rate: float) -> TrainingArguments:
        return TrainingArguments(
            output_dir=f"{recipe.output}/{name}",
            max_steps=steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(100, steps // 10),
            weight_decay=0.05,
            adam_beta2=0.98,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_num_workers=1,
            dataloader_prefetch_factor=4,
            remove_unused_columns=False,
            logging_steps=50,
            save_steps=500,
            save_total_limit=1,
            report_to="none",
            seed=recipe.seed,
        )

    def stream(frames: Any, first_seed: int) -> IterableDataset:
        seeds = [range(first_seed, FIRST_UNSEEN_SEED)]
        return IterableDataset.from_generator(frames, gen_kwargs={"seeds": seeds, "recipe": recipe})

    def collate_scenes(frames: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = processor.image_processor([frame["image"] for frame in frames])["pixel_values"]
        return {"pixel_values": pixels, "positions": torch.tensor(np.stack([frame["positions"] for frame in frames]))}

    if recipe.seeing_steps:
        reader = SceneReader(towers, width=192, side=112 // 14)
        Trainer(
            model=reader,
            args=arguments("seeing", recipe.seeing_steps, 1.5e-3),
            train_dataset=stream(scenes, FIRST_UNSEEN_SEED // 2),
            data_collator=collate_scenes,
        ).train()
        model.eval()
        some = list(itertools.islice(scenes([range(FIRST_UNSEEN_SEED)], recipe), 256))
        start_projector(model, collate_scenes(some)["pixel_values"])

    is_tower = {id(parameter) for parameter in towers.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in is_tower]
    groups = [{"params": list(towers.parameters()), "lr": recipe.tower_learning_rate}, {"params": rest}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    Trainer(
        model=model,
        args=arguments("acting", recipe.steps, recipe.learning_rate),
        train_dataset=stream(demonstrations, 0),
        data_collator=ActionCollator(processor, model.action_tokenizer, model.get_action_stats(UNNORM_KEY)),
        optimizers=(optimizer, None),
    ).train()
    model.set_attn_implementation("sdpa")
    model.to(torch.bfloat16).save_pretrained(recipe.output)
    processor.save_pretrained(recipe.output)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Recipe()
    parser.add_argument("--output", default=default.output)
    parser.add_argument("--seeing-steps", type=int, default=default.seeing_steps)
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    parser.add_argument("--tower-learning-rate", type=float, default=default.tower_learning_rate)
    parser.add_argument("--noise", type=float, default=default.noise, help="metres, on what the expert executes")
    parser.add_argument("--pointing", type=float, default=default.pointing, help="share of pointing frames")
    parser.add_argument("--seed", type=int, default=default.seed)
    train(Recipe(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
