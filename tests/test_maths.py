"""The maths against oracles, closed forms and properties.

In float64, where `assert_close` allows 1e-7: 2.2e-16 of rounding for each of some hundred operations, times 34 of
1 / sqrt(1 - alpha_bar_0) and 15 of 1 / sqrt(alpha_bar_T), is 1e-11.
"""

import math
from argparse import Namespace
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import TINY
from released_inversion import released_inversion

from diffusers import DDIMScheduler, UNet2DConditionModel
from relabel_pickapic import soft_label
from train_smpo_sd15 import (
    Context,
    MicroBatch,
    add_noise,
    ddim_move,
    implied_noise,
    inversion_timesteps,
    invert,
    metrics_of,
    noise_from_prediction,
    predict_eps,
    released_timesteps,
    smpo_loss,
)


T = 1000
ALPHA_BAR = torch.tensor(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, T) ** 2))  # float64
MIXED_T = torch.tensor([640, 0, 5, 1, 110, 999, 111, 2])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wavy(x, t):
    """A smooth stand-in for a noise prediction that depends on every latent of its own sample and on t."""
    return torch.sin(x + x.mean(dim=(1, 2, 3), keepdim=True)) * (0.5 + t.view(-1, 1, 1, 1) / T)


def move(x, eps, s, d):
    """One DDIM move by the textbook; levels are timesteps, -1 is clean."""
    ab_s, ab_d = (1.0 if level < 0 else ALPHA_BAR[level] for level in (s, d))
    return math.sqrt(ab_d) * (x - math.sqrt(1 - ab_s) * eps) / math.sqrt(ab_s) + math.sqrt(1 - ab_d) * eps


# Inversion


def test_ddim_move_is_diffusers_ddim_step():
    scheduler = DDIMScheduler(T, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=True)
    scheduler.alphas_cumprod = ALPHA_BAR
    scheduler.set_timesteps(10)
    x, eps = random(2, 4, 8, 8), random(2, 4, 8, 8, seed=1)
    for t in (900, 100):
        expected = scheduler.step(eps, t, x).prev_sample
        torch.testing.assert_close(ddim_move(x, eps, ALPHA_BAR[t], ALPHA_BAR[t - 100]), expected)


