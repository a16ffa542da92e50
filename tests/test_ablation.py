"""The ablation trains as the scripts do, its rows are what they say, and its tables are rightly computed."""

import argparse
import dataclasses
import math
import re

import bed as bed_module
import make_tables
import numpy as np
import pytest
import run_ablation
import torch
from bed import Bed, Pairs, Row, draw_batch, order_of, scene_of
from conftest import TINY, train, train_flags
from make_tables import (
    Runs,
    comparison_table,
    few_table,
    grid_table,
    holm,
    mean_interval,
    paired,
    t_quantile,
    two_sided_p,
)
from released_inversion import released_inversion
from run_ablation import ROWS, RUN_FIELDS, append_csv, key_of, read_csv
from world import caption, random_scenes

import train_smpo_sd15


@pytest.fixture(scope="module")
def bed():
    return Bed()


@pytest.fixture(scope="module")
def policy(bed):
    """The base model a little off."""
    unet = bed.new_policy()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.02 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    return unet


@pytest.fixture(scope="module")
def batch(bed):
    """Three pairs: x_0, prompts, timesteps, noise, labels."""
    generator = torch.Generator().manual_seed(4)
    x_0 = torch.randn(6, 4, 8, 8, generator=generator)
    states = bed.embed([caption(scene) for scene in random_scenes(3, generator)]).repeat(2, 1, 1)
    noise = torch.randn(3, 4, 8, 8, generator=generator).repeat(2, 1, 1, 1)
    return x_0, states, torch.tensor([30, 420, 980]).repeat(2), noise, torch.tensor([0.9, 0.2, 0.6])


@pytest.mark.parametrize(
    "name, guidance", [("forward_hard", 1), ("ddim_hard", 1), ("last_soft", 1), ("last_hard", 3), ("every_soft", 1)]
)
def test_it_trains_as_the_script_does(name, guidance, bed, labels_path, tmp_path, monkeypatch):
    """Three optimiser steps on four pairs have the losses that the script logs."""
    row = dataclasses.replace(ROWS[name], guidance=float(guidance), learning_rate=3e-4)
    inverting, num_pairs, num_steps = row.noising != "forward", 4, 3
    flags = {
        "labels_path": labels_path, "train_batch_size": num_pairs, "max_train_samples": num_pairs,
        "max_train_steps": num_steps, "proportion_empty_prompts": 0, "learning_rate": row.learning_rate,
        "noising": row.noising, "renoise_at": row.renoise_at if row.noising == "renoise" else None,
        "num_inversion_steps": row.num_inversion_steps if inverting else None,
        "inversion_guidance_scale": row.guidance if inverting else None, "gamma": row.gamma, "beta_dpo": row.beta,
    }  # fmt: skip
    if row.labels == "hard":
        flags.update(labels_path=None, label_column="label_0")
    logged = train(tmp_path / "run", **flags)["loss"]

    args = train_smpo_sd15.parse_args(train_flags(tmp_path / "again", **flags))
    table = train_smpo_sd15.open_pairs(args)
    rows, labels = train_smpo_sd15.select_pairs(table, args.labels_path, args)
    chosen = np.sort(np.random.default_rng(args.seed).permutation(len(rows))[:num_pairs])
    dataset = train_smpo_sd15.PairDataset(table, rows[chosen], labels[chosen], 1000, args)

    def batch_of_step(pairs, labels, chosen, seed, step):
        examples = [dataset[step - 1, i] for i in range(num_pairs)]
        pixels = torch.stack([example["pixel_values"][k] for k in (0, 1) for example in examples])
        seeds_0, seeds_1, noise_seeds = zip(*(example["seeds"] for example in examples))
        x_0 = train_smpo_sd15.encode_images(pixels, bed.vae, 8, seeds_0 + seeds_1)
        states = bed.embed([example["caption"] for example in examples]).repeat(2, 1, 1)
        t = torch.tensor([example["timestep"] for example in examples]).repeat(2)
        noise = train_smpo_sd15.seeded_noise(noise_seeds, x_0.shape[1:]).repeat(2, 1, 1, 1)
        return x_0, states, t, noise, torch.tensor([example["soft_label_0"] for example in examples])

    losses, loss_of = [], bed.loss

    def kept_loss(*arguments):
        loss, calls = loss_of(*arguments)
        losses.append(loss.item())
        return loss, calls

    monkeypatch.setattr(bed, "loss", kept_loss)
    monkeypatch.setattr(run_ablation, "draw_batch", batch_of_step)
    monkeypatch.setattr(run_ablation, "PAIRS_PER_STEP", num_pairs)
    monkeypatch.setattr(run_ablation, "WARMUP_STEPS", 1)
    pairs = Pairs(None, None, None, torch.zeros(num_pairs), torch.zeros(num_pairs))
    steps = [step for step, *_ in run_ablation.train(bed, row, pairs, 0, num_steps, [1, 3], lambda unet: {})]
    assert steps == [1, 3]
    assert losses[0] == pytest.approx(math.log(2)) and abs(losses[-1] - losses[0]) > 0.01
    assert losses == pytest.approx(logged, rel=1e-3)


