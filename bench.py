"""
Measure: what quality costs, and whether a narrower width is a shorter time.

    python bench.py frontier                                      # out/demo/ckpt.pt: loss against compute
    python bench.py frontier out/demo/ckpt.pt out/demo-moe/ckpt.pt
    python bench.py speed --preset=55m                            # time against width on this machine
    python bench.py speed --checkpoint=out/demo/ckpt.pt --compile

frontier runs every checkpoint at budgets from a quarter of its experts to all of them, with each way of spending the
budget, on the same validation text: slimmed experts, fewer experts, or skipping those of low probability. Checkpoints
of recipe moe are cut to narrower widths, which they were never trained for. It prints a table, writes frontier.json and
frontier.png beside the first checkpoint, and beside each the widths that it learned: calibrated.json, which
`sample.py --budget=0.5 --calibrated` serves.

speed times the layer, the training step, prefill and decoding at every width, each beside a dense network of the same
active FLOPs, in turns so that a noisy machine slows both. It prints a table and writes speed.json and speed.png.
"""

import argparse  # noqa: I001
import dataclasses
import hashlib
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch
import torch.nn as nn

from model import (
    GPT, GRID, MLP, FewerExperts, GPTConfig, KVCache, PerLayer, RouterWidth, SlimmableMoE, Stats, UsageError,
    width_to_neurons,
)  # fmt: skip
from prepare import Parser, open_dataset, run
from train import (
    PRESETS, TrainConfig, autocast, choose_device, load_checkpoint, load_model, make_config, make_optimizer,
    sequence_losses, to_inference,
)  # fmt: skip

# Okabe and Ito: told apart by everybody
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vP*"


def draw(path, panels, size=(8, 5)):
    """Write a picture of one panel or several, side by side. A panel is a dict: `curves`, a list of (label, x, y) or
    (label, x, y, options of matplotlib's errorbar), and what Axes.set takes: title, xlabel, ylabel, ylim ...
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(panels), figsize=size, dpi=130, squeeze=False)
    for ax, panel in zip(axes[0], panels):
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
    """Replace the file as a whole, so that an interruption leaves the old one."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(temporary, path)


# -----------------------------------------------------------------------------
# frontier: loss against FLOPs

BUDGETS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.2, 0.15)
NOT_SLIM = ("moe", "m-moe")  # recipes that train full width only


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


