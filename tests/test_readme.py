"""The README: its code and commands run and print what it shows, and what it names exists."""

from __future__ import annotations

import base64
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import bundles
import pytest
import tiny
from command import run
from PIL import Image

import fastldm
from fastldm.cli import main, things
from fastldm.kernels import OPS
from fastldm.loading import spec as loading
from fastldm.samplers.names import resolve_sampler
from fastldm.samplers.spacing import SCHEDULES

ROOT = Path(fastldm.__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TIME = r"\d+\.\d\d"
IMAGE = r"\S+\.png  seed \d+\n"
SCORED = r"\S+\.png  seed \d+  score 0\.\d+\n"
TIMES = rf"torch \w+ on \w+: {TIME} s \(text {TIME}, \d+ steps? {TIME}, decode {TIME}\)\n"


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def section(title: str) -> str:
    return README.partition(f"## {title}\n")[2].partition("\n## ")[0]


DEPLOYMENT, SERVE = section("Deployment"), section("Serve it")


# ------------------------------------------------------------------------------------------------------------- commands


class Shown(NamedTuple):
    """How a command of the README is run, and what comes of it."""

    output: str  # a regular expression of all of stdout
    files: tuple[str, ...] = ()
    smaller: str = ""  # options that are added to make it fast: the last of two counts


RUN = {
    'fastldm generate "a castle at dusk"': Shown(IMAGE + TIMES, ("fastldm-*.png",), "--steps 2 --size 64x96"),
    'fastldm generate "a cat, oil painting"': Shown(IMAGE + TIMES, ("fastldm-*.png",), "--steps 2"),
    'fastldm generate "a red apple" --lora': Shown(IMAGE + TIMES, ("fastldm-*.png",)),
    'fastldm generate "a castle" --size 128x128': Shown(SCORED + TIMES, ("fastldm-*.png",)),
    'fastldm generate "a fish" --control': Shown(IMAGE + TIMES, ("fastldm-*.png",)),
    "fastldm plan -m ./my-sdxl": Shown(
        r"4 x 1024x1024, guided, 30 steps, torch \w+ on a CPU, .*\n\nweights .*\nbuffers .*\n"
        r"all the time .*\n  and in text .*\nneeded .*\npeak .*\n(?:does not fit|fits): .*\n",
        smaller="--device cpu",
    ),
    "fastldm profile --html profile.html": Shown(
        r"default: 1 picture of 32x32, .*\na picture .*\nstep .*\n  conv2d .*",
        ("profile.html",),
        "--steps 1 --rounds 1 --size 32 --device cpu",
    ),
    "fastldm doctor --arch sm_90": Shown(
        r"fastldm .*\n  linear_geglu +triton +\d+ calls\n.*\n  conv2d +torch +\d+ calls: .*"
    ),
}
NOT_RUN = {
    "make demo": "installs; its command is compared below",
    "make test": "runs this test",
    "pip install": "test_package.py builds the wheel and installs it",
    "fastldm export": "below, with a small model",
    "fastldm verify": "below, with a small model",
    'fastldm generate "a red apple" -m ./bundle': "below, with a small model",
    "fastldm profile  ": "as with --html, for ten seconds",
    "fastldm bench  ": "half a minute of processes: test_compare.py has it smaller",
    "fastldm bench --suite": "minutes, at SD1.5's size: test_cli_bench.py has its task",
    "fastldm serve": "below, on another port",
    "curl -s localhost:8000": "below, with that server",
    "fastldm warm": "a minute: test_cli_warm.py has it smaller",
    "fastldm tune": "needs a GPU: test_cli_tune.py has its file",
    "make bench": "twenty minutes: test_suite.py has its parts",
    "make gpu-first": "needs a GPU: test_first.py has its rehearsal",
    "python -m benchmarks.scaling": "minutes: test_scaling.py has its parts",
    "python -m benchmarks.gpu page": "test_first.py has the page",
}
LINES = [line for block in blocks("sh") for line in block.replace("\\\n", "").splitlines()]


def shape(output: str) -> str:
    """An output without its figures, and without the dtype that this processor is fastest in."""
    return re.sub(r"\d+", "0", re.sub(r"\b(bfloat16|float32)\b", "DTYPE", output))


def test_console_block_shows_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("console")
    line, _, output = block.partition("\n")
    done = run(*shlex.split(line.removeprefix("$ fastldm ")), "--device", "cpu")
    assert (done.exit_code, done.stderr) == (0, "")
    assert shape(done.stdout) == shape(output)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"guitar-{k}.png" for k in range(2)]


def matching(line: str, prefixes: dict[str, str] | dict[str, Shown]) -> list[str]:
    return [prefix for prefix in prefixes if f"{line}  ".startswith(prefix)]


