"""Train the small tabletop policy from scratch on the scripted expert's demonstrations.

    python -m openvla_hf.training.tabletop_policy --output outputs/tabletop

The policy is OpenVLA at a few million parameters: both towers, projector, Llama, its own tokenizer. The
demonstrations are played while it trains, each episode once, so nothing is stored and nothing repeats.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from transformers import Trainer, TrainingArguments, set_seed

from ..evaluation.rollouts import FIRST_UNSEEN_SEED
from ..evaluation.tabletop import DIRECTIONS, TabletopEnv, rollout_expert
from ..evaluation.tabletop_scene import COLOURS, GOAL_KINDS, SHAPES
from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..testing import tiny_config, tiny_processor, tiny_tokenizer
from .collator import ActionCollator


UNNORM_KEY = "tabletop"


@dataclass
class Recipe:
    """What is trained and how.

    noise: Metres of noise (standard deviation) on what the expert executes; its labels stay clean.
    live_episodes: Episodes that are played at a time, so that a batch mixes as many.
    """

    output: str = "outputs/tabletop"
    tasks: tuple[str, ...] = ("put", "push")
    steps: int = 5000
    batch_size: int = 64
    learning_rate: float = 7e-4
    noise: float = 0.0075
    live_episodes: int = 256
    seed: int = 7
    resume: bool = False


def instructions() -> list[str]:
    """Every instruction that the tabletop can give, one for each pair of things."""
    things = [f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)]
    goals = [f"{colour} {kind}" for colour, kind in itertools.product(COLOURS, GOAL_KINDS)]
    put = [f"put the {thing} on the {goal}" for thing, goal in itertools.product(things, goals)]
    push = [f"push the {thing} to the {way}" for thing, way in itertools.product(things, DIRECTIONS)]
    stack = [f"stack the {thing} on the {colour} cube" for thing, colour in itertools.product(things, COLOURS)]
    return put + push + stack


def demonstrations(seeds: list[range], tasks: tuple[str, ...], noise: float, live_episodes: int) -> Iterator[dict]:
    """Frames of the expert's episodes, `live_episodes` of them mixed; each seed is played once."""
    seed_iterator = itertools.chain.from_iterable(seeds)
    rng = np.random.default_rng(seeds[0].start)

    def play() -> Iterator[Any]:
        return rollout_expert(TabletopEnv(tasks), next(seed_iterator), noise=noise)

    live = [play() for _ in range(live_episodes)]
    while live:
        slot = int(rng.integers(len(live)))
        frame = next(live[slot], None)
        if frame is None:
            live[slot] = play()
            continue
        yield {"image": frame.image, "instruction": frame.instruction, "action": frame.action}


def action_statistics(tasks: tuple[str, ...], noise: float, episodes: int = 200) -> dict[str, Any]:
    """Statistics of the expert's actions over the first `episodes` seeds, as `dataset_statistics.json` holds them."""
    runs = [list(rollout_expert(TabletopEnv(tasks), seed, noise=noise)) for seed in range(episodes)]
    actions = np.stack([frame.action for run in runs for frame in run]).astype(np.float64)
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
            "num_transitions": len(actions),
            "num_trajectories": episodes,
        }
    }


def train(recipe: Recipe) -> None:
    """Train and save model and processor, remote code included, to `recipe.output`."""
    set_seed(recipe.seed)
    tokenizer = tiny_tokenizer(instructions(), merges=128)
    config = tiny_config(
        tokenizer,
        image_size=112,
        vision_width=96,
        vision_layers=5,
        text_width=192,
        text_layers=4,
        heads=3,
        norm_stats=action_statistics(recipe.tasks, recipe.noise),
    )
    # The usual 0.02 suits wide layers: in narrow ones the image would start as a whisper beside the text.
    for part in (config.vision_config, config.text_config):
        part.initializer_range = 0.06
    model = OpenVLAForActionPrediction(config)
    # On a CPU the backward pass of the fused kernel takes half of a step at these lengths.
    model.set_attn_implementation("eager")
    processor = tiny_processor(tokenizer, config)
    # The table is bright and even: normalised by its own statistics, what stands on it stands out.
    processor.image_processor.image_mean = [[0.82, 0.81, 0.79]] * 2
    processor.image_processor.image_std = [[0.2, 0.2, 0.2]] * 2
    collator = ActionCollator(processor, model.action_tokenizer, model.get_action_stats(UNNORM_KEY))
    data = IterableDataset.from_generator(
        demonstrations,
        gen_kwargs={
            "seeds": [range(0, FIRST_UNSEEN_SEED)],
            "tasks": recipe.tasks,
            "noise": recipe.noise,
            "live_episodes": recipe.live_episodes,
        },
    )
    arguments = TrainingArguments(
        output_dir=recipe.output,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(200, recipe.steps // 10),
        weight_decay=0.05,
        adam_beta2=0.95,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=1,
        dataloader_prefetch_factor=4,
        remove_unused_columns=False,
        logging_steps=25,
        save_steps=500,
        save_total_limit=2,
        report_to="none",
        seed=recipe.seed,
        # A position in a stream of played episodes can't be sought: a resumed run goes on with fresh ones.
        ignore_data_skip=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
    trainer.train(resume_from_checkpoint=recipe.resume or None)
    model.to(torch.bfloat16).save_pretrained(recipe.output)
    processor.save_pretrained(recipe.output)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Recipe()
    parser.add_argument("--output", default=default.output)
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    parser.add_argument("--noise", type=float, default=default.noise, help="metres, on what the expert executes")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    train(Recipe(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
