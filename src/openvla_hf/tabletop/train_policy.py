"""Train the small tabletop policy from scratch.

    python -m openvla_hf.tabletop.train_policy --output outputs/tabletop

The policy is OpenVLA at a few million parameters: both towers, projector, Llama, its own tokenizer. OpenVLA starts
from towers and a language model that are pretrained; here nothing is, and from the actions alone it would take
millions of frames to find out that a name means a thing in the image. So what pretraining gives is taught first:

1. Seeing: the towers and the projector learn what is in each patch, and to say it in the language model's own
   embeddings of the names. This goes on to the end.
2. Acting: everything learns the expert's actions, while some attention heads are shown where to look (a name at
   the patch that holds what it names; the action at the names, the gripper and its shadow), and where things are is
   read from the hidden states.

What does the teaching, heads and losses, is thrown away: the result is a plain policy. The expert's episodes are
played while it trains, each once, so nothing is stored and nothing repeats. Started again with the same output, it
goes on from its last checkpoint.
"""

import argparse
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..processing.processing_openvla import OpenVLAProcessor
from ..testing import tiny_config, tiny_processor, tiny_tokenizer
from ..training.collator import IGNORED, ActionCollator
from ..training.trainer import last_checkpoint
from .env import DIRECTIONS, TabletopEnv, Task
from .expert import Frame, demonstrated_action, plan, rollout_expert
from .rollouts import FIRST_UNSEEN_SEED
from .scene import COLOURS, GOAL_KINDS, SHAPES, Scene, image_positions


UNNORM_KEY = "tabletop"
THINGS = [f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)]
GOALS = [f"{colour} {kind}" for colour, kind in itertools.product(COLOURS, GOAL_KINDS)]
NAMES = [*THINGS, *GOALS]
SEEN = [*NAMES, "open gripper", "closed gripper", "shadow"]
OPEN, CLOSED, SHADOW = range(len(NAMES), len(SEEN))
NOWHERE = -1.0  # stands for the position of what is not in the image

IMAGE_SIZE, PATCH_SIZE = 112, 14
SIDE = IMAGE_SIZE // PATCH_SIZE
VISION_WIDTH, TEXT_WIDTH = 96, 192
ACTION_DIM = 7


@dataclass
class Recipe:
    """What is trained and how."""

    output: str = "outputs/tabletop"
    seeing_steps: int = 900
    steps: int = 3400
    batch_size: int = 48
    learning_rate: float = 1e-3
    tower_learning_rate: float = 3e-4  # once everything learns
    noise: float = 0.0075  # metres (standard deviation) on what the expert executes; its labels stay clean
    live_episodes: int = 1024  # played at a time: fewer, and one batch would show the same scenes as the last
    workers: int = 1
    save_steps: int = 250
    seed: int = 7


# Data


def instructions() -> list[str]:
    """Every instruction that the tabletop can give."""
    put = [f"put the {thing} on the {goal}" for thing, goal in itertools.product(THINGS, GOALS)]
    push = [f"push the {thing} to the {way}" for thing, way in itertools.product(THINGS, DIRECTIONS)]
    stack = [f"stack the {thing} on the {colour} cube" for thing, colour in itertools.product(THINGS, COLOURS)]
    return put + push + stack


def play(seeds: list[range], recipe: Recipe) -> Iterator[Frame]:
    """Frames of the expert's episodes, `live_episodes` mixed; each seed is played once."""
    seed_iterator = itertools.chain.from_iterable(seeds)
    rng = np.random.default_rng(seeds[0].start)

    def start() -> Iterator[Frame]:
        # What is executed is noisy already.
        return rollout_expert(TabletopEnv(hand_noise=0.0), next(seed_iterator), noise=recipe.noise)

    live = [start() for _ in range(recipe.live_episodes)]
    while True:
        slot = int(rng.integers(len(live)))
        frame = next(live[slot], None)
        if frame is None:
            live[slot] = start()
        else:
            yield frame


def demonstrations(seeds: list[range], recipe: Recipe) -> Iterator[dict[str, Any]]:
    """The expert's frames, and again some with an empty hand, told to do something else.

    Beside `image`, `instruction` and `action`: `positions` (len(SEEN), 2), in fractions of the image; `target` and
    `goal`, indices into `SEEN` (goal -1 for a push); `offsets` (6,), metres from the hand to both.
    """
    rng = np.random.default_rng(seeds[0].start + 1)
    for frame in play(seeds, recipe):
        scene, task = frame.state
        yield example(frame.image, scene, task)
        if scene.gripper.held is None and rng.random() < 0.25:
            yield example(frame.image, scene, other_task(scene, rng))


