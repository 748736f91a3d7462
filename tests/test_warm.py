"""planning/warm.py and its command, without a GPU."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from fastldm.cli import main
from fastldm.errors import InputError
from fastldm.planning import warm


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_warm_without_a_gpu_requires_an_arch() -> None:
    result = CliRunner().invoke(main, ["warm"])
    message = f"fastldm: torch sees no GPU here: say which to compile for with --arch {warm.ARCH_NAMES}\n"
    assert (result.exit_code, result.output) == (2, message)


@pytest.mark.parametrize("arch", ["sm_75", "90a", "hopper", ""])
def test_unknown_arch_lists_the_supported_ones(arch: str) -> None:
    with pytest.raises(InputError, match=r"expected sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120"):
        warm.parse_arch(arch)
