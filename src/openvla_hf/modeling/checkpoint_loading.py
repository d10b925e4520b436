"""Checkpoints on disk and on the Hub: what `from_pretrained`, `save_pretrained` and `load_adapter` add for OpenVLA."""

import fnmatch
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME, cached_file, hf_api, logging

from .adapter_loading import ADAPTER_CONFIG, ADAPTER_WEIGHTS, translate
from .configuration_openvla import AUTO_MAP, OpenVLAConfig
from .quantized_loading import missing_package, prepare_quantized, refuse_second, with_defaults


if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:  # a mixin: the class that takes it brings the model
    _Base = object

STATISTICS_FILE = "dataset_statistics.json"
# What OpenVLA-OFT keeps beside weights that have the names of OpenVLA's.
OFT_FILES = ("action_head--*", "proprio_projector--*", "noisy_action_projector--*")
# Arguments that say which files of a repository are meant, and how to get them.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Seconds to wait for the Hub's list of a repository's files.
HUB_TIMEOUT = 10.0

logger = logging.get_logger(__name__)


def find_file(repo: str | os.PathLike | None, name: str, **kwargs: Any) -> str | None:
    """Path of a file beside the weights, or `None`."""
    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if kwargs.get(name) is not None}
    if repo is None:  # `state_dict=` is given instead
        return None
    return cached_file(repo, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)


def list_files(repo: str | os.PathLike | None, **kwargs: Any) -> list[str]:
    """Names of the files beside the config, with one request at most where `repo` is on the Hub."""
    if repo is None:  # `state_dict=` is given instead
        return []
    if not os.path.isdir(repo) and not kwargs.get("local_files_only"):
        # Unlike a listing of the tree, this does not try again and again while there is no network.
        try:
            info = hf_api().model_info(
                str(repo), revision=kwargs.get("revision"), token=kwargs.get("token"), timeout=HUB_TIMEOUT
            )
        except Exception:  # offline, gated, no such repository: loading itself copes or says it best
            logger.debug("Could not list the files of %s.", repo, exc_info=True)
        else:
            folder = PurePosixPath(kwargs.get("subfolder") or "")
            paths = [PurePosixPath(file.rfilename) for file in info.siblings or []]
            return [path.name for path in paths if path.parent == folder]
    config_file = find_file(repo, CONFIG_NAME, **kwargs)
    return [] if config_file is None else os.listdir(Path(config_file).parent)


def refuse_oft(repo: str | os.PathLike | None, **kwargs: Any) -> None:
    """An OpenVLA-OFT checkpoint would load, and act wrongly: its action head is in a file of its own."""
    names = list_files(repo, **kwargs)
    if found := sorted(name for pattern in OFT_FILES for name in fnmatch.filter(names, pattern)):
        raise ValueError(
            f"{repo} is an OpenVLA-OFT checkpoint (it holds {found[0]!r}), whose action head this class does not "
            "have: run it with the code of OpenVLA-OFT."
        )


def read_statistics(repo: str | os.PathLike | None, **kwargs: Any) -> dict[str, Any] | None:
    """Statistics that a fine-tuning run left beside the weights, or `None`."""
    path = find_file(repo, STATISTICS_FILE, **kwargs)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def stored_quantization(repo: str | os.PathLike | None, **kwargs: Any) -> Any:
    """How the stored weights are quantised, or `None`."""
    config = kwargs.get("config")
    if config is not None:
        return getattr(config, "quantization_config", None)
    path = find_file(repo, CONFIG_NAME, **kwargs)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8")).get("quantization_config")


def unreadable_weights(repo: Any, error: SafetensorError) -> OSError:
    """A sentence in place of `error`."""
    return OSError(
        f"A weights file of {repo} is corrupt or was cut short ({error}): download it again, with "
        "`force_download=True` if it comes from the Hub."
    )


