"""The pages under docs/ and README: what is marked as tested runs, one page after another; every command parses."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from unept import evaluate, export, predict, submission, train, visualize

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"(<!-- tested -->\n)?```(\w*)\n(.*?)```", re.S)
PARSERS = {
    "unept.train": train.parse,
    "unept.evaluate": lambda args: tyro.cli(evaluate.EvaluateConfig, args=args),
    "unept.predict": lambda args: tyro.cli(predict.PredictConfig, args=args),
    "unept.visualize": lambda args: tyro.cli(visualize.VisualizeConfig, args=args),
    "unept.submission": lambda args: tyro.cli(submission.SubmissionConfig, args=args),
    "unept.export": lambda args: tyro.cli(export.ExportConfig, args=args),
}


def blocks(page: Path) -> list[tuple[bool, str, str]]:
    """(is tested, language, text) of each."""
    return [(bool(mark), language, text) for mark, language, text in BLOCK.findall(page.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
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


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_every_command_parses(page):
    for module, *args in commands(page):
        PARSERS[module](args)


def test_there_are_commands_to_parse():
    assert len([command for page in [ROOT / "README.md", *PAGES] for command in commands(page)]) > 15


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES], ids=lambda page: page.stem)
def test_links_and_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for path in re.findall(r"`((?:unept|kernels|bench|tests|docs)/[\w./]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
