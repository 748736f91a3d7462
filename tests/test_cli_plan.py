"""`fastldm plan`: what it prints, as text and as JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import controls
import ip_adapters
import pytest
import tiny
from click.testing import Result
from command import run

from fastldm import Pipeline, Request
from fastldm.export import writing
from fastldm.model import describe
from fastldm.planning import memory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_pipeline("sd1", tmp_path_factory.mktemp("cli") / "tiny-sd1"))


def plan(model: str, *arguments: str) -> Result:
    return run("plan", "-m", model, "--device", "cpu", "--dtype", "float32", *arguments)


def test_table_has_weights_buffers_and_phases(model: str) -> None:
    done = plan(model, "--size", "512x256", "--batch", "3")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "3 x 512x256, guided, 30 steps, torch float32 on a CPU, whole decode"
    for name in ("weights", "  U-Net", "buffers", "  noise", "all the time", "  and in decode", "needed", "peak"):
        assert sum(line.startswith(f"{name} ") for line in lines) == 1, name
    assert lines[-1].startswith("fits: ")
    assert len({line.index("iB") for line in lines if "iB  " in line}) == 1, "aligned"


def test_json_has_the_same_figures(model: str) -> None:
    report = json.loads(plan(model, "--n", "4", "--json").output)
    assert report["model"] == model
    assert report["workload"]["batch"] == 4
    assert report["needed"] == report["resident"] + max(line["bytes"] for line in report["phases"])
    assert report["here"]["fits"]
    assert report["would_fit"] == []
    elsewhere = json.loads(run("plan", "-m", model, "--arch", "sm_89", "--json").output)
    assert elsewhere["here"] is None
    assert elsewhere["workload"]["dtype"] == "float16"


def test_what_does_not_fit_gets_remedies(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastldm.planning import memory

    monkeypatch.setattr(memory, "free_bytes", lambda device: 100 * 2**20)
    text = plan(model, "--size", "768x768", "--n", "2").output
    assert "does not fit: 100.0 MiB are free; what would: " in text
    assert "tiled decode" in text
    report = json.loads(plan(model, "--size", "768x768", "--n", "2", "--json").output)
    assert report["here"] == {"fits": False, "free": 100 * 2**20}
    assert "tiled" in {remedy["workload"]["decode"] for remedy in report["would_fit"]}


def test_controls_are_planned_as_a_request_takes_them(model: str, tmp_path: Path) -> None:
    """test_memory.py holds that against bytes that were allocated."""
    controls.controlnet("sd1").save_pretrained(tmp_path / "outlines")
    controls.t2i_adapter("full").save_pretrained(tmp_path / "depth")
    options = ("--size", "64x128", "--n", "2", "--steps", "3", "--reuse", "2", "--json")
    names = [str(tmp_path / name) for name in ("outlines", "depth")]
    planned = json.loads(plan(model, *options, "--control", names[0], "--control", f"{names[1]}:0.5").output)
    pipe = Pipeline.from_pretrained(model, device="cpu", dtype="float32")
    for name in names:
        pipe.attach_control(name)
    request = {"width": 64, "height": 128, "num_images_per_prompt": 2, "num_inference_steps": 3, "reuse": 2}
    completed = pipe.stages.complete(
        Request("a cat", **request, control_image=[controls.picture(1), controls.picture(2)])
    )
    used = memory.plan(memory.Workload.of_request(pipe.stages, completed)).to_dict()
    for part in ("weights", "buffers", "phases"):
        assert planned[part] == used[part]
    assert "deep" in {line["name"] for line in planned["buffers"]}
    assert {"control 1", "control 2"} <= {line["name"] for line in planned["weights"]}
    unused = json.loads(plan(model, *options, "--control", f"{names[0]}:0").output)
    assert "control" not in {line["name"] for line in unused["phases"]}, "at 0 it is loaded, and does not run"
    assert "does not fit the model" in plan("default", "--control", names[1]).output


@pytest.mark.parametrize(
    "options",
    [{"pag_scale": 3.0}, {"pag_scale": 3.0, "pag_applied_layers": "up_blocks.1"}, {"apg_momentum": -0.5}],
)
def test_guidance_is_planned_as_a_request_takes_it(model: str, options: dict[str, Any]) -> None:
    names = {"pag_scale": "--pag-scale", "pag_applied_layers": "--pag-layer", "apg_momentum": "--apg-momentum"}
    arguments = [str(text) for name, value in options.items() for text in (names[name], value)]
    size = ("--size", "64x64", "--n", "2", "--steps", "3", "--json")
    planned = json.loads(plan(model, *size, *arguments).output)
    pipe = Pipeline.from_pretrained(model, device="cpu", dtype="float32")
    completed = pipe.stages.complete(Request("a cat", num_images_per_prompt=2, num_inference_steps=3, **options))
    used = memory.plan(memory.Workload.of_request(pipe.stages, completed)).to_dict()
    for part in ("workload", "weights", "buffers", "phases"):
        assert planned[part] == used[part]
    plain = json.loads(plan(model, *size).output)
    assert planned["needed"] > plain["needed"]


def test_more_guidance_is_in_all_headings(model: str) -> None:
    more = ("--pag-scale", "3", "--apg-momentum", "-0.5")
    lines = plan(model, *more, "--hires-scale", "2", "--refiner", model).output.splitlines()
    assert sum(", guided, a third row, averaged, " in line for line in lines[:4]) == 3
    assert "pag_applied_layers holds 'nowhere'" in plan(model, "--pag-scale", "3", "--pag-layer", "nowhere").output


def planned_lines(done: Result, part: str) -> dict[str, int]:
    assert done.exit_code == 0, done.output
    return {line["name"]: line["bytes"] for line in json.loads(done.output)[part]}


def test_candidates_are_planned_as_a_request_takes_them(model: str, tmp_path: Path) -> None:
    """test_beside.py holds that against bytes that were allocated."""
    own = run("plan", "--best-of", "9", "--n", "2", "--device", "cpu", "--json")
    assert json.loads(own.output)["workload"]["batch"] == 4, "of a session's part"
    pipe = Pipeline.default(device="cpu")
    completed = pipe.stages.complete(Request("a cat", candidates=9, keep=2, seed=0))
    used = memory.plan(memory.Workload.of_request(pipe.stages, completed.parts(4)[0], ranked=4)).to_dict()
    for part in ("weights", "buffers", "phases"):
        assert planned_lines(own, part) == {line["name"]: line["bytes"] for line in used[part]}
    folder = str(ip_adapters.clip_folder(tmp_path / "clip"))
    other = plan(model, "--best-of", "2", "--ranker", folder, "--json")
    assert {"ranker's image encoder", "ranker's text encoder"} <= planned_lines(other, "weights").keys()
    assert "this model has none: give one" in plan(model, "--best-of", "2").output
    assert "--ranker is for --best-of" in plan(model, "--ranker", folder).output
    assert "acme/none is neither a folder" in plan(model, "--best-of", "2", "--ranker", "acme/none").output


def test_pictures_are_planned_as_a_request_takes_them(model: str, tmp_path: Path) -> None:
    folder = ip_adapters.folder(tmp_path, tiny.unet("sd1"), "base")
    file = str(folder / "models" / "base.safetensors")
    done = plan(model, "--ip-adapter", file, "--steps", "3", "--json")
    pipe = Pipeline.from_pretrained(model, device="cpu", dtype="float32")
    pipe.load_ip_adapter(file)
    picture = {"ip_adapter_image": controls.picture(1), "num_inference_steps": 3}
    completed = pipe.stages.complete(Request("a cat", **picture))
    used = memory.plan(memory.Workload.of_request(pipe.stages, completed)).to_dict()
    for part in ("weights", "buffers", "phases"):
        assert planned_lines(done, part) == {line["name"]: line["bytes"] for line in used[part]}


def test_depth_is_estimated_unless_it_is_given(tmp_path: Path) -> None:
    depth = str(tiny.save_pipeline("sd2-depth", tmp_path / "depth"))
    assert "depth" in planned_lines(plan(depth, "--json"), "phases")
    given = planned_lines(plan(depth, "--depth-map", "--json"), "phases")
    assert "depth" not in given
    assert "encode" in given, "its picture is encoded in any case"


@pytest.mark.full
def test_a_bundle_of_the_default_model_is_enlarged_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its path, and as what `fastldm prepare` has made of the model."""
    pytest.importorskip("onnx", reason="exporting needs fastldm[onnx]")
    out = writing.export(describe("default"), tmp_path / "bundle", source="default", name="default").folder
    arguments = ("--size", "128x128", "--device", "cpu", "--json")
    with_path = run("plan", "-m", str(out), *arguments)
    assert with_path.exit_code == 0, with_path.output
    found = {"default": (out, "onnxruntime")}
    monkeypatch.setattr("fastldm.model.or_prepared", lambda name, backend, *_, **__: found.get(name, (name, backend)))
    prepared = run("plan", *arguments)
    assert prepared.exit_code == 0, prepared.output
    for done in (with_path, prepared):
        small, large = json.loads(done.output)["stages"]
        assert (small["workload"]["width"], small["workload"]["backend"] != "torch") == (64, True)
        assert (large["model"], large["workload"]["width"], large["workload"]["backend"]) == ("upscaler", 128, "torch")


