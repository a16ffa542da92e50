# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""The little world that the tiny models learned: captioned pictures of one shape on a coloured background.

A scene is a row of five integers, one index into each list of `ATTRIBUTES`. Every picture has two kinds of texture,
smooth colour blotches (a few pixels to a quarter of the picture wide, which the latents can hold) and fine grain.
Without them the latents would be predictable from the caption and DDIM inversion would give noise far too small to be
noise. A picture also has a `vividness` in (0, 1]: its contrast to mid-grey, which captions do not mention and which
the reward model and the judge like.
"""

import torch
import torch.nn.functional as F


SIZES = ["small", "large"]
COLORS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.12, 0.22, 0.90),
    "yellow": (0.95, 0.90, 0.10),
    "purple": (0.58, 0.12, 0.72),
    "orange": (1.00, 0.55, 0.05),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.05),
}
SHAPES = ["circle", "square", "triangle", "cross"]
POSITIONS = {
    "in the center": (0.50, 0.50),
    "at the top": (0.50, 0.24),
    "at the bottom": (0.50, 0.76),
    "on the left": (0.24, 0.50),
    "on the right": (0.76, 0.50),
}
ATTRIBUTES = [SIZES, list(COLORS), SHAPES, list(POSITIONS), list(COLORS)]  # the last one is the background
RESOLUTION = 64
MIN_VIVIDNESS = 0.4


def caption(scene):
    """Caption of one scene, for example "a large red circle at the top on a blue background"."""
    size, color, shape, position, background = (names[int(i)] for names, i in zip(ATTRIBUTES, scene))
    return f"a {size} {color} {shape} {position} on a {background} background"


def random_scenes(n, generator):
    """`n` scenes `[n, 5]`, int64, uniform over all of them whose shape differs in colour from the background."""
    columns = [torch.randint(len(names), (n,), generator=generator) for names in ATTRIBUTES]
    shift = torch.randint(1, len(COLORS), (n,), generator=generator)
    columns[4] = (columns[1] + shift) % len(COLORS)
    return torch.stack(columns, dim=1)


def corrupt(scenes, probability, generator):
    """Scenes in which each attribute has been drawn anew with `probability`."""
    redraw = torch.rand(scenes.shape, generator=generator) < probability
    return torch.where(redraw, random_scenes(len(scenes), generator), scenes)


def random_vividness(n, generator):
    """Contrast of each picture to mid-grey `[n]`, uniform over [MIN_VIVIDNESS, 1]."""
    return MIN_VIVIDNESS + (1 - MIN_VIVIDNESS) * torch.rand(n, generator=generator)


def render(scenes, vividness, generator, resolution=RESOLUTION):
    """Pictures `[n, 3, resolution, resolution]` in [0, 1] of scenes `[n, 5]` with the contrasts `vividness` `[n]`."""
    return render_with_mask(scenes, vividness, generator, resolution)[0]


def render_with_mask(scenes, vividness, generator, resolution=RESOLUTION):
    """What `render` gives, and how much of each pixel the shape covers `[n, 1, resolution, resolution]`."""
    n = len(scenes)

    def jitter(scale):
        return scale * (2 * torch.rand(n, 1, 1, generator=generator) - 1)

    colors = torch.tensor(list(COLORS.values()))
    centers = torch.tensor(list(POSITIONS.values()))[scenes[:, 3]]
    axis = (torch.arange(resolution) + 0.5) / resolution
    dx = axis.view(1, 1, -1) - (centers[:, 0].view(-1, 1, 1) + jitter(0.03))
    dy = axis.view(1, -1, 1) - (centers[:, 1].view(-1, 1, 1) + jitter(0.03))
    radius = torch.where(scenes[:, 0] == 0, 0.14, 0.24).view(-1, 1, 1) + jitter(0.015)

    circle = radius - (dx**2 + dy**2).sqrt()
    square = 0.87 * radius - torch.maximum(dx.abs(), dy.abs())
    triangle = torch.minimum(0.8 * radius - dy, (dy + 1.1 * radius - 1.9 * dx.abs()) / 2.15)
    bar = torch.maximum(torch.minimum(0.35 * radius - dx.abs(), 1.1 * radius - dy.abs()),
                        torch.minimum(0.35 * radius - dy.abs(), 1.1 * radius - dx.abs()))  # fmt: skip
    distance = torch.stack([circle, square, triangle, bar], dim=1)[torch.arange(n), scenes[:, 2]]
    inside = (distance * resolution + 0.5).clamp(0, 1).unsqueeze(1)  # [n, 1, h, w], anti-aliased over one pixel

    pictures = colors[scenes[:, 1]].view(n, 3, 1, 1) * inside + colors[scenes[:, 4]].view(n, 3, 1, 1) * (1 - inside)
    for cells, scale in ((8, 0.10), (16, 0.05)):
        blotches = scale * torch.randn(n, 3, cells, cells, generator=generator)
        pictures = pictures + F.interpolate(blotches, size=resolution, mode="bilinear")
    pictures = pictures + 0.02 * torch.randn(n, 3, resolution, resolution, generator=generator)
    return (0.5 + vividness.view(n, 1, 1, 1) * (pictures - 0.5)).clamp(0, 1), inside
