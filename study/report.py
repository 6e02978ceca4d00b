"""
Write study/tables.md and study/trend.png from study/results/*.json, the files that run.py wrote.

Losses are nats per byte on the same 131,072 validation bytes. "half" and "a quarter" are shares of the experts' FLOPs,
each at the policy with the lowest loss. Errors are standard errors over seeds. Differences are paired by seed.
"""

import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
SHARES = ("full width", "half", "a quarter")
RECIPES = ("moe", "mose", "mose-router", "random-experts")
SIZES = ("s1", "s2", "s3", "s4")
TABLES = {  # {title: [(beginning of names of runs, ends of names)]}
    "The trend": [(f"{size}-", RECIPES) for size in SIZES],
    "Equal training FLOPs": [("s2-flops-", (*RECIPES, "m-moe")), ("s3-flops-", RECIPES)],
    "Routing regimes": [(f"s2-{regime}-", RECIPES) for regime in ("top1", "fine", "shared", "bias")],
    "Baselines": [("s2-", ("m-moe", "half", "quarter", "dense", "flops-half", "flops-quarter"))],
}
PAIRS = [("router", "uniform"), ("router", "top experts"), *((f"trained {x}", "router") for x in ("gamma", "layers"))]


def losses(run):
    """{name: loss} of a run: of every policy and budget ("router 0.5"), and of the best policy for each share."""
    found = {f"{p['policy']} {p['budget']}": p["loss"] for p in run["points"]}
    found["full width"] = found["uniform 1.0"]
    for share, width in (("half", 0.5), ("a quarter", 0.25)):
        fitting = [p["loss"] for p in run["points"] if p["mean_width"] <= width + 0.005]
        if fitting:
            found[share] = min(fitting)
    return found


def paired(runs, name, others, other):
    """Differences between two losses, name of `runs` minus other of `others`, for every seed that has both."""
    seeds = sorted(runs.keys() & others.keys())
    return [runs[s][name] - others[s][other] for s in seeds if name in runs[s] and other in others[s]]


def mean_and_error(values):
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def show(values, sign="+"):
    """Mean and standard error of some values, as text."""
    if not values:
        return "–"
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.3f} ± {error:.3f}" if len(values) > 1 else f"{mean:{sign}.3f} (one seed)"


def row(cells):
    return f"| {' | '.join(cells)} |"


def losses_table(results, groups):
    columns = ["runs", "parameters", "text, MB", "training TFLOPs", *(f"{x}, minus `moe`'s full width" for x in SHARES)]
    columns += [*(f"{x} minus `mose`'s" for x in SHARES), "half, minus `moe` with half of its experts"]
    yield row(columns) + "\n" + "|---" * len(columns) + "|"
    for begin, end in ((begin, end) for begin, ends in groups for end in ends):
        runs, moe, mose = (results.get(begin + x, {}) for x in (end, "moe", "mose"))
        if runs:
            r = next(iter(runs.values()))
            cells = [f"{r['parameters'] / 1e6:.2f}M", f"{r['tokens'] / 1e6:.1f}", f"{r['training_flops'] / 1e12:.2f}"]
            for share in SHARES:
                loss = show([run[share] for run in runs.values() if share in run], "")
                cells.append(f"{loss}, {show(paired(runs, share, moe, 'full width'))}")
            cells += [show(paired(runs, share, mose, share)) for share in SHARES]
            yield row([begin + end, *cells, show(paired(runs, "half", moe, "top experts 0.5"))])


def policies_table(results):
    """Differences between two policies at the same budget, and the largest of a seed."""
    columns = ["runs", "budget", *(f"{policy} minus {other} (worst seed)" for policy, other in PAIRS)]
    yield row(columns) + "\n" + "|---" * len(columns) + "|"
    for name in (f"{size}-{recipe}" for size in SIZES for recipe in RECIPES[1:] if f"{size}-{recipe}" in results):
        for b in (0.75, 0.5, 0.375, 0.25, 0.125):
            values = [paired(results[name], f"{x} {b}", results[name], f"{y} {b}") for x, y in PAIRS]
            yield row([name, str(b), *(f"{show(v)} ({max(v):+.4f})" if v else "–" for v in values)])


def plot_trend(results, path):
    """Loss minus the standard MoE's at full width against parameters, a panel for each share."""
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.8), dpi=130)
    for ax, share in zip(axes, SHARES):
        for recipe, colour in zip(RECIPES, ("#000000", "#0072b2", "#d55e00", "#009e73")):  # for colour-blind readers
            points = []
            for size in SIZES:
                runs, standard = results.get(f"{size}-{recipe}", {}), results.get(f"{size}-moe", {})
                values = paired(runs, share, standard, "full width")
                points += [(next(iter(runs.values()))["parameters"] / 1e6, *mean_and_error(values))] if values else []
            if points and (recipe != "moe" or share == "half"):  # moe is far from the others at a quarter
                ax.errorbar(*zip(*points), marker="o", capsize=3, label=recipe, color=colour)
        ax.axhline(0, color="grey", linewidth=0.8)
        ax.set(title=share, xlabel="parameters, millions", xscale="log")
        ax.set_xticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"], minor=False)
        ax.minorticks_off()
    axes[0].set_ylabel("loss minus standard MoE's at full width")
    axes[1].legend(fontsize=8)
    fig.savefig(path, bbox_inches="tight")


def main():
    results = {}  # {name of runs without the seed: {seed: contents of the file}}
    for path in sorted((FOLDER / "results").glob("*.json")):
        run = json.loads(path.read_text())
        results.setdefault(path.stem.rpartition("-")[0], {})[run["seed"]] = run | losses(run)
    for recipe in ("mose", "mose-router"):  # the trend's runs have the FLOPs of the other runs s3-flops
        results[f"s3-flops-{recipe}"] = results.get(f"s3-{recipe}", {})
    lines = ["# Tables of the study\n", "Written by `python study/report.py`.", *__doc__.split("\n\n")[1].splitlines()]
    for title, rows in TABLES.items():
        lines += [f"\n## {title}\n", *losses_table(results, rows)]
    lines += ["\n## Policies\n", *policies_table(results)]
    (FOLDER / "tables.md").write_text("\n".join(lines) + "\n")
    plot_trend(results, FOLDER / "trend.png")
    print(f"wrote tables.md and trend.png to {FOLDER}")


if __name__ == "__main__":
    main()