def test_forward_and_hard_is_diffusion_dpo(bed, policy, batch):
    """Its published loss, in float64 from the predictions: -log sigmoid(-beta/2 (winner's gap - loser's gap))."""
    x_0, states, t, noise, _ = batch
    winner_0 = torch.tensor([True, False, True])
    row = ROWS["forward_hard"]
    assert (row.noising, row.gamma, row.labels) == ("forward", 1.0, "hard")
    loss, calls = bed.loss(row, policy, (x_0, states, t, noise, winner_0.float()))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)[t].view(-1, 1, 1, 1)
    x_t = (alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise).float()
    with torch.no_grad():
        gaps = [(unet(x_t, t, states).sample.double() - noise).pow(2).mean((1, 2, 3)) for unet in (policy, bed.unet)]
    gap_0, gap_1 = (gaps[0] - gaps[1]).chunk(2)
    winner, loser = torch.where(winner_0, gap_0, gap_1), torch.where(winner_0, gap_1, gap_0)
    expected = torch.log1p(torch.exp(row.beta / 2 * (winner - loser))).mean()
    assert abs(float(expected) - math.log(2)) > 0.01
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert calls == 6 * 4


def test_every_row_reaches_x_t_as_it_says(bed, policy, batch):
    x_0, states, t, noise, _ = batch

    def predict(x, timesteps, rows):
        return policy(x, timesteps, states[rows]).sample

    expected = {
        "ddim_hard": train_smpo_sd15.invert(predict, x_0, t, bed.alpha_bar, 9, "ddim", "last_move"),
        "last_hard": train_smpo_sd15.invert(predict, x_0, t, bed.alpha_bar, 9, "renoise", "last_move"),
        "every_hard": train_smpo_sd15.invert(predict, x_0, t, bed.alpha_bar, 5, "renoise", "every_move"),
        "released_hard": released_inversion(predict, x_0, t, bed.alpha_bar, 5),
    }
    moves = torch.tensor([1, 4, 9]), torch.tensor([1, 3, 5]), torch.tensor([2, 4, 5])
    num_calls = dict(zip(expected, (moves[0].sum(), moves[0].sum() + 3, 2 * moves[1].sum(), 2 * moves[2].sum())))
    with torch.no_grad():
        reached = {name: bed.noised(ROWS[name], policy, x_0, states, t, noise) for name in expected}
    for name, x_t in expected.items():
        torch.testing.assert_close(reached[name][0], x_t, rtol=1e-4, atol=1e-4)
        assert reached[name][1] == 2 * num_calls[name], name
        soft = name.replace("hard", "soft")
        if soft in ROWS:
            assert ROWS[soft] == dataclasses.replace(ROWS[name], labels="soft", gamma=10.0)
    for a in expected:
        assert all(a == b or (expected[a] - expected[b]).abs().max() > 0.01 for b in expected)
    guided = dataclasses.replace(ROWS["last_hard"], guidance=3.0)
    with torch.no_grad():
        assert bed.noised(guided, policy, x_0, states, t, noise)[1] == 2 * reached["last_hard"][1]