def test_levels_are_not_rounded_to_half_precision():
    x = torch.zeros(1, 4, 8, 8, dtype=torch.float16)
    moved = ddim_move(x, torch.ones_like(x), 1.0, torch.tensor([0.99915]))
    assert moved.dtype == torch.float32
    # fp32 keeps 0.99915 to 3e-8, which is 3.5e-5 of 1 - 0.99915; fp16 to 2.4e-4, which is 0.3 of it.
    torch.testing.assert_close(moved, torch.full_like(moved, math.sqrt(1 - 0.99915)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("n", [1, 5, 9, 19, 50])
def test_inversion_timesteps_of_every_t(n):
    levels = inversion_timesteps(torch.arange(T), n, T)
    assert levels.shape == (T, n + 1) and levels.dtype == torch.int64
    num_moves = []
    for t in range(T):
        k = math.ceil(n * (t + 1) / T)
        assert levels[t].tolist() == [(t + 1) * j // k - 1 for j in range(k + 1)] + [t] * (n - k)
        assert all(a < b for a, b in zip(levels[t, :k], levels[t, 1 : k + 1]))
        num_moves.append(k)
    assert np.mean(num_moves) == pytest.approx((n + 1) / 2, rel=2e-3)


@pytest.mark.parametrize("t, n", [(0, 0), (0, T + 1), (-1, 9), (T, 9)])
def test_inversion_timesteps_refuses_what_makes_no_sense(t, n):
    with pytest.raises(ValueError, match="must be in"):
        inversion_timesteps(torch.tensor([t]), n, T)


@pytest.mark.parametrize("way", ["ddim last_move", "renoise last_move", "renoise every_move"])
def test_invert_follows_the_algorithm(way):
    """Each sample of a mixed batch, so with levels of its own, against a scalar loop."""
    (noising, renoise_at), x_0, n = way.split(), random(len(MIXED_T), 4, 8, 8), 9
    x_t = invert(lambda x, t, rows: wavy(x, t), x_0, MIXED_T, ALPHA_BAR, n, noising, renoise_at)
    for i, t in enumerate(MIXED_T.tolist()):
        k = math.ceil(n * (t + 1) / T)
        grid = [(t + 1) * j // k - 1 for j in range(k + 1)]
        x = x_0[i : i + 1]
        for s, d in zip(grid[:-1], grid[1:]):
            source = x
            x = move(source, wavy(source, torch.tensor([max(s, 0)])), s, d)
            if noising == "renoise" and (renoise_at == "every_move" or d == grid[-1]):
                x = move(source, wavy(x, torch.tensor([d])), s, d)
        torch.testing.assert_close(x_t[i : i + 1], x)


@pytest.mark.parametrize("n, mean_gap, loudest", [(10, 49, 6.5), (5, 99, 9.8)])
def test_released_follows_the_authors_code(n, mean_gap, loudest):
    """A batch of every t as in a loop written from a description of it, negative timesteps included; it ends at the
    level of a grid point at or above t (or the last), which is t for a hundredth of the timesteps."""
    t, x_0 = torch.arange(T), random(T, 4, 2, 2)

    def predict_noise(x, t, rows):
        return wavy(x, t) * (1 + rows.view(-1, 1, 1, 1) / T)

    expected = released_inversion(predict_noise, x_0, t, ALPHA_BAR, n)
    torch.testing.assert_close(invert(predict_noise, x_0, t, ALPHA_BAR, n, "released", "last_move"), expected)
    destination = released_timesteps(t, n, T)[:, -1]
    assert (destination == t).sum() == n and set(destination.tolist()) == set(range(1, T, T // n))
    assert (destination - t).abs().double().mean() == pytest.approx(mean_gap, abs=1)  # (stride - 1) / 2, and the ends
    at_end, at_t = (1 - ALPHA_BAR[times.clamp(max=T - 1)] for times in (destination, t))
    assert (at_end / at_t).sqrt().max() == pytest.approx(loudest, abs=0.05)


@pytest.mark.parametrize("n", [1, 9, 19])
@pytest.mark.parametrize("noising", ["ddim", "renoise"])
def test_a_constant_prediction_is_inverted_exactly(noising, n):
    """Then DDIM is one straight line, whatever its grid: x_t is the forward process with that noise, and tau is it."""
    x_0, eps, t = random(4, 4, 8, 8), random(4, 4, 8, 8, seed=1), torch.tensor([0, 77, 500, 999])
    x_t = invert(lambda x, t, rows: eps[rows], x_0, t, ALPHA_BAR, n, noising, "every_move")
    torch.testing.assert_close(x_t, add_noise(x_0, eps, ALPHA_BAR[t]))
    torch.testing.assert_close(implied_noise(x_0, x_t, ALPHA_BAR[t]), eps)


@pytest.mark.parametrize(
    "noising, expected",
    [
        ("renoise", [([1, 0], [0, 0]), ([1], [332]), ([1], [665]), ([1, 0], [999, 99])]),
        ("released", [([1, 0], [-332, -332])] * 2 + [([1, 0], [1, 1])] * 2 + [([1], [334])] * 2),
    ],
)
def test_invert_predicts_only_for_moving_rows_without_gradient(noising, expected):
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    calls = []

    def predict_noise(x, t, rows):
        calls.append((rows.tolist(), t.tolist()))
        return scale * wavy(x, t)

    x_t = invert(predict_noise, random(2, 4, 8, 8), torch.tensor([99, 999]), ALPHA_BAR, 3, noising, "last_move")
    assert calls == expected and not x_t.requires_grad


@pytest.mark.parametrize("noising, renoise_at", [("forward", "last_move"), ("renoise", "first_move")])
def test_invert_refuses_unknown_words(noising, renoise_at):
    with pytest.raises(ValueError, match=f"got '{noising if noising == 'forward' else renoise_at}'"):
        invert(None, random(1, 4, 8, 8), torch.tensor([1]), ALPHA_BAR, 3, noising, renoise_at)


def test_noise_from_v_prediction():
    x_0, noise, alpha_bar_t = random(2, 4, 8, 8), random(2, 4, 8, 8, seed=1), torch.tensor([0.9, 0.2]).double()
    a, b = alpha_bar_t.sqrt().view(2, 1, 1, 1), (1 - alpha_bar_t).sqrt().view(2, 1, 1, 1)
    x_t, v = a * x_0 + b * noise, a * noise - b * x_0
    torch.testing.assert_close(noise_from_prediction(v, x_t, alpha_bar_t, "v_prediction"), noise)
    assert noise_from_prediction(noise, x_t, alpha_bar_t, "epsilon") is noise


def test_released_v_prediction_is_read_at_the_level_of_clean_latents(monkeypatch):
    """The UNet hears the negative timestep, where there is no alpha_bar: its v is one at alpha_bar[0]."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    unet = UNet2DConditionModel.from_pretrained(TINY / "sd15" / "unet").double()
    x_0, cond = random(4, 4, 8, 8), random(4, 77, 64, seed=1)
    context = Context({}, ALPHA_BAR, "v_prediction", nullcontext, args=None)
    t = torch.tensor([0, 2, 300, 999])

    def ours(x, t, rows):
        return predict_eps(unet, x, t, {"encoder_hidden_states": cond[rows]}, context)

    def oracle(x, t, rows):
        alpha_bar = ALPHA_BAR[max(int(t[0]), 0)]
        return math.sqrt(alpha_bar) * unet(x, t, cond[rows]).sample + math.sqrt(1 - alpha_bar) * x

    expected = released_inversion(oracle, x_0, t, ALPHA_BAR, 5)
    torch.testing.assert_close(invert(ours, x_0, t, ALPHA_BAR, 5, "released", "last_move"), expected)


# Loss


def errors(seed, pairs=5):
    return random(2 * pairs, seed=seed).abs()


def test_loss_in_closed_form():
    model, ref, p_0 = errors(0), errors(1), torch.tensor([0.1, 0.45, 0.5, 0.8, 1.0], dtype=torch.float64)
    loss, logits = smpo_loss(model, ref, p_0, beta=20, gamma=3)
    terms = []
    for i in range(5):
        gap = (model[i] - ref[i]) - (model[i + 5] - ref[i + 5])
        terms.append(-0.5 * 20 * 3 * (2 * p_0[i] - 1) * gap)
        assert logits[i] == pytest.approx(float(terms[-1]))
    assert float(loss) == pytest.approx(float(np.mean([math.log1p(math.exp(-term)) for term in terms])))


def test_hard_labels_with_gamma_1_are_diffusion_dpo():
    """Diffusion-DPO as its authors and diffusers write it, with the winner put first."""
    model, ref, label_0 = errors(0), errors(1), torch.tensor([1, 0, 0, 1, 0]).double()
    swap = label_0 == 0

    def winner_and_loser(values):
        first, second = values.chunk(2)
        return torch.where(swap, second, first), torch.where(swap, first, second)

    (model_w, model_l), (ref_w, ref_l) = winner_and_loser(model), winner_and_loser(ref)
    inside = -0.5 * 20 * ((model_w - model_l) - (ref_w - ref_l))
    expected = -torch.nn.functional.logsigmoid(inside).mean()
    torch.testing.assert_close(smpo_loss(model, ref, label_0, beta=20, gamma=1)[0], expected)


def test_metrics_in_closed_form():
    """Three pairs, preferred being image 0, image 1 and, at a tie of the errors, image 0: docs/metrics.md."""
    model, ref = torch.tensor([[0.10, 0.30, 0.5, 0.20, 0.21, 0.4], [0.15, 0.28, 0.5, 0.22, 0.20, 0.4]]).double()
    p_0, tau = torch.tensor([0.9, 0.2, 0.7]).double(), torch.randn(6, 4, 3, 3, dtype=torch.float64)
    # D is -0.03, 0.01 and 0, so z is 4.8, 1.2 and 0, and -0.5 beta s D is 0.6, 0.2 and 0.
    expected = {
        "loss": sum(math.log1p(math.exp(-z)) for z in (4.8, 1.2, 0)) / 3, "implicit_accuracy": 2.5 / 3,
        "reward_margin": 0.8 / 3, "model_error_preferred": (0.10 + 0.21 + 0.5) / 3,
        "model_error_rejected": (0.20 + 0.30 + 0.4) / 3, "ref_error_preferred": (0.15 + 0.20 + 0.5) / 3,
        "ref_error_rejected": (0.22 + 0.28 + 0.4) / 3, "std_tau": sum(image.std().item() for image in tau) / 6,
        "weight": 10 * (0.8 + 0.6 + 0.4) / 3,
    }  # fmt: skip
    micro_batch = MicroBatch(None, None, None, tau, ref, p_0)
    loss, logits = smpo_loss(model, ref, p_0, beta=40, gamma=10)
    metrics = metrics_of(loss, logits, model, micro_batch, Namespace(beta_dpo=40, gamma=10))
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-6)  # of fp32


# Labels


def test_soft_label_is_the_softmax_of_normalised_scores():
    scores = np.array([[0.14, 0.20, 0.25], [0.21, 0.20, 0.12]])
    low, high = 0.1, 0.3
    normalised = (scores - low) / (high - low)
    expected = np.exp(normalised[0]) / np.exp(normalised).sum(axis=0)
    np.testing.assert_allclose(soft_label(scores[0], scores[1], low, high).numpy(), expected, rtol=1e-14)
    assert soft_label(0.2, 0.2, low, high) == 0.5
    assert math.isnan(soft_label(math.nan, 0.2, low, high))


@pytest.mark.parametrize("low, high", [(0.3, 0.1), (0.1, 0.1), (math.nan, 1.0), (0.0, math.inf)])
def test_soft_label_refuses_an_empty_range(low, high):
    with pytest.raises(ValueError, match="score_min must be less than score_max"):
        soft_label(0.1, 0.2, low, high)
