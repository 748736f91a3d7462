"""`best_of` of the server's dialects: the best of many, with scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clients
import ip_adapters
import numpy as np
import pytest
from servers import service_of, wait_until
from sessions import tiny_pipeline
from starlette.testclient import TestClient

from fastldm import CheckpointError, Pipeline
from fastldm.metadata import parse_parameters
from fastldm.server.models import Models
from fastldm.server.settings import Settings

FIELDS = {"prompt": "a red apple", "seed": 3, "best_of": 4, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    """The default model, which has what ranks."""
    return Pipeline.default(dtype="float32")


@pytest.fixture(scope="module")
def http(pipe: Pipeline) -> Iterator[TestClient]:
    with clients.client(pipe) as http:
        wait_until(lambda: http.get("/ready").status_code == 200)
        yield http


def test_every_dialect_answers_the_best_with_scores(http: TestClient, pipe: Pipeline) -> None:
    expected = pipe("a red apple", candidates=4, keep=2, seed=3, num_inference_steps=1)

    def check(seeds: list[int], scores: list[float], pictures: list[str]) -> None:
        assert seeds == list(expected.seeds)
        assert scores == pytest.approx(expected.scores, abs=1e-4)
        for content, seed, score, own in zip(pictures, seeds, scores, expected.images, strict=True):
            picture = clients.picture(content)
            assert np.abs(np.asarray(picture, int) - np.asarray(own, int)).max() <= 1
            request, rest = parse_parameters(picture.info["parameters"])
            assert (request.seed, float(rest["Score"])) == (seed, pytest.approx(score, abs=1e-3))

    def check_openai(data: list[dict[str, Any]]) -> None:
        check(*([one[name] for one in data] for name in ("seed", "score", "b64_json")))

    check_openai(http.post("/v1/images/generations", json={**FIELDS, "n": 2}).json()["data"])
    job = http.post("/v1/jobs", json={**FIELDS, "n": 2}).json()["id"]
    wait_until(lambda: http.get(f"/v1/jobs/{job}").json()["status"] == "completed")
    check_openai(http.get(f"/v1/jobs/{job}").json()["result"]["data"])
    body = {"prompt": "a red apple", "seed": 3, "best_of": 4, "batch_size": 2, "steps": 1}
    answer = http.post("/sdapi/v1/txt2img", json=body).json()
    info = json.loads(answer["info"])
    check(info["all_seeds"], info["all_scores"], answer["images"])


def test_edits_have_the_best_too(http: TestClient, pipe: Pipeline) -> None:
    image = pipe("a green tree", seed=1, num_inference_steps=1).images[0]
    expected = pipe("a red apple", image=image, strength=0.9, candidates=3, seed=3, num_inference_steps=2)
    form = {"prompt": "a red apple", "strength": "0.9", "best_of": "3", "seed": "3", "num_inference_steps": "2"}
    answer = http.post("/v1/images/edits", data=form, files={"image": clients.file(image)}).json()
    assert [one["seed"] for one in answer["data"]] == list(expected.seeds)
    assert answer["data"][0]["score"] == pytest.approx(expected.scores[0], abs=1e-4)


def test_candidates_are_counted(http: TestClient) -> None:
    for path, fields in (("/v1/images/generations", {"n": 1}), ("/sdapi/v1/txt2img", {})):
        answer = http.post(path, json={"prompt": "x", "best_of": 11, **fields})
        assert answer.status_code == 400
        assert "best_of is 11: expected at most 10" in answer.text
    assert (
        "keep is 3 of 2 candidates" in http.post("/v1/images/generations", json={**FIELDS, "best_of": 2, "n": 3}).text
    )


def test_answers_without_candidates_have_no_scores(http: TestClient) -> None:
    data = http.post("/v1/images/generations", json={"prompt": "x", "num_inference_steps": 1}).json()["data"]
    assert "score" not in data[0]
    info = json.loads(http.post("/sdapi/v1/txt2img", json={"prompt": "x", "steps": 1}).json()["info"])
    assert "all_scores" not in info


@pytest.mark.full
def test_a_ranker_of_the_command_ranks_for_all_models(tmp_path: Path) -> None:
    folder = ip_adapters.clip_folder(tmp_path / "clip")
    fields = {"prompt": "a cat", "best_of": 2, "num_inference_steps": 1, "size": "32x32"}
    with clients.client(tiny_pipeline()) as http:
        answer = http.post("/v1/images/generations", json=fields)
        assert answer.status_code == 400
        assert "this model has none: give one" in answer.json()["error"]["message"]
        assert "`fastldm serve` as --ranker" in answer.json()["error"]["message"]
    pipes = {"a": tiny_pipeline(), "b": tiny_pipeline()}
    models = Models(Settings(models=dict.fromkeys(pipes, "/"), ranker=str(folder)), pipes)
    first, second = (pipe.stages.ranking.loaded for pipe in pipes.values())
    assert first is second is not None
    models.close(cancel=True)
    with clients.client(tiny_pipeline(), ranker=str(folder)) as http:
        wait_until(lambda: http.get("/ready").status_code == 200)
        assert -1 < http.post("/v1/images/generations", json=fields).json()["data"][0]["score"] < 1
        assert not service_of(http).open
    for ranker, message in ((str(tmp_path), r"config\.json"), ("acme/none", "nor in the local hub cache")):
        with pytest.raises(CheckpointError, match=message):
            Models(Settings(ranker=ranker), {"default": tiny_pipeline()})
