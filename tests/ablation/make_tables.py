# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""Tables of what `run_ablation.py` found, from its CSVs alone.

    python tests/ablation/make_tables.py

writes the tables into `README.md`, each between its markers. An interval is 95 % of Student's
t over seeds. A gain is over the base model at the same seed, that is with the same prompts and initial noise, and a
difference between two rows is taken seed by seed too.
"""

import argparse
import functools
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd


RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
NAMES = {
    "forward": "forward (Diffusion-DPO)",
    "ddim": "DDIM, 9 moves",
    "last": "ReNoise, last of 9 moves",
    "every": "ReNoise, every one of 5 moves",
    "every_9": "ReNoise, every one of 9 moves",
    "released": "released code, 5 levels",
    "last_mixed": "half random, half last of 9",
    "every_mixed": "half random, half every one of 5",
}
# "a b": what a gains over b at 32 steps, or at the step after the @
COMPARISONS = """
ddim_hard forward_hard,        last_hard forward_hard,        every_hard forward_hard,
last_hard forward_hard@80,     every_hard forward_hard@80,    last_hard ddim_hard,
every_hard ddim_hard,          every_hard last_hard,          last_soft last_hard,
every_soft every_hard,         forward_soft forward_hard,     last_soft forward_hard,
every_soft forward_hard,       last_soft forward_soft,        every_soft forward_soft,
every_soft last_soft,          released_hard every_hard,      last_mixed_hard last_hard,
last_mixed_hard forward_hard,  last_mixed_hard forward_hard@80,  every_mixed_hard every_hard,
every_mixed_hard forward_hard, last_mixed_soft last_mixed_hard,  last_mixed_soft forward_soft
"""
STEPS = 32


# Statistics


def two_sided_p(t, df):
    """P(|T| > |t|) of Student's t. With T = sqrt(df) tan(a) the density of a is proportional to cos(a) ** (df - 1)."""

    def area(end, n=20_000):  # by the midpoint rule
        return end / n * (np.cos((np.arange(n) + 0.5) * end / n) ** (df - 1)).sum()

    return max(0.0, 1 - area(math.atan(abs(t) / math.sqrt(df))) / area(math.pi / 2))


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
    values = pd.Series(values)
    return values.mean(), t_quantile(len(values) - 1) * values.sem() if len(values) > 1 else math.nan


def paired(a, b):
    """Mean of a - b over the seeds that both have, half of its interval, and the p-value of the paired t-test."""
    difference = (a - b).dropna()
    mean, half = mean_interval(difference)
    spread = difference.sem()
    return mean, half, two_sided_p(mean / spread, len(difference) - 1) if spread else float(mean == 0)


def holm(p_values):
    """p-values adjusted for their number (Holm 1979), in their order."""
    p_values = pd.Series(p_values)
    ordered = p_values.sort_values() * np.arange(len(p_values), 0, -1)
    return ordered.cummax().clip(upper=1).sort_index()


# Reading


def read_runs(results):
    """The runs of `runs.csv`, each with its gain in reward and judge over the base at the same prompts and seed.

    Raises:
        ValueError: a row of the grid has two results, as when it was tuned anew and the old ones are still there.
    """
    runs = pd.read_csv(results / "runs.csv").drop_duplicates()  # two processes may have met
    base = runs[runs["part"] == "base"].set_index(["prompts", "seed"])[["reward", "judge"]].add_suffix("_of_base")
    runs = runs[runs["part"] != "base"].join(base, on=["prompts", "seed"])
    order = [f"{name}_{labels}" for name in NAMES for labels in ("hard", "soft")]
    runs = runs.sort_values("name", key=lambda names: names.map(order.index), kind="stable")
    runs["gain"], runs["judge_gain"] = (runs[name] - runs[f"{name}_of_base"] for name in ("reward", "judge"))
    key = ["name", "pairs", "seed", "step"]
    grid = runs[runs["part"] == "grid"]
    twice = grid[grid.duplicated(key)]
    if len(twice):
        raise ValueError(
            f"runs.csv has two results of {', '.join(map(str, twice[key].iloc[0]))} (name, pairs, seed, step), with"
            " other learning rates or betas: delete those of before the row was tuned anew."
        )
    return runs


