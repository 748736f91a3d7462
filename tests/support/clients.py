"""An application of the default model, and clients of it: in this process, by way of ASGI."""

from __future__ import annotations

import base64
from collections.abc import Iterator
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
def client(pipe: Pipeline | None = None, **settings: Any) -> Iterator[TestClient]:
    """Of a server with these settings. pipe: all its models, if they are loaded already."""
    app = application(pipe, **settings)
    with TestClient(app, raise_server_exceptions=False) as one:
        yield one


def application(pipe: Pipeline | None = None, **settings: Any) -> FastAPI:
    checked = Settings(**{"log": "off", **settings})
    return create_app(checked, None if pipe is None else dict.fromkeys(checked.models, pipe))


def picture(content: str | bytes) -> Image.Image:
    """Of a file's bytes, or of base64."""
    image = Image.open(BytesIO(base64.b64decode(content) if isinstance(content, str) else content))
    image.load()
    return image


def file(image: Image.Image, kind: str = "PNG") -> bytes:
    content = BytesIO()
    image.save(content, kind)
    return content.getvalue()