def test_remedies_take_forward_noise_where_they_say(bed, policy, batch):
    """Of the timesteps 30, 420 and 980 the last is above the half; 30 is reached in one move."""
    x_0, states, t, noise, _ = batch
    rows = {"inverted": Row(**run_ablation.EVERY), "forward": ROWS["forward_hard"], **run_ablation.REMEDIES}
    with torch.no_grad():
        found = {name: bed.noised(row, policy, x_0, states, t, noise) for name, row in rows.items()}
        last = bed.noised(Row(), policy, x_0, states, t, noise)[0]
    x = {name: x_t for name, (x_t, _) in found.items()}
    above = t >= 500
    for name, inverted in (("every", x["inverted"]), ("last", last)):
        tau = train_smpo_sd15.implied_noise(x_0, inverted, bed.alpha_bar[t])
        mixed = train_smpo_sd15.implied_noise(x_0, x[f"{name}_mixed"], bed.alpha_bar[t])
        torch.testing.assert_close(mixed * 2**0.5, tau + noise, rtol=1e-3, atol=1e-3)
        expected = torch.where(above.view(-1, 1, 1, 1), x["forward"], inverted)
        torch.testing.assert_close(x[f"{name}_above"], expected, rtol=1e-4, atol=1e-4)
    expected = torch.where(above.view(-1, 1, 1, 1), x["inverted"], x["forward"])
    torch.testing.assert_close(x["every_below"], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(x["every_first"][t == 30], x["forward"][t == 30])
    calls = {name: calls for name, (_, calls) in found.items()}
    moves = {"inverted": 2 * (1 + 3 + 5), "every_above": 2 * (1 + 3), "every_below": 2 * 5, "every_first": 2 * (2 + 4)}
    assert {name: calls[name] for name in moves} == {name: 2 * count for name, count in moves.items()}
    assert calls["every_mixed"] == calls["inverted"] and calls["last_mixed"] == 2 * (1 + 4 + 9 + 3)

    # From where the first move leads, every move is redone with the prediction at its end.
    middle, levels = t == 420, train_smpo_sd15.inversion_timesteps(torch.tensor([420]), 5, 1000)[0, 1:4]
    x_s = train_smpo_sd15.add_noise(x_0[middle], noise[middle], bed.alpha_bar[levels[0]])
    with torch.no_grad():
        for s, d in zip(levels[:-1], levels[1:]):
            ends = bed.alpha_bar[s], bed.alpha_bar[d]
            x_d = train_smpo_sd15.ddim_move(x_s, policy(x_s, s, states[middle]).sample, *ends)
            x_s = train_smpo_sd15.ddim_move(x_s, policy(x_d, d, states[middle]).sample, *ends)
    torch.testing.assert_close(x["every_first"][middle], x_s, rtol=1e-4, atol=1e-4)


def test_sampling_goes_back_where_a_fine_inversion_came_from(bed):
    generator = torch.Generator().manual_seed(6)
    prompts = bed.prompts(random_scenes(2, generator))
    x_0 = bed.sample(bed.unet, prompts, 1, generator)
    row = Row(num_inversion_steps=40, renoise_at="every_move")
    with torch.no_grad():
        for timesteps in ([999, 999], [500, 120]):
            t = torch.tensor(timesteps)
            x_t = bed.noised(row, bed.unet, x_0, prompts.states, t, None)[0]
            back = bed.descend(bed.unet, x_t, prompts.states, 40, t)
            assert (back - x_0).pow(2).mean().sqrt() < 0.1 < (x_t - x_0).pow(2).mean().sqrt()


def test_scores(bed):
    """The reward is the processor's and model's; a picture has no distance to itself, and both pictures count."""
    generator = torch.Generator().manual_seed(7)
    prompts = bed.prompts(random_scenes(3, generator))
    base, pictures = bed.evaluate(bed.unet, prompts, seed=1)
    same, again = bed.evaluate(bed.unet, prompts, 1, pictures)
    assert same == {**base, "distance": 0.0} and torch.equal(pictures, again)
    assert bed.evaluate(bed.unet, prompts, 2, pictures)[0]["distance"] > 0.01
    pixels = bed.processor.image_processor(images=list((255 * pictures).round().byte()), return_tensors="pt")
    images = train_smpo_sd15.embed_images(bed.reward, pixels["pixel_values"])
    texts = train_smpo_sd15.embed_texts(bed.reward, bed.processor, [caption(scene) for scene in prompts.scenes])
    assert base["reward"] == pytest.approx(
        float(100 * (images.view(3, 2, -1) * texts[:, None]).sum(-1).mean()), abs=0.05
    )
    first, second = pictures[0::2], pictures[1::2]
    assert base["diversity"] == pytest.approx(float((first - second).pow(2).flatten(1).mean(1).sqrt().mean()))


def test_pairs_prompts_and_draws(bed):
    train_captions, test_captions = (set(bed_module.read_captions(split)) for split in ("train", "test"))
    report, tuning = (
        {caption(scene) for scene in prompts.scenes} for prompts in (bed.report_prompts(), bed.tuning_prompts(8))
    )
    assert report == test_captions and len(tuning) == 8
    assert not report & train_captions and not tuning & (train_captions | report)
    for scene in random_scenes(20, torch.Generator().manual_seed(8)):
        assert torch.equal(scene_of(caption(scene)), scene)

    soft = torch.linspace(0.05, 0.95, 200)
    pairs = Pairs(
        torch.zeros(400, 4, 8, 8), torch.full((400, 4, 8, 8), 0.5), torch.zeros(200, 2, 2), soft, soft.round()
    )
    hard = pairs.labels("hard", 0)
    assert torch.equal(hard, (soft > 0.5).float()) and torch.equal(pairs.labels("soft", 0), soft)
    for share in (10, 30):
        wrong = [(pairs.labels(f"hard_flip{share}", seed) != hard).float() for seed in (0, 1)]
        assert all(abs(float(w.mean()) - share / 100) < 0.08 for w in wrong) and not torch.equal(*wrong)
    order = order_of(200, 450, seed=0)
    assert sorted(order[:200].tolist()) == sorted(order[200:400].tolist()) == list(range(200)) and len(order) == 450
    x_0, _, t, noise, labels = draw_batch(pairs, soft, order[:50], seed=0, step=1)
    assert (
        torch.equal(noise[:50], noise[50:]) and torch.equal(t[:50], t[50:]) and torch.equal(labels, soft[order[:50]])
    )
    assert abs(float(x_0.std()) - 0.5) < 0.02 and not torch.equal(x_0[:50], x_0[50:])
    assert not torch.equal(draw_batch(pairs, soft, order[:50], seed=0, step=2)[2], t)


def test_the_gradient_of_the_reward_against_a_finite_difference(bed, monkeypatch):
    """A small move along a sample's gradient raises its reward by as much as the gradient is long."""
    gradient = run_ablation.reward_gradient_of_sample(bed, bed.new_policy(), torch.Generator().manual_seed(9))

    def reward_at(distance):
        unet, generator = bed.new_policy(), torch.Generator().manual_seed(9)
        moves = (distance * gradient / gradient.norm()).split([p.numel() for p in unet.parameters()])
        with torch.no_grad():
            for parameter, move in zip(unet.parameters(), moves):
                parameter += move.view_as(parameter)
            prompts = bed.prompts(random_scenes(1, generator))
            return bed.rewards(bed.decode(bed.sample(unet, prompts, 1, generator)), prompts, 1).item()

    step = 1e-5
    assert (reward_at(step) - reward_at(-step)) / (2 * step) == pytest.approx(gradient.norm().item(), rel=0.05)
    monkeypatch.setattr(run_ablation, "REWARD_IMAGES", 2)
    monkeypatch.setattr(run_ablation, "REWARD_SEED", 9)
    directions = run_ablation.reward_gradients(bed)
    torch.testing.assert_close(directions[0], gradient / gradient.norm(), rtol=1e-3, atol=1e-6)
    assert directions[1].norm().item() == pytest.approx(1, rel=1e-4) and directions[0] @ directions[1] < 0.99


def test_signal(bed, tmp_path, monkeypatch):
    """With the pairs' own gradient for the reward's, every cosine of all timesteps is 1, and nothing is run twice."""
    for name, value in {
        "SIGNAL_BATCHES": 1,
        "SIGNAL_PAIRS": 2,
        "SIGNAL_ROWS": {"forward": ROWS["forward_hard"]},
    }.items():
        monkeypatch.setattr(run_ablation, name, value)
    lab = run_ablation.Lab(tmp_path)
    mean = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(10))
    soft = torch.tensor([0.9, 0.2, 0.6, 0.3])
    pairs = Pairs(mean, torch.zeros_like(mean), bed.embed(["a", "b", "c", "d"]), soft, soft.round())
    monkeypatch.setattr(lab, "pairs", lambda name: pairs)
    kept, preference_gradients = [], run_ablation.preference_gradients

    def keep(*arguments):
        assert arguments[5].shape == (4,) and arguments[5].min() // 250 == arguments[5].max() // 250  # the quarter
        kept.append(preference_gradients(*arguments)[0]["hard"])
        return preference_gradients(*arguments)

    monkeypatch.setattr(run_ablation, "reward_gradients", lambda bed: torch.zeros(2, 1))
    monkeypatch.setattr(run_ablation, "preference_gradients", keep)
    with pytest.raises(RuntimeError):
        run_ablation.signal(lab)  # has collected the gradients
    total = sum(kept)
    monkeypatch.setattr(
        run_ablation, "reward_gradients", lambda bed: torch.stack([total, -0.5 * total]) / total.norm()
    )
    run_ablation.signal(lab)
    rows = {(row["pairs"], row["bin"], row["labels"]): row for row in read_csv(tmp_path / "signal.csv")}
    assert len(rows) == 2 * 5 * 2
    assert float(rows["foreign", "all", "hard"]["cosine"]) == pytest.approx(0.25, abs=1e-3)
    assert float(rows["foreign", "all", "hard"]["half"]) == pytest.approx(12.706 * 0.75, rel=1e-3)
    lengths = {b: float(rows["foreign", str(b), "hard"]["norm"]) for b in range(4)}
    assert lengths == pytest.approx({b: kept[b].norm().item() for b in range(4)}, rel=1e-3)
    assert all(abs(float(rows["own", str(b), "soft"]["std_tau"]) - 1) < 0.15 for b in range(4))
    run_ablation.signal(lab)
    assert len(read_csv(tmp_path / "signal.csv")) == 2 * 5 * 2
    text = make_tables.signal_table(read_csv(tmp_path / "signal.csv"), "foreign", "hard", "cosine")
    assert text.splitlines()[2].startswith("| forward |") and text.splitlines()[2].endswith("| 0.250 ± 9.529 |")


