# Copyright 2026 The SmPO-Diffusion reference implementation authors. Licensed under the Apache License, Version 2.0.
"""Tables of what `run_ablation.py` and `rounds.py` found, from their CSVs alone, and what the rule for the default
says.

    python tests/ablation/make_tables.py

writes the tables into `README.md`, each between its markers. An interval is 95 % of Student's t over seeds, of three
and more. A gain is over the base model at the same seed, that is with the same prompts and initial noise, and a
difference between two rows is taken seed by seed too.
"""

import argparse
import functools
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure


RESULTS, RESULTS_GPU = (Path(__file__).parent / name for name in ("results", "results_gpu"))
README = Path(__file__).parent / "README.md"
NOISINGS = {
    "last": "ReNoise, last of 9 moves",
    "ddim": "DDIM, 9 moves",
    "every": "ReNoise, every one of 5 moves",
    "released": "released code, 5 levels",
    "overshoot": "DDIM to where the released code ends",
    "overshoot_mixed": "half random, half DDIM to there",
    "quarter": "a quarter random, the rest last of 9",
    "mixed": "half random, half last of 9",
    "three_quarters": "three quarters random, the rest last of 9",
    "forward": "forward (Diffusion-DPO)",
}
TITLES = {f"{name}_{labels}": f"{text}, {labels}" for labels in ("soft", "hard") for name, text in NOISINGS.items()}
TITLES |= {
    "by_reference_soft": "ReNoise, last of 9 moves, of the reference, soft",
    "offline": "offline, the base's own pairs",
    "rounds": "rounds, reference from the last one",
    "rounds_to_base": "rounds, reference the base",
    "mix": "rounds, a quarter new pairs, the rest foreign",
    "foreign": "offline, foreign pairs",
}
PAPER, RELEASED, CHEAPEST, COMMON_RATE = "last_soft", "released_soft", "forward_soft", 5e-5
NUM_SEEDS, LEVEL = 10, 0.05  # of the rule for the default


@functools.cache
def student(df, n=200_000):
    """Angles a, and P(|T| <= sqrt(df) tan(a)) of Student's t: the density of a is proportional to cos(a) ** (df -
    1)."""
    angles = (np.arange(n) + 1) * np.pi / 2 / n
    area = np.cumsum(np.cos(angles - np.pi / 4 / n) ** (df - 1))  # by the midpoint rule
    return angles, area / area[-1]


def two_sided_p(t, df):
    return 1 - np.interp(math.atan(abs(t) / math.sqrt(df)), *student(df), left=0)


def t_quantile(df, confidence=0.95):
    """The t that |T| exceeds with probability 1 - confidence."""
    return math.sqrt(df) * math.tan(np.interp(confidence, *student(df)[::-1]))


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
    ordered = p_values.sort_values() * np.arange(len(p_values), 0, -1)
    return ordered.cummax().clip(upper=1).sort_index()


def between_sets(values):
    """Mean and half of its 95 % interval of values `[K]`, each the mean over what one of K sets has with the others.

    By the jackknife: without set k the mean would be (K mean - 2 value_k) / (K - 2).
    """
    k, mean = len(values), values.mean()
    variance = (k - 1) / k * (2 / (k - 2)) ** 2 * ((values - mean) ** 2).sum()
    return mean, t_quantile(k - 1) * variance**0.5


def read_runs(path):
    """The runs of a CSV, each with its gain in reward and judge over the base at the same prompts and seed."""
    runs = pd.read_csv(path).drop_duplicates()  # two processes may have met
    base = runs[runs["part"] == "base"].set_index(["prompts", "seed"])[["reward", "judge"]].add_suffix("_of_base")
    runs = runs[runs["part"] != "base"].join(base, on=["prompts", "seed"])
    runs = runs.sort_values("name", key=lambda names: names.map(list(TITLES).index), kind="stable")
    runs["gain"], runs["judge_gain"] = (runs[name] - runs[f"{name}_of_base"] for name in ("reward", "judge"))
    return runs


