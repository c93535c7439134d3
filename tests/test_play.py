"""The page that draws images of a model in a real browser, with vgan-demo and without a server."""

import base64
import io
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright
from runs import TINY, train_in_process
from test_cli import Cli, message

from vgan import cli
from vgan.apps import static_page
from vgan.apps.demo import PageBackend, application
from vgan.apps.page import PageInfo, page_info
from vgan.inference.attention_maps import attention_maps
from vgan.inference.latent_files import latents_npy
from vgan.inference.latents import draw, latents, lerp, slerp
from vgan.inference.load import restore_generator
from vgan.runs import checkpoint
from vgan.runtime.errors import UserError
from vgan.runtime.extras import install_extra

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
assert CHROMIUM or "VGAN_BROWSER" not in os.environ, (
    "VGAN_BROWSER asks for Chromium, which is not installed"
)
WITHOUT_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update"
)
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli(monkeypatch, capsys)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with classes and attention, whose weights are not at the zeros they start with."""
    folder = tmp_path_factory.mktemp("model") / "mine"
    train_in_process(folder, "total_kimg=0.04", "model=attn", "size.attention_resolutions=[4,8]")
    folder = folder.rename(folder.with_name("<b>mine"))
    path = checkpoint.find(folder)
    state = checkpoint.load(path)
    rng = torch.Generator().manual_seed(0)
    for weight in state["G_ema"].values():
        weight.add_(0.1 * torch.randn(weight.shape, generator=rng))
    checkpoint.save(path, state, keep=1)
    return path


@pytest.fixture(scope="module")
def backend(ckpt: Path) -> PageBackend:
    return PageBackend(
        restore_generator(checkpoint.load(ckpt), torch.device("cpu")), seed=3, precision="fp32"
    )


def info_of(backend: PageBackend, ckpt: Path) -> PageInfo:
    state = checkpoint.load(ckpt)
    return page_info(backend.G, ckpt.parent.name, state, backend.attention, batch=8)


@contextmanager
def serving(backend: PageBackend, ckpt: Path) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = application(backend, info_of(backend, ckpt), local=True)
        served = uvicorn.Server(
            uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=served.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        served.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(backend: PageBackend, ckpt: Path) -> Iterator[str]:
    with serving(backend, ckpt) as address:
        yield address


@pytest.fixture(scope="module")
def runtime(pytestconfig: pytest.Config) -> Path:
    """The folder of onnxruntime-web, beside the cache of pytest; downloaded once."""
    assert pytestconfig.cache
    try:
        return static_page.find_runtime(None, pytestconfig.cache.mkdir("runtime"))
    except UserError as e:
        if "VGAN_BROWSER" in os.environ:
            raise
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def folder(ckpt: Path, runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page as files, by vgan-export."""
    out = tmp_path_factory.mktemp("page") / "page"
    overrides = [f"ckpt='{ckpt}'", "to=html", f"out='{out}'", "seed=3", f"runtime='{runtime}'"]
    static_page.export(cli.compose("vgan-export", overrides))
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield opened
        opened.close()


@pytest.fixture(params=["server", "static"])
def address(request: pytest.FixtureRequest) -> str:
    if request.param == "server":
        return request.getfixturevalue("server")
    return request.getfixturevalue("folder").as_uri() + "/index.html"


@pytest.fixture
def errors() -> list[str]:
    """What pages complained about; none is expected unless a test empties it."""
    return []


@pytest.fixture
def open_page(browser: Browser, errors: list[str]) -> Iterator[Any]:
    opened: list[Page] = []

    def open_it(address: str, size: str = "wide", ready: bool = True, **options: Any) -> Page:
        width, height = SIZES[size]
        page = browser.new_page(
            viewport={"width": width, "height": height}, accept_downloads=True, **options
        )
        opened.append(page)
        page.on("console", lambda said: errors.append(said.text))
        page.on("pageerror", lambda raised: errors.append(str(raised)))
        page.goto(address)
        if ready:
            page.locator(".tile").nth(15).wait_for(timeout=20_000)
            idle(page)
        return page

    yield open_it
    for page in opened:
        page.context.close()
        page.close()
    assert errors == []


