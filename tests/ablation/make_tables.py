# coding=utf-8
# Copyright 2026 The SmPO-Diffusion reference implementation authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Tables and plots of what `run_ablation.py` found, from its CSVs alone.

    python tests/ablation/make_tables.py

writes `tables.md`, `curves.png` and `signal.png` beside the CSVs, and what the README shows of them. An interval is 95 % of
Student's t over seeds. A gain is over the base model at the same seed, that is with the same prompts and initial noise, and a
difference between two rows is taken seed by seed too.
"""

import argparse
import csv
import functools
import math
import re
from pathlib import Path

import numpy as np


RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent.parent / "README.md"
STEPS = 32  # of tuning and of the comparison
EXTRA_STEPS = 80  # of forward noising: the UNet calls of 32 steps with 10 calls an image, at 4 calls an image
NAMES = {
    "forward_hard": "Diffusion-DPO: forward, hard",
    "ddim_hard": "+ DDIM inversion, 9 moves, hard",
    "last_hard": "+ ReNoise, last of 9 moves, hard",
    "every_hard": "+ ReNoise, every one of 5 moves, hard",
    "last_soft": "+ smoothed labels, last of 9 moves",
    "every_soft": "+ smoothed labels, every one of 5 moves",
    "forward_soft": "forward, smoothed labels",
    "released_hard": "released code, 5 levels, hard",
    "last_mixed_hard": "half random, half last of 9 moves, hard",
    "every_mixed_hard": "half random, half every one of 5 moves, hard",
    "last_mixed_soft": "half random, half last of 9 moves, smoothed labels",
}
SHORT_NAMES = {
    "forward_hard": "forward",
    "ddim_hard": "DDIM",
    "last_hard": "last of 9",
    "every_hard": "every one of 5",
    "last_soft": "last of 9, soft",
    "every_soft": "every one of 5, soft",
    "forward_soft": "forward, soft",
    "released_hard": "released code",
    "last_mixed_hard": "half last of 9",
    "every_mixed_hard": "half every one of 5",
    "last_mixed_soft": "half last of 9, soft",
}
# (a, at its step, b, at its step): what a gains over b
COMPARISONS = [
    ("ddim_hard", STEPS, "forward_hard", STEPS),
    ("last_hard", STEPS, "forward_hard", STEPS),
    ("every_hard", STEPS, "forward_hard", STEPS),
    ("last_hard", STEPS, "forward_hard", EXTRA_STEPS),
    ("every_hard", STEPS, "forward_hard", EXTRA_STEPS),
    ("last_hard", STEPS, "ddim_hard", STEPS),
    ("every_hard", STEPS, "ddim_hard", STEPS),
    ("every_hard", STEPS, "last_hard", STEPS),
    ("last_soft", STEPS, "last_hard", STEPS),
    ("every_soft", STEPS, "every_hard", STEPS),
    ("forward_soft", STEPS, "forward_hard", STEPS),
    ("last_soft", STEPS, "forward_hard", STEPS),
    ("every_soft", STEPS, "forward_hard", STEPS),
    ("last_soft", STEPS, "forward_soft", STEPS),
    ("every_soft", STEPS, "forward_soft", STEPS),
    ("every_soft", STEPS, "last_soft", STEPS),
    ("released_hard", STEPS, "every_hard", STEPS),
    ("last_mixed_hard", STEPS, "last_hard", STEPS),
    ("last_mixed_hard", STEPS, "forward_hard", STEPS),
    ("last_mixed_hard", STEPS, "forward_hard", EXTRA_STEPS),
    ("every_mixed_hard", STEPS, "every_hard", STEPS),
    ("every_mixed_hard", STEPS, "forward_hard", STEPS),
    ("last_mixed_soft", STEPS, "last_mixed_hard", STEPS),
    ("last_mixed_soft", STEPS, "forward_soft", STEPS),
]
HYPER_FIELDS = ["num_inversion_steps", "guidance", "gamma", "beta"]
SIGNAL_NAMES = {
    "forward": "forward",
    "ddim": "DDIM, 9 moves",
    "last": "9 moves, last corrected",
    "every": "5 moves, every one corrected",
    "every_9": "9 moves, every one corrected",
    "released": "released code, 5 levels",
    "last_mixed": "9 moves, last corrected, half random",
    "every_mixed": "5 moves, every one corrected, half random",
    "last_above": "9 moves, last corrected; random from t = 500",
    "every_above": "5 moves, every one corrected; random from t = 500",
    "every_below": "5 moves, every one corrected; random up to t = 499",
    "every_first": "5 moves, every one corrected, the first random",
}
COLORS = [
    "#444444",
    "#1f77b4",
    "#2ca02c",
    "#9467bd",
    "#8fd08f",
    "#c9b3e0",
    "#aaaaaa",
    "#d62728",
    "#f2a0a0",
    "#ff7f0e",
    "#8c564b",
]


# Statistics


def two_sided_p(t, df):
    """P(|T| > |t|) of Student's t. With T = sqrt(df) tan(a) the density of a is proportional to cos(a) ** (df - 1)."""
    angle = math.atan(abs(t) / math.sqrt(df))

    def area(end):
        a = np.linspace(0, end, 20_001)
        return np.trapezoid(np.cos(a) ** (df - 1), a)

    return max(0.0, 1 - area(angle) / area(math.pi / 2))