def test_every_command_line_is_run_or_has_its_reason() -> None:
    for line in LINES:
        assert len(matching(line, RUN) + matching(line, NOT_RUN)) == 1, line
    for prefix in (*RUN, *NOT_RUN):
        assert any(f"{line}  ".startswith(prefix) for line in LINES), f"{prefix!r} is no longer in the README"
    for name in re.findall(r"test_\w+\.py", " ".join(NOT_RUN.values())):
        assert (ROOT / "tests" / name).is_file(), name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models and the image that the commands name: small ones."""
    folder = tmp_path_factory.mktemp("readme")
    tiny.save_pipeline("sd1", folder / "my-sd15")
    tiny.save_pipeline("sdxl", folder / "my-sdxl")
    Image.new("RGB", (64, 64), "red").save(folder / "cat.png")
    Image.new("L", (64, 64), 255).save(folder / "heart.png")
    return folder


@pytest.mark.parametrize("line", [line for line in LINES if matching(line, RUN)])
def test_command_prints_and_writes_what_is_shown(
    line: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    before = {path.name for path in models.iterdir()}
    monkeypatch.chdir(tmp_path)
    expected = RUN[matching(line, RUN)[0]]
    done = run(*shlex.split(line, comments=True)[1:], *shlex.split(expected.smaller))
    assert done.exit_code == 0, done.output
    assert re.fullmatch(expected.output, done.stdout, re.DOTALL), done.stdout
    written = {path.name for path in tmp_path.iterdir()} - before
    assert len(written) == len(expected.files)
    assert all(any(Path(name).match(pattern) for name in written) for pattern in expected.files)


@pytest.mark.parametrize("line", LINES)
def test_command_line_is_accepted(line: str) -> None:
    """As it stands, whether or not it is run here."""
    tokens = shlex.split(line, comments=True)
    if tokens[0] == "fastldm":
        main.commands[tokens[1]].make_context(tokens[1], tokens[2:])  # raises where an option does not exist
    elif tokens[0] == "make":
        assert re.search(rf"^{tokens[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif tokens[:2] == ["python", "-m"]:
        assert (ROOT / (tokens[2].replace(".", "/") + ".py")).is_file()
    elif tokens[0] != "curl":
        assert tokens[:4] == ["pip", "install", "-c", "constraints.txt"]
        assert (ROOT / tokens[3]).is_file()
        assert tokens[4:] in (["."], [".[serve]"])


def test_commands_in_sentences_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path))
    commands = set(re.findall(r"(?<!`)`((?:fastldm|make|python -m) [^`\n]+)`(?!`)", README))
    assert {"fastldm doctor", "fastldm generate --list animals", "fastldm cache ls"} <= commands
    for command in commands:
        if command.startswith("fastldm "):
            done = run(*shlex.split(command)[1:])
            assert done.exit_code == 0, done.output
            assert done.stdout
        elif command != "python -m fastldm":
            test_command_line_is_accepted(command)


def test_demo_of_the_makefile_generates_with_the_command() -> None:
    done = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (command,) = (line for line in done.stdout.splitlines() if "fastldm generate" in line)
    tokens = shlex.split(command)
    assert tokens[1:] == ["generate", "a red apple", "--seed", "0", "-o", "demo.png", "--force"]


# --------------------------------------------------------------------------------------------------------------- Python

PYTHON = {  # a line of each block -> all that it prints, and what it writes
    "fastldm.Pipeline.default()  # or": (rf"\(0, 1\) \w+ {TIME} s\n", {"apple.png"}),
    "with fastldm.Session(": (rf"(step \d+ of 4\n)+torch {TIME} s\n", {"apple.png", "so-far.png"}),
}


@pytest.mark.parametrize("code", [code for code in blocks("python") if code not in DEPLOYMENT + SERVE])
def test_python_block_prints_and_writes_what_is_shown(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ((output, files),) = (expected for line, expected in PYTHON.items() if line in code)
    exec(compile(code, "README.md", "exec"), {})
    assert re.fullmatch(output, capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == files


def test_served_model_answers_curl_and_openai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (commands,), (code,) = blocks("sh", SERVE), blocks("python", SERVE)
    _, serve, curl = commands.replace("\\\n", "").splitlines()
    command = [sys.executable, "-m", *shlex.split(serve, comments=True), "--port", "0"]
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stderr is not None
        served = (re.search(r"serving on http://127\.0\.0\.1:(\d+)", line) for line in server.stderr)
        port = next(match[1] for match in served if match)
        if shutil.which("curl") is not None:
            done = subprocess.run(shlex.split(curl.replace("8000", port)), capture_output=True, check=True)
            answer = json.loads(done.stdout)["data"][0]
            assert answer["seed"] == 3
            assert base64.b64decode(answer["b64_json"])[8:12] == b"WEBP"
        exec(compile(code.replace("8000", port), "README.md", "exec"), {})
        server.terminate()
    assert server.returncode == 0
    with Image.open("apple.png") as image:
        assert "Steps: 8" in image.info["parameters"]


@pytest.mark.full
@pytest.mark.parametrize("model", ["smallest", "default"])
def test_deployment_leads_to_a_running_engine(
    model: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The four commands as they stand, then the Python; with a small model in place of the one that ships."""
    for package in ("openvino", "tensorrt_rtx"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path / "cache"))
    if model == "smallest":
        monkeypatch.setattr(loading, "DEFAULT_MODEL", bundles.smallest("sd1", tmp_path / "model"))
    (commands,), (code,) = blocks("sh", DEPLOYMENT), blocks("python", DEPLOYMENT)
    lines = [shlex.split(line, comments=True) for line in commands.splitlines()]
    assert [line[:2] for line in lines] == [["fastldm", name] for name in ("export", "verify", "generate", "export")]
    outputs = []
    with bundles.traced_once(bundles.shared(tmp_path_factory)):
        for line in lines:
            done = run(*line[1:])
            assert done.exit_code == 0, done.output
            outputs.append(done.stdout)
    exported, verified, generated, built = outputs
    assert re.fullmatch(r"bundle: text_encoder, .*; \d+ MiB in float32, as PyTorch computes them\n", exported)
    assert re.search(r"\nopenvino \w+: .* s to load, .* s a picture\n--backend auto takes \w+ here\n$", verified)
    assert re.fullmatch(IMAGE + TIMES.replace("torch", "(?:torch|openvino)"), generated)
    assert len(re.findall(r"^half/engines/\S+\.engine: .* s, .* MiB$", built, re.MULTILINE)) == 6
    with Image.open("apple.png") as image:
        assert re.search("Backend: (torch|openvino) (float32|bfloat16)", image.info["parameters"])
    assert len([*(tmp_path / "half" / "engines").rglob("*.engine")]) == 6
    exec(compile(code, "README.md", "exec"), {})
    assert re.fullmatch(r"openvino (float32|bfloat16)\n", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------------------ sentences


def test_files_and_links_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    names = re.findall(r"`((?:fastldm|kernels|export|benchmarks|tests)/[\w./]*)`", README)
    assert links
    assert names
    for name in links + names:
        assert (ROOT / name).exists(), name


def test_readme_stays_short() -> None:
    """Without what is measured, which benchmarks/readme.py writes."""
    written = re.sub(r"(<!-- table: .*? -->).*?<!-- end -->", r"\1", README, flags=re.DOTALL)
    assert len(written.splitlines()) <= 285


def test_samplers_are_known() -> None:
    kinds = {"karras", "exponential", "beta", "eta", *SCHEDULES}
    names = {name.strip('"') for name in re.findall(r"`([^`]+)`", section("Samplers")) if "/" not in name} - kinds
    assert len(names) > 12
    for name in names:
        resolve_sampler(name)  # raises where there is none


def test_kernels_of_the_table_are_ops() -> None:
    table = re.search(r"(?:^\|.*\n)+", section("Kernels"), re.MULTILINE)
    assert table is not None
    files = {Path(inspect.getfile(op.reference)).stem for op in OPS.values()}
    names = set(re.findall(r"^\| (.*?) \|", table[0], re.MULTILINE)) - {"|"}
    assert {name for cell in names for name in re.findall(r"`(\w+)`", cell)} <= files


def test_call_arguments_and_errors_exist() -> None:
    text = section("Ten lines of Python")
    names = re.search(r"The call takes diffusers' names: (.*?)\.\.\.", text, re.DOTALL)
    assert names is not None
    fields = {*inspect.signature(fastldm.Request).parameters, *inspect.signature(fastldm.Pipeline.__call__).parameters}
    assert set(re.findall(r"`(\w+)`", names[1])) <= fields
    for name in re.findall(r"`fastldm\.(\w+)", README):
        assert hasattr(fastldm, name) or (ROOT / "fastldm" / f"{name}.py").exists(), name
    for name in (
        "InputError",
        "CheckpointError",
        "OutOfMemory",
        "NonFinite",
        "FastLDMError",
        "QueueFull",
        "WorkerLost",
    ):
        assert name in README
        assert issubclass(getattr(fastldm, name), fastldm.FastLDMError)


def test_counts_are_those_of_the_code() -> None:
    count = re.search(r"of (\d+) things in styles", README)
    assert count is not None
    assert int(count[1]) == len(things.things())
    configurations = re.search(r"([\d,]+) of its configurations by a command", README)
    assert configurations is not None
    page = (ROOT / "benchmarks" / "results" / "peer_schedulers.md").read_text("utf-8")
    assert f"{configurations[1]} configurations and runs of diffusers" in page