def idle(page: Page) -> None:
    page.locator("body:not(.busy)").wait_for(timeout=20_000)


def pixels(canvas: Locator) -> np.ndarray:
    """(H, W, 3) uint8 of a canvas."""
    encoded = canvas.evaluate("canvas => canvas.toDataURL()").partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))


def tile(page: Page, i: int) -> Locator:
    return page.locator(".tile canvas:not(.heat)").nth(i)


def set_slider(page: Page, name: str, value: float) -> None:
    code = "(s, v) => { s.value = v; s.dispatchEvent(new Event('input', { bubbles: true })); }"
    page.locator(name).evaluate(code, value)
    page.wait_for_timeout(20)
    idle(page)


def drag(page: Page, a: int, b: int) -> None:
    start, end = (page.locator(".tile").nth(i).bounding_box() for i in (a, b))
    assert start
    assert end
    page.mouse.move(start["x"] + 20, start["y"] + 20)
    page.mouse.down()
    page.mouse.move(end["x"] + 30, end["y"] + 30, steps=3)
    page.mouse.up()
    page.locator("#way").wait_for()
    idle(page)


def expected(backend: PageBackend, *numbers: int, **options: Any) -> np.ndarray:
    return draw(backend.G, torch.tensor(numbers), 3, **options).permute(0, 2, 3, 1).numpy()


def close(shown: np.ndarray, wanted: np.ndarray) -> bool:
    """Within one step of 255."""
    return bool(np.abs(shown.astype(int) - wanted).max() <= 1)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.browser
