"""Recipes over transformers.Trainer."""
