"""The fused-encoder VLA."""
