"""The fused-encoder VLA."""

# Registers the classes: a config or model imported from its own file is then known to the Auto classes too.
from .. import auto as auto
