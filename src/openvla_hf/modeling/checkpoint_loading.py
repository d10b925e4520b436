"""Load and save checkpoints: OpenVLA's `from_pretrained`, `save_pretrained` and `load_adapter`."""

import fnmatch
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, extract_commit_hash

from .action_networks import add_action_networks
from .action_tokenizer import BOUNDS_OF, check_action_stats, check_statistics
from .adapter_loading import add_trained_in_full, refuse_merged, translate
from .checkpoint_files import (
    ADAPTER_CONFIG,
    ADAPTER_POLICY,
    ADAPTER_WEIGHTS,
    HUB_KWARGS,
    STATISTICS_FILE,
    CheckpointFiles,
    hub_error,
    read_json,
    unreadable_weights,
)
from .configuration_openvla import AUTO_MAP, OpenVLAConfig
from .folder_writing import written_whole
from .oft_loading import complete_config, place_components, read_components, report_muted
from .quantized_loading import missing_package, prepare_quantized, refuse_second, with_defaults


if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:  # a mixin, combined with a `PreTrainedModel`
    _Base = object

# Weights, or an index of them, in the same folder.
PLAIN_WEIGHTS = re.compile(r"[^/\\:\0]+\.safetensors(\.index\.json)?")
# Arguments of `save_pretrained` that `push_to_hub` takes.
UPLOAD_ARGUMENTS = ("commit_message", "commit_description", "private", "revision", "create_pr", "tags")


def stored_quantization(files: CheckpointFiles, config: Any = None) -> Any:
    """Return the quantisation config of the stored weights, or `None`; `config` replaces the checkpoint's own."""
    if config is not None:
        return getattr(config, "quantization_config", None)
    return (files.read_json(CONFIG_NAME) or {}).get("quantization_config")


def refuse_foreign_files(files: CheckpointFiles) -> None:
    """Raise `ValueError` if an index or a config names weights that are not safetensors files next to it.

    Call this before any weights file is opened: a pickled file could run code, and a path could lead anywhere.
    """
    named = {CONFIG_NAME: [(files.read_json(CONFIG_NAME) or {}).get("transformers_weights", SAFE_WEIGHTS_NAME)]}
    for index in fnmatch.filter(files.names, "*.safetensors.index*.json"):
        content = files.read_json(index) or {}
        if not isinstance(content.get("weight_map"), dict) or not isinstance(content.get("metadata"), dict):
            raise ValueError(f"{index} of {files.source} is damaged: it lacks 'weight_map' or 'metadata'.")
        named[index] = sorted(content["weight_map"].values(), key=str)
    for where, names in named.items():
        for name in names:
            if not isinstance(name, str) or not PLAIN_WEIGHTS.fullmatch(name):
                raise ValueError(
                    f"{where} of {files.source} names the weights file {name!r}, but only safetensors files next to "
                    "it are read. Save the checkpoint again as safetensors."
                )
    if found := fnmatch.filter(files.names, "*.distcp"):
        raise ValueError(
            f"{files.source} is a distributed checkpoint ({found[0]!r}), but only safetensors files are read. Save "
            "the model with `save_pretrained`."
        )


def refuse_foreign_weights(
    repo: Any, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple[str, Any, Any]] = ()
) -> None:
    """Raise `ValueError` if weights of a checkpoint are missing, unexpected or of another shape."""
    for problem, names in (("missing", missing), ("unexpected", unexpected)):
        if keys := sorted(names):
            count = f"{len(keys)} weights are" if len(keys) > 1 else "1 weight is"
            raise ValueError(
                f"Cannot load {repo} as OpenVLA: {count} {problem} (for example {keys[0]!r}). Weights and "
                "config belong to different models."
            )
    if shapes := sorted((name, tuple(found), tuple(wanted)) for name, found, wanted in mismatched):
        name, found, wanted = shapes[0]
        count = f"{len(shapes)} weights have" if len(shapes) > 1 else "1 weight has"
        raise ValueError(
            f"Cannot load {repo} as OpenVLA: {count} a different shape from the config's (for example {name!r}: "
            f"{found} instead of {wanted}). Weights and config belong to different models."
        )


@dataclass(frozen=True)
class Adapter:
    """Source of an adapter and the arguments for its repository."""

    source: str
    hub_kwargs: dict[str, Any]


@dataclass(frozen=True)
class LoadedFrom:
    """Folder or Hub id of a checkpoint or an adapter, and the commit of a Hub id."""

    source: str
    commit: str | None

    @classmethod
    def file(cls, source: Any, path: str | None) -> "LoadedFrom":
        """Describe a source by the path of one of its files."""
        return cls(os.fspath(source), extract_commit_hash(path, None))