@WITHOUT_CHROMIUM
class TestPage:
    """In a browser, with both backends."""

    @pytest.mark.parametrize("size", SIZES)
    def test_pictures_are_those_of_vgan_sample(
        self, address: str, size: str, open_page: Any, backend: PageBackend
    ) -> None:
        page = open_page(address, size)
        assert page.title() == "<b>mine"
        assert page.inner_text(".what") == "16 px images, 8 classes, trained on 40 images"
        for i, wanted in zip((0, 9, 15), expected(backend, 0, 9, 15)):
            assert close(pixels(tile(page, i)), wanted)
            assert wanted.std() > 5  # something is in it
        names = page.locator(".tile").evaluate_all(
            "tiles => tiles.map(t => t.getAttribute('aria-label'))"
        )
        assert names[:2] + names[-1:] == [
            "image 0 circle",
            "image 1 square",
            "image 15 heart",
        ]
        assert page.locator(".tile").first.bounding_box()["width"] >= 96
        assert (
            page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
        )  # nothing sticks out
        page.click("#new")
        idle(page)
        assert page.input_value("#first") == "16"
        assert close(pixels(tile(page, 3)), expected(backend, 19)[0])

    def test_class_truncation_and_count_act(
        self, address: str, open_page: Any, backend: PageBackend
    ) -> None:
        page = open_page(address)
        page.select_option("#label", "7")
        idle(page)
        assert close(pixels(tile(page, 2)), expected(backend, 2, label=7)[0])
        set_slider(page, "#truncation", 0.3)
        assert page.inner_text("#truncation-value") == "0.30"
        assert close(pixels(tile(page, 2)), expected(backend, 2, label=7, truncation=0.3)[0])
        page.select_option("#count", "36")
        page.locator(".tile").nth(35).wait_for()
        idle(page)
        page.fill("#first", "1000000000")
        page.press("#first", "Enter")
        idle(page)
        assert close(
            pixels(tile(page, 35)), expected(backend, 1000000035, label=7, truncation=0.3)[0]
        )
        assert page.inner_text("#status") == "Images 1000000000 to 1000000035"

    @pytest.mark.parametrize("size", SIZES)
    def test_dragging_one_picture_onto_another_opens_the_way_between(
        self, address: str, size: str, open_page: Any, backend: PageBackend
    ) -> None:
        page = open_page(address, size)
        drag(page, 1, 3)
        assert page.inner_text("#caption") == "50% 1 square, 50% 3 star"
        z, c = latents(backend.G, torch.tensor([1, 3]), 3)
        shown = {}
        for t in (0.0, 0.3, 1.0):
            set_slider(page, "#at", t)
            at = torch.tensor([t])
            with torch.no_grad():
                image = backend.G(slerp(z[:1], z[1:], at)[0], lerp(c[:1], c[1:], at)[0])[0]
            wanted = (image * 127.5 + 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            shown[t] = pixels(page.locator("#large"))
            assert close(shown[t], wanted), t
        assert not close(shown[0.0], shown[1.0])
        page.click("#play")
        page.wait_for_timeout(300)  # from the end it goes back
        page.click("#play")
        assert page.inner_text("#play") == "Play"
        assert 0.1 < float(page.input_value("#at")) < 0.99
        for button in page.locator("#stage button:visible").all():
            box = button.bounding_box()
            assert box["x"] + box["width"] <= SIZES[size][0], button.inner_text()
        page.keyboard.press("Escape")
        assert not page.locator("#way").is_visible()
        assert page.inner_text("#caption") == "1 square"

    def test_the_keyboard_chooses_mixes_and_gives_up(self, address: str, open_page: Any) -> None:
        page = open_page(address)
        page.locator(".tile").first.focus()
        for key in ("ArrowRight", "Enter", "m", "ArrowDown"):
            page.keyboard.press(key)
        assert page.inner_text("#status") == "Select the image to mix 1 square with"
        page.keyboard.press("Enter")
        idle(page)
        assert page.inner_text("#caption") == "50% 1 square, 50% 5 ring"
        for key in ("Escape", "m", "Escape"):
            page.keyboard.press(key)
        assert page.inner_text("#status") == "Images 0 to 15"
        before = pixels(tile(page, 0))
        page.keyboard.press("n")
        idle(page)
        assert not close(pixels(tile(page, 0)), before)

    def test_touch_mixes_by_two_taps(self, address: str, open_page: Any) -> None:
        page = open_page(address, "narrow", has_touch=True, is_mobile=True)
        page.locator(".tile").nth(1).tap()
        page.locator("#mix").tap()
        page.locator(".tile").nth(3).tap()
        idle(page)
        assert page.inner_text("#caption") == "50% 1 square, 50% 3 star"

    @pytest.mark.parametrize("size", SIZES)
    def test_pointing_shows_where_attention_looks(
        self, address: str, size: str, open_page: Any, backend: PageBackend
    ) -> None:
        page = open_page(address, size)
        heat = page.locator(".tile .heat").nth(2)
        page.locator(".tile").nth(2).hover(position={"x": 50, "y": 20})
        assert not heat.is_visible()
        page.check("#attention")
        idle(page)
        frame = page.locator(".tile .frame").nth(2)
        box = frame.bounding_box()
        frame.hover(
            position={"x": box["width"] * 0.55, "y": box["height"] * 0.3}
        )  # of 8 x 8: row 2, column 4
        assert heat.is_visible()
        z, c = latents(backend.G, torch.tensor([2]), 3)
        weights = attention_maps(backend.G, z, c, query=(2.5 / 8, 4.5 / 8))[1][-1].weights[0, 0]
        drawn = pixels(heat)
        edge = drawn.shape[0] // 8
        share = (weights / weights.max()).numpy()
        grey = (expected(backend, 2)[0] @ [0.3, 0.59, 0.11]).reshape(8, 2, 8, 2).mean(axis=(1, 3))
        opacity = 0.85 * np.sqrt(share)
        red = (1 - opacity) * 0.55 * grey + opacity * 255 * np.minimum(1, 2.5 * share)
        shown = (
            drawn[:, :, 0].reshape(8, edge, 8, edge)[:, 16:-16, :, 16:-16].mean(axis=(1, 3))
        )  # inside the frame
        assert np.corrcoef(shown.ravel(), red.ravel())[0, 1] > 0.9
        assert tuple(drawn[2 * edge, 4 * edge + edge // 2]) == (0x5A, 0xE6, 0xFF)
        page.mouse.move(2, 2)
        assert not heat.is_visible()

    def test_latents_of_files_come_first(
        self, address: str, open_page: Any, backend: PageBackend, tmp_path: Path
    ) -> None:
        """Those of vgan-invert, with and without the class after z."""
        page = open_page(address)
        z, c = latents(backend.G, torch.tensor([40, 41]), 3, label=5)
        (tmp_path / "photo.npy").write_bytes(latents_npy(z[:1], c[:1]))
        (tmp_path / "two.npy").write_bytes(latents_npy(z, c[:, :0]))
        page.set_input_files("#file", tmp_path / "photo.npy")
        page.locator("#caption", has_text="photo").wait_for()
        idle(page)
        wanted = expected(backend, 40, label=5)[0]
        assert close(pixels(tile(page, 0)), wanted)
        assert close(pixels(page.locator("#large")), wanted)
        assert close(pixels(tile(page, 1)), expected(backend, 0)[0])
        assert page.inner_text("#status") == "Images 0 to 14"
        page.set_input_files("#file", [tmp_path / "two.npy", tmp_path / "photo.npy"])
        page.locator("#caption", has_text="two 0").wait_for()
        idle(page)
        assert close(pixels(tile(page, 1)), expected(backend, 41, label=1)[0])
        assert close(pixels(tile(page, 2)), wanted)
        drag(page, 2, 3)
        assert page.inner_text("#caption") == "50% photo, 50% 0 circle"
        set_slider(page, "#at", 0)
        assert close(pixels(page.locator("#large")), wanted)
        page.keyboard.press("Escape")
        page.click("#new")
        idle(page)
        assert page.inner_text("#status") == "Images 13 to 25"
        page.select_option("#count", "4")
        idle(page)
        assert page.inner_text("#status") == "Images 13 to 13"
        (tmp_path / "more.npy").write_bytes(latents_npy(z, c))
        page.set_input_files("#file", tmp_path / "more.npy")
        page.locator("#status", has_text="4 of 5 opened").wait_for()
        idle(page)
        page.click("#close-opened")
        idle(page)
        assert page.inner_text("#status") == "Images 13 to 16"
        assert not page.locator("#close-opened").is_visible()

    def test_dropped_files_are_all_opened(
        self, server: str, open_page: Any, backend: PageBackend
    ) -> None:
        page = open_page(server)
        z = latents(backend.G, torch.tensor([40, 41, 42]), 3)[0].numpy()
        files = [base64.b64encode(npy(row)).decode() for row in (z[0], z[1].astype(float), z[2])]
        code = """files => files.forEach(file => {
            const bytes = Uint8Array.from(atob(file), letter => letter.charCodeAt(0));
            const dropped = new DataTransfer();
            dropped.items.add(new File([bytes], "same.npy"));
            window.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped }));
        })"""
        page.evaluate(code, files)
        page.locator("#status", has_text="Images 0 to 12").wait_for()
        idle(page)
        drawn = {i: pixels(tile(page, i)) for i in range(3)}
        for number in (40, 41, 42):  # in any order
            options = [expected(backend, number, label=label)[0] for label in range(3)]
            assert any(close(d, option) for d in drawn.values() for option in options), number

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"", "not a .npy"),
            (b"x" * 300, "not a .npy"),
            (npy(np.zeros((1, 3), np.float32)), "rows of 3 numbers; must be a .npy of float32"),
            (npy(np.zeros((1, 64), int)), "holds another kind of array"),
            (npy(np.zeros((2, 64), order="F")), "holds another kind of array"),
            (npy(np.zeros((0, 64), np.float32)), "has 0 rows"),
            (npy(np.zeros((99, 64), np.float32)), "has 99 rows, not 1 to 36"),
            (npy(np.zeros((2, 64), np.float32))[:-4], "cut short"),
            (npy(np.full((1, 64), np.nan, np.float32)), "not finite"),
        ],
    )
    def test_a_file_of_another_kind_is_one_line(
        self, server: str, open_page: Any, tmp_path: Path, content: bytes, says: str
    ) -> None:
        page = open_page(server)
        (tmp_path / "bad.npy").write_bytes(content)
        page.set_input_files("#file", tmp_path / "bad.npy")
        page.locator("#error", has_text="bad.npy: ").wait_for()
        assert says in page.inner_text("#error")
        page.click("#new")  # goes on
        page.locator("#error").wait_for(state="hidden")

    def test_files_are_saved(
        self, address: str, open_page: Any, backend: PageBackend, tmp_path: Path
    ) -> None:
        page = open_page(address)

        def save(button: str, name: str) -> np.ndarray:
            with page.expect_download() as waiting:
                page.click(button)
            assert waiting.value.suggested_filename == name
            waiting.value.save_as(tmp_path / name)
            return np.asarray(Image.open(tmp_path / name).convert("RGB"))

        page.locator(".tile").nth(5).click()
        assert close(save("#save", "5-ring.png"), expected(backend, 5)[0])
        sheet = save("#save-grid", "images-0.png")
        assert sheet.shape == (256, 256, 3)  # 4 x 4, each pixel 4 times
        assert close(sheet[64:128:4, 64:128:4], expected(backend, 5)[0])
        drag(page, 5, 6)
        strip = save("#save-strip", "5-ring-to-6-crescent.png")
        assert strip.shape == (64, 9 * 64, 3)
        assert close(strip[::4, -64::4], expected(backend, 6)[0])


