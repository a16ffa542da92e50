"""train_smpo_sd15.py, run in this process on the tiny model."""

import argparse
import io
import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, TINY, encoded, names_in, process_restored, train, train_flags, unet_weights, write_pairs
from PIL import Image
from safetensors.torch import load_file

import train_smpo_sd15
from diffusers import StableDiffusionPipeline
from train_smpo_sd15 import cut_square, decode_image, parse_args, prepare_pair, shuffled_keys


# The first step: policy and reference are equal, and judged in the same shape. Nothing but one logsigmoid(0) is
# rounded.
LOG_2 = pytest.approx(math.log(2), abs=1e-6)


# What a run writes


@pytest.fixture(scope="module")
def full_run(tmp_path_factory, labels_path):
    """Folder and logs of a full fine-tuning."""
    folder = tmp_path_factory.mktemp("full")
    with process_restored():
        return folder, train(
            folder, labels_path=labels_path, validation_prompts=["a large red circle", "a blue square"],
            num_validation_images=1, validation_steps=1, validation_inference_steps=2, checkpointing_steps=1,
        )  # fmt: skip


def test_full_fine_tuning(full_run):
    folder, logs = full_run
    assert len(logs["loss"]) == 2
    assert logs["loss"][0] == LOG_2 and logs["implicit_accuracy"][0] == 0.5 and logs["reward_margin"][0] == 0
    assert logs["grad_norm"][0] > 0
    assert logs["model_error_preferred"][0] == logs["ref_error_preferred"][0]
    assert logs["loss"][1] != logs["loss"][0]
    assert 0 < logs["weight"][0] < 10

    assert names_in(folder) == {
        "README.md", "checkpoint-1", "checkpoint-2", "logs", "model_index.json", "scheduler", "text_encoder",
        "tokenizer", "training_args.json", "unet", "vae", "validation",
    }  # fmt: skip
    assert names_in(folder / "validation") == {"step-1.png", "step-2.png"}
    first, second = (np.asarray(Image.open(folder / "validation" / f"step-{step}.png")) for step in (1, 2))
    size = train_smpo_sd15.THUMBNAIL
    assert first.shape == (2 * size, 2 * size, 3) and (first[:, :size] == second[:, :size]).all()  # the base's
    assert (first[:, size:] != second[:, size:]).any()
    before, after = unet_weights(TINY / "sd15"), unet_weights(folder)
    assert not [name for name in before if torch.equal(before[name], after[name])]  # every parameter has moved
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert pipeline("a red circle", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)

    card = (folder / "README.md").read_text()
    for text in ("arxiv.org/abs/2506.02698", "validation/step-2.png", "`beta_dpo` | `2000"):
        assert text in card
    assert str(ROOT) not in card
    record = json.loads((folder / "training_args.json").read_text())
    assert record["args"]["noising"] == "released" and record["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "flags",
    [
        {"noising": "ddim", "optimizer": "adafactor", "gradient_checkpointing": True, "lr_scheduler": "cosine"},
        {"noising": "renoise", "lr_warmup_steps": 1, "dataloader_num_workers": 1, "no_hflip": None},
        {"noising": "renoise", "renoise_at": "every_move", "use_8bit_adam": True, "lr_scheduler": "constant"},
        {"rank": 2, "lora_layers": "conv1,to_q", "mixed_precision": "bf16", "gradient_checkpointing": True},
        {"noising": "forward", "max_train_samples": 5, "proportion_empty_prompts": 1.0, "allow_tf32": True},
    ],
    ids=lambda flags: ",".join(flags),
)
def test_every_way_to_train_moves_every_weight(flags, tmp_path, labels_path):
    """Reference and policy agree before the first of two steps in every precision, and every trained tensor moves."""
    logs = train(tmp_path, labels_path=labels_path, **flags)
    assert logs["loss"][0] == LOG_2 and logs["reward_margin"][0] == 0
    assert all(np.isfinite(values).all() for values in logs.values())
    first, second = [0, 1e-4] if "lr_warmup_steps" in flags else [1e-4, 1e-4]
    rates = [first, second / 2 if flags.get("lr_scheduler") == "cosine" else second]
    assert logs["lr"] == pytest.approx(rates, rel=1e-6)  # in fp32
    if "rank" in flags:
        for name in (train_smpo_sd15.LORA_FILE, train_smpo_sd15.KOHYA_LORA_FILE):
            weights = load_file(tmp_path / name)
            assert all(value.any() for value in weights.values())
            assert {value.shape[2:] for value in weights.values()} >= {(3, 3), (1, 1), ()}
    else:
        before, after = unet_weights(TINY / "sd15"), unet_weights(tmp_path)
        assert not [name for name in before if torch.equal(before[name], after[name])]


