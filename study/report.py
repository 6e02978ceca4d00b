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
SHARES = {"full width": 1.0, "half": 0.5, "a quarter": 0.25}
RECIPES = ("moe", "mose", "mose-router", "random-experts")
SIZES = ("s1", "s2", "s3", "s4")
REGIMES = ("top1", "fine", "shared", "bias")
TABLES = {  # title: pairs of runs and the standard MoE that they are compared with
    "The trend": [(f"{size}-{recipe}", f"{size}-moe") for size in SIZES for recipe in RECIPES],
    "Equal training FLOPs": [(f"s2-flops-{recipe}", "s2-flops-moe") for recipe in (*RECIPES, "m-moe")]
    + [(name, "s3-flops-moe") for name in ("s3-flops-moe", "s3-mose", "s3-mose-router", "s3-flops-random-experts")],
    "Routing regimes": [(f"s2-{regime}-{recipe}", f"s2-{regime}-moe") for regime in REGIMES for recipe in RECIPES],
    "Baselines": [(f"s2-{x}", "s2-moe") for x in ("m-moe", "half", "quarter", "dense", "flops-half", "flops-quarter")],
}


def best(run, share):
    """The lowest loss of a run at a share of its experts' FLOPs, or None if all policies use more."""
    return min((p["loss"] for p in run["points"] if p["mean_width"] <= share + 0.005), default=None)


def one_expert(run):
    """The loss with one of two experts, or None if the model does not select two."""
    points = run["points"] if run["arguments"].get("top_k", 2) == 2 else []
    return next((p["loss"] for p in points if (p["policy"], p["budget"]) == ("top experts", 0.5)), None)


def mean_and_error(values):
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def show(values, sign="+"):
    """Mean and standard error of some values, as text. Values of None are left out."""
    values = [v for v in values if v is not None]
    if len(values) < 2:
        return f"{values[0]:{sign}.3f} (one seed)" if values else "–"
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.3f} ± {error:.3f}"


def paired(runs, standard, loss, standard_loss):
    """Differences between loss(run) and standard_loss(run) for every seed that both have."""
    pairs = [(loss(runs[seed]), standard_loss(standard[seed])) for seed in sorted(runs.keys() & standard.keys())]
    return [a - b for a, b in pairs if a is not None and b is not None]


def losses_table(results, rows):
    columns = ("runs", "parameters", "text, MB", "training PFLOPs", *SHARES, "half minus one expert of `moe`")
    yield f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|"
    for name, standard_name in rows:
        runs, standard = results.get(name, {}), results.get(standard_name, {})
        for r in list(runs.values())[:1]:
            cells = [f"{r['parameters'] / 1e6:.2f}M", f"{r['tokens'] / 1e6:.1f}", f"{r['training_flops'] / 1e15:.3f}"]
            for share in SHARES.values():
                loss = lambda run, share=share: best(run, share)
                delta = paired(runs, standard, loss, lambda run: best(run, 1.0))
                cells.append(f"{show(map(loss, runs.values()), '')}, {show(delta)}")
            cells.append(show(paired(runs, standard, lambda run: best(run, 0.5), one_expert)))
            yield f"| {name} | " + " | ".join(cells) + " |"


def trained_table(results):
    """Test-time training minus gamma = 1 at the same budget, for the worst seed. Errors are over windows."""
    yield "| runs | budget | one gamma | a gamma and a budget for each layer |\n|---|---|---|---|"
    for name in (f"{size}-{recipe}" for size in SIZES for recipe in RECIPES[1:]):
        points = [p for run in results.get(name, {}).values() for p in run["points"] if "minus_router" in p]
        for budget in sorted({p["budget"] for p in points}, reverse=True):
            cells = []
            for policy in ("trained gamma", "trained layers"):
                same = [p for p in points if (p["policy"], p["budget"]) == (policy, budget)]
                worst = max(same, key=lambda p: p["minus_router"])
                cells.append(f"{worst['minus_router']:+.4f} ± {worst['minus_router_se']:.4f}")
            yield f"| {name} | {budget} | " + " | ".join(cells) + " |"


def plot_trend(results, path):
    """Loss minus the standard MoE's at full width against parameters, a panel for each share."""
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.8), dpi=130)
    for ax, (title, share) in zip(axes, SHARES.items()):
        for recipe, colour in zip(RECIPES, ("#000000", "#0072b2", "#d55e00", "#009e73")):  # for colour-blind readers
            points = []
            for size in SIZES:
                runs, standard = results.get(f"{size}-{recipe}", {}), results.get(f"{size}-moe", {})
                values = paired(runs, standard, lambda run, share=share: best(run, share), lambda run: best(run, 1.0))
                points += [(next(iter(runs.values()))["parameters"] / 1e6, *mean_and_error(values))] if values else []
            if recipe != "moe" or share == 0.5:  # moe is 0 at full width, and far from the others at a quarter
                ax.errorbar(*zip(*points), marker="o", capsize=3, label=recipe, color=colour)
        ax.axhline(0, color="grey", linewidth=0.8)
        ax.set(title=title, xlabel="parameters, millions", xscale="log")
        ax.set_xticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"], minor=False)
        ax.minorticks_off()
    axes[0].set_ylabel("loss minus standard MoE's at full width")
    axes[1].legend(fontsize=8)
    fig.savefig(path, bbox_inches="tight")


def main():
    results = {}  # {name of runs without the seed: {seed: contents of the file}}
    for path in sorted((FOLDER / "results").glob("*.json")):
        run = json.loads(path.read_text())
        results.setdefault(path.stem.rpartition("-")[0], {})[run["seed"]] = run
    lines = ["# Tables of the study\n", "Written by `python study/report.py`.", *__doc__.split("\n\n")[1].splitlines()]
    for title, rows in TABLES.items():
        lines += [f"\n## {title}\n", *losses_table(results, rows)]
    lines += ["\n## Test-time training minus gamma = 1, the worst seed\n", *trained_table(results)]
    (FOLDER / "tables.md").write_text("\n".join(lines) + "\n")
    plot_trend(results, FOLDER / "trend.png")
    print(f"wrote tables.md and trend.png to {FOLDER}")


if __name__ == "__main__":
    main()
