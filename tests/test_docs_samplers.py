"""docs/samplers.md: it is what the code has, and each name in it is understood."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from fastldm.errors import InputError
from fastldm.samplers.names import REFUSED, REFUSED_SCHEDULES, SAMPLERS, resolve_sampler

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_samplers", DOCS / "samplers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_code_has(writer: ModuleType) -> None:
    assert (DOCS / "samplers.md").read_text("utf-8") == writer.page(), "run `python docs/samplers.py`"


def test_every_name_is_in_its_row(writer: ModuleType) -> None:
    """Of ComfyUI and AUTOMATIC1111: one sampler each, with the schedules that these have beside it."""
    for name in (*writer.COMFYUI, *writer.AUTOMATIC1111):
        sampler = resolve_sampler(name)
        assert sampler.name in SAMPLERS
        assert f"| `{sampler.name}` |" in writer.page()
    for kind, own in writer.COMFYUI_SCHEDULES.items():
        assert resolve_sampler(f"euler {kind}").name == f"euler {kind}"
        if not own.endswith("(node)"):
            assert resolve_sampler(f"euler {own}").name == f"euler {kind}"


def test_what_is_refused_says_why() -> None:
    for name, reason in {**REFUSED, **{f"euler {kind}": reason for kind, reason in REFUSED_SCHEDULES.items()}}.items():
        with pytest.raises(InputError) as refused:
            resolve_sampler(name)
        assert str(refused.value).endswith(f"is not supported: {reason}.")
