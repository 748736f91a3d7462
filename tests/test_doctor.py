"""planning/doctor.py: the path of each op, for a GPU that this machine need not have."""

from __future__ import annotations

from click.testing import CliRunner

from fastldm.cli import main


def test_doctor_lists_the_path_of_each_op() -> None:
    result = CliRunner().invoke(main, ["doctor", "--arch", "sm_90"])
    assert result.exit_code == 0
    assert "ops of one guided step, text and decode in float16 on sm_90" in result.output
    assert "linear_geglu     triton  10 calls" in result.output
    assert "conv2d           torch" in result.output
