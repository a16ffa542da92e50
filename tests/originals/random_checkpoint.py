"""Random checkpoints and images that are the same numbers in every environment, as nothing but NumPy makes them."""

import zlib

import numpy as np
from PIL import Image


IMAGE_SIZES = [(64, 64), (97, 64), (60, 91), (41, 150), (29, 23), (300, 130)]  # width, height
TEXTS = [
    "a red circle on a blue background",
    "A Photo of 3 GREEN squares,  high up & far away!",
    "a yellow triangle",
    "",
    "two small circles; one large square: " * 12,  # longer than any model reads
    "a café at night",
]


def tensor(name, shape):
    """A float32 array known by its name and shape."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if "embed" in name or "token" in name:
        values *= 0.02  # as models are initialised; small enough for a LayerNorm's epsilon to show
    elif len(shape) > 1:
        values /= np.sqrt(np.prod(shape[1:]))
    elif name.endswith("weight"):
        values = 1 + 0.1 * values
    else:
        values *= 0.1
    return values.astype(np.float32)


def images():
    """RGB images of `IMAGE_SIZES`: noise upon stripes, so that each way to shrink them gives other pixels."""
    found = []
    for i, (width, height) in enumerate(IMAGE_SIZES):
        noise = np.random.default_rng(i).integers(0, 128, (height, width, 3))
        stripes = 127 * (np.arange(width)[None, :, None] // 5 % 2)
        found.append(Image.fromarray((noise + stripes).astype(np.uint8)))
    return found
