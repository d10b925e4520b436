"""The losses that teach the tabletop policy what it sees and where to look; none of this is part of the policy.

Shapes: B batch, P image patches, D width of the language model, things as in `SEEN`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..training.collator import IGNORED
from .scene import COLOURS, GOAL_KINDS, SHAPES


# Names of things and goals in instructions, and what else the policy learns to see.
THINGS = [f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)]
GOALS = [f"{colour} {kind}" for colour, kind in itertools.product(COLOURS, GOAL_KINDS)]
NAMES = [*THINGS, *GOALS]
SEEN = [*NAMES, "open gripper", "closed gripper", "shadow"]
OPEN, CLOSED, SHADOW = range(len(NAMES), len(SEEN))

# Sizes of the policy: patches along a side of the image, width of the language model, dimensions of an action.
SIDE = 8
TEXT_WIDTH = 192
ACTION_DIM = 7


def in_patches(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Locate positions (B, things, 2) in the grid of patches.

    Returns:
        Whether each is in the image (B, things), its patch (B, things), and its offset from the patch's centre
        (B, things, 2), in patches.
    """
    scaled = positions * SIDE
    is_there = ((scaled >= 0) & (scaled < SIDE)).all(-1)
    cell = scaled.clamp(0, SIDE - 1e-3).floor()
    return is_there, (cell[..., 1] * SIDE + cell[..., 0]).long(), scaled - cell - 0.5


class Seeing(nn.Module):
    """The policy's towers and projector, with the heads that teach them to see.

    The projected feature of a patch with a red cube should point in the direction of the embedding of "red cube".
    Linear heads read the objects without a name in the instructions, the offset of each object within its patch, and
    the position of the patch.
    """

    def __init__(self, model: OpenVLAForActionPrediction, name_ids: torch.Tensor):
        super().__init__()
        self.policy = model
        self.register_buffer("name_ids", name_ids)
        self.read = nn.Linear(TEXT_WIDTH, 3 * len(SEEN))
        self.place = nn.Linear(TEXT_WIDTH, 2)

    def forward(self, pixel_values: torch.Tensor, positions: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        """Compute the losses from `pixel_values` (B, 6, H, W) and `positions` (B, things, 2)."""
        return self.judge(self.policy.get_image_features(pixel_values), positions)

    def judge(self, projected: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the losses from projected features (B, P, D) and `positions` (B, things, 2)."""
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


@dataclass
class Marks:
    """The tokens of a batch that the losses refer to. Things are those of `SEEN`.

    Attributes:
        row: Index of each row, (B,).
        target: Thing to move, (B,).
        goal: Thing to put it on, (B,); any thing where there is no goal.
        has_goal: Whether there is a goal, (B,).
        is_there: Whether each thing is in the image, (B, things).
        patch: Position in the sequence of each thing's patch, (B, things).
        target_token: Position of the target's name, (B,).
        goal_token: Position of the goal's name, (B,).
        predicting: Positions of the tokens that predict the action, (B, 7).
    """

    row: torch.Tensor
    target: torch.Tensor
    goal: torch.Tensor
    has_goal: torch.Tensor
    is_there: torch.Tensor
    patch: torch.Tensor
    target_token: torch.Tensor
    goal_token: torch.Tensor
    predicting: torch.Tensor


class Acting(nn.Module):
    """The policy, with the losses that show it where to look. The losses for seeing continue."""

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
        """Compute the losses of a batch of `GuidedCollator`."""
        policy = self.seeing.policy
        outputs = policy.model(
            input_ids=input_ids, **inputs, output_attentions=True, output_hidden_states=True, use_cache=False
        )
        marks = self.find(input_ids, labels, positions, target, goal)
        logits = policy.lm_head(outputs.last_hidden_state[marks.row[:, None], marks.predicting])
        action = labels[marks.row[:, None], marks.predicting + 1]
        nll = cross_entropy(logits.transpose(1, 2), action, reduction="none").mean(0)
        attention = self.judge_attention(outputs.attentions, marks)
        where, distance = self.judge_places(outputs.hidden_states, marks, positions, offsets)
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

    def find(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor,
        target: torch.Tensor,
        goal: torch.Tensor,
    ) -> Marks:
        """Find the tokens that the losses refer to."""
        has_goal, goal = goal >= 0, goal.clamp(min=0)
        is_there, patch, _ = in_patches(positions)
        first_patch = (input_ids == self.seeing.policy.config.image_token_id).int().argmax(1, keepdim=True)
        first_action = (labels[:, 1:] != IGNORED).int().argmax(1, keepdim=True)

        def token_of(name: torch.Tensor) -> torch.Tensor:
            return (input_ids == self.seeing.name_ids[name].unsqueeze(1)).int().argmax(1)

        return Marks(
            row=torch.arange(len(input_ids), device=input_ids.device),
            target=target,
            goal=goal,
            has_goal=has_goal,
            is_there=is_there,
            patch=patch + first_patch,
            target_token=token_of(target),
            goal_token=token_of(goal),
            predicting=first_action + torch.arange(ACTION_DIM, device=input_ids.device),
        )

    def judge_attention(self, attentions: Sequence[torch.Tensor], marks: Marks) -> torch.Tensor:
        """Compute the loss of the attention heads that should look at certain tokens."""
        row, is_there, patch = marks.row, marks.is_there, marks.patch

        def look(layer: int, head: int, query: torch.Tensor, key: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            """Average the loss of the queries (B, Q) for the key (B,) over the rows that count (B,)."""
            weights = attentions[layer][row[:, None], head, query]
            attended = weights.gather(2, key[:, None, None].expand(-1, query.shape[1], 1)).squeeze(2)
            return (-(attended + 1e-6).log().mean(1) * counts).sum() / counts.sum().clamp(min=1)

        gripper = torch.where(is_there[:, OPEN], OPEN, CLOSED)
        target_query, goal_query = marks.target_token.unsqueeze(1), marks.goal_token.unsqueeze(1)
        return (
            look(1, 0, target_query, patch[row, marks.target], is_there[row, marks.target])
            + look(1, 0, goal_query, patch[row, marks.goal], marks.has_goal)
            + look(1, 1, marks.predicting, patch[row, gripper], is_there[row, gripper])
            + look(1, 2, marks.predicting, patch[:, SHADOW], is_there[:, SHADOW])
            + look(2, 0, marks.predicting, marks.target_token, torch.ones_like(marks.has_goal))
            + look(2, 1, marks.predicting, marks.goal_token, marks.has_goal)
        )

    def judge_places(
        self, hidden_states: Sequence[torch.Tensor], marks: Marks, positions: torch.Tensor, offsets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the errors of the places that linear heads read at the names and at the action.

        Returns:
            The loss of the named things' positions in the image, and of their distances from the hand.
        """
        at_names, at_action = hidden_states[2], hidden_states[3]
        place = 4 * positions - 2
        row, has_goal = marks.row, marks.has_goal
        named = (self.where_named(at_names[row, marks.target_token]) - place[row, marks.target]).abs().mean(-1)
        named_goal = (self.where_named(at_names[row, marks.goal_token]) - place[row, marks.goal]).abs().mean(-1)
        far = (self.how_far(at_action[row[:, None], marks.predicting]) - 10 * offsets.unsqueeze(1)).abs().mean(1)
        with_goal = has_goal.sum().clamp(min=1)
        where = named.mean() + (named_goal * has_goal).sum() / with_goal
        distance = far[:, :3].mean() + (far[:, 3:].mean(-1) * has_goal).sum() / with_goal
        return where, distance
