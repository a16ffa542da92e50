"""train_smpo_sd15.py, run in this process on the tiny model."""

import io
import json
import math
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from conftest import TINY, command_line, names_in, train, train_flags, unet_weights, write_pairs
from PIL import Image
from safetensors.torch import load_file

from diffusers import DDPMScheduler, StableDiffusionPipeline
from train_smpo_sd15 import (
    PairDataset,
    PairSampler,
    collate_pairs,
    cut_square,
    encode_prompts,
    join_labels,
    load_data,
    parse_args,
    select_pairs,
    smpo_loss,
)


LOGGED = {
    "loss", "implicit_accuracy", "reward_margin", "model_error_preferred", "model_error_rejected",
    "ref_error_preferred", "ref_error_rejected", "std_tau", "weight_share/weak", "weight_share/medium",
    "weight_share/strong", "lr", "grad_norm", "pairs_per_second", "epoch", "skipped_pairs", "nonfinite_steps",
}  # fmt: skip


# What a run writes


def test_full_fine_tuning(tmp_path, labels_path):
    logs = train(
        tmp_path, labels_path=labels_path, validation_prompts=["a large red circle", "a blue square"],
        num_validation_images=1, validation_steps=1, validation_guidance_scale=2.0, checkpointing_steps=1,
    )  # fmt: skip
    assert set(logs) == LOGGED and len(logs["loss"]) == 2
    assert logs["loss"][0] == pytest.approx(
        math.log(2), abs=1e-6
    )  # policy and reference are equal before the first step
    assert logs["implicit_accuracy"][0] == 0.5 and logs["grad_norm"][0] > 0
    assert logs["model_error_preferred"][0] == logs["ref_error_preferred"][0]
    assert logs["loss"][1] != logs["loss"][0]
    shares = [logs[f"weight_share/{name}"][0] for name in ("weak", "medium", "strong")]
    assert sum(shares) == pytest.approx(1)

    assert names_in(tmp_path) == {
        "README.md", "checkpoint-1", "checkpoint-2", "feature_extractor", "logs", "model_index.json", "scheduler",
        "text_encoder", "tokenizer", "training_args.json", "unet", "vae", "validation",
    } - {"feature_extractor"}  # fmt: skip
    assert names_in(tmp_path / "validation") == {"step-1.png", "step-2.png"}
    assert Image.open(tmp_path / "validation" / "step-2.png").width == 2 * 192
    before, after = unet_weights(TINY / "sd15"), unet_weights(tmp_path)
    assert not [name for name in before if torch.equal(before[name], after[name])]  # every parameter has moved
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert pipeline("a red circle", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)

    card = (tmp_path / "README.md").read_text()
    assert "arxiv.org/abs/2506.02698" in card and "validation/step-2.png" in card and "`beta_dpo` | `2000" in card
    record = json.loads((tmp_path / "training_args.json").read_text())
    assert record["args"]["renoise_at"] == "last_move" and record["versions"]["torch"] == torch.__version__


def test_lora(tmp_path, labels_path):
    """The saved LoRA, loaded by diffusers, is the policy: its alpha unlike its rank is not forgotten."""
    logs = train(tmp_path, labels_path=labels_path, rank=4, lora_alpha=8, learning_rate=1e-2, checkpointing_steps=2)
    assert logs["loss"][0] == pytest.approx(math.log(2), abs=1e-6) and logs["loss"][1] != logs["loss"][0]
    assert names_in(tmp_path) == {
        "README.md", "checkpoint-2", "logs", "pytorch_lora_weights.safetensors", "training_args.json"
    }  # fmt: skip
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    assert {f"{stem}.lora.down.weight", f"{stem}.lora.up.weight"} < set(weights)
    assert all(re.fullmatch(r"unet\..*attn[12]\.to_(q|k|v|out\.0)\.lora\.(up|down)\.weight", name) for name in weights)
    assert all(value.any() for value in weights.values())  # "up" starts at zero: every one has moved

    pipeline = StableDiffusionPipeline.from_pretrained(TINY / "sd15", torch_dtype=torch.float32)
    layer = pipeline.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    base = layer.weight.clone()
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    pipeline.fuse_lora()
    update = 8 / 4 * weights[f"{stem}.lora.up.weight"] @ weights[f"{stem}.lora.down.weight"]
    fused = pipeline.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight
    torch.testing.assert_close(fused, base + update)