def test_ascent(bed, tmp_path, monkeypatch):
    """The opposite labels take the step back, a random step is the one computed here, and nothing is run twice."""
    for name, value in {
        "SIGNAL_BATCHES": 1,
        "SIGNAL_PAIRS": 2,
        "ASCENT_IMAGES": 1,
        "ASCENT_ROWS": {"forward": ROWS["forward_hard"]},
        "ASCENT_PAIRS": ["foreign", "own"],
    }.items():
        monkeypatch.setattr(run_ablation, name, value)
    lab = run_ablation.Lab(tmp_path)
    prompts = bed.prompts(random_scenes(3, torch.Generator().manual_seed(11)))
    monkeypatch.setattr(type(lab.bed), "tuning_prompts", lambda self: prompts)
    mean = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(12))
    soft, states = torch.tensor([0.9, 0.2]), bed.embed(["a", "b"])
    labels = {"foreign": soft, "own": 1 - soft}
    monkeypatch.setattr(
        lab, "pairs", lambda name: Pairs(mean, torch.zeros_like(mean), states, labels[name], labels[name].round())
    )
    run_ablation.ascent(lab)
    rows = read_csv(tmp_path / "ascent.csv")
    gains = {(row["pairs"], row["noising"], row["labels"]): float(row["gain"]) for row in rows}
    assert len(gains) == len(rows) == 5
    for kind in ("hard", "soft"):
        assert gains["own", "forward", kind] == pytest.approx(-gains["foreign", "forward", kind], rel=1e-4) != 0

    unet, scores = bed.new_policy(), []
    weights = torch.nn.utils.parameters_to_vector(unet.parameters()).detach()
    step = torch.randn(weights.shape, generator=torch.Generator().manual_seed(run_ablation.REWARD_SEED)).sign()
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(weights + sign * 3e-4 * step, unet.parameters())
        latents = bed.sample(unet, prompts, 1, torch.Generator().manual_seed(run_ablation.REWARD_SEED))
        scores.append(bed.rewards(bed.decode(latents), prompts, 1).flatten())
    gain = (scores[0] - scores[1]) / 2
    (row,) = [row for row in rows if row["noising"] == "random"]
    assert float(row["gain"]) == pytest.approx(gain.mean().item(), rel=1e-3, abs=1e-4)
    assert float(row["error"]) == pytest.approx(gain.std().item() / math.sqrt(3), rel=1e-3)
    run_ablation.ascent(lab)
    assert len(read_csv(tmp_path / "ascent.csv")) == 5
    text = make_tables.ascent_table(rows, [("foreign", "hard"), ("own", "soft"), ("foreign: renders", "hard")])
    assert "| foreign pairs, hard labels | own pairs, soft labels | renders pairs, hard labels |" in text
    assert f"| {gains['foreign', 'forward', 'hard']:+.2f} ± " in text and "| a random step | " in text