def test_options_are_in_the_heading_and_the_phases() -> None:
    done = run("plan", "--n", "2", "--steps", "4", "--decode", "sliced", "--init-image", "--arch", "sm_90")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "2 x 64x64, guided, 4 steps, torch float16 on sm_90, sliced decode"
    phases = [line.split()[2] for line in lines if line.startswith("  and in ")]
    assert phases == ["text", "conditions", "encode", "step", "decode"]
    assert lines[-1].startswith("peak "), "of a GPU that is not here nobody knows what is free"


def test_default_plan_fits_this_machine() -> None:
    done = run("plan", "--device", "cpu")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"1 x 64x64, guided, 4 steps, torch \w+ on a CPU, whole decode", lines[0])
    assert re.fullmatch(r"fits: \d+\.\d+ .iB are free", lines[-1])


def test_default_model_enlarged_plans_both_models() -> None:
    report = json.loads(run("plan", "--size", "128x128", "--n", "2", "--device", "cpu", "--json").output)
    small, large = report["stages"]
    assert [(s["model"], s["workload"]["width"]) for s in report["stages"]] == [("default", 64), ("upscaler", 128)]
    alone = json.loads(run("plan", "--n", "2", "--device", "cpu", "--json").output)
    assert {name: small[name] for name in ("weights", "buffers", "phases")} == {
        name: alone[name] for name in ("weights", "buffers", "phases")
    }
    total = {part: sum(line["bytes"] for s in (small, large) for line in s[part]) for part in ("weights", "buffers")}
    assert {part: report[part] for part in total} == total
    assert report["needed"] == report["resident"] + max(p["bytes"] for s in (small, large) for p in s["phases"])
    assert "stages" not in json.loads(run("plan", "--size", "96x96", "--device", "cpu", "--json").output)