def refuse_foreign_weights(repo: Any, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """`ValueError` where a checkpoint lacks weights, or has some that have no place here."""
    for problem, names in (("missing", missing), ("unexpected", unexpected)):
        if keys := sorted(names):
            raise ValueError(
                f"{repo} is no OpenVLA checkpoint that this class can load: {len(keys)} {problem} weights, such "
                f"as {keys[0]!r}. An OpenVLA-OFT checkpoint needs the code of OpenVLA-OFT."
            )


def resolve_adapter(repo: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any] | None, Any, dict[str, Any]]:
    """What `from_pretrained` was given as an adapter (or `None`), its base, and the arguments for the base.

    The Auto classes name the base and hide the adapter in `adapter_kwargs`.
    """
    adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
    hub_kwargs = {name: adapter_kwargs[name] for name in HUB_KWARGS if adapter_kwargs.get(name) is not None}
    given = adapter_kwargs.get("_adapter_model_path")
    if given is not None:
        return {"repo": given, "hub_kwargs": hub_kwargs}, repo, kwargs
    config_file = find_file(repo, ADAPTER_CONFIG, **kwargs)
    if config_file is None or find_file(repo, CONFIG_NAME, **kwargs) is not None:
        return None, repo, kwargs
    base = json.loads(Path(config_file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    beside = Path(config_file).parent / str(base)
    base = str(beside) if beside.is_dir() else base
    if not base or (str(base).startswith((".", "/")) and not os.path.isdir(base)):
        raise OSError(
            f"{repo} is an adapter whose base {base!r} is not here: load the base yourself, and then the adapter "
            "with `openvla_hf.load_adapter(model, adapter)`."
        )
    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if kwargs.get(name) is not None}
    of_base = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    return {"repo": repo, "hub_kwargs": hub_kwargs}, base, of_base


class CheckpointMixin(_Base):
    """Loading, saving and adapters of a model whose base class is `PreTrainedModel`."""

    config: OpenVLAConfig
    norm_stats: dict[str, Any] | None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As `PreTrainedModel.from_pretrained`, for published checkpoints and our own.

        Unless a `quantization_config` says what stays in 16 bits, the head, the towers and the projector do. Weights
        are read from safetensors alone: a pickled file could run code.

        Raises:
            ValueError: A weight is missing or has no place here, the checkpoint is an OpenVLA-OFT one, or it is
                quantised already and `quantization_config` is given.
            OSError: A weights file is absent or can't be read.
            ImportError: The package that the quantised weights need is not installed.
        """
        adapter, pretrained_model_name_or_path, kwargs = resolve_adapter(pretrained_model_name_or_path, kwargs)
        refuse_oft(pretrained_model_name_or_path, **kwargs)
        if kwargs.get("quantization_config") is not None:
            stored = stored_quantization(pretrained_model_name_or_path, **kwargs)
            refuse_second(pretrained_model_name_or_path, stored)
            kwargs["quantization_config"] = with_defaults(kwargs["quantization_config"])
        kwargs["use_safetensors"] = True
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise unreadable_weights(pretrained_model_name_or_path, error) from error
        except OSError as error:
            if "no file named" not in str(error):
                raise
            raise OSError(
                f"{error} Copy the weights beside the config, or download the repository again: it is not complete."
            ) from error
        except ModuleNotFoundError as error:
            raise missing_package(pretrained_model_name_or_path, error) or error from error
        refuse_foreign_weights(pretrained_model_name_or_path, info["missing_keys"], info["unexpected_keys"])
        if not model.norm_stats:
            model.norm_stats = read_statistics(pretrained_model_name_or_path, **kwargs)
        prepare_quantized(model)
        if adapter is not None:
            model.load_adapter(adapter["repo"], **adapter["hub_kwargs"])
        return (model, info) if output_loading_info else model

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, **kwargs: Any) -> Any:
        """As transformers' own; takes adapters of the original's layer names too, and the statistics beside them.

        Raises:
            ValueError: A weight finds no place in this model, or an adapted layer lacks one.
            OSError: There is no adapter, or its weights are not in a safetensors file.
        """
        if kwargs.get("adapter_state_dict") is not None:
            return super().load_adapter(peft_model_id, adapter_name, **kwargs)
        hub_kwargs = {name: kwargs.pop(name) for name in HUB_KWARGS if name in kwargs}
        config_file = find_file(peft_model_id, ADAPTER_CONFIG, **hub_kwargs)
        weights_file = find_file(peft_model_id, ADAPTER_WEIGHTS, **hub_kwargs)
        if config_file is None or weights_file is None:
            raise OSError(f"{peft_model_id} holds no adapter: it lacks {ADAPTER_CONFIG} or {ADAPTER_WEIGHTS}.")
        with tempfile.TemporaryDirectory() as folder:
            whole = translate(self, config_file, weights_file, Path(folder))
            for layer, weight in whole.items():
                self.get_submodule(layer).weight.data.copy_(weight)
            info = super().load_adapter(folder, adapter_name, **kwargs)
        problems = info.missing_keys | info.unexpected_keys | {key for key, *_ in info.mismatched_keys}
        if problems:
            raise ValueError(
                f"{peft_model_id} does not fit this model: {len(problems)} weights are missing, left over or of "
                f"another shape, such as {min(problems)!r}."
            )
        self.norm_stats = read_statistics(peft_model_id, **hub_kwargs) or self.norm_stats
        return info

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`: our weight names, the code, and the statistics as a file too."""
        self.config.auto_map = dict(AUTO_MAP)
        kwargs.setdefault("save_original_format", False)
        if self.norm_stats and kwargs.get("is_main_process", True):
            os.makedirs(save_directory, exist_ok=True)
            with open(os.path.join(save_directory, STATISTICS_FILE), "w", encoding="utf-8") as file:
                json.dump(self.norm_stats, file, indent=2)
        super().save_pretrained(save_directory, **kwargs)


__all__ = [
    "OFT_FILES",
    "STATISTICS_FILE",
    "CheckpointMixin",
    "read_statistics",
    "refuse_foreign_weights",
    "refuse_oft",
    "unreadable_weights",
]
