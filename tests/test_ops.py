"""What a step costs a GPU besides its products: a change that costs is seen."""

from collections import Counter
from importlib.metadata import version

import pytest
import torch
from benchmark_ops import COLUMNS, PAIRS_A_STEP, CudaAutocast, Operations, count
from random_models import UNETS


VERSIONS = {"torch": "2.13", "diffusers": "0.42", "transformers": "5.23", "peft": "0.21", "accelerate": "1.15"}
ONE_OF_EACH = {
    "layers_per_block": 1, "block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 4),
}  # fmt: skip
SDXL = ["--gradient_checkpointing"]
# Kernels, MB beside the products, MB of weights, syncs and copies of a step of two micro-batches. Whoever lowers one
# of them writes the new number here; whoever raises one says in the commit what it buys.
TOTALS = {
    "small-sd15 full": ([], [4217, 137.469, 54.148, 2, 8]),
    "small-sd15 LoRA": (["--rank", "4"], [3765, 50.055, 0.885, 2, 8]),
    "tiny-sdxl full": (SDXL, [9636, 246.455, 64.8, 2, 9]),
    "tiny-sdxl LoRA": ([*SDXL, "--rank", "4", "--optimizer", "adamw"], [4852, 66.581, 1.048, 2, 9]),
    "tiny-sdxl LoRA, autocast alone": (
        [*SDXL, "--rank", "4", "--optimizer", "adamw"],
        [6538, 101.917, 1.048, 2, 9],
    ),
}
FAST = ["small-sd15 full", "tiny-sdxl LoRA"]


def test_operations_are_counted_as_by_hand():
    """Two products with one weight, a norm, a view, a number for the CPU, and the gradient."""
    x, weight = torch.zeros(2, 4, device="meta"), torch.zeros(8, 4, device="meta", requires_grad=True)
    operations = Operations([weight])
    with operations, CudaAutocast(), torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):  # x is rounded twice, 32 + 16 bytes, the weight once, 128 + 64
                y = torch.nn.functional.linear(x, weight)  # [2, 8]
            y = torch.nn.functional.layer_norm(y, (8,))  # to fp32, 32 + 64; from there 64 + 64, mean and rstd 8 + 8
        assert y.dtype == torch.float32 and float(y.view(16)[0]) == 1
        y.add_(torch.zeros(2, 8).to("meta"))  # 2 x 64 + 64
    counts = operations.counts["optimiser"]
    assert counts["kernels"] == 2 + 1 + 2 + 1 + 1 + 1 and counts["syncs"] == counts["copies"] == 1
    assert counts["MB moved"] == pytest.approx((2 * 48 + 192 + 96 + 144 + 192) / 1e6, rel=1e-12)
    assert counts["MB of weights"] == 0  # an optimiser's


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in TOTALS]
)
def test_what_a_step_costs(case, monkeypatch):
    """Of networks with one block of each kind: a step of two pairs, one a micro-batch, at most two moves."""
    if any(not version(name).startswith(f"{number}.") for name, number in VERSIONS.items()):
        pytest.skip("other versions of the libraries have other operations")
    kind = case.split()[0]
    monkeypatch.setitem(UNETS, kind, {**UNETS[kind], **ONE_OF_EACH, "transformer_layers_per_block": 1})
    flags, totals = TOTALS[case]
    flags = [*flags, "--num_inversion_steps", "2", "--train_batch_size", "1"]
    counts = count(kind, 64, flags, pairs=2, autocast_alone="alone" in case)
    for phase, numbers in counts.items():
        for name in numbers:
            numbers[name] *= PAIRS_A_STEP if phase == "optimiser" else 2
    numbers = sum(counts.values(), Counter())
    assert [round(numbers[name], 3) for name in COLUMNS] == totals
