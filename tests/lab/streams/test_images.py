from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from guywire.core.errors import DataError, UsageError
from guywire.lab.streams import images
from guywire.lab.streams.images import decode, fitted, montage, stack


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_grey_stays_grey_and_colour_stays_colour():
    grey, colour = noise(5, 7), noise(5, 7, 3)
    assert np.array_equal(decode(png(Image.fromarray(grey)), "x"), grey)
    assert np.array_equal(decode(png(Image.fromarray(colour)), "x"), colour)


def test_transparent_parts_become_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    pixels = decode(png(Image.fromarray(rgba)), "x")
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert (pixels[1] == 255).all()


def test_palettes_bilevel_and_sixteen_bits():
    colour = np.zeros((4, 4, 3), np.uint8)
    colour[..., 0] = 255
    assert np.array_equal(decode(png(Image.fromarray(colour).convert("P")), "x"), colour)
    assert decode(png(Image.new("1", (3, 2), 1)), "x").tolist() == [[255] * 3] * 2
    deep = np.array([[0, 256, 65535]], dtype=np.uint16)
    assert decode(png(Image.fromarray(deep)), "x").tolist() == [[0, 1, 255]]


def test_a_size_scales_the_shorter_side_and_cuts_the_centre():
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 200
    assert (decode(png(Image.fromarray(wide)), "x", 10) == 200).all()
    held = torch.from_numpy(wide)[None, None]
    assert (fitted(held, 10) == 200).all()
    assert fitted(held, None) is held


def test_both_ways_to_scale_agree():
    smooth = np.add.outer(np.arange(32), np.arange(32)).astype(np.uint8) * 4
    by_pil = decode(png(Image.fromarray(smooth)), "x", 8).astype(int)
    by_torch = fitted(torch.from_numpy(smooth)[None, None], 8)[0, 0].numpy().astype(int)
    assert np.abs(by_pil - by_torch).max() <= 1


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_damaged_images_are_named_and_nothing_else_is_raised(data):
    whole = bytearray(png(Image.fromarray(noise(8, 8, 3))))
    kind = data.draw(st.sampled_from(["cut", "flip", "noise"]))
    if kind == "cut":
        whole = whole[: data.draw(st.integers(0, len(whole) - 20))]
    elif kind == "flip":
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] ^= data.draw(st.integers(1, 255))
    else:
        whole = data.draw(st.binary(max_size=100))
    intact = decode(png(Image.fromarray(noise(8, 8, 3))), "the image as it was")
    said, same = "", False
    try:
        same = bool((decode(bytes(whole), "row 3 of the table") == intact).all())
    except DataError as error:
        said = str(error)
    # A flipped bit may sit in a field that no one reads, and a cut may take a checksum only.
    assert "row 3 of the table" in said or (kind == "flip" and not said) or (kind == "cut" and same)


def test_a_gigapixel_is_refused():
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", 40000, 40000, 8, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(9)))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(DataError, match=r"bomb.png.*pixels"):
        decode(bomb, "bomb.png")


def test_stacking_repeats_grey_beside_colour():
    grey, colour = noise(4, 4), noise(4, 4, 3)
    both = stack([grey, colour], "x")
    assert both.shape == (2, 3, 4, 4)
    assert all(np.array_equal(both[0, c].numpy(), grey) for c in range(3))
    assert np.array_equal(both[1].permute(1, 2, 0).numpy(), colour)
    assert stack([grey, grey], "x").shape == (2, 1, 4, 4)


def test_sizes_that_differ_ask_for_a_size():
    with pytest.raises(UsageError, match=r"4x6 to 8x6.*--image-size"):
        stack([noise(6, 8), noise(6, 4)], "x")


def test_more_than_memory_is_refused_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(images, "_memory", lambda: 4 * 1000)
    with pytest.raises(UsageError, match="--image-size"):
        stack((noise(10, 10) for _ in range(10**9)), "x")


def test_a_montage_is_about_twice_as_wide_as_high():
    picture = montage(torch.zeros(32, 1, 28, 28, dtype=torch.uint8))
    assert picture.width == pytest.approx(2 * picture.height, rel=0.1)
    assert montage(torch.zeros(1, 3, 300, 200, dtype=torch.uint8)).size == (208, 308)
