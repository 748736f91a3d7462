"""A folder for browsers: what is in it, and that Node, Chromium and C++ make the images that fastldm makes.

Over 500 lines, for what runs it is many: the folder is made once for all.
"""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import os
import shutil
import subprocess
import tarfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import bundles
import numpy as np
import pytest
import torch
from command import run
from conftest import ROOT
from PIL import Image
from tokenizer_folders import FOLDERS, POOLS, hostile_texts, write_folder, write_holes

from fastldm import Pipeline
from fastldm.conditioning.tokenizer import Tokenizer, clip_vocabulary
from fastldm.errors import BundleError, InputError
from fastldm.export.bundle import Bundle
from fastldm.loading import spec as loading
from fastldm.samplers.table import COLUMNS, make_table
from fastldm.system import LOOK

web: Any = pytest.importorskip("fastldm.export.web", reason="needs fastldm[onnx]", exc_type=ImportError)

NODE = shutil.which("node")
BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
FULL_BROWSER = os.environ.get("FASTLDM_CHROMIUM") or shutil.which("chromium")
ASSETS, EXAMPLES = ROOT / "fastldm" / "assets" / "web", ROOT / "docs" / "examples"
needs_node = pytest.mark.skipif(NODE is None, reason="needs Node, such as Debian's nodejs")
ENGINE = {name: name.encode() * 9 for name in (*web.WASM, *web.WEBGPU)}
APPLE: dict[str, Any] = {"prompt": "a red apple", "seed": 7}


