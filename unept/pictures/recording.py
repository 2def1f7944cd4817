"""Record what happens inside the network while it sees an image, for the pictures of `unept.visualize` (Appendix A-C).

Everything is read by forward hooks from one view of the image, at scale 1, which goes through the network as in
`unept.inference`. Letters: H, W height and width of an image, C channels, M heads, L levels, N points, T tokens of a
ViT.

Every map of the network covers the same part of the plane: the image and some padding to the right and below. `covered`
is its (height, width) in pixels of the image, so a point at the fraction f of a map lies at f * covered - 0.5.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..inference import InferenceConfig, infer
from ..model.attention import SparseSamplingAttention
from ..model.network import UNEPT
from ..model.output import padded_size

RECORDING = threading.Lock()  # one recording at a time, as each changes how the backbone's attention computes

Attention = Literal["decoder", "decoder-self", "encoder"]


class NotInModel(ValueError):
    """A picture was asked for that shows a part which this network does not have."""


class SampledPoints(NamedTuple):
    """The points that one query of a sparse sampling attention reads. Tensors are on the CPU."""

    query: tuple[float, float]
    """(x, y) of the query in pixels of the image."""
    xy: Tensor
    """(M, L, N, 2): (x, y) of the points in pixels of the image, pixel centres at integers."""
    weights: Tensor
    """(M, L, N): attention weights; those of a head sum to 1."""
    in_bounds: Tensor
    """(M, L, N) bool: whether a point reads any pixel of its map; one that does not counts as zero."""
    shapes: list[tuple[int, int]]
    """(H_l, W_l) of the maps."""
    covered: tuple[float, float]
    """(height, width) in pixels of the image that each map covers from the upper left corner, padding included."""


class Recording(NamedTuple):
    """What was recorded while an image went through the network. Tensors are float32, on the CPU."""

    covered: tuple[float, float]
    """(height, width) in pixels of the image that every map covers."""
    features: list[Tensor]
    """The backbone's pyramid features, (C_l, H_l, W_l)."""
    attention: list[Tensor]
    """The attention of each block of the backbone, averaged over heads, (B', T, T). B' is 1 unless the block attends
    within windows."""
    points: SampledPoints | None
    """The points that the query reads; None where no attention was given."""


def record(
    model: UNEPT,
    image: Tensor,
    config: InferenceConfig,
    query: tuple[float, float],
    attention: SparseSamplingAttention | None,
) -> Recording:
    """Pass one view of the image through the network and record what happens inside.

    Args:
        model: a network in any mode; it is evaluated in `eval()` and left as it was.
        image: uint8 (3, H, W) on the model's device.
        config: inference options, of which only `short_side`, `long_side` and `amp` count.
        query: a position (x, y) in pixels of the image.
        attention: the layer of `model` whose points to record; of its queries the nearest to `query` is taken. None
            records no points.
    """
    size = (image.shape[1], image.shape[2])
    seen: dict[str, Any] = {}
    thread = threading.get_ident()  # others may use the model meanwhile

    def own(note: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: note(*args) if threading.get_ident() == thread else None

    def note_view(module: nn.Module, args: tuple) -> None:
        view = args[0].shape[2:]
        # A resized view shows the image padded to multiples of 8; the image itself is padded inside the network.
        shown = size if tuple(view) == size else padded_size(size)
        full = padded_size(view, model.divisor)
        seen["covered"] = tuple(f * s / v for f, s, v in zip(full, shown, view, strict=True))

    def note_features(module: nn.Module, args: tuple, output: list[Tensor]) -> None:
        seen["features"] = [feature[0].float().cpu() for feature in output]

    def note_points(module: nn.Module, args: tuple, output: Tensor) -> None:
        assert isinstance(module, SparseSamplingAttention)
        seen["points"] = points_of_query(module, *args, covered=seen["covered"], position=query)

    once = dataclasses.replace(config, scales=(1.0,), flip=False, window=0, window_stride=0, compile="off")
    with RECORDING, contextlib.ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(own(note_view)).remove)
        stack.callback(model.backbone.register_forward_hook(own(note_features)).remove)
        if attention is not None:
            stack.callback(attention.register_forward_hook(own(note_points)).remove)
        maps = stack.enter_context(_record_attention(model.backbone, own))
        infer(model, image, once)
    return Recording(seen["covered"], seen["features"], maps, seen.get("points"))


