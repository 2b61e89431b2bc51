"""A picture's unit and key are its own, whatever lies beside it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmtune.data.processing import MediaItem, media_keys_of, split_media_items, without_pixels


def tiles(*sides: tuple[int, int], most: int, height: int, width: int) -> dict[str, Tensor]:
    """A row of `most` tiles, those of `sides` (h, w) with values, the rest padding."""
    pixels, mask = torch.zeros(1, most, 3, height, width), torch.zeros(1, most, height, width)
    for number, (h, w) in enumerate(sides):
        pixels[0, number, :, :h, :w] = torch.arange(1.0, 3 * h * w + 1).view(3, h, w)
        mask[0, number, :h, :w] = 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask.bool()}


def test_rows_of_pixels_are_split_by_their_grids_pictures_first():
    pixels = torch.arange(10.0).view(10, 1)
    inputs = {
        "pixel_values_videos": torch.ones(4, 1),
        "video_grid_thw": torch.tensor([[2, 1, 2]]),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 2, 3], [1, 2, 2]]),
    }
    units = split_media_items(inputs, "flat")
    assert [unit.kind for unit in units] == ["image", "image", "video"]
    assert torch.equal(units[0].tensors["pixel_values"], pixels[:6])
    assert torch.equal(units[1].tensors["pixel_values"], pixels[6:])
    assert units[1].tensors["image_grid_thw"].tolist() == [[1, 2, 2]]
    assert set(without_pixels(inputs)) == {"image_grid_thw", "video_grid_thw"}


def test_the_same_numbers_in_another_form_have_another_key():
    numbers = torch.arange(12, dtype=torch.int32)
    forms = [
        {"pixel_values": numbers.view(3, 4)},
        {"pixel_values": numbers.view(4, 3)},
        {"pixel_values": numbers.view(3, 4).view(torch.float32)},
        {"pixel_values_videos": numbers.view(3, 4)},
        {"pixel_values": numbers.view(3, 4) + 1},
    ]
    keys = [MediaItem("image", form).key for form in forms]
    assert len(set(keys)) == len(forms)
    assert MediaItem("video", forms[0]).key not in keys
    assert MediaItem("image", {"pixel_values": forms[0]["pixel_values"].clone()}).key == keys[0]


def test_the_same_rows_on_another_grid_are_another_picture():
    pixels = torch.randn(6, 2)
    one, other = (
        media_keys_of({"pixel_values": pixels, "image_grid_thw": torch.tensor([grid])}, "flat")
        for grid in ([1, 2, 3], [1, 3, 2])
    )
    assert one != other


def test_a_tiles_key_does_not_know_of_its_padding():
    small = tiles((4, 6), most=1, height=4, width=6)
    beside = tiles((4, 6), (8, 8), most=3, height=8, width=8)
    alone, *others = media_keys_of(small, "stacked")
    assert not others
    assert media_keys_of(beside, "stacked")[0] == alone
    assert len(media_keys_of(beside, "stacked")) == 2
    padded = {name: F.pad(tensor, (0, 2)) for name, tensor in small.items()}
    assert media_keys_of(padded, "stacked") == (alone,)
    unmasked = {"pixel_values": F.pad(small["pixel_values"], (0, 2))}
    assert media_keys_of(unmasked, "stacked") != (alone,)
