"""`python -m fastldm` and `fastldm`: the command, in a process of its own."""

from fastldm import heap
from fastldm.cli import main
from fastldm.cli import report as cli_report


def run() -> None:
    heap.keep()
    cli_report.run(main)


if __name__ == "__main__":
    run()
