"""Rollouts, environments, reports."""
