"""Files of a checkpoint in a folder, or in one commit of a repository on the Hub."""

import fnmatch
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.utils import (
    CONFIG_NAME,
    EntryNotFoundError,
    hf_api,
    logging,
    resolve_revision,
    try_to_load_from_cache,
)
from transformers.utils.hub import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    ResolvedRevision,
    RevisionNotFoundError,
    httpx,
    is_offline_mode,
)


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Fields of the policy's config that the base of an adapter lacks.
ADAPTER_POLICY = "policy_config.json"
STATISTICS_FILE = "dataset_statistics.json"
# Weights of published OpenVLA-OFT checkpoints next to the safetensors files.
OFT_FILES = ("action_head--*", "proprio_projector--*", "noisy_action_projector--*", "vision_backbone--*")
# Arguments that select files of a repository and say how to download them.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Seconds to wait for the Hub's list of a repository's files.
HUB_TIMEOUT = 10.0
# The client raises its own errors, those of its HTTP library, and `ValueError` for a name that is not a Hub id.
HUB_ERRORS = (OSError, ValueError, httpx.HTTPError)
REFUSALS = {
    401: "the token is missing or invalid (HTTP 401). Log in with `hf auth login`, or pass `token=`",
    403: "this account has no access (HTTP 403). Ask for access on the repository's page, or change accounts",
    429: "too many requests were made (HTTP 429). Try again in a few minutes, or log in for a higher limit",
}

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class CheckpointFiles:
    """Files of a folder, or of one commit of a repository.

    A file counts as absent if the folder lacks it, the Hub answers HTTP 404, or the cache has a record of that answer.
    Any other failure to read a file is an error, since a fallback could be another robot's file.

    Attributes:
        source: Folder or Hub id; `None` where a `state_dict` takes the place of the files.
        names: Names of the files next to `config.json`; if the Hub was not asked, of those in the cache.
        hub_kwargs: `token`, `cache_dir`, ... for other loaders, which then read the same commit.
        is_whole: Whether `names` lists all files of the commit.
        failure: Error of the request for the list of files, if it failed.
    """

    source: str | None
    names: frozenset[str] = frozenset()
    hub_kwargs: dict[str, Any] = field(default_factory=dict)
    is_whole: bool = True
    failure: Exception | None = None

    @classmethod
    def locate(cls, source: str | os.PathLike | None, **kwargs: Any) -> "CheckpointFiles":
        """List the files of a folder or a repository once, with at most two requests.

        Args:
            source: Folder or Hub id.
            kwargs: Arguments of `from_pretrained`, of which those in `HUB_KWARGS` are used.

        Raises:
            OSError: There is no such folder or repository, or neither the Hub nor the cache lists its files.
        """
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if kwargs.get(name) is not None}
        if source is None:
            return cls(None, hub_kwargs=hub_kwargs)
        source = os.fspath(source)
        if os.path.isdir(source):
            folder = Path(source, hub_kwargs.get("subfolder", ""))
            return cls(source, frozenset(os.listdir(folder)) if folder.is_dir() else frozenset(), hub_kwargs)
        revision = resolve_revision(
            source,
            hub_kwargs.get("revision"),
            token=hub_kwargs.get("token"),
            local_files_only=hub_kwargs.get("local_files_only", False),
            cache_dir=hub_kwargs.get("cache_dir"),
        )
        failure: Exception | None = None
        if not (hub_kwargs.get("local_files_only") or is_offline_mode()):
            try:
                info = hf_api().model_info(
                    source, revision=_commit(revision), token=hub_kwargs.get("token"), timeout=HUB_TIMEOUT
                )
            except HUB_ERRORS as error:
                failure = error
            else:
                pinned = revision if isinstance(revision, ResolvedRevision) else info.sha
                paths = [PurePosixPath(file.rfilename) for file in info.siblings or []]
                beside = PurePosixPath(hub_kwargs.get("subfolder", ""))
                names = frozenset(path.name for path in paths if path.parent == beside)
                return cls(source, names, hub_kwargs | {"revision": pinned})
        # Everything must come from the same commit: the cached one, which may not be the latest.
        offline = hub_kwargs | {"local_files_only": True} | ({"revision": revision} if revision is not None else {})
        files = cls(source, hub_kwargs=offline, is_whole=False)
        cached = [path for name in (CONFIG_NAME, ADAPTER_CONFIG) if isinstance(path := files._cached(name), str)]
        if not cached or hub_kwargs.get("force_download"):
            raise hub_error(source, "the files", failure)
        if failure is not None:
            logger.warning("%s Using the cache.", hub_error(source, "the list of files", failure))
        return cls(source, frozenset(os.listdir(Path(cached[0]).parent)), offline, is_whole=False, failure=failure)

    def find(self, name: str) -> str | None:
        """Return the path of a file, downloaded if need be, or `None` if there is none.

        Raises:
            OSError: It is unknown whether the file exists, or it can't be downloaded.
        """
        if self.source is None:
            return None
        if os.path.isdir(self.source):
            path = Path(self.source, self.hub_kwargs.get("subfolder", ""), name)
            return str(path) if path.is_file() else None
        known = None if self.hub_kwargs.get("force_download") else self._cached(name)
        if known is not None:
            return known if isinstance(known, str) else None
        # Ask even if the list lacks the file, because the cache keeps the answer for offline use.
        options = self.hub_kwargs | {"revision": _commit(self.hub_kwargs.get("revision"))}
        try:
            return hf_api().hf_hub_download(self.source, name, **options)
        except LocalEntryNotFoundError as error:  # not in the cache, and the Hub was not asked or gave no answer
            if self._is_absent_from_cached_list(name):
                return None
            raise hub_error(self.source, name, error) from error
        except EntryNotFoundError:
            return None
        except HUB_ERRORS as error:
            raise hub_error(self.source, name, error) from error

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file, or return `None` if there is none; `ValueError` if it is damaged."""
        path = self.find(name)
        return None if path is None else read_json(path)

    def match(self, patterns: Iterable[str]) -> list[str]:
        """Return sorted names that match a pattern, or the patterns whose files may be missing from the cache."""
        patterns = list(patterns)
        found = sorted({name for pattern in patterns for name in fnmatch.filter(self.names, pattern)})
        if found or self.is_whole:
            return found
        return [pattern for pattern in patterns if not self._is_cached_as_listed(pattern)]

    def _path(self, name: str) -> str:
        return str(PurePosixPath(self.hub_kwargs.get("subfolder", ""), name))

    def _cached(self, name: str) -> Any:
        """Return a file's path in the cache, `None`, or another object if the cache records that the file is
        absent."""
        try:
            return try_to_load_from_cache(
                str(self.source),
                self._path(name),
                cache_dir=self.hub_kwargs.get("cache_dir"),
                revision=_commit(self.hub_kwargs.get("revision")),
            )
        except ValueError:  # not a Hub id
            return None

    def _snapshot(self, pattern: str) -> Path | None:
        """Return the folder of the cached commit, or `None` if it lacks a listed file."""
        try:
            folder = hf_api().snapshot_download(
                str(self.source),
                revision=_commit(self.hub_kwargs.get("revision")),
                cache_dir=self.hub_kwargs.get("cache_dir"),
                local_files_only=True,
                allow_patterns=[self._path(pattern)],
            )
        except LocalEntryNotFoundError:
            return None
        return Path(folder)

    def _is_cached_as_listed(self, pattern: str) -> bool:
        """Return whether the cache has all listed files that match a pattern."""
        return self._snapshot(pattern) is not None

    def _is_absent_from_cached_list(self, name: str) -> bool:
        """Return whether the cache has a list of the commit's files (from a full download) that lacks this file."""
        # `huggingface_hub` reads the list too, but has no public function that says whether there is one.
        snapshot = self._snapshot(name)
        return snapshot is not None and (snapshot.parent.parent / "trees" / f"{snapshot.name}.json").is_file()


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        ValueError: The file is truncated, is not JSON, or does not contain an object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or was cut short ({error}): copy or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must contain a JSON object, got {type(content).__name__}: copy or download it again."
        )
    return content


