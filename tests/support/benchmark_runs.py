"""Runs of a comparison, as `fastldm bench` writes them."""

from __future__ import annotations

from typing import Any


def run(ratio: float, date: str = "2026-11-22 10:00") -> dict[str, Any]:
    def row(title: str, ratio: float, **fields: Any) -> dict[str, Any]:
        base = {"contender": {"title": title}, "failure": "", "wrong": False, "median": 1 / ratio, "ratio": ratio}
        return {**base, "spread": [0.9 * ratio, 1.1 * ratio], **fields}

    rows = [row("diffusers float32", 1.0), row("ours", ratio), row("broken", 99.0, wrong=True)]
    task = {"what": "step", "width": 256, "height": 256, "steps": 1, "model": "default", "threads": 2}
    versions = {"diffusers": "0.42.1", "openvino": None}
    header = {"machine": {"name": "A <CPU>", "torch": "2.13.0"}, "versions": versions, "command": "fastldm bench"}
    return {"date": date, **header, "task": task, "rows": rows}
