"""
Measure: what quality costs, whether a narrower width is a shorter time, and what tasks a model solves at it.

    python bench.py frontier                                      # out/demo/ckpt.pt: loss against compute
    python bench.py frontier out/demo/ckpt.pt out/demo-moe/ckpt.pt
    python bench.py speed --preset=55m                            # time against width on this machine
    python bench.py speed --checkpoint=out/demo/ckpt.pt --compile
    python bench.py tasks out/55m/ckpt.pt --tasks=lambada_openai,piqa --experts=1,0.5 --budget=0.5 --limit=500

frontier runs every checkpoint at budgets from 0.15 of its experts to all of them, with each way of spending the
budget, on the same validation text: slimmed experts, fewer experts, or skipping those of low probability; also ways
that the recipe did not train for, such as cutting all experts of moe or serve. It prints a table, writes frontier.json
and frontier.png beside the first checkpoint, and beside each the widths that it learned: calibrated.json, which
`sample.py --budget=0.5 --calibrated` serves.

speed times the layer, the training step, prefill and decoding at every width, each beside a dense network of the same
active FLOPs, in turns so that a noisy machine slows both. It prints a table and writes speed.json and speed.png.

tasks runs zero-shot tasks of lm-evaluation-harness (`pip install -r requirements-extras.txt`) at every width: the score
beside chance, and the difference to full width, document by document. It prints a table and writes tasks.json, from
which an interrupted run goes on, and tasks.png.
"""

import dataclasses  # noqa: I001, which wants a line for every name
import difflib
import functools
import hashlib
import json
import logging
import math
import numbers
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

from model import (
    GPT, GRID, MATRICES, MLP, FewerExperts, GPTConfig, KVCache, PerLayer, RouterWidth, SlimmableMoE, Stats, UsageError,
    check_width, width_to_neurons,
)  # fmt: skip
from prepare import get_tokenizer, open_dataset, option, parse, run
from train import (
    PRESETS, TrainConfig, autocast, choose_device, load_checkpoint, load_model, make_config, make_optimizer,
    sequence_losses, to_inference, training_passes,
)  # fmt: skip

# -----------------------------------------------------------------------------
# Results: pictures, files, tables

# Okabe and Ito: told apart by everybody
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vP*"


def draw(path, panels, size=(8, 5)):
    """Write a picture of panels, four in a row. A panel is a dict: `curves`, a list of (label, x, y) or (label, x, y,
    options of matplotlib's errorbar), and what Axes.set takes: title, xlabel, ylabel, ylim ...
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = -(-len(panels) // 4), min(len(panels), 4)
    fig, axes = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), dpi=130, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for ax, panel in zip(axes.flat, panels):
        for i, (label, x, y, *options) in enumerate(panel["curves"]):
            style = dict(color=COLORS[i % 7], marker=MARKERS[(i + i // 7) % 7])
            ax.errorbar(x, y, label=label, **{**style, **(options[0] if options else {})})
        ax.set(**{key: value for key, value in panel.items() if key != "curves"})
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


def write_json(path, results):
    """Write a dict, a line for each key and each element of a list, as a whole or not at all."""
    dump = lambda v: "[\n  " + ",\n  ".join(map(json.dumps, v)) + "\n ]" if isinstance(v, list) else json.dumps(v)
    temporary = Path(f"{path}.tmp")
    temporary.write_text("{\n " + ",\n ".join(f"{json.dumps(k)}: {dump(v)}" for k, v in results.items()) + "\n}\n")
    os.replace(temporary, path)


def read_json(path):
    """What write_json wrote, or {} if there is no such file."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as e:
        raise UsageError(f"{path} is damaged ({e}): delete it, and it will be made anew") from e


def curves(points, value, error=None):
    """Points as curves of `draw` over FLOPs: one for each checkpoint and policy, the first point being full width, at
    which all policies are one. value(point), and error(point), say what to draw."""
    grouped, fulls, lines = {}, {}, []
    for p in points:
        grouped.setdefault((p["checkpoint"], p["policy"]), []).append(p)
        fulls.setdefault(p["checkpoint"], p)
    for (checkpoint, policy), mine in grouped.items():
        full = fulls[checkpoint]
        mine = sorted(mine if full in mine else [full, *mine], key=lambda p: p["flops_total"])
        label = f"{Path(checkpoint).parent.name}/{Path(checkpoint).name}: {policy}" if len(fulls) > 1 else policy
        style = dict(linestyle="--" if full["recipe"] in NOT_SLIM else "-", capsize=3)
        style["yerr"] = error and [error(p) for p in mine]
        lines.append((label, [p["flops_total"] / 1e6 for p in mine], [value(p) for p in mine], style))
    return lines


def print_row(columns, cells):
    """A row of the table whose columns are {name: format}. Its head is print_row(columns, columns)."""
    print(" ".join(f"{cell:{form}}" for cell, form in zip(cells, columns.values())).rstrip(), flush=True)


def mean_and_error(scores):
    """The mean of [(sum, size), ...], one for each document or sequence, and its standard error."""
    value, size = torch.tensor(scores, dtype=torch.float64).T
    mean = value.sum() / size.sum()
    error = (value - mean * size).std(correction=min(1, len(scores) - 1)) / size.mean() / math.sqrt(len(scores))
    return mean.item(), error.item()


# -----------------------------------------------------------------------------
# frontier: loss against FLOPs


@dataclass
class Machine:
    device: str = option("auto", "cuda, mps or cpu; auto takes the first there is")
    dtype: str = option("auto", "bfloat16 or float32; auto takes bfloat16 where it is faster")


@dataclass
class FrontierConfig(Machine):
    """loss against compute, for one checkpoint or several"""

    checkpoints: tuple = option(("out/demo/ckpt.pt",), "of train.py")
    dataset: str = option("", "default: the one the first checkpoint was trained on")
    eval_tokens: int = option(131072, "validation tokens", least=1)
    batch_size: int = option(16, "sequences at a time", least=1)
    seed: int = option(1337, "of the calibration batches", least=0, most=2**63 - 1)