def best_by_tuning(tuning):
    """The learning rate and step with the best mean gain of each row."""
    setting = ["name", "learning_rate", "step"]
    means = tuning.groupby(setting)["gain"].mean().reset_index()
    return means.loc[means.groupby("name")["gain"].idxmax(), setting]


def differences(groups, others):
    """Paired differences in reward and judge between runs `{name: runs}` and others, with p-values.

    Of three common seeds and more; `holm` and `judge_holm` are adjusted for the number of differences.
    """
    columns = ["seeds", "reward", "half", "p", "judge", "judge_half", "judge_p"]
    found, others = {}, others.set_index("seed")
    for name, runs in groups.items():
        runs = runs.set_index("seed")
        if (seeds := len(runs.index.intersection(others.index))) > 2:
            found[name] = [seeds, *(x for gain in ("gain", "judge_gain") for x in paired(runs[gain], others[gain]))]
    found = pd.DataFrame.from_dict(found, orient="index", columns=columns)
    return found.assign(holm=holm(found["p"]), judge_holm=holm(found["judge_p"]))


def over(runs, name, step, steps):
    """What every row has gained after `steps` steps over what `name` has after `step`."""
    groups = {row: some for row, some in runs[runs["step"] == steps].groupby("name", sort=False) if row != name}
    return differences(groups, runs[(runs["name"] == name) & (runs["step"] == step)])


def smoothed_over_hard(runs):
    """What smoothed labels have gained over hard ones, noising by noising, in runs of one setting a row."""
    of_row = dict(list(runs.groupby("name")))
    names = [
        (f"{name}_soft", f"{name}_hard") for name in NOISINGS if of_row.keys() >= {f"{name}_soft", f"{name}_hard"}
    ]
    found = [differences({soft: of_row[soft]}, of_row[hard]) for soft, hard in names]
    found = pd.concat([differences({}, runs), *found])
    return found.assign(holm=holm(found["p"]), judge_holm=holm(found["judge_p"]))


def rule(runs):
    """What the rule for the default (README.md) says of every row that may become it, and which one does, as Markdown.

    Of two qualities, reward and judge, both count: a row beats the paper's if it is ahead in both, and is worse if it
    is behind in one.
    """
    calm = runs[(runs["part"] == "calm") & (runs["learning_rate"] == COMMON_RATE)]
    step = calm["step"].max()
    foreign, own = (calm[calm["pairs"] == pairs] for pairs in ("foreign", "own"))
    ahead, on_own = (over(some, PAPER, step, step) for some in (foreign, own))
    candidates = ahead.loc[[name for name in ahead.index if name.endswith("_soft") and name != CHEAPEST]]
    whole = candidates["seeds"] >= NUM_SEEDS
    beats = whole & both_ahead(candidates, "holm", "judge_holm")
    worse = ((on_own["reward"] < 0) & (on_own["p"] < LEVEL)) | ((on_own["judge"] < 0) & (on_own["judge_p"] < LEVEL))
    lines = []
    for name in candidates.index:
        found = f"{'beats' if beats[name] else 'does not beat'} it on foreign pairs"
        if beats[name] and name in worse:
            found += f", is {'worse' if worse[name] else 'not worse'} on own ones ({on_own['seeds'][name]} seeds)"
        elif beats[name]:
            found += ", has not been run on own ones"
        lines.append(f"- {TITLES[name]}: {found if whole[name] else 'too few seeds'}")
    rows = candidates.index[beats]
    if not whole.any() or not rows.isin(worse.index).all():
        return "\n".join([*lines, "", f"**Not decided**: it takes {NUM_SEEDS} seeds, and own pairs of what beats it."])
    rows = [name for name in rows if not worse[name]]
    decided = PAPER if not rows else RELEASED if RELEASED in rows else candidates.loc[rows, "reward"].idxmax()
    others = over(foreign[foreign["name"].isin(rows)], decided, step, step)
    for other in others.itertuples():
        found = f"{other.reward:+.2f} ± {other.half:.2f} in reward (p = {other.p:.3f})"
        found += f", {other.judge:+.2f} ± {other.judge_half:.2f} by the judge (p = {other.judge_p:.3f})"
        lines.append(f"- {TITLES[other.Index]}, over {TITLES[decided]}: {found}")
    better = others[both_ahead(others, "p", "judge_p")]
    decided = better["reward"].idxmax() if len(better) else decided
    return "\n".join([*lines, "", f"**The default by the rule: {TITLES[decided]}.**"])