def unreadable_weights(repo: Any, error: Exception) -> OSError:
    """Turn an error of a weights reader into a clear one."""
    return OSError(
        f"A weights file of {repo} is corrupt or was cut short ({error}): download it again, with "
        "`force_download=True` if it comes from the Hub."
    )


def hub_error(source: str, what: str, error: Exception | None) -> OSError:
    """Turn an error of the Hub's client into a clear one; `error` is `None` if the Hub was not asked."""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    start = f"Cannot read {what} of {source}"
    if error is None or (isinstance(cause, LocalEntryNotFoundError) and not isinstance(cause, HfHubHTTPError)):
        return OSError(
            f"{start}: it is not in the cache, there is no folder of this name, and offline mode (HF_HUB_OFFLINE or "
            "`local_files_only`) forbids a download. Load it once online, or give a folder that contains all files."
        )
    if isinstance(cause, RevisionNotFoundError):
        return OSError(f"{start}: the repository has no such revision. Check `revision=`.")
    if isinstance(cause, RepositoryNotFoundError):
        return OSError(
            f"{source} is not a local folder, and the Hub has no such repository or hides it from this account: check "
            "the name, or log in with `hf auth login` if the repository is private or gated."
        )
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        return OSError(f"{start}: {REFUSALS.get(status, f'the Hub failed (HTTP {status}). Try again later')}.")
    if isinstance(cause, ValueError) and not isinstance(cause, json.JSONDecodeError):
        return OSError(f"{source} is neither an existing folder nor a Hub id such as 'openvla/openvla-7b'.")
    if isinstance(cause, OSError) and cause.errno is not None:  # such as a full disk
        return OSError(f"{start}: {cause.strerror or cause}.")
    return OSError(
        f"{start}: the Hub does not answer ({type(cause).__name__}), and there is no folder of this name. Check the "
        "name and the network, or set HF_HUB_OFFLINE=1 to use the cached files."
    )


def _commit(revision: str | None) -> str | None:
    return revision.resolved if isinstance(revision, ResolvedRevision) else revision


__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_POLICY",
    "ADAPTER_WEIGHTS",
    "HUB_ERRORS",
    "HUB_KWARGS",
    "OFT_FILES",
    "STATISTICS_FILE",
    "CheckpointFiles",
    "hub_error",
    "read_json",
    "unreadable_weights",
]
