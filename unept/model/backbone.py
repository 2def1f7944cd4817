"""Backbones and pyramid features (Sec. 3.1.2, 4.2): any timm model that gives feature maps."""

import contextlib
import difflib
import inspect
import math
import pickle
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.func import functional_call

from ..validation import check_choice
from .finite import require_finite
from .trial import REFUSALS, find_divisor

POSITIONS = threading.Lock()  # held while a ViT has the position embedding of one image's size

RESNET50 = (
    "resnet50.tv_in1k"  # the paper's (Sec. 4.2); timm's own choice of weights for `resnet50` is of another recipe
)


def _probe(name: str) -> nn.Module:
    """The plain timm model, to read which options it takes and which features it has."""
    base = name.split(".")[0]
    if not timm.is_model(base):
        hint = close_names(base, timm.list_models())
        raise ValueError(f"timm {timm.__version__} has no model {name!r}{hint}. timm.list_models() lists them all")
    return timm.create_model(name, pretrained=False)


def _pretraining(name: str) -> Any:
    """What timm knows about the training of a model's weights."""
    return timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()


def own_normalization(name: str, channels: int = 3) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that a timm model's weights were trained with, per channel of images in [0, 1].

    Where there are not 3 channels, each has their average.
    """
    own = _pretraining(name)
    mean, std = (
        tuple(values) if channels == len(values) else (sum(values) / len(values),) * channels
        for values in (own.mean, own.std)
    )
    return mean, std


def close_names(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known names that a wrong one resembles; empty if there are none."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; close names: {', '.join(close)}" if close else ""


def _accepts(model: nn.Module, option: str) -> bool:
    constructors = [vars(base)["__init__"] for base in type(model).__mro__ if "__init__" in vars(base)]
    return any(option in inspect.signature(constructor).parameters for constructor in constructors)


def _pyramid_indices(reductions: list[int], num_levels: int, name: str) -> tuple[int, ...]:
    """Which of a backbone's features make the pyramid, given the stride of each of them.

    Where all have one resolution (the blocks of a ViT), they are evenly spaced and end with the last: 4, 8 and 12 of
    DeiT-B. Where the resolution falls, they are the last ones: C3 to C5 of a ResNet.
    """
    count = len(reductions)
    if count < num_levels:
        raise ValueError(f"{name} gives {count} feature maps, but num_levels is {num_levels}: lower num_levels")
    if len(set(reductions)) == 1:
        return tuple(count * (i + 1) // num_levels - 1 for i in range(num_levels))
    return tuple(range(count - num_levels, count))


def read_weights(path: Path, option: str) -> dict[str, Tensor]:
    """Read the tensors in a .safetensors or .pth file, where they may lie under the key `model` or `state_dict`.

    Args:
        path: the file.
        option: the option that names it, for error messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds anything but tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{option} names {path}, which is not a file: give a .safetensors or .pth file")
    try:
        return timm.models.load_state_dict(str(path), weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as weights ({error}): give a .safetensors or .pth file") from error


def _check_weights(path: Path, probe: nn.Module, name: str) -> None:
    """Raise ValueError unless the file belongs to the model: timm silently drops the tensors that do not fit."""
    stored = read_weights(path, "backbone_weights")
    require_finite(stored, path)
    wanted = probe.state_dict()
    body = [key for key in wanted if not key.startswith(("head", "fc.", "classifier"))]
    # timm resizes what depends on the image's size; everything else must have its shape.
    resized = ("pos_embed", "relative_position", "rel_pos")
    found = [
        key
        for key in body
        if key in stored and (stored[key].shape == wanted[key].shape or any(part in key for part in resized))
    ]
    if len(found) < 0.9 * len(body):
        raise ValueError(
            f"{path} holds {len(found)} of the {len(body)} tensors of {name}: give the weights of this timm model, "
            "as saved by timm or downloaded from its hub page"
        )


class Backbone(nn.Module):
    """Feature maps of a timm model, channels first, for images of any size.

    Of a model whose resolution falls, the last maps are taken; of a ViT, those of evenly spaced blocks.

    Args:
        name: name of the timm model, with or without a tag, which says which weights are loaded: without one they are
            those that timm's version prefers (`resnet50`, `resnet50.tv_in1k`).
        num_levels: L, number of feature maps.
        output_stride: stride of the last map of a convolutional backbone, which is dilated to reach it; None means 8
            for ResNets, as in the paper, and the backbone's own for others.
        pretrained: load timm's ImageNet weights from its hub.
        weights: load them from this file instead (.safetensors, or a .pth of tensors).
        in_chans: channels of the images, C; timm adapts pretrained weights to other numbers than 3.
        image_size: for models that see images of one size only: the side in pixels of the squares into which images
            are cut, each of which the model sees alone; timm's `img_size` where the model takes it. None: whole images.
        position_resize: how the position embedding of a ViT is resized to other images than it was trained on:
            `"bicubic"`, with antialiasing, as timm does, or `"bilinear"`, as the paper says (Sec. 4.2).

    Attributes:
        channels: number of channels of each feature map.
        strides: image pixels per pixel of each feature map, along each axis.
        divisor: the sides of images must be multiples of it.
        mean: mean per channel, of images in [0, 1] (`own_normalization`).
        std: standard deviation, likewise.

    Raises:
        ValueError: the name is unknown, the model has too few features or sees images of one size only, or the file
            holds another model's weights.
        FileNotFoundError: there is no such file.
        ConnectionError: the hub cannot be reached; the message names the alternatives.
    """

    def __init__(
        self,
        name: str,
        *,
        num_levels: int = 3,
        output_stride: int | None = None,
        pretrained: bool = False,
        weights: str | Path | None = None,
        in_chans: int = 3,
        image_size: int | None = None,
        position_resize: str = "bicubic",
    ):
        super().__init__()
        if in_chans < 1:
            raise ValueError(f"in_chans is {in_chans}; an image has at least 1 channel")
        check_choice("position_resize", position_resize, "bicubic", "bilinear")
        self.image_size = image_size
        probe = _probe(name)
        info = probe.feature_info
        reductions = [item["reduction"] for item in (info if isinstance(info, list) else info.info)]
        options: dict = {"out_indices": _pyramid_indices(reductions, num_levels, name)}
        if in_chans != 3:
            options["in_chans"] = in_chans
        if output_stride is None and isinstance(probe, timm.models.ResNet):
            output_stride = 8
        if output_stride is not None:
            options["output_stride"] = output_stride
        if _accepts(probe, "dynamic_img_size"):  # ViTs: resize the position embedding to each image
            options["dynamic_img_size"] = True
        if _accepts(probe, "strict_img_size"):  # Swin: any size
            options["strict_img_size"] = False
        # Where positions are resized bilinearly, they keep their own size until then: timm would resize them itself.
        keeps_grid = position_resize == "bilinear" and "dynamic_img_size" in options
        if image_size is not None and _accepts(probe, "img_size") and not keeps_grid:
            options["img_size"] = image_size
        if weights is not None:
            _check_weights(Path(weights), probe, name)
            options["pretrained_cfg_overlay"] = {"file": str(weights)}
        del probe
        self.name = name
        self.features = self._create(name, pretrained or weights is not None, options)
        self.resizes_bilinearly = position_resize == "bilinear"
        if self.resizes_bilinearly and getattr(getattr(self.features, "model", None), "pos_embed", None) is None:
            raise ValueError(f"{name} has no position embedding to resize: omit position_resize")
        self.channels: list[int] = self.features.feature_info.channels()
        self.strides: list[int] = self.features.feature_info.reduction()
        self.channels_last = getattr(self.features, "output_fmt", "NCHW") == "NHWC"
        own_size = max(_pretraining(name).input_size[1:])
        self.divisor = find_divisor(self.features, math.lcm(*self.strides), own_size, name, in_chans, image_size)
        self.mean, self.std = own_normalization(name, in_chans)

    @staticmethod
    def _create(name: str, pretrained: bool, options: dict) -> nn.Module:
        try:
            return timm.create_model(name, pretrained=pretrained, features_only=True, **options)
        except REFUSALS as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            what = "with pretrained weights and" if pretrained else "with"
            raise ValueError(
                f"timm cannot make feature maps of {name} {what} {_listed(options)} ({error}): choose another "
                "backbone, other values of output_stride and num_levels, or start without pretrained weights"
            ) from error
        except OSError as error:  # what urllib and huggingface_hub raise when there is no network
            if not pretrained or "pretrained_cfg_overlay" in options:
                raise
            raise ConnectionError(
                f"the ImageNet weights of {name} could not be downloaded ({error}). Give a local file with "
                "backbone_weights=PATH (--backbone-weights PATH), or train from scratch with pretrained_backbone=False "
                "(--no-pretrained-backbone)"
            ) from error

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the stages again in the backward instead of keeping what they computed.

        Raises:
            ValueError: timm has no such option for this model.
        """
        module = self.features if hasattr(self.features, "set_grad_checkpointing") else self.features.model
        try:
            module.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError) as error:
            raise ValueError(f"timm's {self.name} has no gradient checkpointing: train without it") from error

    def layers(self, coarse: bool = False) -> dict[str, int]:
        """Number the layers of the backbone from 0, the stem, for the parameters by their names in `features`.

        Args:
            coarse: number stages instead of layers; blocks of a ViT in either case.
        """
        probe = _probe(self.name)
        known = self._own_names(probe)
        if not hasattr(probe, "group_matcher"):
            raise ValueError(
                f"timm does not say what the layers of {self.name} are: train without layer_decay and freeze_stages"
            )
        pairs = [(own, name) for name, own in known.items()]
        grouped = group_with_matcher(iter(pairs), probe.group_matcher(coarse=coarse), return_values=True)
        return {name: layer for layer, members in grouped.items() for name in members}

    def without_decay(self) -> set[str]:
        """Return the names in `features` of the parameters that timm's model says weight decay should spare."""
        probe = _probe(self.name)
        spared: set[str] = set(probe.no_weight_decay()) if hasattr(probe, "no_weight_decay") else set()
        known = self._own_names(probe)
        return {name for name, own in known.items() if own in spared or own.rpartition(".")[2] in spared}

    def _own_names(self, probe: nn.Module) -> dict[str, str]:
        """The names in timm's plain model of the parameters of `features`, which writes some of the dots as `_`."""
        plain = {name.replace(".", "_"): name for name, _ in probe.named_parameters()}
        names = [name for name, _ in self.features.named_parameters()]
        own = {name: name.removeprefix("model.") for name in names}
        return {name: plain.get(own[name].replace(".", "_"), own[name]) for name in names}

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps.

        Args:
            images: (B, C, H, W), normalised; H and W are multiples of `divisor`.

        Returns:
            L maps (B, C_l, H / stride_l, W / stride_l).
        """
        B, _, H, W = images.shape
        if self.image_size is not None:
            images = _cut(images, self.image_size)
        features = self._with_bilinear_positions(images) if self.resizes_bilinearly else self.features(images)
        if self.channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        if self.image_size is not None:
            features = [_join(feature, B, H // self.image_size, W // self.image_size) for feature in features]
        return features

    def _with_bilinear_positions(self, images: Tensor) -> list[Tensor]:
        """Feature maps of a ViT that is given its position embedding in the size of the images, so that timm resizes
        nothing.
        """
        # The embedding stands in the ViT meanwhile, where another thread would find it.
        with contextlib.nullcontext() if torch.compiler.is_compiling() else POSITIONS:
            return self._with_positions_in_place(self.features.model, images)

    def _with_positions_in_place(self, vit: Any, images: Tensor) -> list[Tensor]:
        grid = vit.patch_embed.grid_size
        size = [n // stride for n, stride in zip(images.shape[2:], vit.patch_embed.patch_size, strict=True)]
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        embedding = resample_abs_pos_embed(
            vit.pos_embed, size, grid, num_prefix_tokens=prefix, interpolation="bilinear", antialias=False
        )
        vit.patch_embed.grid_size = tuple(size)
        try:
            return functional_call(self.features, {"model.pos_embed": embedding}, (images,))
        finally:
            vit.patch_embed.grid_size = grid


def _cut(images: Tensor, size: int) -> Tensor:
    """Cut images (B, C, r * size, c * size) into squares (B * r * c, C, size, size), row by row."""
    squares = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def _join(maps: Tensor, B: int, rows: int, columns: int) -> Tensor:
    """Join the maps of squares (B * rows * columns, C, h, w) to maps of images (B, C, rows * h, columns * w)."""
    return maps.unflatten(0, (B, rows, columns)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _listed(options: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


class PyramidProjection(nn.Module):
    """A 1x1 convolution per level to `d_model` channels, flattened into one sequence (Sec. 3.1.2, X_ms).

    Each convolution is followed by a group normalisation, so that backbones of any feature scale train alike.

    Args:
        channels: number of channels of each level.
        d_model: channels of the transformer, a multiple of 8.
        norm: whether the normalisation is there; the paper and the released code have none.
    """

    def __init__(self, channels: list[int], d_model: int, norm: bool = True):
        super().__init__()
        self.levels = nn.ModuleList(nn.Sequential(nn.Conv2d(c, d_model, 1)) for c in channels)
        for level in self.levels if norm else ():
            level.append(nn.GroupNorm(d_model // 8, d_model))
        for level in self.levels:
            nn.init.xavier_uniform_(level[0].weight)
            nn.init.zeros_(level[0].bias)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Project and flatten the pyramid.

        Args:
            features: L maps (B, C_l, H_l, W_l).

        Returns:
            Tokens (B, S, d_model), S = sum of H_l * W_l, one level after another, and the shapes [(H_l, W_l)].
        """
        maps = [level(feature) for level, feature in zip(self.levels, features, strict=True)]
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
        return tokens, [(m.shape[2], m.shape[3]) for m in maps]
