"""A file of prompts to a folder of pictures, which may be stopped at any moment and goes on where it was.

    work = Batch(read_lines("prompts.jsonl"), "out")
    with Maker(session, "small") as maker:
        for outcome in work.run(maker):
            ...

A picture is written beside its name, synced and renamed, and then its line appended to `results.jsonl` and synced: so
after a crash a line is either done, or made again. `ProcessMaker` has another process do the work, and starts the next
when that dies: the lines that were under way run alone then, and one that ends the process again is set aside.
"""

from fastldm.batches.batch import Batch
from fastldm.batches.lines import Line, Outcome, read_lines, shard
from fastldm.batches.maker import Maker, ProcessDied, ProcessMaker

__all__ = ["Batch", "Line", "Maker", "Outcome", "ProcessDied", "ProcessMaker", "read_lines", "shard"]