def other_task(scene: Scene, rng: np.random.Generator) -> Task:
    """Any thing to any place or side."""
    thing = scene.objects[int(rng.integers(len(scene.objects)))]
    if rng.random() < 0.6:
        goal = scene.goals[int(rng.integers(len(scene.goals)))]
        return Task("put", f"put the {thing.name} on the {goal.name}", thing, goal=goal)
    way = list(DIRECTIONS)[int(rng.integers(len(DIRECTIONS)))]
    return Task("push", f"push the {thing.name} to the {way}", thing, direction=way)


def example(image: np.ndarray, scene: Scene, task: Task) -> dict[str, Any]:
    """One frame of `demonstrations`."""
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


def action_statistics(recipe: Recipe, frames: int = 2000) -> dict[str, Any]:
    """Statistics of the expert's actions over the first frames, as `dataset_statistics.json` holds them."""
    stream = play([range(FIRST_UNSEEN_SEED)], recipe)
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
            "num_trajectories": recipe.live_episodes,
        }
    }


class GuidedCollator(ActionCollator):
    """The usual batch, and where things are."""

    def __call__(self, frames: Any) -> dict[str, torch.Tensor]:
        """Frames of `demonstrations` to a batch; `input_ids` of prompt and action are as for any policy."""
        batch = super().__call__(frames)
        for name in ("positions", "target", "goal", "offsets"):
            batch[name] = torch.tensor(np.stack([frame[name] for frame in frames]))
        return batch


# The policy before it learns


def sine_cosine_positions(side: int, width: int) -> torch.Tensor:
    """(side * side, width) two-dimensional sine and cosine position embedding."""
    frequency = 100.0 ** -(np.arange(width // 4) / (width // 4))
    rows, columns = np.mgrid[:side, :side].reshape(2, -1, 1)
    waves = [wave(axis * frequency) for axis in (rows, columns) for wave in (np.sin, np.cos)]
    return torch.tensor(np.concatenate(waves, axis=1), dtype=torch.float32)


def build(recipe: Recipe) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor]:
    """The untrained policy and its processor."""
    # A name is one token: there is one embedding that says what the patch holds.
    tokenizer = tiny_tokenizer(instructions(), merges=128, phrases=[f" {name}" for name in NAMES])
    config = tiny_config(
        tokenizer,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_width=VISION_WIDTH,
        vision_layers=5,
        text_width=TEXT_WIDTH,
        text_layers=4,
        heads=3,
        norm_stats=action_statistics(recipe),
    )
    text = config.text_config
    text.num_attention_heads = text.num_key_value_heads = 6
    text.head_dim = TEXT_WIDTH // 6
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e5}
    # The usual 0.02 suits wide layers.
    config.vision_config.initializer_range, text.initializer_range = 0.04, 0.06
    model = OpenVLAForActionPrediction(config)
    # Its weights are looked at; and on a CPU the backward pass of the fused kernel takes half of a step.
    model.set_attn_implementation("eager")
    backbone, projector = model.model.vision_backbone, model.model.projector
    with torch.no_grad():
        # Both towers know where a patch is from the first step on.
        table = sine_cosine_positions(SIDE, VISION_WIDTH)
        backbone.featurizer.embeddings.position_embeddings[0, 1:] = table
        backbone.fused_featurizer.embeddings.position_embedding.weight.copy_(table)
        for layer in projector.children():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=1.2 * layer.in_features**-0.5)
    processor = tiny_processor(tokenizer, config)
    processor.prompt_template = "In: {instruction}\nOut:"
    processor.strip_full_stop = True  # no instruction of the tabletop has one
    # The table is bright and even: normalised by its own statistics, what stands on it stands out.
    processor.image_processor.image_mean = [[0.82, 0.81, 0.79]] * 2
    processor.image_processor.image_std = [[0.2, 0.2, 0.2]] * 2
    return model, processor


# Teaching


