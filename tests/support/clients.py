"""An application of the default model, and clients of it: in this process, by way of ASGI."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import Any

from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from fastldm import Pipeline
from fastldm.server.app import create_app
from fastldm.server.settings import Settings


@contextmanager
def client(pipe: Pipeline | Mapping[str, Pipeline] | None = None, **settings: Any) -> Iterator[TestClient]:
    """Of a server with these settings. pipe: all its models, or each by its name, if they are loaded already."""
    app = application(pipe, **settings)
    with TestClient(app, raise_server_exceptions=False) as one:
        yield one


def application(pipe: Pipeline | Mapping[str, Pipeline] | None = None, **settings: Any) -> FastAPI:
    if isinstance(pipe, Mapping):
        settings = {"models": dict.fromkeys(pipe, "default"), **settings}
    checked = Settings(**{"log": "off", **settings})
    return create_app(checked, dict.fromkeys(checked.models, pipe) if isinstance(pipe, Pipeline) else pipe)


def picture(content: str | bytes) -> Image.Image:
    """Of a file's bytes, or of base64."""
    image = Image.open(BytesIO(base64.b64decode(content) if isinstance(content, str) else content))
    image.load()
    return image


def file(image: Image.Image, kind: str = "PNG") -> bytes:
    content = BytesIO()
    image.save(content, kind)
    return content.getvalue()
