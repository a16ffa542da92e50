"""train_smpo_sdxl.py on a small SDXL of random weights, and what both training scripts refuse or convert.

What the two scripts share to the letter is tested on SD1.5 in test_train.py.
"""

import json
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from conftest import TINY, names_in, process_restored, same_weights, train, train_flags, train_sdxl, unet_weights
from PIL import Image
from random_models import make_unet
from safetensors.torch import load_file
from test_speed import FLOAT64_RTOL, in_float64, make_run, pop_gradient

import diffusers
import train_smpo_sd15
import train_smpo_sdxl
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel


PROMPT = "a large red circle"
FULL = {
    "learning_rate": 1e-4, "train_batch_size": 1, "gradient_accumulation_steps": 2, "checkpointing_steps": 1,
    "gradient_checkpointing": True,
}  # fmt: skip
LORA = {**FULL, "learning_rate": 1e-2, "optimizer": "adamw", "rank": 4, "lora_alpha": 8, "mixed_precision": "bf16"}
VALIDATION = {"validation_prompts": [PROMPT], "num_validation_images": 1, "validation_inference_steps": 1}


@pytest.fixture(scope="module")
def full_run(tmp_path_factory, sdxl, labels_path):
    """Folder and logs of a full fine-tuning."""
    folder = tmp_path_factory.mktemp("full")
    with process_restored():
        return folder, train_sdxl(folder, sdxl, labels_path=labels_path, **FULL, **VALIDATION)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, sdxl, labels_path):
    """Folder and logs of a LoRA training in bf16 with offloading, and the dtypes in which its VAE decoded."""
    folder, dtypes = tmp_path_factory.mktemp("lora"), []

    def load_models(*args):
        models = original(*args)
        models["vae"].decoder.conv_out.register_forward_hook(lambda layer, inputs, output: dtypes.append(output.dtype))
        return models

    original = train_smpo_sdxl.load_models
    with process_restored(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_smpo_sdxl, "load_models", load_models)
        logs = train_sdxl(folder, sdxl, labels_path=labels_path, offload=True, **LORA, **VALIDATION)
    return folder, logs, dtypes


def load_part(part, sdxl, dtype=torch.float32, **flags):
    """Models that the script loads for SDXL, and one `part` of them."""
    args = train_smpo_sdxl.parse_args(train_flags("unused", pretrained_model_name_or_path=sdxl, **flags))
    models = train_smpo_sdxl.load_models(args, torch.device("cpu"), dtype)
    return models[part], models


def change_json(path, **values):
    """Puts values into a JSON file; None takes one out."""
    values = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


# What a run writes, and who can read it


def test_full_fine_tuning(full_run, sdxl):
    folder, logs = full_run
    # Policy and reference see each of the step's two micro-batches in its own shape: what is left is logsigmoid(0).
    assert logs["loss"][0] == pytest.approx(math.log(2), abs=1e-6) and logs["loss"][1] != logs["loss"][0]
    assert names_in(folder) == {
        "README.md", "checkpoint-1", "checkpoint-2", "logs", "model_index.json", "scheduler", "text_encoder",
        "text_encoder_2", "tokenizer", "tokenizer_2", "training_args.json", "unet", "vae", "validation",
    }  # fmt: skip
    before, after, saved = unet_weights(sdxl), unet_weights(folder), unet_weights(folder / "checkpoint-2")
    assert not [name for name in before if torch.equal(before[name], after[name])]  # every parameter has moved
    assert all(torch.equal(saved[name], after[name]) for name in after)
    assert Image.open(folder / "validation" / "step-2.png").width == 2 * train_smpo_sdxl.THUMBNAIL
    base, tuned = (
        StableDiffusionXLPipeline.from_pretrained(path, torch_dtype=torch.float32)(
            PROMPT, num_inference_steps=1, height=64, width=64, generator=torch.Generator().manual_seed(0)
        ).images[0]
        for path in (sdxl, folder)
    )
    assert tuned.size == (64, 64) and tuned.tobytes() != base.tobytes()

    card = (folder / "README.md").read_text()
    assert "StableDiffusionXLPipeline" in card and "openrail++" in card and "stable-diffusion-xl" in card
    args = json.loads((folder / "training_args.json").read_text())["args"]
    assert (args["beta_dpo"], args["optimizer"], args["gamma"]) == (5000, "adafactor", 10)


