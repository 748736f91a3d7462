"""`python -m fastldm` and `fastldm`: the command, in a process of its own."""

import sys

from fastldm import heap
from fastldm.cli import main
from fastldm.cli import report as cli_report


def run() -> None:
    # What exports runs each network a few times, beside its weights: a kept heap would take 2 GB more of SD1.5.
    if sys.argv[1:2] not in (["export"], ["prepare"]):
        heap.keep()
    cli_report.run(main)


if __name__ == "__main__":
    run()
