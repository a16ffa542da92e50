"""What a run says of itself: held-out pairs, pictures of prompts, the model card."""

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import ROOT, TINY, train, train_flags
from huggingface_hub import ModelCard
from PIL import Image

import train_smpo_sd15
from train_smpo_sd15 import hold_out, is_share


HELD_OUT = ("validation/loss", "validation/implicit_accuracy", "validation/reward_margin", "validation/std_tau")
FAST = {"label_column": "label_0", "noising": "forward", "rank": 2, "train_batch_size": 1}


def test_held_out_prompts_are_not_trained_on(load):
    """All pairs of some prompts, as many as the share asks for and less than a prompt more; drawn with the seed."""
    pairs, args = load()
    captions = np.array(pairs.data["caption"][:])[pairs.rows]
    most = np.unique(captions, return_counts=True)[1].max()
    for share in ("0.001", "0.1", "0.5"):
        args.validation_split = share
        chosen = hold_out(pairs, args)
        assert not set(captions[chosen]) & set(captions[~chosen])
        assert float(share) * len(pairs) <= chosen.sum() < float(share) * len(pairs) + most
    args.seed += 1
    assert not np.array_equal(hold_out(pairs, args), chosen)
    assert [is_share(value) for value in (None, "test", "0.1", ".5")] == [False, False, True, True]


def test_what_is_held_out_is_not_trained_on(load):
    """Nor counted among --max_train_samples."""
    _, args = load()
    everything, nothing = train_smpo_sd15.load_pairs(Accelerator(cpu=True), 1000, args)
    args.validation_split = "0.2"
    for args.max_train_samples in (None, 50):
        pairs, held_out = train_smpo_sd15.load_pairs(Accelerator(cpu=True), 1000, args)
        others = args.max_train_samples or len(everything) - len(held_out)
        assert nothing is None and len(pairs) == len(pairs.keys) == others
        assert not {*pairs.rows} & {*held_out.rows} and {*pairs.rows, *held_out.rows} <= {*everything.rows}
        assert len(held_out.soft_labels_0) == len(held_out) >= 0.2 * len(everything)


def test_held_out_accuracy_rises(tmp_path, labels_path):
    """From 0.5 by more than its 95 % interval, at the demo's settings."""
    logs = train(
        tmp_path / "out", labels_path=labels_path, validation_split="0.25", validation_steps=15, max_train_steps=30,
        train_batch_size=16, learning_rate=3e-6, lr_warmup_steps=5, seed=0,
    )  # fmt: skip
    accuracy, num_pairs = logs["validation/implicit_accuracy"][-1], 64  # 4 micro-batches of 16 at least
    assert accuracy - 1.96 * np.sqrt(accuracy * (1 - accuracy) / num_pairs) > 0.5, accuracy
    assert logs["validation/reward_margin"][-1] > 0 and len(logs["validation/loss"]) == 2


@pytest.mark.parametrize("rank, precision", [(2, "no"), (None, "bf16")])
def test_a_policy_that_does_not_move_has_the_same_numbers_and_pictures(rank, precision, tmp_path, monkeypatch):
    """To the bit, at every validation, and none of the training's; prompts from a file, base left of policy."""
    (tmp_path / "prompts.txt").write_text("\ufeffa red circle\n\na blue square\n", encoding="utf-8")
    args = train_smpo_sd15.parse_args(train_flags(tmp_path / "x", validation_prompts=tmp_path / "prompts.txt"))
    assert args.validation_prompts == ["a red circle", "a blue square"]
    long = "A red circle. " * 100  # no file can have such a name
    assert train_smpo_sd15.parse_args(train_flags(tmp_path / "x", validation_prompts=[long])).validation_prompts == [
        long
    ]
    monkeypatch.setattr(train_smpo_sd15, "NUM_VALIDATION_PAIRS", 6)
    flags = {
        **FAST, "noising": "renoise", "validation_split": "test", "learning_rate": 1e-30, "max_train_steps": 2,
        "validation_steps": 1, "train_batch_size": 2, "validation_prompts": tmp_path / "prompts.txt",
        "validation_inference_steps": 2, "num_validation_images": 1, "rank": rank, "mixed_precision": precision,
    }  # fmt: skip
    logs = train(tmp_path / "out", **flags)
    for name in HELD_OUT:
        assert len(logs[name]) == 2 and len(set(logs[name])) == 1
    assert logs["validation/loss"][0] == pytest.approx(np.log(2), abs=1e-6)  # one logsigmoid(0) in fp32
    assert logs["validation/std_tau"][0] not in logs["std_tau"]
    sheet, size = np.asarray(Image.open(tmp_path / "out" / "validation" / "step-2.png")), train_smpo_sd15.THUMBNAIL
    assert sheet.shape == (2 * size, 2 * size, 3) and (sheet[:, :size] == sheet[:, size:]).all()


def test_a_held_out_split_needs_labels_too(tmp_path, labels_path):
    """In the same flag; in test_engines.py it has them."""
    message = "--labels_path .* has no label for 64 of the 64 pairs of the split test"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, labels_path=labels_path, validation_split="test")


def test_the_card_says_what_the_hub_reads_and_no_local_path(tmp_path):
    flags = {"dataset_name": "ada/pairs", "pretrained_model_name_or_path": "ada/model", "rank": 4}
    args = train_smpo_sd15.parse_args(train_flags(tmp_path / "out", validation_prompts=["<b>", "a"], **flags))
    (tmp_path / "out").mkdir()
    train_smpo_sd15.save_model_card(args, 1)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.datasets == ["ada/pairs"] and card.data.base_model == "ada/model"
    assert card.data.license == "creativeml-openrail-m" and card.data.pipeline_tag == "text-to-image"
    assert {"smpo", "lora"} <= set(card.data.tags) and "| `rank` | `4` |" in card.text
    assert "](validation/step-1.png)" in card.text and "a row a prompt: &lt;b&gt;; a" in card.text
    args.pretrained_unet_model_name_or_path = "ada/unet"
    train_smpo_sd15.save_model_card(args, 1)
    assert "\n# It was trained on another UNet, ada/unet: " in (tmp_path / "out" / "README.md").read_text()
    args.dataset_name, args.pretrained_model_name_or_path = "https://me:secret@host/pairs.parquet", str(TINY / "sd15")
    train_smpo_sd15.save_model_card(args, 1)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "https://host/pairs.parquet" in text and "of sd15" in text
    assert "secret" not in text and str(ROOT) not in text


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"validation_split": "1.5"}, "--validation_split 1.5 cannot be loaded"),
        ({"validation_split": "0.1", "streaming": True}, "_split with a share does not go with --streaming"),
        ({"validation_split": "0.001", "train_batch_size": 64}, "needs 64 pairs, and --validation_split 0.001 has"),
        ({"validation_prompts": "none.txt"}, "--validation_prompts none.txt is no text file in UTF-8"),
        ({"validation_prompts": "latin.txt"}, "--validation_prompts latin.txt is no text file in UTF-8"),
        ({"validation_prompts": "empty.txt"}, "--validation_prompts empty.txt has no prompts"),
        (
            {"validation_prompts": ["a", "empty.txt"]},
            "takes prompts, or one .txt file of them, and empty.txt is a file",
        ),
    ],
)
def test_bad_input_is_named(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Bäume".encode("latin-1"))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        train(tmp_path / "out", **{**FAST, **flags})