BUDGETS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.2, 0.15)
NOT_SLIM = ("moe", "m-moe")  # recipes that train full width only


class Whole:
    """Width policy: the selected experts for which keep(probs (N, k)) is true run whole, the others not at all."""

    renormalize = True

    def __init__(self, keep):
        self.keep = keep

    def widths(self, probs):
        return self.keep(probs).to(probs.dtype)


def skip(share):
    """Keep the experts whose probability is at least `share` of the likeliest one's."""
    return Whole(lambda probs: probs >= share * probs.amax(-1, keepdim=True))


def top_p(p):
    """Keep the first of the selected experts, until they have more than p of the probability."""
    return Whole(lambda probs: probs.cumsum(-1) - probs <= p * probs.sum(-1, keepdim=True))


class AcrossTokens:
    """Width policy for top_k=1, where a token has nothing to split: w = scale * p^gamma, so that confident tokens get
    more, and the budget holds on average over tokens. fit_scale finds the scale."""

    def __init__(self, budget, gamma, scale):
        self.budget, self.gamma, self.scale = budget, gamma, scale

    def widths(self, probs):
        return ((self.scale * probs**self.gamma).clamp(1 / GRID, 1) * GRID).round() / GRID


def fit_scale(model, batches, budget, gamma, device, dtype):
    """Bisect the scale of AcrossTokens until the measured mean width on batches is the budget."""
    low, high = 0.0, 20.0
    for _ in range(12):
        stats, scale = Stats(model.config, device), (low + high) / 2
        sequence_losses(model, batches, AcrossTokens(budget, gamma, scale), device, dtype, stats)
        low, high = (scale, high) if stats.mean_width(stats.used) < budget else (low, scale)
    return AcrossTokens(budget, gamma, (low + high) / 2)


