"""Arguments of a fine-tuning run: its data, its training and its evaluation."""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:  # the command line builds its parser from this module, so importing it must be cheap
    from datasets import Dataset, IterableDataset

    from .recipes import Recipe

DEFAULT_SETTINGS: Mapping[str, Any] = {
    "max_steps": 5000,
    "save_steps": 500,
    "logging_steps": 10,
    "save_total_limit": 2,
    "dataloader_num_workers": 2,
}
"""Arguments of `transformers.TrainingArguments` for every run. Evaluation follows `save_steps`."""
VALIDATION_FRAMES = 256
"""Number of frames of each dataset of a mixture in an evaluation, by default."""
STATISTICS_OPTIONS = ("name", "robot", "every", "skip_bad_episodes")
"""Options that `load` and `whole_statistics` share."""


@dataclass(frozen=True)
class TrainingData:
    """One dataset of a run.

    Args:
        source: Folder, Hub id or URL; see `openvla_hf.data.load`.
        options: Further arguments of `load`, such as `robot`, `camera`, `split` or `streaming`.
        weight: Factor on the number of its frames in a mixture with other datasets.
    """

    source: str | os.PathLike
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def statistics_options(self) -> dict[str, Any]:
        """The options of `load` that the statistics of the whole dataset depend on; see `whole_statistics`."""
        return {name: self.options[name] for name in STATISTICS_OPTIONS if name in self.options}


@dataclass(frozen=True)
class TrainingMixture:
    """A mixture of datasets in one folder, balanced by their numbers of steps as in the original.

    Args:
        mixture: Name of a mixture or of a dataset of Open X-Embodiment, a JSON or TOML file with weights by dataset,
            or weights by name; see `openvla_hf.data.load_mixture`.
        folder: Folder or URL that contains the datasets' folders.
        options: Arguments of `load` for every dataset. Without `split`, the episodes are those that the original
            trains on.
        allow_missing: Whether to leave out the datasets that are missing or can't be trained on, with a warning.
    """

    mixture: str | os.PathLike | Mapping[str, float]
    folder: str | os.PathLike
    options: Mapping[str, Any] = field(default_factory=dict)
    allow_missing: bool = False

    def select(self) -> tuple[TrainingData, ...]:
        """Return the datasets of the mixture.

        Raises:
            ValueError: The mixture is unknown, or a dataset can't be trained on.
            FileNotFoundError: Datasets are missing. The message says where to get them.
        """
        from ..data.mixtures import dataset_folder, select_datasets, training_splits

        datasets = []
        for name, weight in select_datasets(self.mixture, self.folder, self.allow_missing).items():
            path = dataset_folder(self.folder, name)
            split = self.options.get("split") or training_splits(path)[0]
            datasets.append(TrainingData(path, {**self.options, "name": name, "split": split}, weight))
        return tuple(datasets)

    def select_validation(self) -> tuple[TrainingData, ...]:
        """Return streams of the episodes that the original holds out, for each dataset of the mixture.

        Raises:
            ValueError: The mixture has a dataset that is not in RLDS, which has no such episodes.
        """
        from ..data.mixtures import training_splits

        datasets = []
        for one in self.select():
            split = training_splits(os.fspath(one.source))[1]
            if split is None:
                raise ValueError(
                    f"{one.source} is not an RLDS dataset, so it has no episodes for `validation`. Give `eval_share` "
                    "or `eval_data` instead."
                )
            options = {**one.options, "split": split, "streaming": True, "shuffle_buffer": 0}
            datasets.append(TrainingData(one.source, options))
        return tuple(datasets)