@contextlib.contextmanager
def _record_attention(
    backbone: nn.Module, own: Callable[[Callable[..., None]], Callable[..., None]]
) -> Iterator[list[Tensor]]:
    """A list to which each of timm's attention modules appends its softmax, averaged over heads, (B', T, T).

    `own` makes a hook one that notes the calls of this thread alone.
    """
    maps: list[Tensor] = []

    def note(module: nn.Module, args: tuple, output: Tensor) -> None:
        maps.append(output.float().mean(dim=1).cpu())

    found: list[Any] = [m for m in backbone.modules() if hasattr(m, "fused_attn") and hasattr(m, "attn_drop")]
    fused = [module.fused_attn for module in found]
    handles = [module.attn_drop.register_forward_hook(own(note)) for module in found]
    try:
        for module in found:
            module.fused_attn = False  # a fused attention never materialises its weights
        yield maps
    finally:
        for module, handle, was_fused in zip(found, handles, fused, strict=True):
            module.fused_attn = was_fused
            handle.remove()


def points_of_query(
    attention: SparseSamplingAttention,
    query: Tensor,
    value: Tensor,
    shapes: list[tuple[int, int]],
    reference_points: Tensor,
    *,
    covered: tuple[float, float],
    position: tuple[float, float],
) -> SampledPoints:
    """The points that a query samples and their weights (Eq. 3), as the attention itself computes them.

    Args:
        attention: the layer whose `sampling` computes them.
        query, value, shapes, reference_points: the arguments of its `forward`; the first image of the batch counts.
        covered: (height, width) in pixels of the image that each map covers.
        position: (x, y) in pixels of the image. The nearest query is taken; of an encoder's queries, which are the
            pixels of all levels one after another, the nearest of the first level.
    """
    first = shapes[0][0] * shapes[0][1] if query.shape[1] == sum(h * w for h, w in shapes) else query.shape[1]
    scale = reference_points.new_tensor([covered[1], covered[0]])  # (x, y)
    reference = reference_points[0, :first] * scale - 0.5
    index = int((reference - reference.new_tensor(position)).square().sum(-1).argmin())
    offsets, logits = (tensor[0, 0].float() for tensor in attention.sampling(query[:1, index : index + 1]))
    sizes = offsets.new_tensor([[w, h] for h, w in shapes])[:, None]  # (L, 1, 2)
    xy = reference_points[0, index] * sizes - 0.5 + offsets  # in pixels of each level
    # A bilinear read touches the map from more than -1 to less than its size.
    in_bounds = ((xy > -1) & (xy < sizes)).all(dim=-1)
    return SampledPoints(
        query=(float(reference[index, 0]), float(reference[index, 1])),
        xy=((xy + 0.5) / sizes * scale - 0.5).cpu(),
        weights=logits.flatten(1).softmax(dim=-1).view_as(logits).cpu(),
        in_bounds=in_bounds.cpu(),
        shapes=list(shapes),
        covered=covered,
    )


def sampling_layer(model: UNEPT, name: Attention, layer: int | None) -> SparseSamplingAttention:
    """The attention called `name` in a layer of the network.

    Args:
        model: the network.
        name: which attention, as in `unept.visualize.VisualizeConfig.points_of`.
        layer: the number of the layer, from 1; None means the last.

    Raises:
        ValueError: if there is no such layer.
        NotInModel: if the attention is not sparse sampling (Table 8) and thus samples no points.
    """
    layers: Any = model.encoder.layers if name == "encoder" else model.decoder.layers
    if layer is not None and layer > len(layers):
        raise ValueError(f"layer is {layer}, but this network's {name.split('-')[0]} has {len(layers)} layers")
    chosen = layers[-1 if layer is None else layer - 1]
    attention = chosen.cross_attention if name == "decoder" else chosen.self_attention
    if not isinstance(attention, SparseSamplingAttention):
        raise NotInModel(
            f"no points picture: this network's attention is {model.options['attention']!r}, which samples no points; "
            "it takes a network with 'sparse_sampling'"
        )
    return attention