def both_ahead(found, p, judge_p):
    """Which of some `differences` are above zero, reward and judge, by these columns of p-values."""
    return (found[["reward", "judge"]].min(axis=1) > 0) & (found[[p, judge_p]].max(axis=1) < LEVEL)


def table(header, rows):
    lines = [f"| {' | '.join(map(str, line))} |" for line in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def titled(tables):
    """Those of the tables that there are, under their names."""
    return "\n\n".join(f"**{name[0].upper()}{name[1:]}**\n\n{text}" for name, text in tables.items() if text)


def with_interval(values, digits=2, sign=""):
    mean, half = mean_interval(values)
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 2 else "")


def results_table(runs):
    """Scores of every row and step over the seeds."""
    lines = []
    for (name, step), group in runs.groupby(["name", "step"], sort=False):
        rate = f"{group['learning_rate'].iloc[0]:g}"
        cells = [with_interval(group[score], sign="+") for score in ("gain", "judge_gain")]
        cells += [with_interval(group[score], 3) for score in ("accuracy", "distance", "diversity")]
        lines.append([TITLES[name], rate, step, f"{group['unet_calls'].mean():.0f}", *cells, len(group)])
    header = ["row", "learning rate", "steps", "UNet calls", "reward gain", "judge gain", "accuracy"]
    return table([*header, "distance to base", "diversity", "seeds"], lines)


def comparison_table(found, words):
    """What `differences` found, `words` saying what it is of; None if that is nothing."""
    lines = [
        [words.format(TITLES[r.Index]), f"{r.reward:+.2f} ± {r.half:.2f}", f"{r.p:.3f}", f"{r.holm:.3f}",
         f"{r.judge:+.2f} ± {r.judge_half:.2f}", f"{r.judge_p:.3f}", f"{r.judge_holm:.3f}"]
        for r in found.itertuples()
    ]  # fmt: skip
    return table(["difference", "reward", "p", "p, Holm", "judge", "p", "p, Holm"], lines) if lines else None


def calm_tables(runs):
    """For each source of pairs: every row at one rate, what it gains over two of them, and tuned rows."""
    tables = {}
    for pairs, of_pairs in runs.groupby("pairs"):
        reported = of_pairs[of_pairs["part"] == "calm"]
        same = reported[reported["learning_rate"] == COMMON_RATE]
        first, last = same["step"].min(), same["step"].max()
        tuned = reported.merge(best_by_tuning(of_pairs[of_pairs["part"] == "tune"]))
        cheapest = f"{{}}, {first} steps, over {TITLES[CHEAPEST]}, {last} steps"
        tables |= {
            f"{pairs} pairs": results_table(same),
            f"{pairs} pairs, equal steps": comparison_table(over(same, PAPER, last, last), "{}, over the paper's"),
            f"{pairs} pairs, over hard labels": comparison_table(
                smoothed_over_hard(same[same["step"] == last]), "{}, over hard"
            ),
            f"{pairs} pairs, about equal UNet calls": comparison_table(over(same, CHEAPEST, last, first), cheapest),
            f"{pairs} pairs, rate and step by the tuning prompts": results_table(tuned) if len(tuned) else None,
            f"{pairs} pairs, so tuned, over hard labels": comparison_table(smoothed_over_hard(tuned), "{}, over hard"),
        }
    return titled(tables)


def rounds_tables(runs):
    """For each noising: every way to draw and to refer, and what it gains over one offline run."""
    tables = {}
    for noising, some in runs.groupby("noising"):
        last = some["step"].max()
        found = over(some, "offline", last, last)
        tables |= {
            f"{noising} noising": results_table(some),
            f"{noising} noising, after the last round": comparison_table(found, f"{{}}, over {TITLES['offline']}"),
        }
    return titled(tables)


