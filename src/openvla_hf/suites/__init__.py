"""Benchmarks in simulation: what fixes their episodes, how a policy plays them, and how results are compared."""
