"""The fused-encoder VLA."""

# A config or a model that is imported from its file is one that the Auto classes know.
from .. import registered as registered