def in_patches(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions (B, things, 2) to: is it in the image, in which patch (B, things), how far from its centre."""
    scaled = positions * SIDE
    is_there = ((scaled >= 0) & (scaled < SIDE)).all(-1)
    cell = scaled.clamp(0, SIDE - 1e-3).floor()
    return is_there, (cell[..., 1] * SIDE + cell[..., 0]).long(), scaled - cell - 0.5


class Seeing(nn.Module):
    """The policy's towers and projector, with what teaches them to see.

    A patch should say "red cube" by a projected feature that points where the name's embedding points; what has no
    name in an instruction, where each thing is within its patch, and where the patch is, is read by linear heads.
    """

    def __init__(self, model: OpenVLAForActionPrediction, name_ids: torch.Tensor):
        super().__init__()
        self.policy = model
        self.register_buffer("name_ids", name_ids)
        self.read = nn.Linear(TEXT_WIDTH, 3 * len(SEEN))
        self.place = nn.Linear(TEXT_WIDTH, 2)

    def forward(self, pixel_values: torch.Tensor, positions: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        """`pixel_values` (B, 6, H, W) and `positions` (B, things, 2) to the losses."""
        return self.judge(self.policy.get_image_features(pixel_values), positions)

    def judge(self, projected: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Projected features (B, P, D) to the losses."""
        is_there, patch, offset = in_patches(positions)
        names = self.policy.get_input_embeddings().weight[self.name_ids].detach()
        read = self.read(projected).unflatten(-1, (len(SEEN), 3)).transpose(1, 2)  # (B, things, P, 3)
        of_names = 10 * normalize(projected, dim=-1) @ normalize(names, dim=-1).T - 5
        logits = torch.cat([of_names.transpose(1, 2), read[:, len(NAMES) :, :, 0]], dim=1)
        target = torch.zeros_like(logits).scatter_(2, patch.unsqueeze(-1), is_there.to(logits.dtype).unsqueeze(-1))
        what = binary_cross_entropy_with_logits(logits, target, pos_weight=logits.new_tensor(10.0))
        in_patch = read[..., 1:].gather(2, patch[..., None, None].expand(-1, -1, 1, 2)).squeeze(2)
        offset_error = (in_patch - offset).abs().mean(-1)[is_there].mean()
        rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, SIDE, device=read.device)] * 2, indexing="ij")
        place_error = (self.place(projected) - torch.stack([columns, rows], dim=-1).flatten(0, 1)).abs().mean()
        size = (projected.pow(2).mean(-1).sqrt() - 1).pow(2).mean()
        located = (logits.argmax(-1) == patch)[is_there].float().mean()
        return {
            "loss": 10 * what + offset_error + place_error + 0.3 * size,
            "offset_error": offset_error,
            "place_error": place_error,
            "located": located,
        }


