"""The option --full, and the fixture that measures a group once and gives each of its variants its own samples."""

import pytest
import torch

from .harness import DEVICE, Group, Measured, ReplayClock, Unavailable, device_name, extra_info, measure

CLOCK = ReplayClock()


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        default=torch.cuda.is_available(),
        help="benchmark every shape at full size (default with a GPU; hours on a CPU)",
    )


def pytest_report_header(config):
    sizes = "full sizes" if config.getoption("--full") else "reduced sizes (--full runs all)"
    return f"bench: {device_name()}, {sizes}; caches are not flushed between iterations"


def case_id(name):
    """The name of a group as `pytest -k` can select it: in an expression there may be no "="."""
    return name.replace("=", "")


def pytest_generate_tests(metafunc):
    """A test with the arguments `case` and `variant` runs for each of its module's cases(full) and of VARIANTS."""
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.cases(metafunc.config.getoption("--full"), DEVICE)
        metafunc.parametrize("case", cases, ids=[case_id(case.name) for case in cases], scope="module")
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", metafunc.module.VARIANTS, scope="module")


def pytest_collection_modifyitems(items):
    for item in items:
        if "samples" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(scope="session")
def _measured():
    return {}


@pytest.fixture
def samples(benchmark, request, _measured):
    """Measure `case` once for all of its selected variants, and report this test's; returns all of the group's."""

    def replay(group: Group, package: str | None = None) -> dict[str, Measured | Exception]:
        case, name = (request.node.callspec.params[key] for key in ("case", "variant"))
        if group.name not in _measured:
            specs = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
            _measured[group.name] = measure(group, [s["variant"] for s in specs if s.get("case") is case])
        result = _measured[group.name][name]
        if isinstance(result, Unavailable):
            pytest.skip(str(result))
        if isinstance(result, Exception):
            raise result
        benchmark.group, benchmark.name = group.name, name
        benchmark.extra_info.update(extra_info(group, name, result, package))
        CLOCK.load(result.seconds)
        benchmark.pedantic(CLOCK.tick, rounds=len(result.seconds))
        return _measured[group.name]

    return replay
