"""What a server is started with: `fastldm serve` has an option for each field, by the same name."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastldm import checks
from fastldm.errors import InputError
from fastldm.reading import read_file

MIB = 2**20
_MIN_KEY = 8  # characters
_NAMED = ("model", "lora", "control")
_LISTS = ("models", "loras", "controls", "api_keys", "cors_origins")  # whose options have other names
_MAX_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Settings:
    """Checked when made: InputError names the field, which is the option's name."""

    models: Mapping[str, str] = field(default_factory=lambda: {"default": "default"})
    """What clients call a model, and its folder, file or hub id; the first is for requests that name none."""
    loras: Mapping[str, str] = field(default_factory=dict)
    """Names of adapters that requests may ask for, and their files; each is loaded for every model that it fits."""
    controls: Mapping[str, str] = field(default_factory=dict)
    """Likewise ControlNets and T2I-Adapters, for requests that send what they read."""
    ranker: str | None = None
    """The CLIP model, a folder or a hub id, that ranks what `best_of` samples; None is the models' own."""
    prior: str | None = None
    """Kandinsky's prior, a folder or a hub id, for each model that is its decoder."""
    load: str = "start"
    """When models are loaded: "start", or "first" use, where idle ones make room if memory is short."""
    device: str | None = None
    dtype: str | None = None
    backend: str = "auto"
    allow_pickle: bool = False

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    """Any of these is asked of every request; none are, if there are none, on this machine's own address only."""
    insecure: bool = False
    """Whether to serve other machines without a key."""
    public_url: str | None = None
    """Where clients reach the server, such as "https://pictures.example.org", if not where they say."""
    cors_origins: tuple[str, ...] = ()
    """Web pages' origins that may use the server from a browser."""

    max_batch: int = 8
    """Images of one size that share a step. 8 measures best for the default model: 4 lost 17%."""
    max_queue: int = 256
    """Requests that may wait, in all models' queues together."""
    max_per_key: int = 64
    """Requests of one key that may be open at a time."""
    max_connections: int = 512
    max_body: float = 64.0
    """Of a request, in MiB."""
    body_timeout: float = 60.0
    """Seconds that a client has for its request: for the header, for the body, and to go on reading the answer."""
    max_pixels: int = 4_194_304
    """Width times height of a generated picture."""
    max_input_pixels: int = 33_554_432
    """Of a picture that is sent."""
    max_n: int = 10
    """Pictures of a request."""
    max_steps: int = 150
    max_prompt: int = 8192
    """Characters."""
    keep: float = 3600.0
    """Seconds that results of jobs, and pictures that were asked for as `url`, can be fetched."""
    max_kept: float = 256.0
    """MiB of those; the oldest go first."""
    heartbeat: float = 15.0
    """Seconds after which a silent stream gets a comment: proxies cut silent ones."""
    drain: float = 60.0
    """Seconds that requests under way have after SIGTERM."""
    log: str = "plain"
    """The access log's lines: "plain", "json", or "off"."""

    def __post_init__(self) -> None:
        checks.choice("load", self.load, ("start", "first"))
        checks.choice("log", self.log, ("plain", "json", "off"))
        if not self.models:
            raise InputError("models is empty: name at least one")
        for name in (*self.models, *self.loras, *self.controls):
            checks.short_text("a model's or adapter's name", name, "a name of at most 200 characters")
            if not name.strip() or not name.isprintable():
                raise InputError(f"{checks.show(name)} is no name for a model or an adapter")
        for name in ("max_batch", "max_queue", "max_per_key", "max_connections", "max_n", "max_steps", "max_prompt"):
            checks.whole(name, getattr(self, name), 1, 10**6)
        for name in ("max_pixels", "max_input_pixels"):
            checks.whole(name, getattr(self, name), 64, 2**28)
        for name in ("max_body", "max_kept"):
            checks.real(name, getattr(self, name), 0.001, 2**20)
        for name in ("body_timeout", "keep", "heartbeat"):
            checks.real(name, getattr(self, name), 0.01, _MAX_SECONDS)
        checks.real("drain", self.drain, 0, _MAX_SECONDS)
        checks.whole("port", self.port, 0, 65535)
        for key in self.api_keys:
            if len(key) < _MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError(f"an API key is not usable: expected at least {_MIN_KEY} letters of ASCII, no spaces")
        if self.public_url is not None and not self.public_url.startswith(("http://", "https://")):
            raise InputError(f"public_url is {checks.show(self.public_url)}: expected http:// or https:// and a host")
        if not (self.api_keys or self.insecure or _is_own(self.host)):
            raise InputError(
                f"host {self.host} is reached by other machines, and there is no API key: give one in a file "
                "(--api-key-file) or in FASTLDM_API_KEYS, or say --insecure"
            )


def from_options(options: Mapping[str, Any]) -> Settings:
    """The settings of the options of `fastldm serve`, by their names with _ for -: models, LoRAs and controls as texts
    `[NAME=]PATH`, or as a dictionary; numbers as texts too, as command lines have them. Keys come from
    `api_key_file` and from FASTLDM_API_KEYS, divided by commas. InputError for what is no option."""
    values = {name.replace("-", "_"): value for name, value in options.items()}
    keys = tuple(key.strip() for key in os.environ.get("FASTLDM_API_KEYS", "").split(",") if key.strip())
    file = values.pop("api_key_file", None)
    keys += () if file is None else read_keys(Path(file).expanduser())
    fields: dict[str, Any] = {"api_keys": keys}
    known = {field.name: field.default for field in dataclasses.fields(Settings)}
    for name, value in values.items():
        if name in _NAMED:
            fields[f"{name}s"] = _named(name, value)
        elif name == "cors_origin":
            fields["cors_origins"] = (value,) if isinstance(value, str) else tuple(value)
        elif name not in known or name in _LISTS:
            raise InputError(f"there is no option {name!r}: `fastldm serve --help` lists them")
        else:
            fields[name] = number(name, value) if isinstance(known[name], (bool, int, float)) else value
    return Settings(**fields)


def number(name: str, value: Any) -> Any:
    """As JSON writes it, if it is a text; InputError for what is none."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise InputError(f"{name} is {checks.show(value)}: expected a number, true or false") from None


def _named(option: str, given: Any) -> dict[str, str]:
    """`[NAME=]PATH`, one or several: without a name, a path's last part is it."""
    if isinstance(given, Mapping):
        return dict(given)
    named: dict[str, str] = {}
    for text in [given] if isinstance(given, str) else given:
        name, equals, path = str(text).partition("=")
        if not equals:
            name, path = Path(text).name.removesuffix(".safetensors"), text
        if not name or not path:
            raise InputError(f"--{option}: {text!r} names nothing: write NAME=PATH")
        if name in named:
            raise InputError(f"--{option} {name} is given twice: write NAME=PATH with different names")
        named[name] = path
    return named


def _is_own(host: str) -> bool:
    """Whether an address is this machine's own, which no other reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(path: str | Path) -> tuple[str, ...]:
    """The API keys of a file: one a line; empty lines, and those that begin with #, are none."""
    text = read_file(Path(path), max_bytes=MIB, error=InputError).decode(errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise InputError(f"{path} holds no API key: expected one a line")
    return keys
