"""Which sizes a network may have: what makes sense, and what a damaged or hostile config.json can't go beyond."""

from collections.abc import Mapping
from typing import Any

from ..validation import check_range

RANGES = {
    "num_classes": (1, 1 << 16),
    "in_chans": (1, 1 << 10),
    "d_model": (8, 1 << 13),
    "num_heads": (1, 1 << 10),
    "num_points": (1, 1 << 10),
    "num_levels": (1, 64),
    "num_encoder_layers": (0, 64),
    "num_decoder_layers": (1, 64),
    "ffn_dim": (1, 1 << 16),
    "num_directions": (4, 254),
    "scale_encoding_std": (0, 1 << 10),
}
OUTPUT_STRIDES = (8, 16, 32)
MAX_PARAMETERS = 1 << 31
"""Of the transformer and the classifier; the paper's have 10 million."""


def check_sizes(options: Mapping[str, Any]) -> None:
    """Check the options of `UNEPT` that are numbers, of which some may be missing.

    Raises:
        ValueError: a number is out of its range, numbers do not fit together, or the network would be huge.
    """
    for name in RANGES.keys() & options.keys():
        check_range(name, options[name], *RANGES[name])
    if (size := options.get("backbone_image_size")) is not None:
        check_range("backbone_image_size", size, 8, 1 << 13)
    for width in options.get("spatial_widths") or ():
        check_range("a number of spatial_widths", width, 1, 1 << 13)
    if (number := options.get("num_directions", 8)) % 2:
        raise ValueError(f"num_directions is {number}; it must be an even number from 4 to 254")
    if options.get("output_stride") not in (None, *OUTPUT_STRIDES):
        raise ValueError(f"output_stride is {options['output_stride']}; it must be 8, 16 or 32, or None")
    if not 0 <= options.get("dropout", 0) < 1:
        raise ValueError(f"dropout is {options['dropout']}; it must be in [0, 1)")
    if "d_model" in options and options["d_model"] % options.get("num_heads", 1):
        raise ValueError(
            f"d_model {options['d_model']} is not a multiple of num_heads {options['num_heads']}: change one of them"
        )
    if options.get("d_model", 8) % 8:
        raise ValueError(f"d_model is {options['d_model']}; it must be a multiple of 8")
    if (count := least_parameters(options)) > MAX_PARAMETERS:
        raise ValueError(
            f"the transformer would have {count / 1e9:.0f} billion parameters or more: lower d_model "
            f"({options.get('d_model')}), ffn_dim ({options.get('ffn_dim')}) or the numbers of layers"
        )


def least_parameters(options: Mapping[str, Any]) -> int:
    """How many parameters a network has at least without its backbone: the feed-forward networks and the classifier."""
    layers = options.get("num_encoder_layers", 0) + options.get("num_decoder_layers", 0)
    d_model = options.get("d_model", 0)
    return d_model * (2 * layers * options.get("ffn_dim", 0) + options.get("num_classes", 0))
