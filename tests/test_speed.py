"""What makes a step fast changes nothing: micro-batches are inverted together, sorted by timestep, in whatever precision."""

import copy
import itertools
import math
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers
from accelerate import PartialState
from conftest import TINY, forget_accelerator, read_logs, train, train_flags, unet_weights
from packaging import version
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import train_smpo_sd15
import train_smpo_sdxl


IN_FLOAT64 = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5"), reason="its CLIP cannot run in float64"
)


def make_run(script, folder, sdxl, dtype=torch.float32, **flags):
    """Arguments, pairs, models and noise schedule of a run, and a policy that is not the reference any more."""
    PartialState()
    model = sdxl if script is train_smpo_sdxl else TINY / "sd15"
    args = script.parse_args(train_flags(folder, pretrained_model_name_or_path=model, **flags))
    alpha_bar = script.load_noise_schedule(args).to(dtype)
    models = script.load_models(args, torch.device("cpu"), dtype)
    models["ref_unet"] = script.load_reference(args, torch.device("cpu"), dtype) if args.rank is None else None
    if args.rank is not None:
        torch.manual_seed(0)
        script.add_lora(models["unet"], args)
    for network in filter(None, (models["unet"], models["ref_unet"], models["vae"])):
        network.to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in models["unet"].parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    pairs = script.load_data(args.dataset_name, None, "train", None)
    dataset = script.PairDataset(pairs, *script.select_pairs(pairs, args.labels_path, args), len(alpha_bar), args)
    return args, dataset, models, alpha_bar


def gradient(unet):
    return torch.cat([parameter.grad.flatten() for parameter in unet.parameters() if parameter.grad is not None])