@pytest.mark.browser
@WITHOUT_CHROMIUM
def test_what_went_wrong_is_said_in_one_line(
    open_page: Any,
    folder: Path,
    tmp_path: Path,
    backend: PageBackend,
    ckpt: Path,
    errors: list[str],
) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "wasm.js").unlink()
    page = open_page(broken.as_uri() + "/index.html", ready=False)
    page.locator("#error").wait_for()
    assert (
        page.inner_text("#error")
        == "model.js, runtime.js or wasm.js is missing; keep the files of this folder together"
    )
    page = open_page("about:blank", ready=False)
    page.add_init_script("delete globalThis.WebAssembly")
    page.goto(folder.as_uri() + "/index.html")
    page.locator("#error").wait_for()
    assert (
        page.inner_text("#error")
        == "this browser has no WebAssembly; use a current one, or vgan-demo"
    )
    with serving(backend, ckpt) as address:
        page = open_page(address)
    page.click("#new")
    page.locator("#error").wait_for()
    assert (
        page.inner_text("#error")
        == "vgan-demo does not answer; start it again, then choose New images"
    )
    assert all(
        "ERR_" in said for said in errors
    )  # of Chromium itself, about the missing file and the missing server
    errors.clear()


@pytest.mark.browser
@WITHOUT_CHROMIUM
def test_the_page_responds_while_images_are_computed(open_page: Any, folder: Path) -> None:
    page = open_page(folder.as_uri() + "/index.html")
    gap, total, left = page.evaluate(
        """async () => {
          const n = 1024;
          const z = new Float32Array(n * info.z_dim), c = new Float32Array(n * info.labels.length);
          const begin = performance.now();
          let last = begin, gap = 0;
          const tick = () => {
            gap = Math.max(gap, performance.now() - last);
            last = performance.now();
          };
          const timer = setInterval(tick);
          await backend.draw(z, c, n, false);
          clearInterval(timer);
          tick();
          return [gap, last - begin, z.length + c.length];
        }"""
    )
    assert total > 100  # ms: long enough to tell
    assert gap < total / 4
    assert left == 0  # moved to the worker, not copied
    assert (
        page.evaluate("[typeof vganModel, typeof vganRuntime, typeof vganWorker]")
        == ["undefined"] * 3
    )