def chosen_by_tuning(runs, group):
    """The reports of each group at the setting with the best mean gain on tuning prompts, of those with most seeds."""
    setting = ["name", "learning_rate", "beta", "step"]
    tuning = runs[runs["prompts"] == "tuning"].groupby(setting)["gain"].agg(["mean", "count"]).reset_index()
    tuning = tuning[tuning["count"] == tuning.groupby(group)["count"].transform("max")]
    best = tuning.loc[tuning.groupby(group)["mean"].idxmax(), setting]
    return runs[runs["prompts"] == "report"].merge(best, on=setting)


# Writing


def table(header, rows):
    lines = [f"| {' | '.join(map(str, line))} |" for line in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def title(name):
    noising, _, labels = name.rpartition("_")
    return f"{NAMES[noising]}, {labels}"


def with_interval(values, digits=2, sign=""):
    mean, half = mean_interval(values)
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def inversion_table(rows):
    """std(tau) / distance of tau to the fine inversion / round trip / residual, means over seeds, and UNet calls."""
    numbers = ["std_tau", "distance", "round_trip", "residual"]
    means = rows.groupby(["variant", "t"])[numbers].mean()
    means = means.apply(lambda row: " / ".join(f"{value:.2f}" for value in row), axis=1).unstack()
    calls = rows[rows["t"] == rows["t"].max()].groupby("variant")["unet_calls"].first()
    lines = [[name, calls[name], *means.loc[name]] for name in rows["variant"].unique()]
    return table(["variant", f"UNet calls at t = {means.columns[-1]}", *(f"t = {t}" for t in means)], lines)


def tuning_table(runs):
    """Mean reward gain of every row at every learning rate and beta, the best in bold."""
    means = runs.pivot_table("gain", "name", ["beta", "learning_rate"], sort=False).sort_index(axis=1)
    lines = [
        [title(name), *(f"**{gain:+.1f}**" if gain == gains.max() else f"{gain:+.1f}" for gain in gains)]
        for name, gains in means.iterrows()
    ]
    return table(["row", *(f"lr {rate:g}, beta {beta:g}" for beta, rate in means.columns)], lines)


def results_table(runs):
    """Scores of every row and step over the seeds."""
    lines = []
    for (name, step), group in runs.groupby(["name", "step"], sort=False):
        rate, beta = (f"{group[column].iloc[0]:g}" for column in ("learning_rate", "beta"))
        cells = [with_interval(group[score], sign="+") for score in ("gain", "judge_gain")]
        cells += [with_interval(group[score], 3) for score in ("accuracy", "distance", "diversity")]
        lines.append([title(name), rate, beta, step, f"{group['unet_calls'].mean():.0f}", *cells, len(group)])
    header = ["row", "learning rate", "beta", "steps", "UNet calls", "reward gain", "judge gain", "accuracy"]
    return table([*header, "distance to base", "diversity", "seeds"], lines)


def comparison_table(pairs_of_runs):
    """Paired differences of reward and judge gain with their p-values, as they are and adjusted for their number.

    Args:
        pairs_of_runs: `{text: (runs, other runs)}`, each with a row a seed.
    """
    found = []
    for text, groups in pairs_of_runs.items():
        a, b = (group.set_index("seed") for group in groups)
        if len(a.index.intersection(b.index)) > 1:
            found.append((text, *paired(a["gain"], b["gain"]), *paired(a["judge_gain"], b["judge_gain"])))
    found = pd.DataFrame(found, columns=["text", "reward", "half", "p", "judge", "judge_half", "judge_p"])
    found["holm"], found["judge_holm"] = holm(found["p"]), holm(found["judge_p"])
    lines = [
        [r.text, f"{r.reward:+.2f} ± {r.half:.2f}", f"{r.p:.3f}", f"{r.holm:.3f}",
         f"{r.judge:+.2f} ± {r.judge_half:.2f}", f"{r.judge_p:.3f}", f"{r.judge_holm:.3f}"]
        for r in found.itertuples()
    ]  # fmt: skip
    return table(["difference", "reward", "p", "p, Holm", "judge", "p", "p, Holm"], lines)


def comparisons_of_grid(runs):
    def at(place):
        name, _, step = place.partition("@")
        return runs[(runs["name"] == name) & (runs["step"] == int(step or STEPS))]

    def words(place):
        name, _, step = place.partition("@")
        return title(name) + (f" ({step} steps)" if step else "")

    places = [text.split() for text in COMPARISONS.split(",")]
    return comparison_table({f"{words(a)}, over {words(b)}": (at(a), at(b)) for a, b in places})


def calm_tables(runs):
    """For each source of pairs: equal steps, what rows gain over the default at the last of them, early stopping."""
    texts = []
    for pairs, of_pairs in runs.groupby("pairs"):
        by_step = chosen_by_tuning(of_pairs, ["name", "step"])
        last = dict(list(by_step[by_step["step"] == by_step["step"].max()].groupby("name", sort=False)))
        default = last.pop("last_soft", by_step[:0])
        others = {f"{title(name)}, over the default": (rows, default) for name, rows in last.items()}
        texts += [f"**{pairs} pairs, equal steps**", results_table(by_step), comparison_table(others)]
        texts += [f"**{pairs} pairs, early stopping**", results_table(chosen_by_tuning(of_pairs, ["name"]))]
    return "\n\n".join(texts)


def ascent_table(rows):
    """Reward gained by a step along the gradient of each noising."""
    rows = rows.fillna("").set_index(["noising", "pairs", "labels"])
    cells = {key: f"{row['gain']:+.2f} ± {1.96 * row['error']:.2f}" for key, row in rows.iterrows()}
    columns = [(pairs, kind) for pairs in ("foreign", "own") for kind in ("hard", "soft")]
    lines = [[NAMES[name], *(cells[name, *column] for column in columns)] for name in NAMES]
    lines.append(["a random step", cells["random", "", ""], "", "", ""])
    return table(["along the gradient of", *(f"{pairs} pairs, {kind} labels" for pairs, kind in columns)], lines)


def make_tables(results):
    """The tables of what there is, by the names in their markers."""
    runs = read_runs(results)
    part, pairs = runs["part"], runs["pairs"]
    foreign, own = (runs[(part == "grid") & (pairs == source)] for source in ("foreign", "own"))
    made = {
        "grid": (results_table, foreign[foreign["step"] >= STEPS]),
        "comparison": (comparisons_of_grid, foreign),
        "own": (results_table, own[own["step"] >= STEPS]),
        "own comparison": (comparisons_of_grid, own),
        "tuning": (tuning_table, runs[part == "tune"]),
        "calm": (calm_tables, runs[part == "calm"]),
    }
    for name, maker in {"inversion": inversion_table, "ascent": ascent_table}.items():
        path = results / f"{name}.csv"
        made[name] = maker, pd.read_csv(path) if path.exists() else ()
    return {name: maker(rows) for name, (maker, rows) in made.items() if len(rows)}


def with_tables(text, tables):
    """A text with the tables put between their markers."""
    for name, found in tables.items():
        pattern = f"(<!-- ablation: {name} -->\n).*?(<!-- end of ablation -->)"
        text = re.sub(pattern, lambda match: f"{match[1]}{found}\n{match[2]}", text, flags=re.S)
    return text


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the CSVs.")
    parser.add_argument("--readme", type=Path, default=README, help="File with the markers of the tables.")
    return parser.parse_args(input_args)


def main(args):
    args.readme.write_text(with_tables(args.readme.read_text(), make_tables(args.results)))


if __name__ == "__main__":
    main(parse_args())
