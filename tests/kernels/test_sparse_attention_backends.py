"""How sparse sampling attention is computed: the forms of the Triton kernels, the blocks of the torch backend."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.attention import attention, check, deformable, make_case
from unept.kernels import use_backend
from unept.kernels.sparse_attention import force_form, torch_backend, triton_value_binned
from unept.kernels.sparse_attention.forms import should_pad
from unept.kernels.sparse_attention.triton_arguments import Samples, make_samples, query_order, scale_block_q
from unept.kernels.sparse_attention.triton_backward import POINTS_POOL
from unept.kernels.sparse_attention.triton_forward import FORWARD_POOL
from unept.kernels.sparse_attention.triton_value_binned import images_at_a_time

# --- the forms of the Triton kernels ----------------------------------------------------------------------------------

# How the Triton kernels read maps and add up the gradient of the value.
FORMS = {"padded, binned": (True, "binned"), "masked, atomic": (False, "atomic")}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def form(request):
    padded, method = request.param
    with force_form(padded=padded, value_gradient=method), use_backend("triton"):
        yield "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.float16))],
    ids=str,
)
def test_every_form_of_the_kernels(form, dtype):
    check(attention, make_case(batch=1, queries=70, heads=2, levels=3, num_points=5, channels=7).to(form, dtype))


def test_every_form_of_ms_deform_attn(form):
    check(deformable, make_case(queries=9, num_points=4, normalised=True).to(form, torch.float32))


def test_every_form_with_all_samples_on_one_pixel_and_outside(form):
    case = make_case(batch=1, queries=90, heads=1, levels=2).to(form, torch.float32)
    with torch.no_grad():
        case.inputs["reference_points"].fill_(0.37)
        case.inputs["offsets"].fill_(0.25)
        for query, number in enumerate([float("nan"), float("inf"), float("-inf"), 1e30, -(2.0**63), 9.5, -9.5]):
            case.inputs["offsets"][0, query, :, 0, 0, query % 2] = number
    check(attention, case)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_values_at_the_edge_do_not_leak_into_samples_outside(form, value):
    case = make_case(batch=1, queries=4, heads=1, levels=1, num_points=2).to(form, torch.float32)
    with torch.no_grad():
        case.inputs["value"].fill_(value)
        case.inputs["offsets"][:, ::2] = -50
        case.inputs["offsets"][:, 1::2] = 50
    assert (attention(case) == 0).all()


def test_images_are_binned_a_few_at_a_time(form, monkeypatch):
    case = make_case(batch=3, queries=9, heads=2).to(form, torch.float32)
    monkeypatch.setattr(triton_value_binned, "MAX_RECORD_BYTES", 16 * 2 * 9 * 2 * 2 * 3)
    monkeypatch.setattr(triton_value_binned, "free_bytes", lambda device: 0)
    check(attention, case)


def test_rounds_of_binning_follow_the_free_memory(monkeypatch):
    points, scores = torch.empty(16, 100, 8, 3, 16, 2, device="meta"), torch.empty(16, 100, 8, 3, 16, device="meta")
    shapes = (8, 8) * 3
    samples = make_samples(shapes, points, scores, None)
    images = 16 * samples.per_image
    assert images_at_a_time(shapes, samples) == 16, "few records: in one round"
    monkeypatch.setattr(triton_value_binned, "MAX_RECORD_BYTES", 3 * images)
    for free, expected in ((0, 3), (4 * 5 * images, 5), (1 << 40, 16)):
        monkeypatch.setattr(triton_value_binned, "free_bytes", lambda device, free=free: free)
        assert images_at_a_time(shapes, samples) == expected
    monkeypatch.setattr(Samples, "per_image", property(lambda self: 2**29))
    assert images_at_a_time(shapes, samples) == 3, "32-bit integers count the records of a round"


def test_tiles_of_twice_the_size_are_tried_for_packed_heads_of_64_channels_only():
    def tiles(pool, **arguments):
        return {(config.kwargs["BLOCK_Q"], config.num_warps) for config in (scale_block_q(c, arguments) for c in pool)}

    for pool, double in ((FORWARD_POOL, (16, 1)), (POINTS_POOL, (8, 1))):
        assert double in tiles(pool, WORDS=32, PACKED=True)
        for other in ({"WORDS": 16, "PACKED": True}, {"WORDS": 64, "PACKED": False}, {"WORDS": 128, "PACKED": True}):
            assert len(tiles(pool, **other)) == len(pool) - 1, "no configuration more than before"


def test_maps_are_copied_for_many_samples_only():
    dense, few = 3 * 60 * 60, 300
    value = torch.empty(1, dense, 8, 32, dtype=torch.bfloat16, device="meta")
    assert should_pad(value, torch.empty(1, dense, 8, 3, 16, 2, device="meta"))
    assert not should_pad(value, torch.empty(1, few, 8, 4, 4, 2, device="meta"))


def test_a_form_is_forced_inside_the_block_only():
    value, points = torch.empty(1, 4, 1, 1), torch.empty(1, 100, 1, 1, 1, 2)
    assert should_pad(value, points)
    with force_form(padded=False):
        assert not should_pad(value, points)
        with force_form(value_gradient="atomic"):
            assert should_pad(value, points)
        assert not should_pad(value, points)
    assert should_pad(value, points)
    message = "value_gradient is 'sorted'; it must be one of 'binned', 'atomic', or None"
    with pytest.raises(ValueError, match=message), force_form(value_gradient="sorted"):
        pass


def test_queries_of_a_grid_are_taken_in_blocks():
    order = query_order((10, 12, 3, 4), 132, torch.device("cpu"))
    assert sorted(order.tolist()) == list(range(132))
    rows, columns = order[:64] // 12, order[:64] % 12
    assert rows.max() == 7
    assert columns.max() == 7
    assert order[120:].min() == 120
    assert torch.equal(query_order((10, 12), 7, torch.device("cpu")), torch.arange(7).int())


# --- the table and blocks of the torch backend ------------------------------------------------------------------------


def test_torch_backend_in_chunks(monkeypatch):
    monkeypatch.setattr(torch_backend, "MAX_TEMPORARY", 1)
    with use_backend("torch"):
        check(attention, make_case().to("cpu", torch.float64))


@pytest.mark.parametrize("limit", [1, 500, 1500, 5000])
def test_torch_backend_in_blocks_of_queries_heads_and_images(monkeypatch, limit):
    """A block ends between queries, between heads, between images, in the backward with enough samples for its rows."""
    monkeypatch.setattr(torch_backend, "MAX_TEMPORARY", limit)
    with use_backend("torch"):
        check(attention, make_case(queries=60, levels=1).to("cpu", torch.float64))


@pytest.mark.parametrize("width", [176, 177])
def test_torch_backend_where_rows_pass_16_bits(width):
    """The wider map, in its frame of zeros, has more rows than 16 bits number."""
    with use_backend("torch"):
        check(attention, make_case(batch=1, heads=1, shapes=[(180, width)]).to("cpu", torch.float64))


@pytest.mark.parametrize("map_size", [0, 50])
@pytest.mark.parametrize("limit", [0, 1, 7, 25, 60, 130, 10_000])
def test_blocks_hold_every_query_once_and_whole_maps_in_order(limit, map_size):
    points = torch.empty(3, 5, 4, 1, 2, 2)
    maps = torch.arange(3 * 4).view(3, 4)
    seen = torch.zeros(3, 5, 4)
    for block in torch_backend.blocks(points, limit, map_size):
        images, _, heads = block
        seen[block] += 1
        assert points[block].numel() // 2 <= max(limit, 2)
        number = maps[images, heads].flatten()
        assert torch.equal(number, torch.arange(len(number)) + number[0])
        assert len(number) * map_size <= max(limit, map_size)
    assert (seen == 1).all()


class LargestTensor(TorchDispatchMode):
    """Finds the elements of the largest tensor that is made, apart from those of given shapes and views of them."""

    def __init__(self, shapes: list[torch.Size], known: list[Tensor]):
        super().__init__()
        self.shapes, self.elements = shapes, 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:  # a sparse one holds tensors seen here
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() in self.known:
                continue
            if tensor.shape in self.shapes:
                self.known.add(storage.data_ptr())
            else:
                self.elements = max(self.elements, storage.nbytes() // tensor.element_size())
        return made


def test_torch_backend_bounds_its_temporaries(monkeypatch):
    monkeypatch.setattr(torch_backend, "MAX_TEMPORARY", 1 << 12)
    case = make_case(batch=2, queries=1500, heads=3, levels=1)
    flat = list(case.spatial_shapes[0])
    value, *others = (tensor.detach() for tensor in case.inputs.values())
    out_shape = torch.Size((2, 1500, 3, value.shape[-1]))
    known = [value, *others, case.grad_out]
    with LargestTensor([out_shape, value.shape, *(t.shape for t in others)], known) as largest:
        torch_backend.forward(value, flat, *others)
        torch_backend.backward(case.grad_out, value, flat, *others, True, True)
    assert 0 < largest.elements <= 1 << 12
