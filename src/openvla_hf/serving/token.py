"""The token that protects a server."""

import os


TOKEN_VARIABLE = "OPENVLA_HF_SERVER_TOKEN"


def read_token(path: str | None) -> str | None:
    """Read the token from a file or, without a path, from the environment.

    Returns:
        The token, or `None` if there is neither.

    Raises:
        ValueError: The file or the variable is empty.
        OSError: The file can't be read.
    """
    if path is None:
        token = os.environ.get(TOKEN_VARIABLE)
    else:
        with open(path, encoding="utf-8") as text:
            token = text.read().strip()
    if token == "":
        raise ValueError(f"The token in {path or TOKEN_VARIABLE} is empty. Give a token, or leave it out.")
    return token


__all__ = ["TOKEN_VARIABLE", "read_token"]
