"""Class ids as colors: label maps, overlays, and palette PNGs read back from disk."""

import numpy as np
import pytest
import torch
from PIL import Image

from unept.colors import colorize, default_palette, overlay, save_palette_png

PALETTE = [[200, 0, 0], [0, 150, 0], [10, 20, 250]]


def labels() -> torch.Tensor:
    """(6, 8): the three classes in stripes, and two ignored pixels."""
    ids = torch.arange(3).repeat_interleave(2)[:, None].repeat(1, 8)
    ids[0, 0], ids[5, 7] = 255, -1
    return ids


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16])
def test_colorize(dtype):
    colors = colorize(labels().to(dtype), PALETTE)
    assert colors.dtype == torch.uint8
    for y in range(6):
        for x in range(8):
            expected = [0, 0, 0] if (y, x) in ((0, 0), (5, 7)) else PALETTE[y // 2]
            assert colors[:, y, x].tolist() == expected


def test_colorize_of_masks_as_datasets_give_them():
    ids = labels().to(torch.uint8)  # -1 becomes 255
    assert torch.equal(colorize(ids, PALETTE), colorize(labels(), PALETTE))


def test_overlay():
    image = torch.full((3, 6, 8), 100, dtype=torch.uint8)
    mixed = overlay(image, labels(), PALETTE, alpha=0.25)
    assert mixed[:, 0, 1].tolist() == [125, 75, 75]
    assert mixed[:, 0, 0].tolist() == [100, 100, 100]
    assert torch.equal(overlay(image, labels(), PALETTE, alpha=0.0), image)


def test_palette_png_holds_the_ids_and_shows_the_colors(tmp_path):
    ids = labels().clamp_min(0)
    save_palette_png(ids, PALETTE, tmp_path / "ids.png")
    with Image.open(tmp_path / "ids.png") as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), ids.numpy())
        shown = np.asarray(picture.convert("RGB"))
    assert np.array_equal(shown, colorize(ids, PALETTE).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("wrong", [-1, 256])
def test_palette_png_refuses_what_8_bits_do_not_hold(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"{wrong}"):
        save_palette_png(torch.tensor([[1, wrong]]), PALETTE, tmp_path / "ids.png")
    assert not list(tmp_path.iterdir())


def test_default_palette_has_a_color_for_every_class():
    palette = default_palette(255)
    assert len(set(palette)) == 255
    assert all(0 <= channel <= 255 for color in palette for channel in color)
