"""What is distributed: a wheel and an sdist that hold what they should, and an installation that works."""

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


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), built by setuptools from a copy, so that nothing is left in the working tree."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in ("unept", "kernels", "tests", "bench", "docs", "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).symlink_to(ROOT / name)
    code = "import sys; from setuptools import build_meta as b; print(b.build_{}(sys.argv[1]))"
    for kind in ("sdist", "wheel"):
        command = [sys.executable, "-c", code.format(kind), str(out)]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_wheel(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == sources() | {"unept/py.typed"}
    written = {"METADATA", "WHEEL", "RECORD", "top_level.txt", "entry_points.txt", "LICENSE"}
    assert {Path(name).name for name in metadata} == written


def test_sdist(built):
    with tarfile.open(built[1]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    names = {name for name in names if not name.startswith(("unept.egg-info/", "tests/"))}  # setuptools adds tests
    modules = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    others = {"README.md", "LICENSE", "pyproject.toml", "PKG-INFO", "setup.cfg", "unept/py.typed"}
    assert names == modules | others


def test_wheel_works_where_it_is_installed(built, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*pip, str(built[0])], check=True)
    code = "import unept, unept.kernels, unept.train; print(unept.__file__, unept.__version__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version = declared_version()
    assert done.stdout.split() == [str(tmp_path / "unept" / "__init__.py"), version]


def test_version_is_the_same_everywhere():
    version = declared_version()
    assert f"## {version} " in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
