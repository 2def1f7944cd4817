"""Exported files give what the model gives, at sizes and batches that the export has not seen."""

import functools
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.test_docs import blocks
from unept import UNEPT, export
from unept.export import SUFFIX
from unept.kernels import use_backend
from unept.model import exportable
from unept.model.backbone import Backbone
from unept.model.boundary import Refinement
from unept.model.exportable import DECOMPOSITIONS, WholeImage, export_program
from unept.model.output import class_ids

CPU = torch.device("cpu")
EXPORT = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.fixture(scope="module")
def model() -> UNEPT:
    """A small network whose samples, boundaries and directions vary, as a trained one's do."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "num_heads": 4, "num_levels": 2, "num_points": 2, "ffn_dim": 32}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    model = UNEPT(5, "resnet10t", output_stride=32, classes=list("abcde"), **sizes, **layers).eval()
    for name, parameter in model.named_parameters():
        if "sampling" in name or "head" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def noise(*size: int) -> torch.Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8)


def test_backbone_whose_poolings_keep_the_size(tmp_path):
    """At the paper's stride of 8 this ResNet pools with "same" padding."""
    sizes = {"d_model": 16, "num_heads": 2, "num_levels": 1, "num_points": 1, "ffn_dim": 16}
    network = WholeImage(UNEPT(3, "resnet10t", **sizes, num_encoder_layers=1, num_decoder_layers=1).eval(), "ids", None)
    export.write(export_program(network), "torch-export", tmp_path / "model.pt2")
    assert export.check(network, export.load("torch-export", tmp_path / "model.pt2", CPU)) == 0


@pytest.mark.parametrize("normalised", [True, False])
def test_attention_in_pytorchs_own_operators(normalised):
    shapes = [5, 7, 3, 4]
    value, scores = torch.randn(2, 47, 3, 6), torch.randn(2, 9, 3, 2, 4)
    points = 3 * torch.randn(2, 9, 3, 2, 4, 2) if normalised else 1.4 * torch.rand(2, 9, 3, 2, 4, 2) - 0.2
    reference = torch.rand(1, 9, 2) if normalised else None
    op = torch.ops.unept.sparse_sampling.default
    with use_backend("torch"):
        wanted = op(value, shapes, points, scores, reference)
    torch.testing.assert_close(DECOMPOSITIONS[op](value, shapes, points, scores, reference), wanted)


@pytest.mark.parametrize("shifted", [True, False])
def test_class_ids_in_pytorchs_own_operators(shifted):
    offset = torch.randint(-4, 5, (2, 2, 24, 32), dtype=torch.int16) if shifted else None
    op = torch.ops.unept.upsample_argmax.default
    arguments = torch.randn(2, 6, 3, 4), 24, 32, offset
    assert torch.equal(DECOMPOSITIONS[op](*arguments), op(*arguments))


def test_size_has_a_range():
    for size in ((-8, 64), (64, 0)):
        with pytest.raises(ValueError, match=r"size is -?\d+; it must be from 1 to 65536"):
            export.ExportConfig(Path("run"), size=size)


@pytest.mark.parametrize("size", [(64, 96), (70, 90), (33, 41), (128, 128)])
def test_whole_image_predicts_as_the_model_does(model, size):
    images = noise(2, 3, *size)
    with torch.no_grad():
        ids = WholeImage(model, "ids", Refinement(scale=2))(images)
        logits = WholeImage(model, "logits", Refinement(scale=2))(images)
        wanted = class_ids(model(images), size, Refinement(scale=2))
        plain = class_ids(model(images), size, None)
    # The image is padded to 32 here, not to 8: cells at the border see a little more of the padding.
    assert (ids == wanted).float().mean() > 0.98
    assert torch.equal(logits.argmax(1), ids)
    assert (plain != wanted).float().mean() > 0.02, "nothing to refine in this test"


def test_whole_image_crops_maps_of_every_resolution():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "num_heads": 4, "num_points": 2, "ffn_dim": 32, "boundary_upsampling": "subpixel"}
    model = UNEPT(5, "resnet10t", output_stride=8, logits_stride=2, **sizes).eval()
    images = noise(1, 3, 35, 46)
    with torch.no_grad():
        ids, logits = (WholeImage(model, output, Refinement(4, 2, "mean"))(images) for output in ("ids", "logits"))
        wanted = model.predict(images, refine_scale=4, refine_steps=2, refine_direction="mean")
    assert torch.equal(ids, wanted)
    assert torch.equal(logits.argmax(1), wanted)


