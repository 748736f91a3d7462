"""The `fastldm` command: its commands, each a file of its own.

Only click is imported for it: `--help` and `--version` answer at once, and each command imports what it runs.
"""

from __future__ import annotations

import click

from fastldm.cli.batch import batch
from fastldm.cli.bench import bench
from fastldm.cli.cache import cache
from fastldm.cli.doctor import doctor
from fastldm.cli.export import export, verify
from fastldm.cli.generate import generate
from fastldm.cli.plan import plan
from fastldm.cli.prepare import prepare
from fastldm.cli.profile import profile
from fastldm.cli.report import Commands
from fastldm.cli.serve import serve
from fastldm.cli.tune import tune
from fastldm.cli.warm import warm
from fastldm.version import __version__


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fastldm")
def main() -> None:
    """Run trained latent diffusion models as fast as the hardware allows.

    \b
    fastldm generate "a red apple" -o apple.png        with the small model that ships inside
    fastldm generate "a castle" -m ./my-sd15 --steps 20 --sampler "dpm++ 2m karras"
    fastldm batch prompts.txt -o out/                  a file of prompts to a folder, which may be stopped
    fastldm doctor                                     what this machine has, and what it lacks
    fastldm prepare -m ./my-sd15                       export it, so that it runs on what is fastest on this CPU
    fastldm warm -m ./my-sd15 --arch sm_90             compile its kernels before the first request
    fastldm plan -m ./my-sd15 --size 1024x1024 --n 4   what memory a request takes, and whether it fits
    fastldm profile -m ./my-sd15                       where the time goes, and what would help most
    fastldm bench -m ./my-sd15                         beside diffusers, in turns
    fastldm serve --lora sketch                        OpenAI's and AUTOMATIC1111's API, on port 8000
    fastldm export -m ./my-sd15 ./bundle --split       for ONNX Runtime, OpenVINO and TensorRT: see its --help
    """


for command in (batch, bench, cache, doctor, export, generate, plan, prepare, profile, serve, tune, verify, warm):
    main.add_command(command)
