"""The maths against float64 oracles, closed forms and properties."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY
from released_inversion import released_destination, released_inversion
from world import caption, random_scenes, random_vividness, render

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from relabel_pickapic import soft_label
from train_smpo_sd15 import (
    add_noise,
    ddim_move,
    encode_prompts,
    implied_noise,
    inversion_timesteps,
    invert,
    noise_from_prediction,
    smpo_loss,
)


T = 1000
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, T) ** 2
ALPHA_BAR = np.cumprod(1 - BETAS)


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
    scheduler.set_timesteps(10)
    x, eps = random(2, 4, 8, 8), random(2, 4, 8, 8, seed=1)
    for t in (900, 100):
        expected = scheduler.step(eps, t, x).prev_sample
        alpha_bar = scheduler.alphas_cumprod.double()
        ours = ddim_move(x, eps, alpha_bar[t], alpha_bar[t - 100])
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_ddim_move_takes_a_level_for_each_sample_and_undoes_itself():
    x, eps = random(3, 4, 8, 8), random(3, 4, 8, 8, seed=1)
    s, d = torch.tensor([0.9, 0.5, 1.0]), torch.tensor([0.1, 0.7, 0.2])
    together = ddim_move(x, eps, s, d)
    for i in range(3):
        alone = ddim_move(x[i : i + 1], eps[i : i + 1], float(s[i]), float(d[i]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(ddim_move(together, eps, d, s), x)


def test_levels_are_not_rounded_to_half_precision():
    x = torch.zeros(1, 4, 8, 8, dtype=torch.float16)
    moved = ddim_move(x, torch.ones_like(x), 1.0, torch.tensor([0.99915]))
    assert moved.dtype == torch.float32
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


@pytest.mark.parametrize(
    "noising, renoise_at", [("ddim", "last_move"), ("renoise", "last_move"), ("renoise", "every_move")]
)
def test_invert_follows_the_algorithm(noising, renoise_at):
    """Each sample against a scalar loop in float64; a mixed batch equals batches of one."""
    x_0, t, n = random(6, 4, 8, 8), torch.tensor([0, 5, 110, 111, 640, 999]), 9
    x_t = invert(lambda x, t, rows: wavy(x, t), x_0, t, torch.tensor(ALPHA_BAR), n, noising, renoise_at)
    for i in range(len(t)):
        k = math.ceil(n * (int(t[i]) + 1) / T)
        grid = [(int(t[i]) + 1) * j // k - 1 for j in range(k + 1)]
        x = x_0[i : i + 1]
        for s, d in zip(grid[:-1], grid[1:]):
            source = x
            x = move(source, wavy(source, torch.tensor([max(s, 0)])), s, d)
            if noising == "renoise" and (renoise_at == "every_move" or d == grid[-1]):
                x = move(source, wavy(x, torch.tensor([d])), s, d)
        torch.testing.assert_close(x_t[i : i + 1], x)


@pytest.mark.parametrize("n", [1, 9, 19])
@pytest.mark.parametrize("noising", ["ddim", "renoise"])
def test_a_constant_prediction_is_inverted_exactly(noising, n):
    """Then DDIM is one straight line, whatever its grid: x_t is the forward process with that noise, and tau is it."""
    x_0, eps, t = random(4, 4, 8, 8), random(4, 4, 8, 8, seed=1), torch.tensor([3, 77, 500, 999])
    alpha_bar = torch.tensor(ALPHA_BAR)
    x_t = invert(lambda x, t, rows: eps[rows], x_0, t, alpha_bar, n, noising, "every_move")
    torch.testing.assert_close(x_t, add_noise(x_0, eps, alpha_bar[t]))
    torch.testing.assert_close(implied_noise(x_0, x_t, alpha_bar[t]), eps)


def test_invert_predicts_only_for_moving_rows_without_gradient():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    calls = []

    def predict_noise(x, t, rows):
        calls.append((rows.tolist(), t.tolist()))
        return scale * wavy(x, t)

    alpha_bar = torch.tensor(ALPHA_BAR)
    x_t = invert(predict_noise, random(2, 4, 8, 8), torch.tensor([99, 999]), alpha_bar, 3, "renoise", "last_move")
    assert calls == [([1, 0], [0, 0]), ([1], [332]), ([1], [665]), ([1, 0], [999, 99])]
    assert not x_t.requires_grad


@pytest.mark.parametrize("noising, renoise_at", [("forward", "last_move"), ("renoise", "first_move")])
def test_invert_refuses_unknown_words(noising, renoise_at):
    with pytest.raises(ValueError, match=f"got '{noising if noising == 'forward' else renoise_at}'"):
        invert(None, random(1, 4, 8, 8), torch.tensor([1]), torch.tensor(ALPHA_BAR), 3, noising, renoise_at)


def test_implied_noise_undoes_add_noise():
    x_0, noise, t = random(3, 4, 8, 8), random(3, 4, 8, 8, seed=1), torch.tensor([0, 500, 999])
    alpha_bar_t = torch.tensor(ALPHA_BAR)[t]
    torch.testing.assert_close(implied_noise(x_0, add_noise(x_0, noise, alpha_bar_t), alpha_bar_t), noise)


def test_noise_from_v_prediction():
    x_0, noise, alpha_bar_t = random(2, 4, 8, 8), random(2, 4, 8, 8, seed=1), torch.tensor([0.9, 0.2]).double()
    a, b = alpha_bar_t.sqrt().view(2, 1, 1, 1), (1 - alpha_bar_t).sqrt().view(2, 1, 1, 1)
    x_t, v = a * x_0 + b * noise, a * noise - b * x_0
    torch.testing.assert_close(noise_from_prediction(v, x_t, alpha_bar_t, "v_prediction"), noise)
    assert noise_from_prediction(noise, x_t, alpha_bar_t, "epsilon") is noise


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


def test_loss_of_equal_models_is_log_2_exactly():
    loss, logits = smpo_loss(errors(0), errors(0), torch.rand(5).double(), beta=2000, gamma=10)
    assert float(loss) == math.log(2) and not logits.any()


def test_an_undecided_pair_has_no_gradient():
    model = errors(0).requires_grad_()
    smpo_loss(model, errors(1), torch.full((5,), 0.5).double(), beta=2000, gamma=10)[0].backward()
    assert not model.grad.any()


def test_swapping_the_images_and_the_label_changes_nothing():
    model, ref, p_0 = errors(0), errors(1), torch.rand(5).double()
    swapped = smpo_loss(model.roll(5), ref.roll(5), 1 - p_0, beta=20, gamma=3)[0]
    torch.testing.assert_close(smpo_loss(model, ref, p_0, beta=20, gamma=3)[0], swapped)


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


# Labels


def test_soft_label_is_the_softmax_of_normalised_scores():
    scores = np.array([[0.14, 0.20, 0.25], [0.21, 0.20, 0.12]])
    low, high = 0.1, 0.3
    normalised = (scores - low) / (high - low)
    expected = np.exp(normalised[0]) / np.exp(normalised).sum(axis=0)
    np.testing.assert_allclose(soft_label(scores[0], scores[1], low, high).numpy(), expected, rtol=1e-14)
    assert soft_label(0.2, 0.2, low, high) == 0.5
    assert math.isnan(soft_label(math.nan, 0.2, low, high))


@pytest.mark.parametrize("gap, weight", [(1.0, 0.30), (3.34, 1.0), (16.658, 4.62)])
def test_weight_of_a_pickscore_gap_with_the_published_range(gap, weight):
    """gamma (2 p - 1) = gamma tanh(gap / 2) for a gap given on the axis of 100 x cosine, gamma = 10."""
    p = soft_label(0.2 + gap / 100, 0.2, 0.11543526500463486, 0.28201571106910706)
    assert float(10 * (2 * p - 1)) == pytest.approx(weight, rel=0.01)


@pytest.mark.parametrize("low, high", [(0.3, 0.1), (0.1, 0.1), (math.nan, 1.0), (0.0, math.inf)])
def test_soft_label_refuses_an_empty_range(low, high):
    with pytest.raises(ValueError, match="score_min must be less than score_max"):
        soft_label(0.1, 0.2, low, high)


# On the tiny model, which really learned


@pytest.fixture(scope="module")
def tiny():
    pipeline = StableDiffusionPipeline.from_pretrained(TINY / "sd15", torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    scenes = random_scenes(32, generator)
    pictures = render(scenes, random_vividness(32, generator), generator)
    cond = encode_prompts([caption(s) for s in scenes], pipeline.components)
    with torch.no_grad():
        x_0 = pipeline.vae.encode(2 * pictures - 1).latent_dist.sample(generator)
    x_0 = x_0 * pipeline.vae.config.scaling_factor
    assert isinstance(pipeline.unet, UNet2DConditionModel) and isinstance(pipeline.vae, AutoencoderKL)

    def predict_noise(x, t, rows):
        with torch.no_grad():
            return pipeline.unet(x, t, cond["encoder_hidden_states"][rows]).sample

    return predict_noise, x_0


def test_fidelity_of_the_inversions(tiny):
    """Against 100 moves corrected at every one: at equal cost correcting every move beats more moves, and finely inverted
    noise looks like noise, which a test bed of this method needs."""
    predict_noise, x_0 = tiny
    alpha_bar = torch.tensor(ALPHA_BAR, dtype=torch.float32)
    t = torch.full((len(x_0),), 599)

    def tau(n, noising, renoise_at="last_move"):
        return implied_noise(x_0, invert(predict_noise, x_0, t, alpha_bar, n, noising, renoise_at), alpha_bar[t])

    fine = tau(100, "renoise", "every_move")
    assert 0.8 < fine.std() < 1.1

    def distance(*args):
        return (tau(*args) - fine).pow(2).mean().sqrt()

    plain, corrected = distance(10, "ddim"), distance(5, "renoise", "every_move")
    assert corrected < 0.85 * plain < 0.5, (corrected, plain)


@pytest.mark.parametrize("num_levels, mean_gap", [(10, 49), (5, 99)])
def test_the_released_inversion_ends_beside_t(num_levels, mean_gap):
    """Its latents are at the noise level of a grid point at or above t, which is t for a hundredth of the timesteps."""
    alpha_bar, t = torch.linspace(0.999, 0.004, 1000, dtype=torch.float64), torch.arange(1000)
    x_t = released_inversion(lambda x, *_: torch.zeros_like(x), torch.ones(1000, 1), t, alpha_bar, num_levels)
    destination = released_destination(t, 1000, num_levels)
    torch.testing.assert_close(x_t[:, 0].double(), (alpha_bar[destination] / alpha_bar[0]).sqrt(), rtol=1e-5, atol=0)
    assert (destination == t).sum() == num_levels
    assert (destination - t).abs().double().mean() == pytest.approx(mean_gap, abs=1)
