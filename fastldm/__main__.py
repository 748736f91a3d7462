"""`python -m fastldm` and `fastldm`: the command, in a process of its own."""

from fastldm import cli_report, heap
from fastldm.cli import main


def run() -> None:
    heap.keep()
    cli_report.run(main)


if __name__ == "__main__":
    run()
