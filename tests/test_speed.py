"""What makes a step fast changes nothing: micro-batches inverted together, sorted by timestep, in any precision."""

import itertools
import math
import shutil
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import MethodType

import pytest
import torch
import transformers
from accelerate import Accelerator, PartialState
from conftest import TINY, train, train_flags, unet_weights
from torch.utils._python_dispatch import TorchDispatchMode

import train_smpo_sd15
import train_smpo_sdxl


in_float64 = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="its CLIP is not for float64")
# float64's eps, 2.2e-16, times 1,000 of beta gamma / 2, 34 of 1 / sqrt(1 - alpha_bar_0), 100 of as many layers: 8e-10.
FLOAT64_RTOL = 1e-9


def make_run(script, folder, sdxl, dtype=torch.float32, **flags):
    """`Context` and `Pairs` of a run whose policy is not the reference any more."""
    state = PartialState()
    model = sdxl if script is train_smpo_sdxl else TINY / "sd15"
    args = script.parse_args(train_flags(folder, pretrained_model_name_or_path=model, **flags))
    alpha_bar, prediction_type = script.load_noise_schedule(args)
    models = script.load_models(args, state.device, dtype)
    torch.manual_seed(0)
    script.set_up_unets(state, models, dtype, args)
    for network in filter(None, (models["unet"], models["ref_unet"], models["vae"])):
        network.to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in models["unet"].parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    pairs, _ = script.load_pairs(state, len(alpha_bar), args)
    return script.Context(models, alpha_bar.to(dtype), prediction_type, nullcontext, args), pairs


def pop_gradient(unet):
    """The gradient of a UNet as one vector; the UNet forgets it."""
    gradient = torch.cat([parameter.grad.flatten() for parameter in unet.parameters() if parameter.grad is not None])
    unet.zero_grad()
    return gradient