def test_wandb_gets_numbers_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train(
        tmp_path / "out", noising="forward", label_column="label_0", report_to="wandb", max_train_steps=1,
        validation_prompts=["a red circle"], num_validation_images=1,
    )  # fmt: skip
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("files/media/images/validation_*.png"))
    (log,) = run.glob("*.wandb")
    assert b"implicit_accuracy" in log.read_bytes()


@pytest.mark.parametrize(
    "flags",
    [
        {"noising": "forward", "label_column": "label_0", "gamma": 1},
        {"noising": "ddim"},
        {"renoise_at": "every_move"},
        {"inversion_guidance_scale": 3.0},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "rank": 2, "gradient_checkpointing": True},
        {"optimizer": "adafactor", "gradient_checkpointing": True},
        {"use_8bit_adam": True},
        {"prediction_type": "v_prediction", "random_crop": True, "image_interpolation_mode": "lanczos"},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "scale_lr": True, "dataloader_num_workers": 1},
        {"max_train_samples": 5, "proportion_empty_prompts": 1.0, "vae_encode_batch_size": 3},
    ],
    ids=lambda flags: ",".join(flags),
)
def test_every_way_to_train_moves_every_weight(flags, tmp_path, labels_path):
    """Two steps each; reference and policy agree before the first in every precision, and every trained tensor moves."""
    logs = train(tmp_path, labels_path=labels_path, **flags)
    assert logs["loss"][0] == pytest.approx(math.log(2), abs=1e-6), logs["loss"]
    assert all(np.isfinite(values).all() for values in logs.values())
    if "rank" in flags:
        assert all(value.any() for value in load_file(tmp_path / "pytorch_lora_weights.safetensors").values())
    else:
        before, after = unet_weights(TINY / "sd15"), unet_weights(tmp_path)
        assert not [name for name in before if torch.equal(before[name], after[name])]


@pytest.mark.parametrize(
    "scheduler", ["linear", "cosine_with_restarts", "polynomial", "constant", "piecewise_constant"]
)
def test_schedules_step_once_an_optimiser_step(scheduler, tmp_path):
    rules = "0.5:1,0.1:2,0.01" if scheduler == "piecewise_constant" else None
    logs = train(
        tmp_path, noising="forward", label_column="label_0", lr_scheduler=scheduler, lr_step_rules=rules,
        max_train_steps=3, gradient_accumulation_steps=2, train_batch_size=1,
    )  # fmt: skip
    expected = {
        "linear": [1, 2 / 3, 1 / 3],
        "cosine_with_restarts": [0.5 * (1 + math.cos(math.pi * i / 3)) for i in range(3)],
        "polynomial": [1 - (1 - 1e-3) * i / 3 for i in range(3)],
        "constant": [1, 1, 1],
        "piecewise_constant": [0.5, 0.1, 0.01],
    }[scheduler]
    np.testing.assert_allclose(logs["lr"], [1e-4 * factor for factor in expected], rtol=2e-3)


def test_epochs_count_the_steps(tmp_path):
    logs = train(
        tmp_path, noising="forward", label_column="label_0", rank=2, max_train_steps=None, num_train_epochs=2,
        max_train_samples=5,
    )  # fmt: skip
    assert logs["epoch"] == [0.5, 1.0, 1.5, 2.0]


# The same run, cut up in other ways