@functools.cache
def t_quantile(df, confidence=0.95):
    """The t that |T| exceeds with probability 1 - confidence, by bisection."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, df) > 1 - confidence else (low, middle)
    return high


def mean_interval(values):
    """Mean and half of its 95 % interval; the half is NaN for a single value."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return values.mean(), math.nan
    return values.mean(), t_quantile(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))


def paired(a, b):
    """Mean of a - b over the seeds that both have, half of its interval, and the p-value of the paired t-test."""
    seeds = sorted(set(a) & set(b))
    difference = np.array([a[seed] - b[seed] for seed in seeds])
    mean, half = mean_interval(difference)
    if len(seeds) < 2:
        return mean, half, math.nan
    spread = difference.std(ddof=1) / math.sqrt(len(seeds))
    return mean, half, two_sided_p(mean / spread, len(seeds) - 1) if spread else float(mean == 0)


def holm(p_values):
    """p-values adjusted for their number (Holm 1979), in their order."""
    order, adjusted, highest = np.argsort(p_values), np.empty(len(p_values)), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


# Reading


def read_csv(path):
    """Rows of a CSV as dicts of strings; none if there is no such file."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


class Runs:
    """`runs.csv`, looked up by part, name and step."""

    def __init__(self, rows):
        self.rows = [row for row in rows if row["part"] != "base"]
        self.base = {(row["prompts"], row["seed"]): row for row in rows if row["part"] == "base"}

    def names(self, part):
        return list(dict.fromkeys(row["name"] for row in self.rows if row["part"] == part))

    def steps(self, part, name):
        return sorted({int(row["step"]) for row in self.rows if row["part"] == part and row["name"] == name})

    def of(self, part, name, step, score):
        """`{seed: score}`; for "gain" and "judge_gain" over the base at the same seed.

        Raises:
            ValueError: a seed has two results, as when a row was tuned anew and what it gave before is still there.
        """
        found = {}
        for row in self.rows:
            if row["part"] == part and row["name"] == name and int(row["step"]) == step:
                base = self.base[row["prompts"], row["seed"]]
                if score == "gain":
                    value = float(row["reward"]) - float(base["reward"])
                elif score == "judge_gain":
                    value = float(row["judge"]) - float(base["judge"])
                else:
                    value = float(row[score])
                if found.setdefault(row["seed"], value) != value:
                    raise ValueError(
                        f"runs.csv has two results of {part} {name} for seed {row['seed']}, with other learning rates or betas:"
                        " delete those of before the row was tuned anew."
                    )
        return found


# Writing


def table(header, rows):
    return "\n".join(
        ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    )


def with_interval(values, digits=2, sign=False):
    values = list(values)
    if not values:
        return ""
    mean, half = mean_interval(values)
    text = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def inversion_table(rows, pairs):
    """std(tau) / distance of tau to the fine inversion / round trip, means over the seeds, and UNet calls at the last t."""
    rows = [row for row in rows if row["pairs"] == pairs]
    if not rows:
        return ""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    timesteps = sorted({int(row["t"]) for row in rows})
    lines = []
    for variant in variants:
        cells, calls = [], ""
        for t in timesteps:
            chosen = [row for row in rows if row["variant"] == variant and int(row["t"]) == t]
            means = [np.mean([float(row[key]) for row in chosen]) for key in ("std_tau", "distance", "round_trip")]
            cells.append("{:.2f} / {:.2f} / {:.2f}".format(*means) if chosen else "")
            calls = chosen[0]["unet_calls"] if chosen else calls
        lines.append([variant, calls, *cells])
    return table(["variant", f"UNet calls at t = {timesteps[-1]}", *(f"t = {t}" for t in timesteps)], lines)


def largest_spread(rows, keys=("std_tau", "distance", "round_trip")):
    """The largest standard deviation between seeds of any cell of the inversion tables."""
    cells = {}
    for row in rows:
        for key in keys:
            cells.setdefault((row["pairs"], row["variant"], row["t"], key), []).append(float(row[key]))
    return max(np.std(values, ddof=1) for values in cells.values() if len(values) > 1)


def tuning_table(runs, rows):
    """Mean reward gain of every row at every learning rate and beta, the best in bold; few seeds in brackets."""
    tried = {}
    for row in rows:
        if row["part"] == "tune":
            gain = float(row["reward"]) - float(runs.base[row["prompts"], row["seed"]]["reward"])
            setting = float(row["learning_rate"]), float(row["beta"])
            tried.setdefault(row["name"], {}).setdefault(setting, {})[row["seed"]] = gain
    settings = sorted({setting for gains in tried.values() for setting in gains}, key=lambda s: s[::-1])
    lines = []
    for name, by_seed in tried.items():
        gains = {setting: list(found.values()) for setting, found in by_seed.items()}
        most = max(len(found) for found in gains.values())
        best = max((setting for setting in gains if len(gains[setting]) == most), key=lambda s: np.mean(gains[s]))
        texts = [f"{np.mean(gains[setting]):+.1f}" if setting in gains else "" for setting in settings]
        for i, setting in enumerate(settings):
            if setting == best:
                texts[i] = f"**{texts[i]}**"
            elif texts[i] and len(gains[setting]) < most:
                texts[i] = f"({texts[i]})"
        lines.append([NAMES.get(name, name), *texts])
    return table(["row", *(f"lr {rate:g}, beta {beta:g}" for rate, beta in settings)], lines)


def grid_table(runs, part, names):
    if not names:
        return ""
    lines = []
    for name in names:
        for step in runs.steps(part, name):
            if step < STEPS:
                continue
            gain = runs.of(part, name, step, "gain")
            cells = [f"{np.mean(list(runs.of(part, name, step, 'unet_calls').values())):.0f}"]
            cells += [with_interval(gain.values(), sign=True)]
            cells += [with_interval(runs.of(part, name, step, "judge_gain").values(), sign=True)]
            for score, digits in (("accuracy", 3), ("vividness", 3), ("distance", 3), ("diversity", 3)):
                cells.append(with_interval(runs.of(part, name, step, score).values(), digits))
            lines.append([NAMES.get(name, name), step, *cells, len(gain)])
    return table(
        ["row", "steps", "UNet calls", "reward gain", "judge gain", "accuracy", "vividness", "distance to base",
         "diversity", "seeds"],
        lines,
    )  # fmt: skip


def length_table(runs, part, names):
    steps = sorted({step for name in names for step in runs.steps(part, name)})
    lines = [
        [NAMES.get(n, n), *(with_interval(runs.of(part, n, step, "gain").values(), sign=True) for step in steps)]
        for n in names
    ]
    return table(["reward gain after", *(f"{step} steps" for step in steps)], lines)


def long_table(runs):
    """Reward gain of every seed at several lengths, and the UNet calls of the last."""
    names = [name for name in NAMES if name in runs.names("long")]
    if not names:
        return ""
    steps = sorted({step for name in names for step in runs.steps("long", name)})
    lines = []
    for name in names:
        gains = [runs.of("long", name, step, "gain") for step in steps]
        calls = np.mean(list(runs.of("long", name, steps[-1], "unet_calls").values()))
        lines.append(
            [NAMES[name], *(", ".join(f"{gain:+.1f}" for gain in found.values()) for found in gains), f"{calls:.0f}"]
        )
    return table(["reward gain after", *(f"{step} steps" for step in steps), "UNet calls"], lines)


def comparison_table(runs, part):
    """Paired differences of reward and judge gain, with the p-value of the reward adjusted for their number."""
    found = []
    for a, step_a, b, step_b in COMPARISONS:
        first, second = (runs.of(part, name, step, "gain") for name, step in ((a, step_a), (b, step_b)))
        if len(set(first) & set(second)) > 1:
            judges = [runs.of(part, name, step, "judge_gain") for name, step in ((a, step_a), (b, step_b))]
            found.append((a, step_a, b, step_b, paired(first, second), paired(*judges)))
    if not found:
        return ""
    adjusted = holm([reward[2] for *_, reward, _ in found])
    lines = []
    for (a, step_a, b, step_b, reward, judge), p in zip(found, adjusted):
        at = f" ({step_a} and {step_b} steps)" if step_a != step_b else ""
        lines.append(
            [f"{SHORT_NAMES[a]} over {SHORT_NAMES[b]}{at}", f"{reward[0]:+.2f} ± {reward[1]:.2f}", f"{reward[2]:.3f}", f"{p:.3f}",
             f"{judge[0]:+.2f} ± {judge[1]:.2f}", f"{judge[2]:.3f}"]
        )  # fmt: skip
    return table(["difference", "reward", "p", "p, Holm", "judge", "p"], lines)


def few_table(runs, part, base_name, field):
    """One field varied: reward and judge gain, distance; the row it was varied from stands among them, with the same seeds.

    The last columns are the differences to that row, seed by seed.
    """
    wanted = [name for name in runs.names(part) if name.startswith(field)]
    seeds = {seed for name in wanted for seed in runs.of(part, name, STEPS, "gain")}
    base_row = next((row for row in runs.rows if row["part"] == "grid" and row["name"] == base_name), None)
    if not wanted or base_row is None:
        return ""
    base_label = f"{field} {float(base_row[field]):g}" if field else base_row["labels"]
    entries = [(name, part, name) for name in wanted] + [(f"{base_label} (as in the grid)", "grid", base_name)]
    if field:
        entries.sort(key=lambda entry: float(entry[0].split()[1]))

    def of(source, name, score):
        return {seed: value for seed, value in runs.of(source, name, STEPS, score).items() if seed in seeds}

    lines = []
    for label, source, name in entries:
        gain = of(source, name, "gain")
        cells = [f"{np.mean(list(of(source, name, 'unet_calls').values())):.0f}"]
        cells += [
            with_interval(gain.values(), sign=True),
            with_interval(of(source, name, "judge_gain").values(), sign=True),
        ]
        cells += [f"{np.mean(list(of(source, name, 'distance').values())):.3f}"]
        mean, half, p = paired(gain, of("grid", base_name, "gain"))
        cells += [f"{mean:+.2f} ± {half:.2f}", f"{p:.3f}"] if source == part else ["", ""]
        lines.append([label, *cells])
    header = ["value", "UNet calls", "reward gain", "judge gain", "distance to base", "difference of reward", "p"]
    return table(header, lines)


def signal_table(rows, pairs, labels, score):
    """One score by noising and quarter of the timesteps; the cosine also of all of them, and with its interval."""
    bins = ["0", "1", "2", "3"] + (["all"] if score == "cosine" else [])
    cells = {}
    for row in rows:
        if (row["pairs"], row["labels"]) == (pairs, labels) and row["bin"] in bins:
            text = f"{float(row[score]):.3f}" + (f" ± {float(row['half']):.3f}" if score == "cosine" else "")
            cells.setdefault(row["noising"], {})[row["bin"]] = text
    lines = [[SIGNAL_NAMES[name], *(found[b] for b in bins)] for name, found in cells.items()]
    header = ["t in 0-249", "250-499", "500-749", "750-999", "all"][: len(bins)]
    return table([{"std_tau": "std(tau)"}.get(score, score), *header], lines)


def ascent_table(rows, columns):
    """Reward gained by a step along the gradient of each noising, for columns (pairs, labels)."""
    if not rows:
        return ""
    found = {(row["pairs"], row["noising"], row["labels"]): row for row in rows}

    def cell(*key):
        return f"{float(found[key]['gain']):+.2f} ± {1.96 * float(found[key]['error']):.2f}" if key in found else ""

    lines = [
        [SIGNAL_NAMES[name], *(cell(pairs, name, kind) for pairs, kind in columns)]
        for name in SIGNAL_NAMES
        if any((pairs, name, kind) in found for pairs, kind in columns)
    ]
    lines.append(["a random step", cell("", "random", ""), *[""] * (len(columns) - 1)])
    titles = [
        f"{pairs} pairs, {kind} labels".replace("foreign: ", "").replace("each pairs", "each")
        for pairs, kind in columns
    ]
    return table(["along the gradient of", *titles], lines)


def make_tables(results):
    """The text of `tables.md`."""
    rows = read_csv(results / "runs.csv")
    runs, parts = Runs(rows), ["# Tables of the ablation\n\nWritten by `make_tables.py` from the CSVs beside it."]
    inversion = read_csv(results / "inversion.csv")
    if inversion:
        parts.append(
            "## Inversion\n\nEach cell: std(tau) / RMS distance of tau to the fine inversion / RMS of the round trip. The largest"
            f" standard deviation between seeds of any number is {largest_spread(inversion):.3f}."
        )
        sources = dict.fromkeys(row["pairs"] for row in inversion)
        parts += [f"### Pairs: {pairs}\n\n{inversion_table(inversion, pairs)}" for pairs in sources]
    if runs.names("tune"):
        parts.append(
            "## Tuning\n\nMean reward gain at tuning; the best of each row is used. In brackets what was tried with fewer seeds.\n\n"
            + tuning_table(runs, rows)
        )
    titles = {
        "grid": "Grid: foreign pairs, every row tuned",
        "published": "The same learning rate and beta for every row: 1e-5 and 2000",
        "own": "The base model's own samples, learning rate and beta of the grid",
    }
    for part, title in titles.items():
        names = [name for name in NAMES if name in runs.names(part)]
        if names:
            parts.append(f"## {title}\n\n{grid_table(runs, part, names)}\n\n{length_table(runs, part, names)}")
            parts.append(comparison_table(runs, part))
    signal = read_csv(results / "signal.csv")
    if signal:
        parts.append(
            "## Signal at the base model\n\nMean cosine between the gradient of the preference of 80 pairs and the directions in"
            " which the rewards of the base's samples rise, with its interval over the samples."
        )
        for pairs in ("foreign", "own"):
            for kind in ("hard", "soft"):
                parts.append(f"### Pairs: {pairs}, labels: {kind}\n\n{signal_table(signal, pairs, kind, 'cosine')}")
            for score in ("residual", "std_tau"):
                parts.append(signal_table(signal, pairs, "hard", score))
    ascent = read_csv(results / "ascent.csv")
    if ascent:
        parts.append(
            "## What a step along each gradient does to the reward\n\nThe base's weights moved by 3e-4 each, in the direction of the"
            " sign of the gradient of 80 pairs: reward gained, and its 95 % interval over images."
        )
        kinds = dict.fromkeys(row["pairs"] for row in ascent if row["pairs"])
        parts.append(ascent_table(ascent, [(p, kind) for p in ("foreign", "own") for kind in ("hard", "soft")]))
        parts.append(ascent_table(ascent, [(p, "hard") for p in kinds if p.startswith("foreign")]))
    for field in HYPER_FIELDS:
        if text := few_table(runs, "hyper", "last_soft", field):
            parts.append(f"## Hyper-parameters of last_soft: {field}\n\n{text}")
    if text := few_table(runs, "labels", "last_hard", ""):
        parts.append(f"## Label noise (last of 9 moves)\n\n{text}")
    if runs.names("long"):
        parts.append(
            f"## Longer: 32 pairs a step, learning rate 2e-5 and beta 2000 for every row, each seed\n\n{long_table(runs)}"
        )
    return "\n\n".join(part for part in parts if part) + "\n"


# The README's excerpts


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def columns(text, *wanted):
    """Some columns of a table, by their headings; nothing of an empty one."""
    if not text:
        return ""
    lines = [cells_of(line) for line in text.splitlines()]
    places = [lines[0].index(name) for name in wanted]
    return table(wanted, [[line[place] for place in places] for line in lines[2:]])


def readme_tables(results):
    """What the README shows, by the name in its markers."""
    runs = Runs(read_csv(results / "runs.csv"))
    inversion, ascent = read_csv(results / "inversion.csv"), read_csv(results / "ascent.csv")
    grid = grid_table(runs, "grid", [name for name in NAMES if name in runs.names("grid")])
    hyper = [text for field in HYPER_FIELDS if (text := few_table(runs, "hyper", "last_soft", field))]
    lines = [line for text in hyper for line in text.splitlines()[2:] if "as in the grid" not in line]
    hyper = "\n".join([*hyper[0].splitlines()[:2], *lines]) if hyper else ""
    few = ("value", "reward gain", "difference of reward", "p")
    return {
        "grid": columns(grid, "row", "steps", "UNet calls", "reward gain", "judge gain", "distance to base"),
        "comparison": columns(comparison_table(runs, "grid"), "difference", "reward", "p", "p, Holm"),
        "inversion": inversion_table(inversion, "foreign"),
        "ascent": ascent_table(ascent, [(pairs, kind) for pairs in ("foreign", "own") for kind in ("hard", "soft")]),
        "hyper": columns(hyper, *few),
        "labels": columns(few_table(runs, "labels", "last_hard", ""), *few),
        "long": long_table(runs),
    }


def with_tables(text, results):
    """A README with its excerpts as the CSVs have them now; each stands between markers."""
    for name, excerpt in readme_tables(results).items():
        pattern = f"(<!-- ablation: {name} -->\n).*?(<!-- end of ablation -->)"
        text = re.sub(pattern, lambda match: f"{match[1]}{excerpt}\n{match[2]}", text, flags=re.S)
    return text


# Plots


def plot_curves(runs, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in NAMES if name in runs.names("grid")]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.8))
    for name, color in zip(names, COLORS):
        points = []
        for step in runs.steps("grid", name):
            mean, half = mean_interval(list(runs.of("grid", name, step, "gain").values()))
            others = [
                np.mean(list(runs.of("grid", name, step, s).values()))
                for s in ("unet_calls", "judge_gain", "distance")
            ]
            points.append((step, mean, half, *others))
        steps, mean, half, calls, judge, distance = np.array(points).T
        style = {"color": color, "marker": "o", "ms": 3, "label": NAMES[name]}
        axes[0].errorbar(calls / 1000, mean, half, capsize=2, **style)
        axes[1].plot(distance, mean, **style)
        axes[2].plot(distance, judge, **style)
    labels = [
        ("UNet calls (thousands)", "reward gain over base"),
        ("distance to base (RMS)", "reward gain over base"),
        ("distance to base (RMS)", "judge's gain over base"),
    ]
    for axis, (x, y) in zip(axes, labels):
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.grid(alpha=0.3)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=7.5)
    figure.tight_layout(rect=(0, 0.13, 1, 1))  # the legend's room
    figure.savefig(path, dpi=80)


def plot_signal(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    names = list(dict.fromkeys(row["noising"] for row in rows))
    for axis, pairs in zip(axes, ("foreign", "own")):
        for i, (noising, color) in enumerate(zip(names, COLORS)):
            chosen = [
                row for row in rows
                if (row["pairs"], row["noising"], row["labels"]) == (pairs, noising, "hard") and row["bin"] != "all"
            ]  # fmt: skip
            mean, half = ([float(row[key]) for row in chosen] for key in ("cosine", "half"))
            places = np.arange(len(chosen)) + 0.06 * (i - 2.5)
            axis.errorbar(places, mean, half, capsize=2, color=color, marker="o", ms=3, label=SIGNAL_NAMES[noising])
        axis.axhline(0, color="black", lw=0.5)
        axis.set_xticks(range(4), ["0-249", "250-499", "500-749", "750-999"])
        axis.set_xlabel("timesteps")
        axis.set_title(f"{pairs} pairs", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("cosine with the reward's gradients")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the CSVs, and of what is written.")
    parser.add_argument("--no_plots", action="store_true", help="Only the tables; the plots need matplotlib.")
    return parser.parse_args(input_args)


def main(args):
    (args.results / "tables.md").write_text(make_tables(args.results))
    if args.results == RESULTS:
        README.write_text(with_tables(README.read_text(), args.results))
    runs, signal = Runs(read_csv(args.results / "runs.csv")), read_csv(args.results / "signal.csv")
    if not args.no_plots and runs.names("grid"):
        plot_curves(runs, args.results / "curves.png")
    if not args.no_plots and signal:
        plot_signal(signal, args.results / "signal.png")


if __name__ == "__main__":
    main(parse_args())
