"""`/v1/jobs`: for clients that cannot hold a connection. A job runs on when its client goes; its answer is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastldm.server.errors import ApiError, api_error, body

if TYPE_CHECKING:
    from fastldm.server.service import Service, Work


@dataclass(eq=False)
class Job:
    """A request whose answer is kept."""

    work: Work
    task: asyncio.Task[dict[str, Any]]


class Jobs:
    """Those that are open are the service's to bound; those that are done are in its store."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._open: dict[str, Job] = {}

    def begin(self, work: Work, answer: Coroutine[Any, Any, dict[str, Any]]) -> Job:
        """A job of a request under way. answer: what it ends with."""
        job = Job(work, asyncio.create_task(answer))
        self._open[work.id] = job
        job.task.add_done_callback(lambda _: self._end(job))
        return job

    def _end(self, job: Job) -> None:
        del self._open[job.work.id]
        record = self._record(job)
        if job.task.cancelled():
            record |= {"status": "cancelled"}
        elif (error := job.task.exception()) is not None:
            answer = api_error(error, job.work.id)
            record |= {"status": "cancelled" if answer.code == "cancelled" else "failed", "error": body(answer)}
        else:
            record |= {"status": "completed", "progress": 1.0, "result": job.task.result()}
        size = sum(len(item.get("b64_json", "")) for item in record.get("result", {}).get("data", ()))
        self._service.kept.put(job.work.owner, record, size, id=f"job-{job.work.id}")

    def _record(self, job: Job) -> dict[str, Any]:
        work = job.work
        return {"id": work.id, "object": "job", "created_at": int(work.created), "model": work.model.name}

    def find(self, id: str, owner: str) -> Job | dict[str, Any]:
        """A job that is open, or the record of one that is done. ApiError for another's, and for none."""
        job = self._open.get(id)
        found = job if job is not None and job.work.owner == owner else self._service.kept.get(f"job-{id}", owner)
        if found is None:
            raise ApiError(404, "there is no such job, or it is not kept any more", "not_found")
        return found

    async def show(self, id: str, owner: str, preview: bool = False) -> dict[str, Any]:
        """How far a job is. preview: whether to have the next step's, which the next call then shows."""
        job = self.find(id, owner)
        if not isinstance(job, Job):
            return job
        work = job.work
        position, remaining = work.generation.position(), work.generation.remaining()
        done, steps = work.steps
        record = self._record(job) | {
            "status": "queued" if position else "running",
            "position": position,
            "progress": round(done / max(steps, 1), 4),
            "remaining_seconds": None if remaining is None else round(remaining, 3),
        }
        if preview:
            record["preview"] = await self._service.preview(work)
        return record

    def cancel(self, id: str, owner: str) -> dict[str, Any]:
        """Cancel one job, and no other."""
        job = self.find(id, owner)
        if not isinstance(job, Job):
            return {"id": id, "object": "job", "status": job["status"]}
        job.work.generation.cancel()
        return {"id": id, "object": "job", "status": "cancelling"}