def test_the_saved_unet_is_the_published_one_but_for_widths_and_depths(full_run):
    with torch.device("meta"):
        real, small = make_unet("sdxl"), make_unet("tiny-sdxl")
    assert sum(parameter.numel() for parameter in real.parameters()) == 2_567_463_684
    saved = unet_weights(full_run[0])
    assert saved.keys() < real.state_dict().keys()
    assert {name: value.shape for name, value in saved.items()} == {n: v.shape for n, v in small.state_dict().items()}
    config = json.loads((full_run[0] / "unet" / "config.json").read_text())
    widths = {key: real.config[key] for key in real.config if key[0] != "_" and real.config[key] != small.config[key]}
    assert set(widths) == {
        "block_out_channels", "attention_head_dim", "cross_attention_dim", "addition_time_embed_dim", "sample_size",
        "projection_class_embeddings_input_dim", "norm_num_groups", "transformer_layers_per_block",
    }  # fmt: skip
    with torch.device("meta"):
        widened = UNet2DConditionModel.from_config({**config, **widths})
    assert {n: v.shape for n, v in widened.state_dict().items()} == {n: v.shape for n, v in real.state_dict().items()}


def test_lora(lora_run, sdxl, tmp_path):
    """The saved LoRA, loaded by diffusers, is the policy; on the published UNet it has 1,120 of the same names."""
    folder, logs, _ = lora_run
    assert logs["loss"][0] == pytest.approx(math.log(2), abs=1e-6) and logs["loss"][1] != logs["loss"][0]
    weights = load_file(folder / train_smpo_sdxl.LORA_FILE)
    assert all(value.any() and value.dtype == torch.float32 for value in weights.values())
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    update = 8 / 4 * weights[f"unet.{layer}.lora.up.weight"] @ weights[f"unet.{layer}.lora.down.weight"]
    fused = fused_unet(train_smpo_sdxl, sdxl, folder, train_smpo_sdxl.LORA_FILE)[f"{layer}.weight"]
    torch.testing.assert_close(fused, unet_weights(sdxl)[f"{layer}.weight"] + update)

    with torch.device("meta"):
        real = make_unet("sdxl")
    args = train_smpo_sdxl.parse_args(train_flags(tmp_path / "other", rank=4))
    train_smpo_sdxl.set_up_unets(PartialState(), {"unet": real}, torch.float32, args)
    layers = diffusers.utils.convert_state_dict_to_diffusers(train_smpo_sdxl.get_peft_model_state_dict(real))
    assert len(layers) == 2 * 4 * 2 * 70 and {f"unet.{name}" for name in layers} > weights.keys()
    for name, value in layers.items():
        layer = real.get_submodule(name.rsplit(".lora", 1)[0])
        assert tuple(value.shape) == ((4, layer.in_features) if ".lora.down." in name else (layer.out_features, 4))


