"""What a check found, and the checkpoint that it looked at."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ...modeling.checkpoint_files import CheckpointFiles


Status = Literal["passed", "warned", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        check: Name of the check.
        status: "passed", "warned" (look at it), "failed" (the policy will act wrongly) or "skipped".
        found: What was found, or why the check was skipped.
        fix: What to do; `None` if there is nothing to do.
    """

    check: str
    status: Status
    found: str
    fix: str | None = None


@dataclass
class Subject:
    """The policy that is checked.

    Attributes:
        model: An `OpenVLAForActionPrediction`.
        processor: Its processor.
        files: Files that it was loaded from; `CheckpointFiles(None)` for a policy in memory.
        unnorm_key: Name of the statistics that the caller uses.
        raw_config: Content of the checkpoint's `config.json`; empty without one.
        training: Content of its `training.json`; empty without one.
    """

    model: Any
    processor: Any
    files: CheckpointFiles
    unnorm_key: str | None = None
    raw_config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """Config of the model."""
        return self.model.config

    @property
    def preparation(self) -> dict[str, Any]:
        """How the training prepared prompts and images, by `describe_preparation`; empty if it is not recorded."""
        return self.training.get("preparation", {})

    @property
    def key(self) -> str | None:
        """Key of the statistics in use; `None` if there are several and the caller named none."""
        keys = list(self.model.norm_stats or ())
        return keys[0] if self.unnorm_key is None and len(keys) == 1 else self.unnorm_key


def passed(check: str, found: str) -> Finding:
    """Make a finding without a problem."""
    return Finding(check, "passed", found)


def warned(check: str, found: str, fix: str) -> Finding:
    """Make a finding to look at."""
    return Finding(check, "warned", found, fix)


def failed(check: str, found: str, fix: str) -> Finding:
    """Make a finding of a mistake."""
    return Finding(check, "failed", found, fix)


def skipped(check: str, reason: str) -> Finding:
    """Make a finding of a check that does not apply."""
    return Finding(check, "skipped", reason)


__all__ = ["Finding", "Status", "Subject", "failed", "passed", "skipped", "warned"]