class Acting(nn.Module):
    """The policy, with what shows it where to look; it goes on learning to see."""

    def __init__(self, seeing: Seeing):
        super().__init__()
        self.seeing = seeing
        self.where_named = nn.Linear(TEXT_WIDTH, 2)
        self.how_far = nn.Linear(TEXT_WIDTH, 6)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor,
        target: torch.Tensor,
        goal: torch.Tensor,
        offsets: torch.Tensor,
        **inputs: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """A batch of `GuidedCollator` to the losses."""
        policy = self.seeing.policy
        outputs = policy.model(
            input_ids=input_ids, **inputs, output_attentions=True, output_hidden_states=True, use_cache=False
        )
        row = torch.arange(len(input_ids), device=input_ids.device)
        # The tokens that predict the action, (B, 7).
        predicting = (labels[:, 1:] != IGNORED).int().argmax(1, keepdim=True) + torch.arange(
            ACTION_DIM, device=row.device
        )
        logits = policy.lm_head(outputs.last_hidden_state[row[:, None], predicting])
        action = labels[row[:, None], predicting + 1]
        nll = cross_entropy(logits.transpose(1, 2), action, reduction="none").mean(0)

        has_goal = goal >= 0
        goal = goal.clamp(min=0)
        is_there, patch, _ = in_patches(positions)
        first_patch = (input_ids == policy.config.image_token_id).int().argmax(1, keepdim=True)
        patch = patch + first_patch

        def token_of(name: torch.Tensor) -> torch.Tensor:
            return (input_ids == self.seeing.name_ids[name].unsqueeze(1)).int().argmax(1)

        def look(layer: int, head: int, query: torch.Tensor, key: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            """How little the queries (B, Q) attend to the key (B,), over the rows that count."""
            weights = outputs.attentions[layer][row[:, None], head, query]
            attended = weights.gather(2, key[:, None, None].expand(-1, query.shape[1], 1)).squeeze(2)
            return (-(attended + 1e-6).log().mean(1) * counts).sum() / counts.sum().clamp(min=1)

        gripper = torch.where(is_there[:, OPEN], OPEN, CLOSED)
        target_token, goal_token = token_of(target), token_of(goal)
        attention = (
            look(1, 0, target_token[:, None], patch[row, target], is_there[row, target])
            + look(1, 0, goal_token[:, None], patch[row, goal], has_goal)
            + look(1, 1, predicting, patch[row, gripper], is_there[row, gripper])
            + look(1, 2, predicting, patch[:, SHADOW], is_there[:, SHADOW])
            + look(2, 0, predicting, target_token, torch.ones_like(has_goal))
            + look(2, 1, predicting, goal_token, has_goal)
        )
        at_names, at_action = outputs.hidden_states[2], outputs.hidden_states[3]
        place = 4 * positions - 2
        named = (self.where_named(at_names[row, target_token]) - place[row, target]).abs().mean(-1)
        named_goal = (self.where_named(at_names[row, goal_token]) - place[row, goal]).abs().mean(-1)
        far = (self.how_far(at_action[row[:, None], predicting]) - 10 * offsets.unsqueeze(1)).abs().mean(1)
        both = has_goal.sum().clamp(min=1)
        where = named.mean() + (named_goal * has_goal).sum() / both
        distance = far[:, :3].mean() + (far[:, 3:].mean(-1) * has_goal).sum() / both
        seen = self.seeing.judge(outputs.image_hidden_states, positions)
        return {
            "loss": nll.mean() + 0.3 * attention + where + distance + seen.pop("loss"),
            **seen,
            "nll_dx": nll[0],
            "nll_dy": nll[1],
            "nll_dz": nll[2],
            "nll_gripper": nll[-1],
            "attention": attention,
            "where": where,
            "distance": distance,
        }


class GuidedTrainer(Trainer):
    """Logs the parts of the loss too."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.parts: dict[str, list[torch.Tensor]] = defaultdict(list)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss; its parts are kept until they are logged."""
        outputs = model(**inputs)
        for name, value in outputs.items():
            if name != "loss":
                self.parts[name].append(value.detach())
        return outputs["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, with the means of the parts since the last time."""
        means = {name: round(torch.stack(values).mean().item(), 4) for name, values in self.parts.items()}
        self.parts.clear()
        super().log(logs | means, *args, **kwargs)


class SavePolicy(TrainerCallback):
    """Saves the policy itself with each checkpoint, so that it can be watched while it learns."""

    def __init__(self, save: Callable[[], None]):
        self.save = save

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """At each checkpoint."""
        self.save()


def train(recipe: Recipe) -> None:
    """Train and save model and processor, remote code included, to `recipe.output`."""
    set_seed(recipe.seed)
    model, processor = build(recipe)
    name_ids = torch.tensor(processor.tokenizer.convert_tokens_to_ids([f" {name}" for name in NAMES]))

    def save() -> None:
        model.set_attn_implementation("sdpa")
        model.save_pretrained(recipe.output)
        model.set_attn_implementation("eager")
        processor.save_pretrained(recipe.output)

    def run(module: nn.Module, name: str, steps: int, groups: list[dict[str, Any]], first_seed: int) -> None:
        if not steps:
            return
        folder = Path(recipe.output, name)
        checkpoint = last_checkpoint(folder)
        if checkpoint:  # on from seeds that have not been played
            done = TrainerState.load_from_json(Path(checkpoint, TRAINER_STATE_NAME)).global_step
            first_seed += done * recipe.batch_size
        stream = IterableDataset.from_generator(
            demonstrations, gen_kwargs={"seeds": seed_ranges(first_seed, recipe.workers), "recipe": recipe}
        )
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
        GuidedTrainer(
            model=module,
            args=TrainingArguments(
                output_dir=str(folder),
                ignore_data_skip=True,
                max_steps=steps,
                per_device_train_batch_size=recipe.batch_size,
                lr_scheduler_type="cosine",
                warmup_steps=min(100, steps // 10),
                use_cpu=not torch.cuda.is_available(),
                dataloader_num_workers=recipe.workers,
                dataloader_prefetch_factor=4 if recipe.workers else None,
                remove_unused_columns=False,
                logging_steps=50,
                save_steps=recipe.save_steps,
                save_total_limit=1,
                report_to="none",
                seed=recipe.seed,
            ),
            train_dataset=stream,
            data_collator=GuidedCollator(processor, model.action_tokenizer, model.get_action_stats(UNNORM_KEY)),
            optimizers=(optimizer, None),
            callbacks=[SavePolicy(save)],
        ).train(resume_from_checkpoint=checkpoint)

    seeing = Seeing(model, name_ids)
    eyes = [model.model.vision_backbone, model.model.projector, seeing.read, seeing.place]
    run(
        seeing,
        "seeing",
        recipe.seeing_steps,
        [{"params": [parameter for eye in eyes for parameter in eye.parameters()], "lr": 1.5e-3}],
        FIRST_UNSEEN_SEED // 2,
    )
    acting = Acting(seeing)
    towers = list(model.model.vision_backbone.parameters())
    is_tower = {id(parameter) for parameter in towers}
    rest = [parameter for parameter in acting.parameters() if id(parameter) not in is_tower]
    run(
        acting,
        "acting",
        recipe.steps,
        [{"params": towers, "lr": recipe.tower_learning_rate}, {"params": rest, "lr": recipe.learning_rate}],
        0,
    )
    save()


def seed_ranges(first: int, workers: int) -> list[range]:
    """The seeds from `first` on to the end of its half of those that may be seen, a range for each worker."""
    half = FIRST_UNSEEN_SEED // 2
    cuts = np.linspace(first, (first // half + 1) * half, max(workers, 1) + 1).astype(int).tolist()
    return [range(*pair) for pair in itertools.pairwise(cuts)]


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"defaults: {Recipe()}"
    )
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    train(Recipe(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
