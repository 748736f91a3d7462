"""What picture.cpp reads of a request, as text: `python picture_request.py MODEL BUNDLE "a red apple" > request.txt`.

A line for each input that depends on prompt, sampler and steps: its name, its shape and its numbers. And three more:
`size`, of the latents; `scale`, of the noise at the start; `draws`, whether a row adds noise.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastldm import Pipeline, Request
from fastldm.export.bundle import Bundle
from fastldm.runtime.whole_picture import picture_inputs
from fastldm.samplers.table import make_table

model, folder, prompt = sys.argv[1:4]
options = dict(word.split("=") for word in sys.argv[4:])  # sampler=ddim num_inference_steps=8
pipe = Pipeline.from_pretrained(model, device="cpu", dtype="float32", backend="torch")
steps, sampler = int(options.get("num_inference_steps", 8)), options.get("sampler", "ddim")
request = Request(prompt, num_inference_steps=steps, sampler=sampler)
inputs = picture_inputs(pipe.stages, request, Bundle.open(Path(folder)).graphs["whole_picture"])
table = make_table(pipe.schedule, steps, sampler=sampler)
for name in ("input_ids", "negative_ids", "timesteps", "table", "guidance"):
    tensor = inputs[name]
    print(name, tensor.ndim, *tensor.shape, *(f"{value:.9g}" for value in tensor.flatten().tolist()))
print("size 1 3", *inputs["latents"].shape[1:])
print("scale 1 1", table.init_noise_sigma)
print("draws 1", len(table), *map(int, table.draws))
