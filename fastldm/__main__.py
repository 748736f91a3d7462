"""`python -m fastldm` and `fastldm`: the command, in a process of its own."""

import sys

from fastldm import heap
from fastldm.cli import main
from fastldm.cli import report as cli_report


def run() -> None:
    # What exports runs each network a few times, beside its weights: all of its heap would be 2 GB more of SD1.5.
    exports = sys.argv[1:2] in (["export"], ["prepare"])
    heap.keep(at_most=128 << 20 if exports else None)
    cli_report.run(main)


if __name__ == "__main__":
    run()
