"""Every error that fastldm raises on purpose.

Each says what was given, what was expected and what to do, and is raised where the outside comes in. Each also is the
built-in that a caller who knows nothing of fastldm would catch.
"""

from __future__ import annotations


class FastLDMError(Exception):
    """Base of all errors that fastldm raises on purpose."""


class InputError(FastLDMError, ValueError):
    """An argument of a call or a command is wrong."""


class CheckpointError(FastLDMError, OSError):
    """A model on disk or on a hub cannot be used: missing, damaged, refused, or of another kind."""


class OutOfMemory(FastLDMError, MemoryError):
    """A request does not fit into memory; the message names what is needed and what is free."""


class NonFinite(FastLDMError, ArithmeticError):
    """NaN or infinity appeared; the message names the stage and the step."""


class Cancelled(FastLDMError):
    """A request was cancelled. Raise it in a step callback to stop a call; the pipeline stays usable."""


class QueueFull(FastLDMError):
    """A bounded queue has no room; try again later."""


class DeadlineExceeded(FastLDMError, TimeoutError):
    """A request did not finish before its deadline."""


class WorkerLost(FastLDMError, RuntimeError):
    """A request was lost through no fault of its own, with what ran it or in a forked process: ask again."""


class BundleError(FastLDMError):
    """An exported bundle is incomplete, damaged, or fails its own verification."""


class EngineError(FastLDMError):
    """An inference engine cannot be built, loaded or run."""


def out_of_memory_named(error: Exception) -> Exception:
    """OutOfMemory for what an allocator of any device raises where it fails; any other error as it is."""
    # What the CPU's allocator says has no type of its own, and a GPU's is a RuntimeError too.
    named = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if isinstance(error, FastLDMError) or not (named or isinstance(error, MemoryError)):
        return error
    reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
    text = f"memory ran out{reason}: ask for a smaller size or fewer pictures"
    return OutOfMemory(text).with_traceback(error.__traceback__)
