"""Check the code that lies next to the weights of a checkpoint."""

from pathlib import Path

from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from ...checkpoints.shared_files import package_code
from ...modeling.checkpoint_files import CheckpointFiles
from ...modeling.configuration_openvla import AUTO_MAP
from .findings import Finding, failed, passed, skipped, warned


# File -> Auto class -> class in the code. An adapter has no config.
CLASSES = {CONFIG_NAME: AUTO_MAP, PROCESSOR_NAME: {"AutoProcessor": "processing_openvla.OpenVLAProcessor"}}
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
    changed = [one for one, path in found.items() if path and _read(path) != code[one]]
    if changed:
        return failed(
            name,
            f"{len(changed)} of {len(code)} modules differ from those of this package (for example {changed[0]}).",
            AGAIN,
        )
    for file, classes in CLASSES.items():
        content = files.read_json(file)
        named = {} if content is None else content.get("auto_map") or {}
        if content is not None and (lost := [one for one in classes if named.get(one) != classes[one]]):
            return failed(name, f"The `auto_map` of {file} does not give {classes[lost[0]]} for {lost[0]}.", AGAIN)
    return passed(name, f"{len(code)} modules, equal to those of this package.")


def _read(path: str | Path) -> str:
    """Read a module, which may be damaged."""
    return Path(path).read_text(encoding="utf-8", errors="replace")


__all__ = ["check_code"]
