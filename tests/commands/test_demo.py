"""The page in the browser: what its functions give, and in a slow test a real headless browser that uses it."""

import re
import shutil
import sys

import numpy as np
import pytest
import torch

from tests.helpers.runs import CLASSES, small_model
from unept import demo
from unept.colors import to_pil
from unept.inference import InferenceConfig
from unept.pictures.explorer import explore


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "street.png"
    to_pil(torch.randint(0, 256, (3, 33, 47), dtype=torch.uint8)).save(path)
    return path


def test_pictures_of_an_image(image):
    model = small_model()
    page = demo.Page(model, InferenceConfig(refine_scale=4))
    (before, after), boundary, confidence, line = page.segment(str(image))
    assert {picture.size for picture in (before, after, boundary, confidence)} == {(47, 33)}
    differ = (np.asarray(before) != np.asarray(after)).any(axis=2).mean()
    share = float(re.search(r"changes ([\d.]+)% of the pixels", line)[1]) / 100
    assert differ == pytest.approx(share, abs=1e-4)
    assert any(name in line for name in CLASSES)
    assert page.segment(None) == (None, None, None, "")


def test_a_model_that_does_not_refine():
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    found = explore(small_model(context_queries="learned"), image, InferenceConfig())
    assert found.boundary is None
    assert found.changed == 0
    assert not found.unrefined.any()


def test_points_of_a_pixel(image):
    page = demo.Page(small_model(), InferenceConfig())
    here, there = (page.points(str(image), *xy) for xy in ((40, 5), (3, 30)))
    assert here.width > 400
    assert here.tobytes() != there.tobytes()


def test_gradio_is_absent(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["demo", "--run", "nowhere"])
    with pytest.raises(SystemExit) as end:
        demo.main()
    assert end.value.code == 2
    line = r"error: the page in the browser needs the package gradio .*: pip install gradio\n"
    assert re.fullmatch(line, capsys.readouterr().err)


@pytest.mark.slow
def test_in_a_browser(image, tmp_path):
    """Drop an image, wait for the slider and the line of classes, click a pixel and wait for its points."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser")
    blocks = demo.build(small_model(), InferenceConfig())
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        with playwright.sync_playwright() as manager:
            window = manager.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = window.new_page(viewport={"width": 1200, "height": 1500})
            page.set_default_timeout(120_000)
            page.goto(address)
            page.set_input_files("#image input[type=file]", str(image))
            page.wait_for_function("document.querySelector('#classes textarea')?.value.includes('Refinement changes')")
            page.wait_for_selector("#slider img")
            assert page.locator("#boundary img").count() == 1
            page.click("#image img", position={"x": 20, "y": 20})
            page.wait_for_selector("#points img")
            page.screenshot(path=tmp_path / "page.png", full_page=True)
            window.close()
    finally:
        blocks.close()
    assert (tmp_path / "page.png").stat().st_size > 20_000