@pytest.mark.browser
@WITHOUT_CHROMIUM
def test_an_error_while_drawing_is_one_line_and_drawing_goes_on(
    open_page: Any, folder: Path
) -> None:
    page = open_page(folder.as_uri() + "/index.html")
    said = page.evaluate(
        "backend.draw(new Float32Array(3), new Float32Array(0), 1, false).catch(e => e.message)"
    )
    assert "3" in said
    assert "\n" not in said
    page.click("#new")
    idle(page)
    assert page.inner_text("#status") == "Images 16 to 31"


@pytest.mark.browser
@WITHOUT_CHROMIUM
def test_a_worker_that_cannot_start_is_one_line(
    open_page: Any, folder: Path, tmp_path: Path, errors: list[str]
) -> None:
    def error(page: Page) -> str:
        page.locator("#error").wait_for()
        return str(page.inner_text("#error"))

    rule = r"the model cannot be started in this browser \(.+\); use a current one, or vgan-demo"
    page = open_page("about:blank", ready=False)
    page.add_init_script("delete globalThis.Worker")
    page.goto(folder.as_uri() + "/index.html")
    assert re.fullmatch(rule, error(page))
    broken = shutil.copytree(folder, tmp_path / "broken")
    address = broken.as_uri() + "/index.html"
    model = 'globalThis.vganModel = { latents: "AAAA", generator: "AAAA" };'
    (broken / "model.js").write_text(model)
    assert re.fullmatch(rule, error(open_page(address, ready=False)))
    (broken / "runtime.js").write_text('globalThis.vganWorker = "not a script";')
    assert re.fullmatch(rule, error(open_page(address, ready=False)))
    assert len(errors) == 1  # of Chromium itself, about the script
    errors.clear()


