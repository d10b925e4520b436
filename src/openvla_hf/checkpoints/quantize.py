"""Quantise policies: a recommended config for each format, and checkpoints rewritten with memory for one shard.

    model = AutoModel.from_pretrained("openvla/openvla-7b", quantization_config=quantization("4bit"))

docs/quantization.md compares the memory and the speed of the formats.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..modeling.checkpoint_files import CheckpointFiles, unreadable_weights
from ..modeling.checkpoint_loading import read_statistics, refuse_foreign_files
from ..modeling.configuration_openvla import OpenVLAConfig
from ..modeling.known_names import check_name
from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..modeling.oft_loading import component_files
from ..modeling.quantized_loading import (
    COMPUTE_CAPABILITY,
    HEADS_IN_16_BITS,
    KEPT_IN_16_BITS,
    refuse_second,
    refuse_without_gpu,
)
from ..new_folder import new_folder, require_new_folder
from .model_card import copy_training
from .shard_writing import SHARD_BYTES, Shard, write_shards
from .transformers_internals import PartLoader, local_torch_dtype


NF4_BLOCK, INT4_GROUP = 64, 128
"""Number of weights that share a scale."""


def _nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def _llm_int8() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao_int4() -> TorchAoConfig:
    from torchao.quantization import Int4WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    # The layout of PyTorch's own kernel. Other layouts need more packages.
    return TorchAoConfig(
        Int4WeightOnlyConfig(group_size=INT4_GROUP, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D)
    )


def _torchao_int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _torchao_float8() -> TorchAoConfig:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return TorchAoConfig(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


@dataclass(frozen=True)
class Format:
    """A way to store the weights of a linear layer.

    Attributes:
        about: Description in one line.
        package: Package that quantises and runs the layers.
        make_config: Makes the recommended config for transformers.
        layer_bytes: (outputs, inputs) -> bytes of the layer's weight and scales.
        compute_capability: Compute capability of the GPU that the format needs, or `None` if it runs on a CPU.
    """

    about: str
    package: str
    make_config: Callable[[], BitsAndBytesConfig | TorchAoConfig]
    layer_bytes: Callable[[int, int], float]
    compute_capability: tuple[int, int] | None = None


FORMATS = {
    "4bit": Format(
        "NF4 of bitsandbytes: half a byte per weight, runs everywhere",
        "bitsandbytes",
        _nf4,
        lambda rows, columns: math.ceil(rows * columns / 2) + 4 * math.ceil(rows * columns / NF4_BLOCK),
    ),
    "8bit": Format(
        "LLM.int8() of bitsandbytes: outlier activations stay in 16 bits",
        "bitsandbytes",
        _llm_int8,
        lambda rows, columns: rows * columns + 4 * rows,
    ),
    "int4": Format(
        "torchao, weights only: the kernel of PyTorch",
        "torchao",
        _torchao_int4,
        # Layers whose inputs are not a multiple of the group stay in 16 bits.
        lambda rows, columns: rows * columns * (2 if columns % INT4_GROUP else 0.5 + 4 / INT4_GROUP),
        COMPUTE_CAPABILITY["Int4WeightOnlyConfig"],
    ),
    "int8": Format(
        "torchao, weights only: made for compiled passes",
        "torchao",
        _torchao_int8,
        lambda rows, columns: rows * columns + 2 * rows,
    ),
    "float8": Format(
        "torchao, weights and activations: 8-bit matrix units",
        "torchao",
        _torchao_float8,
        lambda rows, columns: rows * columns + 4 * rows,
        COMPUTE_CAPABILITY["Float8DynamicActivationFloat8WeightConfig"],
    ),
}


def _format(name: str) -> Format:
    check_name(name, FORMATS, "format")
    return FORMATS[name]


def quantization(
    name: str, *, towers: bool = False, dtype: torch.dtype = torch.bfloat16
) -> BitsAndBytesConfig | TorchAoConfig:
    """Make the recommended `quantization_config` of a format.

    Args:
        name: "4bit", "8bit" (bitsandbytes), "int4", "int8" or "float8" (torchao).
        towers: Also quantise the vision towers and the projector. The head stays in 16 bits.
        dtype: Data type of the arithmetic in 4 bits. GPUs before Ampere are faster in float16.

    Raises:
        ValueError: The name is unknown, or the format needs a GPU that this machine lacks.
        ImportError: The package of the format is not installed.
    """
    wanted = _format(name)
    refuse_without_gpu(f"Format {name!r}", wanted.compute_capability)
    if find_spec(wanted.package) is None:
        raise ImportError(f"Format {name!r} needs {wanted.package}. Run `pip install {wanted.package}`.")
    config = wanted.make_config()
    kept = list(HEADS_IN_16_BITS if towers else KEPT_IN_16_BITS)
    if isinstance(config, BitsAndBytesConfig):
        config.llm_int8_skip_modules = kept
        config.bnb_4bit_compute_dtype = dtype
    else:
        config.modules_to_not_convert = kept
    return config


def weight_bytes(model: PreTrainedModel) -> int:
    """Compute the size in bytes of a loaded model's weights when saved, including the scales of quantised weights."""
    state: Mapping[str, torch.Tensor] | None = None
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        state, _ = quantizer.get_state_dict_and_metadata(model)
    tensors = (model.state_dict() if state is None else state).values()
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def expected_weight_bytes(config: OpenVLAConfig, name: str | None = None, *, towers: bool = False) -> int:
    """Compute the size in bytes of a model's weights in a format (`None`: 16 bits) from its config alone."""
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    kept = HEADS_IN_16_BITS if towers else KEPT_IN_16_BITS
    plain = 2 * sum(parameter.numel() for parameter in model.parameters())
    if name is None:
        return plain
    saved = sum(
        2 * module.weight.numel() - _format(name).layer_bytes(*module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not path.startswith(kept)
    )
    return round(plain - saved)


def _weight_files(files: CheckpointFiles) -> list[str]:
    single = files.find(SAFE_WEIGHTS_NAME)
    if single is not None:
        return [single]
    index = files.read_json(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise OSError(
            f"{files.source} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. "
            "Save the checkpoint as safetensors first."
        )
    paths = {name: files.find(name) for name in sorted(set(index["weight_map"].values()))}
    if missing := [name for name, path in paths.items() if path is None]:
        raise OSError(f"{missing[0]} is in the index of {files.source}, but is missing: copy or download it again.")
    return [path for path in paths.values() if path is not None]


def _groups(files: list[str], shard_bytes: int) -> list[tuple[str, list[str]]]:
    """Group the stored weights of each file by about `shard_bytes` in 16 bits: (file, names)."""
    groups: list[tuple[str, list[str]]] = []
    for path in files:
        groups.append((path, []))
        size = 0
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no dict
                    weight_size = 2 * math.prod(file.get_slice(name).get_shape())
                    if groups[-1][1] and size + weight_size > shard_bytes:
                        groups.append((path, []))
                        size = 0
                    groups[-1][1].append(name)
                    size += weight_size
        except SafetensorError as error:
            raise unreadable_weights(path, error) from error
    return groups


def _quantized_groups(loader: PartLoader, groups: list[tuple[str, list[str]]]) -> Iterator[Shard]:
    """Yield the quantised tensors of each group and the metadata of its file. Each group is freed before the next."""
    for path, names in groups:
        # Open the file for each group: pages that were read stay in memory until the file is closed.
        with safe_open(path, framework="pt") as file:
            yield loader.load({name: file.get_slice(name) for name in names})
        loader.release()
    loader.check_complete()


def quantize(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    name: str = "4bit",
    *,
    towers: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    config: OpenVLAConfig | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    **hub_kwargs: Any,
) -> Path:
    """Write a checkpoint in a quantised format, with its processor and code, with memory for only one shard.

    The result is the same as that of loading with `quantization_config` and saving. It appears in `destination` once
    it is complete.

    Args:
        source: Folder or Hub id of a 16- or 32-bit checkpoint, in either layout.
        destination: New or empty folder.
        name: Format, a key of `FORMATS`.
        towers: Also quantise the vision towers and the projector.
        dtype: Data type of the weights that are not quantised.
        config: Config to use instead of the checkpoint's own.
        shard_bytes: Bytes of 16-bit weights in memory at a time. Each such part becomes a file.
        on_progress: Called with the number of finished parts and the number of all parts.
        hub_kwargs: `revision`, `token`, `cache_dir` and so on.

    Returns:
        The folder.

    Raises:
        ValueError: The checkpoint is already quantised or is not OpenVLA; see also `quantization`.
        FileExistsError: `destination` is not empty.
        OSError: A weights file is missing or can't be read.
        ImportError: See `quantization`.
    """
    destination = Path(destination)
    require_new_folder(destination)
    files = CheckpointFiles.locate(source, **hub_kwargs)
    hub_kwargs = hub_kwargs | files.hub_kwargs
    refuse_foreign_files(files)
    if components := component_files(files):
        raise ValueError(
            f"{source} has weights in component files ({', '.join(components.values())}), which are not quantised. "
            "Load it with `from_pretrained`, save it with `save_pretrained`, and quantise the saved checkpoint."
        )
    config = config or AutoConfig.from_pretrained(source, **hub_kwargs)
    refuse_second(source, getattr(config, "quantization_config", None))
    model, quantizer = _empty_model(config, name, towers, dtype)
    model.norm_stats = read_statistics(files, model.norm_stats)
    processor = AutoProcessor.from_pretrained(source, **hub_kwargs)
    groups = _groups(_weight_files(files), shard_bytes)
    with new_folder(destination) as folder:
        model.save_pretrained(folder, state_dict={})  # config, code and statistics
        processor.save_pretrained(folder)
        copy_training(files, folder)
        shards = _quantized_groups(PartLoader(model, quantizer, dtype, source), groups)
        write_shards(folder, shards, len(groups), on_progress)
    return destination


def _empty_model(config: OpenVLAConfig, name: str, towers: bool, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """Build a model without weights and with the layers of the format, and the quantiser of transformers."""
    quantizer = AutoHfQuantizer.from_config(quantization(name, towers=towers), pre_quantized=False)
    quantizer.validate_environment()
    # The quantiser's own layers use the default data type for their biases.
    with torch.device("meta"), local_torch_dtype(dtype):
        model = AutoModel.from_config(config, dtype=dtype)
        quantizer.preprocess_model(model, dtype=dtype, device_map={"": "cpu"})
    model.config.quantization_config = quantizer.quantization_config
    return model, quantizer


__all__ = ["FORMATS", "Format", "expected_weight_bytes", "quantization", "quantize", "weight_bytes"]
