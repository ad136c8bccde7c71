"""Runs that are compared: a grid of configurations and seeds, each run computed once, and what they say together."""
