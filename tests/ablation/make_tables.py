# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""Tables of what `run_ablation.py` found, from its CSVs alone.

    python tests/ablation/make_tables.py

writes the tables into `README.md`, each between its markers. An interval is 95 % of Student's
t over seeds, of three and more. A gain is over the base model at the same seed, that is with the same prompts and
initial noise, and a difference between two rows is taken seed by seed too.
"""

import argparse
import functools
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd


RESULTS, RESULTS_GPU = (Path(__file__).parent / name for name in ("results", "results_gpu"))
README = Path(__file__).parent / "README.md"
NAMES = {
    "last": "ReNoise, last of 9 moves",
    "ddim": "DDIM, 9 moves",
    "every": "ReNoise, every one of 5 moves",
    "released": "released code, 5 levels",
    "mixed": "half random, half last of 9",
    "every_mixed": "half random, half every one of 5",
    "quarter": "a quarter random, the rest last of 9",
    "overshoot": "DDIM to where the released code ends",
    "forward": "forward (Diffusion-DPO)",
}
DEFAULT, CHEAPEST, COMMON_RATE = "last_soft", "forward_soft", 5e-5


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


def read_runs(path):
    """The runs of a CSV, each with its gain in reward and judge over the base at the same prompts and seed."""
    runs = pd.read_csv(path).drop_duplicates()  # two processes may have met
    base = runs[runs["part"] == "base"].set_index(["prompts", "seed"])[["reward", "judge"]].add_suffix("_of_base")
    runs = runs[runs["part"] != "base"].join(base, on=["prompts", "seed"])
    order = [f"{name}_{labels}" for labels in ("soft", "hard") for name in NAMES]
    runs = runs.sort_values("name", key=lambda names: names.map(order.index), kind="stable")
    runs["gain"], runs["judge_gain"] = (runs[name] - runs[f"{name}_of_base"] for name in ("reward", "judge"))
    return runs


def chosen_by_tuning(reported, tuning):
    """The reports of each row at the rate and step with the best mean gain at tuning."""
    setting = ["name", "learning_rate", "step"]
    means = tuning.groupby(setting)["gain"].mean().reset_index()
    return reported.merge(means.loc[means.groupby("name")["gain"].idxmax(), setting], on=setting)


# Writing


def table(header, rows):
    lines = [f"| {' | '.join(map(str, line))} |" for line in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def title(name):
    noising, _, labels = name.rpartition("_")
    return f"{NAMES[noising]}, {labels}"


def titled(tables):
    """Those of the tables that there are, under their names."""
    return "\n\n".join(f"**{name[0].upper()}{name[1:]}**\n\n{text}" for name, text in tables.items() if text)


def with_interval(values, digits=2, sign=""):
    mean, half = mean_interval(values)
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 2 else "")


def inversion_table(rows):
    """std(tau) / distance of tau to the fine inversion / round trip / residual, means over seeds, and UNet calls."""
    numbers = ["std_tau", "distance", "round_trip", "residual"]
    means = rows.groupby(["variant", "t"])[numbers].mean()
    means = means.apply(lambda row: " / ".join(f"{value:.2f}" for value in row), axis=1).unstack()
    calls = rows[rows["t"] == rows["t"].max()].groupby("variant")["unet_calls"].first()
    lines = [[name, calls[name], *means.loc[name]] for name in rows["variant"].unique()]
    return table(["variant", f"UNet calls at t = {means.columns[-1]}", *(f"t = {t}" for t in means)], lines)


def results_table(runs):
    """Scores of every row and step over the seeds."""
    lines = []
    for (name, step), group in runs.groupby(["name", "step"], sort=False):
        rate = f"{group['learning_rate'].iloc[0]:g}"
        cells = [with_interval(group[score], sign="+") for score in ("gain", "judge_gain")]
        cells += [with_interval(group[score], 3) for score in ("accuracy", "distance", "diversity")]
        lines.append([title(name), rate, step, f"{group['unet_calls'].mean():.0f}", *cells, len(group)])
    header = ["row", "learning rate", "steps", "UNet calls", "reward gain", "judge gain", "accuracy"]
    return table([*header, "distance to base", "diversity", "seeds"], lines)


def comparison_table(pairs_of_runs):
    """Paired differences of reward and judge gain with their p-values, as they are and adjusted for their number.

    Of three seeds and more; None if nothing has as many.

    Args:
        pairs_of_runs: `{text: (runs, other runs)}`, each with a row a seed.
    """
    found = []
    for text, groups in pairs_of_runs.items():
        a, b = (group.set_index("seed") for group in groups)
        if len(a.index.intersection(b.index)) > 2:
            found.append((text, *paired(a["gain"], b["gain"]), *paired(a["judge_gain"], b["judge_gain"])))
    if not found:
        return None
    found = pd.DataFrame(found, columns=["text", "reward", "half", "p", "judge", "judge_half", "judge_p"])
    found["holm"], found["judge_holm"] = holm(found["p"]), holm(found["judge_p"])
    lines = [
        [r.text, f"{r.reward:+.2f} ± {r.half:.2f}", f"{r.p:.3f}", f"{r.holm:.3f}",
         f"{r.judge:+.2f} ± {r.judge_half:.2f}", f"{r.judge_p:.3f}", f"{r.judge_holm:.3f}"]
        for r in found.itertuples()
    ]  # fmt: skip
    return table(["difference", "reward", "p", "p, Holm", "judge", "p", "p, Holm"], lines)


def over(name, step, runs, steps):
    """What every row gains over `name` after `step` steps, itself after `steps`."""
    rows, label = (
        dict(list(runs.groupby(["name", "step"], sort=False))),
        "the default" if name == DEFAULT else title(name),
    )
    words = ("", "") if steps == step else (f", {steps} steps", f", {step} steps")
    others = {f"{title(row)}{words[0]}, over {label}{words[1]}": (rows[row, steps], rows.get((name, step), runs[:0]))
              for row, at in rows if at == steps and row != name}  # fmt: skip
    return comparison_table(others)


def calm_tables(runs):
    """For each source of pairs: every row at one rate, what it gains over two of them, and tuned rows."""
    tables = {}
    for pairs, of_pairs in runs.groupby("pairs"):
        reported = of_pairs[of_pairs["part"] == "calm"]
        same = reported[reported["learning_rate"] == COMMON_RATE]
        first, last = same["step"].min(), same["step"].max()
        tuned = chosen_by_tuning(reported, of_pairs[of_pairs["part"] == "tune"])
        tables |= {
            f"{pairs} pairs": results_table(same),
            f"{pairs} pairs, equal steps": over(DEFAULT, last, same, last),
            f"{pairs} pairs, about equal UNet calls": over(CHEAPEST, last, same, first),
            f"{pairs} pairs, rate and step by the tuning prompts": results_table(tuned) if len(tuned) else None,
        }
    return titled(tables)


def grid_tables(runs):
    """For each source of pairs: every row of the grid as it was tuned, and what it gains over the default."""
    tables = {}
    for pairs, some in runs.groupby("pairs"):
        step = some["step"].max()
        name = f"{pairs} pairs, grid"
        tables |= {name: results_table(some), f"{name}, equal steps": over(DEFAULT, step, some, step)}
    return titled(tables)


def gradients_table(rows):
    """Size, agreement and cosine with forward noise's gradient, of every noising by quarter of t."""
    rows = rows.set_index(["noising", "quarter"])
    cells = rows.apply(lambda row: f"{1000 * row['size']:.2f} / {row['agreement']:.2f} / {row['forward']:.2f}", axis=1)
    lines = [[NAMES[name], *cells[name].sort_index()] for name in NAMES if name in cells]
    return table(["gradient of", *(f"quarter {quarter + 1} of t" for quarter in range(4))], lines)


def make_tables(results):
    """The tables of what there is, by the names in their markers."""
    makers = {
        "runs": lambda path: calm_tables(read_runs(path)),
        "grid": lambda path: grid_tables(read_runs(path)),
        "inversion": lambda path: inversion_table(pd.read_csv(path)),
        "gradients": lambda path: gradients_table(pd.read_csv(path)),
    }
    paths = {name: results / f"{name}.csv" for name in makers}
    return {name: makers[name](path) for name, path in paths.items() if path.exists()}


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
    tables = make_tables(args.results)
    if args.results == RESULTS and RESULTS_GPU.exists():
        tables |= {f"{name} gpu": text for name, text in make_tables(RESULTS_GPU).items()}
    args.readme.write_text(with_tables(args.readme.read_text(), tables))


if __name__ == "__main__":
    main(parse_args())