def test_foreign_pairs_by_their_sources(monkeypatch):
    """Of three pairs one is of two renders, one of one, and one of none; what belongs to a pair stays together."""
    numbers = torch.arange(6.0)
    pairs = Pairs(
        numbers, 10 * numbers, numbers[:3], numbers[:3] / 10, numbers[:3].round(),
        torch.tensor([True, False, False, True, True, False]),
    )  # fmt: skip
    lab = run_ablation.Lab.__new__(run_ablation.Lab)
    monkeypatch.setattr(lab, "pairs", lambda name: pairs, raising=False)
    for num_renders, i in ((2, 0), (1, 1), (0, 2)):
        chosen = lab.foreign_pairs_of(num_renders)
        assert chosen.mean.tolist() == [i, i + 3] and chosen.std.tolist() == [10 * i, 10 * i + 30]
        assert chosen.states.tolist() == [i] and chosen.soft.tolist() == pytest.approx([i / 10])
        assert len(chosen) == 1 and chosen.renders.sum() == num_renders


@pytest.mark.parametrize("name", ["forward_hard", "last_hard"])
def test_the_gradient_of_a_preference_is_that_of_the_loss(name, bed, batch):
    """Policy and reference being equal, the loss is log 2 with a gradient of -beta gamma / 4 times the direction."""
    x_0, states, t, noise, soft = batch
    unet, row = bed.new_policy(), ROWS[name]
    gradients, measured = run_ablation.preference_gradients(
        bed, row, unet, x_0, states, t, noise, {"soft": soft, "hard": soft.round()}
    )
    for kind, soft_label_0 in {"soft": soft, "hard": soft.round()}.items():
        loss, _ = bed.loss(row, unet, (x_0, states, t, noise, soft_label_0))
        expected = run_ablation.flat(torch.autograd.grad(loss, list(unet.parameters())))
        assert torch.cosine_similarity(-gradients[kind], expected, dim=0) > 0.999
        scale = row.beta * row.gamma / 4
        assert expected.norm().item() == pytest.approx(scale * gradients[kind].norm().item(), rel=1e-3)
    assert torch.cosine_similarity(gradients["soft"], gradients["hard"], dim=0) < 0.999
    assert measured["residual"] > 0.05 and (name != "forward_hard" or abs(measured["std_tau"] - 1) < 0.1)


