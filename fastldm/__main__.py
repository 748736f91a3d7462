"""`python -m fastldm` is the `fastldm` command."""

from fastldm.cli import main

main()
