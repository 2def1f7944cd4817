"""README and the pages of docs/: tested blocks run, commands parse, links and paths exist, the drawing is up to date.

README runs by default. The pages of docs/ train networks, so that they are slow; what can be known of them without
running is tested by default too.
"""

import dataclasses
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import tyro
from torchvision.transforms.v2.functional import to_pil_image

import unept
import unept.kernels
from unept import UNEPT, demo, evaluate, export, predict, submission, train, visualize
from unept.config import ModelConfig, TrainConfig
from unept.presets import PRESETS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(r"(<!-- tested -->\n)?```(\w*)\n(.*?)```", re.S)
PARSERS = {
    "unept.train": train.parse,
    "unept.evaluate": lambda args: tyro.cli(evaluate.EvaluateConfig, args=args),
    "unept.predict": lambda args: tyro.cli(predict.PredictConfig, args=args),
    "unept.demo": lambda args: tyro.cli(demo.DemoConfig, args=args),
    "unept.visualize": lambda args: tyro.cli(visualize.VisualizeConfig, args=args),
    "unept.submission": lambda args: tyro.cli(submission.SubmissionConfig, args=args),
    "unept.export": lambda args: tyro.cli(export.ExportConfig, args=args),
}


def name_of(page: Path) -> str:
    return page.stem