def test_epochs_count_the_steps_and_the_published_learning_rate_is_the_default(tmp_path):
    """1e-8 times the pairs of a step."""
    flags = {"max_train_steps": None, "num_train_epochs": 2, "max_train_samples": 5, "learning_rate": None}
    logs = train(tmp_path, noising="forward", label_column="label_0", rank=2, **flags)
    assert logs["epoch"] == pytest.approx([0.4, 0.8, 1.2, 1.6])  # the fifth pair waits for another shuffle
    assert logs["lr"] == pytest.approx([2e-8] * 4)


def test_pretrained_unet_is_where_policy_and_reference_start(full_run, tmp_path, labels_path):
    folder, base = full_run
    flags = {"pretrained_unet_model_name_or_path": folder, "max_train_steps": 1}
    logs = train(tmp_path / "out", labels_path=labels_path, **flags)
    assert logs["loss"][0] == LOG_2 and logs["ref_error_preferred"][0] != base["ref_error_preferred"][0]


# The same run, cut up in other ways


def test_micro_batches_do_not_change_the_run(tmp_path, labels_path):
    """1 x 4 and 4 x 1: the same pairs, timesteps and noise, hence the same gradient but for rounding.

    fp32 rounds errors of about 1 by some 1e-6 in another shape. The gradient is a sum of eight such errors' gradients,
    which nothing magnifies before the first step: a hundredth is far above its rounding and far below a pair too many.
    """
    flags, logs = {"labels_path": labels_path, "max_train_steps": 1}, []
    for size in (1, 4):
        cut = {"train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        logs.append(train(tmp_path / str(size), **flags, **cut))
    np.testing.assert_allclose(logs[0]["grad_norm"], logs[1]["grad_norm"], rtol=1e-2)
    np.testing.assert_allclose(logs[0]["std_tau"], logs[1]["std_tau"], rtol=1e-3)


# Data


def test_labels_are_joined_by_key_not_by_place(load, labels_path, tmp_path):
    """From several files, rows that agree twice over."""
    labels = pq.read_table(labels_path)
    shuffled = labels.take(np.random.default_rng(0).permutation(len(labels)))
    pq.write_table(shuffled.slice(0, 300), tmp_path / "first.parquet")
    pq.write_table(shuffled.slice(250), tmp_path / "second.parquet")
    files = [tmp_path / "first.parquet", tmp_path / "second.parquet"]
    pairs, _ = load(labels_path=files, label_column=None, human_label_column="none")
    expected = labels["soft_label_0"].to_numpy()
    assert len(pairs) > 500
    np.testing.assert_array_equal(pairs.rows, np.flatnonzero(~np.isnan(expected) & (expected != 0.5)))
    np.testing.assert_array_equal(pairs.soft_labels_0, expected[pairs.rows])


def test_labels_of_other_data_are_refused(labels_path, tmp_path):
    labels = pq.read_table(labels_path)
    pq.write_table(labels.slice(3), tmp_path / "short.parquet")
    missing = labels["image_0_uid"][0].as_py()
    with pytest.raises(ValueError, match=f"no label for 3 of the .* first is row 0, .*{missing}"):
        train(tmp_path / "out", labels_path=tmp_path / "short.parquet")
    pq.write_table(labels.drop(["image_1_uid"]), tmp_path / "keyless.parquet")
    with pytest.raises(ValueError, match="needs the columns image_0_uid, image_1_uid and soft_label_0"):
        train(tmp_path / "out", labels_path=tmp_path / "keyless.parquet")
    other = labels.to_pandas()
    other.assign(soft_label_0=1 - other["soft_label_0"]).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="has several labels for {'image_0_uid'"):
        train(tmp_path / "out", labels_path=[labels_path, tmp_path / "other.parquet"])