@pytest.mark.parametrize("size", [(64, 96), (70, 90)])
def test_same_padding_is_that_of_all_sizes(size):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "num_heads": 4, "num_points": 2, "ffn_dim": 32}
    network = WholeImage(UNEPT(5, "tf_efficientnet_lite0", **sizes).eval(), "logits")
    fixed = exportable.with_fixed_padding(network)
    with torch.no_grad():
        torch.testing.assert_close(fixed(images := noise(1, 3, *size)), network(images))
    changed = [module for module in fixed.modules() if "forward" in vars(module)]
    assert len(changed) == 5  # one for each halving
    assert not [module for module in network.modules() if "forward" in vars(module)]


@pytest.fixture(scope="module")
def exported(model):
    """The network with an output and its program for any size, exported once: that takes 20 seconds."""

    @functools.cache
    def make(output: str) -> tuple[WholeImage, torch.export.ExportedProgram]:
        network = WholeImage(model, output, Refinement(scale=4, direction="mean")).eval()
        return network, export_program(network)

    return make


# Class ids say whether the logits are right, and each output is exported in 20 seconds.
outputs = pytest.mark.parametrize(
    "output", [pytest.param("ids", marks=pytest.mark.slow), pytest.param("logits", marks=pytest.mark.exhaustive)]
)


def assert_gives_what_the_model_gives(network, function):
    for size in ((1, 3, 65, 200), (5, 3, 96, 40)):
        images = noise(*size)
        with torch.no_grad():
            found, wanted = function(images), network(images)
        assert found.shape == wanted.shape
        if network.output == "ids":
            assert (found == wanted).float().mean() > 0.999
        else:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@outputs
def test_program_needs_nothing_of_this_package(exported, output):
    _, program = exported(output)
    assert "unept" not in {str(node.target).split(".")[0].split("::")[0] for node in program.graph.nodes}


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
@outputs
def test_file_gives_what_the_model_gives(exported, tmp_path, output, format):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    network, program = exported(output)
    path = tmp_path / "new" / f"model{SUFFIX[format]}"
    export.write(program, format, path)
    function = export.load(format, path, CPU)
    assert export.check(network, function) <= (1e-3 if output == "ids" else 1e-5)
    assert_gives_what_the_model_gives(network, function)


@pytest.mark.exhaustive  # four minutes of a C++ compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_machine_code_gives_what_the_model_gives(exported, tmp_path):
    network, program = exported("logits")
    path = tmp_path / "model.aoti.pt2"
    export.write(program, "aoti", path)
    assert export.check(network, export.load("aoti", path, CPU)) <= 1e-5


@pytest.mark.exhaustive
def test_one_size(model, tmp_path):
    network = WholeImage(model)
    program = export_program(network, (70, 90))
    export.write(program, "torch-export", tmp_path / "model.pt2")
    function = export.load("torch-export", tmp_path / "model.pt2", CPU)
    assert export.check(network, function, (70, 90)) <= 1e-3
    with pytest.raises(AssertionError, match="size"):
        function(noise(1, 3, 90, 70))


@pytest.mark.exhaustive
def test_lines_for_openvino_and_int8(exported, tmp_path, monkeypatch):
    """The lines of docs/export.md, on a file at the place that they name."""
    pytest.importorskip("onnxruntime")
    network, program = exported("ids")
    monkeypatch.chdir(tmp_path)
    export.write(program, "onnx", Path("runs/small/model.onnx"))
    images = noise(1, 3, 65, 200)
    with torch.no_grad():
        wanted = network(images)
    names = {"images": images.numpy(), "calibration": [noise(1, 3, 96, 128).numpy() for _ in range(2)]}
    openvino, int8 = (text for _, language, text in blocks(EXPORT) if language == "python")
    exec(compile(int8, EXPORT.name, "exec"), names)
    found = export.load("onnx", Path("int8.onnx"), CPU)(images)
    assert found.shape == wanted.shape
    assert (found == wanted).float().mean() > 0.5  # of 5 classes, of a network with random weights
    pytest.importorskip("openvino")
    exec(compile(openvino, EXPORT.name, "exec"), names)
    assert (torch.from_numpy(names["ids"]) == wanted).float().mean() > 0.9  # in bfloat16 on some CPUs