def test_own_pairs_are_the_samplers(bed):
    with torch.no_grad():
        pairs, sampled = (bed.own_pairs(num_prompts=4, images_per_prompt=3, encode=encode) for encode in (True, False))
    for some in (pairs, sampled):
        assert len(some) == 4 * 3 and some.mean.shape == some.std.shape == (24, 4, 8, 8)
        assert len(torch.unique(some.mean.flatten(1), dim=0)) == 4 * 3
        assert torch.equal(some.soft, sampled.soft) and torch.equal(some.human, (some.soft > 0.5).float())
    assert 1 / (1 + math.e) <= pairs.soft.min() < 0.5 < pairs.soft.max() <= math.e / (1 + math.e)
    assert not sampled.std.any() and torch.allclose(pairs.std, torch.tensor(0.15), atol=0.01)
    assert 0 < (pairs.mean - sampled.mean).abs().mean() < 0.3 * sampled.mean.std()


def test_statistics_against_known_values():
    """Quantiles and p-values of Student's t from printed tables; intervals against numpy; Holm by hand."""
    for df, quantile in {1: 12.706, 2: 4.303, 4: 2.776, 10: 2.228, 30: 2.042}.items():
        assert t_quantile(df) == pytest.approx(quantile, abs=1e-3)
        assert two_sided_p(quantile, df) == pytest.approx(0.05, abs=1e-4)
    assert two_sided_p(0, 4) == 1 and two_sided_p(-2.776, 4) == pytest.approx(0.05, abs=1e-4)
    values = [1.0, 2.0, 4.0, 5.0, 9.0]
    mean, half = mean_interval(values)
    assert mean == np.mean(values) and half == pytest.approx(2.776445 * np.std(values, ddof=1) / 5**0.5)
    a, b = {"0": 3.0, "1": 5.0, "2": 4.0, "9": 0.0}, {"2": 1.0, "0": 1.0, "1": 2.0}
    difference = np.array([2.0, 3.0, 3.0])
    mean, half, p = paired(a, b)
    assert (mean, half) == pytest.approx((difference.mean(), 4.302653 * difference.std(ddof=1) / 3**0.5))
    assert p == pytest.approx(two_sided_p(difference.mean() / (difference.std(ddof=1) / 3**0.5), 2))
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def made_up_runs(path):
    """Base 40 + seed; the gains of each seed in the order of the seeds."""
    gains = {("grid", "forward_hard"): [1, 2, 3], ("grid", "ddim_hard"): [2, 4, 6], ("grid", "last_soft"): [4, 4, 4],
             ("hyper", "gamma 1"): [1, 3, None]}  # fmt: skip
    rows = [
        {"part": "base", "name": "base", "prompts": "report", "seed": s, "step": 0, "reward": 40.0 + s, "judge": -6.0}
        for s in range(3)
    ]
    for (part, name), values in gains.items():
        for seed, gain in enumerate(values):
            if gain is None:
                continue
            scores = {"reward": 40.0 + seed + gain, "judge": -6.0 + 2 * gain, "accuracy": 0.5, "vividness": 0.6,
                      "diversity": 0.2, "distance": 0.1}  # fmt: skip
            about = {"part": part, "name": name, "pairs": "foreign", "prompts": "report", "seed": seed}
            row = vars(Row(gamma=1.0 if part == "hyper" else 10.0))
            rows += [{**about, **row, "step": step, "unet_calls": 100, **scores} for step in (16, 32)]
    append_csv(path, RUN_FIELDS, rows)


