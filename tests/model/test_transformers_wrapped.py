"""A patched model of transformers, saved, copied, replicated and wrapped: what runs is this project's operator."""

import copy
import functools
import io
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.model.test_transformers import build, inputs
from unept.integrations import transformers as integration
from unept.integrations.transformers import patch, unpatch

NAMES = ["Deformable DETR", "RT-DETRv2", "D-FINE", "Mask2Former"]  # each of the ways to reach the operator


@pytest.fixture
def calls(monkeypatch):
    """The shape of the value at every call of this project's operator by a patched model."""
    seen = []

    def counted(value, *others):
        seen.append(value.shape)
        return counted.original(value, *others)

    counted.original = integration.ms_deform_attn
    monkeypatch.setattr(integration, "ms_deform_attn", counted)
    return seen


def run(model, name):
    with torch.no_grad():
        return model(**inputs(name))[0]


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_copied(name, calls):
    theirs, ours = build(name)
    expected, number = run(theirs, name), patch(ours)
    for module in ours.modules():
        module._forward_hooks.clear()  # transformers' own on a Swin backbone can't be pickled
    for make in (saved_and_loaded, copy.deepcopy):
        again = make(ours)
        calls.clear()
        torch.testing.assert_close(run(again, name), expected, rtol=1e-3, atol=1e-4)
        assert len(calls) >= number, make
        assert patch(again) == number
    assert unpatch(again) == number
    calls.clear()
    run(again, name)
    assert not calls


@pytest.mark.slow
def test_another_process_reads_what_was_saved(tmp_path):
    ours = build("RT-DETRv2")[1]
    patch(ours)
    torch.save(ours, tmp_path / "model.pt")
    code = "import sys, torch; from unept.integrations.transformers import unpatch\n"
    code += "print(unpatch(torch.load(sys.argv[1], weights_only=False)))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2"]


@pytest.mark.parametrize("name", ["Deformable DETR", "Mask2Former"])
def test_replicas_have_their_own_parameters(name, calls):
    """What `nn.DataParallel` makes of each module on its way to several GPUs."""
    ours = build(name)[1]
    patch(ours)
    for module in ours.modules():
        replica = module._replicate_for_data_parallel()
        assert type(replica) is type(module)
        if "forward" not in vars(module):
            assert replica.forward.__self__ is replica
    assert not calls


def wrap(module: nn.Module, keep: bool) -> None:
    """Put a forward of one's own on a module, as hooks of other libraries do."""
    old = module.forward
    if keep:
        module._old_forward = old  # as accelerate keeps it

    def new(module, *args, **kwargs):
        return (module._old_forward if keep else old)(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(new, module), old)


def attention_modules(model):
    """The modules that patch changes."""
    copied = copy.deepcopy(model)
    patch(copied)
    pairs = zip(model.modules(), copied.modules(), strict=True)
    return [module for module, other in pairs if type(module) is not type(other)]


@pytest.mark.parametrize("name", ["Deformable DETR", "Mask2Former"])
def test_a_wrapper_that_is_there_already_stays(name, calls):
    ours = build(name)[1]
    modules = attention_modules(ours)
    for module in modules:
        wrap(module, keep=True)
    forwards = [module.forward for module in modules]
    assert patch(ours) == patch(ours) == len(modules)
    run(ours, name)
    assert len(calls) >= len(modules)
    assert [module.forward for module in modules] == forwards
    assert unpatch(ours) == len(modules)
    calls.clear()
    run(ours, name)
    assert not calls


def test_a_wrapper_that_would_go_on_calling_the_original_is_refused():
    ours = build("Deformable DETR")[1]
    last = attention_modules(ours)[-1]
    wrap(last, keep=False)
    with pytest.raises(
        ValueError, match=r"the forward of model.decoder.* was replaced on the module by .*patch the model"
    ):
        patch(ours)
    assert unpatch(ours) == 0
    del last.forward
    patch(ours)
    wrap(last, keep=False)
    assert patch(ours) == 3


def test_another_kernel_in_place_of_ours_is_noticed():
    ours = build("Deformable DETR")[1]
    patch(ours)
    other = attention_modules(build("Deformable DETR")[0])[0]
    next(module for module in ours.modules() if type(module).__name__ == type(other).__name__).forward = other.forward
    with pytest.raises(ValueError, match="does not call the operator"):
        patch(ours)


def test_accelerate(calls):
    hooks = pytest.importorskip("accelerate.hooks")
    for patched_first in (True, False):
        theirs, ours = build("Deformable DETR")
        expected = run(theirs, "Deformable DETR")
        if patched_first:
            patch(ours)
        for module in ours.modules():
            hooks.add_hook_to_module(module, hooks.ModelHook())
        assert patch(ours) == 3
        calls.clear()
        torch.testing.assert_close(run(ours, "Deformable DETR"), expected, rtol=1e-3, atol=1e-4)
        assert len(calls) == 3
        hooks.remove_hook_from_submodules(ours)
        assert patch(ours) == 3
        run(ours, "Deformable DETR")
        assert len(calls) == 6


def test_peft(calls):
    peft = pytest.importorskip("peft")
    for patched_first in (True, False):
        ours = build("Deformable DETR")[1]
        if patched_first:
            patch(ours)
        # In a list, since PEFT asks a model of transformers for its word embeddings, and this one has none.
        adapted = torch.nn.ModuleList([ours])
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["value_proj", "output_proj"], r=2), adapted)
        assert patch(adapted) == 3
        calls.clear()
        ours(**inputs("Deformable DETR"))[0].sum().backward()
        assert len(calls) == 3
        lora = [p for n, p in adapted.named_parameters() if p.requires_grad and "lora_B" in n and "value_proj" in n]
        assert lora
        assert all(p.grad.abs().max() > 0 for p in lora)
        assert patch(copy.deepcopy(adapted)) == 3
