"""
Measure: what quality costs, and whether a narrower width is a shorter time.

    python bench.py frontier                                      # out/demo/ckpt.pt: loss against compute
    python bench.py frontier out/demo/ckpt.pt out/demo-moe/ckpt.pt
    python bench.py speed --preset=55m                            # time against width on this machine
    python bench.py speed --checkpoint=out/demo/ckpt.pt --compile
    python bench.py study                                         # train every method and compare: hours

frontier runs one checkpoint at budgets from a quarter of its experts to all of them, with each way of spending the
budget, on the same validation text: slimmed experts, fewer experts, or skipping those of low probability. Checkpoints
of recipe moe are cut to narrower widths, which they were never trained for. It prints a table and writes frontier.json
and frontier.png beside the first checkpoint.

study trains the rows of STUDY at demo scale, two at a time, goes on where it was stopped, and writes study.json,
study.md, study.png and training.png to results/.

speed times the layer, the training step, prefill and decoding at every width, each beside a dense network of the same
active FLOPs, in turns so that a noisy machine slows both. It prints a table and writes speed.json and speed.png.
"""

import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from model import GPT, GRID, MLP, GPTConfig, KVCache, RouterWidth, SlimmableMoE, UsageError, width_to_neurons
from prepare import Parser, run
from train import (
    PRESETS, TrainConfig, autocast, choose_device, load_checkpoint, load_model, make_config, make_optimizer,
    open_dataset, sequence_losses, to_inference,
)  # fmt: skip

BUDGETS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.2, 0.15)
# Okabe and Ito: told apart by everybody
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vP*"

# -----------------------------------------------------------------------------
# frontier: loss against FLOPs


class PerLayer:
    """Width policy: a policy of its own for every MoE layer, in the order in which a forward pass asks them."""

    def __init__(self, policies):
        self.policies, self.turn = policies, itertools.cycle(policies)

    def widths(self, probs):
        policy = next(self.turn)
        self.budget = policy.budget  # of shared experts, asked for right after this
        return policy.widths(probs)