# --- without a browser --------------------------------------------------------------------------


@pytest.mark.browser
@WITHOUT_CHROMIUM
def test_a_grey_model_without_classes_or_attention(open_page: Any, tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 1), dtype=np.uint8)
    np.save(tmp_path / "grey.npy", grey)
    tiny = [o for o in TINY if not o.startswith("data")] + [
        "data=folder",
        "data.resolution=16",
        "total_kimg=0.04",
    ]
    train_in_process(tmp_path / "r", f"data.path={tmp_path / 'grey.npy'}", "model=plain", tiny=tiny)
    path = checkpoint.find(tmp_path / "r")
    backend = PageBackend(
        restore_generator(checkpoint.load(path), torch.device("cpu")), seed=3, precision="fp32"
    )
    assert backend.attention is None
    with serving(backend, path) as address:
        page = open_page(address)
        assert close(pixels(tile(page, 7)), expected(backend, 7)[0])
        assert [page.locator(f"#{name}-box").is_visible() for name in ("label", "attention")] == [
            False,
            False,
        ]
        drag(page, 1, 3)
        assert page.inner_text("#caption") == "50% 1, 50% 3"


def ask(
    server: str, path: str = "", body: bytes | None = None, **headers: str
) -> tuple[int, bytes, Any]:
    import urllib.error
    import urllib.request

    request = urllib.request.Request(server + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as e:
        with e:
            return e.code, e.read(), e.headers


def test_the_server_sends_pixels_and_attention(server: str, backend: PageBackend) -> None:
    z, c = latents(backend.G, torch.tensor([4, 2**53 - 1]), 3)
    status, body, _ = ask(server, "latents", b"[4, 9007199254740991]")
    assert status == 200
    assert np.array_equal(np.frombuffer(body, "<f4"), z.numpy().ravel())
    values = np.concatenate([z.numpy().ravel(), c.numpy().ravel()]).astype("<f4").tobytes()
    status, body, headers = ask(server, "draw?n=2&attention=1", values)
    assert status == 200
    assert headers["X-Content-Type-Options"] == "nosniff"
    size = 2 * 3 * 16 * 16
    assert (
        body[:size]
        == draw(backend.G, torch.tensor([4, 2**53 - 1]), 3).contiguous().numpy().tobytes()
    )
    rows = np.frombuffer(body[size:], np.uint8).reshape(2, backend.attention[0], 64, 64)  # type: ignore[index]
    assert (rows.max(axis=3) == 255).all()
    assert ask(server, "draw?n=2", values)[1] == body[:size]


@pytest.mark.parametrize(
    ("path", "body", "headers", "says"),
    [
        ("latents", b"[1.5]", {}, "numbers: must be integers from 0 to 2^53 - 1"),
        ("latents", b"[" * 1500, {}, "numbers: must be a JSON list"),
        ("latents", b"[true]", {}, "numbers: must be integers"),
        ("latents", b"[" + b"1," * 64 + b"1]", {}, "numbers: must be a list of 1 to 64"),
        ("latents", b"1" * 100_000, {}, "body: must have at most"),
        ("draw?n=0", b"", {}, "n=0: must be from 1 to 64"),
        ("draw?n=65", b"", {}, "n=65: must be from 1 to 64"),
        ("draw?n=1", b"1234", {}, "body: must have 288 bytes for n=1, has 4"),
        ("draw?n=1", b"\0" * 289, {}, "body: must have at most 288 bytes"),
        ("draw?n=1", np.full(72, np.nan, "<f4").tobytes(), {}, "body: every number must be finite"),
        ("", None, {"Host": "[::1"}, "Host: this vgan-demo answers"),
        (
            "",
            None,
            {"Host": "evil.example"},
            "Host: this vgan-demo answers to 127.0.0.1 and localhost only",
        ),
        (
            "latents",
            b"[1]",
            {"Origin": "http://evil.example"},
            "Origin: must be this page, not another site",
        ),
    ],
)
def test_the_server_refuses_in_one_line(
    server: str, path: str, body: bytes | None, headers: dict[str, str], says: str
) -> None:
    status, answer, _ = ask(server, path, body, **headers)
    assert status == 400
    assert answer.decode().startswith(says)
    assert b"\n" not in answer


def test_the_page_is_closed_to_all_but_its_own(server: str) -> None:
    status, body, _ = ask(server)
    page = body.decode()
    assert status == 200
    assert "<b>mine" not in page  # a folder's name is escaped, in the text and in the script
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    assert policy[1].startswith("default-src 'none'")
    assert "unsafe" not in policy[1]
    assert not re.search(r"https?://", page)


def test_out_folders(tmp_path: Path, backend: PageBackend, ckpt: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    with pytest.raises(UserError, match=r"has no ort\.wasm\.min\.js; give the folder dist"):
        static_page.find_runtime(str(runtime), tmp_path)
    for name in ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        (runtime / name).write_bytes(b"x")
    out, info = tmp_path / "page", info_of(backend, ckpt)
    graphs = {"latents": b"l", "generator": b"g"}
    static_page.write_page(out, info, graphs, runtime)
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    assert set(first) == {*static_page.PAGE, static_page.LICENSE}
    static_page.write_page(out, info, graphs, runtime)  # its own page is replaced
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="contains files other than a page"):
        static_page.write_page(out, info, graphs, runtime)
    with pytest.raises(UserError, match="is not a folder"):
        static_page.write_page(out / "mine.txt", info, graphs, runtime)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "page",
        "runtime",
    ]  # nothing is left beside


