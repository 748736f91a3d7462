"""The `fastldm` command."""

from fastldm.cli.main import main

__all__ = ["main"]