def fingerprint(path):
    """A checksum of a checkpoint: what was learned for other weights does not fit."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_calibrated(path):
    """calibrated.json beside the checkpoint at path: {file name: {"sha256": fingerprint, "budgets": {"0.5": [(budget,
    gamma) of every block, or None], ...}}}, or {} if there is none."""
    file = Path(path).parent / "calibrated.json"
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as e:
        raise UsageError(f"{file} is damaged ({e}): delete it and run `python bench.py frontier {path}`") from e


def load_calibrated(path, budget):
    """The PerLayer policy that `bench.py frontier` learned for this budget of the checkpoint at path. Raises UsageError
    if it learned none: nothing is interpolated."""
    entry, again = read_calibrated(path).get(Path(path).name), f"run `python bench.py frontier {path}`"
    if not os.path.isfile(path):
        raise UsageError(f"no checkpoint {path}: train.py writes them")
    if not entry:
        raise UsageError(f"{path} is not calibrated: {again} first (it needs recipe serve or mose, and top_k above 1)")
    if entry["sha256"] != fingerprint(path):
        raise UsageError(f"{path} has changed since it was calibrated: {again} again")
    if str(float(budget)) not in entry["budgets"]:
        raise UsageError(f"{path} is calibrated for budgets {', '.join(entry['budgets'])}, not for {budget:g}")
    return PerLayer([layer and RouterWidth(*layer) for layer in entry["budgets"][str(float(budget))]])


def frontier_policies(model, recipe, calibration, device, dtype):
    """What frontier measures, in this order: (what a point says of it, the width or policy), uniform widths first."""
    c, name = model.config, "truncated" if recipe in NOT_SLIM else "uniform"
    yield dict(policy="uniform", budget=1.0, gamma=None), 1.0
    if c.n_expert == 1:
        return
    for budget in BUDGETS[1:]:
        yield dict(policy=name, budget=budget, gamma=None), budget
        if name == "truncated":
            continue
        if c.top_k == 1:
            yield (
                dict(policy="across tokens", budget=budget, gamma=1.0),
                fit_scale(model, calibration[:5], budget, 1.0, device, dtype),
            )
            continue
        yield dict(policy="router", budget=budget, gamma=1.0), RouterWidth(budget)
        policy = calibrate(model, calibration, budget, device, dtype)
        layers = [(p.budget, p.gamma) for p in policy.policies if p]
        mean = statistics.mean(gamma for _, gamma in layers)
        yield dict(policy="calibrated", budget=budget, gamma=mean, layers=layers), policy
    if c.top_k > 1:  # whole experts or none; the budget is what that comes to
        for n in sorted({c.top_k // 2, c.top_k // 4, 1} - {0}, reverse=True):
            budget = (n + c.n_shared) / (c.top_k + c.n_shared)
            yield dict(policy="fewer experts", budget=budget, gamma=None), FewerExperts(n)
        for share in (0.4, 0.7):
            yield dict(policy="skip", budget=None, gamma=None), Skip(share)
        for p in (0.4, 0.7) if c.top_k > 2 else ():  # with two experts, it is skipping by another name
            yield dict(policy="top-p", budget=None, gamma=None), TopP(p)


def frontier_points(path, model, checkpoint, val, calibration, device, dtype):
    """Measure every policy and budget of one checkpoint. Returns a list of dicts, one per point, and its
    entry of calibrated.json."""
    points, uniform, learned, tokens = [], {}, {}, sum(idx.numel() for idx, _ in val)
    for what, width in frontier_policies(model, checkpoint["recipe"], calibration, device, dtype):
        sequence_losses(model, val[:1], width, device, dtype)  # warm up
        stats, started = Stats(model.config, device), time.perf_counter()
        losses = sequence_losses(model, val, width, device, dtype, stats).double()
        seconds = time.perf_counter() - started
        used, ran = 1.0, 1.0
        if model.config.n_expert > 1:
            used, ran = (stats.mean_width(neurons).item() for neurons in (stats.used, stats.ran))
        total, expert = model.flops_per_token(ran)
        point = dict(checkpoint=str(path), recipe=checkpoint["recipe"], **what)
        point.update(mean_width=used, loss=losses.mean().item(), flops_total=total, flops_expert=expert)
        point.update(budget=what["budget"] or used, tokens_per_s=tokens / seconds)
        if checkpoint["tokenizer"] == "byte":
            point["bits_per_byte"] = point["loss"] / math.log(2)
        else:
            point["perplexity"] = math.exp(point["loss"])
        if isinstance(width, float):
            uniform[width] = losses
        elif what["budget"] in uniform:  # the same sequences, so the error of the difference is far below the loss's
            difference = losses - uniform[what["budget"]]
            point["minus_uniform"] = difference.mean().item()
            point["minus_uniform_se"] = (difference.std() / math.sqrt(len(difference))).item()
        if what["policy"] == "calibrated":
            learned[str(what["budget"])] = [p and (p.budget, p.gamma) for p in width.policies]
        points.append(point)
        print_point(point, first=len(points) == 1)
    return points, dict(sha256=fingerprint(path), budgets=learned)


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
    key, unit = ("bits_per_byte", "bits per byte") if "bits_per_byte" in points[0] else ("loss", "nats per token")
    grouped, curves = {}, []
    for p in points:
        grouped.setdefault((p["checkpoint"], p["policy"]), []).append(p)
    fulls = {checkpoint: curve[0] for (checkpoint, policy), curve in grouped.items() if policy == "uniform"}
    for (checkpoint, policy), curve in grouped.items():
        full = fulls[checkpoint]
        if policy == "uniform":
            policy = "uniform" if len(curve) > 1 else "full width"
        else:  # all policies are one at full width
            curve = sorted([full, *curve], key=lambda p: -p["flops_total"])
        label = f"{Path(checkpoint).parent.name}/{Path(checkpoint).name}: {policy}" if len(fulls) > 1 else policy
        style = dict(linestyle="--" if full["recipe"] in NOT_SLIM else "-")
        curves.append((label, [p["flops_total"] / 1e6 for p in curve], [p[key] for p in curve], style))
    slim = [p[key] for p in points if p["policy"] != "truncated"]
    low, high = min(slim), max(slim)  # a model cut to a width it was not trained for goes off the scale
    panel = dict(curves=curves, title="What quality costs: one checkpoint, every budget")
    panel.update(xlabel="forward MFLOPs per token, everything counted", ylabel=f"validation loss ({unit})")
    if high > low:
        panel["ylim"] = low - 0.1 * (high - low), high + 0.6 * (high - low)
    draw(path, [panel])


def load_models(paths, o):
    """Load checkpoints that can be compared: [(path, model, checkpoint), ...], the device, dtype and why."""
    loaded = [(path, *load_model(path)) for path in paths]
    identity = lambda checkpoint: (checkpoint["tokenizer"], checkpoint["config"]["block_size"])
    for path, _, checkpoint in loaded:
        if identity(checkpoint) != identity(loaded[0][2]):
            raise UsageError(f"{path} and {paths[0]} differ in tokenizer or context: they cannot be compared")
    device, dtype, why = choose_device(o.device, o.dtype, max(model.config.n_embd for _, model, _ in loaded))
    return loaded, device, dtype, why


def frontier(o):
    loaded, device, dtype, why = load_models(o.checkpoints, o)
    first = loaded[0][2]
    dataset, block_size = o.dataset or first["options"]["dataset"], first["config"]["block_size"]
    train, val, tokenizer, _ = open_dataset(dataset, block_size)
    if tokenizer != first["tokenizer"]:
        raise UsageError(
            f"{dataset} has {tokenizer} tokens, the checkpoint knows {first['tokenizer']}: choose another --dataset"
        )
    if o.eval_tokens < block_size:
        raise UsageError(f"--eval_tokens must be at least one sequence, {block_size}, not {o.eval_tokens}")
    for path in o.checkpoints:
        read_calibrated(path)  # refuse a damaged file now, not when it is to be extended
    val_batches = val.fixed_batches(o.eval_tokens, o.batch_size)
    # the paper's 50 batches of 6 sequences, from the training split and never trained on in this order
    calibration = [train.random_batch(o.seed, 10**9 + i, 0, 6) for i in range(50)]
    sequences, points = sum(len(idx) for idx, _ in val_batches), []
    print(
        f"{why}; torch {torch.__version__}; {sequences} validation sequences of {block_size} tokens from {dataset}",
        flush=True,
    )
    folder = Path(o.checkpoints[0]).parent
    written = [folder / "frontier.json", folder / "frontier.png"]
    for path, model, checkpoint in loaded:
        mine, learned = frontier_points(path, model.to(device), checkpoint, val_batches, calibration, device, dtype)
        points += mine
        if learned["budgets"]:
            written.append(Path(path).parent / "calibrated.json")
            write_json(written[-1], {**read_calibrated(path), Path(path).name: learned})
    results = dict(points=points, dataset=dataset, tokens=sequences * block_size, seed=o.seed, hardware=why)
    write_json(written[0], dict(results, torch=torch.__version__))
    plot_frontier(points, written[1])
    print(f"\nwrote {', '.join(map(str, dict.fromkeys(written)))}")


# -----------------------------------------------------------------------------
# speed: time against width

COLUMNS = (1.0, 0.75, 0.5, 0.25, RouterWidth(0.5))


def nominal_width(column):
    """The width that FLOPs are counted at. With a router budget a little more runs: see plan_chunks in model.py."""
    return column if isinstance(column, float) else torch.as_tensor(column.budget).mean().item()


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
        flops = n_tokens * 4 * d * k * h * (3 if backward else 1)
        cases["moe", column] = case(moe, column), n_tokens, flops
        cases["dense", column] = case(MLP(d, k * h).to(device, dtype)), n_tokens, flops
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

    def case(model, *widths):  # of the passes
        optimizer = make_optimizer(model, TrainConfig())

        def run_case():
            for width in widths:
                with autocast(device, dtype):
                    _, loss, aux = model(idx, idx, width)
                ((loss + aux) / len(widths)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run_case, idx.numel(), sum(3 * idx.numel() * model.flops_per_token(nominal_width(w))[0] for w in widths)

    moe = build(config, state, device, compile)
    cases = {("moe", 1.0): case(moe, 1.0)}
    if recipe == "mose":
        return {**cases, **{("moe", column): case(moe, 1.0, column) for column in COLUMNS[1:]}}
    draws = torch.rand(batch, 2, 1, device=device).repeat_interleave(config.block_size, 0)
    served = RouterWidth(0.1 + 0.9 * draws[:, 0], 3 * draws[:, 1])  # see training_passes in train.py
    cases["serve", 0.55] = case(moe, served)
    cases["dense", 1.0] = case(build(dense_config(config, 1.0), None, device, compile), 1.0)
    return cases


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
        cases["dense", column] = case(build(dense_config(config, column), None, device, compile), 1.0)
    return cases


def speed_rows(config, state, device, dtype, batch, compile):
    """{row: the function that makes its cases}"""
    T, n_tokens = config.block_size, 32768 if device.startswith("cuda") else 4096
    infer = lambda *sizes: lambda: inference_cases(config, state, device, dtype, compile, *sizes)
    rows = {
        "layer forward": lambda: layer_cases(config, device, dtype, n_tokens, False),
        "layer forward and backward": lambda: layer_cases(config, device, dtype, n_tokens, True),
        "training step": lambda: train_cases(config, state, device, dtype, batch, compile, "moe"),
        "training step, recipe mose": lambda: train_cases(config, state, device, dtype, batch, compile, "mose"),
        "prefill": infer(1, 0, T),
        "decode, batch 1": infer(1, T // 2, 1),
        "decode, batch 16": infer(16, T // 2, 1),
        "decode, batch 1, context a tenth full": infer(1, T // 10, 1),
        "decode, batch 1, context nine tenths full": infer(1, T * 9 // 10, 1),
    }
    # compiled layers are seen inside the training step
    return {row: make for row, make in rows.items() if not (compile and row.startswith("layer"))}


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
    print(f"{name} on {why}; torch {torch.__version__}; median of turns, {o.seconds:g} s a row")
    batch = o.batch_size or (16 if device.startswith("cuda") else max(1, 2048 // config.block_size))
    results = []
    for mode in ("eager", "compile") if o.compile else ("eager",):
        for row, make_cases in speed_rows(config, state, device, dtype, batch, mode == "compile").items():
            torch.manual_seed(o.seed)
            cases = make_cases()
            seconds = time_in_turns({key: f for key, (f, _, _) in cases.items()}, device, o.seconds)
            for (kind, column), (f, tokens, flops) in cases.items():
                t = seconds[kind, column]
                base = ("dense" if kind == "dense" else "moe", 1.0)
                result = dict(row=row, mode=mode, kind=kind, width=nominal_width(column), seconds=t)
                result.update(column="uniform" if isinstance(column, float) else "router", tokens_per_s=tokens / t)
                result.update(flops_per_s=flops / t, working_bytes=working_memory(f, device))
                # against the time that the FLOPs predict from the MoE's at full width: 1 means FLOPs are time
                result["vs_flops"] = t / seconds[base] / (flops / cases[base][2])
                if kind != "dense" and ("dense", column) in seconds:
                    result["vs_dense"] = t / seconds["dense", column] / (flops / cases["dense", column][2])
                results.append(result)
                print_speed(result, first=(kind, column) == next(iter(cases)))
    folder.mkdir(parents=True, exist_ok=True)
    report = dict(results=results, model=name, config=dataclasses.asdict(config), hardware=why)
    write_json(folder / "speed.json", dict(report, torch=torch.__version__, seed=o.seed))
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
    panels = []
    for row in ("layer forward and backward", "training step, recipe mose", "prefill", "decode, batch 1"):
        curves = {}
        for r in results:
            one_pass = row.startswith("training") and r["width"] == 1  # the others are two
            if r["row"] == row and not one_pass:
                policy = ", router widths" if r["column"] == "router" else ""
                label = {"moe": f"MoSE{policy}", "dense": f"dense, equal FLOPs{policy and ' of it'}"}[r["kind"]]
                curves.setdefault(label + (" (compiled)" if r["mode"] == "compile" else ""), []).append(r)
        lines = [(label, [r["width"] for r in c], [r["seconds"] * 1e3 for r in c]) for label, c in curves.items()]
        panels.append(dict(curves=lines, title=row, xlabel="mean width of the experts", ylabel="milliseconds"))
    draw(path, panels, size=(4 * len(panels), 4))


# -----------------------------------------------------------------------------


def number(kind, least):
    """For argparse: a finite number of at least `least`."""

    def parse(text):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be a finite number of at least {least}, not {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def main():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    p = commands.add_parser("frontier", description="loss against compute, for one checkpoint or several")
    p.add_argument("checkpoints", nargs="*", default=["out/demo/ckpt.pt"], help="default out/demo/ckpt.pt")
    p.add_argument("--dataset", help="default: the one the first checkpoint was trained on")
    p.add_argument("--eval_tokens", type=number(int, 1), default=131072, help="validation tokens; default 131072")
    p.add_argument("--batch_size", type=number(int, 1), default=16, help="sequences at a time; default 16")
    p.add_argument("--seed", type=number(int, 0), default=1337, help="of the calibration batches; default 1337")
    p.set_defaults(run=frontier)
    p = commands.add_parser("speed", description="time against width, for the layer, training, prefill and decoding")
    p.add_argument("--preset", choices=PRESETS, default="demo", help="its sizes, random weights; default demo")
    p.add_argument("--checkpoint", help="a trained model instead")
    p.add_argument("--compile", action="store_true", help="also with torch.compile")
    text = "sequences in a training step; default 16 on a GPU, 2048 tokens on a CPU"
    p.add_argument("--batch_size", type=number(int, 1), help=text)
    p.add_argument("--seconds", type=number(float, 0), default=15.0, help="measuring time for each row; default 15")
    p.add_argument("--seed", type=number(int, 0), default=1337, help="of weights and tokens; default 1337")
    p.set_defaults(run=speed)
    for p in commands.choices.values():
        p.add_argument("--device", default="auto", help="cuda, mps or cpu; default: the first there is")
        p.add_argument("--dtype", default="auto", help="bfloat16 or float32; default: bfloat16 where it is faster")
    o = parser.parse_args()
    o.run(o)


if __name__ == "__main__":
    run(main, "bench.py")
