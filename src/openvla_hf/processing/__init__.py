"""Prompts and images to model inputs."""
