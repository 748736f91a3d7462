"""fastldm/server/settings.py: what a server may be started with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fastldm import InputError
from fastldm.cli.serve import serve
from fastldm.server.settings import Settings, from_options, read_keys

KEY = "a-key-of-some-length"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"host": "0.0.0.0"}, "host 0.0.0.0 is reached by other machines, and there is no API key"),
        ({"host": "::"}, "host :: is reached"),
        ({"host": "192.168.0.7"}, "is reached by other machines"),
        ({"host": "example.org"}, "is reached by other machines"),
        ({"models": {}}, "models is empty"),
        ({"models": {"a\nb": "default"}}, "is no name"),
        ({"loras": {"x" * 300: "sketch"}}, "a model's or adapter's name"),
        ({"load": "never"}, "load is 'never': expected one of start, first"),
        ({"log": "xml"}, "log is 'xml'"),
        ({"port": 70000}, "port is 70000"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_n": 1.5}, "max_n is 1.5"),
        ({"max_body": float("nan")}, "max_body is nan"),
        ({"drain": -1}, "drain is -1"),
        ({"body_timeout": 0}, "body_timeout is 0"),
        ({"api_keys": ("short",)}, "an API key is not usable"),
        ({"api_keys": ("with a space",)}, "an API key is not usable"),
        ({"public_url": "ftp://x"}, "public_url is 'ftp://x'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unusable_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        Settings(**fields)
    assert message in str(error.value)
    assert "short" not in str(error.value), "keys are not shown"
    assert "with a space" not in str(error.value)


def test_other_machines_need_a_key() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        Settings(host=host)
    Settings(host="0.0.0.0", api_keys=(KEY,))
    Settings(host="0.0.0.0", insecure=True)


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of alice\n{KEY}\n\n  {KEY}-2  \n")
    assert read_keys(file) == (KEY, f"{KEY}-2")
    file.write_text("# none\n")
    with pytest.raises(InputError, match="holds no API key"):
        read_keys(file)
    with pytest.raises(InputError, match="none cannot be read"):
        read_keys(tmp_path / "none")


def test_command_has_an_option_for_each() -> None:
    renamed = {"models": "model", "loras": "lora", "controls": "control"}
    renamed |= {"api_keys": "api_key_file", "cors_origins": "cors_origin"}
    options = {option.name: option for option in serve.params}
    for field in dataclasses.fields(Settings):
        option = options.pop(renamed.get(field.name, field.name))
        if field.default is not None and field.name not in renamed:
            assert option.to_info_dict()["default"] == field.default, field.name
    assert {*options} == {"config", "debug"}


def test_options_are_settings_from_texts_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEY)
    monkeypatch.setenv("FASTLDM_API_KEYS", f"{KEY}-2")
    texts = {"model": "a/small.safetensors", "lora": ["sketch", "x=./y"], "max-batch": "4", "drain": "2.5"}
    settings = from_options({**texts, "insecure": "true", "log": "json", "api_key_file": tmp_path / "keys"})
    assert (settings.models, settings.loras) == ({"small": "a/small.safetensors"}, {"sketch": "sketch", "x": "./y"})
    assert (settings.max_batch, settings.drain, settings.insecure, settings.log) == (4, 2.5, True, "json")
    assert settings.api_keys == (f"{KEY}-2", KEY)
    assert from_options({"model": {"a": "b"}, "cors_origin": "https://x"}).models == {"a": "b"}
    for options in ({"prot": 1}, {"models": {}}, {"api_keys": [KEY]}, {"max_batch": "many"}, {"model": "=x"}):
        with pytest.raises(InputError, match=next(iter(options))):
            from_options(options)
