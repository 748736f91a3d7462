"""Who may wait: requests that can fit on the device."""

from __future__ import annotations

from fastldm.errors import OutOfMemory
from fastldm.planning import memory
from fastldm.request import Request
from fastldm.runtime.prior import PriorStages
from fastldm.runtime.slots import step_capacity
from fastldm.runtime.stages import Stages


def check(stages: Stages | PriorStages, request: Request, max_batch: int, held: int, *, ranked: bool = False) -> None:
    """OutOfMemory for what cannot fit, before any work. max_batch: images that the session's buffers are made for.
    held: bytes of buffers that are kept for requests of this size. ranked: whether its images are candidates."""
    free = memory.free_bytes(stages.device)
    if free is None:
        return
    if isinstance(stages, PriorStages):
        needed, count = stages.nbytes(request), request.batch
        if needed > free + held:
            raise OutOfMemory(
                f"{count} vector{'s' * (count > 1)} of the prior need {memory.size(needed)} beside the weights, and "
                f"{memory.size(free + held)} are free: ask for fewer pictures at once"
            )
        return
    request = request.parts(max_batch)[0]
    width, height, batch = int(request.width or 0), int(request.height or 0), request.batch
    images = max(batch, max_batch) if stages.device.type == "cuda" else batch
    workload = memory.Workload.of_request(
        stages,
        request,
        steps=step_capacity(int(request.num_inference_steps or 1)),
        tokens=stages.spec.window,
        slots=images,
        rows=stages.unet_rows(images),
        ranked=batch if ranked else 0,
    )
    memory.check(workload, free + held, f"{batch} picture{'s' * (batch > 1)} of {width}x{height}")
