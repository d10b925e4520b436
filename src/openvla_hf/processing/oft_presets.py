"""Cameras and states of OpenVLA-OFT's platforms, which no published file contains."""

import difflib
import json
import os
from collections.abc import Collection
from fnmatch import filter as match
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from huggingface_hub import get_cached_repo_tree
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.utils import tqdm
from transformers.utils import CONFIG_NAME, hf_api
from transformers.utils.hub import httpx, is_offline_mode

from .image_processing_openvla import LANCZOS3, find_file


STATISTICS_FILE = "dataset_statistics.json"
PROPRIO_PROJECTOR = "proprio_projector--*"
COMPONENTS = ("action_head--*", PROPRIO_PROJECTOR, "noisy_action_projector--*", "vision_backbone--*")
# How the original prepares images in evaluation.
IMAGE_FIELDS = {"resample": LANCZOS3, "center_crop_area": 0.9}


class Platform(NamedTuple):
    """Dimensions of a platform's actions and states, and its cameras in the order of the model's images."""

    action_dim: int
    state_dim: int
    cameras: tuple[str, ...]


PLATFORMS = {
    "libero": Platform(7, 8, ("full_image", "wrist_image")),
    "aloha": Platform(14, 14, ("full_image", "left_wrist_image", "right_wrist_image")),
    "bridge": Platform(7, 7, ("full_image",)),
}


def read_oft_fields(
    source: str | os.PathLike, platform: str | None, given: Collection[str], is_published: bool, **hub_kwargs: Any
) -> dict[str, Any]:
    """Return the processor's fields for a platform or for a published OpenVLA-OFT checkpoint.

    Args:
        source: Folder or Hub id.
        platform: Name of a platform. By default, the one whose dimensions the checkpoint's statistics have. For a
            published checkpoint without component files, the platform means a model that predicts tokens from the
            first camera, without the state. The cameras and the state of a saved processor stay as they are.
        given: Names of fields that the caller gives, which need not be found.
        is_published: Whether the files may be those of OpenVLA-OFT; the files that `save_pretrained` writes are not.
        hub_kwargs: `revision`, `token` and so on.

    Returns:
        `cameras`, `state_dim` and the fields of the image processor; empty for a plain checkpoint.

    Raises:
        ValueError: The platform is unknown, or does not follow from the statistics.
        OSError: It is unknown which files the checkpoint has.
    """
    if platform is not None and platform not in PLATFORMS:
        near = difflib.get_close_matches(str(platform), PLATFORMS, n=1)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown platform {platform!r}.{guess} Choose from {', '.join(map(repr, PLATFORMS))}.")
    files = list_files(source, **hub_kwargs) if is_published else []
    has_components = any(match(files, pattern) for pattern in COMPONENTS)
    if platform is None and not has_components:
        return {}
    fields: dict[str, Any] = {"image_processor": IMAGE_FIELDS}
    if not is_published:
        return fields
    preset = None if platform is None else PLATFORMS[platform]
    if "cameras" not in given:
        preset = preset or _recognize(source, **hub_kwargs)
        fields["cameras"] = list(preset.cameras if has_components else preset.cameras[:1])
    if "state_dim" not in given and match(files, PROPRIO_PROJECTOR):
        fields["state_dim"] = preset.state_dim if preset else _read_dims(source, **hub_kwargs)[1]
    return fields


def list_files(source: str | os.PathLike, **hub_kwargs: Any) -> list[str]:
    """List the names of the files beside a checkpoint's `config.json`.

    The cache keeps the Hub's list of a commit. In offline mode without this list, the files in the cache count.

    Raises:
        OSError: The Hub refuses the list or does not answer.
    """
    config_file = find_file(source, CONFIG_NAME, **hub_kwargs)
    if config_file is None:
        return []
    if os.path.isdir(source):
        return os.listdir(os.path.dirname(config_file))
    source = str(source)
    beside = PurePosixPath(hub_kwargs.get("subfolder") or "")
    options = {name: hub_kwargs.get(name) for name in ("revision", "cache_dir")}
    if not (hub_kwargs.get("local_files_only") or is_offline_mode()):
        try:
            # The only public function that keeps the list. The file that it fetches is in the cache.
            hf_api().snapshot_download(
                source,
                **options,
                token=hub_kwargs.get("token"),
                allow_patterns=[str(beside / CONFIG_NAME)],
                tqdm_class=_NoBar,
            )
        except (OSError, httpx.HTTPError) as error:
            raise _unknown_files(source, error) from error
    try:
        paths = [PurePosixPath(file.path) for file in get_cached_repo_tree(source, **options)]
    except CachedRepoTreeNotFoundError as error:
        if hub_kwargs.get("local_files_only") or is_offline_mode():
            return os.listdir(os.path.dirname(config_file))
        raise _unknown_files(source, error) from error
    return [path.name for path in paths if path.parent == beside]


class _NoBar(tqdm):
    """A progress bar that is not shown."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"disable": True})


def _unknown_files(source: str, error: Exception) -> OSError:
    return OSError(
        f"Cannot read the list of files of {source}, which tells whether it is an OpenVLA-OFT checkpoint: the Hub "
        f"refuses the list or does not answer ({error.__cause__ or error}). Check your access and the network, or set "
        "HF_HUB_OFFLINE=1 to use what is in the cache."
    )


def _recognize(source: str | os.PathLike, **hub_kwargs: Any) -> Platform:
    """Find the platform that has the dimensions of a checkpoint's statistics."""
    action_dim, state_dim = _read_dims(source, **hub_kwargs)
    for preset in PLATFORMS.values():
        if (preset.action_dim, preset.state_dim) == (action_dim, state_dim):
            return preset
    raise ValueError(
        f"The cameras of {source} are unknown: no platform has {action_dim} action and {state_dim} state dimensions, "
        f"as its {STATISTICS_FILE} has. Pass `cameras=` with their names in order, or `platform=` "
        f"({', '.join(map(repr, PLATFORMS))})."
    )


def _read_dims(source: str | os.PathLike, **hub_kwargs: Any) -> tuple[int, int]:
    """Read the numbers of action and state dimensions from a checkpoint's statistics."""
    path = find_file(source, STATISTICS_FILE, **hub_kwargs)
    if path is None:
        raise ValueError(
            f"The cameras and the state of {source} are unknown, since it has no {STATISTICS_FILE}: pass `platform=` "
            f"({', '.join(map(repr, PLATFORMS))}), or `cameras=` and `state_dim=`."
        )
    try:
        with open(path, encoding="utf-8") as file:
            rows = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or was cut short ({error}): copy or download it again.") from error
    try:
        dims = {tuple(len(row[name]["q01"]) for name in ("action", "proprio")) for row in rows.values()}
        ((action_dim, state_dim),) = dims
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The {STATISTICS_FILE} of {source} does not have the same number of action and proprio dimensions for "
            "all datasets: pass `platform=`, or `cameras=` and `state_dim=`."
        ) from error
    return action_dim, state_dim


__all__ = ["IMAGE_FIELDS", "PLATFORMS", "Platform", "read_oft_fields"]