def fused_unet(script, base, folder, name):
    """Weights of the base model's UNet with a LoRA file merged into them by diffusers."""
    pipeline = script.PIPELINE.from_pretrained(base, torch_dtype=torch.float32)
    pipeline.load_lora_weights(folder, weight_name=name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline.unet.state_dict()


def test_kohya_format_is_the_same_lora(lora_run, sdxl):
    """Key by key against the diffusers file, and it changes the UNet alike; alpha is not the rank."""
    script, folder = train_smpo_sdxl, lora_run[0]
    weights, kohya = (load_file(folder / name) for name in (script.LORA_FILE, script.KOHYA_LORA_FILE))
    expected = {}
    for name, value in weights.items():
        layer, kind = re.fullmatch(r"unet\.(.*)\.lora\.(up|down)\.weight", name).groups()
        layer = "lora_unet_" + layer.replace(".", "_")
        expected.update({f"{layer}.lora_{kind}.weight": value, f"{layer}.alpha": torch.tensor(8.0)})
    assert kohya.keys() == expected.keys()
    assert all(torch.equal(kohya[name], expected[name]) for name in expected)
    ours, theirs = (fused_unet(script, sdxl, folder, name) for name in (script.LORA_FILE, script.KOHYA_LORA_FILE))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resumed_with_other_offloading_it_ends_bit_for_bit_as_the_whole(kind, tmp_path, sdxl, labels_path, request):
    folder, logs, *_ = request.getfixturevalue(f"{kind}_run")
    shutil.copytree(folder / "checkpoint-1", tmp_path / "checkpoint-1")
    flags = {**LORA, "offload": None} if kind == "lora" else {**FULL, "offload": True}
    resumed = train_sdxl(tmp_path, sdxl, labels_path=labels_path, resume_from_checkpoint="latest", **flags)
    assert resumed["loss"] == logs["loss"][1:] and resumed["grad_norm"] == logs["grad_norm"][1:]
    name = train_smpo_sdxl.LORA_FILE if kind == "lora" else "unet/diffusion_pytorch_model.safetensors"
    assert same_weights(folder / name, tmp_path / name)


# What SDXL is told


def test_prompts_are_encoded_as_the_pipeline_does(sdxl):
    """By the same calls, so to the same numbers."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl, torch_dtype=torch.float32)
    captions = [PROMPT, "", "a blue square " * 60]
    cond = train_smpo_sdxl.encode_prompts(captions, load_part("unet", sdxl)[1])
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(captions, device="cpu")
    torch.testing.assert_close(cond["encoder_hidden_states"], states)
    torch.testing.assert_close(cond["text_embeds"], pooled)


def test_the_unet_hears_every_condition(sdxl):
    """Texts, and time_ids that say: an image of this size, uncut, as the pipeline does when it draws."""
    unet, models = load_part("unet", sdxl)
    cond = train_smpo_sdxl.encode_prompts([PROMPT, "a blue square"], models)
    x_t, t = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500, 20])
    heard = []

    def listen(unet, args, kwargs):
        heard.append(kwargs["added_cond_kwargs"]["time_ids"])

    def change(unet, args, kwargs):
        added = kwargs["added_cond_kwargs"]
        return args, {**kwargs, "added_cond_kwargs": {**added, "time_ids": added["time_ids"] + 8}}

    with torch.no_grad():
        unet.register_forward_pre_hook(listen, with_kwargs=True)
        eps = train_smpo_sdxl.call_unet(unet, x_t, t, cond)
        for key, value in cond.items():
            other = train_smpo_sdxl.call_unet(unet, x_t, t, {**cond, key: value + 1})
            assert (eps != other).any(), key
        unet.register_forward_pre_hook(change, with_kwargs=True)
        assert (eps != train_smpo_sdxl.call_unet(unet, x_t, t, cond)).any()

    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl, torch_dtype=torch.float32)
    theirs = pipeline._get_add_time_ids((64, 128), (0, 0), (64, 128), torch.int64, text_encoder_projection_dim=24)
    assert theirs.tolist() == [[64, 128, 0, 0, 64, 128]]
    assert torch.equal(heard[0], theirs.repeat(2, 1))


# The VAE


def test_the_vae_runs_in_half_precision_only_if_it_can(tmp_path, sdxl, lora_run):
    """Validation too decodes in its own precision: autocast would take it down to where SDXL's overflows."""
    fixed = AutoencoderKL.from_pretrained(sdxl, subfolder="vae")
    fixed.register_to_config(force_upcast=False)
    fixed.save_pretrained(tmp_path / "vae")

    def dtype(**flags):
        vae, models = load_part("vae", sdxl, torch.bfloat16, rank=2, **flags)
        assert {models[part].dtype for part in ("unet", "text_encoder", "text_encoder_2")} == {torch.bfloat16}
        return vae.dtype

    assert dtype() == torch.float32
    assert dtype(pretrained_vae_model_name_or_path=sdxl) == torch.float32  # a pipeline's
    assert dtype(pretrained_vae_model_name_or_path=tmp_path / "vae") == torch.bfloat16  # a folder of its own
    assert lora_run[2] == [torch.float32] * 2  # an image of the base, and one of the policy


def test_another_vae_is_trained_with_and_saved(tmp_path, sdxl):
    vae = AutoencoderKL.from_pretrained(sdxl, subfolder="vae")
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= 1.5
    vae.save_pretrained(tmp_path / "vae")
    flags = {"label_column": "label_0", "max_train_steps": 1, "pretrained_vae_model_name_or_path": tmp_path / "vae"}
    train_sdxl(tmp_path / "out", sdxl, noising="forward", **flags)
    saved = AutoencoderKL.from_pretrained(tmp_path / "out", subfolder="vae")
    for other in (saved, load_part("vae", sdxl, **flags)[0]):
        assert torch.equal(other.quant_conv.weight, vae.quant_conv.weight)


# Schedules and kinds of model


def step_of(script, batch, context):
    """Metrics of a batch that is one micro-batch, as numbers, and the policy's gradient."""
    (micro_batch,) = script.invert_and_judge(batch, context)
    loss, metrics = script.training_step(micro_batch, context)
    loss.backward()
    return {name: float(value) for name, value in metrics.items()}, pop_gradient(context.models["unet"])


def test_other_schedules(tmp_path, sdxl):
    """SDXL-Turbo's scheduler has SDXL's noise; v-prediction models may end in pure noise, where alpha_bar is 0."""
    shape = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    shape["timestep_spacing"] = "trailing"
    base = shutil.copytree(sdxl, tmp_path / "base")
    flags = {"label_column": "label_0", "rank": 2, "noising": "released"}
    args = train_smpo_sdxl.parse_args(train_flags("unused", pretrained_model_name_or_path=base, **flags))
    alpha_bar, _ = train_smpo_sdxl.load_noise_schedule(args)
    diffusers.EulerAncestralDiscreteScheduler(**shape).save_pretrained(base / "scheduler")
    turbo, prediction_type = train_smpo_sdxl.load_noise_schedule(args)
    assert torch.equal(turbo, alpha_bar) and prediction_type == "epsilon"

    zero_snr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    diffusers.EulerDiscreteScheduler(**shape, **zero_snr).save_pretrained(base / "scheduler")
    logs = train_sdxl(tmp_path / "out", base, max_train_steps=1, **flags, **VALIDATION)
    assert logs["loss"] == [pytest.approx(math.log(2), abs=1e-6)]
    context, pairs = make_run(train_smpo_sdxl, tmp_path / "made", base, **flags)
    assert context.prediction_type == "v_prediction" and context.alpha_bar[-1] == 0 and turbo[-1] > 1e-3
    batch = train_smpo_sdxl.collate_pairs([pairs[0, 0]])
    batch["timesteps"][:] = 999
    context.args.renoise_at = "last_move"
    for context.args.noising in ("renoise", "released", "forward"):
        metrics, _ = step_of(train_smpo_sdxl, batch, context)
        assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    "script, path, values, message",
    [
        ("sdxl", "model_index.json", {"text_encoder": [None, None], "tokenizer": [None, None]},
         "no tokenizer and no text_encoder.*not its refiner; for SD1.5 there is train_smpo_sd15.py"),
        ("sdxl", "unet/config.json", {"time_cond_proj_dim": 256}, "takes the guidance scale as an input"),
        ("sdxl", "unet/config.json", {"class_embed_type": "projection"}, "takes more than a prompt, a class or an"),
        ("sdxl", "unet/config.json", {"in_channels": 9}, "takes 9 channels and the VAE has 4.*inpainting"),
        ("sdxl", "unet/config.json", {"_class_name": "UNet3DConditionModel"}, "its unet is a UNet3DConditionModel"),
        ("sdxl", "scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"},
         "its scheduler is a EDMEulerScheduler.*noise schedule of betas"),
        ("sdxl", "scheduler/scheduler_config.json", {"prediction_type": "sample"},
         "prediction_type sample, not epsilon or v_prediction"),
        ("sd15", "unet/config.json", {"addition_embed_type": "text_time"},
         "addition_embed_type text_time.*for SDXL there is train_smpo_sdxl.py"),
        ("sd15", "scheduler/scheduler_config.json",
         {"_class_name": "FlowMatchEulerDiscreteScheduler", "beta_schedule": None}, "its scheduler is a FlowMatch"),
        ("sd15", "scheduler/scheduler_config.json", {"num_train_timesteps": 2},
         "num_inversion_steps must be in 1..2, got 3"),
    ],
)  # fmt: skip
def test_other_models_are_refused_before_weights_are_loaded(script, path, values, message, tmp_path, sdxl):
    script, base = {"sdxl": (train_smpo_sdxl, sdxl), "sd15": (train_smpo_sd15, TINY / "sd15")}[script]
    folder = shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    change_json(folder / path, **values)
    with pytest.raises(script.UserError, match=re.compile(message, re.S)):
        train(tmp_path / "out", script, pretrained_model_name_or_path=folder, label_column="label_0")


