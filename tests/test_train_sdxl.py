"""train_smpo_sdxl.py on a small SDXL of random weights, and what both training scripts refuse or convert.

What the two scripts share to the letter is tested on SD1.5 in test_train.py.
"""

import io
import json
import math
import re
import shutil
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from conftest import TINY, names_in, train, train_flags, train_sdxl, unet_weights
from PIL import Image
from random_models import make_unet
from safetensors.torch import load_file

import train_smpo_sd15
import train_smpo_sdxl
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)


PROMPT = "a large red circle"


def change_json(path, **values):
    """Puts values into a JSON file; None takes one out."""
    changed = {**json.loads(path.read_text()), **values}
    path.write_text(
        json.dumps({key: value for key, value in changed.items() if key not in values or value is not None})
    )


def draw(pipeline, **inputs):
    """One picture in two steps, as an array."""
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        PROMPT, num_inference_steps=2, height=64, width=64, generator=torch.Generator().manual_seed(0), **inputs
    ).images[0]
    return np.asarray(image)


def draw_with_controlnet(folder, unet=None, lora=None):
    """A picture of the ControlNet pipeline on `folder`, steered by a ControlNet of random weights made for its UNet."""
    parts = {} if unet is None else {"unet": unet}
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32, **parts)
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    for block in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight, std=0.1)
    pipeline = StableDiffusionXLControlNetPipeline(**pipeline.components, controlnet=controlnet)
    if lora is not None:
        pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    canny = Image.effect_noise((64, 64), 100).convert("RGB")
    return draw(pipeline, image=canny)


# What a run writes, and who can read it


def test_full_fine_tuning(tmp_path, sdxl, labels_path):
    logs = train_sdxl(
        tmp_path, sdxl, labels_path=labels_path, validation_prompts=[PROMPT], num_validation_images=1,
        validation_steps=2, validation_inference_steps=2, checkpointing_steps=2, gradient_checkpointing=True,
    )  # fmt: skip
    assert logs["loss"][0] == pytest.approx(math.log(2), abs=1e-6) and logs["loss"][1] != logs["loss"][0]
    assert names_in(tmp_path) == {
        "README.md", "checkpoint-2", "logs", "model_index.json", "scheduler", "text_encoder", "text_encoder_2",
        "tokenizer", "tokenizer_2", "training_args.json", "unet", "vae", "validation",
    }  # fmt: skip
    before, after = unet_weights(sdxl), unet_weights(tmp_path)
    assert not [name for name in before if torch.equal(before[name], after[name])]  # every parameter has moved
    assert Image.open(tmp_path / "validation" / "step-2.png").width == 2 * 192

    card = (tmp_path / "README.md").read_text()
    assert "StableDiffusionXLPipeline" in card and "openrail++" in card and "stable-diffusion-xl" in card
    args = json.loads((tmp_path / "training_args.json").read_text())["args"]
    assert (args["beta_dpo"], args["optimizer"], args["gamma"]) == (5000, "adafactor", 10)

    base, tuned = (StableDiffusionXLPipeline.from_pretrained(f, torch_dtype=torch.float32) for f in (sdxl, tmp_path))
    assert (draw(base) != draw(tuned)).any()
    assert (draw_with_controlnet(sdxl) != draw_with_controlnet(tmp_path)).any()
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "checkpoint-2", subfolder="unet", torch_dtype=torch.float32)
    np.testing.assert_array_equal(draw_with_controlnet(sdxl, unet=unet), draw_with_controlnet(tmp_path))

    # The published SDXL UNet has just these parameters, in its own widths.
    with torch.device("meta"):
        real, small = make_unet("sdxl"), make_unet("tiny-sdxl")
    assert sum(parameter.numel() for parameter in real.parameters()) == 2_567_463_684
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == real.state_dict().keys()
    assert {name: value.shape for name, value in saved.items()} == {n: v.shape for n, v in small.state_dict().items()}
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    widths = {key: real.config[key] for key in real.config if key[0] != "_" and real.config[key] != small.config[key]}
    assert set(widths) == {
        "block_out_channels", "attention_head_dim", "cross_attention_dim", "addition_time_embed_dim", "sample_size",
        "projection_class_embeddings_input_dim", "norm_num_groups",
    }  # fmt: skip
    with torch.device("meta"):
        widened = UNet2DConditionModel.from_config({**config, **widths})
    assert {n: v.shape for n, v in widened.state_dict().items()} == {n: v.shape for n, v in real.state_dict().items()}


