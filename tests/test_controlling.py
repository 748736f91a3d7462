"""Attaching and detaching controls, before, between and while requests run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import controls
import numpy as np
import pytest
import tiny
from controls import BASE, make, picture

from fastldm import Pipeline, Session
from fastldm.errors import CheckpointError, InputError


def test_attach_names_and_detach(tmp_path: Path) -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    theirs = controls.controlnet("sd1")
    theirs.save_pretrained(tmp_path / "outlines")
    assert [pipe.attach_control(tmp_path / "outlines") for _ in range(2)] == ["outlines", "outlines-2"]
    assert pipe.attach_control(theirs, "mine") == "mine"
    assert list(pipe.controls) == ["outlines", "outlines-2", "mine"]
    assert pipe.controls["mine"].source == "the given ControlNetModel"
    with pytest.raises(InputError, match="a control named 'mine' is attached"):
        pipe.attach_control(theirs, "mine")
    with pytest.raises(InputError, match="no control named 'none'"):
        pipe.detach_control("none")
    pipe.detach_control("outlines")
    assert list(pipe.controls) == ["outlines-2", "mine"]
    with pytest.raises(CheckpointError):
        pipe.attach_control(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="this T2I-Adapter does not fit the model"):
        pipe.attach_control(controls.t2i_adapter("xl"))
    assert list(pipe.controls) == ["outlines-2", "mine"]
    pipe.detach_control()
    assert pipe.controls == {}


def test_pipeline_loads_with_its_controls(tmp_path: Path) -> None:
    tiny.save_pipeline("sd1", tmp_path / "sd1")
    nets = [controls.controlnet("sd1", 10), controls.controlnet("sd1", 11)]
    nets[0].save_pretrained(tmp_path / "outlines")
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    pipe = Pipeline.from_pretrained(tmp_path / "sd1", controlnet=tmp_path / "outlines", **options)
    assert list(pipe.controls) == ["outlines"]
    made = make(pipe, control_image=picture())
    multi = tiny.peer("diffusers").MultiControlNetModel(nets)
    adapter = controls.t2i_adapter("light")
    pipe = Pipeline.from_pretrained(tmp_path / "sd1", controlnet=multi, adapter=[adapter], **options)
    assert len(pipe.controls) == 3
    first = next(iter(pipe.controls))
    assert np.abs(make(pipe, control_image={first: picture()}) - made).max() < 1e-6


def test_request_keeps_a_control_that_is_detached() -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    pipe.attach_control(controls.controlnet("sd1"), "outlines")
    options = {**BASE, "seed": 0, "control_image": {"outlines": picture()}, "num_inference_steps": 6}
    expected = pipe(**options).images
    begun = threading.Event()

    def detach(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe.detach_control("outlines")
            begun.set()
        return tensors

    assert np.array_equal(pipe(**options, callback_on_step_end=detach).images, expected)
    assert begun.is_set()
    with pytest.raises(InputError, match="no control is attached"):
        pipe(**options)


def test_attaching_while_others_run_touches_no_picture() -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    expected = make(pipe, num_inference_steps=8)
    with Session(pipe, max_batch=2) as session:
        running = session.submit(**{**BASE, "seed": 0, "num_inference_steps": 8})
        pipe.attach_control(controls.controlnet("sd1"), "outlines")
        also = session.submit(**{**BASE, "seed": 0}, control_image={"outlines": picture()})
        assert np.abs(running.result().images - expected).max() < 2e-5  # type: ignore[operator]
        alone = make(pipe, control_image={"outlines": picture()})
        assert np.abs(also.result().images - alone).max() < 2e-5


def test_bundle_takes_no_controls() -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("tiny-sd"))
    pipe.stages.backend = "onnxruntime"
    with pytest.raises(InputError, match="which takes no controls: load the model itself"):
        pipe.attach_control("anywhere")
