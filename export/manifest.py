"""A bundle's manifest.json: read by a table of types, and checked against its own hash and the model's configs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fastldm.adapters.packing import Layout
from fastldm.checks import show
from fastldm.errors import BundleError
from fastldm.export.engine import MANIFEST
from fastldm.export.graphs import FILES
from fastldm.export.reference import RUN, is_network
from fastldm.export.spec import NetworkSpec, Port
from fastldm.reading import (
    Either,
    Field,
    Flag,
    Integer,
    ListOf,
    MapOf,
    Maybe,
    Number,
    Object,
    OneOf,
    Text,
    read_fields,
    read_json,
    unfit,
)
from fastldm.request import MAX_CONTROLS

MAX_RANK = 4096
FORMAT = 2
"""Format 1 had one tolerance for all networks, no tokenizers and options, and token ids in int64."""


@dataclass(frozen=True)
class Digest:
    """A sha256 in hexadecimal digits."""

    expected: str = "a sha256 of 64 hexadecimal digits"

    def read(self, value: Any, at: str) -> str:
        if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
            raise unfit(value, at, self)
        return value


_SIZE = Integer(1, 2**24)
_FLAT = Integer(1, 2**40)


def _network(least: int) -> Object:
    """least: of any axis."""
    sizes = {name: Field(_SIZE) for name in ("best", "most", "multiple_of")}
    axis = Object(
        {"name": Field(Text(40)), "least": Field(Integer(least, 2**24)), **sizes},
        "a size, or an axis with name, least, best, most and multiple_of",
    )
    port = Object(
        {
            "name": Field(Text(80)),
            "dtype": Field(OneOf("float32", "float16", "int32")),
            "shape": Field(ListOf(Either(_FLAT, axis), 1, 5)),
            "below": Field(Maybe(Integer())),
            "like": Field(OneOf("normal", "latents", "picture", "factors", "scales", "padded")),
            "scale": Field(Number(0)),
        }
    )
    ports = {side: Field(ListOf(port, 1, 1000)) for side in ("inputs", "outputs")}
    return Object({"name": Field(Text(80)), **ports})


_OPTIONS = {
    "variant": Field(Text(), None),
    "revision": Field(Text(), None),
    "prediction_type": Field(Text(), None),
    "allow_pickle": Field(Flag(), False),
}
_FACTOR = Object({"offset": Field(Integer(0, 2**40)), "shape": Field(ListOf(_SIZE, 2, 4))})
_SLICE = Object({"module": Field(Text(400)), "down": Field(_FACTOR), "up": Field(_FACTOR)})
_CONTROL = Object(
    {
        "name": Field(Text(200)),
        "source": Field(Maybe(Text(10_000))),
        "short_hash": Field(Maybe(Text(12))),
        "weights": Field(Digest()),
        "config": Field(Object({})),
    }
)
_QUANTIZED = Object(
    {
        "mode": Field(OneOf("int8-weights", "int8")),
        "networks": Field(ListOf(OneOf("unet", "unet_step"), 1, 1)),
        "layers": Field(Integer(0, 2**24)),
        "layers_with_activations": Field(Integer(0, 2**24)),
        "bytes": Field(ListOf(Integer(0, 2**60), 2, 2)),  # of the network in float32, and in eight bits
        "prompts": Field(ListOf(Text(1000), 1, 1000)),  # of the gate's pictures
        "psnr": Field(Object({"mean": Field(Number()), "worst": Field(Number())})),  # of those, in dB
        "seconds": Field(MapOf(ListOf(Number(0), 2, 2), 0, 10)),  # a step's, in float and in eight bits
        "machine": Field(Text(1000)),  # that measured those
    }
)
FIELDS = {
    "model": Field(Text()),
    "source": Field(Maybe(Text(10_000))),
    "options": Field(Object(_OPTIONS)),
    "family": Field(Text()),
    "dtype": Field(OneOf("float32", "float16")),
    "opset": Field(Integer(1, 1000)),
    "split": Field(Flag()),
    "fused_ops": Field(Flag()),
    "adapters": Field(ListOf(Text(2000), 0, 200), []),  # that are merged into the weights
    "adapter_rank": Field(Integer(0, MAX_RANK), 0),  # of those that are taken beside them
    "adapter_inputs": Field(MapOf(ListOf(_SLICE, 1, 100_000), 0, len(RUN)), {}),  # by network, `packing.Slice.to_dict`
    "controls": Field(ListOf(_CONTROL, 0, MAX_CONTROLS), []),  # that are networks of their own
    "weights": Field(MapOf(Digest(), 1, 10)),
    "tokenizers": Field(MapOf(Digest(), 0, 10)),
    "config": Field(MapOf(Object({}), 2, 10)),
    "index": Field(Object({})),
    "networks": Field(MapOf(_network(1), 1, len(RUN) + 4 * MAX_CONTROLS)),
    "graphs": Field(MapOf(_network(0), 0, len(FILES)), {}),  # several steps and a whole picture as one network
    "columns": Field(ListOf(Text(40), 0, 100), []),  # of the tables that those read
    "quantized": Field(_QUANTIZED, None),  # networks in eight bits, and what that cost
    "versions": Field(MapOf(Text(), 0, 100)),
    "files": Field(MapOf(Object({"bytes": Field(Integer(0, 2**60)), "sha256": Field(Digest())}))),
}


def read(folder: Path) -> dict[str, Any]:
    """A bundle's manifest. BundleError, naming the field, if it is invalid or was edited."""
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}; `fastldm export -m MODEL {folder}` makes one")
    manifest = read_json(path, error=BundleError)
    head = {"format": Field(Integer(0)), "sha256": Field(Digest())}
    head_values = read_fields(manifest, head, str(path), error=BundleError)
    if head_values["format"] != FORMAT:
        raise BundleError(
            f"{path} is of format {head_values['format']}, this fastldm reads {FORMAT}: export the model again"
        )
    if head_values["sha256"] != digest(manifest):
        raise BundleError(f"{path} was edited or is damaged (its sha256 differs): export the model again")
    values = read_fields(manifest, FIELDS, str(path), error=BundleError)
    for name in values["files"]:
        if not _is_in_bundle(name):
            raise BundleError(f"{path} names {show(name)}, which is not in the bundle")
    for name, network in values["networks"].items():
        if network["name"] != name or not is_network(name):
            raise BundleError(
                f"{path}: 'networks.{show(name)}' is of {show(network['name'])}, expected one of {', '.join(RUN)}, or "
                "of a control"
            )
    return manifest  # configs and the index are checked by their readers