def resolve_adapter(source: Any, kwargs: dict[str, Any]) -> tuple[CheckpointFiles, Adapter | None]:
    """Resolve the checkpoint that `from_pretrained` loads, and the adapter on it.

    The Auto classes name the base and pass the adapter in `adapter_kwargs`, under a key that is private to
    transformers. `adapter_kwargs` is removed from `kwargs`.
    """
    adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
    given = adapter_kwargs.get("_adapter_model_path")
    files = CheckpointFiles.locate(source, **kwargs)
    if given is not None:
        return files, Adapter(given, {name: adapter_kwargs[name] for name in HUB_KWARGS if name in adapter_kwargs})
    if ADAPTER_CONFIG not in files.names or files.find(CONFIG_NAME) is not None:
        return files, None
    refuse_merged(files)
    config_file = files.find(ADAPTER_CONFIG)
    assert config_file is not None  # it was listed
    base = named_base(read_json(config_file))
    if base is None:
        raise OSError(
            f"The adapter {source} does not name its base: load the base yourself, and then the adapter with "
            "`openvla_hf.load_adapter(model, adapter)`."
        )
    beside = Path(config_file).parent / base
    adapter = Adapter(source, files.hub_kwargs)
    # These two belong to the adapter's repository, not to its base's.
    of_base = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    kwargs.pop("trust_remote_code", None)  # consent is for the adapter's repository only
    try:
        return CheckpointFiles.locate(str(beside) if beside.is_dir() else base, **of_base), adapter
    except OSError as error:
        raise OSError(
            f"Cannot load the base {base!r} that the adapter {source} names: {error} Alternatively, load the base "
            "yourself, and then the adapter with `openvla_hf.load_adapter(model, adapter)`."
        ) from error


def named_base(adapter_config: dict[str, Any]) -> str | None:
    """Return the folder or Hub id of an adapter's base, or `None` if its config does not name one."""
    base = adapter_config.get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def refuse_training_run(source: Any, config: dict[str, Any]) -> None:
    """Raise `ValueError` for the config of a model of Prismatic, whose weights are in `.pt` files."""
    if "model_type" not in config and not {"vla", "model"}.isdisjoint(config):
        kind = "training run" if "vla" in config else "vision-language model"
        raise ValueError(
            f"{source} is a {kind} of the original's code: convert it first with `openvla-hf convert {source} "
            "NEW_FOLDER`."
        )


def refuse_foreign_config(files: CheckpointFiles, config: Any, adapter: Adapter | None) -> None:
    """Raise an error if the config (`config`, or the checkpoint's own) is missing or belongs to another model.

    Consent to run code (`trust_remote_code=True`) applies to the repository that the caller names, not to the base
    that an adapter's config names: a base that needs code is refused too.
    """
    if config is not None or files.source is None:
        return
    content = files.read_json(CONFIG_NAME)
    if content is None:
        raise OSError(f"{files.source} is not an OpenVLA checkpoint: its {CONFIG_NAME} is missing.")
    refuse_training_run(files.source, content)
    kind = content.get("model_type")
    if kind != OpenVLAConfig.model_type:
        sentence = f"{files.source} is not an OpenVLA checkpoint: its {CONFIG_NAME} is for {kind!r}."
        if adapter is not None:
            sentence += (
                f" The adapter {adapter.source} names it as its base. If it needs code of its own, load it yourself "
                "with `trust_remote_code=True`, and then the adapter with `openvla_hf.load_adapter(model, adapter)`."
            )
        raise ValueError(sentence)


def read_statistics(
    files: CheckpointFiles, norm_stats: dict[str, Any] | None, in_config_are_wrong: bool = False
) -> dict[str, Any] | None:
    """Read the action statistics of a checkpoint.

    Fine-tuning with the original code leaves the base's statistics in the config and the run's in a file. The file
    takes precedence, as in the original's evaluation.

    Args:
        files: Files of the checkpoint.
        norm_stats: Statistics of the config. They are returned if they differ from the stored config's, since then the
            caller gave them.
        in_config_are_wrong: Whether the statistics of the config are known to be those of the base. A published
            OpenVLA-OFT checkpoint has those of its own training only in the file.

    Raises:
        ValueError: The statistics are damaged, or those of the config are wrong and there is no file.
        OSError: The file of statistics can't be read, or it is unknown whether there is one.
    """
    in_config = (files.read_json(CONFIG_NAME) or {}).get("norm_stats")
    if norm_stats and norm_stats != in_config:
        return norm_stats
    in_file = statistics_in_file(files.read_json(STATISTICS_FILE), files.source)
    if in_file is None and in_config_are_wrong:
        raise ValueError(
            f"{files.source} has no {STATISTICS_FILE}, and the statistics in the {CONFIG_NAME} of an OpenVLA-OFT "
            "checkpoint are those of its base: copy the file of the training run next to the config, or pass the "
            "statistics as `norm_stats=`."
        )
    return check_statistics(norm_stats, f"{CONFIG_NAME} of {files.source}") if in_file is None else in_file