def test_lora(tmp_path, sdxl, labels_path):
    """The saved LoRA, loaded by diffusers, is the policy; on the published UNet it has the same names, 1,120 of them."""
    train_sdxl(
        tmp_path, sdxl, labels_path=labels_path, rank=4, lora_alpha=8, learning_rate=1e-2, optimizer="adamw",
        checkpointing_steps=2, mixed_precision="bf16", gradient_checkpointing=True, offload=True,
        validation_prompts=[PROMPT], num_validation_images=1, validation_inference_steps=1,
    )  # fmt: skip
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(value.any() and value.dtype == torch.float32 for value in weights.values())
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl, torch_dtype=torch.float32)
    stem = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    base, base_picture = pipeline.unet.get_submodule(stem.removeprefix("unet.")).weight.clone(), draw(pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    pipeline.fuse_lora()
    update = 8 / 4 * weights[f"{stem}.lora.up.weight"] @ weights[f"{stem}.lora.down.weight"]
    torch.testing.assert_close(pipeline.unet.get_submodule(stem.removeprefix("unet.")).weight, base + update)
    assert (draw(pipeline) != base_picture).any()
    assert (draw_with_controlnet(sdxl, lora=tmp_path) != draw_with_controlnet(sdxl)).any()

    with torch.device("meta"):
        real = make_unet("sdxl")
    args = train_smpo_sdxl.parse_args(train_flags(tmp_path / "other", rank=4))
    train_smpo_sdxl.add_lora(real, args)
    layers = train_smpo_sdxl.convert_state_dict_to_diffusers(train_smpo_sdxl.get_peft_model_state_dict(real))
    assert len(layers) == 2 * 4 * 2 * 70 and {f"unet.{name}" for name in layers} == weights.keys()
    for name, value in layers.items():
        layer = real.get_submodule(name.rsplit(".lora", 1)[0])
        assert tuple(value.shape) == ((4, layer.in_features) if ".lora.down." in name else (layer.out_features, 4))


@pytest.mark.parametrize("script", [train_smpo_sd15, train_smpo_sdxl], ids=["sd15", "sdxl"])
def test_kohya_format_is_the_same_lora(script, tmp_path, sdxl):
    """Key by key against the diffusers file, and loaded by diffusers it changes the UNet alike; alpha is not the rank."""
    base = sdxl if script is train_smpo_sdxl else TINY / "sd15"
    train(
        tmp_path, script, pretrained_model_name_or_path=base, label_column="label_0", rank=4, lora_alpha=6,
        learning_rate=1e-2, optimizer="adamw", noising="forward", output_kohya_format=True,
    )  # fmt: skip
    weights, kohya = (load_file(tmp_path / name) for name in (script.LORA_FILE, script.KOHYA_LORA_FILE))
    expected = {}
    for name, value in weights.items():
        layer, kind = re.fullmatch(r"unet\.(.*)\.lora\.(up|down)\.weight", name).groups()
        layer = "lora_unet_" + layer.replace(".", "_")
        expected.update({f"{layer}.lora_{kind}.weight": value, f"{layer}.alpha": torch.tensor(6.0)})
    assert kohya.keys() == expected.keys()
    assert all(torch.equal(kohya[name], expected[name]) for name in expected)
    fused = []
    for name in (script.LORA_FILE, script.KOHYA_LORA_FILE):
        pipeline = script.PIPELINE.from_pretrained(base, torch_dtype=torch.float32)
        pipeline.load_lora_weights(tmp_path, weight_name=name)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        fused.append(pipeline.unet.state_dict())
    assert fused[0].keys() == fused[1].keys()
    for name in fused[0]:
        torch.testing.assert_close(fused[0][name], fused[1][name])


@pytest.mark.parametrize("flags", [{}, {"rank": 2}], ids=["full", "lora"])
def test_a_resumed_run_ends_bit_for_bit_as_the_whole_one(flags, tmp_path, sdxl, labels_path):
    flags = {"labels_path": labels_path, "checkpointing_steps": 1, "train_batch_size": 1, **flags}
    train_sdxl(tmp_path / "whole", sdxl, **flags)
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    train_sdxl(tmp_path / "resumed", sdxl, resume_from_checkpoint="latest", **flags)
    name = "pytorch_lora_weights.safetensors" if "rank" in flags else "unet/diffusion_pytorch_model.safetensors"
    whole, resumed = (load_file(tmp_path / run / name) for run in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "lora"])
