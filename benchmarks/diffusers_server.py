"""The server that people write: FastAPI around a diffusers pipeline, one request at a time, with the default model. It
is what benchmarks/serving.py compares with, and imports nothing of fastldm.

    DTYPE=bfloat16 uvicorn benchmarks.diffusers_server:app
"""

import base64
import io
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from fastapi import FastAPI
from pydantic import BaseModel

MODEL = Path(__file__).resolve().parent.parent / "fastldm" / "assets" / "default"
pipe = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=getattr(torch, os.environ.get("DTYPE", "float32")))
pipe.set_progress_bar_config(disable=True)
lock = threading.Lock()
app = FastAPI()


class Body(BaseModel):
    prompt: str
    size: str = "64x64"
    seed: int = 0
    num_inference_steps: int = 8
    guidance_scale: float = 2.0


@app.post("/v1/images/generations")
def generate(body: Body) -> dict[str, Any]:
    width, height = map(int, body.size.split("x"))
    options = body.model_dump(include={"prompt", "num_inference_steps", "guidance_scale"})
    with lock:
        generator = torch.Generator().manual_seed(body.seed)
        image = pipe(width=width, height=height, generator=generator, **options).images[0]
    file = io.BytesIO()
    image.save(file, "png")
    return {"created": int(time.time()), "data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]}
