"""
Write study/tables.md and the pictures of the study from study/results/*.json, the files that run.py wrote.

Losses are nats per byte on the same 131,072 validation bytes. "half" and "a quarter" are shares of the experts' FLOPs,
each at the policy with the lowest loss. Errors are standard errors over seeds, of differences paired by seed.
"""

import json
import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
SHARES = {"full width": 1.0, "half": 0.5, "a quarter": 0.25}
RECIPES = ("moe", "mose", "mose-router", "random-experts")
COLOURS = dict(zip(RECIPES, ("#000000", "#0072b2", "#d55e00", "#009e73")))  # for colour-blind readers
SIZES = ("s1", "s2", "s3", "s4")
REGIMES = ("top1", "fine", "shared", "bias")
TABLES = {  # title: (runs, what they are compared with at full width)
    "The trend": [(f"{size}-{recipe}", f"{size}-moe") for size in SIZES for recipe in RECIPES],
    "Equal training FLOPs": [(f"s2-flops-{recipe}", "s2-flops-moe") for recipe in RECIPES],
    "Routing regimes": [(f"s2-{regime}-{recipe}", f"s2-{regime}-moe") for regime in REGIMES for recipe in RECIPES],
    "Baselines": [(f"s2-{name}", "s2-moe") for name in ("m-moe", "half", "quarter", "dense", "flops-half", "flops-quarter")],
}  # fmt: skip


def best(run, share):
    """The lowest loss of a run at a share of its experts' FLOPs, or None if no policy runs so little."""
    return min((p["loss"] for p in run["points"] if p["mean_width"] <= share + 0.005), default=None)


def find(run, policy, budget):
    return next(p for p in run["points"] if p["policy"] == policy and p["budget"] == budget)


def show(values, sign="+"):
    """Mean and standard error of some values, as text."""
    if len(values) < 2:
        return f"{values[0]:{sign}.3f} (one seed)" if values else "–"
    return f"{statistics.mean(values):{sign}.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def differences(runs, standard_runs, share):
    """Loss at a share minus the standard runs' at full width, for every seed that both have."""
    seeds = sorted(seed for seed in runs.keys() & standard_runs.keys() if best(runs[seed], share) is not None)
    return [best(runs[seed], share) - best(standard_runs[seed], 1.0) for seed in seeds]


def losses_table(results, rows):
    yield (
        "| runs | parameters | text, MB | training PFLOPs | "
        + " | ".join(SHARES)
        + " | half minus one expert of `moe` |"
    )
    yield "|---" * 8 + "|"
    for name, standard in rows:
        runs, standard_runs = results.get(name, {}), results.get(standard, {})
        if not runs:
            continue
        r = next(iter(runs.values()))
        cells = [f"{r['parameters'] / 1e6:.2f}M", f"{r['tokens'] / 1e6:.1f}", f"{r['training_flops'] / 1e15:.2f}"]
        for share in SHARES.values():
            losses = [loss for run in runs.values() if (loss := best(run, share)) is not None]
            cells.append(f"{show(losses, '')}, {show(differences(runs, standard_runs, share))}" if losses else "–")
        one_expert = {seed: run for seed, run in standard_runs.items() if run["arguments"].get("top_k", 2) == 2}
        seeds = sorted(runs.keys() & one_expert.keys()) if best(r, 0.5) else []
        cells.append(show([best(runs[s], 0.5) - find(one_expert[s], "top experts", 0.5)["loss"] for s in seeds]))
        yield f"| {name} | " + " | ".join(cells) + " |"


def trained_table(results):
    """Test-time training against gamma = 1 at the same budget, paired by window. The worst of all seeds."""
    yield "| runs | budget | one gamma | a gamma and a budget for each layer |\n|---|---|---|---|"
    for name in (f"{size}-{recipe}" for size in SIZES for recipe in RECIPES[1:]):
        for budget in (0.75, 0.5, 0.375, 0.25, 0.125):
            cells = []
            for policy in ("trained gamma", "trained layers"):
                points = [find(run, policy, budget) for run in results.get(name, {}).values()]
                worst = max(points, key=lambda p: p["minus_router"], default=None)
                cells += [f"{worst['minus_router']:+.4f} ± {worst['minus_router_se']:.4f}"] if worst else []
            if cells:
                yield f"| {name} | {budget} | " + " | ".join(cells) + " |"


def plot_trend(results, path):
    """Loss minus the standard MoE's at full width against parameters, a panel for each share."""
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.8), dpi=130)
    for ax, (title, share) in zip(axes, SHARES.items()):
        for recipe in RECIPES[0 if share < 1 else 1 :]:
            points = []
            for size in SIZES:
                runs = results.get(f"{size}-{recipe}", {})
                values = differences(runs, results.get(f"{size}-moe", {}), share)
                if values:
                    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0
                    points.append((next(iter(runs.values()))["parameters"], statistics.mean(values), error))
            if points:
                ax.errorbar(*zip(*points), marker="o", capsize=3, label=recipe, color=COLOURS[recipe])
        ax.axhline(0, color="grey", linewidth=0.8)
        ax.set(title=title, xlabel="parameters", xscale="log", ylabel="loss minus standard MoE's, nats per byte")
        ax.grid(alpha=0.3)
    axes[-1].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path)


def plot_policies(run, path):
    """The README's picture: loss against the experts' share of FLOPs, for the policies of one checkpoint."""
    fig, ax = plt.subplots(figsize=(7.5, 4.2), dpi=130)
    labels = {
        "uniform": "uniform width", "top experts": "likeliest experts only", "router": "width by router confidence",
        "trained gamma": "the same, test-time training of gamma", "trained layers": "test-time training per layer (ours)",
    }  # fmt: skip
    for policy, colour, marker in zip(labels, ("#e69f00", "#999999", "#56b4e9", "#0072b2", "#d55e00"), "os^vD"):
        points = [run["points"][0], *(p for p in run["points"] if p["policy"] == policy and p["budget"] < 1)]
        points = sorted((p["mean_width"], p["loss"]) for p in points)
        ax.plot(*zip(*points), marker=marker, markersize=5, label=labels[policy], color=colour)
    ax.set(xlabel="share of the experts' FLOPs that runs", ylabel="validation loss (nats per byte)")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path)


def main():
    results = {}  # {name of runs without the seed: {seed: contents of the file}}
    for path in sorted((FOLDER / "results").glob("*.json")):
        run = json.loads(path.read_text())
        results.setdefault(path.stem.rpartition("-")[0], {})[run["seed"]] = run
    lines = [
        "# Tables of the study",
        "\nWritten by `python study/report.py`. " + " ".join(__doc__.split("\n\n")[1].split()),
    ]
    for title, rows in TABLES.items():
        lines += [f"\n## {title}\n", *losses_table(results, rows)]
    lines += ["\n## Test-time training minus gamma = 1, validation text, worst seed\n", *trained_table(results)]
    (FOLDER / "tables.md").write_text("\n".join(lines) + "\n")
    plot_trend(results, FOLDER / "trend.png")
    if "s3-mose" in results:
        plot_policies(next(iter(results["s3-mose"].values())), FOLDER / "policies.png")
    print(f"wrote tables.md, trend.png and policies.png to {FOLDER}")


if __name__ == "__main__":
    main()
