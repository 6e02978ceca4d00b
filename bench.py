"""
Measure a checkpoint: what quality costs.

    python bench.py frontier                                      # out/demo/ckpt.pt: loss against compute
    python bench.py frontier out/demo/ckpt.pt out/demo-moe/ckpt.pt

frontier runs one checkpoint at budgets from a quarter of its experts to all of them, with each way of spending the
budget, on the same validation text. Checkpoints of recipe moe are shown as they are, with fewer experts, and cut to
a narrower width that they were never trained for. It prints a table and writes frontier.json and frontier.png beside
the first checkpoint.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from model import RouterWidth, UsageError
from prepare import Parser, run
from train import autocast, choose_device, load_model, open_dataset, sequence_losses

BUDGETS = (1.0, 0.75, 0.5, 0.375, 0.25)
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito: told apart by all
MARKERS = "osD^vP*"

# -----------------------------------------------------------------------------
# frontier: loss against FLOPs


def calibrate(model, batches, budget, device, dtype, lr=0.1):
    """Learn the gamma of RouterWidth(budget, gamma) from text alone, with all weights frozen (paper, section 3.3).

    Widths are continuous meanwhile (see SlimmableMoE.fade), so that the loss has a gradient with respect to gamma.
    Adam, not the paper's plain SGD at 0.01: gamma's gradient is about 0.01 nats, so SGD would not leave the start.
    """
    gamma = torch.ones((), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([gamma], lr=lr)
    for idx, targets in batches:
        with autocast(device, dtype):
            loss = model(idx.to(device), targets.to(device), width=RouterWidth(budget, gamma))[1]
        (gamma.grad,) = torch.autograd.grad(loss, gamma)
        optimizer.step()
        with torch.no_grad():
            gamma.clamp_(min=0)
    model.read_stats()
    return gamma.item()


def frontier_points(path, model, checkpoint, val, calibration, device, dtype):
    """Measure every policy and budget of one checkpoint: a list of dicts, one per point, in a fixed order."""
    k, moes = model.config.top_k, [block.mlp for block in model.transformer.h if block.moe]
    tokens = sum(idx.numel() for idx, _ in val)
    points, uniform = [], {}

    def measure(policy, budget, gamma, width, experts=k):
        for moe in moes:
            moe.top_k = experts
        sequence_losses(model, val[:1], width, device, dtype)  # warm up
        model.read_stats()
        started = time.perf_counter()
        losses = sequence_losses(model, val, width, device, dtype).double()
        seconds = time.perf_counter() - started
        mean_width, width_run, _ = model.read_stats() if moes else (1.0, 1.0, None)
        mean_width, width_run = mean_width * experts / k, width_run * experts / k
        for moe in moes:
            moe.top_k = k
        total, expert = model.flops_per_token(width_run)  # counted from what ran
        point = dict(
            checkpoint=str(path), recipe=checkpoint["recipe"], policy=policy, budget=budget, gamma=gamma,
            mean_width=mean_width, loss=losses.mean().item(), flops_total=total, flops_expert=expert,
            tokens_per_s=tokens / seconds,
        )  # fmt: skip
        if checkpoint["tokenizer"] == "byte":
            point["bits_per_byte"] = point["loss"] / math.log(2)
        else:
            point["perplexity"] = math.exp(point["loss"])
        if policy in ("uniform", "truncated"):
            uniform[budget] = losses
        elif budget in uniform:  # the same sequences, so the error of the difference is far below that of the loss
            difference = losses - uniform[budget]
            point["minus_uniform"] = difference.mean().item()
            point["minus_uniform_se"] = (difference.std() / math.sqrt(len(difference))).item()
        points.append(point)

    measure("uniform", 1.0, None, 1.0)
    if checkpoint["recipe"] == "moe":
        if moes:
            for budget in BUDGETS[1:]:
                measure("truncated", budget, None, budget)
            for experts in range(k - 1, 0, -1):
                measure("fewer experts", experts / k, None, 1.0, experts)
        return points
    for budget in tqdm(BUDGETS[1:], desc=str(path), unit=" budgets", disable=None):
        measure("uniform", budget, None, budget)
        measure("router", budget, 1.0, RouterWidth(budget, 1.0))
        gamma = calibrate(model, calibration, budget, device, dtype)
        measure("calibrated", budget, gamma, RouterWidth(budget, gamma))
    return points


def print_frontier(points):
    unit = "bits/byte" if "bits_per_byte" in points[0] else "perplexity"
    print(f"{'policy':<14} {'budget':>6} {'gamma':>6} {'width':>6} {'loss':>7} {unit:>10}  {'minus uniform':>17} "
          f"{'MFLOPs/token':>12} {'experts':>8} {'tokens/s':>9}")  # fmt: skip
    previous = None
    for p in points:
        if p["checkpoint"] != previous:
            previous = p["checkpoint"]
            print(f"{previous} (recipe {p['recipe']})")
        gamma = "" if p["gamma"] is None else f"{p['gamma']:.2f}"
        versus = f"{p['minus_uniform']:+.4f} ± {p['minus_uniform_se']:.4f}" if "minus_uniform" in p else ""
        quality = p.get("bits_per_byte", p.get("perplexity"))
        print(f"{p['policy']:<14} {p['budget']:>6g} {gamma:>6} {p['mean_width']:>6.3f} {p['loss']:>7.4f} {quality:>10.3f}  {versus:>17} "
              f"{p['flops_total'] / 1e6:>12.3f} {p['flops_expert'] / 1e6:>8.3f} {p['tokens_per_s']:>9,.0f}")  # fmt: skip


def plot_frontier(points, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    byte = "bits_per_byte" in points[0]
    curves = {}
    for p in points:
        curves.setdefault((p["checkpoint"], p["policy"]), []).append(p)
    fulls = {p["checkpoint"]: p for p in points if p["mean_width"] == 1}
    for (checkpoint, policy), curve in list(curves.items()):
        full = fulls[checkpoint]
        if policy != "uniform":  # all policies are one at full width
            curve.insert(0, full)
        elif full["recipe"] == "moe":
            curves[checkpoint, "full width"] = curves.pop((checkpoint, policy))
    fig, ax = plt.subplots(figsize=(8, 5), dpi=150)
    for i, ((checkpoint, policy), curve) in enumerate(curves.items()):
        several = len({c for c, _ in curves}) > 1
        label = f"{Path(checkpoint).parent.name}: {policy}" if several else policy
        ax.plot([p["flops_total"] / 1e6 for p in curve], [p["bits_per_byte" if byte else "loss"] for p in curve],
                marker=MARKERS[i % 7], color=COLORS[i % 7], linestyle="--" if curve[0]["recipe"] == "moe" else "-", label=label)  # fmt: skip
    slim = [p["bits_per_byte" if byte else "loss"] for p in points if p["recipe"] != "moe" or p["mean_width"] == 1]
    low, high = min(slim), max(slim)
    if high > low:  # a model cut to a width it was not trained for goes off the scale; the table has it
        ax.set_ylim(low - 0.1 * (high - low), high + 0.6 * (high - low))
    ax.set_xlabel("forward MFLOPs per token, everything counted")
    ax.set_ylabel("validation loss (bits per byte)" if byte else "validation loss (nats per token)")
    ax.set_title("What quality costs: one checkpoint, every budget")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


def frontier(o):
    loaded = [(path, *load_model(path)) for path in o.checkpoints]
    first = loaded[0][2]
    device, dtype, why = choose_device(o.device, o.dtype, first["config"]["n_embd"])
    for path, _, checkpoint in loaded[1:]:
        if (checkpoint["tokenizer"], checkpoint["config"]["block_size"]) != (first["tokenizer"], first["config"]["block_size"]):
            raise UsageError(f"{path} and {o.checkpoints[0]} differ in tokenizer or context: their losses cannot be compared")
    dataset, block_size = o.dataset or first["options"]["dataset"], first["config"]["block_size"]
    train, val, tokenizer, _ = open_dataset(dataset, block_size)
    if tokenizer != first["tokenizer"]:
        raise UsageError(f"{dataset} has {tokenizer} tokens, the checkpoint was trained on {first['tokenizer']}: choose another --dataset")
    val_batches = val.fixed_batches(o.eval_tokens, o.batch_size)
    # the paper's 50 batches of 6 sequences, from the training split and never trained on in this order
    calibration = [train.random_batch(o.seed, 10**9 + i, 0, 6) for i in range(50)]
    print(f"{why}; torch {torch.__version__}; {sum(len(i) for i, _ in val_batches)} validation sequences of {block_size} tokens from {dataset}")

    points = []
    for path, model, checkpoint in loaded:
        points += frontier_points(path, model.to(device), checkpoint, val_batches, calibration, device, dtype)
    print_frontier(points)
    folder = Path(o.checkpoints[0]).parent
    results = dict(
        points=points, dataset=dataset, tokens=sum(i.numel() for i, _ in val_batches), seed=o.seed, hardware=why,
        torch=torch.__version__,
    )  # fmt: skip
    (folder / "frontier.json").write_text(json.dumps(results, indent=2) + "\n")
    plot_frontier(points, folder / "frontier.png")
    print(f"wrote {folder}/frontier.json and {folder}/frontier.png")


# -----------------------------------------------------------------------------


def main():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    p = commands.add_parser("frontier", description="loss against compute, for one checkpoint or several")
    p.add_argument("checkpoints", nargs="*", default=["out/demo/ckpt.pt"], help="default out/demo/ckpt.pt")
    p.add_argument("--dataset", help="default: the one the first checkpoint was trained on")
    p.add_argument("--eval_tokens", type=int, default=131072, help="validation tokens; default 131072")
    p.add_argument("--batch_size", type=int, default=16, help="sequences at a time; default 16")
    p.add_argument("--seed", type=int, default=1337, help="of the calibration batches; default 1337")
    for p in commands.choices.values():
        p.add_argument("--device", default="auto", help="cuda, mps or cpu; default: the first there is")
        p.add_argument("--dtype", default="auto", help="bfloat16 or float32; default: bfloat16 where it is faster")
    o = parser.parse_args()
    frontier(o)


if __name__ == "__main__":
    run(main, "bench.py")
