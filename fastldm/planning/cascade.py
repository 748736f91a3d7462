"""The memory plan of a request that is made in stages (serving/cascade.py), one after the other.

Every stage's weights stay loaded, and so do the buffers of each size; activations are of one stage at a time. Two
stages of one model share its weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fastldm.planning import memory
from fastldm.planning.memory import Line, MemoryPlan, Workload

if TYPE_CHECKING:
    from fastldm.loading.spec import Spec


@dataclass(frozen=True)
class PlannedStage:
    """A stage, and what it takes alone."""

    model: str
    plan: MemoryPlan
    shares: bool = False
    """Whether it runs on the model of a stage before."""

    @property
    def largest(self) -> Line:
        """Its largest phase."""
        return max(self.plan.phases, key=lambda line: line.bytes)


@dataclass(frozen=True)
class CascadePlan:
    """The memory of all stages, in bytes."""

    stages: tuple[PlannedStage, ...]

    @property
    def weights(self) -> int:
        """Of all models."""
        return sum(stage.plan.loading for stage in self.stages if not stage.shares)

    @property
    def buffers(self) -> int:
        """Of all stages."""
        return sum(line.bytes for stage in self.stages for line in stage.plan.buffers)

    @property
    def libraries(self) -> int:
        """Workspaces, which all stages share."""
        return max(sum(line.bytes for line in stage.plan.libraries) for stage in self.stages)

    @property
    def resident(self) -> int:
        """All that is there all the time."""
        return self.weights + self.buffers + self.libraries

    @property
    def largest(self) -> PlannedStage:
        """The stage with the largest phase."""
        return max(self.stages, key=lambda stage: stage.largest.bytes)

    @property
    def needed(self) -> int:
        """The least memory that the request can run in."""
        return self.resident + self.largest.largest.bytes

    @property
    def peak(self) -> int:
        """With what is cached: weights in a second layout of each model on a CPU, free blocks of all on a GPU."""
        cached = [stage.plan.cached.bytes for stage in self.stages if not stage.shares or stage.plan.workload.arch]
        return self.needed + sum(cached)

    def fits(self, free: int) -> bool:
        """Whether `free` bytes are enough for all models and the request."""
        return self.needed <= free

    def remedies(self, free: int) -> Iterator[CascadePlan]:
        """Plans that would fit, each with one change to all stages."""
        first = self.stages[0].plan.workload
        on_torch = all(stage.plan.workload.backend == "torch" for stage in self.stages)
        changes: list[dict[str, Any]] = []
        if first.decode == "whole":
            changes += [{"decode": "sliced"}] * (first.batch > 1) + [{"decode": "tiled"}] * on_torch
        if on_torch and first.dtype == torch.float32:
            changes.append({"dtype": torch.float16 if first.arch else torch.bfloat16})
        changes += [{"batch": batch} for batch in sorted({first.batch // 2, 1}) if 0 < batch < first.batch]
        for change in changes:
            stages = [
                replace(stage, plan=planned(replace(stage.plan.workload, **change), _has_decode(stage.plan)))
                for stage in self.stages
            ]
            if (changed := CascadePlan(tuple(stages))).fits(free):
                yield changed

    def advice(self, free: int) -> str:
        """The changes that would make it fit, as text."""
        first = self.stages[0].plan.workload
        ways = [memory.difference(first, remedy.stages[0].plan.workload) for remedy in self.remedies(free)]
        return ", or ".join(ways) or "a smaller size, or a device with more memory"

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data: each stage's whole plan, and what all take together."""
        stages = [{"model": s.model, "shares_weights": s.shares, **s.plan.to_dict()} for s in self.stages]
        return {
            "stages": stages,
            **{name: getattr(self, name) for name in ("weights", "buffers", "libraries", "resident", "needed", "peak")},
        }


def planned(workload: Workload, decodes: bool = True) -> MemoryPlan:
    """The plan of a stage. decodes: whether it ends with pixels; the next stage goes on with the latents of others."""
    plan = memory.plan(workload)
    return plan if decodes else replace(plan, phases=tuple(line for line in plan.phases if line.name != "decode"))


def plan(
    stages: Sequence[tuple[str, Workload]], *, of_latents: Collection[int], sharing: Collection[int]
) -> CascadePlan:
    """stages: model and workload. of_latents: which ones end with latents, with which the next goes on. sharing: which
    ones run on the model of a stage before."""
    return CascadePlan(
        tuple(
            PlannedStage(model, planned(workload, i not in of_latents), i in sharing)
            for i, (model, workload) in enumerate(stages)
        )
    )


def of_model(spec: Spec, model: str, first: Workload, **shared: Any) -> CascadePlan:
    """The plan of a model's request, with what goes on with its pictures. model: its name. first: of its own U-Net.
    shared: fields of all workloads."""
    stages = [(model, first)]
    for k, each in enumerate(spec.follows):
        width, height = each.own_size
        steps = 1 if k else each.family.num_inference_steps  # each but the first takes the last step of the one before
        stages.append(
            (each.component, Workload.of_spec(each, width=width, height=height, **{**shared, "steps": steps}))
        )
    return plan(stages, of_latents=range(1, len(stages) - 1), sharing=())


def _has_decode(plan: MemoryPlan) -> bool:
    return any(line.name == "decode" for line in plan.phases)
