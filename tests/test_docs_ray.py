"""docs/ray.md and docs/deploy/kuberay.yaml: what they name is what the code, Serve and Kubernetes have."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import yaml
from servers import ROOT

DEPLOY = ROOT / "docs" / "deploy"


@pytest.fixture(scope="module")
def objects() -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text("utf-8")))


@pytest.fixture(scope="module")
def pods(objects: list[Any]) -> list[Any]:
    cluster = objects[1]["spec"]["rayClusterConfig"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_parts_that_kubernetes_knows_are_valid(objects: list[Any], pods: list[Any]) -> None:
    """All but the RayService around them, whose schema is KubeRay's."""
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for pod in pods:
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "fastldm"}, **pod}
        validator.validate(whole, "1.37", strict=True)
        with pytest.raises(validator.ValidationError):
            validator.validate({**whole, "spec": {**whole["spec"], "container": []}}, "1.37", strict=True)
    validator.validate(objects[0], "1.37", strict=True)


def test_parts_fit_each_other(objects: list[Any], pods: list[Any]) -> None:
    claim, service = objects
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    _, worker = pods
    (volume,) = worker["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    (container,) = worker["spec"]["containers"]
    (mount,) = container["volumeMounts"]
    args = application["args"]
    for path in (*args["model"].values(), *args["lora"].values()):
        assert path.startswith(f"{mount['mountPath']}/")
    assert {"containerPort": serve["http_options"]["port"], "name": "serve"} in container["ports"]
    limits = container["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == args["num_gpus"]
    assert int(limits["cpu"]) >= args["num_cpus"]
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    scaling = args["autoscaling_config"]
    assert (group["minReplicas"], group["maxReplicas"]) == (scaling["min_replicas"], scaling["max_replicas"])


def test_serve_builds_what_is_described(objects: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.serve", reason="Ray is not installed: pip install -e '.[ray]'")
    from ray.serve.schema import ServeDeploySchema

    monkeypatch.setenv("FASTLDM_API_KEYS", "choose-a-long-one")
    config = ServeDeploySchema.model_validate(yaml.safe_load(objects[1]["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, builder = application.import_path.partition(":")
    router = getattr(importlib.import_module(module), builder)(application.args)._bound_deployment
    settings, replicas = router.init_args
    assert settings.loras["pixel"] == "/models/pixel.safetensors"
    assert settings.api_keys == ("choose-a-long-one",)
    assert [one.name for one in application.deployments] == [router.name, replicas._bound_deployment.name]


def test_page_names_what_there_is() -> None:
    from inspect import getsource

    page = (ROOT / "docs" / "ray.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", page)
    assert links
    assert all((ROOT / "docs" / link).exists() for link in links)
    pytest.importorskip("ray.serve", reason="Ray is not installed: pip install -e '.[ray]'")
    from fastldm.server import ray

    for name in re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \|", page, re.MULTILINE):
        assert set(filter(None, name)) <= set(ray.build.__kwdefaults__)
    assert all(path in getsource(ray) for path in ("/metrics", "/v1/jobs", "x-fastldm-replica"))