def calibrate(model, batches, budget, device, dtype, lr=0.1):
    """Learn how to spend a mean width from text alone, all weights frozen: a gamma for each layer, where the paper has
    one for all, and each layer's share of the budget. Returns a PerLayer of RouterWidth.

    Widths are continuous meanwhile (see SlimmableMoE.soft_mask), so that the loss has a gradient with respect to both.
    Adam, not the paper's plain SGD at 0.01: gamma's gradient is about 0.01 nats, so SGD would not leave the start.
    """
    n_layer = sum(block.moe for block in model.transformer.h)
    gamma = torch.ones(n_layer, device=device, requires_grad=True)
    share = torch.zeros(n_layer, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([gamma, share], lr=lr)

    def policy():  # the layers split n_layer * budget, none gets more than 1: as RouterWidth does with experts
        continuous = torch.ones((), device=device, requires_grad=True)
        budgets = RouterWidth(budget, continuous).widths(share.softmax(-1).unsqueeze(0))[0]
        return PerLayer([RouterWidth(b, g) for b, g in zip(budgets, gamma)])

    for i, (idx, targets) in enumerate(batches):
        with autocast(device, dtype):
            loss = model(idx.to(device), targets.to(device), width=policy())[1]
        gamma.grad, share.grad = torch.autograd.grad(loss, (gamma, share))
        optimizer.param_groups[0]["lr"] = lr * (1 - i / len(batches))
        optimizer.step()
        with torch.no_grad():
            gamma.clamp_(min=0)
    model.read_stats()
    return PerLayer([RouterWidth(max(1 / GRID, p.budget.item()), p.gamma.item()) for p in policy().policies])


class Skip:
    """Width policy: a selected expert runs whole if its probability exceeds `share` of the likeliest one's, or not at
    all. share=1 leaves the likeliest."""

    renormalize = True

    def __init__(self, share):
        self.share = share

    def widths(self, probs):
        return (probs >= self.share * probs.amax(-1, keepdim=True)).to(probs.dtype)


class TopP:
    """Width policy: the likeliest of the selected experts whose probabilities, renormalised, sum to more than p run
    whole, the others not at all."""

    renormalize = True

    def __init__(self, p):
        self.p = p

    def widths(self, probs):
        p, order = (probs / probs.sum(-1, keepdim=True)).sort(-1, descending=True)
        before = p.cumsum(-1) - p  # what the likelier ones have
        return torch.zeros_like(probs).scatter(-1, order, (before <= self.p).to(probs.dtype))


class AcrossTokens:
    """Width policy for top_k=1, where a token has nothing to split: w = scale * p^gamma, so that confident tokens get
    more, and the budget holds on average over tokens. fit_scale finds the scale."""

    def __init__(self, budget, gamma, scale):
        self.budget, self.gamma, self.scale = budget, gamma, scale

    def widths(self, probs):
        return ((self.scale * probs**self.gamma).clamp(1 / GRID, 1) * GRID).round() / GRID


@torch.no_grad()
def fit_scale(model, batches, budget, gamma, device, dtype):
    """Bisect the scale of AcrossTokens until the measured mean width on batches is the budget."""
    low, high = 0.0, 20.0
    for _ in range(12):
        scale = (low + high) / 2
        model.read_stats()
        sequence_losses(model, batches, AcrossTokens(budget, gamma, scale), device, dtype)
        low, high = (scale, high) if model.read_stats()[0] < budget else (low, scale)
    return AcrossTokens(budget, gamma, (low + high) / 2)


def frontier_points(path, model, checkpoint, val, calibration, device, dtype):
    """Measure every policy and budget of one checkpoint: a list of dicts, one per point, in a fixed order."""
    k, moes = model.config.top_k, [block.mlp for block in model.transformer.h if block.moe]
    tokens = sum(idx.numel() for idx, _ in val)
    points, uniform, slim = [], {}, checkpoint["recipe"] not in ("moe", "m-moe")

    def measure(policy, budget, gamma, width, experts=k, **more):
        for moe in moes:
            moe.top_k = experts
        sequence_losses(model, val[:1], width, device, dtype)  # warm up
        model.read_stats()
        started = time.perf_counter()
        losses = sequence_losses(model, val, width, device, dtype).double()
        seconds = time.perf_counter() - started
        mean_width, width_run, _ = model.read_stats() if moes else (1.0, 1.0, None)
        for moe in moes:
            moe.top_k = k
        total, expert = model.flops_per_token(width_run)  # counted from what ran
        point = dict(
            checkpoint=str(path), recipe=checkpoint["recipe"], policy=policy, budget=budget or mean_width, gamma=gamma,
            mean_width=mean_width, loss=losses.mean().item(), flops_total=total, flops_expert=expert,
            tokens_per_s=tokens / seconds, **more,
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
        print_point(point, first=len(points) == 1)

    measure("uniform", 1.0, None, 1.0)
    for budget in BUDGETS[1:] if moes else ():
        measure("uniform" if slim else "truncated", budget, None, budget)
        if not slim:
            continue
        if k == 1:
            measure("across tokens", budget, 1.0, fit_scale(model, calibration[:5], budget, 1.0, device, dtype))
            continue
        measure("router", budget, 1.0, RouterWidth(budget, 1.0))
        policy = calibrate(model, calibration, budget, device, dtype)
        layers = [(p.budget, p.gamma) for p in policy.policies]
        measure("calibrated", budget, statistics.mean(g for _, g in layers), policy, layers=layers)
    if moes and k > 1:  # whole experts or none; the budget is what that comes to
        for experts in sorted({k // 2, k // 4, 1} - {0}, reverse=True):
            measure("fewer experts", experts / k, None, 1.0, experts)
        for share in (0.4, 0.7):
            measure("skip", None, None, Skip(share))
        for p in (0.4, 0.7) if k > 2 else ():  # with two experts, it is skipping by another name
            measure("top-p", None, None, TopP(p))
    return points


def print_point(p, first):
    if first:
        unit = "bits/byte" if "bits_per_byte" in p else "perplexity"
        print(f"\n{p['checkpoint']} (recipe {p['recipe']})")
        print(
            f"{'policy':<14} {'budget':>6} {'gamma':>6} {'width':>6} {'loss':>7} {unit:>10}  {'minus uniform':>17} "
            f"{'MFLOPs/token':>12} {'experts':>8} {'tokens/s':>9}"
        )
    gamma = "" if p["gamma"] is None else f"{p['gamma']:.2f}"
    versus = f"{p['minus_uniform']:+.4f} ± {p['minus_uniform_se']:.4f}" if "minus_uniform" in p else ""
    quality = p.get("bits_per_byte", p.get("perplexity"))
    print(
        f"{p['policy']:<14} {p['budget']:>6.3g} {gamma:>6} {p['mean_width']:>6.3f} {p['loss']:>7.4f} "
        f"{quality:>10.3f}  {versus:>17} {p['flops_total'] / 1e6:>12.3f} {p['flops_expert'] / 1e6:>8.3f} "
        f"{p['tokens_per_s']:>9,.0f}",
        flush=True,
    )


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
            curve.append(full)
            curve.sort(key=lambda p: -p["flops_total"])
        elif full["recipe"] in ("moe", "m-moe"):
            curves[checkpoint, "full width"] = curves.pop((checkpoint, policy))
    fig, ax = plt.subplots(figsize=(8, 5), dpi=150)
    for i, ((checkpoint, policy), curve) in enumerate(curves.items()):
        label = f"{Path(checkpoint).parent.name}/{Path(checkpoint).name}: {policy}" if len(fulls) > 1 else policy
        x, y = [p["flops_total"] / 1e6 for p in curve], [p["bits_per_byte" if byte else "loss"] for p in curve]
        line = "--" if curve[0]["recipe"] in ("moe", "m-moe") else "-"
        ax.plot(x, y, marker=MARKERS[(i + i // 7) % 7], color=COLORS[i % 7], linestyle=line, label=label)
    slim = [p["bits_per_byte" if byte else "loss"] for p in points if p["policy"] != "truncated"]
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
        if (checkpoint["tokenizer"], checkpoint["config"]["block_size"]) != (
            first["tokenizer"],
            first["config"]["block_size"],
        ):
            raise UsageError(
                f"{path} and {o.checkpoints[0]} differ in tokenizer or context: their losses cannot be compared"
            )
    dataset, block_size = o.dataset or first["options"]["dataset"], first["config"]["block_size"]
    train, val, tokenizer, _ = open_dataset(dataset, block_size)
    if tokenizer != first["tokenizer"]:
        raise UsageError(
            f"{dataset} has {tokenizer} tokens, the checkpoint knows {first['tokenizer']}: choose another --dataset"
        )
    if o.eval_tokens < block_size or o.batch_size < 1:
        raise UsageError(
            f"--eval_tokens must be at least one sequence, {block_size}, and --batch_size at least 1, not "
            f"{o.eval_tokens} and {o.batch_size}"
        )
    val_batches = val.fixed_batches(o.eval_tokens, o.batch_size)
    # the paper's 50 batches of 6 sequences, from the training split and never trained on in this order
    calibration = [train.random_batch(o.seed, 10**9 + i, 0, 6) for i in range(50)]
    print(
        f"{why}; torch {torch.__version__}; {sum(len(idx) for idx, _ in val_batches)} validation sequences of "
        f"{block_size} tokens from {dataset}"
    )

    points = []
    for path, model, checkpoint in loaded:
        points += frontier_points(path, model.to(device), checkpoint, val_batches, calibration, device, dtype)
    folder = Path(o.checkpoints[0]).parent
    results = dict(
        points=points, dataset=dataset, tokens=sum(i.numel() for i, _ in val_batches), seed=o.seed, hardware=why,
        torch=torch.__version__,
    )  # fmt: skip
    (folder / "frontier.json").write_text(json.dumps(results, indent=2) + "\n")
    plot_frontier(points, folder / "frontier.png")
    print(f"\nwrote {folder}/frontier.json and {folder}/frontier.png")


# -----------------------------------------------------------------------------
# speed: time against width

COLUMNS = (1.0, 0.75, 0.5, 0.25, RouterWidth(0.5, 1.0))


def nominal_width(column):
    """The width that FLOPs are counted at. With a router budget a little more runs: see plan_chunks in model.py."""
    return column if isinstance(column, float) else torch.as_tensor(column.budget).mean().item()


class NanoMoE(nn.Module):
    """nanoMoE's published layer, for comparison: one-hot masks (tokens, experts, capacity) carry tokens to experts and
    back, capacity 1.25 times the even share, tokens beyond it dropped."""

    def __init__(self, config):
        super().__init__()
        moe = SlimmableMoE(config)
        self.top_k, self.router, self.w_in, self.w_out = config.top_k, moe.router, moe.w_in, moe.w_out

    def forward(self, x, width, losses=True):
        shape, k, E = x.shape, self.top_k, self.w_in.size(0)
        x = x.reshape(-1, shape[-1])
        capacity = int(1.25 * k * len(x) / E)
        with torch.autocast(x.device.type, enabled=False):
            top, expert = F.linear(x.float(), self.router.weight).topk(k)
        p = torch.full((len(x), E), -math.inf, device=x.device).scatter_(-1, expert, top).softmax(-1)
        mask = F.one_hot(expert, E).permute(1, 0, 2)  # (k, N, E)
        rank = (mask.reshape(-1, E).cumsum(0) - 1).view_as(mask)
        mask = mask * (rank < capacity)
        place = F.one_hot((mask * rank).sum(-1), capacity)  # (k, N, C)
        combine = ((mask * p).unsqueeze(-1) * place.unsqueeze(2)).sum(0)  # (N, E, C)
        rows = combine.bool().permute(1, 2, 0).type_as(x) @ x  # (E, C, d)
        out = torch.bmm(F.gelu(torch.bmm(rows, self.w_in.mT)), self.w_out)
        y = combine.view(len(x), -1).to(out.dtype) @ out.view(-1, shape[-1])
        return y.view(shape), 0.0


def synchronize(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def time_in_turns(cases, device, seconds):
    """Run the functions of cases {name: function} in turns for `seconds`, at least 3 times: {name: median seconds}."""
    for run_case in cases.values():  # warm up: compilation, caches, lazy initialisation
        run_case()
        run_case()
    times, deadline = {name: [] for name in cases}, time.perf_counter() + seconds
    while time.perf_counter() < deadline or min(map(len, times.values())) < 3:
        for name, run_case in cases.items():
            synchronize(device)
            started = time.perf_counter()
            run_case()
            synchronize(device)
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(t) for name, t in times.items()}


def working_memory(run_case, device):
    """Bytes that a case needs on the GPU besides weights and optimizer. None on a CPU: its allocator keeps no count."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run_case()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def layer_cases(config, device, dtype, n_tokens, backward):
    """{(kind, column): (function, tokens, FLOPs)} of the MoE layer alone, and of a dense MLP of equal active FLOPs."""
    d, H, k = config.n_embd, config.expert_hidden, config.top_k + config.n_shared
    x = torch.randn(n_tokens, d, device=device, dtype=dtype, requires_grad=backward)
    g, moe = torch.randn_like(x), SlimmableMoE(config).to(device)
    nn.init.normal_(moe.router.weight, std=0.02)
    moe.w_in.data, moe.w_out.data = moe.w_in.data.to(dtype), moe.w_out.data.to(dtype)
    cases = {}

    def case(f, layer):
        inputs = [x, *layer.parameters()]

        def run_case():
            with torch.set_grad_enabled(backward):
                y = f()
            if backward:
                torch.autograd.grad(y, inputs, g)

        return run_case

    for column in COLUMNS:
        h = width_to_neurons(nominal_width(column), H)
        dense = MLP(d, k * h).to(device, dtype)
        flops = n_tokens * 4 * d * k * h * (3 if backward else 1)
        cases["moe", column] = case(lambda column=column: moe(x, column)[0], moe), n_tokens, flops
        cases["dense", column] = case(lambda dense=dense: dense(x), dense), n_tokens, flops
    return cases


def dense_config(config, column):
    """A dense GPT with the active parameters that the MoE has at this width."""
    h = (config.top_k + config.n_shared) * width_to_neurons(nominal_width(column), config.expert_hidden)
    return dataclasses.replace(config, n_expert=1, top_k=1, n_shared=0, expert_hidden=h)


def build(config, state, device, compile):
    model = GPT(config).to(device)
    if state is not None:
        model.load_state_dict(state)
    if compile:
        model.body = torch.compile(model.body)
    return model


def train_cases(config, state, device, dtype, batch, compile, recipe):
    """Optimizer steps of one micro-batch: recipes moe and serve, or mose with its second pass at every column."""
    idx = torch.randint(0, config.vocab_size, (batch, config.block_size), device=device)
    cases, tokens = {}, idx.numel()

    def case(model, *passes):  # (sequences, width)
        optimizer = make_optimizer(model, TrainConfig())

        def run_case():
            for some, width in passes:
                with autocast(device, dtype):
                    _, loss, aux = model(some, some, width)
                ((loss + aux) / len(passes)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        flops = sum(3 * some.numel() * model.flops_per_token(nominal_width(w))[0] for some, w in passes)
        return run_case, tokens, flops

    moe = build(config, state, device, compile)
    cases["moe", 1.0] = case(moe, (idx, 1.0))
    if recipe == "mose":
        for column in COLUMNS[1:]:
            cases["moe", column] = case(moe, (idx, 1.0), (idx, column))
        return cases
    draws = torch.rand(batch, 2, 1, device=device).repeat_interleave(config.block_size, 0)
    served = RouterWidth(0.1 + 0.9 * draws[:, 0], 3 * draws[:, 1])  # see training_passes in train.py
    cases["serve", 0.55] = case(moe, (idx, served))
    cases["dense", 1.0] = case(build(dense_config(config, 1.0), None, device, compile), (idx, 1.0))
    if not compile:
        nano = build(config, state, device, False)
        for block in nano.transformer.h:
            if block.moe:
                block.mlp = NanoMoE(config).to(device)
        cases["nanoMoE", 1.0] = case(nano, (idx, 1.0))
    return cases


def inference_cases(config, state, device, dtype, compile, batch, seen, new):
    """Forward passes over `new` tokens after `seen` ones that are in the cache already."""
    cases = {}

    def case(model, width):
        model = to_inference(model, device, dtype)
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

    moe = build(config, state, device, compile)
    for column in COLUMNS:
        cases["moe", column] = case(moe, column)
        dense = build(dense_config(config, column), None, device, compile)
        cases["dense", column] = case(dense, 1.0)
    return cases


def speed(o):
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
    gpu = device.startswith("cuda")
    print(f"{name} on {why}; torch {torch.__version__}; median of turns, {o.seconds:g} s a row")
    T, batch = config.block_size, o.batch_size or (16 if gpu else max(1, 2048 // config.block_size))
    n_tokens = 32768 if gpu else 4096
    results = []
    for mode in ("eager", "compile") if o.compile else ("eager",):
        compiled = mode == "compile"
        infer = lambda *sizes: lambda: inference_cases(config, state, device, dtype, compiled, *sizes)
        rows = {
            "layer forward": lambda: layer_cases(config, device, dtype, n_tokens, False),
            "layer forward and backward": lambda: layer_cases(config, device, dtype, n_tokens, True),
            "training step": lambda: train_cases(config, state, device, dtype, batch, compiled, "moe"),
            "training step, recipe mose": lambda: train_cases(config, state, device, dtype, batch, compiled, "mose"),
            "prefill": infer(1, 0, T),
            "decode, batch 1": infer(1, T // 2, 1),
            "decode, batch 16": infer(16, T // 2, 1),
            "decode, batch 1, context a tenth full": infer(1, T // 10, 1),
            "decode, batch 1, context nine tenths full": infer(1, T * 9 // 10, 1),
        }
        for row, make_cases in rows.items():
            if compiled and row.startswith("layer"):
                continue  # seen inside the training step
            torch.manual_seed(o.seed)
            cases = make_cases()
            seconds = time_in_turns({key: f for key, (f, _, _) in cases.items()}, device, o.seconds)
            for (kind, column), (f, tokens, flops) in cases.items():
                t = seconds[kind, column]
                base = ("dense" if kind == "dense" else "moe", 1.0)
                result = dict(
                    row=row, mode=mode, kind=kind, column="uniform" if isinstance(column, float) else "router",
                    width=nominal_width(column),
                    seconds=t, tokens_per_s=tokens / t, flops_per_s=flops / t, working_bytes=working_memory(f, device),
                    # against the time that the FLOPs predict from the MoE's at full width: 1 means FLOPs are time
                    vs_flops=t / seconds[base] / (flops / cases[base][2]),
                )  # fmt: skip
                if kind != "dense" and ("dense", column) in seconds:
                    result["vs_dense"] = t / seconds["dense", column] / (flops / cases["dense", column][2])
                results.append(result)
                print_speed(result, first=(kind, column) == next(iter(cases)))
    folder.mkdir(parents=True, exist_ok=True)
    report = dict(
        results=results,
        model=name,
        config=dataclasses.asdict(config),
        hardware=why,
        torch=torch.__version__,
        seed=o.seed,
    )
    (folder / "speed.json").write_text(json.dumps(report, indent=2) + "\n")
    plot_speed(results, folder / "speed.png")
    print(f"\nwrote {folder}/speed.json and {folder}/speed.png")


def print_speed(r, first):
    if first:
        print(
            f"\n{r['row']} ({r['mode']})\n{'':<16} {'ms':>9} {'tokens/s':>10} {'GFLOP/s':>8} {'work MB':>8} "
            f"{'x FLOPs':>8} {'x dense':>8}"
        )
    label = f"{r['kind']} {r['width']:g}" + (" router" if r["column"] == "router" else "")
    memory = "" if r["working_bytes"] is None else f"{r['working_bytes'] / 1e6:.0f}"
    dense = f"{r['vs_dense']:.2f}" if "vs_dense" in r else ""
    print(
        f"{label:<16} {r['seconds'] * 1e3:>9.2f} {r['tokens_per_s']:>10,.0f} {r['flops_per_s'] / 1e9:>8.0f} "
        f"{memory:>8} {r['vs_flops']:>8.2f} {dense:>8}",
        flush=True,
    )


def plot_speed(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [
        "layer forward and backward",
        "training step, recipe mose",
        "prefill",
        "decode, batch 1",
        "decode, batch 16",
    ]
    fig, axes = plt.subplots(1, len(rows), figsize=(3.4 * len(rows), 3.6), dpi=120)
    for ax, row in zip(axes, rows):
        mine = [r for r in results if r["row"] == row]
        curves = {}
        for r in mine:
            one_pass = row.startswith("training") and r["width"] == 1  # the others are two
            if r["column"] == "uniform" and not one_pass:
                curves.setdefault((r["kind"], r["mode"]), []).append(r)
        for i, ((kind, mode), curve) in enumerate(curves.items()):
            label = ("MoSE" if kind == "moe" else "dense, equal FLOPs") + (
                f", {mode}" if len({m for _, m in curves}) > 1 else ""
            )
            ax.plot(
                [r["width"] for r in curve],
                [r["seconds"] * 1e3 for r in curve],
                marker=MARKERS[i],
                color=COLORS[i],
                label=label,
            )
        router = next(r for r in mine if r["column"] == "router" and r["kind"] == "moe")
        ax.plot(
            router["width"],
            router["seconds"] * 1e3,
            marker="*",
            markersize=11,
            linestyle="",
            color=COLORS[4],
            label="router widths",
        )
        curve = curves["moe", mine[0]["mode"]]
        ax.plot(
            [r["width"] for r in curve],
            [r["seconds"] * 1e3 / r["vs_flops"] for r in curve],
            ":",
            color=COLORS[6],
            label="what FLOPs predict",
        )
        ax.set(title=row, xlabel="mean width of the experts", ylim=(0, 1.1 * max(r["seconds"] for r in mine) * 1e3))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[0].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


# -----------------------------------------------------------------------------
# study: every method on the same axes

# routing regimes, all of equal parameters and equal active parameters
TOP_1 = dict(n_expert=4, top_k=1, expert_hidden=1024, norm_topk_prob=False)
FINE = dict(n_expert=32, top_k=8, expert_hidden=128)
SHARED = dict(n_expert=31, top_k=7, n_shared=1, expert_hidden=128)
BIAS = dict(balance_coef=0, bias_rate=0.001)
STUDY = {  # name: (seeds, options of `train.py demo`)
    "moe": (3, dict(recipe="moe")),
    "narrow 0.5": (3, dict(recipe="moe", train_width=0.5)),
    "narrow 0.25": (3, dict(recipe="moe", train_width=0.25)),
    "serve": (3, dict(recipe="serve")),
    "mose": (3, dict(recipe="mose")),
    "m-moe": (1, dict(recipe="m-moe")),
    "dense": (1, dict(recipe="moe", n_expert=1, top_k=1, expert_hidden=1024)),
    # as many training FLOPs as moe, which is more text
    "serve, more steps": (3, dict(recipe="serve", steps=1090)),
    "m-moe, more steps": (3, dict(recipe="m-moe", steps=975)),
    "narrow 0.5, more steps": (1, dict(recipe="moe", train_width=0.5, steps=1232)),
    "narrow 0.25, more steps": (1, dict(recipe="moe", train_width=0.25, steps=1690)),
    # routing regimes, for as many FLOPs again
    "moe, top-1": (1, dict(recipe="moe", **TOP_1)),
    "serve, top-1": (1, dict(recipe="serve", steps=1090, **TOP_1)),
    "moe, fine-grained": (1, dict(recipe="moe", **FINE)),
    "serve, fine-grained": (1, dict(recipe="serve", steps=1080, **FINE)),
    "m-moe, fine-grained": (1, dict(recipe="m-moe", steps=1160, **FINE)),
    "moe, fine-grained and shared": (1, dict(recipe="moe", **SHARED)),
    "serve, fine-grained and shared": (1, dict(recipe="serve", steps=1080, **SHARED)),
    "moe, bias-balanced": (1, dict(recipe="moe", **BIAS)),
    "serve, bias-balanced": (1, dict(recipe="serve", steps=1090, **BIAS)),
}


def study_run(row, seed, options, threads):
    """Train one row of the study with one seed and measure its frontier, going on where an earlier call was stopped."""
    folder = Path("out/study") / f"{row.replace(', ', '-').replace(' ', '-')}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    flags = [f"--{name}={value}" for name, value in options.items()]
    resume = ["--resume"] if (folder / "last.pt").exists() else []
    commands = [["train.py", "demo", f"--out_dir={folder}", f"--seed={seed}", "--eval_interval=400", *flags, *resume]]
    if (folder / "frontier.json").exists():
        saved = load_checkpoint(folder / "last.pt")["options"]
        if any(saved[name] != value for name, value in options.items()):
            raise UsageError(f"{folder} holds a run with other options than the study's row {row!r}: move it away")
    else:
        commands.append(["bench.py", "frontier", str(folder / "last.pt"), "--eval_tokens=65536"])
        with open(folder / "output.txt", "a") as output:
            for command in commands:
                command = [sys.executable, str(Path(__file__).parent / command[0]), *command[1:]]
                env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                subprocess.run(command, check=True, stdout=output, stderr=output, env=env)
    last = json.loads(open(folder / "log.jsonl").read().splitlines()[-2])  # before the last evaluation
    frontier = json.loads((folder / "frontier.json").read_text())
    return dict(
        row=row, seed=seed, options=options, steps=last["step"], training_flops=last["flops"],
        eval_tokens=frontier["tokens"], torch=frontier["torch"], hardware=frontier["hardware"],
        points=frontier["points"],
    )  # fmt: skip


def study(o):
    """Train and measure every row of STUDY that is not done, then write the table and the pictures."""
    rows = o.rows.split(";") if o.rows else list(STUDY)
    if unknown := [row for row in rows if row not in STUDY]:
        raise UsageError(f"no row {unknown[0]!r} in the study; there are: {'; '.join(STUDY)}")
    open_dataset("stdlib", 128)  # refuse before anything is spent
    out = Path("results")
    out.mkdir(exist_ok=True)
    file = out / "study.json"
    done = {(r["row"], r["seed"]): r for r in json.loads(file.read_text())["runs"]} if file.exists() else {}
    done = {key: run for key, run in done.items() if key[0] in STUDY}
    tasks = [(row, 1337 + i) for i in range(3) for row in rows if i < STUDY[row][0]]
    pool, threads = ThreadPoolExecutor(o.jobs), max(1, os.cpu_count() // o.jobs)
    futures = {pool.submit(study_run, row, seed, STUDY[row][1], threads): (row, seed) for row, seed in tasks}
    try:
        for i, future in enumerate(as_completed(futures), 1):
            done[futures[future]] = future.result()
            runs = sorted(done.values(), key=lambda r: (list(STUDY).index(r["row"]), r["seed"]))
            file.write_text(json.dumps(dict(runs=runs), indent=1) + "\n")
            print(f"{i} of {len(tasks)}: {futures[future][0]}, seed {futures[future][1]}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C or a failure, start no other row
    report_study(runs, out)


def best_at(run, share):
    """(loss, policy) of the run's best policy where that share of the experts' FLOPs is spent, or None if none reaches.

    What is spent is what ran, which with router widths is more than the budget; so between two measured points the loss
    is interpolated linearly, which flatters nobody: the curves are convex.
    """
    full, *points = run["points"]
    if share == 1:
        return full["loss"], "full width"
    curves, found = {}, []
    for p in points:
        curves.setdefault(p["policy"], [full]).append(p)
    for policy, curve in curves.items():
        spent, loss = zip(*sorted((p["flops_expert"] / full["flops_expert"], p["loss"]) for p in curve))
        if spent[0] < share + 0.001:
            found.append((float(np.interp(share, spent, loss)), policy))
    return min(found, default=None)


def mean_and_error(values, sign=""):
    """Mean and standard error, as text."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{error}"


def report_study(runs, out):
    """results/study.md and the two pictures."""
    rows = {}
    for one in runs:
        rows.setdefault(one["row"], []).append(one)
    lines = [
        "Validation loss in nats per byte where that share of the experts' FLOPs is spent (linear between measured",
        "points), at the best policy; mean and standard error over seeds. Made by `make study`.",
        f"{runs[0]['hardware']}; torch {runs[0]['torch']}; {runs[0]['eval_tokens']:,} validation bytes.",
        "",
        "| training | seeds | steps | training FLOPs | full | half | a quarter |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, group in rows.items():
        cells = [row, len(group), group[0]["steps"], f"{group[0]['training_flops']:.3g}"]
        for share in (1.0, 0.5, 0.25):
            found = [best_at(run, share) for run in group]
            cells.append("" if None in found else mean_and_error([loss for loss, _ in found]))
            if share < 1 and cells[-1]:
                cells[-1] += f" ({', '.join(sorted({policy for _, policy in found}))})"
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "Differences, seed by seed:", "", "| | difference |", "|---|---|"]
    for name, share, other in (
        ("full width, minus moe", 1.0, "moe"),
        ("half, minus moe at full width", 0.5, "moe"),
        ("half, minus an MoE trained at 0.5", 0.5, "narrow 0.5"),
        ("a quarter, minus an MoE trained at 0.25", 0.25, "narrow 0.25"),
        ("half, minus an MoE trained at 0.5 for the same FLOPs", 0.5, "narrow 0.5, more steps"),
        ("a quarter, minus an MoE trained at 0.25 for the same FLOPs", 0.25, "narrow 0.25, more steps"),
    ):
        for row in ("mose", "serve", "serve, more steps", "m-moe, more steps"):
            if "more" in other and "more" not in row:
                continue
            theirs = {run["seed"]: best_at(run, 1.0)[0] for run in rows.get(other, [])}
            mine = {run["seed"]: best_at(run, share)[0] for run in rows.get(row, []) if best_at(run, share)}
            pairs = [loss - theirs[seed] for seed, loss in mine.items() if seed in theirs]
            if pairs:
                lines.append(f"| {row}: {name} | {mean_and_error(pairs, '+')} |")
    (out / "study.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot_study(rows, out)


def plot_study(rows, out):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def mean_loss(group, share):
        found = [best_at(run, share) for run in group]
        return None if None in found else statistics.mean(loss for loss, _ in found)

    def mflops(group, share):
        full = group[0]["points"][0]
        return (full["flops_total"] - (1 - share) * full["flops_expert"]) / 1e6

    fig, axes = plt.subplots(1, 2, figsize=(11, 6), dpi=130, sharey=True)
    for ax, more, title in zip(axes, ("", ", more steps"), ("the same text", "the same training FLOPs")):
        narrow = [rows[row] for row in ("moe", f"narrow 0.5{more}", f"narrow 0.25{more}") if row in rows]
        x, y = [mflops(group, 1.0) for group in narrow], [mean_loss(group, 1.0) for group in narrow]
        ax.plot(x, y, "k--", marker="o", label="standard MoEs, one trained for each width")
        for i, (row, label) in enumerate(
            (
                ("serve" + more, "serve, ours"),
                ("mose" + more, "mose, the paper's recipe"),
                ("m-moe" + more, "m-moe: fewer experts"),
                ("moe", "standard MoE, fewer experts or skipping"),
                ("dense" + more, "dense"),
            )
        ):
            shares = (1.0, 0.75, 0.5, 0.375, 0.25)
            curve = [(mflops(rows[row], share), mean_loss(rows[row], share)) for share in shares if row in rows]
            curve = [(x, loss) for x, loss in curve if loss is not None and loss < max(y, default=math.inf) + 0.1]
            if curve:
                ax.plot(*zip(*curve), marker=MARKERS[i], color=COLORS[i], label=label)
        ax.set(xlabel="forward MFLOPs per byte, everything counted", title=f"One training, every budget: {title}")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    axes[0].set_ylabel("validation loss (nats per byte), best policy")
    fig.tight_layout()
    fig.savefig(out / "study.png")
    plt.close(fig)

    fig, axes = plt.subplots(1, 3, figsize=(12, 4), dpi=130, sharey=True)
    for ax, share in zip(axes, (1.0, 0.5, 0.25)):
        losses = {row: mean_loss(group, share) for row, group in rows.items() if not row.startswith("narrow")}
        if f"narrow {share:g}" in rows:
            losses["narrow"] = mean_loss(rows[f"narrow {share:g}"], 1.0)
        if f"narrow {share:g}, more steps" in rows:
            losses["narrow, more steps"] = mean_loss(rows[f"narrow {share:g}, more steps"], 1.0)
        # not the routing regimes, and not models cut to a width that they were not trained for
        losses = {row: l for row, l in losses.items() if l is not None and "," not in row.replace(", more", "")}
        for i, row in enumerate(("moe", "narrow", "dense", "mose", "serve", "m-moe")):
            for more, face in ("", None), (", more steps", "none"):
                name = row + more
                if losses.get(name, math.inf) < min(losses.values()) + 0.3:
                    flops = rows[name.replace("narrow", f"narrow {share:g}")][0]["training_flops"]
                    style = dict(marker=MARKERS[i], color=COLORS[i], markerfacecolor=face, linestyle="")
                    ax.plot(flops / 1e12, losses[name], label=name, **style)
        ax.set(title={1: "full width"}.get(share, f"{share:g} of the experts' FLOPs"), xlabel="training TFLOPs")
        ax.margins(0.1, 0.4)  # room for the legend
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    axes[0].set_ylabel("validation loss (nats per byte)")
    fig.tight_layout()
    fig.savefig(out / "training.png")
    plt.close(fig)


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
    p.set_defaults(run=frontier)
    p = commands.add_parser("speed", description="time against width, for the layer, training, prefill and decoding")
    p.add_argument(
        "--preset", choices=PRESETS, default="demo", help="a model of this size with random weights; default demo"
    )
    p.add_argument("--checkpoint", help="a trained model instead")
    p.add_argument("--compile", action="store_true", help="also with torch.compile")
    p.add_argument(
        "--batch_size",
        type=int,
        default=0,
        help="sequences in a training step; default 16 on a GPU, 2048 tokens on a CPU",
    )
    p.add_argument("--seconds", type=float, default=15.0, help="measuring time for each row; default 15")
    p.add_argument("--seed", type=int, default=1337, help="of weights and tokens; default 1337")
    p.set_defaults(run=speed)
    p = commands.add_parser("study", description="train and compare every method at demo scale; hours on two cores")
    p.add_argument("--rows", help="only these, with semicolons between; default all")
    p.add_argument("--jobs", type=int, default=2, help="trainings at a time; default 2")
    p.set_defaults(run=study)
    for p in [commands.choices["frontier"], commands.choices["speed"]]:
        p.add_argument("--device", default="auto", help="cuda, mps or cpu; default: the first there is")
        p.add_argument("--dtype", default="auto", help="bfloat16 or float32; default: bfloat16 where it is faster")
    o = parser.parse_args()
    for name in ("eval_tokens", "batch_size", "seconds", "seed"):
        if getattr(o, name, 0) < 0:
            raise UsageError(f"--{name} must not be negative, not {getattr(o, name)}")
    o.run(o)


if __name__ == "__main__":
    run(main, "bench.py")