def test_stages_of_one_model_share_its_weights(model: str) -> None:
    arguments = ("--size", "64x32", "--hires-scale", "2", "--refiner", model, "--json")
    report = json.loads(plan(model, *arguments).output)
    sizes = [(s["workload"]["width"], s["workload"]["height"], s["shares_weights"]) for s in report["stages"]]
    assert sizes == [(64, 32, False), (128, 64, True), (128, 64, False)]
    assert report["weights"] == 2 * sum(line["bytes"] for line in report["stages"][0]["weights"])
    phases = [{line["name"] for line in s["phases"]} for s in report["stages"]]
    assert ["decode" in names for names in phases] == [False, False, True], "latents go on"
    done = plan(model, "--hires-scale", "2", "--hires-upscaler", "lanczos")
    assert done.output.startswith("2 stages, one after the other\n  1. ")
    pixels = json.loads(plan(model, "--hires-scale", "2", "--hires-upscaler", "lanczos", "--json").output)["stages"]
    assert [{"encode", "decode"} & {line["name"] for line in s["phases"]} for s in pixels] == [
        {"decode"},
        {"encode", "decode"},
    ]
    assert "hires_scale is 0.5" in plan(model, "--hires-scale", "0.5").output


@pytest.mark.full
def test_cascade_that_does_not_fit_gets_remedies(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--size", "256x256", "--n", "4", "--hires-scale", "2")
    needed = json.loads(plan(model, *arguments, "--json").output)["needed"]
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    report = json.loads(plan(model, *arguments, "--json").output)
    assert not report["here"]["fits"]
    assert report["would_fit"]
    assert all(remedy["needed"] < needed for remedy in report["would_fit"])
    assert "; what would: " in plan(model, *arguments).output


def test_unknown_model_is_one_line_on_stderr() -> None:
    done = run("plan", "-m", "./nowhere")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("fastldm: ")
    assert "nowhere" in done.stderr
    assert done.stderr.count("\n") == 1