def node(*arguments: str | Path, folder: Path = ROOT) -> str:
    done = subprocess.run([str(NODE), *map(str, arguments)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- noise and words


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    names = ("sd2", "extra", "small")
    made = {
        name: Tokenizer(write_folder(root / name, *clip_vocabulary(FOLDERS[name][0]), FOLDERS[name][1]))
        for name in names
    }
    made["of several vectors"] = made["small"].with_tokens({"<x>": 3, "<Y>": 1})
    return {**made, "holes": Tokenizer(write_holes(root / "holes"))}


DRAWS = [(0, [4096, 4, 4, 64]), (7, [15, 17, 1, 16, 3, 33]), (2**32 + 5, [100, 5]), (2**53 - 1, [1, 1, 31])]


def texts() -> list[str]:
    """Without characters that Python's Unicode does not know: a browser's may be newer or older."""
    known = set("".join("".join(pool) for pool in POOLS))
    made = [*hostile_texts(250, seed=5), "<x> a <y><x> <x>_1", "<x> <x>_1 <x>_2 dog", "ΟΔΟΣ", "\x85a\ufeffb"]
    return ["".join(c for c in text[:2000] if c in known or unicodedata.category(c) != "Cn") for text in made]


@pytest.fixture(scope="module")
def answers(tokenizers: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What fastldm.js says."""
    questions = tmp_path_factory.mktemp("node") / "questions.json"
    asked = {
        "draws": [{"seed": seed, "counts": counts} for seed, counts in DRAWS],
        "tokenizers": [{**tokenizer.to_dict(), "length": 77} for tokenizer in tokenizers.values()],
        "texts": texts(),
    }
    questions.write_text(json.dumps(asked))
    return json.loads(node(ROOT / "tests" / "support" / "web.mjs", ASSETS / "fastldm.js", questions))


@needs_node
def test_noise_of_a_seed_is_torchs(answers: Any) -> None:
    for (seed, counts), numbers in zip(DRAWS, answers["numbers"], strict=True):
        generator = torch.Generator().manual_seed(seed)
        for count, own in zip(counts, numbers, strict=True):
            expected = torch.randn(count, generator=generator)
            torch.testing.assert_close(torch.tensor(own), expected, rtol=0, atol=1e-6)


@needs_node
@pytest.mark.parametrize("name", ["sd2", "extra", "small", "of several vectors", "holes"])
def test_token_ids_are_pythons(name: str, answers: Any, tokenizers: dict[str, Tokenizer]) -> None:
    found = answers["ids"][list(tokenizers).index(name)]
    wrong = [text for text, ids in zip(texts(), found, strict=True) if ids != tokenizers[name].ids(text)]
    assert not wrong, f"{len(wrong)}: {wrong[:3]!a}"


# --- the folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """The smallest model and its bundle."""
    source, folder = bundles.exported("sd1", True, bundles.shared(tmp_path_factory), whole_picture=True)
    return source, Bundle.open(folder)


@pytest.mark.full
def test_folder_has_what_its_description_says(bundle: tuple[Path, Bundle], tmp_path: Path) -> None:
    model = bundle[1].model
    info = web.write(bundle[1], tmp_path, ENGINE, "int8")
    assert json.loads((tmp_path / "model.json").read_text()) == info
    assert {name: (tmp_path / name).stat().st_size for name in info["files"]} == info["files"]
    assert web.transfer_size(info) < sum(info["files"].values())
    for file in (*ASSETS.iterdir(), *LOOK.iterdir()):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert gzip.decompress((tmp_path / "ort" / f"{web.WASM[2]}.gz").read_bytes()) == ENGINE[web.WASM[2]]
    assert json.loads((tmp_path / "package.json").read_text())["type"] == "module"
    assert (info["width"]["usual"], info["height"]["usual"]) == model.default_size
    assert info["sampler"] == make_table(model.schedule, 4).sampler
    tables = json.loads(gzip.decompress((tmp_path / "tables.json.gz").read_bytes()))
    for sampler, steps in (("euler a", 7), ("heun", 30), (info["sampler"], 4)):
        expected, own = make_table(model.schedule, steps, sampler=sampler), tables[sampler][str(steps)]
        rows = np.array(own["rows"], np.float32).reshape(-1, len(info["columns"]))
        np.testing.assert_array_equal(rows, expected.rows[:, : len(info["columns"])])
        np.testing.assert_array_equal(np.array(own["timesteps"], np.float32), expected.timesteps)
        assert (tuple(map(bool, own["draws"])), own["scale"]) == (expected.draws, expected.init_noise_sigma)
    assert info["columns"] == list(COLUMNS[: len(info["columns"])])


@pytest.mark.full
def test_weights_that_spoil_images_are_refused(
    bundle: tuple[Path, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(web.LEAST, "int8", 140.0)
    with pytest.raises(BundleError, match=r"int8 weights make other images of this model: .* expected 140"):
        web.write(bundle[1], tmp_path, ENGINE, "int8")
    assert not [*tmp_path.iterdir()]


def test_other_kinds_of_models_are_refused() -> None:
    model = loading.describe("default")
    for other, message in (
        (replace(model, text=model.text * 2), "has two text encoders"),
        (replace(model, unet=replace(model.unet, in_channels=9)), "reads a picture"),
        (replace(model, vision=object()), "reads a picture"),  # type: ignore[arg-type]
        (replace(model, unet=replace(model.unet, addition_embed_type="text_time")), "reads sizes beside a prompt"),
    ):
        with pytest.raises(InputError, match=message):
            web.check(other)


def test_models_too_large_for_a_tab_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    web.check(loading.describe("default"))
    monkeypatch.setattr(web, "LARGEST", 2**26 - 2**22)
    with pytest.raises(InputError, match=r"0\.1 GiB of weights in float32"):
        web.check(loading.describe("default"))


# --- onnxruntime-web


def package(folder: Path, names: tuple[str, ...]) -> Path:
    dist = folder / "package" / "dist"
    dist.mkdir(parents=True)
    for name in names:
        (dist / name).write_bytes(ENGINE[name])
    return folder / "package"


def packed(folder: Path) -> Path:
    with tarfile.open(folder.with_suffix(".tgz"), "w:gz") as archive:
        archive.add(folder, "package")
    return folder.with_suffix(".tgz")


def test_engine_is_read_from_folders_and_packages(tmp_path: Path) -> None:
    folder = package(tmp_path, tuple(ENGINE))
    for path in (folder, folder / "dist", packed(folder)):
        assert web.onnxruntime_web(path) == ENGINE


@pytest.mark.parametrize("kind", ["folder", "package", "other"])
def test_incomplete_engine_says_how_to_get_it(kind: str, tmp_path: Path) -> None:
    folder = package(tmp_path, web.WASM)
    (tmp_path / "other").write_text("neither")
    path = {"folder": folder, "package": packed(folder), "other": tmp_path / "other"}[kind]
    with pytest.raises(
        InputError, match=r"is not onnxruntime-web .*`npm pack onnxruntime-web@.*--onnxruntime-web FILE"
    ):
        web.onnxruntime_web(path)


NPM = """#!/bin/sh
for last; do :; done
[ "$1" = pack ] || exit 2
{}
"""


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "there is no npm to get it with"),
        ("echo 'npm error code ENOTFOUND' >&2; exit 1", "npm could not get onnxruntime-web .*ENOTFOUND"),
        ('echo nothing > "$last/onnxruntime-web.tgz"', "what npm gave .* is not what it was"),
    ],
    ids=["no npm", "no network", "another file"],
)
def test_npm_without_the_package_is_refused(
    script: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        (tmp_path / "npm").write_text(NPM.format(script))
        (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if script is not None else str(tmp_path))
    with pytest.raises(InputError, match=rf"{message}.*--onnxruntime-web FILE"):
        web.onnxruntime_web(None)


# --- the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "int8"], "are of a folder for browsers: give --to web too"),
        (["--to", "web", "--arch", "sm_89"], "give --to tensorrt too"),
        (["--to", "web", "--opset", "23", "--dtype", "float16"], "--to web does not go with --dtype, --opset"),
        (["--to", "web", "--onnxruntime-web", str(ROOT / "tests")], "is not onnxruntime-web"),
    ],
)
def test_command_refuses_what_does_not_go_together(options: list[str], message: str, tmp_path: Path) -> None:
    done = run("export", str(tmp_path / "out"), *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not [*tmp_path.iterdir()]


def test_folder_with_files_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    done = run("export", "--to", "web", str(tmp_path))
    assert (done.exit_code, done.stderr) == (2, f"fastldm: {tmp_path} exists: give the name of a new folder\n")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# --- images


@pytest.fixture(scope="module")
def engine() -> Path | None:
    """onnxruntime-web, from FASTLDM_ONNXRUNTIME_WEB or npm."""
    if path := os.environ.get("FASTLDM_ONNXRUNTIME_WEB"):
        return Path(path)
    if shutil.which("npm") is None:
        pytest.skip("needs onnxruntime-web: npm, or the package's path in FASTLDM_ONNXRUNTIME_WEB")
    return None


@pytest.fixture(scope="module")
def site(engine: Path | None, bundle: tuple[Path, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model for browsers, in float32."""
    out = tmp_path_factory.mktemp("web") / "site"
    given = ["--onnxruntime-web", str(engine)] if engine else []
    done = run("export", "-m", str(bundle[1].folder), "--to", "web", str(out), "--weights", "float32", *given)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def pipe(bundle: tuple[Path, Bundle]) -> Pipeline:
    return Pipeline.from_pretrained(bundle[0], backend="torch", device="cpu", dtype="float32")


REQUESTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # for fastldm.js, and for Pipeline
    "its own": ({}, {}),
    "negative": ({"negativePrompt": "blurry", "guidanceScale": 3}, {"negative_prompt": "blurry", "guidance_scale": 3}),
    "unguided": ({"guidanceScale": 1, "sampler": "Euler A"}, {"guidance_scale": 1, "sampler": "euler a"}),
    "two rows a step": ({"sampler": "heun", "steps": 3}, {"sampler": "heun", "num_inference_steps": 3}),
    "noise at steps": ({"sampler": "dpm++ 2m sde", "steps": 3}, {"sampler": "dpm++ 2m sde", "num_inference_steps": 3}),
    "odd size": ({"width": 24, "height": 16, "seed": 2**40 + 3}, {"width": 24, "height": 16, "seed": 2**40 + 3}),
}


@pytest.mark.full
@needs_node
def test_images_in_node_are_the_pipelines(site: Path, pipe: Pipeline, tmp_path: Path) -> None:
    asked = [{"prompt": "A cat's hat", "options": {"steps": 4, "seed": 5, **own}} for own, _ in REQUESTS.values()]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    answers = json.loads(node(ROOT / "tests" / "support" / "web_images.mjs", site, tmp_path / "asked.json"))
    for name, (own, (_, options)) in zip(REQUESTS, zip(answers, REQUESTS.values(), strict=True), strict=True):
        given: dict[str, Any] = {"num_inference_steps": 4, "seed": 5, **options}
        expected = pipe("A cat's hat", output_type="np", **given).images[0]
        close(own["pixels"], expected, name)
        assert own["steps"] == [*range(1, given["num_inference_steps"] + 1)], name
        assert (own["rows"], own["previews"]) == ([*range(1, own["total"] + 1)], own["total"]), name


def close(pixels: list[float], expected: np.ndarray, name: str = "") -> None:
    """The image of the pipeline, (H, W, 3) in 0..1, in what fastldm.js calls pixels."""
    own = np.array(pixels, np.float32).reshape(3, *expected.shape[:2]).transpose(1, 2, 0)
    assert np.abs((own / 2 + 0.5).clip(0, 1) - expected).max() < 1e-4, name


@pytest.mark.full
@needs_node
def test_wrong_calls_say_what_was_expected(site: Path, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = [
        {"prompt": "a", "options": {"sed": 1}},
        {"prompt": 3, "options": {}},
        {"prompt": "a", "options": {"seed": -1}},
        {"prompt": "a", "options": {"sampler": "none"}},
        {"prompt": "a", "options": {"steps": 31}},
        {"prompt": "a", "options": {"width": 17}},
        {"prompt": "a cat " * 99, "options": {}},
    ]
    messages = ["unknown option sed", "prompt is 3", "seed is -1", "unknown sampler none: there are", "steps is 31"]
    messages += ["width is 17: expected a multiple of", "prompt has "]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    answers = json.loads(node(ROOT / "tests" / "support" / "web_images.mjs", site, tmp_path / "asked.json"))
    for answer, message in zip(answers, messages, strict=True):
        assert answer["error"].startswith(message), answer


@pytest.mark.full
@needs_node
@pytest.mark.parametrize("runtime", ["onnxruntime-web", "onnxruntime-node"])
def test_node_example_makes_the_pipelines_image(runtime: str, site: Path, pipe: Pipeline, tmp_path: Path) -> None:
    shutil.copyfile(EXAMPLES / "picture.mjs", tmp_path / "picture.mjs")
    extra = []
    if runtime == "onnxruntime-node":
        extra = [runtime]
        modules = os.environ.get("FASTLDM_NODE_MODULES")
        if modules:
            (tmp_path / "node_modules").symlink_to(modules)
        else:
            install = ["npm", "install", "--no-audit", "--no-fund", f"{runtime}@{web.VERSION}"]
            environment = {**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip"}
            done = subprocess.run(install, cwd=tmp_path, env=environment, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"npm could not get {runtime}: {done.stderr[-200:]}")
    node("picture.mjs", site, "a red apple", "7", "apple.png", *extra, folder=tmp_path)
    same(tmp_path / "apple.png", pipe("a red apple", seed=7, num_inference_steps=30).images[0])


def same(path: Path, expected: Image.Image) -> None:
    """The same image in 8 bits, but for how halves are rounded."""
    own, other = (np.asarray(image.convert("RGB"), int) for image in (Image.open(path), expected))
    assert own.shape == other.shape
    assert np.abs(own - other).max() <= 1
    assert (own != other).mean() < 0.01


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("sampler", ["ddim", pytest.param("euler a", marks=pytest.mark.full)])
def test_cpp_example_makes_the_pipelines_image(
    sampler: str, bundle: tuple[Path, Bundle], pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    wheel = Path(openvino.__file__).parent
    libraries = [str(path) for path in (wheel / "libs").glob("libopenvino.so.*")]
    flags = ["-O1", "-std=c++17", f"-I{wheel / 'include'}", f"-Wl,-rpath,{wheel / 'libs'}", "-o", "picture"]
    subprocess.run(["g++", str(EXAMPLES / "picture.cpp"), *libraries, *flags], cwd=tmp_path, check=True)
    asked = [str(bundle[0]), str(bundle[1].folder), "a red apple", f"sampler={sampler}", "num_inference_steps=4"]
    script = [os.sys.executable, str(EXAMPLES / "picture_request.py"), *asked]  # type: ignore[attr-defined]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    request = subprocess.run(script, check=True, capture_output=True, text=True, env=environment).stdout
    (tmp_path / "request.txt").write_text(request)
    command = [str(tmp_path / "picture"), str(bundle[1].folder), "request.txt", "7", "apple.ppm"]
    subprocess.run(command, cwd=tmp_path, check=True)
    same(tmp_path / "apple.ppm", pipe("a red apple", seed=7, num_inference_steps=4, sampler=sampler).images[0])


def test_cpp_example_is_short() -> None:
    assert len((EXAMPLES / "picture.cpp").read_text().splitlines()) < 80


# --- browsers


class Quiet(http.server.SimpleHTTPRequestHandler):
    isolated = False

    def end_headers(self) -> None:
        if self.isolated:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def served(folder: Path, isolated: bool = False) -> Iterator[str]:
    handler = functools.partial(type("Handler", (Quiet,), {"isolated": isolated}), directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@contextmanager
def tab(url: str, path: str | None = BROWSER, *arguments: str, at: str = "index.html", **options: Any) -> Iterator[Any]:
    """A file of the folder as a page, which asks nothing of other hosts, and in the end has no error unhandled."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if path is None:
        pytest.skip("needs a headless Chromium, such as Debian's chromium-headless-shell")
    problems: list[str] = []
    with playwright.sync_playwright() as found:
        browser = found.chromium.launch(executable_path=path, args=["--no-sandbox", *arguments])
        page = browser.new_page(**options)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if is_problem(message) else None)
        page.on(
            "request",
            lambda asked: None if asked.url.startswith((url, "data:", "blob:")) else problems.append(asked.url),
        )
        page.goto(url + at)
        yield page
        browser.close()
    assert not problems, problems


def is_problem(message: Any) -> bool:
    return message.type == "error" and not message.location["url"].endswith("/favicon.ico")  # of pages without a link


READY = "#generate:not([disabled])"


def made(page: Any, **fields: Any) -> np.ndarray:
    """Fill in the form, press the button, and read the canvas: (H, W, 3)."""
    page.wait_for_selector(READY, timeout=60_000)
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.click("#generate")
    page.wait_for_selector(READY, timeout=60_000)
    assert page.is_hidden("#error"), page.text_content("#error")
    size, data = page.evaluate(
        """() => {
            const canvas = document.querySelector("#picture");
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return [[canvas.height, canvas.width], Array.from(data)];
        }"""
    )
    return np.array(data, np.uint8).reshape(*size, 4)[..., :3]


@pytest.mark.full
@pytest.mark.parametrize("weights", ["float16", "int8"])
def test_default_model_in_chromium_makes_pythons_apple(
    weights: str, engine: Path | None, default_bundle: Path, tmp_path: Path
) -> None:
    given = ["--onnxruntime-web", str(engine)] if engine else []
    out = tmp_path / "web"
    done = run("export", "-m", str(default_bundle), "--to", "web", str(out), "--weights", weights, *given)
    assert done.exit_code == 0, done.output
    info = json.loads((out / "model.json").read_text())
    assert web.transfer_size(info) < {"float16": 40e6, "int8": 22e6}[weights]
    pipe = Pipeline.default(backend="torch", device="cpu", dtype="float32")
    expected = np.asarray(pipe(num_inference_steps=8, **APPLE).images[0], int)
    with served(out) as url, tab(url) as page:
        own = made(page, steps=8, **APPLE).astype(int)
        assert "one thread" in page.text_content("#threads")
        if weights == "float16":  # in which the model is stored, so that nothing is lost
            assert np.abs(own - expected).max() <= 1
            pixels = page.evaluate(
                """async () => {
                    const { load } = await import("./fastldm.js");
                    const model = await load("./");
                    for await (const { image } of model.generate("a red apple", { seed: 7, steps: 8 }))
                        if (image) return Array.from(image.pixels);
                }"""
            )
            close(pixels, pipe(num_inference_steps=8, output_type="np", **APPLE).images[0])
        else:
            assert 10 * np.log10(255**2 / np.square(own - expected).mean()) > 35


@pytest.fixture(scope="module")
def default_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("default") / "bundle"
    done = run("export", str(folder), "--whole-picture")
    assert done.exit_code == 0, done.output
    return folder


@pytest.mark.full
def test_page_takes_threads_only_where_it_is_isolated(site: Path, pipe: Pipeline) -> None:
    expected = np.asarray(pipe("a red apple", seed=7, num_inference_steps=4).images[0], int)
    for isolated, text in ((False, "on one thread: a page has more only where"), (True, "It runs on 2 threads.")):
        with served(site, isolated) as url, tab(url) as page:
            own = made(page, steps=4, **APPLE).astype(int)
            assert page.evaluate("crossOriginIsolated") == isolated
            count = page.evaluate("navigator.hardwareConcurrency")
            assert text.replace("2", str(min(4, count))) in page.text_content("#threads")
        assert np.abs(own - expected).max() <= 1


@pytest.mark.full
def test_page_shows_steps_stops_and_says_what_is_wrong(site: Path) -> None:
    with served(site) as url, tab(url, color_scheme="dark") as page:
        first = made(page, steps=30, **APPLE)
        page.click("summary")
        page.fill("#width", "17")
        page.click("#generate")
        page.wait_for_selector("#error:not([hidden])")
        assert "width is 17: expected a multiple of" in page.text_content("#error")
        page.fill("#width", "")
        page.check("#previews")
        page.fill("#steps", "50")
        page.click("#generate")
        page.wait_for_selector("#progress:not([hidden])")
        page.keyboard.press("Escape")
        page.wait_for_selector(READY)
        assert page.text_content("#status") == "Stopped."
        page.fill("#seed", "8")
        page.uncheck("#previews")
        second = made(page, steps=3)
        assert (first != second).any()
        assert page.locator("#made .tile").count() == 2
        page.locator("#made .tile").last.click()
        assert page.locator("#settings dd").all_text_contents()[:3] == ["a red apple", "7", "30, " + sampler(site)]
        name = page.get_attribute("#download", "download")
        assert name == "a-red-apple-7.png"


def sampler(site: Path) -> str:
    return json.loads((site / "model.json").read_text())["sampler"]


@pytest.mark.full
def test_several_requests_and_left_loops_in_one_tab(site: Path, pipe: Pipeline) -> None:
    expected = [pipe("a red apple", seed=seed, num_inference_steps=3, output_type="np").images[0] for seed in (1, 2)]
    with served(site) as url, tab(url) as page:
        page.wait_for_selector(READY, timeout=60_000)
        first, second, left, aborted, closed = page.evaluate(
            """async () => {
                const { load } = await import("./fastldm.js");
                const model = await load();
                const make = async (seed) => {
                    for await (const { image } of model.generate("a red apple", { seed, steps: 3 }))
                        if (image) return Array.from(image.pixels);
                };
                let left = 0;
                for await (const { row } of model.generate("a red apple", { steps: 30 })) if ((left = row) === 2) break;
                const controller = new AbortController();
                let aborted = "";
                try {
                    const { signal } = controller;
                    for await (const _ of model.generate("a", { steps: 30, signal })) controller.abort();
                } catch (error) {
                    aborted = error.name;
                }
                const both = await Promise.all([make(1), make(2)]);
                const waiting = make(3).catch((error) => error.message);
                model.close();
                return [...both, left, aborted, await waiting];
            }"""
        )
        close(first, expected[0])
        close(second, expected[1])
        assert (left, aborted, closed) == (2, "AbortError", "the model was closed")


@pytest.mark.full
@pytest.mark.skipif(FULL_BROWSER is None, reason="needs a full Chromium, or its path in FASTLDM_CHROMIUM")
def test_step_on_webgpu_is_the_pipelines(site: Path, pipe: Pipeline) -> None:
    """By Chromium's adapter in software, which takes a minute to compile what the step needs."""
    expected = pipe("a red apple", seed=7, num_inference_steps=1, output_type="np").images[0]
    flags = ["--headless=new", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]
    flags += ["--enable-features=Vulkan,WebGPU"]
    with served(site) as url, tab(url, FULL_BROWSER, *flags, at="icon.svg") as page:
        device, pixels = page.evaluate(
            """async (url) => {
                const { load } = await import(`${url}fastldm.js`);
                const model = await load(url, { device: "webgpu" });
                for await (const { image } of model.generate("a red apple", { seed: 7, steps: 1 }))
                    return [model.info.device, Array.from(image.pixels)];
            }""",
            url,
        )
    assert device == "webgpu"
    close(pixels, expected)