def test_offload_changes_nothing(rank, tmp_path, sdxl):
    flags = {"label_column": "label_0", "rank": rank, "train_batch_size": 1, "inversion_guidance_scale": 2.0}
    plain = train_sdxl(tmp_path / "plain", sdxl, **flags)
    offloaded = train_sdxl(tmp_path / "offloaded", sdxl, offload=True, **flags)
    assert plain["loss"] == offloaded["loss"] and plain["grad_norm"] == offloaded["grad_norm"]


# What SDXL is told


def test_prompts_are_encoded_as_the_pipeline_does(tmp_path, sdxl):
    args = train_smpo_sdxl.parse_args(train_flags(tmp_path / "out", pretrained_model_name_or_path=sdxl))
    models = train_smpo_sdxl.load_models(args, torch.device("cpu"), torch.float32)
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl, torch_dtype=torch.float32)
    captions = [PROMPT, "", "a blue square " * 60]
    cond = train_smpo_sdxl.encode_prompts(captions, models)
    with torch.no_grad():
        states, uncond_states, pooled, uncond_pooled = pipeline.encode_prompt(captions, device="cpu")
    torch.testing.assert_close(cond["encoder_hidden_states"], states)
    torch.testing.assert_close(cond["text_embeds"], pooled)
    assert torch.equal(models["uncond"]["encoder_hidden_states"], uncond_states[:1])
    assert torch.equal(models["uncond"]["text_embeds"], uncond_pooled[:1]) and not uncond_pooled.any()

    # A pipeline that says otherwise encodes an empty prompt.
    other = shutil.copytree(sdxl, tmp_path / "other")
    change_json(other / "model_index.json", force_zeros_for_empty_prompt=False)
    args = train_smpo_sdxl.parse_args(train_flags(tmp_path / "out", pretrained_model_name_or_path=other))
    uncond = train_smpo_sdxl.load_models(args, torch.device("cpu"), torch.float32)["uncond"]
    torch.testing.assert_close(uncond["encoder_hidden_states"], states[1:2])
    torch.testing.assert_close(uncond["text_embeds"], pooled[1:2])