def plain_step(script, keys, pairs, context):
    """An optimiser step's loss and gradient, one image at a time and move by move, with nothing of the fast path."""
    models, alpha_bar, args, losses = context.models, context.alpha_bar, context.args, []
    for key in keys:
        errors, pair = [], pairs[key]
        t, n = pair["timestep"], args.num_inversion_steps
        for i in (0, 1):
            pixels = (pair["pixel_values"][i][None].float() / 127.5 - 1).to(alpha_bar.dtype)
            posterior = models["vae"].encode(pixels).latent_dist
            generator = torch.Generator().manual_seed(pair["seeds"][i])
            noise = torch.randn(posterior.mean.shape[1:], generator=generator)
            x_0 = (posterior.mean + posterior.std * noise) * models["vae"].config.scaling_factor
            cond = script.encode_prompts([pair["caption"]], models)

            def eps(unet, x, timestep, cond=cond):
                return script.call_unet(unet, x, torch.tensor([timestep]), cond)

            with torch.no_grad():
                x, num_moves = x_0, math.ceil((n or 0) * (t + 1) / len(alpha_bar))
                if args.noising == "forward":  # Diffusion-DPO's: one noise for both images
                    generator = torch.Generator().manual_seed(pair["seeds"][2])
                    noise = torch.randn(x_0.shape, generator=generator).to(x_0)
                    x = alpha_bar[t].sqrt() * x_0 + (1 - alpha_bar[t]).sqrt() * noise
                for move in range(1, num_moves + 1):
                    source, destination = ((t + 1) * j // num_moves - 1 for j in (move - 1, move))
                    levels = alpha_bar[source] if source >= 0 else torch.tensor(1.0), alpha_bar[destination]
                    moved = script.ddim_move(x, eps(models["unet"], x, max(source, 0)), *levels)
                    if args.renoise_at == "every_move" or move == num_moves:
                        moved = script.ddim_move(x, eps(models["unet"], moved, destination), *levels)
                    x = moved
                tau = (x - alpha_bar[t].sqrt() * x_0) / (1 - alpha_bar[t]).sqrt()
                with script.reference_of(context) as reference:
                    ref_error = (eps(reference, x, t) - tau).pow(2).mean()
            errors.append((eps(models["unet"], x, t) - tau).pow(2).mean() - ref_error)
        p_0 = torch.tensor(pair["soft_label_0"])  # fp32, as in a batch
        logit = -0.5 * args.beta_dpo * args.gamma * (2 * p_0 - 1) * (errors[0] - errors[1])
        loss = -torch.nn.functional.logsigmoid(logit) / len(keys)
        loss.backward()
        losses.append(loss.detach())
    return sum(losses), pop_gradient(models["unet"])


@in_float64
@pytest.mark.parametrize("script, flags", [
    (train_smpo_sd15, {"noising": "renoise", "renoise_at": "every_move", "rank": 4}),
    (train_smpo_sdxl, {"noising": "renoise", "renoise_at": "last_move"}),
    (train_smpo_sd15, {"noising": "forward", "label_column": "label_0", "labels_path": None, "gamma": 1,
                       "beta_dpo": 2000}),
])  # fmt: skip
def test_the_fast_path_is_the_plain_one(script, flags, tmp_path, sdxl, labels_path, monkeypatch):
    """Loss and gradient of six pairs: one image and one move at a time, against micro-batches of two, two of them
    inverted together. By forward noise, with people's choices and a gamma of 1, it is Diffusion-DPO."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    context, pairs = make_run(
        script, tmp_path, sdxl, torch.float64, gradient_accumulation_steps=3, inversion_batch_size=4,
        **{"labels_path": labels_path, "beta_dpo": 200, **flags},
    )  # fmt: skip
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion's
    torch.testing.assert_close(context.alpha_bar, (1 - betas).cumprod(0), rtol=1e-3, atol=0)  # a product of fp32
    keys, fast_loss, batch_sizes = [(0, index) for index in range(6)], 0, []
    plain_loss, plain_gradient = plain_step(script, keys, pairs, context)
    for group in script.group_for_inversion(keys, pairs.timestep, context.args):
        batch_sizes.append(len(group))
        for micro_batch in script.invert_and_judge(script.collate_pairs([pairs[key] for key in group]), context):
            loss = script.training_step(micro_batch, context)[0] / 3
            loss.backward()
            fast_loss += loss.detach()
    assert batch_sizes == [4, 2]
    assert abs(fast_loss - math.log(2)) > 1e-3
    torch.testing.assert_close(fast_loss, plain_loss, rtol=FLOAT64_RTOL, atol=0)
    gradient = pop_gradient(context.models["unet"])
    assert (gradient - plain_gradient).norm() < FLOAT64_RTOL * plain_gradient.norm()


def test_the_pairs_of_a_step_are_inverted_in_order_of_their_timesteps(tmp_path, labels_path):
    context, pairs = make_run(
        train_smpo_sd15, tmp_path, None, labels_path=labels_path, train_batch_size=3, gradient_accumulation_steps=5,
        inversion_batch_size=8,
    )  # fmt: skip
    groups = list(itertools.islice(train_smpo_sd15.shuffled_keys(pairs, 0, 1, 0, context.args), 6))
    assert [len(group) for group in groups] == [6, 6, 3] * 2  # whole micro-batches, of one optimiser step
    context.args.train_batch_size, context.args.gradient_accumulation_steps = 15, 1
    wholes = train_smpo_sd15.shuffled_keys(pairs, 0, 1, 0, context.args)
    for first in (0, 3):
        keys = [key for group in groups[first : first + 3] for key in group]
        assert sorted(keys) == sorted(next(wholes))  # the same pairs, however they are divided
        timesteps = [pairs[key]["timestep"] for key in keys]
        assert timesteps == sorted(timesteps) and len(set(timesteps)) > 10


@in_float64
def test_the_inversion_batch_changes_speed_alone(tmp_path, labels_path, monkeypatch):
    """Two optimiser steps of the script's own loop, the second with the weights that the first has changed."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    flags = {"labels_path": labels_path, "gradient_accumulation_steps": 3, "beta_dpo": 200, "max_grad_norm": 0.5}
    context, pairs = make_run(train_smpo_sd15, tmp_path, None, torch.float64, **flags)
    accelerator, unet, runs = Accelerator(gradient_accumulation_steps=3), context.models["unet"], []
    start = {name: value.clone() for name, value in unet.state_dict().items()}
    for context.args.inversion_batch_size in (1, 100):
        unet.load_state_dict(start)
        # Adam would divide rounding by the size of the gradient.
        optimizer = accelerator.prepare(torch.optim.SGD(unet.parameters(), lr=1e-4))
        lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer, factor=1.0)
        progress = train_smpo_sd15.Progress()
        batches = train_smpo_sd15.make_batches(accelerator, pairs, progress, context.args)
        steps = train_smpo_sd15.optimiser_steps(accelerator, batches, optimizer, lr_scheduler, progress, [], context)
        first, *_ = next(steps)
        moved = [value - start[name] for name, value in unet.state_dict().items()]
        length = torch.nn.utils.get_total_norm(moved).item()
        assert first["grad_norm"] > 0.5 and length == pytest.approx(1e-4 * 0.5, rel=1e-5)  # clipped to it, less 1e-6
        runs.append([first, next(steps)[0]])
    one_by_one, together = runs
    assert one_by_one[0]["loss"] != one_by_one[1]["loss"]
    assert together == [pytest.approx(logs, rel=FLOAT64_RTOL) for logs in one_by_one]


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "lora"])
def test_in_bf16_a_weight_is_rounded_once_an_inversion_and_the_gradient_is_there(rank, tmp_path, labels_path):
    """Autocast's cache serves all calls of an inversion, and never the call that has a gradient."""
    plain, pairs = make_run(train_smpo_sd15, tmp_path, None, labels_path=labels_path, rank=rank, beta_dpo=1)
    context, unet = replace(plain, autocast=lambda: torch.autocast("cpu", torch.bfloat16)), plain.models["unet"]
    batch = train_smpo_sd15.collate_pairs([pairs[0, index] for index in range(2)])
    weights = {id(parameter): name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    rounded, calls = Counter(), []

    class Roundings(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
                rounded[weights.get(id(args[0]))] += 1
            return function(*args, **(kwargs or {}))

    handle = unet.register_forward_hook(lambda *_: calls.append(1))
    with Roundings():
        (micro_batch,) = train_smpo_sd15.invert_and_judge(batch, context)
    handle.remove()
    assert {rounded[name] for name in weights.values() if name in rounded} == {1} and len(rounded) > 20
    assert len(calls) > 3

    gradients = []
    for some_context in (plain, context):
        train_smpo_sd15.training_step(micro_batch, some_context)[0].backward()
        gradients.append(pop_gradient(unet))
    # With a beta of 1 all pairs weigh alike; a hundred roundings by 2e-3 make an angle of 0.02, of cosine 0.9998.
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.9


@pytest.mark.parametrize("norm", [torch.nn.GroupNorm(2, 8), torch.nn.LayerNorm(8)], ids=["group", "layer"])
def test_a_norm_without_autocast_is_a_norm_of_rounded_numbers(norm):
    torch.manual_seed(0)
    x, (_, bias) = torch.randn(4, 8, 8), map(torch.nn.init.normal_, norm.parameters())
    assert torch.equal(train_smpo_sd15.norm_without_autocast(norm, x), norm(x))
    x = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = train_smpo_sd15.norm_without_autocast(norm, x)
    y.float().sum().backward()
    exact, bias = norm(x.float()), bias.abs().max()  # which is rounded, as are the weight and the result
    assert y.dtype == torch.bfloat16 and ((y - exact).abs() <= 2**-7 * (exact.abs() + bias)).all()
    assert (norm.bias.grad == 32).all() and norm.bias.grad.dtype == torch.float32


def test_norms_without_autocast_keep_the_implied_noise(tmp_path, labels_path):
    """Autocast of a GPU, here by hand, has norms in fp32. Without, tau's error grows by less than its own size."""
    plain, pairs = make_run(train_smpo_sd15, tmp_path, None, labels_path=labels_path, inversion_batch_size=4)
    half = replace(plain, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    norms = [m for m in plain.models["unet"].modules() if isinstance(m, (torch.nn.GroupNorm, torch.nn.LayerNorm))]

    def tau_with(norm_forward, context):
        for norm in norms:
            norm.forward = MethodType(norm_forward, norm)
        batch = train_smpo_sd15.collate_pairs([pairs[0, index] for index in range(4)])
        return torch.cat([micro_batch.tau for micro_batch in train_smpo_sd15.invert_and_judge(batch, context)])

    def in_float32(norm, x):
        return type(norm).forward(norm, x.float())

    exact = tau_with(in_float32, plain)
    on_a_gpu, ours = (
        (tau_with(forward, half) - exact).square().mean().sqrt()
        for forward in (in_float32, train_smpo_sd15.norm_without_autocast)
    )
    assert 0 < ours < 2 * on_a_gpu


def test_a_run_in_bf16_writes_what_any_loader_takes(tmp_path, labels_path):
    """Convolutions are in channels_last then: files, resumption and the pipeline know nothing of it."""
    flags = {
        "labels_path": labels_path, "mixed_precision": "bf16", "checkpointing_steps": 1, "train_batch_size": 1,
        "gradient_accumulation_steps": 2,
    }  # fmt: skip
    logs = train(tmp_path / "whole", **flags)
    # Two micro-batches are inverted together, and reference and policy judge each in its own shape.
    assert logs["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "broken" / "checkpoint-1")
    train(tmp_path / "broken", resume_from_checkpoint="latest", **flags)
    whole, resumed = unet_weights(tmp_path / "whole"), unet_weights(tmp_path / "broken")
    start = unet_weights(TINY / "sd15")
    for folder in (tmp_path / "whole", tmp_path / "whole" / "checkpoint-1"):
        (rights,) = {file.stat().st_mode for file in (folder / "unet").iterdir()}
        assert rights & 0o444 == folder.stat().st_mode & 0o444  # whoever may look into the folder may read weights
    assert all(value.is_contiguous() and not torch.equal(value, start[name]) for name, value in whole.items())
    assert not [name for name, value in whole.items() if not torch.equal(value, resumed[name])]