@dataclass(frozen=True, kw_only=True)
class FinetuneArguments:
    """Describe one fine-tuning run, for `finetune`.

    Args:
        model: Folder or Hub id of the base model.
        data: Demonstrations: a folder or Hub id, a `TrainingData`, one `TrainingData` for each of several datasets,
            a `TrainingMixture`, or frames that `openvla_hf.data` has already loaded.
        output: Folder of the checkpoints and the result.
        statistics: Action statistics by dataset, or the file or folder that contains them. By default, they are
            computed from the training frames, or for a `TrainingMixture` from all steps of each dataset.
        recipe: Name of a recipe, or a `Recipe`.
        settings: Fields of the recipe or of `transformers.TrainingArguments`, such as
            `{"lora_rank": 64, "max_steps": 1000}`. They override the recipe and `DEFAULT_SETTINGS`.
        model_kwargs: Further arguments of `from_pretrained` for the base model.
        resume: Whether to continue from the last complete checkpoint in `output`.
        matrix_rate: Operations per second of a GPU for matrix products, of which the log gives the used share. By
            default that of the data sheet, if the GPU is known.
        eval_share: Share of the episodes of each dataset that is held out for evaluation, from 0 (none) to below 1.
        validation: Whether to evaluate on the episodes of a `TrainingMixture` that the original holds out: those of
            the split "val", or the last 5%.
        eval_frames: Number of frames that each evaluation takes. With `eval_share`, they are spread over all held-out
            frames, all of which are taken by default. With `validation`, they are the first of each dataset, by
            default `VALIDATION_FRAMES`.
        eval_data: Frames to evaluate on instead of held-out episodes, or several sets of frames by name.
        keep_best: Figure that selects the best checkpoint, whose weights end up in `output`: "loss", "action_accuracy"
            or "action_l1". By default, `output` gets the last weights.
        patience: Number of evaluations without an improvement after which training stops; implies `keep_best="loss"`.

    Raises:
        ValueError: `data` is empty or contains a dataset twice, or the arguments of the evaluation contradict each
            other.
    """

    model: str | os.PathLike
    output: str | os.PathLike
    # Data
    data: "str | os.PathLike | TrainingData | Sequence[TrainingData] | TrainingMixture | Dataset | IterableDataset"
    statistics: Mapping[str, Any] | str | os.PathLike | None = None
    # Run
    recipe: "str | Recipe" = "lora"
    settings: Mapping[str, Any] = field(default_factory=dict)
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False
    matrix_rate: float | None = None
    # Evaluation
    eval_share: float = 0.0
    validation: bool = False
    eval_frames: int | None = None
    eval_data: "Dataset | IterableDataset | Mapping[str, Any] | None" = None
    keep_best: str | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.data, (list, tuple)):
            sources = [str(one.source) for one in self.data]
            if not sources:
                raise ValueError("`data` is empty: give at least one dataset to train on.")
            if len(set(sources)) < len(sources):
                raise ValueError("A dataset is given twice in `data`. Give it once, with a higher weight.")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"`eval_share` must be at least 0 and below 1, got {self.eval_share}.")
        if bool(self.eval_share) + self.validation + (self.eval_data is not None) > 1:
            raise ValueError(
                "`eval_share`, `validation` and `eval_data` all select evaluation data. Give only one of them."
            )
        if self.eval_share and self.order_of_frames.get("streaming", False) is not False:
            raise ValueError(
                "`eval_share` can't hold out episodes of a stream. Load the data without `streaming`, or give "
                "`validation` for a mixture."
            )
        if self.validation and (not isinstance(self.data, TrainingMixture) or self.data.options.get("split")):
            raise ValueError(
                "`validation` needs a mixture that is read without `split`. Give `eval_share` or `eval_data` instead."
            )
        lacks_data = (self.patience or self.keep_best) and not self.evaluates
        if lacks_data or (self.eval_frames and not self.eval_share and not self.validation):
            raise ValueError(
                "`patience`, `keep_best` and `eval_frames` need held-out episodes: give `eval_share` or `validation`."
            )

    @property
    def evaluates(self) -> bool:
        """Whether the policy is evaluated while it trains."""
        return self.eval_share > 0 or self.validation or self.eval_data is not None

    @property
    def order_of_frames(self) -> dict[str, Any]:
        """`streaming` and `shuffle_buffer` of the data, in lists if datasets differ; empty for loaded frames."""
        given = self.data if isinstance(self.data, (list, tuple)) else [self.data]
        options = [one.options for one in given if isinstance(one, (TrainingData, TrainingMixture))]
        order = {}
        for name, default in {"streaming": False, "shuffle_buffer": 0}.items() if options else ():
            values = [one.get(name, default) for one in options]
            order[name] = values[0] if len({*values}) == 1 else values
        return order

    @functools.cached_property
    def datasets(self) -> "tuple[TrainingData, ...]":
        """The datasets to load; empty if `data` contains loaded frames."""
        if isinstance(self.data, (str, os.PathLike)):
            return (TrainingData(self.data),)
        if isinstance(self.data, TrainingData):
            return (self.data,)
        if isinstance(self.data, TrainingMixture):
            return self.data.select()
        return tuple(self.data) if isinstance(self.data, (list, tuple)) else ()

    @property
    def data_title(self) -> str:
        """The mixture and its folder, or the datasets."""
        if not isinstance(self.data, TrainingMixture):
            return ", ".join(str(one.source) for one in self.datasets) or "frames that are already loaded"
        from ..data.feature_names import counted

        mixture = self.data.mixture
        if isinstance(mixture, Mapping) or os.fspath(mixture).lstrip().startswith("{"):
            mixture = f"of {counted(len(self.datasets), 'dataset')}"
        return f"mixture {mixture} in {self.data.folder}"

    @property
    def weights(self) -> list[float] | None:
        """Weight of each dataset in the mixture, or `None` if all weights are 1."""
        weights = [one.weight for one in self.datasets]
        return None if all(weight == 1 for weight in weights) else weights


__all__ = ["DEFAULT_SETTINGS", "VALIDATION_FRAMES", "FinetuneArguments", "TrainingData", "TrainingMixture"]