def statistics_in_file(content: dict[str, Any] | None, source: Any) -> dict[str, Any] | None:
    """Check the content of `dataset_statistics.json` (`None` for no file); raise `ValueError` if it is damaged."""
    if content is not None and not content:
        raise ValueError(f"{STATISTICS_FILE} of {source} is empty: compute the statistics again, or delete the file.")
    return check_statistics(content, f"{STATISTICS_FILE} of {source}")


def check_oft_statistics(config: OpenVLAConfig, source: Any) -> None:
    """Check the statistics of a model that sees the state or normalises with other bounds than a plain model.

    Raises:
        ValueError: Statistics of the state are damaged or constant, or the bounds of an action or a state are missing.
    """
    if config.proprio_dim is None and config.action_normalization == "q99":  # as in plain OpenVLA
        return
    bounds = BOUNDS_OF[config.action_normalization]
    kinds = ("action",) if config.proprio_dim is None else ("action", "proprio")
    for key, of_dataset in (config.norm_stats or {}).items():
        for kind in kinds:
            if kind not in of_dataset:
                continue
            where = f"The statistics of {source}, {kind!r} of {key!r}"
            stats = check_action_stats(of_dataset[kind], where)
            if missing := [name for name in bounds if name not in stats]:
                raise ValueError(
                    f"{where}: {missing[0]!r} is missing, which the normalisation "
                    f"{config.action_normalization!r} needs. Compute the statistics again."
                )
            low, high = (stats[name] for name in bounds)
            if kind == "proprio" and list(low) == list(high):
                raise ValueError(
                    f"{where}: all dimensions are constant, so they are not those of a robot's state. Copy the "
                    "statistics of the training run."
                )


