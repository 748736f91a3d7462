"""The server against its own OpenAPI document: schemathesis, all phases."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import clients
import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema
from servers import in_thread
from sessions import tiny_pipeline


def run_schemathesis(examples: int, *without: str) -> tuple[Counter[int], dict[str, str]]:
    """All phases: the answers' statuses, and what went wrong, by endpoint and check. without: these paths."""
    pipe = tiny_pipeline()
    pipe.stages.family = replace(pipe.stages.family, num_inference_steps=2)
    app = clients.application(pipe, max_steps=2, max_n=1, max_pixels=4096, max_batch=2)
    # What the document cannot say: which texts are pictures and sizes; that numbers may be texts; and that deleting a
    # job that is done leaves its result.
    lenient = ("positive_data_acceptance", "negative_data_rejection", "use_after_free", "allow_header_conformance")
    checks: dict[str, Any] = {name: {"enabled": False} for name in lenient}
    checks["not_a_server_error"] = {"expected-statuses": ["2xx", "3xx", "4xx", 504]}  # 504: deadlines of no time
    values = {"checks": checks, "generation": {"max-examples": examples, "deterministic": True}, "request-timeout": 60}
    statuses, failures, phases = Counter[int](), dict[str, str](), dict[str, str]()
    with in_thread(app) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=SchemathesisConfig.from_dict(values))
        schema = schema.exclude(path=list(without)) if without else schema
        for event in from_schema(schema).execute():
            assert not isinstance(event, (events.NonFatalError, events.FatalError)), event
            if isinstance(event, events.PhaseFinished):
                phases[event.phase.name.value] = event.status.value
            if isinstance(event, events.ScenarioFinished):
                recorder = event.recorder
                statuses.update(one.response.status_code for one in recorder.interactions.values() if one.response)
                for check in (one for each in recorder.checks.values() for one in each if one.failure_info):
                    text = f"{check.failure_info.failure}\n{check.failure_info.code_sample}"[:1000]  # type: ignore[union-attr]
                    failures[f"{recorder.label} {check.name}"] = text
    assert {"coverage", "fuzzing", "stateful"} <= {name.lower() for name in phases}
    return statuses, failures


@pytest.mark.full
def test_schemathesis_finds_nothing() -> None:
    # Others take the same fields; they have their turn in the long form.
    others = ("/v1/jobs", "/v1/images/edits", "/v1/images/variations", "/sdapi/v1/txt2img", "/sdapi/v1/img2img")
    statuses, failures = run_schemathesis(2, *others)
    assert not failures, "\n".join(f"{name}: {text}" for name, text in failures.items())
    assert sum(statuses.values()) > 200
    assert statuses[200] > 30


@pytest.mark.full
def test_schemathesis_finds_nothing_at_length() -> None:
    statuses, failures = run_schemathesis(100)
    assert not failures, "\n".join(f"{name}: {text}" for name, text in failures.items())
    assert sum(statuses.values()) > 2000