def inversion_table(rows):
    """std(tau) / distance of tau to the fine inversion / round trip / residual, means over seeds, and UNet calls."""
    numbers = ["std_tau", "distance", "round_trip", "residual"]
    means = rows.groupby(["variant", "t"])[numbers].mean()
    means = means.apply(lambda row: " / ".join(f"{value:.2f}" for value in row), axis=1).unstack()
    calls = rows[rows["t"] == rows["t"].max()].groupby("variant")["unet_calls"].first()
    lines = [[name, calls[name], *means.loc[name]] for name in rows["variant"].unique()]
    return table(["variant", f"UNet calls at t = {means.columns[-1]}", *(f"t = {t}" for t in means)], lines)


def errors_table(rows):
    """What trained policies err more than the reference, in percent of its error, on unseen pairs."""
    lines = []
    for (name, step), some in rows.groupby(["name", "step"], sort=False):
        cells = [with_interval(100 * some[column], 1, "+") for column in ("preferred", "rejected")]
        lines.append([TITLES[name], step, *cells, with_interval(some["accuracy"], 3), len(some)])
    return table(["row", "steps", "preferred", "rejected", "accuracy", "seeds"], lines)


def gradients_table(rows):
    """Size / agreement / agreement with forward noise / std(tau) / residual of every noising by quarter of t."""

    def cell(some):
        cosines = ("{:.2f} ± {:.2f}".format(*between_sets(some[name])) for name in ("agreement", "forward"))
        size, std_tau, residual = some[["size", "std_tau", "residual"]].mean()
        return " / ".join([f"{1000 * size:.2f}", *cosines, f"{std_tau:.2f}", f"{residual:.2f}"])

    cells = {key: cell(some) for key, some in rows.groupby(["noising", "quarter"])}
    lines = [[text, *(cells[name, q] for q in range(4))] for name, text in NOISINGS.items() if (name, 0) in cells]
    picture = "![Agreement of the gradients of different pairs by quarter of t, a line a noising](gradients.png)"
    return picture + "\n\n" + table(["gradient of", *(f"quarter {q + 1} of t" for q in range(4))], lines)


def gradients_picture(rows, path):
    """The two cosines of `gradients_table`, a line a noising."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    titles = {"agreement": "agreement with itself on other pairs", "forward": "agreement with forward noise's"}
    for axes, (column, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
        means = rows.groupby(["noising", "quarter"])[column].mean()
        for i, (name, text) in enumerate(NOISINGS.items()):
            if name in means:
                axes.plot(range(1, 5), means[name], "os^vD"[i % 5] + "-", label=text, color=f"C{i}", markersize=4)
        axes.set_title(title, fontsize="medium")
        axes.set(xlabel="quarter of t", xticks=range(1, 5))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=90)


def make_tables(results):
    """What there is to say, by the names in the markers."""
    makers = {
        "runs": (calm_tables, read_runs, "runs"),
        "rule": (rule, read_runs, "runs"),
        "rounds": (rounds_tables, read_runs, "rounds"),
        "inversion": (inversion_table, pd.read_csv, "inversion"),
        "errors": (errors_table, pd.read_csv, "errors"),
        "gradients": (gradients_table, pd.read_csv, "gradients"),
    }
    paths = {name: results / f"{file}.csv" for name, (_, _, file) in makers.items()}
    return {name: makers[name][0](makers[name][1](path)) for name, path in paths.items() if path.exists()}


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
    print(tables.get("rule", "No runs yet."))
    if (path := args.results / "gradients.csv").exists():
        gradients_picture(pd.read_csv(path), args.readme.parent / "gradients.png")
    if args.results == RESULTS and RESULTS_GPU.exists():
        tables |= {f"{name} gpu": text for name, text in make_tables(RESULTS_GPU).items()}
    args.readme.write_text(with_tables(args.readme.read_text(), tables))


if __name__ == "__main__":
    main(parse_args())