def principal_components(features: Tensor, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` principal components of features (P, C), P points of C channels; at most C of them.

    Returns:
        scores: (P, count), the centred features along the components.
        components: (C, count), orthonormal, of falling variance; the largest entry of each is positive.
        share: (count,), the share of the variance that each component has; zero where there is no variance.
    """
    centred = (features - features.mean(dim=0)).double()
    variance, vectors = torch.linalg.eigh(centred.T @ centred)  # of rising variance
    components = vectors[:, -count:].flip(1)
    components = components * components.gather(0, components.abs().argmax(dim=0, keepdim=True)).sign()
    share = variance[-count:].flip(0).clamp_min(0) / variance.sum().clamp_min(1e-30)
    return (centred @ components).float(), components.float(), share.float()


def feature_colors(feature: Tensor) -> tuple[Tensor, float]:
    """Turn features (C, h, w) into colors (3, h, w) in [0, 1].

    The first three principal components become red, green and blue, each from its 1 % to its 99 % quantile. Fewer than
    three channels leave the other colors dark.

    Returns:
        The colors, and the share of the variance that they show.
    """
    scores, _, share = principal_components(feature.flatten(1).T)
    low, high = (torch.quantile(scores[:: max(1, len(scores) // 2**20)], q, dim=0) for q in (0.01, 0.99))
    colors = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return F.pad(colors, (0, 3 - colors.shape[1])).T.unflatten(1, feature.shape[1:]), float(share.sum())


def rollout(attention: Sequence[Tensor]) -> Tensor:
    """The joint attention (T, T) of a stack of blocks, each (T, T) with rows that sum to 1, first block first (Fig. 6).

    Each block passes on half of what it reads and half of its input (the residual). So the rows of the result, which
    say how much of each input token arrives at an output token, sum to 1 too.
    """
    joint = torch.eye(attention[0].shape[0])
    for block in attention:
        joint = (block @ joint + joint) / 2
    return joint


def joint_attention(model: UNEPT, recording: Recording, query: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """How much the class token, and the token at the query, attend to each token of the grid.

    Args:
        model: the network that was recorded.
        recording: its recording.
        query: (x, y) in pixels of the image.

    Returns:
        Two maps (h, w): rows of `rollout` over the backbone's whole depth. Without a class token, the first map is the
        mean over the tokens of the grid.

    Raises:
        NotInModel: if the backbone has no attention over the whole image.
    """
    height, width = recording.features[-1].shape[1:]
    body = getattr(model.backbone.features, "model", model.backbone.features)
    prefix = int(getattr(body, "num_prefix_tokens", 0))
    tokens = prefix + height * width
    if not recording.attention or any(block.shape != (1, tokens, tokens) for block in recording.attention):
        kind = "attends within windows or at several resolutions" if recording.attention else "has no attention"
        raise NotInModel(
            f"no attention picture: the backbone {kind}; it takes a plain ViT, whose blocks see all tokens"
        )
    joint = rollout([block[0] for block in recording.attention])[:, prefix:]
    column, row = (
        min(int((at + 0.5) / length * count), count - 1)
        for at, length, count in zip(query, recording.covered[::-1], (width, height), strict=True)
    )
    overall = joint[0] if getattr(body, "cls_token", None) is not None else joint[prefix:].mean(dim=0)
    return tuple(m.view(height, width) for m in (overall, joint[prefix + row * width + column]))


def on_image(maps: Tensor, covered: tuple[float, float], size: Sequence[int], mode: str = "bilinear") -> Tensor:
    """Resample maps (C, h, w) of the network, which cover `covered`, at the pixels of an image of `size` (H, W)."""
    shape = [max(round(length), n) for length, n in zip(covered, size, strict=True)]
    return F.interpolate(maps[None], shape, mode=mode)[0, :, : size[0], : size[1]]