def test_what_takes_too_long_is_stopped():
    with pytest.raises(ValueError, match=r"can't be exported\. The reason given: not done after 0 minutes"):  # noqa: SIM117
        with exportable.explain_failure("exported"), export.time_limit(0):
            time.sleep(60)


def test_a_wrong_file_is_found(model):
    ids, logits = WholeImage(model, "ids"), WholeImage(model, "logits")
    with pytest.raises(ValueError, match=r"differs from the model by 0\.\d+: do not use it"):
        export.check(ids, lambda images: (ids(images) + (images[:, 0] < 5)) % 5)
    with pytest.raises(ValueError, match=r"differs from the model by 0\.01"):
        export.check(logits, lambda images: logits(images) * 1.01)
    with pytest.raises(ValueError, match=r"differs from the model by nan"):
        export.check(logits, lambda images: logits(images) * float("nan"))
    with pytest.raises(ValueError, match=r"gives torch\.int32"):
        export.check(ids, lambda images: ids(images).int())


def test_what_cannot_be_exported_says_why(monkeypatch, model):
    forward = Backbone.forward

    def looks(self, images):
        if images.sum() > 0:
            return forward(self, images)
        return forward(self, -images)

    monkeypatch.setattr(Backbone, "forward", looks)
    with pytest.raises(ValueError, match=r"exported for any size; --size H W is simpler\. The reason given: \w+"):
        export_program(WholeImage(model))


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "is_installed", lambda name: name != "onnxscript")
    with pytest.raises(ValueError, match="needs onnxscript: pip install onnxscript"):
        export.write(None, "onnx", tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "torch-export", "--out", "model"], "out is model; give a file whose name ends in .pt2"),
        (["--format", "aoti", "--out", "model.bin"], "ends in .pt2"),
        (["--out", "folder"], "ends in .onnx"),
        ([], "needs onnxscript: pip install onnxscript"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_export(arguments, message, model, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(export, "is_installed", lambda name: name != "onnxscript")
    monkeypatch.setattr(export, "export_program", lambda *_: pytest.fail("minutes have passed"))
    monkeypatch.setattr(sys, "argv", ["unept-export", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as ended:
        export.main()
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def save_as_validated(model, folder, **options):
    """Save a model as a run saves it that validated with these options."""
    model.preprocessing.update(options)
    try:
        model.save_pretrained(folder)
    finally:
        for name in options:
            del model.preprocessing[name]


@pytest.mark.slow  # the converter to ONNX takes half a minute
def test_command(exported, model, tmp_path, monkeypatch, capsys):
    """The default format and output; the program, whose export other tests cover, is the one that these have made."""
    pytest.importorskip("onnxruntime")
    network, program = exported("ids")
    requests = []
    monkeypatch.setattr(export, "export_program", lambda network, size: requests.append((network, size)) or program)
    save_as_validated(model, tmp_path / "model", window=64, short_side=48)
    path = tmp_path / "new" / "small.onnx"
    arguments = [str(tmp_path / "model"), "--refine-scale", "4", "--refine-direction", "mean", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", ["unept-export", *arguments])
    with pytest.raises(SystemExit) as ended:
        export.main()
    assert ended.value.code == 0
    [(asked, size)] = requests
    assert (asked.output, asked.refinement, size) == ("ids", network.refinement, None)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{path}  ")
    assert out[1].endswith("H and W over 32; gives class ids, int64 (B, H, W), refined by up to 4 px")
    assert out[2] == "not in it, though the model was validated so: short_side 48, window 64"
    assert out[3].startswith("checked against the model at 3 sizes: ")
    assert_gives_what_the_model_gives(network, export.load("onnx", path, CPU))


@pytest.mark.slow
def test_command_with_what_the_model_was_validated_with(model, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "model"
    save_as_validated(model, saved, window=64, short_side=48, refine=False)
    monkeypatch.setattr(sys, "argv", ["unept-export", str(saved), "--format", "torch-export", "--output", "logits"])
    with pytest.raises(SystemExit) as ended:
        export.main()
    assert ended.value.code == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{saved / 'model.pt2'}  ")
    assert out[1].endswith("H and W over 32; gives logits, float32 (B, 5, H, W), not refined")
    assert out[2] == "not in it, though the model was validated so: short_side 48, window 64"
    assert out[3].startswith("checked against the model at 3 sizes: ")
    assert (saved / "model.pt2").stat().st_size > 1e6
