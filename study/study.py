"""
The study: what one training buys at every width, against standard MoEs and other recipes, where width matters.

    python study/study.py                              # all rows, two trainings at a time; goes on where it was stopped
    python study/study.py --rows="moe;narrow quarter"  # only these
    python study/study.py --report                     # train nothing: tables and pictures of what is done

Trains every row of ROWS with train.py, seed by seed, into out/study/ROW-SEED, measures it with `bench.py frontier` and
writes study.json, study.md, study.png, training.png and tradeoff.png beside this file.

The model is small for its text on purpose. Where a model is large for its text, narrow training wins for equal FLOPs,
because cheap steps read more text, and nothing that is said about widths means anything.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from model import UsageError  # noqa: E402
from prepare import Parser, open_dataset, run  # noqa: E402
from train import load_checkpoint  # noqa: E402

# on top of `train.py demo`: 12.3M bytes, 1.1 passes over the standard library, for 0.15M parameters
SCALE = dict(
    n_layer=2, n_head=2, n_embd=32, expert_hidden=128, batch_size=32, tokens_per_step=4096, steps=3000,
    learning_rate=8e-3, warmup_steps=100, eval_interval=3000, eval_tokens=131072,
)  # fmt: skip
SMALL = dict(n_expert=32, top_k=8, expert_hidden=32)  # of the same parameters, and as many of them active
MORE = ", equal FLOPs"  # as many training FLOPs as moe, which is more text, or less
FINE = ", fine-grained" + MORE
ROWS = {  # name: (seeds, options of train.py)
    "moe": (3, dict(recipe="moe")),
    "narrow half": (1, dict(recipe="moe", train_width=0.5)),
    "narrow quarter": (3, dict(recipe="moe", train_width=0.25)),
    "narrow half" + MORE: (3, dict(recipe="moe", train_width=0.5, steps=3950)),
    "narrow quarter" + MORE: (3, dict(recipe="moe", train_width=0.25, steps=4694)),
    "mose": (3, dict(recipe="mose")),
    "serve": (3, dict(recipe="serve")),
    "serve" + MORE: (3, dict(recipe="serve", steps=3570)),
    "mose" + MORE: (1, dict(recipe="mose", steps=1705)),
    "m-moe": (3, dict(recipe="m-moe")),
    "m-moe" + MORE: (3, dict(recipe="m-moe", steps=3410)),
    "dense": (3, dict(recipe="moe", n_expert=1, top_k=1, expert_hidden=256)),
    "moe" + FINE: (3, dict(recipe="moe", **SMALL)),
    "serve" + FINE: (3, dict(recipe="serve", steps=3900, **SMALL)),
    "m-moe" + FINE: (3, dict(recipe="m-moe", steps=3830, **SMALL)),
}
LABELS = {
    "serve": "serve, ours", "mose": "mose, the paper's recipe", "m-moe": "m-moe: fewer experts",
    "moe": "standard MoE, fewer experts or skipping", "dense": "dense",
    "serve, fine-grained": "serve, 32 small experts, top-8",
}  # fmt: skip
SHARES = (1.0, 0.75, 0.5, 0.25)
DIFFERENCES = (  # text, then a row, its share, and a row, its share and its policy that is taken away
    ("standard MoE, half width minus full, equal training FLOPs", "narrow half" + MORE, 1.0, "moe"),
    ("standard MoE, a quarter minus full, equal training FLOPs", "narrow quarter" + MORE, 1.0, "moe"),
    ("serve minus moe, full width, equal text", "serve", 1.0, "moe"),
    ("serve minus moe, full width, equal training FLOPs", "serve" + MORE, 1.0, "moe"),
    ("serve at half minus moe at full width, equal training FLOPs", "serve" + MORE, 0.5, "moe"),
    ("serve at half minus one expert of moe's two, equal text", "serve", 0.5, "moe", 0.5, "fewer experts"),
    ("the same, equal training FLOPs", "serve" + MORE, 0.5, "moe", 0.5, "fewer experts"),
    ("serve at three quarters minus moe skipping, equal training FLOPs", "serve" + MORE, 0.75, "moe", 0.75, "skip"),
    ("serve at half minus an MoE trained at half, equal training FLOPs", "serve" + MORE, 0.5, "narrow half" + MORE),
    ("serve at a quarter minus an MoE trained at a quarter, equal text", "serve", 0.25, "narrow quarter"),
    ("the same, equal training FLOPs", "serve" + MORE, 0.25, "narrow quarter" + MORE),
    ("mose minus moe, full width, equal text", "mose", 1.0, "moe"),
    ("mose at a quarter minus an MoE trained at a quarter, equal text", "mose", 0.25, "narrow quarter"),
    ("serve for moe's training FLOPs minus mose for 1.76 times as many, full width", "serve" + MORE, 1.0, "mose"),
    ("the same at half", "serve" + MORE, 0.5, "mose", 0.5),
    ("the same at a quarter", "serve" + MORE, 0.25, "mose", 0.25),
    ("m-moe minus moe, full width, equal training FLOPs", "m-moe" + MORE, 1.0, "moe"),
    ("m-moe at half minus moe at full width, equal training FLOPs", "m-moe" + MORE, 0.5, "moe"),
    ("serve minus m-moe, full width, equal training FLOPs", "serve" + MORE, 1.0, "m-moe" + MORE),
    ("the same at half", "serve" + MORE, 0.5, "m-moe" + MORE, 0.5),
    ("fine-grained: moe minus moe of 8 experts, full width", "moe" + FINE, 1.0, "moe"),
    ("fine-grained: serve minus moe, full width", "serve" + FINE, 1.0, "moe" + FINE),
    ("fine-grained: serve minus m-moe, full width", "serve" + FINE, 1.0, "m-moe" + FINE),
    ("the same at half", "serve" + FINE, 0.5, "m-moe" + FINE, 0.5),
    ("the same at a quarter", "serve" + FINE, 0.25, "m-moe" + FINE, 0.25),
    ("fine-grained serve minus moe of 8 experts, full width", "serve" + FINE, 1.0, "moe"),
    ("the same, half minus full width", "serve" + FINE, 0.5, "moe"),
    ("the same, a quarter minus full width", "serve" + FINE, 0.25, "moe"),
    (
        "fine-grained serve at a quarter minus an MoE trained at a quarter",
        "serve" + FINE,
        0.25,
        "narrow quarter" + MORE,
    ),
)
SEED, EVAL_TOKENS = 1337, 131072

# -----------------------------------------------------------------------------
# Training and measuring


def folder_of(row, seed):
    return Path("out/study") / f"{row.replace(',', '').replace(' ', '-')}-{seed}"


def run_row(row, seed):
    """Train one row with one seed and measure its frontier, going on where an earlier call was stopped. Returns what
    study.json keeps of it.
    """
    options, folder = {**SCALE, **ROWS[row][1]}, folder_of(row, seed)
    folder.mkdir(parents=True, exist_ok=True)
    last, frontier = folder / "last.pt", folder / "frontier.json"
    if frontier.exists():
        saved = load_checkpoint(last)["options"]
        if changed := [name for name, value in options.items() if saved[name] != value]:
            raise UsageError(f"{folder} holds a run with another --{changed[0]} than row {row!r}: move it away")
    else:
        flags = [f"--{name}={value}" for name, value in options.items()] + ["--resume"] * last.exists()
        with open(folder / "output.txt", "a") as output:
            for command in (
                ["train.py", "demo", f"--out_dir={folder}", f"--seed={seed}", *flags],
                ["bench.py", "frontier", str(last), f"--eval_tokens={EVAL_TOKENS}"],
            ):
                command = [sys.executable, str(HERE.parent / command[0]), *command[1:]]
                env = {**os.environ, "OMP_NUM_THREADS": "1"}  # more do not pay for so small a model
                subprocess.run(command, check=True, stdout=output, stderr=output, env=env)
    steps = [entry for entry in map(json.loads, open(folder / "log.jsonl")) if "flops" in entry]
    measured, keep = json.loads(frontier.read_text()), ("policy", "budget", "loss", "flops_total", "flops_expert")
    points = [{key: point[key] for key in keep} for point in measured["points"]]
    where = dict(hardware=measured["hardware"], torch=measured["torch"], eval_tokens=measured["tokens"])
    source = json.loads(Path("data/stdlib/meta.json").read_text())["source"]
    text = dict(source=source, data=load_checkpoint(last, ("data",))["data"])
    return dict(row=row, seed=seed, options=options, flops=steps[-1]["flops"], **where, **text, points=points)


def study(o):
    rows = o.rows.split(";") if o.rows else list(ROWS)
    if unknown := [row for row in rows if row not in ROWS]:
        raise UsageError(f"no row {unknown[0]!r} in the study; there are: {'; '.join(ROWS)}")
    if o.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, not {o.jobs}")
    if not o.report:
        open_dataset("stdlib", 128)  # refuse before anything is spent
    file = HERE / "study.json"
    runs = json.loads(file.read_text()) if file.exists() else []
    done = {(r["row"], r["seed"]): r for r in runs if r["row"] in ROWS}
    tasks = [(row, SEED + i) for i in range(3) for row in rows if i < ROWS[row][0]]
    if "moe" not in rows and not any(row == "moe" for row, _ in done):
        raise UsageError("all rows are compared with moe: add it to --rows")
    if o.report:
        tasks = [task for task in tasks if (folder_of(*task) / "frontier.json").exists()]
    pool = ThreadPoolExecutor(o.jobs)
    futures = {pool.submit(run_row, *task): task for task in tasks}
    try:
        for i, future in enumerate(as_completed(futures), 1):
            done[futures[future]] = future.result()
            runs = sorted(done.values(), key=lambda r: (list(ROWS).index(r["row"]), r["seed"]))
            temporary = file.with_suffix(".tmp")
            temporary.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
            temporary.replace(file)
            print(f"{i} of {len(tasks)}: {futures[future][0]}, seed {futures[future][1]}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C or a failure, start no other row
    report(runs)


# -----------------------------------------------------------------------------
# Tables


def best_at(run, share, policy=None):
    """(loss, policy) of the run's best policy, or of `policy`, where that share of the experts' FLOPs ran; None if no
    curve reaches it.

    What ran is, with router widths, more than the budget; so between two measured points the loss is interpolated
    linearly, which flatters nobody: the curves are convex.
    """
    full, *points = run["points"]
    if share == 1:
        return full["loss"], "full width"
    curves, found = {}, []
    for p in points:
        curves.setdefault(p["policy"], [full]).append(p)
    for name, curve in curves.items():
        ran, loss = zip(*sorted((p["flops_expert"] / full["flops_expert"], p["loss"]) for p in curve), strict=True)
        if ran[0] < share + 0.001 and policy in (None, name):
            found.append((float(np.interp(share, ran, loss)), name))
    return min(found, default=None)


def mean_and_error(values, sign=""):
    """Mean and standard error over seeds, as text."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{error}"


