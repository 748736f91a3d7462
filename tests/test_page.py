"""The page at `/` of a server, in a real Chromium: what a person does with it."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import all_families
import clients
import numpy as np
import pytest
from PIL import Image
from servers import in_thread, wait_until

from fastldm import Pipeline
from fastldm.image import save_result
from fastldm.server.service import Service

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="needs a headless Chromium, such as Debian's chromium-headless-shell"
)
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
KEY = "a-key-of-letters"
FAMILIES = ("consistency", "ldm-super-resolution")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as found:
        chromium = found.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.default(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def app(pipe: Pipeline) -> Any:
    return clients.application(pipe, loras={"sketch": "sketch"}, controls={"shape": "shape"})


@pytest.fixture(scope="module")
def url(app: Any) -> Iterator[str]:
    with in_thread(app) as url:
        yield url


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """Opened, and in the end without an error that nobody handled."""
    with opened(browser, url) as page:
        yield page


class opened:
    """A tab. options: of the browser's context."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self._own(request.url, url))
        self.page.goto(url)

    def _own(self, asked: str, url: str) -> None:
        if not asked.startswith((url, "data:", "blob:")):
            self.errors.append(f"asked {asked}")

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.context.close()
        assert kind is not None or not self.errors


def generate(page: Any, prompt: str = "a red apple", **fields: Any) -> None:
    """Fill in the form, and press the button. 2 steps where no number is given."""
    page.wait_for_selector("#num_inference_steps[placeholder='4']")  # the options have come
    page.fill("#prompt", prompt)
    for name, value in {"num_inference_steps": 2, "seed": 3, **fields}.items():
        page.fill(f"#{name}", str(value))
    page.click("#generate")


def shown(page: Any) -> Image.Image:
    """The picture on the stage, when it is done: the bytes that a download has."""
    page.wait_for_selector("#about:not([hidden])", timeout=60_000)
    content = page.evaluate(
        """async () => {
            const image = document.querySelector("#picture");
            await image.decode();
            const canvas = Object.assign(document.createElement("canvas"),
                { width: image.naturalWidth, height: image.naturalHeight });
            canvas.getContext("2d").drawImage(image, 0, 0);
            return canvas.toDataURL("image/png");
        }"""
    )
    return clients.picture(content.partition(",")[2]).convert("RGB")


def settings(page: Any) -> dict[str, str]:
    """What is written under the picture."""
    names, values = (page.locator(f"#settings {tag}").all_text_contents() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def file(tmp_path: Path, image: Image.Image, **info: Any) -> str:
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
    image.save(path, **info)
    return str(path)


def service_of(app: Any) -> Service:
    service: Service = app.state.service
    return service


def test_a_prompt_becomes_a_picture(page: Any, pipe: Pipeline, tmp_path: Path) -> None:
    generate(page, negative_prompt="a leaf", guidance_scale=3)
    options: dict[str, Any] = {"negative_prompt": "a leaf", "num_inference_steps": 2, "seed": 3, "guidance_scale": 3.0}
    expected = np.asarray(pipe("a red apple", **options).images[0]).astype(int)
    assert np.abs(np.asarray(shown(page)).astype(int) - expected).max() <= 1
    about = settings(page)
    assert about.pop("Time")
    assert about == {
        "Prompt": "a red apple", "Without": "a leaf", "Seed": "3", "Size": "64 × 64", "Steps": "2", "Guidance": "3",
        "Model": "default",
    }  # fmt: skip
    assert page.get_attribute("#picture", "alt") == "a red apple, seed 3"
    assert page.text_content("#status").startswith("Done in ")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "fastldm-3.png"
    download.value.save_as(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.info["parameters"].startswith("a red apple\nNegative prompt: a leaf\nSteps: 2,")


@pytest.mark.full
def test_previews_come_and_stopping_stops(page: Any, app: Any) -> None:
    generate(page, num_inference_steps=150)
    page.wait_for_selector("#picture.draft:not([hidden])", timeout=30_000)
    assert "%" in page.title()
    assert page.is_enabled("#stop")
    page.focus("#stage")
    page.keyboard.press("Escape")
    wait_until(lambda: not service_of(app).open, 10)
    wait_until(lambda: page.evaluate("document.querySelector('#status').textContent === 'Stopped.'"))
    assert page.locator(".tile").count() == 0
    assert page.is_disabled("#stop")


@pytest.mark.full
def test_what_is_painted_is_made_anew(page: Any, tmp_path: Path) -> None:
    start = Image.new("RGB", (128, 128), (40, 90, 200))
    page.set_input_files("#image-file", file(tmp_path, start))
    page.wait_for_selector("#image-tools:not([hidden])")
    box = page.locator("#mask").bounding_box()
    page.fill("#brush", "20")
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.1)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.9, steps=5)
    page.mouse.up()
    page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.5)
    page.click("#undo")  # the second
    page.fill("#strength", "1")
    generate(page)
    made = np.asarray(shown(page)).astype(int)
    changed = np.abs(made - np.array((40, 90, 200))).max(-1)
    assert np.median(changed[8:-8, 8:18]) > 30 > np.median(changed[:, 36:])
    assert settings(page)["Change"] == "1"
    page.click("#image-remove")
    assert page.is_visible("#image-choose")


