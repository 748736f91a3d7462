"""Samplers as parameters of tests."""

from __future__ import annotations

import pytest

from fastldm.samplers.classes import DIFFUSERS
from fastldm.samplers.names import SAMPLERS

OWN_MODELS = (
    "DDIMInverseScheduler",
    "DPMSolverMultistepInverseScheduler",
    "UnCLIPScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "CMStochasticIterativeScheduler",
)
"""Classes that other classes' configurations cannot be given to, or that go from an image to noise."""
EXCHANGEABLE = tuple(name for name in DIFFUSERS if name not in OWN_MODELS)

NAMED = [
    pytest.param(name, marks=() if sampler.class_name in DIFFUSERS else pytest.mark.full)
    for name, sampler in SAMPLERS.items()
]
"""Every sampler by its name. The short tests of those that are none of diffusers' are in test_k_solvers.py."""
FORWARD = [param for param in NAMED if "inverse" not in str(param.values[0])]
"""Those that go from noise to an image."""
