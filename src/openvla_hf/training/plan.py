"""A plan of a run on many GPUs: which rank reads which shards, and the memory, steps, hours and bytes.

It comes from the configuration of the model and the metadata of the datasets, without weights, frames or GPUs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table
from transformers import AutoConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from ..data.feature_names import counted
from ..data.mixtures import epoch_length, sampling_shares
from ..data.readers.rlds import RLDSSource
from ..data.shard_rows import ShardRows
from ..data.splits import dataset_name
from ..data.streams import FrameStream, divide_shards
from ..data.whole_statistics import cached_whole_statistics, whole_statistics
from ..modeling.configuration_openvla import OpenVLAConfig
from .arguments import FinetuneArguments, TrainingData, TrainingMixture
from .finetune import check_run
from .recipes import GIB, RECIPES, Recipe, describe_memory, estimate_cost, meta_model
from .run_frames import load_datasets, read_statistics


# Number of shards that the table lists.
LISTED = 3


@dataclass(frozen=True)
class DatasetPlan:
    """What a run reads of a dataset.

    Args:
        name: Name of the dataset.
        frames: Number of frames in one pass, or `None` if the metadata does not contain it.
        bytes: Bytes of the files that all ranks together read in one pass. Readers that share a shard each read all of
            it. `None` if a server does not report sizes.
        share: Share of the draws, or `None` if a number of frames is unknown.
        shards: Number of shards: files of an RLDS dataset, episodes of a LeRobot dataset.
        readers_per_shard: Number of readers that share a shard in one pass, where a reader is a worker of a rank.
        ranks: Numbers of the shards that each rank reads in its first pass. In pass k, reader i reads what reader
            i + k has read in its first pass.
        passes: Number of passes of the whole run, or `None` if it is unknown.
    """

    name: str
    frames: int | None
    bytes: int | None
    share: float | None
    shards: int
    readers_per_shard: int
    ranks: list[list[int]]
    passes: float | None = None


@dataclass(frozen=True)
class GpuMemory:
    """Estimate of the memory of one GPU in GiB.

    Weights, gradients and the state of AdamW are divided by the number of GPUs that shard the model. The allocator's
    overhead, the communication's buffers and the logits are not included.

    Args:
        weights: Weights that are stored.
        gradients: Gradients that are stored. With sharding and several batches in a step, also the whole gradients in
            float32, which FSDP2 keeps until the last batch.
        optimizer: State of AdamW, two float32 numbers for each trained weight.
        copies: Weights in the type of the arithmetic: those outside the blocks, two blocks and the gradients of one
            with sharding; all trained weights without.
        activations: See `estimate_cost`: for each linear layer, 1.3 numbers for each input and output feature of each
            position. With gradient checkpointing, the inputs of all blocks and the activations of one.
        total: Their sum.
    """

    weights: float
    gradients: float
    optimizer: float
    copies: float
    activations: float
    total: float


@dataclass(frozen=True)
class RunPlan:
    """A plan of a run.

    Args:
        model: Base model.
        recipe: Name of the recipe.
        data: The mixture and its folder, or the datasets.
        world_size: Number of GPUs, each with one process.
        shard_size: Number of GPUs that shard one copy of the model.
        workers: Number of processes of each rank that read data.
        batch_size: Number of samples in a batch of one GPU.
        gradient_accumulation_steps: Number of batches in a step.
        samples_per_step: Number of samples in a step of all GPUs.
        steps: Number of steps.
        samples_per_epoch: Number of samples in which each dataset of weight 1 is drawn as often as it has frames, or
            `None` if that is unknown.
        steps_per_epoch: The same in steps.
        epochs: Number of epochs of the run.
        memory: Memory of one GPU.
        hours: Duration, or `None` without a throughput.
        bytes_read: Bytes that all ranks read together in the run, or `None` if that is unknown.
        datasets: What the run reads of each dataset.
    """

    model: str
    recipe: str
    data: str
    world_size: int
    shard_size: int
    workers: int
    batch_size: int
    gradient_accumulation_steps: int
    samples_per_step: int
    steps: int
    samples_per_epoch: int | None
    steps_per_epoch: float | None
    epochs: float | None
    memory: GpuMemory
    hours: float | None
    bytes_read: int | None
    datasets: tuple[DatasetPlan, ...]


def plan_run(
    arguments: FinetuneArguments,
    world_size: int,
    shard_size: int | None = None,
    throughput: float | None = None,
    num_images: int = 1,
    count: bool = False,
) -> RunPlan:
    """Plan a run on many GPUs from metadata alone.

    Args:
        arguments: Arguments of the run, whose datasets are streams.
        world_size: Number of GPUs.
        shard_size: Number of GPUs that shard one copy of the model, as FSDP2 does over all GPUs (the default), and
            HSDP over a part of them. 1 for none.
        throughput: Number of samples that one GPU trains on in a second, as an earlier run has measured it.
        num_images: Number of cameras.
        count: Whether to read each RLDS dataset whose number of frames is unknown once, to count them. The result
            stays in the cache, as after the start of a run.

    Raises:
        ValueError: The GPUs can't be divided into groups of `shard_size`, the data is not streamed, the number of
            steps is not given, or the run is invalid (see `check_run`).
    """
    shard_size = shard_size or world_size
    if world_size % shard_size:
        raise ValueError(
            f"{counted(world_size, 'GPU')} can't be divided into groups of {shard_size} that shard the model."
        )
    if not all(one.options.get("streaming") for one in arguments.datasets):
        raise ValueError(
            "A plan needs data that is streamed, since ranks share only the shards of streams. Give --streaming "
            "(`streaming=True`)."
        )
    recipe, args = check_run(arguments)
    if args.max_steps <= 0:
        raise ValueError(f"A plan needs the number of steps, but max_steps is {args.max_steps}. Set it.")
    batch_size, batches = args.per_device_train_batch_size, args.gradient_accumulation_steps
    # As on a GPU: without one, the arithmetic is float32 by default.
    dtype = RECIPES[arguments.recipe].dtype if isinstance(arguments.recipe, str) else recipe.dtype
    recipe = replace(
        recipe,
        dtype=arguments.settings.get("dtype", dtype),
        batch_size=batch_size,
        gradient_accumulation_steps=batches,
    )
    workers = max(1, args.dataloader_num_workers)
    samples = world_size * batch_size * batches
    datasets, epoch = _plan_datasets(arguments, recipe, world_size, workers, samples * args.max_steps, count)
    read = [None if one.bytes is None or one.passes is None else one.passes * one.bytes for one in datasets]
    config = AutoConfig.from_pretrained(arguments.model)
    return RunPlan(
        model=str(arguments.model),
        recipe=arguments.recipe if isinstance(arguments.recipe, str) else "own recipe",
        data=arguments.data_title,
        world_size=world_size,
        shard_size=shard_size,
        workers=workers,
        batch_size=batch_size,
        gradient_accumulation_steps=batches,
        samples_per_step=samples,
        steps=args.max_steps,
        samples_per_epoch=epoch,
        steps_per_epoch=epoch and epoch / samples,
        epochs=epoch and args.max_steps * samples / epoch,
        memory=estimate_memory(config, recipe, shard_size, num_images),
        hours=args.max_steps * samples / (throughput * world_size * 3600) if throughput else None,
        bytes_read=None if None in read else round(sum(filter(None, read))),
        datasets=datasets,
    )


def estimate_memory(config: OpenVLAConfig, recipe: Recipe, shard_size: int, num_images: int = 1) -> GpuMemory:
    """Estimate the memory of one GPU.

    Args:
        config: Configuration of the base model.
        recipe: Recipe, with the batch of one GPU.
        shard_size: Number of GPUs that shard one copy of the model.
        num_images: Number of cameras.
    """
    cost = estimate_cost(config, recipe, num_images=num_images)
    gradients, copies = cost.gradients / shard_size, 0.0
    bytes_per_number = getattr(torch, recipe.dtype).itemsize
    if shard_size > 1:
        model = meta_model(config, recipe, num_images)
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        sizes = [sum(one.numel() for one in block.parameters()) for block in blocks]
        gathered = sum(one.numel() for one in model.parameters()) - sum(sizes) + 3 * max(sizes)
        copies = gathered * bytes_per_number / GIB
        if recipe.gradient_accumulation_steps > 1:
            gradients += cost.trainable * torch.float32.itemsize / GIB
    elif recipe.dtype != "float32":
        copies = cost.trainable * bytes_per_number / GIB
    parts = {
        "weights": cost.weights / shard_size,
        "gradients": gradients,
        "optimizer": cost.optimizer / shard_size,
        "copies": copies,
        "activations": cost.activations,
    }
    return GpuMemory(**parts, total=sum(parts.values()))


def _plan_datasets(
    arguments: FinetuneArguments, recipe: Recipe, world_size: int, workers: int, samples: int, count: bool
) -> tuple[tuple[DatasetPlan, ...], int | None]:
    """Plan what a run reads of each dataset. Return the plans and the number of samples in an epoch."""
    datasets, streams = load_datasets(arguments, recipe.seed, recipe.load_options())
    statistics = read_statistics(arguments) or {}
    rows = [_find_shards(stream) for stream in streams]
    counts = [
        _read_counts(one, statistics, data, count)
        for one, data in zip(rows, datasets or [None] * len(rows), strict=True)
    ]
    plans = [
        _plan_dataset(stream, one, known, world_size, workers)
        for stream, one, known in zip(streams, rows, counts, strict=True)
    ]
    sizes = [one.frames for one in plans]
    if isinstance(arguments.data, TrainingMixture):  # whose weights multiply the steps of all splits
        sizes = [of_one.get("num_transitions", size) for of_one, size in zip(counts, sizes, strict=True)]
    known = [size for size in sizes if size is not None]
    if len(known) < len(plans):
        return tuple(plans), None
    weights = [one.weight for one in datasets] or [1.0]
    shares = sampling_shares(weights, known)
    planned = tuple(
        replace(one, share=share, passes=share * samples / one.frames if one.frames else None)
        for one, share in zip(plans, shares, strict=True)
    )
    return planned, epoch_length(weights, known, shares) if 1 in weights else None


def _find_shards(stream: Any) -> ShardRows:
    """Return the shards of a stream, or raise `ValueError` if it has none."""
    if not isinstance(stream, FrameStream) or stream.shards is None:
        raise ValueError(
            f"The shards of {dataset_name(stream)!r} are not known. A plan needs LeRobot or RLDS datasets."
        )
    return stream.shards


def _read_counts(
    rows: ShardRows, statistics: Mapping[str, Any], data: TrainingData | None, count: bool
) -> Mapping[str, Any]:
    """Return the numbers of steps and episodes in all splits of a dataset, as far as they are known or to count."""
    given = statistics.get(rows.name, {})
    if "num_transitions" in given:
        return given
    if not isinstance(rows.source, RLDSSource):
        return {}
    counts = rows.source.counts
    if counts or data is None:
        return counts
    read = whole_statistics if count else cached_whole_statistics
    return read(data.source, **data.statistics_options) or {}


def _plan_dataset(
    stream: FrameStream, rows: ShardRows, counts: Mapping[str, Any], world_size: int, workers: int
) -> DatasetPlan:
    source = rows.source
    numbers = {shard.key: number for number, shard in enumerate(rows.shards)}
    groups = divide_shards(stream, rows, world_size * workers)
    ranks = [
        sorted({numbers[one.shard.key] for group in groups[rank::world_size] for one in group})
        for rank in range(world_size)
    ]
    sharing = max(section.of for group in groups for section in group)
    sizes = source.fs.sizes(source.files())
    frames = stream.num_frames
    if frames is None and isinstance(source, RLDSSource):
        frames = source.count_frames(counts)
    size = None if None in sizes else sharing * sum(sizes)
    return DatasetPlan(stream.name, frames, size, None, len(numbers), sharing, ranks)


def plan_tables(title: str, plan: RunPlan) -> list[Table]:
    """Make a table of the run and one of its datasets."""
    run = Table(title=title, show_header=False)
    for name in ("model", "recipe", "data"):
        run.add_row(name, getattr(plan, name))
    run.add_row(
        "samples in a step",
        f"{plan.samples_per_step:,}: {counted(plan.world_size, 'GPU')} x {plan.batch_size} x "
        f"{plan.gradient_accumulation_steps}",
    )
    run.add_row("samples in an epoch", _number(plan.samples_per_epoch))
    run.add_row("steps in an epoch", _number(plan.steps_per_epoch, ",.1f"))
    run.add_row("steps", f"{plan.steps:,}, {_number(plan.epochs, ',.2f')} epochs")
    for name, value in asdict(plan.memory).items():
        how = f" (sharded over {plan.shard_size})" if name in ("weights", "optimizer") else ""
        run.add_row(f"{name} a GPU", f"{describe_memory(value)}{how}", style="bold" if name == "total" else None)
    if plan.hours is not None:
        run.add_row("hours", f"{plan.hours:,.1f}, {plan.hours * plan.world_size:,.0f} GPU hours")
    run.add_row("bytes read by all ranks", _bytes(plan.bytes_read))
    return [run, _dataset_table(plan)]


def _dataset_table(plan: RunPlan) -> Table:
    columns = ("dataset", "frames", "share", "passes", "bytes a pass, all ranks", "shards", "shards a rank")
    title = f"First pass of {counted(plan.world_size, 'rank')} with {counted(plan.workers, 'worker')} each"
    table = Table(*columns, "shards of rank 0", title=title)
    for one in plan.datasets:
        counts = sorted({len(numbers) for numbers in one.ranks})
        shared = f", each shared by {one.readers_per_shard} workers" if one.readers_per_shard > 1 else ""
        table.add_row(
            one.name,
            _number(one.frames),
            _number(one.share, ".2%"),
            _number(one.passes, ",.2f"),
            _bytes(one.bytes),
            str(one.shards),
            (f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}") + shared,
            _summarize(one.ranks[0]),
        )
    unknown = [one.name for one in plan.datasets if one.frames is None]
    if unknown:
        table.caption = (
            f"The metadata does not contain the number of frames of {', '.join(unknown)}, which shares, epochs and "
            "bytes depend on. Add --count to read the files once, as a run does when it starts, or give the "
            "dataset_statistics.json of an earlier run with --statistics."
        )
    return table


def _number(value: float | None, style: str = ",") -> str:
    return "unknown" if value is None else format(value, style)


def _bytes(value: int | None) -> str:
    if value is None:
        return "unknown"
    return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.2f} MB"


def _summarize(numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers[:LISTED]))
    return listed if len(numbers) <= LISTED else f"{listed}, ..."


__all__ = ["DatasetPlan", "GpuMemory", "RunPlan", "estimate_memory", "plan_run", "plan_tables"]
