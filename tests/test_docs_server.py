"""docs/server.md and docs/deploy/: what they name is what the code has."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml
from conftest import ROOT
from fastapi import FastAPI

from fastldm.cli.main import main
from fastldm.cli.serve import serve
from fastldm.pipeline import Pipeline
from fastldm.server import a1111, extras, openai
from fastldm.server.app import create_app
from fastldm.server.settings import Settings

PAGE = (ROOT / "docs" / "server.md").read_text("utf-8")
DEPLOY = ROOT / "docs" / "deploy"
CODE = set(re.findall(r"`([^`\n]+)`", PAGE))
WORDS = {word for span in CODE for word in re.findall(r"[\w-]+", span)}


@pytest.fixture(scope="module")
def app() -> FastAPI:
    """With a model, whose state the metrics tell."""
    return create_app(Settings(), {"default": Pipeline.default(device="cpu")})


@pytest.fixture(scope="module")
def metrics(app: FastAPI) -> dict[str, str]:
    """name -> type, as they are scraped"""
    families = app.state.service.metrics.registry.collect()
    return {family.name + ("_total" if family.type == "counter" else ""): family.type for family in families}


def test_page_has_every_option_with_its_default() -> None:
    for option in serve.params:
        assert isinstance(option, click.Option)
        name = max(option.opts, key=len)
        assert name in {part for span in CODE for part in re.split(r"[ ,]+", span)}, name
        if isinstance(option.default, (int, float, str)) and not option.is_flag and option.name != "backend":
            assert re.search(rf"^\| `{name}` \| `{option.default}` \|", PAGE, re.MULTILINE), name


def test_page_names_no_option_that_there_is_not() -> None:
    known = {name for option in serve.params for name in option.opts}
    assert set(re.findall(r"(?<![\w|-])--[a-z-]+", PAGE.partition("## What it takes")[0])) <= known


def test_page_has_every_endpoint_and_no_other(app: FastAPI) -> None:
    documented = {tuple(span.split()) for span in CODE if re.fullmatch(r"(GET|POST|DELETE) /\S+", span)}
    paths = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    assert documented == {*paths, ("GET", "/openapi.json")}


def test_page_has_every_field() -> None:
    forms = (openai.GenerationBody, openai.EditFields, a1111.Text2Image, a1111.Image2Image)
    for body in (*forms, extras.ExtrasSingle, extras.ExtrasBatch):
        assert set(body.model_fields) <= WORDS, set(body.model_fields) - WORDS


def test_page_has_every_error_code() -> None:
    codes = set()
    for file in (ROOT / "fastldm" / "server").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("ApiError", "_Answer"):
                code = node.args[2]
                codes |= {code.value} if isinstance(code, ast.Constant) else set()
    assert len(codes) > 12
    assert codes <= WORDS, codes - WORDS


def test_page_has_every_metric_and_no_other(metrics: dict[str, str]) -> None:
    assert {word for word in WORDS if word.startswith("fastldm_")} == set(metrics)


def test_dashboard_shows_every_metric(metrics: dict[str, str]) -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text("utf-8"))
    ends = {"histogram": ("_bucket", "_sum", "_count")}
    samples = {name + end: name for name, kind in metrics.items() for end in ends.get(kind, ("",))}
    named = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            named |= set(re.findall(r"fastldm_\w+", target["expr"]))
    assert named <= set(samples)
    assert {samples[name] for name in named} == set(metrics)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_example_config_is_accepted() -> None:
    """As it stands, and with its comments' options too."""
    text = (DEPLOY / "fastldm.toml").read_text("utf-8")
    context = serve.make_context("serve", ["--config", str(DEPLOY / "fastldm.toml")])
    assert context.params["model"] == ("default=default",)
    assert context.params["lora"] == ("sketch=sketch", "pixel=pixel")
    assert context.params["max_pixels"] == 1_048_576
    assert context.params["cors_origin"] == ()
    options = {name.replace("-", "_") for name in re.findall(r"^#? ?([a-z-]+) = ", text, re.MULTILINE)}
    assert options <= {option.name for option in serve.params}


def test_unit_and_image_run_the_command() -> None:
    unit = (DEPLOY / "fastldm.service").read_text("utf-8")
    (line,) = re.findall(r"^ExecStart=\S+/fastldm serve (.*)$", unit, re.MULTILINE)
    image = (DEPLOY / "Dockerfile").read_text("utf-8")
    command = re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", image, re.MULTILINE)
    tokens = [token for part in command for token in json.loads(part)]
    assert tokens[:2] == ["fastldm", "serve"]
    example = str(DEPLOY / "fastldm.toml")
    for options in (line.replace("/etc/fastldm/fastldm.toml", example).split(), tokens[2:]):
        serve.make_context("serve", options)
    for source in re.findall(r"^COPY (.*) \S+$", image, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())
    for line in re.findall(r"fastldm (warm [^\n]*)", image):
        name, *tokens = shlex.split(line.replace("$ARCH", "sm_90"))
        main.commands[name].make_context(name, tokens)


def test_compose_names_what_there_is() -> None:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    server = found["services"]["fastldm"]
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    assert f" AS {server['build']['target']}\n" in (DEPLOY / "Dockerfile").read_text("utf-8")
    serve.make_context("serve", server["command"])
    (scrape,) = yaml.safe_load(found["configs"]["prometheus"]["content"])["scrape_configs"]
    assert scrape["static_configs"][0]["targets"] == ["fastldm:8000"]
    (source,) = yaml.safe_load(found["configs"]["datasource"]["content"])["datasources"]
    assert source["type"] == "prometheus"
    mounted = found["services"]["grafana"]["volumes"][0].split(":")
    assert (DEPLOY / mounted[0]).is_file()
    (provider,) = yaml.safe_load(found["configs"]["dashboards"]["content"])["providers"]
    assert str(Path(mounted[1]).parent) == provider["options"]["path"]
    for service in found["services"].values():
        assert {one["source"] for one in service.get("configs", ())} <= found["configs"].keys()


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", PAGE)
    assert {"deploy/grafana.json", "deploy/fastldm.toml"} <= set(links)
    assert {Path(link).name for link in links if link.startswith("deploy/")} == {p.name for p in DEPLOY.iterdir()} - {
        "kuberay.yaml"
    }