@pytest.mark.parametrize("flags", [{}, {"rank": 2}], ids=["full", "lora"])
def test_a_resumed_run_ends_bit_for_bit_as_the_whole_one(flags, tmp_path, labels_path):
    flags = {"labels_path": labels_path, "checkpointing_steps": 2, "gradient_accumulation_steps": 2, **flags}
    flags |= {"lr_scheduler": "cosine", "lr_warmup_steps": 1}
    train(tmp_path / "whole", max_train_steps=4, **flags)
    train(tmp_path / "resumed", max_train_steps=4, **flags)
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    train(tmp_path / "resumed", max_train_steps=4, resume_from_checkpoint="latest", **flags)
    if "rank" in flags:
        whole, resumed = (
            load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("whole", "resumed")
        )
    else:
        whole, resumed = (unet_weights(tmp_path / run) for run in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_micro_batches_do_not_change_the_run(tmp_path, labels_path):
    """1 x 4, 2 x 2 and 4 x 1: the same pairs, timesteps and noise, hence the same gradient but for rounding."""
    grad_norms, losses = [], []
    for batch in (1, 2, 4):
        logs = train(
            tmp_path / str(batch), labels_path=labels_path, train_batch_size=batch,
            gradient_accumulation_steps=4 // batch, learning_rate=1e-5,
        )  # fmt: skip
        grad_norms.append(logs["grad_norm"])
        losses.append(logs["loss"])
    np.testing.assert_allclose(grad_norms[1:], [grad_norms[0]] * 2, rtol=1e-3)
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-4)


def test_forward_with_hard_labels_is_diffusion_dpo(tmp_path):
    """The first optimiser step against Diffusion-DPO written out on its own: the gradient's norm must agree."""
    flags = {"noising": "forward", "label_column": "label_0", "gamma": 1, "train_batch_size": 4, "max_train_steps": 1}
    logs = train(tmp_path, proportion_empty_prompts=0.0, **flags)

    args = parse_args(train_flags(tmp_path / "other", proportion_empty_prompts=0.0, **flags))
    pairs = load_data(args.dataset_name, None, "train", None)
    rows, labels = select_pairs(pairs, args.labels_path, args)
    keys = next(iter(PairSampler(len(rows), 4, 1, 0, args.seed, start=0)))
    batch = collate_pairs([PairDataset(pairs, rows, labels, 1000, args)[key] for key in keys])
    pipeline = StableDiffusionPipeline.from_pretrained(TINY / "sd15", torch_dtype=torch.float32)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    with torch.no_grad():
        posterior = pipeline.vae.encode(batch["pixel_values"] / 127.5 - 1).latent_dist
        draws = [torch.Generator().manual_seed(seeds[i]) for i in (0, 1) for seeds in batch["seeds"]]
        latents = [
            posterior.mean[i] + posterior.std[i] * torch.randn(4, 8, 8, generator=g) for i, g in enumerate(draws)
        ]
        latents = torch.stack(latents) * pipeline.vae.config.scaling_factor
        states = encode_prompts(batch["captions"], pipeline.components)
    states = states["encoder_hidden_states"].repeat(2, 1, 1)
    draws = [torch.Generator().manual_seed(seeds[2]) for seeds in batch["seeds"]]
    noise = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in draws]).repeat(2, 1, 1, 1)
    timesteps = batch["timesteps"].repeat(2)
    model_pred = pipeline.unet(scheduler.add_noise(latents, noise, timesteps), timesteps, states).sample
    model_losses = (model_pred - noise).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    ref_losses = [losses.detach() for losses in model_losses]
    sign = torch.where(batch["soft_label_0"] == 1, 1.0, -1.0)
    model_diff, ref_diff = sign * (model_losses[0] - model_losses[1]), sign * (ref_losses[0] - ref_losses[1])
    loss = -torch.nn.functional.logsigmoid(-0.5 * 2000 * (model_diff - ref_diff)).mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in pipeline.unet.parameters() if p.grad is not None]).norm()
    assert logs["grad_norm"][0] == pytest.approx(float(norm), rel=1e-3)


def test_checkpoints_total_limit_keeps_the_newest(tmp_path):
    train(
        tmp_path, noising="forward", label_column="label_0", max_train_steps=4, checkpointing_steps=1,
        checkpoints_total_limit=2, rank=2,
    )  # fmt: skip
    assert {name for name in names_in(tmp_path) if name.startswith("checkpoint")} == {"checkpoint-3", "checkpoint-4"}