def table(head, rows):
    rows = [head, ["---"] * len(head), *(cells + [""] * (len(head) - len(cells)) for cells in rows)]
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in rows] + [""]


def differences(rows, row, share, other, other_share=1.0, policy=None):
    """The loss of `row` at a share of its experts' FLOPs minus that of `other`, seed by seed: a list."""
    theirs = {run["seed"]: best_at(run, other_share, policy) for run in rows.get(other, [])}
    mine = {run["seed"]: best_at(run, share) for run in rows.get(row, [])}
    return [mine[seed][0] - theirs[seed][0] for seed in mine if mine[seed] and theirs.get(seed)]


def report(runs):
    """study.md and the three pictures."""
    rows = {}
    for one in runs:
        rows.setdefault(one["row"], []).append(one)
    base, first = rows["moe"][0]["flops"], runs[0]
    body = []
    for row, group in rows.items():
        options = {**SCALE, **group[0]["options"]}
        tokens = options["steps"] * options["tokens_per_step"]
        cells = [row, len(group), f"{tokens / 1e6:.1f}M", f"{group[0]['flops'] / base:.2f}"]
        for share in SHARES if not row.startswith("narrow") else (1.0,):  # all of a narrow model is a share already
            found = [best_at(run, share) for run in group]
            cells.append("" if None in found else mean_and_error([loss for loss, _ in found]))
            if share < 1 and cells[-1]:
                cells[-1] += f" ({', '.join(sorted({policy for _, policy in found}))})"
        body.append(cells)
    lines = [
        "Validation loss in nats per byte where that share of the experts' FLOPs ran (linear between measured points),",
        "at the best policy; mean and standard error over seeds. Training FLOPs as multiples of moe's, which are "
        f"{base:.3g}.",
        f"{first['hardware']}; torch {first['torch']}; {first['eval_tokens']:,} validation bytes, evenly spread.",
        f"Text: {first['source']}, {first['data'][0][0]:,} training and {first['data'][1][0]:,} validation bytes; "
        f"CRC-32 of the first megabyte of each {first['data'][0][1][0]:08x} and {first['data'][1][1][0]:08x}.",
        "",
        *table(["training", "seeds", "bytes", "FLOPs", "full", "three quarters", "half", "a quarter"], body),
        "Differences, seed by seed, with their standard error (and each of them):",
        "",
    ]
    body = []
    for text, *comparison in DIFFERENCES:
        if pairs := differences(rows, *comparison):
            body.append([text, mean_and_error(pairs, "+"), ", ".join(f"{p:+.3f}" for p in pairs)])
    lines += table(["", "difference", "seeds"], body)
    (HERE / "study.md").write_text("\n".join(lines))
    print("\n".join(lines))
    plot(rows, base)