def blocks(page: Path) -> list[tuple[bool, str, str]]:
    """(is tested, language, text) of each."""
    return [(bool(mark), language, text) for mark, language, text in BLOCK.findall(page.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_page(page, tmp_path):
    """Each tested block in turn, in one folder, as a reader would in a clone; python blocks share their names."""
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    (tmp_path / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    environment = {name: value for name, value in os.environ.items() if name[:7] not in ("PYTEST_", "TRITON_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["OMP_NUM_THREADS"] = "1"
    script, tested = "", 0
    for is_tested, language, text in blocks(page):
        tested += is_tested
        if not is_tested:
            continue
        if language == "python":
            script += text  # names carry over
            command = [sys.executable, "-c", script]
        else:
            command = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert tested, "a page without a tested block"


def test_lines_of_python_in_readme(tmp_path, monkeypatch):
    """They find a trained model and an image where they say that these are."""
    size = {"d_model": 16, "num_heads": 2, "num_points": 2, "ffn_dim": 16}
    UNEPT(3, "resnet10t", **size).save_pretrained(tmp_path / "runs" / "shapes")
    (tmp_path / "docs").mkdir()
    to_pil_image(torch.randint(0, 256, (3, 50, 60), dtype=torch.uint8)).save(tmp_path / "docs" / "street.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for _, language, text in blocks(README):
        if language == "python":
            exec(compile(text, "README.md", "exec"), names)
    assert (tmp_path / "overlay.png").exists()


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_a_page_has_tested_blocks_and_its_python_compiles(page):
    assert any(is_tested for is_tested, _, _ in blocks(page))
    for _, language, text in blocks(page):
        if language == "python":
            compile(text, page.name, "exec")


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """The words of every command line that runs a module of this project, from the module's name on."""
    found = []
    for _, language, text in blocks(page):
        if language != "sh":
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "-m" in words and (rest := words[words.index("-m") + 1 :])[0] in PARSERS:
                found.append(rest)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_parses(page, monkeypatch):
    monkeypatch.setattr(train, "network_of", lambda source: ModelConfig())  # a run that the page has made
    for module, *args in commands(page):
        if "--import" not in args:  # a module that the page writes
            PARSERS[module](args)


def test_every_command_in_a_table_parses():
    lines = re.findall(r"^\|.*?`python -m (.+?)`", (ROOT / "docs" / "features.md").read_text(), re.M)
    for module, *args in map(shlex.split, lines):
        PARSERS[module](args)
    assert len(lines) > 20


def test_there_are_commands_to_parse():
    assert len([command for page in PAGES for command in commands(page)]) > 15


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_files_that_pytest_is_given_exist(page):
    for path in re.findall(r"pytest ((?:bench|tests)/[\w/.]+)", page.read_text()):
        assert (ROOT / path).exists(), path


def test_ci_finds_the_test_command():
    line = "command="
    (assignment,) = [text for text in (ROOT / ".ci" / "run").read_text().splitlines() if text.startswith(line)]
    script = f'{assignment}\nprintf %s "$command"'
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    (marked,) = re.findall(r"<!-- test command -->\n```sh\n(.*)\n```", README.read_text())
    assert done.stdout == marked
    assert marked.endswith("-m pytest -n auto --dist loadfile")


# --- links, paths and names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_and_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for path in re.findall(r"`((?:unept|kernels|bench|tests|docs)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


def test_every_page_is_linked_from_readme():
    linked = set(re.findall(r"\]\(([^)#]+)\)", README.read_text()))
    assert {str(page.relative_to(ROOT)) for page in LINKED[1:]} <= linked


def test_files_of_the_equations_have_their_names():
    rows = [line.strip("|").split("|") for line in (ROOT / "docs" / "paper.md").read_text().splitlines()]
    found = 0
    for number, _, names, files in (row for row in rows if len(row) == 4 and row[0].strip().isdigit()):
        text = "".join((ROOT / path).read_text() for path in re.findall(r"`([^`]+)`", files))
        for name in re.findall(r"`([^`]+)`", names):
            found += 1
            assert re.search(rf"(def|class) {name.split('.')[-1]}\b", text), f"Eq. {number}: {name}"
    assert found >= 6


def test_readme_lists_every_preset_and_operator():
    text = README.read_text()
    quoted = set(re.findall(r"`(\w+)`", text))
    assert set(PRESETS) <= quoted
    assert {name for name in quoted if name.startswith(("ade20k", "cityscapes", "pascal_context"))} <= set(PRESETS)
    operators = {name for name in unept.kernels.__all__ if callable(getattr(unept.kernels, name))}
    assert operators - {"use_backend", "requested_backend", "set_default_backend"} <= quoted


def test_options_of_the_paper_exist_under_their_names():
    """Every option of the table in docs/paper.md is one of a run, and is an argument where the last column says so."""
    text = (ROOT / "docs" / "paper.md").read_text().partition("## Options")[2]
    known = {field.name for kind in (ModelConfig, TrainConfig) for field in dataclasses.fields(kind)}
    rows = re.findall(r"^\| `--([\w-]+)` \| .* \|(.*)\|$", text, re.M)
    assert len(rows) >= 15
    for option, arguments in ((name.replace("-", "_"), arguments) for name, arguments in rows):
        assert option in known, option
        for kind in re.findall(r"`(UNEPT\w*)`", arguments):
            assert option.removeprefix("loss_") in inspect.signature(getattr(unept, kind)).parameters, (option, kind)
    assert released_differences() <= {name.replace("-", "_") for name, _ in rows}, (
        "an option of the released presets is not described"
    )


def released_differences() -> set[str]:
    """The options in which a preset of the released code differs from the paper's."""
    paper, released = (vars(PRESETS[name]().model) for name in ("ade20k_deit", "ade20k_deit_released"))
    return {name for name, value in paper.items() if released[name] != value}


# --- the drawing ------------------------------------------------------------------------------------------------------


def test_drawing_is_what_the_script_draws():
    script = runpy.run_path(str(ROOT / "docs" / "draw_network.py"))
    assert script["TARGET"] == ROOT / "docs" / "network.svg"
    assert script["TARGET"].read_text(encoding="utf-8") == script["draw"](), "run python docs/draw_network.py"


def test_drawing_names_files_that_exist():
    drawing = ElementTree.parse(ROOT / "docs" / "network.svg")
    files = {element.text for element in drawing.iter() if element.get("class") == "file"}
    assert {"loss.py", "kernels/sparse_attention/"} < files
    for name in files:
        assert (ROOT / "unept" / "model" / name).exists() or ("/" in name and (ROOT / name).exists()), name
