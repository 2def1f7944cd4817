"""The site of the documentation, the notebooks and the container, each where its tools are installed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


@pytest.mark.slow
def test_site(tmp_path):
    """It builds without a warning, and every link and picture of every page leads to a file or heading of the site."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    done = run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    pages = {path: path.read_text() for path in tmp_path.rglob("*.html") if path.name != "404.html"}
    assert {path.parent.name for path in pages} >= {tmp_path.name, "features", "contributing", "changelog", "paper"}
    for path, text in pages.items():
        for target in re.findall(r'(?:href|src)="([^"]*)"', text):
            link, _, anchor = target.partition("#")
            if re.match(r"\w+:", link):
                assert link.startswith("https://"), f"{path}: {target}"
                continue
            file = (path.parent / unquote(link)).resolve() if link else path
            file = file / "index.html" if file.is_dir() else file
            assert file.exists(), f"{path}: {target}"
            if anchor and file in pages:
                assert f'id="{unquote(anchor)}"' in pages[file], f"{path}: {target}"
    assert not list(tmp_path.rglob("*.py"))


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} | {"index.md", "contributing.md", "changelog.md"}
    assert listed == pages


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path):
    """Every cell runs, in an empty folder beside the picture that it opens."""
    client = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    shutil.copy(ROOT / "docs" / "street.jpg", tmp_path)
    (tmp_path / "notebooks").mkdir()
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    client.NotebookClient(notebook, timeout=1200, resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs
    if path.stem.startswith("predict"):
        assert sum("image/png" in output.get("data", {}) for output in outputs) == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_results(path):
    notebook = json.loads(path.read_text())
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook["cells"])
    for text in ("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"):
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert (path.parent / target).exists(), target


def test_container_copies_what_is_there():
    text = (ROOT / "Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for name in line.split()}
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "kernels", "unept"}
    assert {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.slow
def test_container_trains(tmp_path):
    if shutil.which("docker") is None or run(["docker", "info"]).returncode:
        pytest.skip("no engine that builds containers")
    built = run(["docker", "build", "--quiet", "."], timeout=3000)
    assert built.returncode == 0, built.stderr
    small = ["--iterations", "2", "--eval-every", "2", "--batch-size", "2", "--workers", "0", "--d-model", "32"]
    mount = ["--volume", f"{tmp_path}:/data", "--user", f"{os.getuid()}"]
    done = run(["docker", "run", "--rm", *mount, built.stdout.strip(), "unept.train", *small])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "shapes" / "model" / "model.safetensors").exists()