@pytest.mark.full
def test_adapters_and_controls_are_chosen(page: Any, pipe: Pipeline, tmp_path: Path) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 20, 56, 44))
    page.set_input_files("#control-file", file(tmp_path, mask))
    page.check(".adapter input[type=checkbox]")
    page.fill(".adapter input[type=range]", "0.5")
    page.select_option("#sampler", "dpm++ 2m")
    page.select_option("#schedule", "karras")
    generate(page)
    options: dict[str, Any] = {"adapters": {"sketch": 0.5}, "control_image": mask, "sampler": "dpm++ 2m karras"}
    expected = np.asarray(pipe("a red apple", num_inference_steps=2, seed=3, **options).images[0]).astype(int)
    assert np.abs(np.asarray(shown(page)).astype(int) - expected).max() <= 1
    about = settings(page)
    assert (about["LoRAs"], about["Control"], about["Sampler"]) == ("sketch 0.5", "shape 1", "dpm++ 2m karras")


DROP = """([selector, base64, name]) => {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], name, { type: "image/png" }));
    document.querySelector(selector).dispatchEvent(
        new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


@pytest.mark.full
def test_a_png_of_ours_brings_its_settings(page: Any, pipe: Pipeline, tmp_path: Path) -> None:
    asked = {"prompt": "a fish", "seed": 7, "num_inference_steps": 3, "sampler": "dpm++ 2m karras", "width": 96}
    path = tmp_path / "fish.png"
    save_result(pipe(**asked, adapters={"sketch": 0.25}), [path], "default")
    page.wait_for_selector("#num_inference_steps[placeholder='4']")
    page.evaluate(DROP, ["#stage", base64.b64encode(path.read_bytes()).decode(), "fish.png"])
    wait_until(lambda: page.evaluate("document.querySelector('#prompt').value === 'a fish'"))
    ids = ("seed", "num_inference_steps", "sampler", "schedule", "width", "height")
    assert [page.input_value(f"#{id}") for id in ids] == ["7", "3", "dpm++ 2m", "karras", "96", "64"]
    assert page.is_checked(".adapter input[type=checkbox]")
    assert page.input_value(".adapter input[type=range]") == "0.25"
    assert page.is_visible("#image-choose"), "no picture to start from"
    plain = base64.b64encode(clients.file(Image.new("RGB", (50, 50), "red"))).decode()
    page.evaluate(DROP, ["#stage", plain, "red.png"])
    page.wait_for_selector("#image-tools:not([hidden])")


@pytest.mark.full
@pytest.mark.parametrize(
    ("fields", "beside", "message"),
    [
        ({"width": 9000, "height": 9000}, "width", "pixels"),
        ({"num_inference_steps": 5000}, "num_inference_steps", "at most 150"),
        ({"prompt": ""}, "prompt", "Write what"),
        ({"n": 99}, "n", "at most 10"),
        ({"width": ""}, "width", "above 0"),
    ],
)
def test_errors_stand_beside_their_field(page: Any, fields: dict[str, Any], beside: str, message: str) -> None:
    generate(page, **fields)
    note = page.wait_for_selector(f"#{beside}-error")
    assert message in note.text_content()
    assert page.get_attribute(f"#{beside}", "aria-invalid") == "true"
    assert page.evaluate("document.activeElement.id") == beside
    generate(page, **{**dict.fromkeys(("width", "height"), 64), "n": 1})
    shown(page)
    assert page.locator("[aria-invalid]").count() == 0


@pytest.mark.full
def test_a_reload_goes_on(page: Any) -> None:
    generate(page)
    first = np.asarray(shown(page))
    generate(page, num_inference_steps=120, seed=4)
    page.wait_for_selector("#picture.draft")
    page.reload()
    page.wait_for_selector("#picture.draft", timeout=30_000)
    page.wait_for_selector("#about:not([hidden])", timeout=60_000)
    assert settings(page)["Seed"] == "4"
    assert page.locator(".tile img").count() == 2
    page.focus("#stage")
    page.keyboard.press("ArrowRight")
    assert settings(page)["Seed"] == "3"
    assert np.array_equal(np.asarray(shown(page)), first)


@pytest.mark.full
def test_tabs_do_not_mix(browser: Any, url: str) -> None:
    with opened(browser, url) as left, opened(browser, url) as right:
        generate(left, "a red apple", seed=1, num_inference_steps=40)
        generate(right, "a fish", seed=2)
        shown(right)
        shown(left)
        assert (settings(left)["Seed"], settings(right)["Seed"]) == ("1", "2")
        assert left.locator(".tile").count() == right.locator(".tile").count() == 1


@pytest.mark.full
def test_a_key_is_asked_for(browser: Any, pipe: Pipeline) -> None:
    with in_thread(clients.application(pipe, api_keys=(KEY,))) as url, opened(browser, url) as page:
        page.fill("#key", "a-wrong-key")
        page.click("#login button")
        page.wait_for_selector("#key-error:not([hidden])")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        generate(page)
        shown(page)
        page.reload()
        page.wait_for_selector("#about:not([hidden])")  # it is still known


@pytest.mark.full
def test_keys_do_what_buttons_do(page: Any) -> None:
    generate(page, seed=5)
    shown(page)
    page.fill("#seed", "")
    page.fill("#prompt", "a fish")
    page.keyboard.press("Control+Enter")
    wait_until(lambda: page.evaluate("document.querySelectorAll('.tile img').length === 2"))
    page.focus("#stage")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("u")
    assert page.input_value("#prompt") == "a red apple"
    page.keyboard.press("c")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#pair[open]")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.wait_for_selector("#keys[open]")
    page.keyboard.press("Escape")
    page.keyboard.press("a")
    wait_until(lambda: page.evaluate("document.querySelectorAll('.tile img').length === 3"))
    page.keyboard.press("i")
    page.wait_for_selector("#image-tools:not([hidden])")
    page.keyboard.press("p")
    assert page.evaluate("document.activeElement.id") == "prompt"


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_it_fits_every_screen(browser: Any, url: str, scheme: str, width: int) -> None:
    options = {"viewport": {"width": width, "height": 844}, "color_scheme": scheme, "has_touch": width < 500}
    with opened(browser, url, **options) as page:
        generate(page, n=3)
        shown(page)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(246, 245, 242)", "dark": "rgb(21, 20, 19)"}[scheme]
        unnamed = page.evaluate(
            """[...document.querySelectorAll("button, input, select, textarea, a, progress")]
                .filter((one) => one.checkVisibility() && !(one.labels?.length || one.textContent.trim()
                    || one.getAttribute("aria-label") || one.closest(".tile"))).map((one) => one.outerHTML)"""
        )
        assert unnamed == []


def test_fields_are_those_that_a_model_reads(browser: Any, pipe: Pipeline, tmp_path: Path) -> None:
    """Of one without a prompt, which reads a class, and of one that enlarges a picture."""
    pipes = {name: Pipeline.from_diffusers(all_families.MAKERS[name]()) for name in FAMILIES}
    with in_thread(clients.application({"small": pipe, **pipes})) as url, opened(browser, url) as page:
        page.wait_for_selector("#num_inference_steps[placeholder='4']")
        assert not page.is_visible("#class_labels")
        page.select_option("#model", "consistency")
        assert [page.is_visible(f"#{name}") for name in ("prompt", "guidance_scale", "class_labels")] == [0, 0, 1]
        page.fill("#class_labels", "3")
        page.fill("#seed", "5")
        page.click("#generate")
        expected = pipes["consistency"](class_labels=3, seed=5).images[0]
        assert np.abs(np.asarray(shown(page)).astype(int) - np.asarray(expected).astype(int)).max() <= 1
        assert settings(page)["Class"] == "3"
        page.select_option("#model", "ldm-super-resolution")
        page.click("#generate")
        assert "Choose the picture" in page.wait_for_selector("#image-drop-error").text_content()
        photo = Image.effect_noise((32, 32), 80).convert("RGB")
        page.set_input_files("#image-file", file(tmp_path, photo))
        page.fill("#num_inference_steps", "2")
        assert not page.is_visible("#strength")
        page.click("#generate")
        page.wait_for_selector("#about:not([hidden]) dd:text-is('ldm-super-resolution')", timeout=60_000)
        expected = pipes["ldm-super-resolution"](image=photo, seed=5, num_inference_steps=2).images[0]
        assert np.abs(np.asarray(shown(page)).astype(int) - np.asarray(expected).astype(int)).max() <= 1
