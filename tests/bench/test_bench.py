"""The benchmark's own machinery: gates, interleaving, what pytest-benchmark is told, the report and its targets."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from _pytest.mark.expression import Expression

from bench import (
    harness,
    host_waits,
    report,
    run,
    scaling,
    test_attention,
    test_boundary_targets,
    test_context_branch,
    test_dense,
    test_loader,
    test_model,
    training_step,
)
from bench.conftest import case_id
from bench.harness import Group, Measured, ReplayClock, Unavailable, Variant, assert_close, interleaved, measure
from unept.config import ModelConfig


def counting(name, log):
    return Variant(step=lambda: log.append(name), gate=lambda: log.append(f"gate {name}"))


def test_variants_are_gated_first_and_timed_in_turns(monkeypatch):
    monkeypatch.setattr(harness, "MIN_ROUND", 0.0)
    monkeypatch.setattr(harness, "ROUNDS", (3, 3))
    log: list[str] = []
    results = measure(Group("g", lambda name: counting(name, log), "a", max_rounds=3), ["a", "b"])
    assert log.index("gate a") < log.index("a")
    assert log[-6:] == ["a", "b", "a", "b", "a", "b"]
    assert [len(results[name].seconds) for name in "ab"] == [3, 3]


def test_a_variant_that_fails_its_gate_is_never_timed():
    log: list[str] = []

    def prepare(name: str) -> Variant:
        if name == "absent":
            raise Unavailable("pip install absent")
        variant = counting(name, log)
        if name == "wrong":
            variant.gate = lambda: assert_close(torch.ones(3), torch.zeros(3), "output")
        return variant

    results = measure(Group("g", prepare, "right", max_rounds=3), ["absent", "wrong", "right"])
    assert isinstance(results["absent"], Unavailable)
    assert isinstance(results["wrong"], AssertionError)
    assert isinstance(results["right"], Measured)
    assert "wrong" not in log


def test_rounds_last_long_enough(monkeypatch):
    monkeypatch.setattr(harness, "MIN_ROUND", 0.002)
    calls: list[int] = []
    samples = interleaved({"a": Variant(lambda: calls.append(0), lambda: None)}, max_rounds=3)
    assert len(calls) > 1000  # a call takes far less than a microsecond's thousandfold
    assert all(seconds < 0.002 for seconds in samples["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_tells_rounding_from_errors(dtype):
    exact = torch.randn(1000, dtype=torch.float64)
    actual = exact.to(dtype)
    assert_close(actual, exact, "output")
    for wrong in (actual * 1.02, actual.roll(1), torch.where(torch.arange(1000) == 7, torch.nan, actual)):
        with pytest.raises(AssertionError, match="output"):
            assert_close(wrong, exact, "output")
    with pytest.raises(AssertionError, match="shape"):
        assert_close(actual[:1], exact, "output")


@pytest.mark.parametrize("op", ["sparse_sampling_attention", "ms_deform_attn"])
def test_the_attention_gate_sees_one_wrong_query(op):
    case = test_attention.Case(op, "ResNet-50 encoder", 6, 2, torch.float32, "initial", backward=True, points=2)
    problem = test_attention.Problem(case)
    for name in ("unept torch", "grid_sample"):
        variant = test_attention.prepare(case, lambda: problem, name)
        with variant.context():
            variant.gate()
            variant.step()
    right = test_attention.function_of(case, "grid_sample", problem.maps, problem.reference)

    def wrong(*inputs):
        out = right(*inputs)
        scale = torch.ones_like(out)
        scale[-1, problem.checked[0]] = 1.001
        return out * scale

    with pytest.raises(AssertionError, match="max-abs"):
        problem.gate(wrong, None)


@pytest.mark.parametrize("op", ["bilinear_gather", "plain", "refined", "both", "argmax"])
def test_the_dense_gates_pass_the_ops_and_not_a_shifted_map(op, monkeypatch):
    monkeypatch.setattr(test_dense, "SIZE", 6)
    monkeypatch.setattr(test_dense, "FULL", 48)
    case = test_dense.Case(op, 5, 2, torch.float32, backward=op != "argmax")
    problem = test_dense.Problem(case)
    variant = test_dense.prepare(case, lambda: problem, "unept torch")
    with variant.context():
        variant.gate()
    right = test_dense.unfused(op)
    with pytest.raises(AssertionError):
        problem.gate(lambda first, *others: right(first.roll(1, -1), *others))


def test_the_share_of_the_bound_is_that_of_the_gpu_s_own_time(monkeypatch):
    monkeypatch.setattr(harness, "device_name", lambda: "NVIDIA H200")
    group = Group("g", lambda name: counting(name, []), "a", min_bytes=48 * 10**9)
    info = harness.extra_info(group, "a", Measured([1.0], 0.0, device_seconds=0.02))
    assert (info["gb_per_second"], info["device_seconds"], info["share_of_bound"]) == (48, 0.02, 0.5)
    # The host's time says nothing about the kernels.
    assert "share_of_bound" not in harness.extra_info(group, "a", Measured([1.0], 0.0))
    for name in ("GH200", "B200", "MI300X", "H100", "A100"):
        assert any(name in known for known in harness.BANDWIDTH)


def test_the_gpu_s_own_time_starts_when_everything_is_queued_and_l2_is_empty(monkeypatch):
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")

        def elapsed_time(self, end):
            return 3.0  # milliseconds

    flushed = SimpleNamespace(zero_=lambda: order.append("flush"))
    monkeypatch.setattr(harness, "DEVICE", "cuda")
    monkeypatch.setattr(torch, "empty", lambda size, **_: flushed if size >= 128 << 20 else None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append(f"sleep {cycles / harness.MAX_CLOCK:g}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    assert harness.device_seconds(lambda: order.append("step"), host_seconds=0.25, rounds=2) == 0.003
    assert order == ["sleep 0.5", "flush", "event", "step", "event", "wait"] * 2


def test_what_runs_on_the_cpu_has_no_time_of_the_gpu(monkeypatch):
    monkeypatch.setattr(harness, "device_seconds", lambda step, host_seconds: 1e-6)
    monkeypatch.setattr(test_boundary_targets, "DEVICE", "cpu")
    variants = {"ours": counting("a", []), "theirs": counting("b", [])}
    variants["theirs"].on_gpu = False
    results = measure(Group("g", variants.__getitem__, "ours", max_rounds=3), variants)
    assert results["ours"].device_seconds == 1e-6
    assert "device_seconds" not in harness.extra_info(Group("g", counting, "ours"), "theirs", results["theirs"])
    case = test_boundary_targets.Case("shapes", 1)
    assert not test_boundary_targets.prepare(case, "scipy").on_gpu
    assert test_boundary_targets.prepare(case, "unept torch").on_gpu


def test_the_clock_replays_samples():
    clock = ReplayClock()
    clock.load([0.5, 0.25])
    times = [clock()]
    for _ in range(2):
        clock.tick()
        times.append(clock())
    assert times == [0.0, 0.5, 0.75]


# --- report -----------------------------------------------------------------------------------------------------------


def write(path, rows, device="GPU"):
    """A JSON file as pytest-benchmark writes it; rows of (group, variant, seconds, more of extra_info)."""
    benchmarks = [
        {
            "group": group,
            "name": variant,
            "stats": {"median": seconds, "iqr": seconds / 10},
            "extra_info": {"variant": variant, "baseline": "slow", "device": device, "revision": "abc", **more},
        }
        for group, variant, seconds, more in rows
    ]
    path.write_text(json.dumps({"benchmarks": benchmarks}))
    return path


def test_ratios_refer_to_the_baseline_of_the_same_group(tmp_path):
    first = write(
        tmp_path / "1.json", [("g", "slow", 0.2, {}), ("g", "fast", 0.05, {"peak_mib": 12.4}), ("h", "fast", 1.0, {})]
    )
    second = write(
        tmp_path / "2.json",
        [("g", "fast", 0.1, {"share_of_bound": 0.5, "gb_per_second": 1234.5, "device_seconds": 0.02})],
    )
    text = report.table(report.read([first, second]))
    assert "| g | slow | 200 ms |  | 10% | 1.00 |" in text
    assert "| g | fast | 100 ms | 20 ms | 10% | 2.00 |  |  | 1.23e+03 | 50% |" in text  # the later file's
    assert "| h | fast | 1 s |  | 10% |  |" in text  # its group has no baseline


def test_results_of_two_devices_are_kept_apart_and_named(tmp_path):
    files = [write(tmp_path / f"{name}.json", [("g", "slow", t, {})], name) for name, t in (("A", 1.0), ("B", 2.0))]
    text = report.table(report.read(files))
    assert "- device: A, B (results of several are mixed here)" in text
    assert text.count("| g | slow |") == 2


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json holds no benchmarks"):
        report.read([tmp_path / "x.json"])


def test_targets_pass_and_miss(tmp_path):
    target = next(target for target in report.TARGETS if target.memory)
    rows = [(*target.slow, 10.0, {"peak_mib": 1000}), (*target.fast, 1.0, {"peak_mib": 200})]
    lines = report.check_targets(report.read([write(tmp_path / "1.json", rows)])).splitlines()
    assert lines == [
        "- pass: Eq. 7's segmentation terms against unfused, compiled: 10.00, target >= 5",
        "- MISS: the same, memory: 5.00, target >= 10",
    ]
    alone = next(target for target in report.TARGETS if target.slow is None)
    text = report.check_targets(report.read([write(tmp_path / "0.json", [(*alone.fast, 0.2e-3, {})])]))
    assert f"- pass: {alone.claim}: 0.20, target <= 0.3" in text
    context = next(target for target in report.TARGETS if target.claim.startswith("context branch"))
    rows = [(*context.slow, 4.5, {}), (*context.fast, 1.0, {})]
    assert report.check_targets(report.read([write(tmp_path / "2.json", rows)])).startswith("- MISS: context branch")
    rows = rows[1:]
    assert report.check_targets(report.read([write(tmp_path / "3.json", rows)])).startswith(
        "- not measured: context branch"
    )


MODULES = (test_attention, test_boundary_targets, test_dense, test_context_branch, test_loader, test_model)


@pytest.mark.parametrize("full", [False, True])
def test_no_two_groups_share_a_name(full):
    names = [c.name for m in MODULES for c in m.cases(full, "cpu")]
    assert len(names) == len(set(names))


# --- the command for a GPU --------------------------------------------------------------------------------------------


def test_files_of_the_steps_exist():
    for part in run.steps().values():
        for word in (word for step in part for word in step.command if word.startswith(("bench/", "tests"))):
            assert (run.ROOT / word.split("::")[0]).exists(), word


@pytest.mark.parametrize("full", [False, True])
def test_expressions_of_the_steps_select_cases_and_leave_none_out(full):
    """pytest raises UsageError for an expression that it cannot read."""
    steps = [step for part in run.steps().values() for step in part if step.measures and "-k" in step.command]
    for module in (test_attention, test_model):
        file = f"bench/{module.__name__.split('.')[-1]}.py"
        expressions = [step.command[step.command.index("-k") + 1] for step in steps if file in step.command]
        ids = [case_id(case.name).lower() for case in module.cases(full, "cpu")]
        selected = [[i for i in ids if selects(expression, i)] for expression in expressions]
        assert sorted(i for chosen in selected for i in chosen) == sorted(ids), "each once"
        assert all(selected) or not full


def selects(expression: str, case: str) -> bool:
    """Whether `pytest -k` selects a case with this id, in lower case."""
    return Expression.compile(expression).evaluate(lambda word, **_: word.lower() in case)


def test_a_step_that_passed_is_not_run_again_and_one_that_failed_is(tmp_path, monkeypatch, capsys):
    ran = tmp_path / "ran"

    def step(name: str, code: str) -> run.Step:
        return run.Step(name, [sys.executable, "-c", f"open({str(ran)!r}, 'a').write('{name} '); {code}"])

    parts = {
        "one": [step("good", "0"), step("bad", "raise SystemExit(3)")],
        "two": [step("slow", "import time; time.sleep(60)")],
    }
    monkeypatch.setattr(run, "steps", lambda: parts)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "STATE", tmp_path / "run.json")
    monkeypatch.setattr(run, "SECONDS", 2)
    for revision, arguments, expected in (
        ("abc", [], "good bad slow "),
        ("abc", ["--part", "one"], "bad "),
        ("abc", ["--part", "one", "--again"], "good bad "),
        ("def", ["--part", "one"], "good bad "),
        # Files that differ from a commit may have changed again.
        ("def-dirty", ["--part", "one"], "good bad "),
        ("def-dirty", ["--part", "one"], "good bad "),
    ):
        monkeypatch.setattr(run, "revision", lambda revision=revision: revision)
        ran.write_text("")
        monkeypatch.setattr(sys, "argv", ["bench.run", *arguments])
        assert run.main() == 1
        assert ran.read_text() == expected
    text = (tmp_path / "table.md").read_text()
    assert "- good: passed" in text
    assert "- bad: exit code 3" in text
    assert "- slow: stopped after 2 s" in text


def test_a_step_that_needs_a_gpu_is_passed_over_without_one(monkeypatch):
    monkeypatch.setattr(run, "DEVICE", "cpu")
    (waits,), (_, tests) = run.steps()["waits"], run.steps()["tests"]
    assert run.run(waits) == run.run(tests) == "passed over: PyTorch finds no GPU"


def test_steps_after_the_warm_up_may_not_wait(monkeypatch):
    """The steps are real ones on this device; what would raise the error on a GPU is a fake of `torch.cuda`."""
    modes: list[object] = [0]
    taken: list[object] = []
    train_step = host_waits.Trainer.train_step

    def noted(self, images, labels):
        taken.append(modes[-1])
        if len(taken) > 6:
            raise RuntimeError("called a synchronizing CUDA operation")
        return train_step(self, images, labels)

    monkeypatch.setattr(host_waits.Trainer, "train_step", noted)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    network = ModelConfig("resnet10t", pretrained_backbone=False, d_model=32, num_heads=2, num_points=2, ffn_dim=32)
    host_waits.take_steps(network, "off", crop=32, batch=2)
    assert taken == [0] * 3 + ["error"] * 3
    assert modes == [0, "error", 0]
    with pytest.raises(RuntimeError, match="synchronizing"), host_waits.no_host_waits():
        noted(None, None, None)
    assert modes[-1] == 0


def test_targets_name_groups_and_variants_that_exist():
    modules = (test_attention, test_boundary_targets, test_dense, test_context_branch, test_loader)
    known = {
        (case.name, v) for m in modules for full in (False, True) for case in m.cases(full, "cpu") for v in m.VARIANTS
    }
    for target in report.TARGETS:
        for where in filter(None, (target.slow, target.fast)):
            # The name of the context branch's group has the dtype of the device that this runs on.
            assert where in known or where[0].startswith("context branch"), where


def test_scaling_by_hand():
    """Two links: 4 processes in one machine hide 120 MB behind the backward, 16 over the network don't."""
    step = scaling.Step(images=2, seconds=0.03, gradient_bytes=120_000_000, norms=50)
    machine = scaling.Machine(gpus=8, link=100e9, network=5e9, latency=(10e-6, 40e-6))
    alone, inside, outside = (scaling.scaled(step, n, machine) for n in (1, 4, 16))
    assert (alone.all_reduce, alone.norms, alone.seconds, alone.efficiency) == (0, 0, 0.03, 1)
    assert inside.all_reduce == pytest.approx(1.8e-3)
    assert inside.seconds == pytest.approx(0.03 + 100 * 10e-6)
    assert outside.all_reduce == pytest.approx(45e-3)
    assert outside.seconds == pytest.approx(0.03 + 100 * 40e-6 + (45e-3 - 20e-3))
    rows = scaling.table(step, machine).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["1", "8", "64"]
    assert rows[1].split("|")[2].strip() == "16"


@pytest.mark.parametrize("bfloat16", [True, False])
def test_a_training_step_is_timed_in_parts_and_trains(bfloat16):
    step = training_step.Step(training_step.Options(batch=2, size=(64, 64), bfloat16=bfloat16))
    before = [parameter.detach().clone() for parameter in step.model.parameters()]
    parts = step.run()
    assert list(parts) == ["forward", "losses", "backward", "optimizer"]
    assert all(seconds > 0 for seconds in parts.values())
    assert any(not torch.equal(old, new) for old, new in zip(before, step.model.parameters(), strict=True))