def calibrate(model, batches, budget, device, dtype, lr=0.1):
    """Learn how to spend a mean width from text alone, all weights frozen: a gamma for each layer, where the paper has
    one for all, and each layer's share of the budget. Returns a PerLayer of RouterWidth (None: no experts).

    Widths are continuous meanwhile (see run_experts), so that the loss has a gradient with respect to both. Adam, not
    the paper's plain SGD at 0.01: gamma's gradient is about 0.01 nats, so SGD would not leave the start.
    """
    moe = [block.moe for block in model.transformer.h]
    gamma = torch.ones(sum(moe), device=device, requires_grad=True)
    share = torch.zeros(sum(moe), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([gamma, share], lr=lr)

    def policies():  # the layers split the sum of their budgets as a token's experts do theirs: none gets more than 1
        continuous = torch.ones((), device=device, requires_grad=True)
        budgets = RouterWidth(budget, continuous).widths(share.softmax(-1).unsqueeze(0))[0]
        learned = iter(zip(budgets, gamma))
        return [RouterWidth(*next(learned)) if is_moe else None for is_moe in moe]

    for i, (idx, targets) in enumerate(batches):
        with autocast(device, dtype):
            loss = model(idx.to(device), targets.to(device), width=PerLayer(policies()))[1]
        gamma.grad, share.grad = torch.autograd.grad(loss, (gamma, share))
        optimizer.param_groups[0]["lr"] = lr * (1 - i / len(batches))
        optimizer.step()
        with torch.no_grad():
            gamma.clamp_(min=0)
    return PerLayer([p and RouterWidth(max(1 / GRID, p.budget.item()), p.gamma.item()) for p in policies()])


def calibrated_file(path):
    """What was learned for the checkpoints in a folder: {file name: {"sha256": of the file, "budgets": {"0.5":
    [(budget, gamma) of every block, None if it has no experts], ...}}, ...}."""
    return Path(path).parent / "calibrated.json"


def fingerprint(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load_calibrated(path, budget):
    """The PerLayer policy that `bench.py frontier` learned for this budget of the checkpoint at path. Raises UsageError
    if it learned none: nothing is interpolated."""
    if not os.path.isfile(path):
        raise UsageError(f"no checkpoint {path}: train.py writes them")
    entry, again = read_json(calibrated_file(path)).get(Path(path).name), f"run `python bench.py frontier {path}`"
    if not entry:
        raise UsageError(f"{path} is not calibrated: {again} first (it needs recipe serve or mose, and top_k above 1)")
    if entry["sha256"] != fingerprint(path):
        raise UsageError(f"{path} has changed since it was calibrated: {again} again")
    if str(float(budget)) not in entry["budgets"]:
        raise UsageError(f"{path} is calibrated for budgets {', '.join(entry['budgets'])}, not for {budget:g}")
    return PerLayer([layer and RouterWidth(*layer) for layer in entry["budgets"][str(float(budget))]])


def share_asked(policy, c):
    """The share of its experts' neurons that FewerExperts asks for, shared ones included: the mean over tokens."""
    n, width = (torch.as_tensor(value, dtype=torch.float64).mean().item() for value in (policy.n, policy.budget))
    return (n + c.n_shared * width) / (c.top_k + c.n_shared)


def experts_for(budget, c):
    """The FewerExperts that asks for that share. Shared experts are whole as long as one expert is."""
    share = budget * (c.top_k + c.n_shared)
    return FewerExperts(share - c.n_shared if share >= 1 + c.n_shared else share / (1 + c.n_shared))


def fewer_experts(n, c):
    """FewerExperts(n), as an option --experts asks for it."""
    if n > c.top_k:
        raise UsageError(f"--experts {n:g}: the router selects {c.top_k}, give at most that many")
    return FewerExperts(n)


def frontier_policies(model, recipe, calibration, device, dtype):
    """What frontier measures, in this order: (what a point says of it, the width or policy)."""
    c, slim = model.config, recipe not in NOT_SLIM
    yield dict(policy="uniform", budget=1.0, gamma=None), 1.0
    if c.n_expert == 1:
        return
    for budget in BUDGETS[1:]:
        yield dict(policy="uniform" if slim else "truncated", budget=budget, gamma=None), budget
        if slim and c.top_k == 1:
            policy = fit_scale(model, calibration[:5], budget, 1.0, device, dtype)
            yield dict(policy="across tokens", budget=budget, gamma=1.0), policy
        elif slim:
            yield dict(policy="router", budget=budget, gamma=1.0), RouterWidth(budget)
            policy = calibrate(model, calibration, budget, device, dtype)
            layers = [(p.budget, p.gamma) for p in policy.policies if p]
            mean = statistics.mean(gamma for _, gamma in layers)
            yield dict(policy="calibrated", budget=budget, gamma=mean, layers=layers), policy
    if c.top_k > 1:
        whole = sorted({c.top_k // 2, c.top_k // 4, 1} - {0}, reverse=True)
        every = [experts_for(budget, c) for budget in BUDGETS[1:]]
        for policy in every if recipe == "serve" else map(FewerExperts, whole):
            yield dict(policy="fewer experts", budget=share_asked(policy, c), gamma=None), policy
        for share in (0.4, 0.7):
            yield dict(policy="skip", budget=None, gamma=None), skip(share)
        for p in (0.4, 0.7) if c.top_k > 2 else ():  # with two experts, it is skipping by another name
            yield dict(policy="top-p", budget=None, gamma=None), top_p(p)


def what_ran(model, stats):
    """Of the forward passes that stats counted: the mean width that was asked for, and FLOPs per token as they ran."""
    used, ran = 1.0, 1.0
    if model.config.n_expert > 1:
        used, ran = (stats.mean_width(neurons).item() for neurons in (stats.used, stats.ran))
    total, expert = model.flops_per_token(ran)
    return dict(mean_width=used, width_run=ran, flops_total=total, flops_expert=expert)


def frontier_points(path, model, checkpoint, val, calibration, device, dtype):
    """Measure every policy and budget of one checkpoint. Returns its points, a list of dicts, and what was learned: its
    entry of calibrated.json."""
    points, uniform, learned, tokens = [], {}, {}, sum(idx.numel() for idx, _ in val)
    for what, width in frontier_policies(model, checkpoint["recipe"], calibration, device, dtype):
        sequence_losses(model, val[:1], width, device, dtype)  # warm up
        stats, started = Stats(model.config, device), time.perf_counter()
        losses = sequence_losses(model, val, width, device, dtype, stats).double()
        seconds = time.perf_counter() - started
        point = dict(checkpoint=str(path), recipe=checkpoint["recipe"], **what, loss=losses.mean().item())
        point.update(what_ran(model, stats), tokens_per_s=tokens / seconds)
        point["budget"] = what["budget"] or point["mean_width"]
        if checkpoint["tokenizer"] == "byte":
            point["bits_per_byte"] = point["loss"] / math.log(2)
        else:
            point["perplexity"] = math.exp(point["loss"])
        if isinstance(width, float):
            uniform[width] = losses
        elif what["budget"] in uniform:  # the same sequences, so the error of the difference is far below the loss's
            difference = [(d, 1) for d in (losses - uniform[what["budget"]]).tolist()]
            point["minus_uniform"], point["minus_uniform_se"] = mean_and_error(difference)
        if what["policy"] == "calibrated":
            learned[str(what["budget"])] = [p and (p.budget, p.gamma) for p in width.policies]
        points.append(point)
        print_point(point, first=len(points) == 1)
    return points, dict(sha256=fingerprint(path), budgets=learned)


def print_point(p, first):
    unit, quality = ("bits/byte", "bits_per_byte") if "bits_per_byte" in p else ("perplexity", "perplexity")
    columns = {"policy": "<14", "budget": ">6", "gamma": ">6", "width": ">6", "loss": ">7", unit: ">10"}
    columns |= {"minus uniform": ">17", "MFLOPs/token": ">12", "experts": ">8", "tokens/s": ">9"}
    if first:
        print(f"\n{p['checkpoint']} (recipe {p['recipe']})")
        print_row(columns, columns)
    gamma = "" if p["gamma"] is None else f"{p['gamma']:.2f}"
    minus = f"{p['minus_uniform']:+.4f} ± {p['minus_uniform_se']:.4f}" if "minus_uniform" in p else ""
    cells = [p["policy"], f"{p['budget']:.3g}", gamma, f"{p['mean_width']:.3f}", f"{p['loss']:.4f}"]
    cells += [f"{p[quality]:.3f}", minus, f"{p['flops_total'] / 1e6:.3f}", f"{p['flops_expert'] / 1e6:.3f}"]
    print_row(columns, [*cells, f"{p['tokens_per_s']:,.0f}"])


def plot_frontier(points, path):
    key, unit = ("bits_per_byte", "bits per byte") if "bits_per_byte" in points[0] else ("loss", "nats per token")
    untrained = lambda p: p["policy"] == "truncated" or (p["recipe"], p["policy"]) == ("serve", "uniform")
    slim = [p[key] for p in points if p["budget"] == 1 or not untrained(p)]
    low, high = min(slim), max(slim)  # a model cut to a width it was not trained for goes off the scale
    panel = dict(curves=curves(points, lambda p: p[key]), title="What quality costs: one checkpoint, every budget")
    panel.update(xlabel="forward MFLOPs per token, everything counted", ylabel=f"validation loss ({unit})")
    if high > low:
        panel["ylim"] = low - 0.1 * (high - low), high + 0.6 * (high - low)
    draw(path, [panel])


def load_models(o):
    """Load checkpoints that can be compared: [(path, model, checkpoint), ...], and the device, dtype and why."""
    loaded = [(path, *load_model(path)) for path in o.checkpoints]
    identity = lambda checkpoint: (checkpoint["tokenizer"], checkpoint["config"]["block_size"])
    for path, _, checkpoint in loaded:
        if identity(checkpoint) != identity(loaded[0][2]):
            raise UsageError(f"{path} and {o.checkpoints[0]} differ in tokenizer or context: they cannot be compared")
    device, dtype, why = choose_device(o.device, o.dtype, max(model.config.n_embd for _, model, _ in loaded))
    return [(path, model.to(device), checkpoint) for path, model, checkpoint in loaded], device, dtype, why


def frontier(o):
    loaded, device, dtype, why = load_models(o)
    first = loaded[0][2]
    dataset, block_size = o.dataset or first["options"]["dataset"], first["config"]["block_size"]
    train, val, tokenizer, _ = open_dataset(dataset, block_size)
    if tokenizer != first["tokenizer"]:
        known = first["tokenizer"]
        raise UsageError(f"{dataset} has {tokenizer} tokens, the checkpoint knows {known}: choose another --dataset")
    if o.eval_tokens < block_size:
        raise UsageError(f"--eval_tokens must be at least one sequence, {block_size}, not {o.eval_tokens}")
    for path in o.checkpoints:
        read_json(calibrated_file(path))  # refuse a damaged one now, not when it is to be extended
    val_batches = val.fixed_batches(o.eval_tokens, o.batch_size)
    # the paper's 50 batches of 6 sequences, from the training split and never trained on in this order
    calibration = [train.random_batch(o.seed, 10**9 + i, 0, 6) for i in range(50)]
    sequences, points = sum(len(idx) for idx, _ in val_batches), []
    print(f"{why}; torch {torch.__version__}; {sequences} sequences of {block_size} validation tokens from {dataset}")
    folder = Path(o.checkpoints[0]).parent
    written = [folder / "frontier.json", folder / "frontier.png"]
    for path, model, checkpoint in loaded:
        mine, learned = frontier_points(path, model, checkpoint, val_batches, calibration, device, dtype)
        points += mine
        if learned["budgets"]:
            written.append(calibrated_file(path))
            write_json(written[-1], {**read_json(written[-1]), Path(path).name: learned})
    results = dict(points=points, dataset=dataset, tokens=sequences * block_size, seed=o.seed, hardware=why)
    write_json(written[0], dict(results, torch=torch.__version__))
    plot_frontier(points, written[1])
    print(f"\nwrote {', '.join(map(str, dict.fromkeys(written)))}")


# -----------------------------------------------------------------------------
# speed: time against width


@dataclass
class SpeedConfig(Machine):
    """time against width, for the layer, training, prefill and decoding"""

    preset: str = option("demo", f"one of {', '.join(PRESETS)}: its sizes, random weights")
    checkpoint: str = option("", "a trained model instead")
    compile: bool = option(False, "also with torch.compile")
    batch_size: int = option(0, "sequences in a training step; 0: 16 on a GPU, 2048 tokens on a CPU", least=0)
    seconds: float = option(15.0, "measuring time for each row", least=0)
    seed: int = option(1337, "of weights and tokens", least=0, most=2**63 - 1)


COLUMNS = (1.0, 0.75, 0.5, 0.25, RouterWidth(0.5))


def nominal_width(column):
    """The width that FLOPs are counted at. With a router budget a little more runs: see plan_chunks in model.py."""
    return column if isinstance(column, float) else column.budget


def timed(run_case, device):
    """The seconds that a call takes, and the bytes that it needs besides weights and optimizer: on a GPU, the allocator
    of a CPU keeps no count."""
    gpu, before = device.startswith("cuda"), 0
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    started = time.perf_counter()
    run_case()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started, torch.cuda.max_memory_allocated(device) - before if gpu else None


def time_in_turns(cases, device, seconds):
    """Run the functions of cases {name: function} in turns for `seconds`, at least 3 times. Returns {name: (median
    seconds, bytes)}."""
    for run_case in cases.values():  # warm up: compilation, caches, lazy initialisation
        run_case()
        run_case()
    times, deadline = {name: [] for name in cases}, time.perf_counter() + seconds
    while time.perf_counter() < deadline or min(map(len, times.values())) < 3:
        for name, run_case in cases.items():
            times[name].append(timed(run_case, device))
    return {name: (statistics.median(t for t, _ in mine), mine[-1][1]) for name, mine in times.items()}


# Each row's cases: {(kind, column): (function, tokens, FLOPs)}. dense: a network of equal active FLOPs


def layer_cases(config, state, device, dtype, compile, n_tokens, backward):
    """The MoE layer alone, with random weights."""
    d, H, k = config.n_embd, config.expert_hidden, config.top_k + config.n_shared
    x = torch.randn(n_tokens, d, device=device, dtype=dtype, requires_grad=backward)
    g, moe = torch.randn_like(x), SlimmableMoE(config).to(device)
    nn.init.normal_(moe.router.weight, std=0.02)
    to_inference(moe, device, dtype).train()

    def case(layer, *width):
        inputs = [x, *layer.parameters()]

        def run_case():
            with torch.set_grad_enabled(backward):
                y = layer(x, *width)
            if backward:
                torch.autograd.grad(y[0] if width else y, inputs, g)

        return run_case

    cases = {}
    for column in COLUMNS:
        h = width_to_neurons(nominal_width(column), H)
        flops = n_tokens * 2 * MATRICES * d * k * h * (3 if backward else 1)
        cases["moe", column] = case(moe, column), n_tokens, flops
        cases["dense", column] = case(MLP(d, k * h).to(device, dtype)), n_tokens, flops
    return cases


def build(config, state, device, compile):
    model = GPT(config).to(device)
    if state is not None:
        model.load_state_dict(state)
    if compile:
        model.body = torch.compile(model.body)
    return model


def build_dense(config, column, device, compile):
    """A dense GPT with the active parameters that the MoE has at this width."""
    h = (config.top_k + config.n_shared) * width_to_neurons(nominal_width(column), config.expert_hidden)
    config = dataclasses.replace(config, n_expert=1, top_k=1, n_shared=0, expert_hidden=h)
    return build(config, None, device, compile)


def train_cases(config, state, device, dtype, compile, batch):
    """Optimizer steps of one micro-batch, as the recipes run it."""
    idx = torch.randint(0, config.vocab_size, (batch, config.block_size), device=device)

    def case(model, *widths, share=None):  # of the passes; share of the experts that runs, if it is not the width
        optimizer = make_optimizer(model, TrainConfig())

        def run_case():
            for width in widths:
                with autocast(device, dtype):
                    _, loss, aux = model(idx, idx, width)
                ((loss + aux) / len(widths)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run_case, idx.numel(), sum(3 * idx.numel() * model.flops_per_token(share or w)[0] for w in widths)

    moe = build(config, state, device, compile)
    o = TrainConfig(recipe="serve", top_k=config.top_k, batch_size=batch, block_size=config.block_size)
    ((served, _),) = training_passes(o, np.random.default_rng(0), device)
    share = round(share_asked(served, config), 2)
    dense = case(build_dense(config, 1.0, device, compile), 1.0)
    cases = {("moe", 1.0): case(moe, 1.0), ("dense", 1.0): dense, ("serve", share): case(moe, served, share=share)}
    return {**cases, ("mose", 0.5): case(moe, 1.0, 0.5), ("mose", 0.25): case(moe, 1.0, 0.25)}


def inference_cases(config, state, device, dtype, compile, batch, seen, new):
    """Forward passes over `new` tokens after `seen` ones that are in the cache already."""

    def case(model, width):
        to_inference(model, device, dtype)
        cache = KVCache(config)
        idx = torch.randint(0, config.vocab_size, (batch, max(seen, new)), device=device)
        with torch.no_grad():
            if seen:
                model(idx[:, :seen], width=width, cache=cache)

        @torch.no_grad()
        def run_case():
            cache.length = seen
            model(idx[:, :new], width=width, cache=cache)

        # the head runs at the last position only
        flops = new * model.flops_per_token(nominal_width(width), seen + new)[0]
        return run_case, batch * new, batch * (flops - (new - 1) * 2 * config.n_embd * config.vocab_size)

    moe, cases = build(config, state, device, compile), {}
    for column in COLUMNS:
        cases["moe", column] = case(moe, column)
        cases["dense", column] = case(build_dense(config, column, device, compile), 1.0)
    return cases


def speed(o):
    if o.preset not in PRESETS:
        raise UsageError(f"--preset must be one of {', '.join(PRESETS)}, not {o.preset!r}")
    if o.checkpoint:
        checkpoint = load_checkpoint(o.checkpoint)
        config, state = GPTConfig(**checkpoint["config"]), checkpoint["model"]
        folder, name = Path(o.checkpoint).parent, o.checkpoint
    else:
        config, state = make_config(TrainConfig(**PRESETS[o.preset]), 257 if o.preset == "demo" else 50257), None
        folder, name = Path("out") / o.preset, o.preset
    if config.n_expert == 1:
        raise UsageError(f"{name} is a dense model: there is no width to measure")
    device, dtype, why = choose_device(o.device, o.dtype, config.n_embd)
    print(f"{name} on {why}; torch {torch.__version__}; median of turns, {o.seconds:g} s a row")
    T, gpu, results = config.block_size, device.startswith("cuda"), []
    n_tokens, batch = 32768 if gpu else 4096, o.batch_size or (16 if gpu else max(1, 2048 // T))
    rows = {
        "layer forward": (layer_cases, n_tokens, False),
        "layer forward and backward": (layer_cases, n_tokens, True),
        "training step": (train_cases, batch),
        "prefill": (inference_cases, 1, 0, T),
        "decode, batch 1": (inference_cases, 1, T // 2, 1),
        "decode, batch 16": (inference_cases, 16, T // 2, 1),
        "decode, batch 1, context a tenth full": (inference_cases, 1, T // 10, 1),
        "decode, batch 1, context nine tenths full": (inference_cases, 1, T * 9 // 10, 1),
    }
    for mode in ("eager", "compile") if o.compile else ("eager",):
        for row, (make_cases, *sizes) in rows.items():
            if mode == "compile" and make_cases == layer_cases:
                continue  # seen inside the training step
            torch.manual_seed(o.seed)
            cases = make_cases(config, state, device, dtype, mode == "compile", *sizes)
            times = time_in_turns({key: f for key, (f, _, _) in cases.items()}, device, o.seconds)
            for (kind, column), (_, tokens, flops) in cases.items():
                seconds, memory = times[kind, column]
                base = ("dense" if kind == "dense" else "moe", 1.0)
                result = dict(row=row, mode=mode, kind=kind, width=nominal_width(column), seconds=seconds)
                result.update(column="uniform" if isinstance(column, float) else "router", working_bytes=memory)
                result.update(tokens_per_s=tokens / seconds, flops_per_s=flops / seconds)
                # against the time that the FLOPs predict from the MoE's at full width: 1 means FLOPs are time
                result["vs_flops"] = seconds / times[base][0] / (flops / cases[base][2])
                if kind != "dense" and ("dense", column) in times:
                    result["vs_dense"] = seconds / times["dense", column][0] / (flops / cases["dense", column][2])
                results.append(result)
                print_speed(result, first=(kind, column) == next(iter(cases)))
    folder.mkdir(parents=True, exist_ok=True)
    report = dict(results=results, model=name, config=dataclasses.asdict(config), hardware=why)
    write_json(folder / "speed.json", dict(report, torch=torch.__version__, seed=o.seed))
    plot_speed(results, folder / "speed.png")
    print(f"\nwrote {folder}/speed.json and {folder}/speed.png")


def print_speed(r, first):
    columns = {"": "<16", "ms": ">9", "tokens/s": ">10", "GFLOP/s": ">8", "work MB": ">8"}
    columns |= {"x FLOPs": ">8", "x dense": ">8"}
    if first:
        print(f"\n{r['row']} ({r['mode']})")
        print_row(columns, columns)
    label = f"{r['kind']} {r['width']:g}" + (" router" if r["column"] == "router" else "")
    cells = [label, f"{r['seconds'] * 1e3:.2f}", f"{r['tokens_per_s']:,.0f}", f"{r['flops_per_s'] / 1e9:.0f}"]
    cells += ["" if r["working_bytes"] is None else f"{r['working_bytes'] / 1e6:.0f}", f"{r['vs_flops']:.2f}"]
    print_row(columns, [*cells, f"{r['vs_dense']:.2f}" if "vs_dense" in r else ""])


def plot_speed(results, path):
    panels = []
    for row in ("layer forward", "layer forward and backward", "prefill", "decode, batch 1"):
        curves = {}
        for r in [r for r in results if r["row"] == row]:
            label = ("MoSE" if r["kind"] == "moe" else "dense, equal FLOPs") + f", {r['mode']}" * (r["mode"] != "eager")
            curves.setdefault(label + ", router widths" * (r["column"] == "router"), []).append(r)
        lines = [(label, [r["width"] for r in c], [r["seconds"] * 1e3 for r in c]) for label, c in curves.items()]
        panels.append(dict(curves=lines, title=row, xlabel="mean width of the experts", ylabel="milliseconds"))
    draw(path, panels, size=(4, 4))


# -----------------------------------------------------------------------------
# tasks: zero-shot tasks of lm-evaluation-harness


@dataclass
class TasksConfig(Machine):
    """zero-shot tasks of lm-evaluation-harness at every width"""

    checkpoints: tuple = option(("out/demo/ckpt.pt",), "of train.py")
    tasks: str = option("", "names of tasks and groups of lm_eval, with commas between")
    width: str = option("1", "uniform widths, with commas between; 1 always runs")
    experts: str = option("", "numbers of the likeliest experts, with commas between; 0.5 is half of one")
    budget: str = option("", "router budgets, with commas between")
    calibrated: bool = option(False, "spend them as `bench.py frontier` learned it")
    limit: int = option(10**9, "documents of a task, at most", least=1)
    include_path: str = option("", "a folder with task files of your own")
    batch_size: int = option(16, "texts at a time", least=1)
    dtype: str = option("float32", "or bfloat16, in which an answer can depend on those that are batched with it")


class Scorer:
    """What lm_eval asks of a model, here at one width. load_tasks gives it TemplateLM as a base, which makes tokens of
    a context and its continuation: trailing spaces go to the latter, end-of-text stands for an empty context only."""

    def __init__(self, model, checkpoint, width, device, dtype, batch_size, name):
        super().__init__()
        self.model, self.width, self.n_vocab, self.name = model, width, checkpoint["vocab_size"], name
        self.tokenizer, self.stats = get_tokenizer(checkpoint["tokenizer"]), Stats(model.config, device)
        self.where, self.dtype, self.batch_size = device, dtype, batch_size

    @property
    def eot_token_id(self):
        return self.tokenizer.eot_token

    def tok_encode(self, string, **kwargs):
        return self.tokenizer.encode_ordinary(string)

    def loglikelihood(self, requests):
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests):
        texts = [(r.args, [], self.tok_encode(*r.args)) for r in requests]
        return [total for total, _ in self._loglikelihood_tokens(texts)]

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm=True):
        """[(texts, context, continuation), ...] -> [(log-probability of the continuation, whether greedy decoding gives
        it), ...]. The context is cut from the left; a continuation longer than the model's context runs in pieces."""
        block, rows, answers = self.model.config.block_size, [], [(0.0, True)] * len(requests)
        for i, (_, context, continuation) in enumerate(requests):
            ids = [*(context or [self.eot_token_id]), *continuation]
            for at in range(len(ids) - len(continuation), len(ids), block):  # the last n of a row are scored
                rows.append((i, ids[: at + block][-block - 1 :], min(block, len(ids) - at)))
        rows.sort(key=lambda row: -len(row[1]))  # like lengths together
        progress = tqdm(total=len(rows), desc=self.name, leave=False, disable=None)
        for at in range(0, len(rows), self.batch_size):
            batch = rows[at : at + self.batch_size]
            both = torch.zeros(len(batch), len(batch[0][1]), dtype=torch.long)  # padded on the right, where none looks
            scored = torch.zeros_like(both[:, 1:], dtype=torch.bool)
            for b, (_, ids, n) in enumerate(batch):
                both[b, : len(ids)] = torch.tensor(ids)
                scored[b, len(ids) - 1 - n : len(ids) - 1] = True
            idx, targets, scored = (t.to(self.where) for t in (both[:, :-1], both[:, 1:][scored], scored))
            # the head runs where it is asked: logits are (scored positions, vocabulary)
            only = self.model.lm_head.register_forward_pre_hook(lambda head, x, scored=scored: x[0][scored])
            with only, autocast(self.where, self.dtype):
                logits = self.model(idx, width=self.width, stats=self.stats)[0][:, : self.n_vocab]
            pieces = zip(logits.split(32), targets.split(32))  # what a cache holds
            loss = torch.cat([F.cross_entropy(l.float(), t, reduction="none") for l, t in pieces]).tolist()
            greedy, start = (logits.argmax(-1) == targets).tolist(), 0
            for i, _, n in batch:
                part, (total, all_greedy) = slice(start, start + n), answers[i]
                answers[i] = total - sum(loss[part]), all_greedy and all(greedy[part])
                start += n
            progress.update(len(batch))
        progress.close()
        return answers

    def generate_until(self, requests):
        from lm_eval.models.utils import normalize_gen_kwargs

        texts, block = [], self.model.config.block_size
        for context, options in tqdm([r.args for r in requests], desc=self.name, leave=False, disable=None):
            options, new, text = normalize_gen_kwargs(options), [], [""]
            if options["do_sample"]:
                raise UsageError(f"{self.name} asks for random samples: only greedy generation is supported")
            n, stop = options["max_gen_toks"], "|".join(re.escape(s) for s in ["<|endoftext|>", *options["until"]] if s)
            ids = self.tok_encode(context)[-max(block // 2, block - n) :] or [self.eot_token_id]
            idx = torch.tensor([ids], device=self.where)
            for token in self.model.stream(idx, n, 0, None, self.width, self.n_vocab, stats=self.stats):
                new.append(token.item())
                text = re.split(stop, self.tokenizer.decode_bytes(new).decode(errors="replace"))
                if len(text) > 1:
                    break
            texts.append(text[0])
        return texts


def load_tasks(names, o):
    """Returns Scorer as a model of lm_eval, {task: its object, all requests built} and {group: object}."""
    try:
        import datasets
        import lm_eval.api.task
        from lm_eval.api.model import TemplateLM
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise UsageError(f"lm_eval is missing ({e}): run `pip install -r requirements-extras.txt`") from e
    if o.include_path and not os.path.isdir(o.include_path):
        raise UsageError(f"--include_path must be a folder of task files, not {o.include_path}")
    for library in ("lm_eval", "datasets", "huggingface_hub"):  # the error below says it all
        logging.getLogger(library).setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = functools.partial(tqdm, leave=False, disable=None)  # as ours: for terminals
    for stock in (False, True) if o.include_path else (True,):  # lm_eval's own are 14,000 files: if need be
        manager = TaskManager(include_path=o.include_path or None, include_defaults=stock)
        if set(names) <= set(manager.all_subtasks):
            break
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            raise UsageError(f"lm_eval knows no task {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    doing = f"loading {', '.join(names)}"
    try:
        loaded = manager.load(names)
        for name, task in loaded["tasks"].items():
            doing = f"building {name}"
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise ValueError("its answers are run as code, or it needs more than text")
            task.set_fewshot_seed(1234)  # the seed of lm_eval's command line
            task.build_all_requests(limit=o.limit)
            task.doc_to_target(task.instances[0].doc)  # refuses a field that is missing
            task.build_all_requests = functools.partial(forget_answers, task)  # lm_eval calls it for every width
    except Exception as e:  # lm_eval's, its libraries', or of a task's own code
        raise UsageError(f"{doing}: {type(e).__name__}: {' '.join(str(e).split())[:300]}") from e
    return type("LM", (Scorer, TemplateLM), {}), loaded["tasks"], loaded["groups"]


def forget_answers(task, **options):
    for request in task.instances:
        request.resps, request.filtered_resps = [], {}


def task_widths(o, path, model):
    """{(policy, budget): width or policy} to run a checkpoint at; full width first, the others are compared with it."""
    try:
        options = o.width, o.experts, o.budget
        uniform, experts, budgets = ([float(w) for w in text.split(",") if w] for text in options)
    except ValueError:
        raise UsageError(
            "--width, --experts and --budget must be numbers with commas between, like 1,0.5, not "
            + ", ".join(map(repr, options))
        ) from None
    if o.calibrated and not budgets:
        raise UsageError("--calibrated says how --budget is spent: give --budget too")
    if model.config.n_expert == 1 and (experts or budgets or set(uniform) != {1.0}):
        raise UsageError(f"{path} is a dense model, without experts: leave out --width, --experts and --budget")
    for width in uniform:
        check_width(width, "--width")
    widths = {("uniform", width): width for width in (1.0, *uniform)}
    for policy in [fewer_experts(n, model.config) for n in experts]:
        widths["fewer experts", share_asked(policy, model.config)] = policy
    for budget in budgets:
        policy = load_calibrated(path, budget) if o.calibrated else RouterWidth(budget)
        widths["calibrated" if o.calibrated else "router", budget] = policy
    return widths


def score(lm, task, sample, metric, n_choices):
    """One document by one metric: its score, what that is divided by, and what the model answered. None if the metric
    means something over all documents only."""
    value, said = sample[metric], sample["filtered_resps"]
    if metric in ("perplexity", "word_perplexity"):  # of a target, or of a text: nats, and tokens
        nats = -(value[0] if metric == "word_perplexity" else value)
        return nats, len(lm.tok_encode(sample["arguments"][0][-1])), None
    if not isinstance(value, numbers.Real):
        return None
    if n_choices and metric in ("acc", "acc_norm"):
        length = lambda text: len(text) - len(task.config.target_delimiter) if metric == "acc_norm" else 1
        return value, 1, max(range(n_choices), key=lambda i: said[i][0] / length(sample["arguments"][i][-1]))
    return value, 1, said[0] if isinstance(said[0], str) else value


def run_task(lm, name, task, limit):
    """Run a task at the width of lm: what tasks.json says of it. `scores` is {metric: [(score, size, answer), ...]}."""
    from lm_eval.evaluator import evaluate

    results = evaluate(lm, {"tasks": {name: task}, "groups": {}}, limit=limit, bootstrap_iters=0)
    samples, scores, chances = results["samples"][name], {}, []
    for sample in samples:
        n_choices = 0
        if task.OUTPUT_TYPE == "multiple_choice":  # for acc_mutual_info all choices are asked twice
            n_choices = len(sample["arguments"]) // (2 if "acc_mutual_info" in sample["metrics"] else 1)
            chances.append(1 / n_choices)
        for metric in sample["metrics"]:
            if found := score(lm, task, sample, metric, n_choices):
                label = "nats/token" if "perplexity" in metric else metric
                label += "" if sample["filter"] == "none" else f" ({sample['filter']})"
                scores.setdefault(label, []).append(found)
    result = dict(task=name, version=task.VERSION, documents=results["n-samples"][name]["effective"], scores=scores)
    return dict(result, chance=statistics.mean(chances) if chances else None, **what_ran(lm.model, lm.stats))


def compare(result, full):
    """{metric: its mean, the mean difference to full width, document by document, and how many answers changed}"""
    metrics = {}
    for metric, mine in result["scores"].items():
        value, se = mean_and_error([(score, size) for score, size, _ in mine])
        pairs = list(zip(mine, full["scores"][metric]))
        minus_full, minus_full_se = mean_and_error([(a[0] - b[0], a[1]) for a, b in pairs])
        changed = None if metric == "nats/token" else sum(a[2] != b[2] for a, b in pairs)
        metrics[metric] = dict(value=value, se=se, minus_full=minus_full, minus_full_se=minus_full_se, changed=changed)
    return metrics


def pooled(group, parts):
    """The result of a group from those of its tasks: their means, errors and all, weighted as the group wants it."""
    n, metrics = sum(part["documents"] for part in parts), {}
    total = dict(parts[0], task=group.name, version=group.version, documents=n, metrics=metrics)
    for wanted in group.aggregate_metric_list:
        for metric in [metric for metric in parts[0]["metrics"] if metric.split(" (")[0] == wanted.metric]:
            having = [part for part in parts if metric in part["metrics"]]
            weights = torch.tensor([part["documents"] if wanted.weight_by_size else 1.0 for part in having])
            weights, mine = (weights / weights.sum()).tolist(), [part["metrics"][metric] for part in having]
            metrics[metric] = {key: sum(w * m[key] for w, m in zip(weights, mine)) for key in ("value", "minus_full")}
            for key in ("se", "minus_full_se"):
                metrics[metric][key] = math.hypot(*(w * m[key] for w, m in zip(weights, mine)))
            metrics[metric]["changed"] = sum(m["changed"] or 0 for m in mine)
    for key in ("chance", "mean_width", "width_run", "flops_total", "flops_expert"):
        known = None not in [part[key] for part in parts]
        total[key] = sum(part[key] * part["documents"] for part in parts) / n if known else None
    del total["scores"], total["key"]
    return total


def print_task(r, first):
    columns = {"width": "<16", "metric": "<22", "score": ">17", "chance": ">7", "minus full width": ">18"}
    columns |= {"changed": ">7", "width run": ">9", "MFLOPs/token": ">12"}
    if first:
        print(f"\n{r['task']}, {r['documents']} documents, {r['checkpoint']} (recipe {r['recipe']})")
        print_row(columns, columns)
    for metric, m in r["metrics"].items():
        cells = [f"{r['policy']} {r['budget']:g}", metric, f"{m['value']:.4f} ± {m['se']:.4f}"]
        cells += [f"{r['chance']:.4f}" if r["chance"] and metric.startswith("acc") else ""]
        cells += [f"{m['minus_full']:+.4f} ± {m['minus_full_se']:.4f}", "" if m["changed"] is None else m["changed"]]
        print_row(columns, [*cells, f"{r['width_run']:.3f}", f"{r['flops_total'] / 1e6:.3f}"])


def plot_tasks(results, path):
    panels = []
    for task in dict.fromkeys(r["task"] for r in results if r["metrics"]):
        mine = [r for r in results if r["task"] == task]
        metric = next((m for m in mine[0]["metrics"] if m.startswith("acc")), next(iter(mine[0]["metrics"])))
        lines = curves(mine, lambda r, m=metric: r["metrics"][m]["value"], lambda r, m=metric: r["metrics"][m]["se"])
        if mine[0]["chance"] and metric.startswith("acc"):
            x = [r["flops_total"] / 1e6 for r in mine]
            lines.append(("chance", [min(x), max(x)], [mine[0]["chance"]] * 2, dict(color="black", ls=":", marker="")))
        panels.append(dict(curves=lines, title=task, xlabel="forward MFLOPs per token", ylabel=metric))
    draw(path, panels, size=(5, 4))


def tasks(o):
    loaded, device, dtype, why = load_models(o)
    runs = []
    for path, model, checkpoint in loaded:
        for (policy, budget), width in task_widths(o, path, model).items():
            what = dict(checkpoint=path, recipe=checkpoint["recipe"], policy=policy, budget=budget)
            runs.append(((path, model, checkpoint), what, width))
    if not o.tasks:
        raise UsageError("which tasks? Give --tasks=lambada_openai,hellaswag, say")
    lm_class, built, groups = load_tasks([name.strip() for name in o.tasks.split(",")], o)
    file, prints = Path(o.checkpoints[0]).parent / "tasks.json", {path: fingerprint(path) for path in o.checkpoints}
    about = dict(lm_eval=version("lm_eval"), hardware=why)
    kept, shown, full = read_json(file).get("results", []), [], None
    print(f"{why}; torch {torch.__version__}; lm_eval {about['lm_eval']}")
    for name, task in built.items():
        content = [[(r.args, r.doc) for r in task.instances], task.dump_config(), about["lm_eval"]]
        content = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
        for (path, model, checkpoint), what, width in runs:
            layers = [p and (p.budget, p.gamma) for p in width.policies] if what["policy"] == "calibrated" else []
            key = " ".join(map(str, (prints[path], what["policy"], what["budget"], layers, content, device, dtype)))
            result = next((r for r in kept if r["key"] == key), None)
            if result is None:
                label = f"{name}, {what['policy']} {what['budget']:g}"
                lm = lm_class(model, checkpoint, width, device, dtype, o.batch_size, label)
                result = dict(what, **run_task(lm, name, task, o.limit), key=key)
                kept = [r for r in kept if not (what.items() <= r.items() and r["task"] == name)] + [result]
                write_json(file, dict(about, results=kept))
            full = result if width == 1 else full  # comes first
            result["metrics"] = compare(result, full)
            print_task(result, first=result is full)
            shown.append(result)
    groups, totals = [group for group in groups.values() if group.has_aggregation], []
    for group in groups:
        members = {task.task_name for task in group.get_all_tasks()}
        for _, what, width in runs:
            totals.append(pooled(group, [r for r in shown if r["task"] in members and what.items() <= r.items()]))
            print_task(totals[-1], first=width == 1)
    write_json(file, dict(about, results=kept, groups=totals))
    members = {name for group in groups for name in group.child_names}
    plot_tasks([r for r in totals + shown if r["task"] not in members], file.with_suffix(".png"))
    print(f"\nwrote {file} and {file.with_suffix('.png')}")


# -----------------------------------------------------------------------------

COMMANDS = {"frontier": (frontier, FrontierConfig), "speed": (speed, SpeedConfig), "tasks": (tasks, TasksConfig)}


def main():
    command = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if command in ("-h", "--help"):
        print(__doc__)
    elif command not in COMMANDS:
        raise UsageError(f"the first word must be one of {', '.join(COMMANDS)}, not {command}")
    else:
        function, config = COMMANDS[command]
        function(parse(config, config.__doc__, sys.argv[2:])[1])


if __name__ == "__main__":
    run(main, "bench.py")