def test_human_ties_stay_out_when_the_labels_have_the_name_of_the_choices(load, tmp_path):
    path = write_pairs(tmp_path / "pairs.parquet", label_0=[0.5] + [1.0] * 7)
    keys = pd.read_parquet(path, columns=["image_0_uid", "image_1_uid", "ranking_id"])
    keys.assign(label_0=0.8).to_parquet(tmp_path / "labels.parquet")
    flags = {"dataset_name": path, "labels_path": tmp_path / "labels.parquet", "label_column": "label_0"}
    assert load(**flags)[0].rows.tolist() == list(range(1, 8))


def test_ties_and_pairs_without_a_label_are_left_out(load, tmp_path, caplog):
    """Null labels, 0.5 and human ties are never drawn."""
    labels, choices = [0.9, None, 0.5 + 1e-12, 0.2, 0.7, 0.6, 0.1, 0.8], [1.0, 1, 1, 0.5, 1, 0, 1, 0]
    path = write_pairs(tmp_path / "pairs.parquet", mine=labels, label_0=choices)
    with caplog.at_level("INFO"):
        pairs, _ = load(dataset_name=path, label_column="mine")
    assert pairs.rows.tolist() == [0, 4, 5, 6, 7]
    assert "8 pairs: 1 without a label, 1 labelled 0.5 and 1 human ties are left out, 5 remain." in caplog.text


@pytest.mark.parametrize(
    "columns, flags, message",
    [
        ({}, {"label_column": "soft"}, "no column for --label_column soft.*It has .*caption"),
        ({}, {"image_columns": ["left", "jpg_1"]}, "--image_columns left"),
        ({}, {"label_column": "caption"}, r"The label column caption has to hold numbers in \[0, 1\], it holds \['"),
        ({}, {"caption_column": "label_1"}, "--caption_column label_1 holds no texts"),
        ({}, {"dataset_name": "$PAIRS"}, "--dataset_name .* cannot be loaded"),
        ({}, {"dataset_name": __file__}, "it is a file, and none named .parquet"),
        ({}, {"pretrained_model_name_or_path": __file__}, "is a file: `save_pretrained` of"),
        ({}, {"pretrained_model_name_or_path": "no/such"}, r"^--pretrained_model\S+ no/such cannot .*\nAccepted: .*$"),
        ({"mine": [0.5] * 8}, {"label_column": "mine"}, "No pair of .* is left"),
        ({"mine": [0.1] * 6 + [1.5, 0.2]}, {"label_column": "mine"}, "row 6 is 1.5"),
        ({"jpg_0": ["http://x/1.jpg"] * 8}, {}, "jpg_0 has to hold encoded images, it holds .*string"),
        ({"jpg_0": [[1, 2]] * 8}, {}, "jpg_0 has to hold encoded images, it holds .*List"),
        ({"jpg_0": [b"x"] * 8}, {}, "None of . pairs in a row of .* can be read"),
        ({}, {"validation_split": "test"}, "--validation_split test cannot .* is one split"),
        ({}, {"labels_path": __file__}, "--labels_path .*test_train.py cannot be loaded: .*whole files of relabel"),
        ({}, {"train_batch_size": 50}, "--train_batch_size 50 on 1 processes needs 50 pairs"),
        ({}, {"pretrained_unet_model_name_or_path": "/no"}, "--pretrained_unet_model_name_or_path /no cannot be load"),
        ({}, {"rank": 2, "lora_layers": "to_x"}, "--lora_layers to_x .*not found"),
        ({}, {"rank": 2, "lora_layers": "to_q, o_k"}, "--lora_layers to_q, o_k cannot .*the UNet has no 'o_k'"),
        ({"caption": ["one"] * 8}, {"validation_split": "0.1"}, "--validation_split 0.1 holds out captions as a who"),
    ],
)
def test_bad_data_is_named(columns, flags, message, tmp_path):
    path = write_pairs(tmp_path / "pairs.parquet", **columns)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        train(tmp_path / "out", **{"dataset_name": path, "label_column": "label_0", **flags})


