"""Options of a command in a TOML file."""

import itertools
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any


COMMANDS = ("finetune",)
FLAG = "--config"


def insert_config(argv: Sequence[str]) -> list[str]:
    """Insert the options of the file that `--config` gives, so that the options after the command override them.

    The file contains options by name, such as `eval-share = 0.05`. A list gives several values, a table gives
    `NAME=VALUE`, or the weights of a mixture, and `false` leaves an option out.

    Args:
        argv: Arguments of the command line.

    Raises:
        OSError: The file can't be read.
        ValueError: The file is not valid TOML.
    """
    given = [one.removeprefix(f"{FLAG}=") for one in argv if one.startswith(f"{FLAG}=")]
    given += [after for before, after in itertools.pairwise(argv) if before == FLAG]
    if not given or argv[0] not in COMMANDS:
        return list(argv)
    try:
        options = tomllib.loads(Path(given[-1]).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(
            f"There is no file {given[-1]!r} with the options of a run. Give the path of a TOML file as {FLAG}."
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{given[-1]} is not valid TOML: {error}.") from error
    texts = [text for name, value in options.items() for text in _as_arguments(name, value)]
    return [argv[0], *texts, *argv[1:]]


def _as_arguments(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag] * value
    if isinstance(value, list):
        return [flag, *map(str, value)]
    if isinstance(value, dict) and name == "set":
        return [flag, *(f"{setting}={json.dumps(one)}" for setting, one in value.items())]
    return [f"{flag}={json.dumps(value) if isinstance(value, dict) else value}"]


__all__ = ["insert_config"]
