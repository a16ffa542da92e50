# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""The judge of the little world: a small convolutional network that reads the attributes off a picture.

It stands for the human who labelled the pairs, and for a second opinion that the reward model did not train. Its score
of a picture for a scene is the sum of the log-probabilities of the scene's attributes plus twice the vividness.
"""

import torch
import torch.nn.functional as F
from torch import nn
from world import ATTRIBUTES


class Judge(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        layers = []
        for i, (c_in, c_out) in enumerate([(3, width), (width, width), (width, 2 * width), (2 * width, 2 * width)]):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2 if i else 1, padding=1), nn.GroupNorm(8, c_out), nn.SiLU()]
        self.features = nn.Sequential(*layers)  # [N, 2 width, 8, 8]
        self.attributes = nn.ModuleList(nn.Linear(2 * width * 16, len(names)) for names in ATTRIBUTES)
        self.vividness = nn.Linear(2 * width * 16, 1)

    def forward(self, pictures):
        """Log-probabilities of each attribute (a list of `[N, len(names)]`) and the vividness `[N]` of `[N, 3, 64,
        64]`."""
        features = F.avg_pool2d(self.features(2 * pictures - 1), 2).flatten(1)
        return [head(features).log_softmax(-1) for head in self.attributes], self.vividness(features)[:, 0]

    @torch.no_grad()
    def score(self, pictures, scenes):
        """How well each of the pictures `[N, 3, 64, 64]` in [0, 1] shows its scene `[N, 5]`: `[N]`, higher is
        better."""
        log_probs, vividness = self(pictures)
        matches = [log_prob.gather(1, scenes[:, i : i + 1])[:, 0] for i, log_prob in enumerate(log_probs)]
        return torch.stack(matches).sum(0).clamp(min=-8) + 2 * vividness
