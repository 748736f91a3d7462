"""All errors that fastldm raises deliberately.

Messages say what the value was, what was expected and what to do; errors are raised where external input is first
checked. Each error is also the built-in exception that a caller without knowledge of fastldm would catch.
"""

from __future__ import annotations


class FastLDMError(Exception):
    """Base of all errors that fastldm raises deliberately."""


class InputError(FastLDMError, ValueError):
    """An argument of a call or a command is wrong."""


class CheckpointError(FastLDMError, OSError):
    """A model on disk or on a hub cannot be used: missing, damaged, refused, or unsupported."""


class OutOfMemory(FastLDMError, MemoryError):
    """A request does not fit into memory; the message has the needed and the free bytes."""


class NonFinite(FastLDMError, ArithmeticError):
    """NaN or infinity appeared; the message has the stage and the step."""


class Cancelled(FastLDMError):
    """A request was cancelled. Raise it in a step callback to stop a call; the pipeline stays usable."""


class QueueFull(FastLDMError):
    """A bounded queue has no room; try again later."""


class DeadlineExceeded(FastLDMError, TimeoutError):
    """A request did not finish before its deadline."""


class WorkerLost(FastLDMError, RuntimeError):
    """A request was lost because its worker died or the process was forked: submit it again."""


class BundleError(FastLDMError):
    """An exported bundle is incomplete, damaged, or fails its own verification."""


class EngineError(FastLDMError):
    """An inference engine cannot be built, loaded or run."""


def out_of_memory_named(error: Exception) -> Exception:
    """OutOfMemory if an error is from an allocator of any device; any other error unchanged."""
    # The CPU allocator's error has no type of its own, and a GPU's is a RuntimeError too.
    from_allocator = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if isinstance(error, FastLDMError) or not (from_allocator or isinstance(error, MemoryError)):
        return error
    reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
    text = f"memory ran out{reason}: use a smaller size or fewer images"
    return OutOfMemory(text).with_traceback(error.__traceback__)