class CheckpointMixin(_Base):
    """Loading, saving and adapters, for a `PreTrainedModel`."""

    config: OpenVLAConfig
    norm_stats: dict[str, Any] | None
    loaded_from: LoadedFrom | None = None
    loaded_adapter: LoadedFrom | None = None
    # Names of the modules that came with the adapter as whole weights.
    _trained_in_full: Sequence[str] = ()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load a published checkpoint or our own, like `PreTrainedModel.from_pretrained`.

        A published OpenVLA-OFT checkpoint has components in separate files (`action_head--*_checkpoint.pt`). The
        fields that its config does not state follow from these files and from `platform` ("libero", "aloha" or
        "bridge"). Without `platform`, the only platform with these action and state dimensions is used, and a warning
        names the fields that it gave. A checkpoint without components that decodes in parallel can't be told from a
        plain one, so it needs `action_decoding="parallel"` and `platform`. It has no action head, one image and no
        state, unless fields of the config are given (`num_images=2`).

        A `quantization_config` leaves the heads, the towers and the projectors in 16 bits by default. Weights are read
        only from safetensors files, and components only as plain data, because a pickled file could run code.

        Raises:
            ValueError: Weights are missing or unexpected, a field of the config stays unknown or contradicts the
                components, a component is not one of OpenVLA-OFT, or the checkpoint is quantised already and
                `quantization_config` is given.
            OSError: A weights file is missing or can't be read.
            ImportError: The package that the quantised weights need is not installed.
        """
        platform, given_statistics = kwargs.pop("platform", None), kwargs.get("norm_stats")
        files, adapter = resolve_adapter(pretrained_model_name_or_path, kwargs)
        source = files.source
        refuse_foreign_config(files, kwargs.get("config"), adapter)
        refuse_foreign_files(files)
        if not files.is_whole and not any(name.endswith(".safetensors") for name in files.names):
            raise hub_error(str(source), "the weights", files.failure)
        components = read_components(files)
        complete_config(files, components, platform, kwargs)
        if kwargs.get("quantization_config") is not None:
            refuse_second(source, stored_quantization(files, kwargs.get("config")))
            kwargs["quantization_config"] = with_defaults(kwargs["quantization_config"])
        kwargs = {name: value for name, value in kwargs.items() if name not in HUB_KWARGS} | files.hub_kwargs
        # Weights of another shape are refused below, with a clearer error.
        kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True}
        try:
            with report_muted(components):
                model, info = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise unreadable_weights(source, error) from error
        except OSError as error:
            if "no file named" not in str(error):  # transformers has no error class for a missing weights file
                raise
            raise OSError(
                f"{error} The checkpoint is incomplete: copy the weights next to the config, or download it again."
            ) from error
        except ModuleNotFoundError as error:
            raise missing_package(source, error) or error from error
        except RuntimeError as error:
            if "conversion of the weights" not in str(error):  # nor one for a failed conversion
                raise
            raise ValueError(
                f"Cannot load {source} as OpenVLA: a weight has a different shape from the config's. Weights and "
                "config belong to different models."
            ) from error
        info["missing_keys"] -= place_components(model, components, source)
        refuse_foreign_weights(source, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
        if given_statistics is None:
            given_statistics = read_statistics(files, model.norm_stats, in_config_are_wrong=bool(components.files))
        model.norm_stats = given_statistics
        if source is not None:
            model.loaded_from = LoadedFrom.file(source, files.find(CONFIG_NAME))
        check_oft_statistics(model.config, source)
        prepare_quantized(model)
        if adapter is not None:
            model.load_adapter(adapter.source, **adapter.hub_kwargs)
        return (model, info) if output_loading_info else model

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, **kwargs: Any) -> Any:
        """Load an adapter and its statistics, like transformers, but also with the original's layer names.

        Raises:
            ValueError: A weight matches no layer of this model or has another shape, a layer that the adapter's config
                names lacks its weights, or the model's weights already contain the adapter.
            OSError: There is no adapter, or its weights are not in a safetensors file or can't be read.
        """
        if kwargs.get("adapter_state_dict") is not None:
            return super().load_adapter(peft_model_id, adapter_name, **kwargs)
        files = CheckpointFiles.locate(
            peft_model_id, **{name: kwargs.pop(name) for name in HUB_KWARGS if name in kwargs}
        )
        refuse_merged(files)
        config_file, weights_file = files.find(ADAPTER_CONFIG), files.find(ADAPTER_WEIGHTS)
        if config_file is None or weights_file is None:
            raise OSError(f"{peft_model_id} is not an adapter: it lacks {ADAPTER_CONFIG} or {ADAPTER_WEIGHTS}.")
        statistics = statistics_in_file(files.read_json(STATISTICS_FILE), peft_model_id)
        if (fields := files.read_json(ADAPTER_POLICY)) is not None:
            add_action_networks(self, fields, f"{ADAPTER_POLICY} of {peft_model_id}")
        with tempfile.TemporaryDirectory() as folder:
            whole = translate(self, config_file, weights_file, Path(folder))
            for name, weight in whole.items():
                self.get_parameter(name).data.copy_(weight)
            info = super().load_adapter(folder, adapter_name, **kwargs)
        self._trained_in_full = read_json(config_file).get("modules_to_save") or []
        problems = info.missing_keys | info.unexpected_keys | {key for key, *_ in info.mismatched_keys}
        if problems:
            raise ValueError(
                f"{peft_model_id} does not fit this model: {len(problems)} weights are missing, unexpected or of "
                f"another shape (for example {min(problems)!r})."
            )
        if statistics is not None:
            self.norm_stats = statistics
        self.loaded_adapter = LoadedFrom.file(peft_model_id, config_file)
        return info

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save like `PreTrainedModel.save_pretrained`, with our weight names, the code and a statistics file.

        Files are moved into the folder once all are written. Until then, an earlier checkpoint stays in place. After
        that, its weights and statistics are gone.

        Raises:
            OSError: A file can't be written, as on a full disk.
        """
        self.config.auto_map = dict(AUTO_MAP)
        kwargs.setdefault("save_original_format", False)
        if kwargs.get("distributed_checkpoint") or not kwargs.get("is_main_process", True):
            # All processes write into one folder, or this process writes nothing.
            super().save_pretrained(save_directory, **kwargs)
            return
        # transformers would upload before the folder is complete.
        is_pushed, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", Path(save_directory).name)
        upload = {name: kwargs.pop(name) for name in UPLOAD_ARGUMENTS if name in kwargs}
        with written_whole(save_directory) as folder:
            super().save_pretrained(folder, **kwargs)
            if self._trained_in_full and (folder / ADAPTER_CONFIG).exists():
                add_trained_in_full(self, self._trained_in_full, folder)
            if self.norm_stats and any(folder.iterdir()):  # empty where another process saves
                (folder / STATISTICS_FILE).write_text(json.dumps(self.norm_stats, indent=2), encoding="utf-8")
        if is_pushed:
            self.push_to_hub(repo_id, token=kwargs.get("token"), **upload)


__all__ = [
    "CheckpointMixin",
    "LoadedFrom",
    "named_base",
    "read_statistics",
    "refuse_foreign_files",
    "refuse_foreign_weights",
    "refuse_training_run",
    "statistics_in_file",
]
