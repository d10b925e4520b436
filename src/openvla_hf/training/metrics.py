"""Action metrics: the share of correct action tokens, and the error of the decoded actions.

Shapes: B batch, K supervised positions of the row that has the most, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import reduce

from ..modeling.action_tokenizer import ActionTokenizer
from .collator import IGNORED


class ActionMetrics:
    """Accumulate action metrics over batches, for all datasets together and for each one if there are several.

    - `action_accuracy`: share of the action tokens that the arg max over the vocabulary gets right.
    - `action_l1`: mean absolute error of the decoded, normalised actions.
    - `loss`: mean cross entropy of the tokens, for policies that predict tokens.

    Args:
        tokenizer: Decodes ids into normalised actions.
        vocabulary: Number of ids.
        stop_id: Id of the stop token, which does not count.
        datasets: Names of the datasets.
    """

    def __init__(self, tokenizer: ActionTokenizer, vocabulary: int, stop_id: int, datasets: Sequence[str]):
        self.tokenizer, self.stop_id, self.datasets = tokenizer, stop_id, list(datasets)
        self.value_of_id = torch.from_numpy(tokenizer.decode(np.arange(vocabulary)))
        # For each dataset, and at the end for rows that don't count: number of action tokens, number of correct ones,
        # sum of absolute errors, number of all supervised tokens, sum of losses.
        self.counts = torch.zeros((len(self.datasets) or 1) + 1, 5, dtype=torch.float64)

    def update(
        self,
        predicted: torch.Tensor,
        targets: torch.Tensor,
        dataset_index: torch.Tensor | None,
        distance: torch.Tensor | None = None,
        losses: torch.Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            predicted: Predicted ids (B, K).
            targets: Correct ids (B, K), or `IGNORED`.
            dataset_index: Position of each row's dataset (B,), or `PADDING` for rows that don't count; the first by
                default.
            distance: Absolute errors (B, K) of a policy that predicts numbers; by default, those of the ids' values.
            losses: Cross entropy (B, K) of a policy that predicts tokens.
        """
        device = targets.device
        self.value_of_id, self.counts = self.value_of_id.to(device), self.counts.to(device)
        is_supervised = targets.ne(IGNORED)
        is_action = is_supervised & targets.ne(self.stop_id)
        if distance is None:
            distance = (self.value_of_id[predicted] - self.value_of_id[targets.clamp(min=0)]).abs()
        sums = [is_action, is_action & (predicted == targets), is_action * distance]
        sums += [torch.zeros_like(is_action)] * 2 if losses is None else [is_supervised, losses]
        of_rows = torch.stack([one.sum(1).double() for one in sums], dim=1)
        if dataset_index is None:
            dataset_index = torch.zeros(len(targets), dtype=torch.long, device=device)
        self.counts.index_add_(0, dataset_index % len(self.counts), of_rows)

    def update_chunks(
        self,
        predicted: torch.Tensor,
        actions: torch.Tensor,
        targets: torch.Tensor,
        dataset_index: torch.Tensor | None,
    ) -> None:
        """Add a batch of predicted chunks.

        Args:
            predicted: Predicted normalised actions (B, K, A).
            actions: Correct ones (B, K, A).
            targets: Ids of the correct ones (B, K * A), or `IGNORED`.
            dataset_index: Position of each row's dataset (B,); the first by default.
        """
        ids = torch.from_numpy(self.tokenizer.encode(predicted.float().cpu().numpy())).to(targets.device)
        self.update(ids.flatten(1), targets, dataset_index, (predicted - actions).abs().flatten(1))

    def take(self, prefix: str = "") -> dict[str, float]:
        """Return the metrics since the last call, over all processes, and start again.

        Args:
            prefix: Prefix of each name.
        """
        counts = reduce(self.counts, reduction="sum").cpu()[:-1]
        self.counts = torch.zeros_like(self.counts)
        rows = {"": counts.sum(0)}
        if len(counts) > 1:
            rows |= {f"/{name}": row for name, row in zip(self.datasets, counts, strict=True)}
        metrics = {}
        for name, (tokens, right, distance, supervised, loss) in rows.items():
            if tokens:
                metrics[f"{prefix}action_accuracy{name}"] = float(right / tokens)
                metrics[f"{prefix}action_l1{name}"] = float(distance / tokens)
            if supervised:
                metrics[f"{prefix}loss{name}"] = float(loss / supervised)
        return metrics


__all__ = ["ActionMetrics"]
