"""The OpenVLA model: configuration, checkpoints and action prediction."""

# Register the classes, so that the Auto classes also know a config or model imported from its own file.
from .. import auto as auto