# -----------------------------------------------------------------------------
# Pictures

# Okabe and Ito: told apart by everybody
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "sD^vPXo"


def mean_loss(group, share):
    found = [best_at(run, share) for run in group]
    return math.nan if None in found else statistics.mean(loss for loss, _ in found)


def mflops(group, share):
    """Forward MFLOPs per byte, everything counted, where that share of the experts' runs."""
    full = group[0]["points"][0]
    return (full["flops_total"] - (1 - share) * full["flops_expert"]) / 1e6


def finish(fig, axes, name, **labels):
    for ax in axes:
        ax.set(**labels)
        ax.margins(0.1)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    fig.tight_layout()
    fig.savefig(HERE / name)


def plot(rows, base):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # loss against forward FLOPs
    fig, axes = plt.subplots(1, 2, figsize=(11, 6), dpi=130, sharey=True)
    for ax, more, title in zip(axes, ("", MORE), ("the same text", "the same training FLOPs"), strict=True):
        narrow = [rows[row] for row in ("moe", "narrow half" + more, "narrow quarter" + more) if row in rows]
        curve = [(mflops(group, 1.0), mean_loss(group, 1.0)) for group in narrow]
        line = "--" if len(narrow) == 3 else ""  # a line would claim what was not trained
        label = "standard MoEs, one trained for each width"
        ax.plot(*zip(*curve, strict=True), color="k", linestyle=line, marker="o", label=label)
        limit = max(loss for _, loss in curve) + 0.1
        for i, (row, label) in enumerate(LABELS.items()):
            group = rows.get(row + more if row != "moe" else row)
            curve = [(mflops(group, s), mean_loss(group, s)) for s in (1, 0.75, 0.5, 0.375, 0.25)] if group else []
            if curve := [(x, loss) for x, loss in curve if loss < limit]:
                ax.plot(*zip(*curve, strict=True), marker=MARKERS[i], color=COLORS[i], label=label)
        ax.set_title(f"One training, every budget: {title}")
    axes[0].set_ylabel("validation loss (nats per byte), best policy")
    finish(fig, axes, "study.png", xlabel="forward MFLOPs per byte, everything counted")

    # loss against training FLOPs
    fig, axes = plt.subplots(1, 3, figsize=(12, 5), dpi=130)
    for ax, share, narrow in zip(axes, (1.0, 0.5, 0.25), ("moe", "narrow half", "narrow quarter"), strict=True):
        for i, row in enumerate([*LABELS, narrow]):
            groups = [rows[name] for name in (row, row + MORE) if name in rows]
            curve = [(g[0]["flops"] / base, mean_loss(g, 1.0 if row == narrow else share)) for g in groups]
            curve = [(x, loss) for x, loss in curve if loss < mean_loss(rows["moe"], 1.0) + 0.35]
            if curve and not (row == "moe" and i < len(LABELS) and share == 1):  # which is the narrow of width 1
                ax.plot(*zip(*curve, strict=True), marker=MARKERS[i], color=COLORS[i], label=row)
        ax.set_title("full width" if share == 1 else f"{share:g} of the experts' FLOPs")
    axes[0].set_ylabel("validation loss (nats per byte)")
    finish(fig, axes, "training.png", xlabel="training FLOPs, moe's = 1")

    # what full width costs a quarter, and the other way around
    fig, ax = plt.subplots(figsize=(7, 6.5), dpi=130)
    for i, row in enumerate(LABELS):
        for name in (row, row + MORE):
            x, y = [mean_loss(rows[name], share) if name in rows else math.nan for share in (1.0, 0.25)]
            if y < mean_loss(rows["moe"], 1.0) + 0.35:  # not models cut to a width they were not trained for
                ax.plot(x, y, MARKERS[i], color=COLORS[i], markerfacecolor="none" if name != row else None, label=name)
                flops = f"{rows[name][0]['flops'] / base:.2f}"
                ax.annotate(flops, (x, y), xytext=(6, 8), textcoords="offset points")
    for more, style in (("", "-"), (MORE, ":")):
        if "narrow quarter" + more in rows:
            y = mean_loss(rows["narrow quarter" + more], 1.0)
            ax.axhline(y, color="k", linestyle=style, linewidth=1, label=f"narrow quarter{more}, at its own width")
    ax.axvline(mean_loss(rows["moe"], 1.0), color="k", linestyle="--", linewidth=1, label="moe at full width")
    finish(
        fig,
        [ax],
        "tradeoff.png",
        xlabel="loss at full width (numbers: training FLOPs, moe's = 1)",
        ylabel="loss at a quarter of the FLOPs",
    )


# -----------------------------------------------------------------------------


def main():
    parser = Parser(__doc__)
    parser.add_argument("--rows", help="only these, with semicolons between; default all")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time; default 2")
    parser.add_argument("--report", action="store_true", help="train nothing: tables and pictures of what is done")
    study(parser.parse_args())


if __name__ == "__main__":
    run(main, "study.py")