def test_what_cannot_be_written_to_or_has_no_words_is_named(tmp_path):
    with pytest.raises(ValueError, match="--output_dir .*test_train.py cannot be written to"):
        train(__file__, label_column="label_0", gamma=1)
    shutil.copytree(TINY / "sd15", tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer"))
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path .*mute cannot be loaded: its tokenizer has"):
        train(tmp_path / "out", pretrained_model_name_or_path=tmp_path / "mute", label_column="label_0", gamma=1)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"lora_alpha": 4}, "--lora_alpha does nothing without --rank"),
        ({"streaming": True, "dataloader_num_workers": 2}, "--dataloader_num_workers does nothing without data that"),
        ({"revision": "main"}, "--revision does nothing without a base model on the Hub"),
        ({"noising": "ddim", "renoise_at": "last_move"}, "--renoise_at does nothing without --noising renoise"),
        ({"noising": "forward", "num_inversion_steps": 9}, "--num_inversion_steps does nothing without another --noi"),
        ({"use_8bit_adam": True, "optimizer": "adafactor"}, "--use_8bit_adam does nothing without --optimizer adamw"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 3}, "--lr_warmup_steps does nothing without another --lr"),
        ({"hub_model_id": "a/b", "hub_public": True}, "--hub_model_id does nothing.*\n--hub_public does nothing"),
        ({"key_columns": ["a"]}, "--key_columns takes 2 or 3 columns, got a"),
        ({"image_columns": ["a", "a"]}, "--image_columns takes two different columns, got a a"),
        ({"validation_prompts": ["a"] * 33}, "--validation_prompts has 33 prompts, more than 32 for a picture"),
        ({"labels_path": "/no.parquet", "resume_from_checkpoint": "/no/checkpoint-3"},
         "--labels_path /no.parquet is not a file.*\n.* is not an existing folder named checkpoint-STEP"),
    ],
)  # fmt: skip
def test_bad_flags_are_all_named_at_once(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_args(train_flags(tmp_path / "out", **{"num_inversion_steps": None, **flags}))


@pytest.mark.parametrize(
    "flag, value, accepted",
    [
        ("dataset_name", "", "is empty: is the variable set"),
        ("resolution", 60, "a multiple of 8"),
        ("train_batch_size", 0, "a whole number above 0"),
        ("beta_dpo", -1, "a number above 0"),
        ("gamma", "inf", "a number above 0"),
        ("learning_rate", "nan", "a number above 0"),
        ("proportion_empty_prompts", 2, r"in \[0, 1\]"),
        ("seed", -1, "a whole number, 0 or more"),
        ("seed", 2**63, "a whole number, 0 or more"),
        ("adam_beta1", 1.0, r"in \[0, 1\)"),
        ("rank", 2.5, "a whole number above 0"),
    ],
)
def test_a_number_that_is_none_is_named(flag, value, accepted, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        parse_args(train_flags(tmp_path, **{flag: value}))
    assert error.value.code == 2
    assert re.search(rf"argument --{flag}: (must be )?{accepted}.*(, got {value}|from.)\n$", capsys.readouterr().err)


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(train_smpo_sd15.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--report_to trackio is not installed: pip install -U accelerate trackio."):
        parse_args(train_flags(tmp_path, report_to="trackio"))


def test_a_mistake_does_not_tell_a_password(tmp_path):
    with pytest.raises(ValueError, match="--dataset_name https://host/pairs.parquet ") as error:
        train(tmp_path / "out", dataset_name="https://me:secret@host/pairs.parquet", label_column="label_0")
    assert "secret" not in str(error.value)


def test_a_user_s_mistake_is_the_last_thing_on_the_screen(server, tmp_path):
    """Its text alone, without a traceback, and exit code 2, if it is a data loading process that finds it, too."""
    path = write_pairs(tmp_path / "pairs.parquet", jpg_0=[b"x"] * 8)
    flags = {"dataset_name": path, "label_column": "label_0", "rank": 2, "dataloader_num_workers": 1}
    assert server.run(train_flags(tmp_path / "out", **flags), module=str(ROOT / "train_smpo_sd15.py")) == 2
    *_, last = server.output().splitlines()
    assert re.match(r"train_smpo_sd15.py: None of \d pairs in a row of .* can be read, row", last)
    assert "Traceback" not in server.output()


def test_every_pair_is_dealt_once_an_epoch_and_a_run_goes_on_where_it_stopped(load):
    pairs, args = load(train_batch_size=2, gradient_accumulation_steps=3, inversion_batch_size=1)
    pairs = pairs.subset(np.arange(15))

    def take(process, start, steps):
        groups = shuffled_keys(pairs, start, 2, process, args)
        return [[next(groups) for _ in range(3)] for _ in range(steps)]

    first, second, chosen = take(0, 0, 4), take(1, 0, 4), set()
    for epoch in range(4):  # a step is an epoch of 12 of the 15 pairs
        keys = [key for groups in (first[epoch], second[epoch]) for group in groups for key in group]
        assert {key[0] for key in keys} == {epoch} and len({key[1] for key in keys}) == 12
        chosen.add(frozenset(key[1] for key in keys))
        timesteps = [[pairs.timestep(key) for group in part[epoch] for key in group] for part in (first, second)]
        assert sorted(sum(timesteps, [])) == [t for both in zip(*timesteps) for t in both]  # dealt out in turns
    assert take(1, 3, 1) == second[3:]
    assert len(chosen) > 2 and frozenset(range(12)) not in chosen  # another shuffle leaves others out


def test_a_pair_is_that_of_its_row(load):
    """Image i, the label and the caption; as many captions are empty as asked for."""
    pairs, _ = load()
    for index in range(3):
        example, row = pairs[0, index], pairs.data[int(pairs.rows[index])]
        expected = [cut_square(decode_image(row[f"jpg_{i}"], 128), 64, False) for i in (0, 1)]
        assert not example["problems"] and not torch.equal(*expected)
        assert all(torch.equal(*both) for both in zip(example["pixel_values"], expected))
        assert example["caption"] == row["caption"] != "" and example["soft_label_0"] == pairs.soft_labels_0[index]
    pairs, _ = load(proportion_empty_prompts=0.2)
    empty = [pairs.draw(0, int(row))["empty"] for row in pairs.rows]
    assert abs(np.mean(empty) - 0.2) < 4 * (0.16 / len(empty)) ** 0.5  # four standard errors
    assert pairs[0, empty.index(True)]["caption"] == "" != pairs[0, empty.index(False)]["caption"]


def test_the_optimisers_have_what_the_flags_say(tmp_path):
    given = {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 0.7, "adam_weight_decay": 0.8}
    weights = [torch.nn.Parameter(torch.zeros(2))]
    args = parse_args(train_flags(tmp_path, **given))
    expected = {"lr": 0.9, "betas": (0.5, 0.6), "eps": 0.7, "weight_decay": 0.8}
    assert expected.items() <= train_smpo_sd15.make_optimizer(weights, 0.9, args).defaults.items()
    args.optimizer = "adafactor"
    expected = {"lr": 0.9, "weight_decay": 0.8, "clip_threshold": 1.0}
    expected |= {"scale_parameter": False, "relative_step": False}
    assert expected.items() <= train_smpo_sd15.make_optimizer(weights, 0.9, args).defaults.items()


def test_the_middle_of_a_picture_keeps_its_shape():
    """A square mark in the middle of a wide picture is as square and as large at either size, and where it was."""

    def picture(width, height):
        image = Image.new("RGB", (width, height), "black")
        image.paste("white", [width // 2, height // 4, width // 2 + height // 4, height // 2])
        return image

    small, large = (cut_square(picture(w, h), 64, mirror=True) for w, h in ((96, 64), (384, 256)))
    assert small.shape == (3, 64, 64) and small.dtype == torch.uint8 and (small.min(), small.max()) == (0, 255)
    assert (small.float() - large).abs().mean() < 4
    bright = (large[0] > 127).nonzero()  # columns 32..48 of the middle 64, mirrored 16..32; rows 16..32
    assert (bright.min(dim=0).values - 16).abs().max() <= 1 and (bright.max(dim=0).values - 31).abs().max() <= 1


def test_pictures_are_read_as_they_are():
    """8-bit levels survive `cut_square` at the native size."""
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    np.testing.assert_array_equal(cut_square(noise, 64, False).permute(1, 2, 0), np.array(noise))


def test_a_photograph_is_decoded_no_larger_than_needed_and_a_thumbnail_told_of():
    """JPEG's own halves and quarters, of means, hardly differ from the whole after `cut_square`; others stay whole."""
    photograph = Image.fromarray(np.add.outer(np.arange(384) // 3, np.arange(512) // 4).astype(np.uint8))
    jpeg, png = encoded(photograph, "JPEG"), encoded(photograph, "PNG")
    assert [decode_image(data, 128).size for data in (jpeg, png)] == [(256, 192), (512, 384)]
    small, whole = (cut_square(decode_image(jpeg, side), 64, mirror=False).float() for side in (128, None))
    assert (small - whole).abs().mean() < 1.75  # levels, half of what is between two pixels of the result
    args = argparse.Namespace(caption_column="c", image_columns=["a", "b"], dataset_name="none", resolution=1024)
    drawn = {"mirror": False, "empty": False, "timestep": 0, "seeds": [0, 0, 0]}
    with pytest.warns(UserWarning, match="enlarged more than twice to --resolution 1024"):
        prepare_pair({"c": "ramp", "a": jpeg, "b": png}, 1.0, drawn, args)


def test_both_images_of_a_pair_are_mirrored_alike(tmp_path, load):
    """With the same picture on both sides two tensors are equal, in every epoch; half of the pairs are mirrored."""
    images = pq.read_table(TINY / "pairs" / "test.parquet")["jpg_0"].to_pylist()
    pictures = [encoded(Image.open(io.BytesIO(jpg))) for jpg in images]
    path = write_pairs(tmp_path / "pairs.parquet", rows=len(images), jpg_0=pictures, jpg_1=pictures)
    (flipped, _), (straight, _) = (load(dataset_name=path, no_hflip=flag) for flag in (None, True))
    keys, mirrored, timesteps = [(epoch, i) for epoch in range(3) for i in range(len(flipped))], 0, set()
    for key in keys:
        one, other = flipped[key], straight[key]
        assert torch.equal(*one["pixel_values"]) and torch.equal(*other["pixel_values"])
        assert one["timestep"] == other["timestep"] and one["seeds"] == other["seeds"]
        mirrored += not torch.equal(one["pixel_values"][0], other["pixel_values"][0])
        timesteps.add(one["timestep"])
    # Draws of one seed, the same on every machine: half of them mirrored, and hardly a timestep twice among 1,000.
    assert 0.35 < mirrored / len(keys) < 0.65 and len(timesteps) > 0.8 * len(keys)