def test_without_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"runtime=null: needs npm .*; install it .*or give runtime=FOLDER"
    ):
        static_page.find_runtime(None, tmp_path / "cache")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error no network' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(
        UserError,
        match=r"npm could not fetch onnxruntime-web \(npm error no network\); give runtime",
    ):
        static_page.find_runtime(None, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_demo_starts_says_where_and_ends_on_ctrl_c(
    run: Cli, ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    def interrupt(self: uvicorn.Server, *args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGINT)  # as uvicorn does when its connections are closed

    monkeypatch.setattr(uvicorn.Server, "run", interrupt)
    code, out, err = run(cli.demo_main, f"ckpt='{ckpt}'", "port=0", "device=cpu")
    assert (code, err) == (0, "")
    assert re.match(
        r"http://127\.0\.0\.1:\d+  \(stop with Ctrl-C\)\n.*checkpoint-000000040\.safetensors\n"
        r"vgan-demo: stopped\n$",
        out,
    )


def test_demo_errors_are_one_line(run: Cli, ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = message(*run(cli.demo_main, f"ckpt='{ckpt}'", f"port={port}"))
    assert line == f"vgan-demo: port={port}: is in use; give another, or port=0 for any free one"
    assert "port=70000: must be from 0 to 65535" in message(
        *run(cli.demo_main, "ckpt=x", "port=70000")
    )
    assert "batch_size=65: must be from 1 to 64" in message(
        *run(cli.demo_main, "ckpt=x", "batch_size=65")
    )
    assert "host=nowhere.invalid: no such address" in message(
        *run(cli.demo_main, "ckpt=x", "host=nowhere.invalid", "port=0")
    )
    assert "ckpt=nowhere: no such file" in message(*run(cli.demo_main, "ckpt=nowhere", "port=0"))
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    assert install_extra("demo") in message(*run(cli.demo_main, f"ckpt='{ckpt}'", "port=0"))
