"""Every benchmark can be started and says what it measures."""

from __future__ import annotations

import runpy
import sys

import pytest
from conftest import ROOT

FILES = {path.stem: path.read_text("utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
COMMANDS = sorted(name for name, text in FILES.items() if '\nif __name__ == "__main__"' in text)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if "\nimport ray\n" in FILES[name]:
        pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert not stopped.value.code
    assert len(capsys.readouterr().out.splitlines()) > 4
