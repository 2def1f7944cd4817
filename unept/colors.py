"""Colours of classes."""

import colorsys


def default_palette(num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """`num_classes` (r, g, b) colours, neighbours far apart: hues step by the golden ratio, brightness varies."""
    colours = []
    for k in range(num_classes):
        red, green, blue = colorsys.hsv_to_rgb(k * 0.618034 % 1, 0.75, (1.0, 0.7, 0.85)[k % 3])
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return tuple(colours)