def test_pretrained_unet_is_where_policy_and_reference_start(tmp_path, labels_path):
    train(tmp_path / "sft", labels_path=labels_path, learning_rate=1e-3)
    logs = train(
        tmp_path / "smpo",
        labels_path=labels_path,
        pretrained_unet_model_name_or_path=tmp_path / "sft",
        max_train_steps=1,
    )
    other = train(tmp_path / "base", labels_path=labels_path, max_train_steps=1)
    assert logs["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert logs["ref_error_preferred"][0] != other["ref_error_preferred"][0]


# Data


def test_labels_are_joined_by_key_not_by_place(labels_path, tmp_path):
    labels = pq.read_table(labels_path)
    shuffled = labels.take(np.random.default_rng(0).permutation(len(labels)))
    pq.write_table(shuffled, tmp_path / "shuffled.parquet")
    pairs = load_data(str(TINY / "pairs"), None, "train", None)
    joined = join_labels(
        pairs, str(tmp_path / "shuffled.parquet"), "soft_label_0", ["image_0_uid", "image_1_uid", "ranking_id"]
    )
    np.testing.assert_array_equal(joined, labels["soft_label_0"].to_numpy().astype(np.float64))


def test_labels_of_other_data_are_refused(labels_path, tmp_path):
    labels = pq.read_table(labels_path)
    pq.write_table(labels.slice(3), tmp_path / "short.parquet")
    missing = labels["image_0_uid"][0].as_py()
    with pytest.raises(ValueError, match=f"no label for 3 of the .* row 0 of the data set, image_0_uid {missing}"):
        train(tmp_path / "out", labels_path=tmp_path / "short.parquet")
    pq.write_table(labels.drop(["image_1_uid"]), tmp_path / "keyless.parquet")
    with pytest.raises(ValueError, match="needs the columns image_0_uid, image_1_uid and soft_label_0"):
        train(tmp_path / "out", labels_path=tmp_path / "keyless.parquet")
    other = labels.set_column(6, "soft_label_0", pc.subtract(pa.scalar(1.0, pa.float32()), labels["soft_label_0"]))
    pq.write_table(pa.concat_tables([labels, other]), tmp_path / "double.parquet")
    with pytest.raises(ValueError, match="several labels for row"):
        train(tmp_path / "out", labels_path=tmp_path / "double.parquet")


def test_damaged_pairs_and_ties_are_left_out(tmp_path, caplog):
    """Null labels, 0.5 and human ties are never drawn; a pair that cannot be read gives way to the next and is counted."""
    whole = pq.read_table(TINY / "pairs" / "test.parquet").slice(0, 8)
    images = whole["jpg_0"].to_pylist()
    images[4] = images[4][:200]
    path = write_pairs(
        tmp_path / "pairs.parquet", jpg_0=images, mine=[0.9, None, 0.5 + 1e-12, 0.2, 0.7, 0.6, 0.1, 0.8],
        label_0=[1.0, 1, 1, 0.5, 1, 0, 1, 0],
    )  # fmt: skip
    with caplog.at_level("INFO"):
        logs = train(
            tmp_path / "out", dataset_name=path, label_column="mine", train_batch_size=5, max_train_steps=2,
            noising="forward",
        )  # fmt: skip
    assert "8 pairs: 1 without a label, 1 labelled 0.5 and 1 human ties are left out, 5 remain." in caplog.text
    assert logs["skipped_pairs"] == [1, 2]


@pytest.mark.parametrize(
    "columns, flags, message",
    [
        ({}, {"label_column": "soft"}, "no column for --label_column soft.*It has .*caption"),
        ({}, {"label_column": "label_0", "image_0_column": "left"}, "--image_0_column left"),
        ({"mine": [0.5] * 8}, {"label_column": "mine"}, "No pair of .* is left"),
        ({"mine": [0.1] * 6 + [1.5, 0.2]}, {"label_column": "mine"}, "row 6 has 1.5"),
        (
            {},
            {"label_column": "label_0", "train_batch_size": 50},
            "--train_batch_size 50 on 1 processes needs 50 pairs",
        ),
        (
            {},
            {"label_column": "label_0", "pretrained_model_name_or_path": "no/such"},
            "--pretrained_model_name_or_path no/such cannot be loaded",
        ),
        (
            {},
            {"label_column": "label_0", "pretrained_unet_model_name_or_path": "/no/such"},
            "--pretrained_unet_model_name_or_path /no/such cannot be loaded",
        ),
        ({}, {"label_column": "label_0", "rank": 2, "lora_layers": "to_x"}, "--lora_layers to_x: .*not found"),
        (
            {},
            {"label_column": "label_0", "num_inversion_steps": 2000},
            "num_inversion_steps must be in 1..1000, got 2000",
        ),
        pytest.param(
            {},
            {"label_column": "label_0", "mixed_precision": "fp16"},
            "--mixed_precision fp16 needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ({"jpg_0": [b"x"] * 8}, {"label_column": "label_0"}, "None of the . pairs .* can be read"),
    ],
)
def test_bad_data_is_named(columns, flags, message, tmp_path):
    path = write_pairs(tmp_path / "pairs.parquet", **columns)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "out", dataset_name=path, **flags)


@pytest.mark.parametrize(
    "flags, messages",
    [
        ({"resolution": 60}, ["--resolution must be a multiple of 8"]),
        ({"lora_alpha": 4}, ["--lora_alpha belongs to LoRA training"]),
        ({"output_kohya_format": True}, ["--output_kohya_format belongs to LoRA training"]),
        ({"noising": "ddim", "renoise_at": "last_move"}, ["--renoise_at belongs to --noising renoise"]),
        (
            {"noising": "forward", "num_inversion_steps": 9, "inversion_guidance_scale": 1.0},
            ["--num_inversion_steps has no meaning", "--inversion_guidance_scale has no meaning"],
        ),
        ({"use_8bit_adam": True, "optimizer": "adafactor"}, ["--use_8bit_adam is an AdamW"]),
        ({"lr_scheduler": "piecewise_constant"}, ["--lr_step_rules and --lr_scheduler piecewise_constant need"]),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 3}, ["has no warm-up"]),
        ({"report_to": "wandb", "push_to_hub": True, "hub_token": "x"}, ["--hub_token would be logged"]),
        (
            {"logging_dir": "/shared/logs"},
            ["--logging_dir must name a folder inside --output_dir, got '/shared/logs'"],
        ),
        ({"logging_dir": "../logs"}, ["--logging_dir must name a folder inside --output_dir"]),
        ({"logging_dir": "."}, ["--logging_dir must name a folder inside --output_dir"]),
        ({"hub_model_id": "a/b"}, ["do nothing without --push_to_hub"]),
        ({"resume_despite_changes": True}, ["--resume_despite_changes does nothing without --resume_from_checkpoint"]),
        (
            {"resume_from_checkpoint": "latest", "overwrite_output_dir": True},
            ["--overwrite_output_dir and --resume_from_checkpoint exclude each other"],
        ),
        ({"labels_path": "/no/labels.parquet"}, ["--labels_path /no/labels.parquet is not a file"]),
        ({"resume_from_checkpoint": "/no/checkpoint-3"}, ["is not an existing folder named checkpoint-STEP"]),
        (
            {
                "train_batch_size": 0,
                "beta_dpo": -1,
                "proportion_empty_prompts": 2,
                "seed": -1,
                "adam_beta1": 1.0,
                "learning_rate": "nan",
                "gamma": "inf",
                "inversion_guidance_scale": "nan",
                "max_bad_fraction": 1.5,
                "max_nonfinite_steps": 0,
            },
            [
                "--train_batch_size must be positive and finite, got 0",
                "--beta_dpo must be positive and finite, got -1",
                "--proportion_empty_prompts must be in [0, 1], got 2",
                "--seed must not be negative, got -1",
                "--adam_beta1 must be in [0, 1), got 1.0",
                "--learning_rate must be positive and finite, got nan",
                "--gamma must be positive and finite, got inf",
                "--inversion_guidance_scale must be finite, got nan",
                "--max_bad_fraction must be in [0, 1], got 1.5",
                "--max_nonfinite_steps must be positive",
            ],
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_flags_are_all_named_at_once(flags, messages, tmp_path):
    base = {"pretrained_model_name_or_path": "none", "dataset_name": "none", "output_dir": tmp_path}
    with pytest.raises(ValueError) as error:
        parse_args(command_line(**{**base, **flags}))
    assert [message for message in messages if message not in str(error.value)] == []


def test_sampler_deals_every_pair_once_an_epoch_and_goes_on_where_it_stopped():
    def take(process, start, count):
        batches = iter(PairSampler(11, 2, 2, process, seed=3, start=start))
        return [next(batches) for _ in range(count)]

    first, second = take(0, 0, 6), take(1, 0, 6)
    for epoch in range(3):
        keys = [key for batches in (first, second) for batch in batches[2 * epoch : 2 * epoch + 2] for key in batch]
        assert {key[0] for key in keys} == {epoch} and len({key[1] for key in keys}) == 8
    assert take(1, 3, 3) == second[3:]


def test_the_images_of_a_pair_share_crop_and_mirror_and_keep_their_shape():
    """A mark in the picture lies at the same place of the cut at either size; nothing is squashed."""

    def picture(width, height):
        image = Image.new("RGB", (width, height), "black")
        box = [int(width * 0.5), int(height * 0.25), int(width * 0.75), int(height * 0.5)]
        image.paste("white", box)
        return image

    (small, small_at), (large, large_at) = (
        cut_square(picture(w, h), 64, (0.5, 1.0), True, "bilinear") for w, h in ((96, 64), (384, 256))
    )
    assert small_at == large_at == (0, 0)  # the right edge, at the left of the mirrored picture
    assert small.shape == (3, 64, 64) and small.dtype == torch.uint8 and (small.min(), small.max()) == (0, 255)
    assert (small.float() - large).abs().mean() < 4
    # the right cut of the wide picture shows columns 32..96 of 96: the mark at 48..72 is at 16..40, mirrored at 24..48
    bright = (large[0] > 127).any(dim=0).nonzero()[:, 0]
    assert abs(int(bright[0]) - 24) <= 1 and abs(int(bright[-1]) - 47) <= 1


def test_loss_of_the_batch_is_the_mean_over_micro_batches():
    errors = torch.rand(8, generator=torch.Generator().manual_seed(0))
    p_0 = torch.tensor([0.2, 0.9, 0.6, 0.4])
    whole = smpo_loss(errors, errors.flip(0), p_0, 20, 3)[0]
    parts = [smpo_loss(errors[[i, i + 4]], errors.flip(0)[[i, i + 4]], p_0[i : i + 1], 20, 3)[0] for i in range(4)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_encoded_pictures_are_read_back(tmp_path):
    """8-bit levels survive cut_square at the native size."""
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    pixels, _ = cut_square(Image.open(io.BytesIO(buffer.getvalue())), 64, (0.5, 0.5), False, "bilinear")
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), np.array(noise))


def test_both_images_of_a_pair_are_cut_and_mirrored_alike(tmp_path):
    """With the same picture on both sides the two tensors are equal, in every epoch; half of the pairs are mirrored."""
    table = pq.read_table(TINY / "pairs" / "test.parquet")
    pictures = []
    for i, jpg in enumerate(table["jpg_0"].to_pylist()):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(jpg)).resize((64 + 8 * (i % 3), 64)).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    for column in ("jpg_0", "jpg_1"):
        table = table.set_column(table.schema.get_field_index(column), column, pa.array(pictures))
    pq.write_table(table, tmp_path / "pairs.parquet")
    PartialState()  # the logger asks it which process this is

    def load(**flags):
        args = parse_args(
            train_flags(tmp_path / "out", dataset_name=tmp_path / "pairs.parquet", label_column="label_0", **flags)
        )
        pairs = load_data(args.dataset_name, None, "train", None)
        rows, labels = select_pairs(pairs, args.labels_path, args)
        dataset = PairDataset(pairs, rows, labels, 1000, args)
        return [dataset[epoch, i] for epoch in range(3) for i in range(len(dataset))]

    mirrored = 0
    flipped, straight = load(random_crop=True, no_hflip=None), load(random_crop=True)
    for one, other in zip(flipped, straight):
        assert torch.equal(one["pixel_values"][0], one["pixel_values"][1])
        assert one["timestep"] == other["timestep"] and one["seeds"] == other["seeds"]
        mirrored += not torch.equal(one["pixel_values"][0], other["pixel_values"][0])
    assert 0.35 < mirrored / len(flipped) < 0.65
    pairs = len(straight) // 3
    moved = [
        not torch.equal(a["pixel_values"][0], b["pixel_values"][0]) for a, b in zip(straight[:pairs], straight[pairs:])
    ]
    assert 0.4 < sum(moved) / pairs < 0.8  # a third of the pictures are square and have only one cut
    assert len({example["timestep"] for example in straight}) > 0.8 * len(straight)
