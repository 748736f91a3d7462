"""Samplers as tables of numbers: configs, spacings, solvers."""