def test_a_part_that_only_a_pipeline_needs_is_missed_before_training(tmp_path):
    """What is trained has it not, and what is written has: a LoRA goes without."""
    folder = shutil.copytree(TINY / "sd15", tmp_path / "base")
    change_json(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    flags = {"pretrained_model_name_or_path": folder, "label_column": "label_0", "max_train_steps": 1}
    with pytest.raises(train_smpo_sd15.UserError, match="--pretrained_model_name_or_path .*base cannot be loaded"):
        train(tmp_path / "whole", **flags)
    train(tmp_path / "lora", rank=2, **flags)


class AsVelocity(torch.nn.Module):
    """A UNet with the v that stands for another's noise: `v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0`."""

    def __init__(self, unet, alpha_bar):
        super().__init__()
        self.unet, self.alpha_bar = unet, alpha_bar

    def forward(self, x_t, t, **conditions):
        eps = self.unet(x_t, t, **conditions).sample
        alpha_bar_t = self.alpha_bar[t.clamp(min=0)].view(-1, 1, 1, 1)
        x_0 = (x_t - (1 - alpha_bar_t).sqrt() * eps) / alpha_bar_t.sqrt()
        return SimpleNamespace(sample=alpha_bar_t.sqrt() * eps - (1 - alpha_bar_t).sqrt() * x_0)


@in_float64
@pytest.mark.parametrize("script, noising", [(train_smpo_sd15, "released"), (train_smpo_sdxl, "renoise")])
def test_v_prediction_gives_the_step_of_its_noise(script, noising, tmp_path, sdxl, labels_path, monkeypatch):
    """A policy unlike the reference: loss, errors and gradient of an exact v are those of the noise itself."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    flags = {"labels_path": labels_path, "noising": noising, "beta_dpo": 200}
    context, pairs = make_run(script, tmp_path, sdxl, torch.float64, **flags)
    batch = script.collate_pairs([pairs[0, 0], pairs[0, 1]])
    as_velocity = {part: AsVelocity(context.models[part], context.alpha_bar) for part in ("unet", "ref_unet")}
    velocity = replace(context, models={**context.models, **as_velocity}, prediction_type="v_prediction")
    (metrics, gradient), (v_metrics, v_gradient) = (step_of(script, batch, one) for one in (context, velocity))
    assert abs(metrics["loss"] - math.log(2)) > 1e-3
    rtol = 15 * FLOAT64_RTOL  # v is made by a division by sqrt(alpha_bar), which is 1 / 15 at the last timestep
    assert v_metrics == pytest.approx(metrics, rel=rtol)
    assert (v_gradient - gradient).norm() < rtol * gradient.norm()
