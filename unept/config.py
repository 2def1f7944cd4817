"""Every option of a training run, as typed dataclasses; `unept.train.parse` derives the command line from them."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .compilation import Compile
from .data.base import SegmentationDataset
from .data.registry import DATASETS, build_dataset, find_dataset
from .distributed import Device, default_workers
from .inference import InferenceConfig
from .model.backbone import RESNET50
from .model.boundary import StepDirection
from .model.limits import check_sizes
from .model.loss import PAPER_WEIGHTS, LossWeights
from .plugins import import_modules
from .precision import Amp
from .recipe import RecipeConfig
from .validation import check_fields, check_range, check_type


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass
class ModelConfig:
    """The network (Sec. 4.2, Network structure)."""

    backbone: str = RESNET50
    """Any timm model that gives feature maps. Its tag, as in resnet50.tv_in1k, says which weights; without one they are
    those that timm prefers."""
    pretrained_backbone: bool = True
    """Start from the backbone's ImageNet weights, downloaded from timm's hub."""
    backbone_weights: Path | None = None
    """Start from the weights in this file instead (.safetensors or .pth); nothing is downloaded."""
    backbone_image_size: int | None = None
    """For backbones that see images of one size only: side in pixels of the squares into which images are cut for the
    backbone. None: whole images."""
    output_stride: int | None = None
    """Stride of the backbone: 8, 16 or 32. None: 8 for ResNets, as in the paper, the backbone's own for others."""
    d_model: int = 256
    """Number of channels of the transformer."""
    num_heads: int = 8
    """Number of attention heads, M."""
    num_points: int = 16
    """Number of sampled points per head and level, N."""
    num_levels: int = 3
    """Number of feature maps taken from the backbone, L."""
    num_encoder_layers: int = 2
    """Number of encoder layers."""
    num_decoder_layers: int = 2
    """Number of decoder layers."""
    ffn_dim: int = 2048
    """Number of hidden channels of the feed-forward networks."""
    dropout: float = 0.1
    """Dropout rate in the transformer."""
    attention: Literal["sparse_sampling", "full", "sparse_transformer", "longformer", "reformer"] = "sparse_sampling"
    """Attention of the transformer: sparse sampling, or one of those that Table 8 compares it with."""
    decoder_self_attention: (
        Literal["sparse_sampling", "full", "sparse_transformer", "longformer", "reformer"] | None
    ) = None
    """Attention of the context queries among themselves. None: as `attention`."""
    context_queries: Literal["spatial", "learned", "spatial+learned", "spatial+encoder"] = "spatial"
    """Input of the decoder: the spatial branch, as in the paper, or the learned table of the paper's baseline (no
    refinement), or the sum of both, or that of the spatial branch and the encoder's output."""
    boundary_upsampling: Literal["bilinear", "subpixel"] = "bilinear"
    """How boundaries and directions come from 1/8 to full resolution. bilinear: as in the paper. subpixel: the last
    convolution of each head predicts every pixel."""
    boundary_features: Literal["spatial", "spatial+decoder"] = "spatial"
    """What the boundary and direction heads see: the spatial branch, as in the paper, or the decoder's output too."""
    logits_stride: Literal[1, 2, 4, 8] = 8
    """Image pixels per pixel of the class logits, along each axis: 8, as in the paper, or finer, where the classifier
    predicts every pixel of a block."""
    num_directions: int = 8
    """Number of directions that the direction head tells apart, m; an even number."""
    spatial_widths: tuple[int, int] | None = None
    """Number of channels of the first two convolutions of the spatial branch. None: 32 and d_model."""
    spatial_last_relu: bool = True
    """End the spatial branch in a ReLU, as in the paper."""
    level_norm: bool = True
    """Normalise each level of the pyramid after its 1x1 convolution; the paper does not."""
    position_resize: Literal["bicubic", "bilinear"] = "bicubic"
    """How the position embedding of a ViT is resized: bicubic, as in timm, or bilinear, as in the paper."""
    scale_encoding_std: float = 0.02
    """Standard deviation of the scale encoding at the start."""
    zero_init_residual: bool = False
    """Start with attentions and feed-forward networks that give zero."""
    in_chans: int = 3
    """Number of channels of an image. Others than 3 need --no-photometric."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, of images in [0, 1]. None: that of the backbone's pretrained weights,
    whose average every channel has if they are not 3."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, likewise."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_sizes(vars(self))

    def options(self) -> dict[str, Any]:
        """Return the options as arguments of `unept.model.UNEPT`."""
        options = dataclasses.asdict(self)
        if self.backbone_weights is not None:
            options["backbone_weights"] = str(self.backbone_weights)
            options["pretrained_backbone"] = False
        return options


@dataclass
class DataConfig:
    """The data set and its augmentation (Sec. 4.2, Training)."""

    dataset: str = "shapes"
    """Name of the data set: shapes, camvid, folder, ade20k, cityscapes, pascal_context, or one that a module registers
    (`unept.register_dataset`)."""
    root: Path | None = None
    """Folder of the data set on disk. `shapes` is made in memory and has none."""
    images: str = "images/{split}"
    """Where the images of `folder` are, under the root."""
    labels: str = "labels/{split}"
    """Where the labels of `folder` are, under the root."""
    classes_file: str = "classes.txt"
    """Where the class list of `folder` is, under the root."""
    label_suffix: str = ""
    """What follows an image's name in the name of its label in `folder`, such as _mask."""
    label_ids: tuple[str, ...] = ()
    """ID=CLASS for each id in the labels of `folder`; CLASS is a name of the class list or its place in it, from 0. For
    masks of 0 and 255: 0=0 255=1. Empty: the ids are the places."""
    ignore_id: tuple[int, ...] = ()
    """Ids in the labels of `folder` that are ignored, besides 255."""
    label_format: Literal["auto", "ids", "colors"] = "auto"
    """What the labels of `folder` hold. auto: the colors of the class list where an RGB label has only these, else an
    id per pixel."""
    background: bool = True
    """Whether the background of `pascal_context` is a class (60 classes, as in the paper) or ignored (59)."""
    crop_size: tuple[int, int] = (480, 480)
    """Height and width of a training sample, cropped or padded."""
    short_side: int | None = None
    """Images are resized to this short side before anything else. None: they keep their size."""
    long_side: int | None = None
    """Images are resized to this long side instead."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Random scale of a training image, relative to the short side."""
    cat_max_ratio: float = 0.75
    """A crop is drawn again if one class fills a larger share of it than this."""
    flip: bool = True
    """Mirror half of the training images."""
    photometric: bool = True
    """Random brightness, contrast, saturation and hue."""
    augmentation: str | None = None
    """module:object of a transform of torchvision.transforms.v2 or a Compose of Albumentations, instead of the options
    short_side to photometric: it must give samples of crop_size."""
    imports: tuple[str, ...] = ()
    """Modules that are imported first, such as one that registers a data set (--import my_module)."""
    workers: int = field(default_factory=default_workers)
    """Number of processes that load training data; 0 loads in the main process. Default: the cores of each process of
    the training, at most 8."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """What to do with a file that cannot be read or breaks a rule. error: stop the run, which continues once the file
    is repaired. skip: train on the next image instead, leave the file out of evaluations, and count how often."""

    def __post_init__(self) -> None:
        check_type("imports", self.imports, tuple[str, ...])
        # Reading the options of a run must not run code that they name: `build` imports it.
        deferred = bool(self.imports) and self.dataset not in DATASETS
        if isinstance(self.dataset, str) and not deferred:
            find_dataset(self.dataset)  # whose message lists the names
        check_fields(self)
        for name, low, high in (("workers", 0, 1024), ("short_side", 8, 1 << 16), ("long_side", 8, 1 << 16)):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low, high)
        check_range("the longer side of crop_size", max(self.crop_size), 8, 1 << 16)
        _require(min(self.crop_size) >= 8, f"crop_size is {self.crop_size}; each side must be at least 8 pixels")
        _require(
            0 < self.scale[0] <= self.scale[1],
            f"scale is {self.scale}; it must be a range of positive numbers, the smaller first",
        )
        _require(0 < self.cat_max_ratio <= 1, f"cat_max_ratio is {self.cat_max_ratio}; it must be in (0, 1]")
        _require(
            self.short_side is None or self.long_side is None,
            f"short_side is {self.short_side} and long_side {self.long_side}; give one of them, and "
            "None for the other (as --short-side None, where a preset has it)",
        )
        if not deferred:
            self._check_dataset_options()

    def _check_dataset_options(self) -> None:
        """Raise ValueError for an option that is set although the data set does not have it, and would not heed it."""
        in_memory = find_dataset(self.dataset).in_memory
        _require(not in_memory or self.root is None, f"dataset {self.dataset!r} is made in memory: omit --root")
        own = find_dataset(self.dataset).options
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for entry_name, entry in DATASETS.items():
            for name in sorted((set(entry.options) - set(own)) & defaults.keys()):
                _require(
                    getattr(self, name) == defaults[name],
                    f"{name} is {getattr(self, name)!r}, but it is an option of the data set {entry_name!r} and not of "
                    f"{self.dataset!r}: omit it, or choose that data set",
                )

    def build(self, split: str, root: Path | None = None) -> SegmentationDataset:
        """Build one split of the data set, from another root if one is given; raises as `unept.data.build_dataset`."""
        import_modules(self.imports)
        self._check_dataset_options()
        options = {name: getattr(self, name) for name in find_dataset(self.dataset).options}
        return build_dataset(self.dataset, root or self.root, split, **options)


@dataclass
class TrainConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    """What the paper's recipe does not have."""
    out: Path | None = None
    """Run folder. None: runs/PRESET, or runs/PRESET-2 and so on if that folder exists."""
    resume: Literal["auto", "never"] = "never"
    """auto: continue the run in the run folder from its last checkpoint, if there is one."""
    check_data: bool = False
    """Only read every training and validation file, with `workers` processes, and report those that break a rule."""
    iterations: int = 160_000
    """Optimiser steps."""
    batch_size: int = 16
    """Images per optimiser step, over all processes."""
    accumulate: int = 1
    """Number of parts of each batch that are seen one after another, to save memory."""
    lr: float = 1e-4
    """Learning rate of everything but the backbone."""
    backbone_lr: float = 1e-5
    """Learning rate of the backbone."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Running average coefficients of AdamW."""
    warmup: int = 0
    """Steps over which the learning rates rise from zero; the paper has none."""
    schedule: Literal["step", "cosine", "poly"] = "step"
    """step: a tenth of the learning rates after `lr_drop` of the run, as in the paper. cosine: down to zero. poly: down
    to zero as (1 - step / iterations)^0.9."""
    lr_drop: float = 2 / 3
    """Share of the run after which the schedule `step` lowers the learning rates."""
    loss_weights: LossWeights = PAPER_WEIGHTS
    """lambda_1..4 of Eq. 7: segmentation, refined segmentation, boundary, direction."""
    direction_pixels: Literal["true", "predicted"] = "true"
    """Pixels on which directions are learned: the true boundary pixels, or the predicted ones, as in SegFix."""
    boundary_balance: Literal["none", "classes"] = "none"
    """Boundary loss: none, the mean over all pixels; classes, half over boundary pixels and half over the others."""
    class_weights: Literal["none", "auto"] | tuple[float, ...] = "none"
    """Weights of the classes in the two segmentation losses. none: all 1, as in the paper. auto: the inverse square
    root of each class's share of the training pixels. Otherwise one number per class."""
    ema: float = 0.0
    """Decay, such as 0.999, of an exponential moving average of the weights, which is then what is evaluated and saved
    as the model. 0: no average, as in the paper."""
    seed: int = 0
    """Seed of initialisation, data order and augmentation."""
    device: Device = "auto"
    """auto: CUDA if there is a device."""
    amp: Amp = "auto"
    """Autocast to bfloat16. auto: on CUDA from Ampere on, and on CPUs with AVX512-BF16 or AMX."""
    matmul_precision: Literal["highest", "high"] = "highest"
    """Of float32 products on a GPU. high: TensorFloat-32, whose factors are rounded to 11 bits, which moves a sampling
    point 16 pixels away by up to 1/100 pixel with `amp` off. Under autocast the products are half precision, those of
    the Triton backend's sampling points too."""
    compile: Compile = "auto"
    """torch.compile of model and loss, and of the network in evaluations for at most 8 sizes of image. auto: on CUDA
    only."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl; a NaN loss is noticed at these steps too."""
    eval_every: int = 4000
    """Steps between evaluations on the validation set; the last step is always evaluated."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last two are kept."""
    boundary_tolerance: int = 3
    """Distance in pixels within which a boundary counts as found, in the boundary F-score."""
    window: int | None = None
    """Slide a square window of this many pixels over larger images; at validation, and by default in evaluate and
    predict. None: whole images."""
    window_stride: int | None = None
    """Pixels from window to window. None: 2/3 of the window."""
    refine: bool = True
    """Refine the prediction at the boundaries; at validation, and by default in evaluate and predict."""
    refine_scale: int = 1
    """Length in pixels of a step into its segment by which the prediction of a boundary pixel is refined."""
    refine_steps: int = 1
    """Number of these steps, each from where the one before ended; the paper takes one."""
    refine_direction: StepDirection = "best"
    """best: a step leads in the most likely direction, as in the paper. mean: in the mean of all directions, weighted
    by their probabilities, and it is shorter where they disagree."""
    num_samples: int = 4
    """Number of validation images drawn into samples/ at each evaluation."""

    def __post_init__(self) -> None:
        self.loss_weights = LossWeights.read(self.loss_weights)  # config.json has a dict, that of old runs a list
        check_fields(self)
        _require(self.lr > 0, f"lr is {self.lr}; it must be positive")
        for name, high in (("backbone_lr", math.inf), ("weight_decay", math.inf), ("seed", (1 << 63) - 1)):
            check_range(name, getattr(self, name), 0, high)
        _require(all(0 <= beta < 1 for beta in self.betas), f"betas are {self.betas}; both must be in [0, 1)")
        _require(self.iterations > 0, f"iterations is {self.iterations}; it must be positive")
        _require(
            self.accumulate > 0 and self.batch_size % self.accumulate == 0,
            f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}: change one of them",
        )
        for name in ("batch_size", "log_every", "eval_every", "checkpoint_every", "refine_scale", "refine_steps"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("warmup", "boundary_tolerance", "num_samples"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must be 0 or more")
        _require(0 < self.lr_drop <= 1, f"lr_drop is {self.lr_drop}; it must be in (0, 1]")
        _require(0 <= self.ema < 1, f"ema is {self.ema}; it must be 0 (no average) or a decay below 1, such as 0.999")
        if not isinstance(self.class_weights, str):
            _require(
                all(0 <= weight < math.inf for weight in self.class_weights),
                f"class_weights are {self.class_weights}; give 'none', 'auto' or numbers that are 0 or more",
            )
        _require(
            self.model.in_chans == 3 or not self.data.photometric,
            f"in_chans is {self.model.in_chans}, but the photometric distortion is one of RGB: omit it with "
            "--no-photometric",
        )
        self.inference()  # which checks its options

    def inference(self) -> InferenceConfig:
        """Return how the run sees images at validation, which its model then keeps (`InferenceConfig.protocol`)."""
        return InferenceConfig(
            window=self.window or 0,
            window_stride=self.window_stride or 0,
            refine=self.refine and self.model.context_queries != "learned",
            refine_scale=self.refine_scale,
            refine_steps=self.refine_steps,
            refine_direction=self.refine_direction,
            short_side=self.data.short_side or 0,
            long_side=self.data.long_side or 0,
            amp=self.amp,
            compile=self.compile,
        )

    def to_json(self) -> str:
        """Return the options as the text of config.json, which `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str)

    @staticmethod
    def from_json(path: Path) -> "TrainConfig":
        """Read config.json of a run folder.

        Options that a later version renamed are read under their old names too.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or has an option that this version does not have.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: give a folder that unept.train wrote, with config.json and model/"
            )
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            check_type("its content", stored, dict)
            parts = {name: _from_dict(kind, stored.pop(name, {})) for name, kind in _PARTS.items()}
            return _from_dict(TrainConfig, {**stored, **parts})
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}): restore it, or train in another folder") from error
        except ValueError as error:
            raise ValueError(f"{path} cannot be used: {error}") from error


_PARTS = {"model": ModelConfig, "data": DataConfig, "recipe": RecipeConfig}
# Old names of options, which stored config.json files and command lines may have.
RENAMED = {"category_cap": "cat_max_ratio", "import": "imports"}


def _from_dict(kind: type, stored: Any) -> Any:
    check_type(f"the part for {kind.__name__}", stored, dict)
    known = {f.name: f for f in dataclasses.fields(kind)}
    values = {RENAMED.get(name, name): value for name, value in stored.items()}
    unknown = sorted(set(values) - set(known))
    _require(
        not unknown,
        f"config.json has options that this version of unept does not know: {', '.join(unknown)}. Use the version "
        "that wrote it, or remove them from the file",
    )
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
        elif isinstance(value, str) and "Path" in str(known[name].type):
            values[name] = Path(value)
    return kind(**values)