def check_networks(folder: Path, actual: Mapping[str, NetworkSpec], expected: Mapping[str, NetworkSpec]) -> None:
    """BundleError if a bundle's networks do not have the inputs and outputs that follow from its configs. Ranges of
    sizes may differ."""
    path = folder / MANIFEST
    if actual.keys() != expected.keys():
        raise BundleError(f"{path} has the networks {', '.join(actual)}, expected {', '.join(expected)}")
    for name, spec in actual.items():
        for port, right in zip((*spec.inputs, *spec.outputs), (*expected[name].inputs, *expected[name].outputs)):  # noqa: B905
            if (port.name, port.dtype, _kinds(port.shape)) != (right.name, right.dtype, _kinds(right.shape)):
                raise BundleError(f"{path}: {name} has {_describe(port)} where its configs have {_describe(right)}")
            if any(not axis.least <= axis.best <= axis.most for axis in port.axes.values()):
                raise BundleError(f"{path}: {name}.{port.name} has an axis whose sizes do not ascend")
        counts = [(len(x.inputs), len(x.outputs)) for x in (spec, expected[name])]
        if counts[0] != counts[1]:
            raise BundleError(f"{path}: {name} has {counts[0]} inputs and outputs, expected {counts[1]}")


def check_adapters(folder: Path, manifest: Mapping[str, Any], expected: Mapping[str, Layout]) -> None:
    """BundleError if a manifest says that adapters' factors lie elsewhere than where its networks read them."""
    actual = manifest.get("adapter_inputs", {})
    if actual != (inputs := adapter_inputs(expected)):
        name = next(name for name in (*inputs, *actual) if inputs.get(name) != actual.get(name))
        raise BundleError(
            f"{folder / MANIFEST}: 'adapter_inputs.{name}' is not where {name} reads the factors of adapters of rank "
            f"{manifest.get('adapter_rank', 0)}"
        )


def adapter_inputs(expected: Mapping[str, Layout]) -> dict[str, list[dict[str, Any]]]:
    """The field of a manifest: for each network, which slice of its factors is whose."""
    return {name: [own.to_dict() for own in layout] for name, layout in expected.items()}


def _describe(port: Port) -> str:
    return f"{port.name} ({', '.join(map(str, _kinds(port.shape)))}) in {port.dtype}"


def _kinds(shape: tuple[Any, ...]) -> list[Any]:
    return [size if isinstance(size, int) else size.name for size in shape]


def _is_in_bundle(name: str) -> bool:
    """Whether a file name is a normalised relative path inside the bundle."""
    path = PurePosixPath(name)
    return (
        "\\" not in name
        and "\0" not in name
        and not path.is_absolute()
        and ".." not in path.parts
        and str(path) == name
    )


def write(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Add format and hash to a manifest, and write it. Returns it."""
    full = {"format": FORMAT, **manifest}
    full["sha256"] = digest(full)
    write_json(folder / MANIFEST, full)
    return full


def digest(manifest: Mapping[str, Any]) -> str:
    """The value of a manifest's "sha256": the hash of all its other fields."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically: a reader finds the full file or none."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w") as file:
        json.dump(data, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
