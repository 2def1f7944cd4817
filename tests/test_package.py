"""What is distributed: a wheel and an sdist that hold what they should, and every way to install works.

`kernels/` is imported as `unept.kernels`. In a clone the link `unept/kernels` leads there, elsewhere setuptools puts
the files into place; each of the ways below must lead to a package whose operators run.
"""

import importlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"unept": "unept", "kernels": "unept/kernels"}
DEMO_MODEL = {f"unept/assets/camvid_tiny/{name}" for name in ("README.md", "config.json", "model.safetensors")}
TESTED_TOO = (
    "tests",
    "bench",
    "docs",
    ".ci",
    ".dockerignore",
    "Dockerfile",
    "mkdocs.yml",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
)  # an sdist has them
DISTRIBUTED = ("unept", "kernels", *TESTED_TOO, "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE")

# Run by a Python that has an installation of this project already: forget it, so that only what is tested is found.
FORGET_INSTALLATION = f"""
import importlib.metadata, pathlib, sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
sys.path = [path for path in sys.path if path != {str(ROOT)!r}]
def distribution(name):
    for found in importlib.metadata.distributions(name=name):
        if name != "unept" or pathlib.Path(found.locate_file("")).resolve().is_relative_to(sys.argv[1]):
            return found
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.distribution = distribution
"""
# Print the files of both packages, after an operator of one and a command of the other have run. What only the commands
# need is not loaded before they are imported.
USE = """
import sys, unept, unept.kernels
assert not {"matplotlib", "tensorboard", "tyro"} & set(sys.modules)
import unept.predict, unept.submission
assert "matplotlib" not in sys.modules
import torch, unept.train
points = torch.tensor([[[0.5, 0.0]]])
assert unept.kernels.bilinear_gather(torch.tensor([[[[1.0, 3.0]]]]), points).item() == 2.0
unept.train.parse([])
print(unept.__file__, unept.kernels.__file__, unept.kernels.bilinear_gather.__code__.co_filename, unept.__version__)
"""


def declared_version() -> str:
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    return version


def sources() -> set[str]:
    """The modules of the packages, as a wheel names them."""
    return {
        f"{installed}/{path.relative_to(ROOT / folder)}"
        for folder, installed in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }


def run_python(code: str, cwd: Path, *arguments: str) -> str:
    """Run code in a new process whose import path begins with `cwd`; gives what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def files_used(folder: Path, cwd: Path, setup: str = "") -> list[str]:
    """The files of `unept` and `unept.kernels` that a process uses that finds them below `folder`; and the version."""
    *files, version = run_python(FORGET_INSTALLATION + setup + USE, cwd, str(folder.resolve())).split()
    assert all(Path(file).resolve().is_relative_to(folder.resolve()) for file in files), files
    return [*(str(Path(file).relative_to(folder)) for file in files), version]


def build(kind: str, source: Path, out: Path) -> Path:
    """Build `"wheel"`, `"sdist"` or `"editable"` of a source tree as pip does; gives the file."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    return out / run_python(code, source, str(out)).split()[-1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of what is distributed, so that builds leave nothing in the working tree."""
    folder = tmp_path_factory.mktemp("copy")
    for name in DISTRIBUTED:
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def wheel(copy, tmp_path_factory):
    return build("wheel", copy, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(copy, tmp_path_factory):
    return build("sdist", copy, tmp_path_factory.mktemp("sdist"))


def test_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (archive.read(name).decode() for name in names if name.endswith("/entry_points.txt"))
    assert len(names) == len(set(names))
    metadata = {name for name in names if ".dist-info/" in name}
    assert set(names) - metadata == sources() | {"unept/py.typed"} | DEMO_MODEL
    expected = {"METADATA", "WHEEL", "RECORD", "top_level.txt", "entry_points.txt", "LICENSE"}
    assert {Path(name).name for name in metadata} == expected
    scripts = dict(re.findall(r"^([\w-]+) = (.+)$", entry_points, re.M))
    commands = set(re.findall(r"-m unept\.(\w+)", (ROOT / "README.md").read_text()))
    assert commands == {"train", "evaluate", "predict", "demo", "visualize", "submission", "export"}
    assert scripts == {f"unept-{name}": f"unept.{name}:main" for name in commands}
    for name in commands:
        assert callable(importlib.import_module(f"unept.{name}").main)


@pytest.mark.slow
def test_wheel_works_where_it_is_installed(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*pip, str(wheel)], check=True)
    assert files_used(tmp_path, tmp_path) == [
        "unept/__init__.py",
        "unept/kernels/__init__.py",
        "unept/kernels/bilinear_gather.py",
        declared_version(),
    ]


