"""Experiments: one configuration per claim, ablations and benchmarks."""