def plain_step(script, keys, args, dataset, models, alpha_bar):
    """An optimiser step's loss and gradient, one image at a time and move by move, with nothing of the fast path."""
    losses = []
    for key in keys:
        errors, pair = {}, dataset[key]
        for i in (0, 1):
            pixels = (pair["pixel_values"][i][None].float() / 127.5 - 1).to(alpha_bar.dtype)
            posterior = models["vae"].encode(pixels).latent_dist
            generator = torch.Generator().manual_seed(pair["seeds"][i])
            noise = torch.randn(posterior.mean.shape[1:], generator=generator)
            x_0 = (posterior.mean + posterior.std * noise) * models["vae"].config.scaling_factor
            cond = script.encode_prompts([pair["caption"]], models)
            cond.update({name: value[None] for name, value in pair["image_cond"][i].items()})
            t, n = pair["timestep"], args.num_inversion_steps

            def eps(unet, x, timestep, cond=cond):
                return script.predict_noise(unet, x, torch.tensor([timestep]), cond)

            with torch.no_grad():
                x, num_moves = x_0, math.ceil(n * (t + 1) / len(alpha_bar))
                for move in range(1, num_moves + 1):
                    source, destination = ((t + 1) * j // num_moves - 1 for j in (move - 1, move))
                    levels = alpha_bar[source] if source >= 0 else torch.tensor(1.0), alpha_bar[destination]
                    moved = script.ddim_move(x, eps(models["unet"], x, max(source, 0)), *levels)
                    if args.renoise_at == "every_move" or move == num_moves:
                        moved = script.ddim_move(x, eps(models["unet"], moved, destination), *levels)
                    x = moved
                tau = (x - alpha_bar[t].sqrt() * x_0) / (1 - alpha_bar[t]).sqrt()
                with script.reference_of(models["unet"], models["ref_unet"], "cpu", args) as reference:
                    ref_error = (eps(reference, x, t) - tau).pow(2).mean()
            errors[i] = (eps(models["unet"], x, t) - tau).pow(2).mean() - ref_error
        logit = -0.5 * args.beta_dpo * args.gamma * (2 * pair["soft_label_0"] - 1) * (errors[0] - errors[1])
        loss = -torch.nn.functional.logsigmoid(logit) / len(keys)
        loss.backward()
        losses.append(loss.detach())
    return sum(losses), gradient(models["unet"])


@pytest.mark.parametrize(
    "script, renoise_at, rank",
    [
        (train_smpo_sd15, "last_move", None),
        (train_smpo_sd15, "every_move", None),
        (train_smpo_sd15, "last_move", 4),
        pytest.param(train_smpo_sdxl, "last_move", None, marks=IN_FLOAT64),
        pytest.param(train_smpo_sdxl, "every_move", 4, marks=IN_FLOAT64),
    ],
)
def test_the_fast_path_gives_loss_and_gradient_of_the_plain_one(
    script, renoise_at, rank, tmp_path, sdxl, labels_path, monkeypatch
):
    """Six pairs: one image and one move at a time against micro-batches of two, of which four pairs are inverted together.

    SD1.5 in fp32. SDXL's weights are random and magnify rounding: it runs in float64, up to where the script rounds to fp32.
    """
    dtype, tolerance = torch.float32, 1e-5
    if script is train_smpo_sdxl:
        dtype, tolerance = torch.float64, 1e-7
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    args, dataset, models, alpha_bar = make_run(
        script, tmp_path, sdxl, dtype, labels_path=labels_path, renoise_at=renoise_at, rank=rank, train_batch_size=2,
        gradient_accumulation_steps=3, inversion_batch_size=4, num_inversion_steps=4, beta_dpo=200,
    )  # fmt: skip
    keys = [(0, index) for index in range(6)]
    plain_loss, plain_gradient = plain_step(script, keys, args, dataset, models, alpha_bar)
    models["unet"].zero_grad()
    fast_loss, batch_sizes = 0, []
    micro_batches = [keys[i : i + 2] for i in range(0, 6, 2)]
    for batch in itertools.islice(script.batches_of_steps(itertools.cycle(micro_batches), dataset, args), 2):
        batch = script.collate_pairs([dataset[key] for key in batch])
        batch_sizes.append(len(batch["captions"]))
        for micro_batch in script.prepare_micro_batches(batch, models, alpha_bar, nullcontext, args):
            loss, _ = script.training_step(micro_batch, models["unet"], alpha_bar, nullcontext, args)
            (loss / 3).backward()
            fast_loss += loss.detach() / 3
    assert batch_sizes == [4, 2]
    assert abs(fast_loss - math.log(2)) > 1e-3
    torch.testing.assert_close(fast_loss, plain_loss, rtol=tolerance, atol=0)
    assert (gradient(models["unet"]) - plain_gradient).norm() < tolerance * plain_gradient.norm()


def test_the_pairs_of_a_step_are_inverted_in_order_of_their_timesteps(tmp_path, labels_path):
    args, dataset, _, _ = make_run(
        train_smpo_sd15, tmp_path, None, labels_path=labels_path, train_batch_size=3, gradient_accumulation_steps=5,
        inversion_batch_size=8,
    )  # fmt: skip
    sampler = train_smpo_sd15.PairSampler(len(dataset), 3, 1, 0, seed=1, start=0)
    expected = list(itertools.islice(sampler, 10))
    batches = list(itertools.islice(train_smpo_sd15.batches_of_steps(sampler, dataset, args), 6))
    assert [len(batch) for batch in batches] == [6, 6, 3] * 2  # whole micro-batches, of one optimiser step
    for step in (0, 1):
        keys = list(itertools.chain.from_iterable(batches[3 * step : 3 * step + 3]))
        assert sorted(keys) == sorted(itertools.chain.from_iterable(expected[5 * step : 5 * step + 5]))
        timesteps = [dataset[key]["timestep"] for key in keys]
        assert timesteps == sorted(timesteps) and len(set(timesteps)) > 10


@pytest.mark.parametrize("streaming", [None, True], ids=["copied", "streamed"])
def test_the_inversion_batch_changes_speed_alone(streaming, tmp_path, labels_path):
    flags = {
        "labels_path": labels_path, "train_batch_size": 2, "gradient_accumulation_steps": 4, "streaming": streaming,
        "learning_rate": 1e-5,
    }  # fmt: skip
    logs = [train(tmp_path / str(size), inversion_batch_size=size, **flags) for size in (1, 5, 100)]
    for metric in ("loss", "grad_norm", "reward_margin", "std_tau", "ref_error_rejected"):
        for others in logs[1:]:
            np.testing.assert_allclose(others[metric], logs[0][metric], rtol=1e-4, atol=1e-5)
    base, one, many = (
        torch.cat([value.flatten() for value in unet_weights(folder).values()])
        for folder in (TINY / "sd15", tmp_path / "1", tmp_path / "100")
    )
    assert (many - one).norm() < 1e-2 * (one - base).norm()


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "lora"])
def test_in_bf16_a_weight_is_rounded_once_an_inversion_and_the_gradient_is_there(
    rank, tmp_path, labels_path, monkeypatch
):
    """Autocast's cache serves all calls of an inversion, and never the call that has a gradient."""
    args, dataset, models, alpha_bar = make_run(
        train_smpo_sd15, tmp_path, None, labels_path=labels_path, rank=rank, train_batch_size=2, num_inversion_steps=4
    )
    batch = train_smpo_sd15.collate_pairs([dataset[0, index] for index in range(2)])

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    (micro_batch,) = train_smpo_sd15.prepare_micro_batches(batch, models, alpha_bar, autocast, args)
    loss, _ = train_smpo_sd15.training_step(micro_batch, models["unet"], alpha_bar, autocast, args)
    loss.backward()
    half = gradient(models["unet"])
    models["unet"].zero_grad()

    (plain,) = train_smpo_sd15.prepare_micro_batches(batch, models, alpha_bar, nullcontext, args)
    # In bf16 the inversion ends elsewhere; the same x_t, tau and reference errors show what the policy's pass alone does.
    loss, _ = train_smpo_sd15.training_step({**plain, **micro_batch}, models["unet"], alpha_bar, nullcontext, args)
    loss.backward()
    assert torch.nn.functional.cosine_similarity(half, gradient(models["unet"]), dim=0) > 0.9

    weights = {id(parameter): name for name, parameter in models["unet"].named_parameters() if parameter.requires_grad}
    rounded = Counter()

    class Roundings(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
                rounded[weights.get(id(args[0]))] += 1
            return function(*args, **(kwargs or {}))

    with Roundings():
        train_smpo_sd15.prepare_micro_batches(batch, models, alpha_bar, autocast, args)
    assert {rounded[name] for name in weights.values() if name in rounded} == {1} and len(rounded) > 20
    calls = train_smpo_sd15.num_inversion_calls(batch["timesteps"], alpha_bar, 4, "renoise", "last_move")
    assert calls > 3


def test_a_run_in_bf16_writes_what_any_loader_takes(tmp_path, labels_path):
    """Convolutions are in channels_last then: files, resumption and the pipeline know nothing of it."""
    flags = {"labels_path": labels_path, "mixed_precision": "bf16", "checkpointing_steps": 1}
    train(tmp_path / "whole", max_train_steps=2, **flags)
    train(tmp_path / "broken", max_train_steps=1, **flags)
    train(tmp_path / "broken", max_train_steps=2, resume_from_checkpoint="latest", **flags)
    weights = unet_weights(tmp_path / "whole")
    assert all(value.is_contiguous() for value in weights.values())
    resumed = unet_weights(tmp_path / "broken")
    assert not [name for name, value in weights.items() if not torch.equal(value, resumed[name])]
    assert read_logs(tmp_path / "whole")["loss"][0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_lora_of_convolutions_is_saved_in_half_precision(tmp_path, labels_path):
    flags = {"labels_path": labels_path, "mixed_precision": "bf16", "rank": 2, "lora_layers": "conv1,to_q"}
    train(tmp_path, output_kohya_format=True, **flags)
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"):
        weights = load_file(tmp_path / name)
        assert {value.shape[2:] for value in weights.values()} >= {(3, 3), (1, 1), ()}


def test_loaded_state_has_the_layout_of_its_parameters():
    """A convolution in channels_last saved and gone on with in the usual layout, against one that never stopped."""
    torch.manual_seed(0)
    going_on, images = torch.nn.Conv2d(4, 6, 3), torch.randn(3, 2, 4, 8, 8)

    def step(conv, optimizer, i):
        optimizer.zero_grad()
        conv(images[i]).pow(2).mean().backward()
        optimizer.step()

    def new_optimizer(conv):
        return torch.optim.AdamW(conv.parameters(), lr=0.1, fused=True)

    going_on.to(memory_format=torch.channels_last)
    optimizer = new_optimizer(going_on)
    step(going_on, optimizer, 0)
    stopped = torch.nn.Conv2d(4, 6, 3)
    stopped.load_state_dict(going_on.state_dict())
    resumed = new_optimizer(stopped)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (first, *_), (moment, *_) = stopped.parameters(), (state["exp_avg"] for state in resumed.state.values())
    assert first.is_contiguous() and not moment.is_contiguous()
    train_smpo_sd15.follow_layout(resumed)
    for i in (1, 2):
        step(going_on, optimizer, i)
        step(stopped, resumed, i)
    for one, other in zip(going_on.parameters(), stopped.parameters()):
        torch.testing.assert_close(one, other)


def test_a_run_goes_on_in_another_precision(tmp_path, labels_path):
    """Saved in half precision, where convolutions are in channels_last, and resumed in fp32, where they are not."""
    flags = {"labels_path": labels_path, "checkpointing_steps": 1}
    train(tmp_path, mixed_precision="bf16", max_train_steps=1, **flags)
    forget_accelerator()
    train(tmp_path, max_train_steps=2, resume_from_checkpoint="latest", resume_despite_changes=True, **flags)
    contiguous = [
        {moment.is_contiguous() for moment in state.values() if moment.ndim == 4}
        for step in (1, 2)
        for state in torch.load(tmp_path / f"checkpoint-{step}" / "optimizer.bin")["state"].values()
    ]
    assert {False} in contiguous[: len(contiguous) // 2] and {False} not in contiguous[len(contiguous) // 2 :]


@pytest.mark.slow
def test_compiled_blocks_round_as_the_reference_does(tmp_path, labels_path):
    """In half precision, with a UNet of its own for the reference and with the LoRA switched off."""
    flags = {"labels_path": labels_path, "mixed_precision": "bf16", "compile": True}
    for name, more in {"full": {}, "lora": {"rank": 4}}.items():
        assert train(tmp_path / name, **flags, **more)["loss"][0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [{}, {"rank": 4, "gradient_checkpointing": True}], ids=["full", "lora with checkpointing"]
)
def test_compiled_blocks_give_the_same_run(flags, tmp_path, labels_path):
    flags = {"labels_path": labels_path, "gradient_accumulation_steps": 2, "max_train_steps": 2, **flags}
    logs = train(tmp_path / "eager", **flags)
    compiled = train(tmp_path / "compiled", compile=True, **flags)
    for metric in ("loss", "grad_norm", "std_tau", "ref_error_rejected"):
        np.testing.assert_allclose(compiled[metric], logs[metric], rtol=1e-3, atol=1e-5)
