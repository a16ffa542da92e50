"""Writes reference.json and pixels.npz: what the packages of the reward models make of random weights, see
README.md."""

import gzip
import importlib
import json
import tempfile
from pathlib import Path

import clip
import hpsv2.img_score
import numpy as np
import PIL
import torch
import torchvision
import transformers
from hpsv2.src import open_clip
from ImageReward.models.BLIP import blip_pretrain
from ImageReward.models.BLIP.vit import VisionTransformer
from random_checkpoint import IMAGE_SIZES, TEXTS, images, tensor


image_reward = importlib.import_module("ImageReward.ImageReward")  # the packages have classes of these names
aesthetic = importlib.import_module("ImageReward.models.AestheticScore")
HERE = Path(__file__).parent
SIZE = 32  # pixels a side
VOCAB = [*"[PAD] [UNK] [CLS] [SEP] [MASK]".split(), *"abcdefghijklmnopqrstuvwxyz0123456789,.!&:;"]
VOCAB += [f"##{letter}" for letter in VOCAB[5:41]]


def randomise(model):
    """Fills a model with `tensor`s; returns what its state dict holds, `{name: shape}`."""
    state = model.state_dict()
    random = {
        name: torch.from_numpy(tensor(name, tuple(value.shape)))
        for name, value in state.items()
        if value.is_floating_point()
    }
    model.load_state_dict({**state, **random})
    model.eval()
    return {name: list(value.shape) for name, value in state.items()}


def hpsv2_scores(folder):
    """`hpsv2.score` on a small open_clip ViT, with the words of the tiny models."""
    merges = (HERE.parent / "tiny/pickscore/merges.txt").read_bytes().rstrip()  # whose end would be a word, too
    (folder / "merges.gz").write_bytes(gzip.compress(merges))
    words = open_clip.tokenizer.SimpleTokenizer(folder / "merges.gz")
    open_clip.tokenizer._tokenizer = words
    vision = {"image_size": SIZE, "layers": 3, "width": 48, "head_width": 12, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": words.vocab_size, "width": 32, "heads": 4, "layers": 2}
    (folder / "small.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder / "small.json")
    model, _, preprocess = open_clip.create_model_and_transforms(
        "small", None, precision="fp32", light_augmentation=True, output_dict=True
    )
    shapes = randomise(model)
    torch.save({"state_dict": model.state_dict()}, folder / "checkpoint.pt")
    hpsv2.img_score.model_dict.update(model=model, preprocess_val=preprocess)
    scores = [
        hpsv2.img_score.score(image, text, cp=folder / "checkpoint.pt")[0] for image, text in zip(images(), TEXTS)
    ]
    return {"shapes": shapes, "scores": scores, "tokens": open_clip.tokenizer.tokenize(TEXTS).tolist()}


def image_reward_scores(folder):
    """`ImageReward.score` on a small BLIP."""

    def small_vit(vit, image_size, *rest):
        return VisionTransformer(image_size, patch_size=8, embed_dim=48, depth=3, num_heads=4), 48

    def small_tokenizer():
        (folder / "vocab.txt").write_text("\n".join(VOCAB))
        tokenizer = transformers.BertTokenizer(folder / "vocab.txt")
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        return tokenizer

    blip_pretrain.init_tokenizer = small_tokenizer  # the original takes words from the Hub
    config = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    config |= {"vocab_size": 30524, "layer_norm_eps": 1e-12, "add_cross_attention": True}
    (folder / "med_config.json").write_text(json.dumps(config))  # as it is on the Hub
    blip, full = image_reward.ImageReward(folder / "med_config.json").blip, {}
    heads = {"visual_encoder": blip.visual_encoder.blocks[0].attn.num_heads, "text_encoder": 12}
    for name, count in heads.items():
        sizes = [parameter.numel() for parameter in getattr(blip, name).parameters()]
        full[name] = [len(sizes), sum(sizes), count]

    config |= {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    (folder / "med_config.json").write_text(json.dumps({**config, "vocab_size": len(VOCAB) + 2}))
    original, blip_pretrain.create_vit = blip_pretrain.BLIP_Pretrain, small_vit
    image_reward.BLIP_Pretrain = lambda image_size, vit, med_config: original(med_config, SIZE, vit)
    model = image_reward.ImageReward(folder / "med_config.json")
    model.mlp, model.preprocess = image_reward.MLP(32), image_reward._transform(SIZE)
    shapes = randomise(model)
    with torch.no_grad():
        scores = [model.score(text, image) for image, text in zip(images(), TEXTS)]
    return {"shapes": shapes, "scores": scores, "vocab": VOCAB, "full": full}


def aesthetic_scores(folder):
    """ImageReward's `AestheticScore`, which is LAION's, on a small CLIP of OpenAI's."""
    model = clip.model.CLIP(32, SIZE, 2, 64, 8, 77, 597, 32, 4, 1)
    aesthetic.clip.load = lambda *args, **options: (model, clip.clip._transform(SIZE))
    scorer = aesthetic.AestheticScore(None)
    scorer.mlp = aesthetic.MLP(32)
    shapes, scores = randomise(scorer), []
    for image in images():
        image.save(folder / "image.png")
        with torch.no_grad():
            scores.append(scorer.score("", folder / "image.png"))
    return {"shapes": shapes, "scores": scores}


def main():
    reference = {"sizes": IMAGE_SIZES}
    reference["versions"] = {
        package.__name__: package.__version__ for package in (torch, torchvision, transformers, PIL, np)
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, function in {
            "hpsv2.1": hpsv2_scores,
            "imagereward": image_reward_scores,
            "aesthetic": aesthetic_scores,
        }.items():
            reference[name] = function(Path(folder))
    (HERE / "reference.json").write_text(json.dumps(reference, default=float))
    crop, pad = image_reward._transform(14), open_clip.transform.image_transform(14, False, resize_longest_max=True)
    pixels = {f"crop{i}": crop(image).numpy() for i, image in enumerate(images())}
    pixels |= {f"pad{i}": pad(image).numpy() for i, image in enumerate(images())}
    np.savez_compressed(HERE / "pixels.npz", **pixels)
    for name in ("hpsv2.1", "imagereward", "aesthetic"):
        print(name, reference[name]["scores"])


if __name__ == "__main__":
    main()