def test_tables_of_a_small_csv(tmp_path):
    made_up_runs(tmp_path / "runs.csv")
    runs = Runs(read_csv(tmp_path / "runs.csv"))
    half = 4.302653 / 3**0.5
    lines = grid_table(runs, "grid", ["forward_hard", "ddim_hard"]).splitlines()
    assert len(lines) == 4  # the header's two, and 32 steps of either row
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells[1:5] == ["32", "100", f"+4.00 ± {2 * half:.2f}", f"+8.00 ± {4 * half:.2f}"] and cells[-1] == "3"
    by_name = {line.split("|")[1].strip(): line for line in comparison_table(runs, "grid").splitlines()[2:]}
    assert set(by_name) == {"DDIM over forward", "last of 9, soft over forward"}
    p = two_sided_p(2 * 3**0.5, 2)  # both differences are 2 +- 1
    assert f"| +2.00 ± {half:.2f} | {p:.3f} | {2 * p:.3f} |" in by_name["DDIM over forward"]
    lines = few_table(runs, "hyper", "last_soft", "gamma").splitlines()[2:]
    t, t_judge = 12.706, 2 * 12.706  # half an interval of gains 1 apart from their mean, of two seeds
    assert lines[0].startswith(
        f"| gamma 1 | 100 | +2.00 ± {t:.2f} | +4.00 ± {t_judge:.2f} | 0.100 | -2.00 ± {t:.2f} | 0.295 |"
    )
    assert lines[1].startswith(
        "| gamma 10 (as in the grid) | 100 | +4.00 ± 0.00 | +8.00 ± 0.00 |"
    )  # the same two seeds
    excerpts = make_tables.readme_tables(tmp_path)
    assert not any(excerpts[name] for name in ("inversion", "ascent", "labels", "long"))
    assert excerpts["grid"] and excerpts["comparison"] and "| gamma 1 | +2.00 ±" in excerpts["hyper"]
    assert "\nnew" in make_tables.with_tables(
        "<!-- ablation: labels -->\nold\n<!-- end of ablation -->\nnew", tmp_path
    )
    make_tables.main(make_tables.parse_args(["--results", str(tmp_path)]))
    assert "+4.00 ±" in (tmp_path / "tables.md").read_text() and (tmp_path / "curves.png").stat().st_size > 1000


def test_results_from_before_a_row_was_tuned_anew_are_not_mixed_in(tmp_path):
    made_up_runs(tmp_path / "runs.csv")
    rows = read_csv(tmp_path / "runs.csv")
    (old,) = (row for row in rows if (row["name"], row["seed"], row["step"]) == ("last_soft", "1", "32"))
    append_csv(tmp_path / "runs.csv", RUN_FIELDS, [old])  # two processes that met: the same again
    assert Runs(read_csv(tmp_path / "runs.csv")).of("grid", "last_soft", 32, "gain")["1"] == 4
    append_csv(tmp_path / "runs.csv", RUN_FIELDS, [{**old, "learning_rate": "1", "reward": "50"}])
    with pytest.raises(ValueError, match="two results of grid last_soft for seed 1"):
        make_tables.make_tables(tmp_path)


