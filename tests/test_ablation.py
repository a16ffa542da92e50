"""The ablation trains as the scripts do, its rows are what they say, and its tables are rightly computed.

What is compared with another computation is in float64, where a tolerance of 1e-9 holds on any machine, or says why.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import math
import re

import bed as bed_module
import make_tables
import numpy as np
import pandas as pd
import pytest
import rounds
import run_ablation
import torch
from bed import TINY, Bed, BigBed, Pairs, Row, chosen, draw_batch, joined, order_of, read_pairs, stacked, stored_range
from conftest import train_flags
from run_ablation import COMMON_RATE, NOISINGS, ROWS, RUN_COLUMNS, Lab, Settings, append, flat
from world import caption, random_scenes

import train_smpo_sd15 as smpo
from diffusers import UNet2DConditionModel
from relabel_pickapic import embed_images


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@functools.cache
def bed_of(dtype):
    return Bed()


@pytest.fixture
def bed():
    return bed_of(torch.float32)


@pytest.fixture
def double_bed():
    """All of it in float64, and what a test makes, too."""
    torch.set_default_dtype(torch.float64)
    yield bed_of(torch.float64)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def policy(double_bed):
    """The base model, well off."""
    unet, generator = double_bed.new_policy(), seeded(3)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.3 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    return unet


@pytest.fixture
def batch(double_bed):
    """Three pairs, small ones: x_0, prompts, timesteps, noise, labels."""
    generator = seeded(4)
    x_0 = torch.randn(6, 4, 4, 4, generator=generator)
    states = double_bed.prompts(random_scenes(3, generator)).states.repeat(2, 1, 1)
    noise = torch.randn(3, 4, 4, 4, generator=generator).repeat(2, 1, 1, 1)
    return x_0, states, torch.tensor([30, 420, 700]).repeat(2), noise, torch.tensor([0.9, 0.2, 0.6])


@pytest.mark.parametrize("name", ["forward_hard", "last_soft", "every_soft", "released_soft"])
def test_the_loss_is_the_scripts(name, double_bed, policy):
    """The script rounds predictions to fp32: below 4, some twenty an inversion, squared, 20 x 4 x 2 x 2**-24."""
    bed, row = double_bed, dataclasses.replace(ROWS[name], beta=20.0)  # large enough to tell, too small to saturate
    args = argparse.Namespace(
        beta_dpo=row.beta, train_batch_size=2, offload=False,
        **{flag: getattr(row, flag) for flag in ("gamma", "noising", "renoise_at", "num_inversion_steps")},
    )  # fmt: skip
    pixels = torch.randint(256, (4, 3, 32, 32), generator=seeded(5), dtype=torch.uint8)
    captions, t, labels = ["a red circle", "a"], torch.tensor([30, 700]), torch.tensor([1.0, 0.2])
    batch = {"captions": captions, "pixel_values": pixels, "timesteps": t, "seeds": [(1, 2, 3), (4, 5, 6)]}
    models = {"unet": policy, "ref_unet": bed.unet, "vae": bed.vae, **bed.text}
    context = smpo.Context(models, bed.alpha_bar, "epsilon", contextlib.nullcontext, args)
    (micro_batch,) = smpo.invert_and_judge({**batch, "soft_label_0": labels}, context)
    expected, _ = smpo.training_step(micro_batch, context)

    x_0 = smpo.encode_images(pixels, bed.vae, [1, 4, 2, 5])
    states = smpo.encode_prompts(captions, bed.text)["encoder_hidden_states"].repeat(2, 1, 1)
    draws = x_0, states, t.repeat(2), smpo.seeded_noise([3, 6], x_0.shape[1:]).repeat(2, 1, 1, 1), labels
    loss, scale = bed.loss(row, policy, draws)[0].item(), row.beta * row.gamma / 2
    assert loss == pytest.approx(expected.item(), abs=1e-5 * scale) and abs(loss - math.log(2)) > 1e-4 * scale


def test_steps_are_the_scripts(double_bed, tmp_path, monkeypatch):
    """Its optimiser with its defaults, and its clipping, take the base where three steps of the ablation do."""
    bed, args = double_bed, smpo.parse_args(train_flags(tmp_path, learning_rate=3e-4))
    row, generator = Row("forward", learning_rate=3e-4), seeded(6)
    mean = torch.randn(6, 2, 4, 4, 4, generator=generator)
    states = bed.prompts(random_scenes(6, generator)).states
    pairs = Pairs(mean, torch.zeros_like(mean), states, torch.tensor([0.9, 0.2, 0.6, 0.7, 0.3, 0.1]))
    expected = bed.new_policy()
    optimizer = smpo.make_optimizer(list(expected.parameters()), args.learning_rate, args)
    order = order_of(6, 6, seed=0).split(2)
    monkeypatch.setattr(run_ablation, "WARMUP_STEPS", 1)
    for step, (unet, calls) in enumerate(run_ablation.train(bed, row, pairs, 0, 2, 3), 1):
        bed.loss(row, expected, draw_batch(chosen(pairs, order[step - 1]), "hard", 0, step))[0].backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        assert calls == step * 2 * 2 * 4
    weights, others, base = (flat(u.parameters()).detach() for u in (unet, expected, bed.unet))
    torch.testing.assert_close(weights, others, rtol=1e-9, atol=1e-9)
    assert (weights - base).abs().max() > 3e-4


def test_every_row_reaches_x_t_as_it_says(double_bed, policy, batch):
    bed, (x_0, states, t, noise, _) = double_bed, batch

    def predict(x, timesteps, rows):
        return policy(x, timesteps, states[rows]).sample

    options = {
        "ddim": (9, "ddim", "last_move"), "last": (9, "renoise", "last_move"), "every": (5, "renoise", "every_move"),
        "released": (5, "released", "last_move"), "overshoot": (9, "ddim", "last_move"),
    }  # fmt: skip
    ends = {"overshoot": torch.tensor([201, 601, 801]).repeat(2)}  # of levels 1, 201, ..., 801 the next, or the last
    x = {name: smpo.invert(predict, x_0, ends.get(name, t), bed.alpha_bar, *some) for name, some in options.items()}
    alpha_bar = bed.alpha_bar[t].view(-1, 1, 1, 1)
    x["forward"] = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    shares = {"quarter": ("last", 0.25), "mixed": ("last", 0.5), "three_quarters": ("last", 0.75)}
    for name, (inverted, share) in {**shares, "overshoot_mixed": ("overshoot", 0.5)}.items():
        tau = (x[inverted] - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        x[name] = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * ((1 - share) ** 0.5 * tau + share**0.5 * noise)
    # at t = 30, 420, 700 nine moves at most are 1, 4, 7, five are 1, 3, 4, and five released levels are 2, 4, 5
    calls = {"forward": 0, "ddim": 12, "every": 2 * 8, "released": 2 * 11}
    calls |= dict.fromkeys(["last", *shares], 12 + 3) | dict.fromkeys(["overshoot", "overshoot_mixed"], 2 + 6 + 8)
    assert x.keys() == NOISINGS.keys()
    for name, row in NOISINGS.items():
        reached, num_calls = bed.noised(row, policy, x_0, states, t, noise)
        torch.testing.assert_close(reached, x[name], rtol=1e-9, atol=1e-9)
        assert num_calls == 2 * calls[name], name
        assert all(other == name or (x[other] - x[name]).abs().max() > 0.01 for other in x)
        assert ROWS[f"{name}_hard"] == row and row.labels == "hard" and row.gamma == 1
        assert ROWS[f"{name}_soft"] == dataclasses.replace(row, labels="soft", gamma=10.0)


def test_the_reference_may_invert(double_bed, policy, batch):
    """As if the policy's part in the inversion had been played by the base model, as it was before the first step."""
    row = dataclasses.replace(ROWS["by_reference_soft"], inverted_by="policy")
    x_0, states, t, noise, p_0 = batch
    x_t, calls = double_bed.noised(row, double_bed.unet, x_0, states, t, noise)
    tau = smpo.implied_noise(x_0, x_t, double_bed.alpha_bar[t])
    forward = x_0, states, t, tau, p_0
    expected, _ = double_bed.loss(dataclasses.replace(row, noising="forward"), policy, forward)
    loss, all_calls = double_bed.loss(ROWS["by_reference_soft"], policy, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    assert all_calls == calls + 4 * len(x_0) and abs(double_bed.loss(row, policy, batch)[0] - loss) > 1e-3


@torch.no_grad()
def test_sampling_goes_back_where_a_constant_prediction_came_from(double_bed, batch):
    bed, (x_0, states, t, _, _) = double_bed, batch
    unet = bed.new_policy()
    unet.conv_out.weight.zero_()
    unet.conv_out.bias.fill_(0.7)
    for num_steps in (1, 9):
        x_t, _ = bed.noised(Row(num_inversion_steps=num_steps), unet, x_0, states, t, None)
        torch.testing.assert_close(bed.descend(unet, x_t, states, num_steps, t), x_0, rtol=1e-9, atol=1e-9)


def test_scores(bed):
    """The reward is the processor's and model's; a picture has no distance to itself, both of a prompt count."""
    prompts = bed.prompts(random_scenes(3, seeded(7)))
    base, pictures = bed.evaluate(bed.unet, prompts, seed=1)
    same, again = bed.evaluate(bed.unet, prompts, 1, pictures)
    assert same == {**base, "distance": 0.0} and torch.equal(pictures, again)
    assert bed.evaluate(bed.unet, prompts, 2, pictures)[0]["distance"] > 0.01
    distances = (pictures[0::2] - pictures[1::2]).double().pow(2).flatten(1).mean(1).sqrt()
    rounding = 3 * 64 * 64 * 2**-24  # fp32, so many summed
    assert base["diversity"] == pytest.approx(distances.mean().item(), rel=rounding)
    texts, bits = prompts.texts.repeat_interleave(2, 0), (255 * pictures).round().byte()
    assert base["reward"] == bed.rewards(pictures, texts).mean().item()
    pixels = bed.processor.image_processor(images=list(bits), return_tensors="pt")["pixel_values"]
    expected = 100 * (embed_images(bed.reward, pixels) * texts).sum(-1)
    torch.testing.assert_close(bed.rewards(bits / 255, texts), expected, rtol=0, atol=100 * 2**-16)  # fp32's cosine


def test_prompts_and_draws(bed):
    train_captions, test_captions = (set(read_pairs(split)["caption"]) for split in ("train", "test"))
    several = bed.report_prompts(), bed.tuning_prompts(), bed.training_prompts(99, seeded(1))
    report, tuning, fresh = ({caption(scene) for scene in prompts.scenes} for prompts in several)
    assert report == test_captions and len(tuning) == 48
    assert not report & (train_captions | fresh) and not tuning & (train_captions | report | fresh)

    soft = torch.linspace(0.05, 0.95, 200)
    pairs = Pairs(torch.zeros(200, 2, 4, 8, 8), torch.full((200, 2, 4, 8, 8), 0.5), torch.zeros(200, 2, 2), soft)
    order = order_of(200, 150, seed=0)
    assert len(set(order.tolist())) == 150 and not torch.equal(order_of(200, 150, seed=1), order)
    some = chosen(pairs, order[:50])
    x_0, _, t, noise, labels = draw_batch(some, "soft", seed=0, step=1)
    assert torch.equal(noise[:50], noise[50:]) and torch.equal(t[:50], t[50:]) and torch.equal(labels, some.soft)
    assert torch.equal(draw_batch(some, "hard", 0, 1)[-1], some.soft.round())
    assert abs(x_0.std().item() - 0.5) < 6 * 0.5 / (2 * x_0.numel()) ** 0.5  # standard errors
    assert not torch.equal(x_0[:50], x_0[50:]) and not torch.equal(draw_batch(some, "soft", 0, 2)[2], t)
    assert torch.equal(joined(some, pairs).soft, torch.cat([some.soft, soft]))


def test_stored_pairs_have_the_scripts_labels(bed):
    """The rewards of decoded latents are about those of the pictures: correlated by four standard errors and more."""
    pairs, table = bed.stored_pairs("test"), read_pairs("test")
    assert len(pairs.mean) == len(pairs.soft) < len(table)
    first, second = bed.decode(stacked(pairs.mean)).chunk(2)
    texts = bed.prompts([bed_module.SCENES[text] for text in table["caption"][table["label_0"] != 0.5]]).texts
    gaps = bed.rewards(first, texts) - bed.rewards(second, texts)
    assert torch.corrcoef(torch.stack([gaps, pairs.soft.logit()]))[0, 1] > 4 / len(pairs.soft) ** 0.5


def test_foreign_pairs_are_fresh(bed, monkeypatch):
    """Renders whose logit is the gap in reward over the range of the stored ones, and none of them a tie."""
    made, labelled = [], bed.labelled
    monkeypatch.setattr(bed, "labelled", lambda *some: made.append(some) or labelled(*some))
    pairs, (prompts, pictures, score_range) = bed.rendered_pairs(12), *made
    assert 1 < len(pairs.soft) == len(prompts.scenes) < 12 and score_range == stored_range()
    gaps = bed.judge.score(pictures, prompts.scenes.repeat(2, 1)).view(2, -1).diff(dim=0)
    assert gaps.abs().min() >= 0.7
    rewards = bed.rewards(pictures, prompts.texts.repeat(2, 1)).chunk(2)
    logits = (rewards[0] - rewards[1]).double() / (score_range[1] - score_range[0])
    # p_0 in fp32, of which the logit makes five times as much, and rewards of some 50 over a range of some 30
    torch.testing.assert_close(pairs.soft.logit().double(), logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(stacked(pairs.mean), bed.encode(pictures)[0], rtol=0, atol=1e-5)
    monkeypatch.setattr(bed, "stored_pairs", lambda: pairs)
    monkeypatch.setattr(bed, "rendered_pairs", lambda num_prompts: chosen(pairs, torch.tensor([1])))
    assert torch.equal(bed.foreign_pairs().soft, torch.cat([pairs.soft, pairs.soft[1:2]]))


def test_own_pairs_are_the_samplers(bed):
    """Logits of a prompt's couples are r1 - r0, r2 - r0 and r2 - r1 with r the rewards, by one range."""
    pairs = bed.own_pairs(num_prompts=2, images_per_prompt=3)
    assert pairs.mean.shape == pairs.std.shape == (2 * 3, 2, 4, 8, 8)
    assert len(torch.unique(pairs.mean.flatten(0, 1).flatten(1), dim=0)) == 2 * 3
    logits = pairs.soft.logit().view(2, 3)
    # p_0 in 0.27 to 0.73 is rounded to fp32, of which the logit makes five times as much
    torch.testing.assert_close(logits[:, 0] + logits[:, 2], logits[:, 1], rtol=0, atol=3 * 5 * 2**-24)
    assert logits.abs().max() <= 1


@pytest.mark.parametrize("name", ["forward_hard", "last_soft"])
def test_the_gradient_of_a_preference_is_that_of_the_loss(name, double_bed, batch):
    """Policy and reference being equal, the loss is log 2 with a gradient of -beta gamma / 4 times the direction."""
    bed, unet, row, (x_0, states, t, noise, p_0) = double_bed, double_bed.new_policy(), ROWS[name], batch
    loss, _ = bed.loss(row, unet, batch)
    expected = flat(torch.autograd.grad(loss, list(unet.parameters())))
    scale = row.beta * row.gamma / 4
    x_t, _ = bed.noised(row, unet, x_0, states, t, noise)
    tau = smpo.implied_noise(x_0, x_t, bed.alpha_bar[t])
    gradient, residual = run_ablation.preference_gradient(bed, unet, (x_0, states, t, tau, p_0))
    torch.testing.assert_close(-scale * gradient, expected, rtol=1e-6, atol=1e-9 * scale)
    torch.testing.assert_close(residual, unet(x_t, t, states).sample - tau, rtol=1e-6, atol=1e-9)


def test_gradients(bed, tmp_path, monkeypatch):
    """Every noising's tau is its own, t is in its quarter, cosines are the gradients'; nothing is run twice."""
    some = {name: NOISINGS[name] for name in ("forward", "last", "quarter")}
    for name, value in {"GRADIENT_PAIRS": 1, "GRADIENT_SETS": 3, "NOISINGS": some}.items():
        monkeypatch.setattr(run_ablation, name, value)
    pairs, batches, found, gradient_of = bed.own_pairs(num_prompts=2), [], [], run_ablation.preference_gradient

    def spied(bed, unet, batch):
        batches.append(batch)
        found.append(gradient_of(bed, unet, batch))
        return found[-1]

    monkeypatch.setattr(Lab, "pairs", lambda lab, name: pairs)
    monkeypatch.setattr(run_ablation, "preference_gradient", spied)
    known = {"size": 1.0, "std_tau": 1.0, "residual": 1.0, "agreement": 0.5, "forward": 0.5}
    about = [{"quarter": q, "noising": name, "set": number} for q in (0, 2, 3) for name in some for number in range(3)]
    append(tmp_path / "gradients.csv", [{**row, **known} for row in about])
    for _ in range(2):
        run_ablation.gradients(Lab(tmp_path, None, bed))
    assert len(batches) == 3 * 3  # sets, noisings
    for i, (x_0, states, t, tau, _) in enumerate(batches):
        assert torch.equal(t // 250, torch.ones_like(t))
        x_t, _ = bed.noised([*some.values()][i % 3], bed.unet, x_0, states, t, batches[i - i % 3][3])
        # x_0 and x_t, of some units, are rounded before they are divided by sqrt(1 - alpha_bar), of 0.03 and more
        torch.testing.assert_close(tau, smpo.implied_noise(x_0, x_t, bed.alpha_bar[t]), rtol=0, atol=8 * 2**-24 / 0.03)
    rows = pd.read_csv(tmp_path / "gradients.csv")
    row, cosine = rows.set_index(["quarter", "noising", "set"]).loc[1, "last", 0], torch.nn.CosineSimilarity(dim=0)
    forward, last = ([found[3 * k + noising][0].double() for k in range(3)] for noising in (0, 1))
    for name, others in {"agreement": last, "forward": forward}.items():
        expected = sum(cosine(last[0], others[k]) + cosine(last[k], others[0]) for k in (1, 2)) / 4
        assert row[name] == pytest.approx(expected.item(), abs=1e-4)  # fp32, of 2.6 M weights
    assert row["size"] == pytest.approx(last[0].pow(2).mean().sqrt().item(), rel=1e-4)
    make_tables.gradients_picture(rows, tmp_path / "gradients.png")
    assert make_tables.gradients_table(rows).count("\n") == 2 + 1 + len(some)


def test_errors(bed, tmp_path, monkeypatch):
    """By hand for one policy, on pairs that it was not trained on; nothing is run twice."""
    pairs, trained, train = bed.own_pairs(num_prompts=3), [], run_ablation.train

    def spied(*args):
        for unet, calls in train(*args):
            trained.append(copy.deepcopy(unet))
            yield unet, calls

    row = dataclasses.replace(ROWS["forward_soft"], learning_rate=1e-2)  # so that errors differ by more than rounding
    for name, value in {"ERROR_ROWS": ["forward_soft"], "ERROR_PAIRS": 2, "train": spied}.items():
        monkeypatch.setattr(run_ablation, name, value)
    monkeypatch.setitem(ROWS, "forward_soft", row)
    monkeypatch.setattr(Lab, "pairs", lambda lab, name: pairs)
    for _ in range(2):
        run_ablation.errors(Lab(tmp_path, run_ablation.Settings(2, (1, 2), (0,)), bed))
    assert len(trained) == 2
    found = pd.read_csv(tmp_path / "errors.csv").set_index("step").loc[2]
    order = order_of(len(pairs.soft), 6, 0)
    x_0, states, t, noise, p_0 = draw_batch(chosen(pairs, order[4:]), "soft", 0, 0)
    x_t = smpo.add_noise(x_0, noise, bed.alpha_bar[t])
    with torch.no_grad():
        eps = [unet(x_t, t, states).sample for unet in (trained[1], bed.unet)]
    ours, theirs = ((prediction - noise).pow(2).mean((1, 2, 3)) for prediction in eps)
    gaps = ((ours - theirs) / theirs.mean()).tolist()
    preferred = [gaps[k if p_0[k] > 0.5 else k + 2] for k in (0, 1)]
    rejected = [gaps[k + 2 if p_0[k] > 0.5 else k] for k in (0, 1)]
    assert found["preferred"] == pytest.approx(sum(preferred) / 2, rel=1e-3) and abs(sum(preferred)) > 1e-2
    assert found["rejected"] == pytest.approx(sum(rejected) / 2, rel=1e-3)
    assert found["accuracy"] == sum(a < b for a, b in zip(preferred, rejected)) / 2
    assert make_tables.errors_table(pd.read_csv(tmp_path / "errors.csv")).count("\n") == 2 + 2 - 1


def test_inversion(bed, tmp_path, monkeypatch):
    """The fine inversion has no distance to itself, forward noise the deviation of noise, and nothing is run twice."""
    for name, value in {"INVERSION_TIMESTEPS": [50], "INVERSION_SEEDS": [0], "INVERSION_IMAGES": 2}.items():
        monkeypatch.setattr(run_ablation, name, value)
    monkeypatch.setattr(Lab, "pairs", lambda lab, name: bed.own_pairs(num_prompts=1, images_per_prompt=2))
    run_ablation.inversion(Lab(tmp_path, None, bed))
    run_ablation.inversion(Lab(tmp_path, None, bed))
    rows = pd.read_csv(tmp_path / "inversion.csv").set_index("variant")
    assert list(rows.index) == list(run_ablation.VARIANTS) and not rows["distance"].iloc[0]
    assert (rows["distance"].iloc[1:] > 0).all() and (rows["residual"] > 0).all()
    assert rows["unet_calls"].tolist() == [11, 1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 0]
    # a deviation of so many entries has a standard error of 1 / sqrt(2 n)
    assert abs(rows["std_tau"]["forward noise"] - 1) < 6 / (2 * 4 * 8 * 8) ** 0.5


@pytest.fixture
def few(bed, monkeypatch):
    """A lab-maker with few pairs, two prompts, and one row."""
    monkeypatch.setattr(run_ablation, "BLOCKS", [("foreign", ("forward_soft",)), ("own", ("forward_soft",))])
    some_pairs = bed.own_pairs(num_prompts=3)
    monkeypatch.setattr(Lab, "pairs", lambda lab, name: some_pairs)
    scenes = random_scenes(2, seeded(13))
    prompts = {"tuning": bed.prompts(scenes[:1]), "report": bed.prompts(scenes[1:])}
    monkeypatch.setattr(Lab, "prompts", lambda lab, name: prompts[name])
    return lambda path, **options: Lab(path, Settings(2, (1, 2), (0, 1)), bed, **options)


def test_a_calm_run_resumes(few, tmp_path, capsys):
    run_ablation.calm(few(tmp_path, seeds=[1]))
    before = (tmp_path / "runs.csv").read_text()
    run_ablation.calm(few(tmp_path, seeds=[1]))
    assert (tmp_path / "runs.csv").read_text() == before
    with pytest.raises(SystemExit) as stopped:
        run_ablation.calm(few(tmp_path, end=1e-9))
    assert stopped.value.code is None and "the time limit is reached; the same command" in capsys.readouterr().out
    run_ablation.calm(few(tmp_path))
    runs = make_tables.read_runs(tmp_path / "runs.csv")
    assert len(runs) == 2 * 2 * 2 and not runs.duplicated(["pairs", "seed", "step"]).any()  # pairs, seeds, steps
    assert (set(runs["part"]), set(runs["seed"]), set(runs["pairs_per_step"])) == ({"calm"}, {0, 1}, {2})
    assert set(runs["prompts"]) == {"report"} and not runs["gain"].eq(0).any()


def test_the_best_rate_is_that_of_the_tuning_prompts(few, tmp_path, monkeypatch):
    monkeypatch.setattr(run_ablation, "LEARNING_RATES", (1e-5, 1e-4))
    monkeypatch.setattr(run_ablation, "BLOCKS", [("own", ("forward_soft",))])
    assert run_ablation.tuned_rate(few(tmp_path), "forward_soft", "own") == COMMON_RATE
    run_ablation.tune(few(tmp_path))
    runs = make_tables.read_runs(tmp_path / "runs.csv")
    assert set(runs["prompts"]) == {"tuning"} and len(runs) == 2 * 2 * 2 == len(runs[runs["part"] == "tune"])
    best, step = runs.groupby(["learning_rate", "step"])["reward"].mean().idxmax()
    assert run_ablation.tuned_rate(few(tmp_path), "forward_soft", "own") == best
    run_ablation.calm(few(tmp_path))
    runs = make_tables.read_runs(tmp_path / "runs.csv")
    assert set(runs["learning_rate"][runs["part"] == "calm"]) == {COMMON_RATE, best}
    text = make_tables.make_tables(tmp_path)["runs"].split("rate and step by the tuning prompts**")[1]
    assert f"| {best:g} | {step} |" in text and text.count("\n| forward") == 1


def test_a_big_bed_is_trained_in_pieces(tmp_path, monkeypatch):
    """Stopped and gone on with it has the weights of one piece; its pairs are of 128 pixels; a row is run."""
    config = {**UNet2DConditionModel.load_config(TINY / "sd15" / "unet"), **BigBed.architecture}
    with torch.device("meta"):
        big = UNet2DConditionModel.from_config(config)
    assert 30e6 < sum(parameter.numel() for parameter in big.parameters()) < 60e6
    small = {"block_out_channels": [16, 32], "layers_per_block": 1, "sample_size": 16, "norm_num_groups": 8}
    sizes = {"num_steps": 4, "batch_size": 2, "num_latents": 4, "num_rendered": 8, "num_own_prompts": 2}
    for name, value in {"architecture": small, **sizes}.items():
        monkeypatch.setattr(BigBed, name, value)
    monkeypatch.setattr("bed.BATCH", 4)
    whole, path = BigBed("cpu", tmp_path / "whole.pt"), tmp_path / "pieces.pt"
    for step in (1, 2, 3):
        with pytest.raises(SystemExit) as stopped:
            BigBed("cpu", path, end=0)
        assert stopped.value.code is None and torch.load(path)["step"] == step
    pieces = BigBed("cpu", path)
    torch.testing.assert_close(flat(whole.unet.parameters()), flat(pieces.unet.parameters()), rtol=0, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in whole.unet.parameters())
    monkeypatch.setattr(run_ablation, "BLOCKS", [("foreign", ("mixed_soft",)), ("own", ("mixed_soft",))])
    monkeypatch.setattr(Bed, "report_prompts", lambda bed: bed.prompts(random_scenes(2, torch.Generator())))
    lab = Lab(tmp_path, Settings(2, (1,), (0,)), pieces)
    assert lab.pairs("foreign").mean.shape[1:] == (2, 4, 16, 16) and lab.pairs("own").mean.shape == (6, 2, 4, 16, 16)
    run_ablation.calm(lab)
    runs = make_tables.read_runs(tmp_path / "runs.csv")
    assert len(runs) == 2 and not runs["gain"].eq(0).any()


def test_rounds(bed, few, tmp_path, monkeypatch):
    """Who draws and who is the reference in the second round, and what is trained on; nothing is run twice."""
    sizes = {"ROUNDS": 2, "STEPS": 1, "PAIRS_PER_STEP": 4, "PROMPTS": 4, "IMAGES_PER_PROMPT": 2, "SEEDS": [0]}
    for name, value in {**sizes, "Bed": lambda: bed}.items():
        monkeypatch.setattr(rounds, name, value)
    drawers, trained, draw, train = [], [], rounds.drawn_pairs, rounds.train

    def weights(unet):
        return flat(unet.parameters()).detach().clone()

    def spied_draw(bed, unet, *rest):
        drawers.append(weights(unet))
        return draw(bed, unet, *rest)

    def spied_train(bed, row, pairs, seed, pairs_per_step, steps, unet):
        trained.append((weights(bed.unet), weights(unet), pairs.mean))
        return train(bed, row, pairs, seed, pairs_per_step, steps, unet)

    monkeypatch.setattr(rounds, "drawn_pairs", spied_draw)
    monkeypatch.setattr(rounds, "train", spied_train)
    for _ in range(2):
        rounds.main(rounds.parse_args(["--noising", "forward", "--results", str(tmp_path)]))
    assert (len(drawers), len(trained)) == (2 * 4, 2 * 5)
    base, foreign = weights(bed.unet), few(tmp_path).pairs("foreign").mean
    for i, name in enumerate(rounds.VARIANTS):
        (reference, start, _), (next_reference, last, pairs) = trained[2 * i : 2 * i + 2]
        assert torch.equal(reference, base) and torch.equal(start, base) and not torch.equal(last, base)
        assert torch.equal(next_reference, last if name in ("rounds", "mix") else base)
        if name != "foreign":
            assert torch.equal(drawers[2 * i], base) and torch.equal(drawers[2 * i + 1], base if i == 0 else last)
        num_foreign = sum((foreign == mean).flatten(1).all(1).any().item() for mean in pairs)
        assert len(pairs) == 4 and num_foreign == {"mix": 3, "foreign": 4}.get(name, 0)
    assert len(torch.cat([trained[-2][2], trained[-1][2]]).unique(dim=0)) == 2 * 4  # foreign pairs come once
    runs = make_tables.read_runs(tmp_path / "rounds.csv").set_index("name")
    drawing = 2 * 4 * 2 * 10  # rounds, prompts, images, steps
    assert runs["unet_calls"]["offline"] == runs["unet_calls"]["foreign"] + drawing == runs["unet_calls"]["rounds"]
    assert len(runs) == 5 and set(runs["step"]) == {2} and not runs["gain"].eq(0).any()
    assert make_tables.make_tables(tmp_path)["rounds"].startswith("**Forward noising**")


def test_the_best_is_drawn_against_the_worst(bed):
    pairs, calls = rounds.drawn_pairs(bed, bed.unet, 3, seeded(2))
    generator = seeded(2)
    prompts = bed.training_prompts(3, generator)
    pictures = bed.decode(bed.sample(bed.unet, prompts, 4, generator))
    rewards = bed.rewards(pictures, prompts.texts.repeat_interleave(4, 0)).view(3, 4)
    low, high = stored_range()
    gaps = (rewards.amax(1) - rewards.amin(1)) / (high - low)
    torch.testing.assert_close(pairs.soft.logit(), gaps.float(), rtol=0, atol=1e-5)
    best = bed.encode(pictures.view(3, 4, 3, 64, 64)[torch.arange(3), rewards.argmax(1)])[0]
    torch.testing.assert_close(pairs.mean[:, 0], best, rtol=0, atol=1e-5)
    assert calls == 3 * 4 * 10


def test_statistics_against_known_values():
    """Quantiles of Student's t from printed tables; the rest by hand."""
    for df, quantile in {1: 12.706, 2: 4.303, 4: 2.776, 10: 2.228, 30: 2.042}.items():
        assert make_tables.t_quantile(df) == pytest.approx(quantile, abs=1e-3)
        assert make_tables.two_sided_p(-quantile, df) == pytest.approx(0.05, abs=1e-4)
    assert make_tables.two_sided_p(0, 4) == 1
    assert make_tables.mean_interval([1.0, 2.0, 6.0]) == pytest.approx((3, 4.302653 * 7**0.5 / 3**0.5))
    a, b = pd.Series({0: 3.0, 1: 5.0, 2: 4.0, 9: 0.0}), pd.Series({2: 1.0, 0: 1.0, 1: 2.0})
    mean, half, p = make_tables.paired(a, b)  # differences 2, 3, 3: mean 8/3, standard error 1/3
    assert (mean, half) == pytest.approx((8 / 3, 4.302653 / 3))
    assert p == pytest.approx(make_tables.two_sided_p(8, 2)) == pytest.approx(1 - 8 / 66**0.5)  # in closed form
    assert list(make_tables.holm(pd.Series([0.01, 0.04, 0.03]))) == pytest.approx([0.03, 0.06, 0.06])
    values = np.random.default_rng(0).normal(size=(5, 5))
    values += values.T
    means = [(values[k].sum() - values[k, k]) / 4 for k in range(5)]
    without = [np.delete(np.delete(values, k, 0), k, 1) for k in range(5)]
    without = np.array([(some.sum() - some.trace()) / 12 for some in without])
    mean, half = make_tables.between_sets(pd.Series(means))
    assert mean == pytest.approx(np.mean(means))
    assert half == pytest.approx(make_tables.t_quantile(4) * (4 / 5 * ((without - without.mean()) ** 2).sum()) ** 0.5)


def test_tables_of_a_small_csv(tmp_path):
    """Base 40 + seed; the gains of each seed in the order of the seeds."""
    about = {"part": "calm", "pairs": "foreign", "prompts": "report", **vars(Row())}
    rows = [{"part": "base", "prompts": "report", "seed": s, "step": 0, "reward": 40.0 + s, "judge": -6.0}
            for s in range(3)]  # fmt: skip
    gains_of = {"forward_soft": [3, 6, 9], "ddim_soft": [2, 4, 6], "last_soft": [1, 2, 3], "forward_hard": [2, 4, 6]}
    for name, gains in gains_of.items():
        for seed, gain in enumerate(gains):
            scores = {"reward": 40.0 + seed + gain, "judge": -6.0 + 2 * gain, "accuracy": 0.5, "diversity": 0.2}
            row = {**about, "name": name, "seed": seed, "unet_calls": 100, **scores, "distance": 0.1}
            rows += [{**row, "step": step} for step in (4, 8)]
    tuning = {"prompts": "tuning", "seed": 100}
    rows.append({**rows[0], **tuning})
    rows += [{**row, "part": "tune", **tuning} for row in rows if row.get("name") in ("forward_soft", "forward_hard")]
    append(tmp_path / "runs.csv", [*rows, rows[-1]], RUN_COLUMNS)  # two processes that met: the same again
    readme = tmp_path / "README.md"
    readme.write_text("<!-- ablation: runs -->\nold\n<!-- end of ablation -->\nnew")
    make_tables.main(make_tables.parse_args(["--results", str(tmp_path), "--readme", str(readme)]))
    text, half = readme.read_text(), 4.302653 / 3**0.5
    assert text.startswith("<!-- ablation: runs -->\n**Foreign pairs**") and text.endswith("\nnew")
    assert "old" not in text
    gains, scores = f"+2.00 ± {half:.2f} | +4.00 ± {2 * half:.2f}", "0.500 ± 0.000 | 0.100 ± 0.000 | 0.200 ± 0.000"
    assert f"\n| ReNoise, last of 9 moves, soft | 5e-05 | 8 | 100 | {gains} | {scores} | 3 |\n" in text
    p = make_tables.two_sided_p(2 * 3**0.5, 2)  # all differences have a mean of twice their standard deviation
    ddim, forward = text.split("**Foreign pairs, equal steps**")[1].split("\n")[4:6]
    assert f"DDIM, 9 moves, soft, over the paper's | +2.00 ± {half:.2f} | {p:.3f} | {3 * p:.3f} | +4.00 " in ddim
    assert f"| +4.00 ± {2 * half:.2f} | {p:.3f} | {3 * p:.3f} | +8.00 " in forward
    assert f"forward (Diffusion-DPO), soft, over hard | +2.00 ± {half:.2f} | {p:.3f} | {p:.3f} | +4.00 " in text
    assert "last of 9 moves, soft, 4 steps, over forward (Diffusion-DPO), soft, 8 steps | -4.00 ± " in text
    tuned = text.split("**Foreign pairs, so tuned, over hard labels**")[1].split("**")[0]
    assert f"\n| forward (Diffusion-DPO), soft, over hard | +2.00 ± {half:.2f} |" in tuned and tuned.count("\n| ") == 2
    runs = make_tables.read_runs(tmp_path / "runs.csv")
    two_seeds = make_tables.calm_tables(runs[runs["seed"] < 2])
    assert "| +1.50 | +3.00 |" in two_seeds and not re.search("±|equal|over hard", two_seeds)


def calm_runs(pairs, gains, num_seeds=10):
    """Runs with these gains over the default in reward and judge, give or take 1: of ten seeds, t is 3 x gain."""
    rows = []
    for name, means in {"last_soft": (0, 0), **gains}.items():
        for seed in range(num_seeds):
            scatter = 0 if name == "last_soft" else (-1) ** seed
            gain = {"gain": means[0] + scatter, "judge_gain": means[1] + scatter}
            rows.append({"part": "calm", "pairs": pairs, "name": name, "seed": seed, "step": 8, **gain})
    return pd.DataFrame(rows).assign(learning_rate=COMMON_RATE)


RELEASED, MIXED, LAST = (make_tables.TITLES[f"{name}_soft"] for name in ("released", "mixed", "last"))
EQUAL = {"released_soft": (0, 0), "mixed_soft": (0, 0)}


@pytest.mark.parametrize(
    "foreign, own, num_seeds, decided",
    [
        ({"released_soft": (3, 3), "forward_soft": (9, 9)}, EQUAL, 10, RELEASED),
        ({"released_soft": (3, 3)}, EQUAL, 9, None),
        ({"released_soft": (3, 3)}, {}, 10, None),
        ({"released_soft": (3, 0.1)}, EQUAL, 10, LAST),  # by the judge it is not ahead
        ({"released_soft": (3, 3)}, {"released_soft": (0, -3)}, 10, LAST),  # own pairs
        ({"released_soft": (3, 3), "mixed_soft": (3, 3)}, EQUAL, 10, RELEASED),
        ({"released_soft": (3, 3), "mixed_soft": (4, 4)}, EQUAL, 10, MIXED),  # better at every seed
        ({"released_soft": (0, 0), "mixed_soft": (3, 3)}, EQUAL, 10, MIXED),
        ({"released_soft": (0, 0), "forward_soft": (9, 9), "mixed_hard": (9, 9)}, EQUAL, 10, LAST),  # no candidates
        ({"released_soft": (0.94, 0.94), "ddim_soft": (0, 0)}, EQUAL, 10, RELEASED),  # p = 0.02, twice that
        ({"released_soft": (0.94, 0.94), "ddim_soft": (0, 0), "ddim_hard": (0, 0)}, EQUAL, 10, LAST),  # three times
    ],
)
def test_the_rule_for_the_default(foreign, own, num_seeds, decided):
    runs = pd.concat([calm_runs("foreign", foreign, num_seeds), calm_runs("own", own)])
    *_, last_line = lines = make_tables.rule(runs).splitlines()
    assert last_line == f"**The default by the rule: {decided}.**" if decided else last_line[:15] == "**Not decided**"
    if foreign.get("mixed_soft") == (4, 4):  # over the released code's 3, at every seed
        interval = "+1.00 ± 0.00 in reward (p = 0.000), +1.00 ± 0.00 by the judge (p = 0.000)"
        assert f"- {MIXED}, over {RELEASED}: {interval}" in lines


def test_the_tables_of_the_readme_are_those_of_the_csvs():
    """To a unit of the last digit: sums are rounded, and so are means that end in a 5."""
    text, tables = make_tables.README.read_text(), make_tables.make_tables(make_tables.RESULTS)
    assert set(tables) <= set(re.findall("<!-- ablation: (.*) -->", text))  # some parts have not been run
    number = r"[+-]?\d+\.\d+"
    texts = text, make_tables.with_tables(text, tables)
    words, numbers = zip(*((re.sub(number, "", some), re.findall(number, some)) for some in texts))
    assert words[0] == words[1]
    for here, there in zip(*numbers):
        unit = 10.0 ** -len(here.split(".")[1])
        assert float(here) == pytest.approx(float(there), abs=1.01 * unit), (here, there)
