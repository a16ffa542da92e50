"""How the authors' released code reaches x_t, written from a description of it: an oracle for tests, not for use.

It takes a fixed grid of levels and diffusers 0.20's inverse DDIM scheduler, whose `step(t)` goes from t to t + stride.
So the first prediction of a run is conditioned on a negative timestep, clean latents are taken to lie at alpha_bar[0],
and the latents end on the smallest level at or above t (or the last) although they are scored as if they were at t. At
every level the move is done twice, the second time with the mean of the predictions before and after the first; both
are conditioned on the level that the move starts from (inferred).
"""

import torch

from train_smpo_sd15 import ddim_move


@torch.no_grad()
def released_inversion(predict_noise, x_0, t, alpha_bar, num_levels):
    """Latents that the released code takes for x_t.

    Args:
        predict_noise, x_0, t, alpha_bar: as for `invert`; timesteps below 0 are passed to `predict_noise` as they are.
        num_levels: 5 in the released SD1.5 script, 10 in that for SDXL.

    Returns:
        Latents like `x_0`, at the noise level of the smallest level at or above t, or the last.
    """
    stride, x = len(alpha_bar) // num_levels, x_0.clone()
    for source in range(1 - stride, 1 + (num_levels - 1) * stride, stride):
        rows = (source < t).nonzero()[:, 0]
        if not len(rows):
            break
        x_s, timesteps = x[rows], torch.full_like(rows, source)
        levels = alpha_bar[max(source, 0)], alpha_bar[source + stride]
        eps = predict_noise(x_s, timesteps, rows)
        eps_again = predict_noise(ddim_move(x_s, eps, *levels), timesteps, rows)
        x[rows] = ddim_move(x_s, (eps + eps_again) / 2, *levels)
    return x