def test_tables_in_the_repository_are_those_of_its_csvs():
    assert make_tables.make_tables(make_tables.RESULTS) == (make_tables.RESULTS / "tables.md").read_text()
    readme = make_tables.README.read_text()
    assert make_tables.with_tables(readme, make_tables.RESULTS) == readme
    assert set(re.findall("<!-- ablation: (.*) -->", readme)) == set(make_tables.readme_tables(make_tables.RESULTS))
    assert sum(path.stat().st_size for path in make_tables.RESULTS.iterdir()) < 1_000_000
    assert len(make_tables.COLORS) == len(set(make_tables.COLORS)) == len(make_tables.NAMES) == len(ROWS)


def test_a_run_in_the_csv_is_not_run_again(tmp_path, monkeypatch):
    """And tuning takes the best of its row, by the reward."""
    trained = []

    def fake_train(bed, row, pairs, seed, steps, evaluate_at, evaluate):
        trained.append(row)
        reward = 50 - abs(row.learning_rate - 3e-5) * 1e5 - abs(row.beta - 200) / 1000
        yield steps, 10 * steps, 1.0, {**dict.fromkeys(run_ablation.SCORES, 0.0), "reward": reward}

    monkeypatch.setattr(run_ablation, "train", fake_train)
    lab = run_ablation.Lab(tmp_path)
    monkeypatch.setattr(lab, "base", lambda *_: (dict.fromkeys(run_ablation.SCORES, 0.0), None))
    monkeypatch.setattr(lab, "pairs", lambda name: None)
    monkeypatch.setattr(run_ablation, "ROWS", {name: ROWS[name] for name in ("forward_hard", "every_soft")})
    num_settings = 2 * len(run_ablation.LEARNING_RATES) * len(run_ablation.BETAS)
    num_seeds = len(run_ablation.TUNING_SEEDS)
    num_runs = num_seeds * num_settings
    lab.run(
        "tune", "every_soft", dataclasses.replace(ROWS["every_soft"], learning_rate=1.0), run_ablation.TUNING_SEEDS[0]
    )
    with pytest.raises(SystemExit, match="every_soft is not tuned yet"):
        lab.tuned("every_soft")
    trained.clear()
    run_ablation.tune(lab)
    assert len(trained) == num_runs and len(set(trained)) == num_settings
    run_ablation.tune(lab)
    assert len(trained) == num_runs
    num_rows = num_runs + 1 + num_seeds + 1  # with the row that was not tuned on all seeds, and the bases
    assert len(read_csv(tmp_path / "runs.csv")) == num_rows
    best = dataclasses.replace(ROWS["every_soft"], learning_rate=3e-5, beta=200.0)
    rows = read_csv(tmp_path / "runs.csv")
    lines = make_tables.tuning_table(Runs(rows), rows).splitlines()
    place = [cell.strip() for cell in lines[0].split("|")].index("lr 3e-05, beta 200")
    assert [line.split("|")[place].strip() for line in lines[2:]] == ["**+50.0**"] * 2
    assert lab.tuned("every_soft") == best
    run_ablation.grid(lab)
    assert len(trained) == num_runs + 2 * len(run_ablation.GRID_SEEDS) and best in trained[num_runs:]
    assert list(run_ablation.Lab.jobs(argparse.Namespace(backwards=True), "x", [1, 2], "ab")) == [
        (2, "b"), (2, "a"), (1, "b"), (1, "a")
    ]  # fmt: skip
    assert key_of({"a": 1e-5, "b": 3}, ["a", "b"]) == ("1e-05", "3")


def test_command_line(tmp_path):
    args = run_ablation.parse_args(["tune", "grid", "--results", str(tmp_path), "--num_threads", "2"])
    assert (args.parts, args.results, args.num_threads) == (["tune", "grid"], tmp_path, 2)
    assert run_ablation.parse_args(["all"]).results == make_tables.parse_args([]).results == run_ablation.RESULTS
    with pytest.raises(SystemExit):
        run_ablation.parse_args(["nothing"])
    with pytest.raises(SystemExit):
        run_ablation.parse_args([])
    assert (TINY / "sd15").exists()
