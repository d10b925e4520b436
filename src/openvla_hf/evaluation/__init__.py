"""Checks of data, open-loop errors, latency, and fidelity of quantised formats."""
