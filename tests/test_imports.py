"""The floors of the package: `import unept` is light, commands import libraries and never the reverse, no circles."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = {f"unept.{name}" for name in ("train", "evaluate", "predict", "demo", "visualize", "submission", "export")}
# Prints what `import unept` adds to torch and timm: seconds of CPU time, and those of the heavy modules that it loads.
MEASURE = """
import sys, time
import torch, timm
start = time.process_time()
import unept
print(time.process_time() - start)
print(*{"tyro", "matplotlib", "tensorboard", "unept.cli", "wandb", "mlflow", "albumentations"} & set(sys.modules))
"""


def modules() -> dict[str, Path]:
    """Every module of the package by name."""
    found = {}
    for path in (ROOT / "unept").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if not name.startswith("unept.kernels.")}


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules of the package that a module imports when it is imported itself, however they are spelled, or for
    the types of its annotations."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    body = ast.parse(path.read_text()).body
    guarded = [inner for node in body if isinstance(node, ast.If | ast.Try) for inner in node.body]
    for node in [*body, *guarded]:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            ancestors = package.split(".")
            start = ".".join(ancestors[: len(ancestors) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (start, node.module)))
            inner = {f"{module}.{alias.name}" for alias in node.names} & known
            found |= inner or {module}
    return (found & known) - {name}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path, set(known)) for name, path in known.items()}


def test_the_graph_sees_every_kind_of_import(graph):
    assert {"unept.model.network", "unept.segmenter"} <= graph["unept"]
    assert "unept.model.output" in graph["unept.inference"]
    assert "unept.cli" in graph["unept.predict"]  # from . import cli
    assert "unept.pretrained" in graph["unept.cli"]


def test_there_is_no_circle(graph):
    waiting = {name: set(imported) for name, imported in graph.items()}
    while ready := [name for name, imported in waiting.items() if not imported & waiting.keys()]:
        for name in ready:
            del waiting[name]
    assert not waiting


def test_no_library_imports_a_command(graph):
    for name, imported in graph.items():
        assert name in COMMANDS or not imported & COMMANDS, name


def test_the_model_stands_alone(graph):
    """The network, its loss and its files need no data set, no options and no command."""
    for name, imported in graph.items():
        if name.startswith("unept.model"):
            others = {other for other in imported if not other.startswith("unept.model")}
            assert others <= {"unept.kernels", "unept.colors", "unept.files", "unept.validation"}, name


def test_importing_the_package_is_light():
    seconds = []
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", MEASURE]
    for _ in range(3):  # the first one may compile the sources
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        first, heavy = done.stdout.split("\n")[:2]
        assert heavy == ""
        seconds.append(float(first))
        if seconds[-1] < 0.3:
            break
    assert min(seconds) < 0.3


def test_former_places_of_documented_names():
    from unept import attention
    from unept.model.attention import SparseSamplingAttention

    assert attention.SparseSamplingAttention is SparseSamplingAttention
