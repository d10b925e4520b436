"""Write a checkpoint of LeRobot that refers to an OpenVLA checkpoint, for `--policy.path`:

    python -m lerobot_policy_openvla outputs/bridge --checkpoint=openvla/openvla-7b --unnorm_key=bridge_orig

The options are the fields of `OpenVLAConfig`. The checkpoint is loaded once, to check that they fit.
"""

import sys
from pathlib import Path

import draccus

from .configuration_openvla import OpenVLAConfig
from .modeling_openvla import OpenVLAPolicy
from .processor_openvla import make_openvla_pre_post_processors


def main(arguments: list[str]) -> None:
    """Write the folder that the first argument names."""
    folder, *options = arguments or ["--help"]
    if folder.startswith("-"):
        raise SystemExit(__doc__)
    config = draccus.parse(OpenVLAConfig, args=options)
    OpenVLAPolicy(config)
    Path(folder).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    for processor in make_openvla_pre_post_processors(config):
        processor.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