def test_two_modules_import_matplotlib():
    importing = re.compile(r"^\s*(?:from|import) matplotlib", re.M)
    files = [file for file in (ROOT / "unept").rglob("*.py") if importing.search(file.read_text())]
    assert {str(file.relative_to(ROOT)) for file in files} == {
        f"unept/pictures/{name}.py" for name in ("drawing", "charts")
    }


def test_every_package_is_listed():
    """Else an installation would lack it, though tests in a clone would find it."""
    listed = re.findall(r'^    "(unept[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.M)
    packages = [Path(name).parent for name in sources() if name.endswith("/__init__.py")]
    assert sorted(listed) == sorted(str(package).replace("/", ".") for package in packages)


@pytest.mark.slow
def test_sdist(sdist, wheel, tmp_path):
    """It holds the sources and the tests, and what is built of it is what is built of a clone."""
    with tarfile.open(sdist) as archive:
        files = [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]
        archive.extractall(tmp_path, filter="data")
    assert len(files) == len(set(files))
    names = {name for name in files if not name.startswith("unept.egg-info/")}
    modules = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    tested_too = [path for name in TESTED_TOO for path in [ROOT / name, *(ROOT / name).rglob("*")] if path.is_file()]
    tested_too = {str(path.relative_to(ROOT)) for path in tested_too if path.suffix != ".pyc"}
    others = {"README.md", "LICENSE", "MANIFEST.in", "pyproject.toml", "PKG-INFO", "setup.cfg", "unept/py.typed"}
    assert names == modules | tested_too | others | DEMO_MODEL
    (unpacked,) = tmp_path.iterdir()
    with zipfile.ZipFile(build("wheel", unpacked, tmp_path)) as other, zipfile.ZipFile(wheel) as archive:
        assert {file.filename: file.CRC for file in other.infolist()} == {
            file.filename: file.CRC for file in archive.infolist()
        }


@pytest.mark.slow
@pytest.mark.parametrize("source", ["clone", "sdist"])
def test_editable_installation(copy, sdist, tmp_path, source):
    """Through the link in a clone, through a mapping of setuptools in an sdist, which has no link."""
    root = ROOT
    if source == "sdist":
        with tarfile.open(sdist) as archive:
            archive.extractall(tmp_path / "unpacked", filter="data")
        (root,) = (tmp_path / "unpacked").iterdir()
        assert not (root / "unept" / "kernels").exists()
    with zipfile.ZipFile(build("editable", copy if source == "clone" else root, tmp_path)) as archive:
        archive.extractall(tmp_path / "site")
    setup = f"import site; sys.path.insert(0, {str(tmp_path / 'site')!r}); site.addsitedir(sys.path[0])\n"
    *files, version = run_python(FORGET_INSTALLATION + setup + USE, tmp_path, str(tmp_path.resolve())).split()
    assert [str(Path(file).resolve().relative_to(root)) for file in files] == [
        "unept/__init__.py",
        "kernels/__init__.py",
        "kernels/bilinear_gather.py",
    ]
    assert version == declared_version()


@pytest.mark.slow
def test_git_archive_works_without_installing(tmp_path):
    """What `git archive` exports, which is what a clone holds, works from its root; its version is not known there."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    (tmp_path / "export").mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(tmp_path / "export")], input=archive, check=True)
    link = tmp_path / "export" / "unept" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"
    setup = "import kernels\n"
    assert files_used(tmp_path / "export", tmp_path / "export", setup) == [
        "unept/__init__.py",
        "unept/kernels/__init__.py",
        "unept/kernels/bilinear_gather.py",
        "0+unknown",
    ]


def test_version_is_the_same_everywhere():
    version = declared_version()
    assert f"## {version} " in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