def test_time_ids_are_each_image_s_own_size_and_crop(tmp_path, sdxl):
    """Two images of unlike sizes, cut and mirrored alike: each cut is found again where its time_ids say."""
    table = pq.read_table(TINY / "pairs" / "test.parquet").slice(0, 12)
    sizes = [(96, 64), (64, 160)]
    originals = []
    for column, size in zip(("jpg_0", "jpg_1"), sizes):
        picture = Image.effect_noise(size, 90).convert("RGB")
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        originals.append(np.asarray(picture))
        table = table.set_column(
            table.schema.get_field_index(column), column, pa.array([buffer.getvalue()] * len(table))
        )
    pq.write_table(table, tmp_path / "pairs.parquet")
    PartialState()  # the logger asks it which process this is

    args = train_smpo_sdxl.parse_args(
        train_flags(
            tmp_path / "out", pretrained_model_name_or_path=sdxl, dataset_name=tmp_path / "pairs.parquet",
            label_column="label_0", human_label_column="none", random_crop=True, no_hflip=None,
        )
    )  # fmt: skip
    pairs = train_smpo_sdxl.load_data(args.dataset_name, None, "train", None)
    rows, labels = train_smpo_sdxl.select_pairs(pairs, args.labels_path, args)
    dataset = train_smpo_sdxl.PairDataset(pairs, rows, labels, 1000, args)
    examples = [dataset[epoch, i] for epoch in range(3) for i in range(len(dataset))]
    batch = train_smpo_sdxl.collate_pairs(examples)
    time_ids, pixels = batch["image_cond"]["time_ids"].int(), batch["pixel_values"]
    assert time_ids.shape == (2 * len(examples), 6) and len(pixels) == len(time_ids)
    mirrored, corners = 0, set()
    for i, (height, width, top, left, *target) in enumerate(time_ids.tolist()):
        original = originals[i // len(examples)]
        assert (width, height) == sizes[i // len(examples)] and target == [64, 64]
        cut = pixels[i].permute(1, 2, 0).numpy()
        straight, flipped = (picture[top : top + 64, left : left + 64] for picture in (original, original[:, ::-1]))
        assert (cut == straight).all() or (cut == flipped).all()
        mirrored += (cut == flipped).all()
        corners.add((top, left))
    assert 0.3 < mirrored / len(time_ids) < 0.7 and len(corners) > len(examples) / 2

    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl, torch_dtype=torch.float32)
    theirs = pipeline._get_add_time_ids((480, 640), (3, 5), (64, 64), torch.float32, text_encoder_projection_dim=24)
    ours = train_smpo_sdxl.image_conditions((640, 480), (3, 5), 64)["time_ids"]
    torch.testing.assert_close(ours[None], theirs)


def test_the_unet_hears_every_condition(tmp_path, sdxl):
    args = train_smpo_sdxl.parse_args(train_flags(tmp_path / "out", pretrained_model_name_or_path=sdxl))
    models = train_smpo_sdxl.load_models(args, torch.device("cpu"), torch.float32)
    cond = train_smpo_sdxl.encode_prompts([PROMPT], models)
    cond.update({k: v[None] for k, v in train_smpo_sdxl.image_conditions((640, 480), (3, 5), 64).items()})
    x_t, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.no_grad():
        eps = train_smpo_sdxl.predict_noise(models["unet"], x_t, t, cond)
        for key, value in cond.items():
            other = train_smpo_sdxl.predict_noise(models["unet"], x_t, t, {**cond, key: value + 1})
            assert not torch.equal(eps, other), key


# The VAE


def test_the_vae_runs_in_half_precision_only_if_it_can(tmp_path, sdxl):
    fixed = AutoencoderKL.from_pretrained(sdxl, subfolder="vae")
    fixed.register_to_config(force_upcast=False)
    fixed.save_pretrained(tmp_path / "vae")

    def dtypes(**flags):
        args = train_smpo_sdxl.parse_args(
            train_flags(tmp_path / "out", pretrained_model_name_or_path=sdxl, rank=2, **flags)
        )
        models = train_smpo_sdxl.load_models(args, torch.device("cpu"), torch.bfloat16)
        assert {models[part].dtype for part in ("unet", "text_encoder", "text_encoder_2")} == {torch.bfloat16}
        return models["vae"].dtype

    assert dtypes() == torch.float32
    assert dtypes(pretrained_vae_model_name_or_path=sdxl) == torch.float32  # a pipeline's
    assert dtypes(pretrained_vae_model_name_or_path=tmp_path / "vae") == torch.bfloat16  # a folder of its own


def test_another_vae_is_trained_with_and_saved(tmp_path, sdxl):
    vae = AutoencoderKL.from_pretrained(sdxl, subfolder="vae")
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= 1.5
    vae.save_pretrained(tmp_path / "vae")
    flags = {"label_column": "label_0", "max_train_steps": 1, "pretrained_vae_model_name_or_path": tmp_path / "vae"}
    logs = train_sdxl(tmp_path / "out", sdxl, **flags)
    other = train_sdxl(tmp_path / "other", sdxl, **{**flags, "pretrained_vae_model_name_or_path": None})
    assert logs["ref_error_preferred"] != other["ref_error_preferred"]
    saved = AutoencoderKL.from_pretrained(tmp_path / "out", subfolder="vae")
    assert torch.equal(saved.quant_conv.weight, vae.quant_conv.weight)


def test_validation_decodes_in_the_vae_s_own_precision(tmp_path, sdxl, monkeypatch):
    """Under autocast a VAE in fp32 would run in half precision, where SDXL's own overflows."""
    seen = []

    def load_models(args, device, weight_dtype):
        models = original(args, device, weight_dtype)
        models["vae"].decoder.conv_out.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
        return models

    original = train_smpo_sdxl.load_models
    monkeypatch.setattr(train_smpo_sdxl, "load_models", load_models)
    train_sdxl(
        tmp_path, sdxl, label_column="label_0", rank=2, max_train_steps=1, mixed_precision="bf16",
        validation_prompts=[PROMPT], num_validation_images=2, validation_inference_steps=1,
    )  # fmt: skip
    assert seen == [torch.float32] * 4  # two images of the base, two of the policy


# Schedules and kinds of model


@pytest.mark.parametrize(
    "scheduler, flags",
    [
        (
            EulerAncestralDiscreteScheduler(  # SDXL-Turbo's
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
            ),
            {"validation_guidance_scale": 0.0, "validation_inference_steps": 1},
        ),
        (
            EulerDiscreteScheduler(  # of v-prediction models that end in pure noise
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
                prediction_type="v_prediction", rescale_betas_zero_snr=True,
            ),
            {"validation_inference_steps": 2},
        ),
    ],
    ids=["turbo", "v-prediction, zero terminal SNR"],
)  # fmt: skip
def test_other_schedules(scheduler, flags, tmp_path, sdxl):
    base = shutil.copytree(sdxl, tmp_path / "base")
    scheduler.save_pretrained(base / "scheduler")
    logs = train_sdxl(
        tmp_path / "out", base, label_column="label_0", rank=2, validation_prompts=[PROMPT], num_validation_images=1,
        train_batch_size=8, max_train_steps=2, **flags,
    )  # fmt: skip
    assert logs["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert all(np.isfinite(values).all() for values in logs.values())
    record = json.loads((tmp_path / "out" / "training_args.json").read_text())["args"]
    assert record["prediction_type"] == scheduler.config.prediction_type
    alpha_bar = train_smpo_sdxl.load_noise_schedule(
        train_smpo_sdxl.parse_args(train_flags(tmp_path / "x", pretrained_model_name_or_path=base))
    )
    assert (alpha_bar[-1] < 1e-6) == bool(scheduler.config.get("rescale_betas_zero_snr"))


@pytest.mark.parametrize(
    "script, path, values, message",
    [
        ("sdxl", "model_index.json", {"text_encoder": [None, None], "tokenizer": [None, None]}, "no tokenizer and no text_encoder.*not its refiner"),
        ("sdxl", "unet/config.json", {"time_cond_proj_dim": 256}, "takes the guidance scale as an input"),
        ("sdxl", "unet/config.json", {"in_channels": 9}, "takes 9 channels and the VAE has 4.*inpainting"),
        ("sdxl", "unet/config.json", {"_class_name": "UNet3DConditionModel"}, "its unet is a UNet3DConditionModel"),
        ("sdxl", "scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "its scheduler is a EDMEulerScheduler.*noise schedule of betas"),
        ("sdxl", "scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type sample; epsilon and v_prediction are"),
        ("sd15", "unet/config.json", {"in_channels": 8}, "takes 8 channels and the VAE has 4"),
        ("sd15", "unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type text_time.*for SDXL there is train_smpo_sdxl.py"),
        ("sd15", "scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler", "beta_schedule": None}, "its scheduler is a FlowMatch"),
        ("sd15", "scheduler/scheduler_config.json", {"num_train_timesteps": 2}, "num_inversion_steps must be in 1..2, got 3"),
    ],
)  # fmt: skip
def test_models_it_is_not_made_for_are_refused_before_weights_are_loaded(
    script, path, values, message, tmp_path, sdxl
):
    script, base = {"sdxl": (train_smpo_sdxl, sdxl), "sd15": (train_smpo_sd15, TINY / "sd15")}[script]
    folder = shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    change_json(folder / path, **values)
    with pytest.raises(ValueError, match=re.compile(message, re.S)):
        train(tmp_path / "out", script, pretrained_model_name_or_path=folder, label_column="label_0")


def test_each_script_sends_the_other_s_models_there(tmp_path, sdxl):
    with pytest.raises(
        ValueError, match="(?s)no tokenizer_2 and no text_encoder_2.*for SD1.5 there is train_smpo_sd15.py"
    ):
        train_sdxl(tmp_path, TINY / "sd15")
    with pytest.raises(ValueError, match="(?s)addition_embed_type text_time.*for SDXL there is train_smpo_sdxl.py"):
        train(tmp_path, pretrained_model_name_or_path=sdxl)


class AsVelocity(torch.nn.Module):
    """A UNet whose output is the v that stands for another's noise: `v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0`."""

    def __init__(self, unet, alpha_bar):
        super().__init__()
        self.unet, self.alpha_bar = unet, alpha_bar

    def forward(self, x_t, t, **conditions):
        eps = self.unet(x_t, t, **conditions).sample
        alpha_bar_t = self.alpha_bar[t].view(-1, 1, 1, 1)
        x_0 = (x_t - (1 - alpha_bar_t).sqrt() * eps) / alpha_bar_t.sqrt()
        output = type("Output", (), {})()
        output.sample = alpha_bar_t.sqrt() * eps - (1 - alpha_bar_t).sqrt() * x_0
        return output


@pytest.mark.parametrize("noising", ["renoise", "forward"])
@pytest.mark.parametrize("script", [train_smpo_sd15, train_smpo_sdxl], ids=["sd15", "sdxl"])
def test_v_prediction_gives_the_loss_and_gradient_of_its_noise(script, noising, tmp_path, sdxl, labels_path):
    """A policy unlike the reference: loss, errors and gradient of an exact v are those of the noise itself."""
    PartialState()
    args = script.parse_args(
        train_flags(
            tmp_path, labels_path=labels_path, noising=noising, train_batch_size=4,
            pretrained_model_name_or_path=sdxl if script is train_smpo_sdxl else TINY / "sd15",
        )
    )  # fmt: skip
    models = script.load_models(args, torch.device("cpu"), torch.float32)
    alpha_bar = script.load_noise_schedule(args)
    assert args.prediction_type == "epsilon"
    ref_unet = script.load_reference(args, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for parameter in models["unet"].parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter.add_(0.01 * parameter.std(correction=0) * noise)
    pairs = script.load_data(args.dataset_name, None, "train", None)
    dataset = script.PairDataset(pairs, *script.select_pairs(pairs, args.labels_path, args), len(alpha_bar), args)
    batch = script.collate_pairs([dataset[0, i] for i in range(4)])
    results = {}
    for kind in ("epsilon", "v_prediction"):
        args.prediction_type = kind
        unets = {"unet": models["unet"], "ref_unet": ref_unet}
        if kind == "v_prediction":
            unets = {name: AsVelocity(unet, alpha_bar) for name, unet in unets.items()}
        (micro_batch,) = script.prepare_micro_batches(batch, {**models, **unets}, alpha_bar, nullcontext, args)
        loss, metrics = script.training_step(micro_batch, unets["unet"], alpha_bar, nullcontext, args)
        models["unet"].zero_grad()
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in models["unet"].parameters()])
        results[kind] = loss.detach(), metrics, gradient
    (loss, metrics, gradient), (v_loss, v_metrics, v_gradient) = results.values()
    assert abs(float(loss) - math.log(2)) > 1e-3
    torch.testing.assert_close(v_loss, loss, rtol=1e-3, atol=1e-4)
    for name in ("model_error_preferred", "ref_error_rejected", "std_tau"):
        torch.testing.assert_close(v_metrics[name], metrics[name], rtol=1e-4, atol=1e-5)
    assert torch.nn.functional.cosine_similarity(v_gradient, gradient, dim=0) > 0.999
