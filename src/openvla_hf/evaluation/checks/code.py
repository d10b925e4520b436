"""Check the code that lies next to the weights of a checkpoint."""

from pathlib import Path

from ...checkpoints.shared_files import package_code
from ...modeling.checkpoint_files import CheckpointFiles
from .findings import Finding, failed, passed, skipped, warned


AGAIN = "Write the checkpoint again with `save_pretrained`, or push it with `openvla-hf push`."


def check_code(files: CheckpointFiles, layout: str) -> Finding:
    """Compare the code in a checkpoint with the modules that this package writes next to one.

    Args:
        files: Files of the checkpoint.
        layout: "openvla-hf", "adapter", "published" or "openvla-oft"; the last two bring the original's code.
    """
    name, code = "remote code", package_code(layout)
    if files.source is None:
        return skipped(name, "The policy is in memory.")
    if not code:
        return skipped(name, "The checkpoint is for the original code, which this package replaces.")
    found = {one: files.find(one) for one in code if one in files.names}
    if not found:
        return warned(
            name, "The checkpoint contains no code, so it loads only where this package is installed.", AGAIN
        )
    if missing := sorted(set(code) - set(found)):
        return failed(name, f"{len(missing)} of {len(code)} modules are missing (for example {missing[0]}).", AGAIN)
    changed = [one for one, path in found.items() if path and Path(path).read_text(encoding="utf-8") != code[one]]
    if changed:
        return failed(
            name,
            f"{len(changed)} of {len(code)} modules differ from those of this package (for example {changed[0]}).",
            AGAIN,
        )
    return passed(name, f"{len(code)} modules, equal to those of this package.")


__all__ = ["check_code"]
