"""Serve a policy to robots, and ask a served policy for actions.

Importing this package, or its client, does not import PyTorch.
"""
