"""fastldm/cli/serve.py: options, environment and file, by the same names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import ROOT

from fastldm.cli.main import main
from fastldm.server.settings import Settings


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that servers would have been started with."""
    settings: list[Settings] = []
    monkeypatch.setattr("fastldm.server.serve.serve", settings.append)
    monkeypatch.setattr("fastldm.cli.serve._log", lambda: None)
    return settings


def serve(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(main, ["serve", *arguments], env=environment)


def test_options_become_settings(started: list[Settings]) -> None:
    done = serve(
        "-m", "sd15=./my-sd15", "-m", "./other.safetensors", "--lora", "sketch", "--port", "0", "--log", "json"
    )
    assert done.exit_code == 0, done.output
    assert started[0].models == {"sd15": "./my-sd15", "other": "./other.safetensors"}
    assert started[0].loras == {"sketch": "sketch"}
    assert (started[0].port, started[0].log) == (0, "json")
    assert serve().exit_code == 0
    assert started[1] == Settings()


def test_command_counts_more_than_environment_and_file(started: list[Settings], tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('port = 1\nmax-batch = 2\ndrain = 3\nmodel = {a = "default", b = "./b"}\nlora = ["sketch"]\n')
    environment = {"FASTLDM_SERVE_PORT": "2", "FASTLDM_SERVE_MAX_BATCH": "5", "FASTLDM_SERVE_KEEP": "9"}
    done = serve("--config", str(file), "--port", "3", **environment)
    assert done.exit_code == 0, done.output
    settings = started[0]
    assert (settings.port, settings.max_batch, settings.drain, settings.keep) == (3, 5, 3.0, 9.0)
    assert settings.models == {"a": "default", "b": "./b"}
    assert settings.loras == {"sketch": "sketch"}


def test_keys_come_from_file_and_environment(started: list[Settings], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("key-of-the-file\n")
    done = serve("--api-key-file", str(tmp_path / "keys"), FASTLDM_API_KEYS="key-of-the-environment, another-key")
    assert done.exit_code == 0, done.output
    assert started[0].api_keys == ("key-of-the-environment", "another-key", "key-of-the-file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot = 80", "there is no option 'prot'"),
        ("port = [80]", "port is [80]: expected one value"),
        ('model = "default"', "model is 'default': expected a list"),
        ('port = "many"', "'many' is not a valid integer"),
        ("port = = 1", "server.toml: "),
    ],
)
def test_bad_files_are_refused(started: list[Settings], tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "server.toml").write_text(content)
    done = serve("--config", str(tmp_path / "server.toml"))
    assert done.exit_code == 2
    assert message in done.output
    assert not started


def test_mistakes_are_one_line(started: list[Settings], tmp_path: Path) -> None:
    for arguments, message in (
        (["--host", "0.0.0.0"], "say --insecure"),
        (["--config", str(tmp_path / "none.toml")], f"fastldm: {tmp_path / 'none.toml'} cannot be read"),
        (["-m", "a=x", "-m", "a=y"], "--model a is given twice"),
        (["-m", "=x"], "'=x' names nothing"),
        (["--api-key-file", str(tmp_path)], str(tmp_path)),
    ):
        done = serve(*arguments)
        assert done.exit_code == 2, done.output
        assert message in done.output
    assert not started


def test_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastldm", "serve", "--port", "0", "-m", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "does not exist here" in done.stderr
    assert "Traceback" not in done.stderr
