"""
Train a MoSE, or one of the models it is compared with.

    python train.py demo                        # minutes on a CPU, after `python prepare.py stdlib`
    python train.py demo --recipe=moe           # the baseline: same model, data and order, full width only
    python train.py 55m --dataset=openwebtext   # the paper's sizes: 55m, 322m, 1b
    python train.py demo --resume               # go on where the last run was stopped
    torchrun --nproc_per_node=8 train.py 322m   # on several GPUs

Writes to out_dir: ckpt.pt (the best model by validation loss), last.pt (the latest, with what --resume needs) and
log.jsonl. Every option below is --name=value and overrides the preset.
"""

import dataclasses
import fcntl
import json
import math
import os
import pickle
import signal
import sys
import time
import zipfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from model import (
    GPT, GRID, FewerExperts, GPTConfig, RouterWidth, Stats, UsageError, check_width, width_to_neurons,
)  # fmt: skip
from prepare import open_dataset, option, parse, run

# -----------------------------------------------------------------------------
# Options

RECIPES = {
    "serve": "at router widths, budget and gamma random for each sequence",
    "mose": "at full width and again at one random uniform width, as in the paper",
    "moe": "at full width only",
    "m-moe": "with a random number of experts in every layer",
}
EVAL_WIDTHS = (1.0, 0.75, 0.5, 0.25)


@dataclass
class TrainConfig:
    # data and output
    dataset: str = option("openwebtext", "folder in data/, or a path to any with *train*.bin and *val*.bin shards")
    out_dir: str = option("", "for checkpoints and log; default out/PRESET, and -RECIPE if that is not the default one")
    resume: bool = option(False, "continue the run in out_dir; options not given are taken from it")
    # what to train
    recipe: str = option("serve", "how micro-batches run: " + "; ".join(f"{k}, {v}" for k, v in RECIPES.items()))
    seed: int = option(1337, "of initial weights, data order, widths and dropout", least=0)
    n_layer: int = option(6, "blocks")
    n_head: int = option(6, "attention heads")
    n_embd: int = option(384, "model width d")
    n_expert: int = option(8, "experts in an MoE block; 1 trains a dense GPT")
    top_k: int = option(2, "experts a token is sent to")
    n_shared: int = option(0, "experts that every token visits besides")
    expert_hidden: int = option(0, "neurons of one expert, a multiple of 8; 0 means 4 * n_embd", least=0)
    train_width: float = option(1.0, "share of those neurons that experts get: a narrow model, for comparison")
    moe_every: int = option(2, "every how many blocks one holds experts, starting with the first")
    block_size: int = option(1024, "context length in tokens", least=1)
    dropout: float = option(0.0, "dropout rate")
    balance_coef: float = option(0.01, "weight of the load-balancing loss", least=0)
    z_coef: float = option(0.001, "weight of the router's z-loss", least=0)
    bias_rate: float = option(0.0, "step of balancing by a bias, with --balance_coef=0; 0.001 in DeepSeek-V3", least=0)
    norm_topk_prob: bool = option(True, "renormalise the selected probabilities; False for --top_k=1")
    # optimisation: AdamW, linear warm-up, cosine decay to a tenth
    steps: int = option(6000, "optimizer steps", least=1)
    tokens_per_step: int = option(524288, "tokens in one optimizer step, over all micro-batches", least=1)
    batch_size: int = option(16, "sequences in one micro-batch: as many as memory holds", least=1)
    learning_rate: float = option(6e-4, "peak learning rate", least=1e-12)
    warmup_steps: int = option(200, "steps until the peak", least=0)
    weight_decay: float = option(0.1, "of matrices; norms are not decayed", least=0)
    grad_clip: float = option(1.0, "largest gradient norm; 0 turns clipping off", least=0)
    # reporting
    eval_interval: int = option(250, "steps between evaluations, each of which also saves", least=1)
    eval_tokens: int = option(262144, "validation tokens per evaluation, always the same ones", least=1)
    log_interval: int = option(10, "steps between printed lines; log.jsonl has every step", least=1)
    # machine
    device: str = option("auto", "cuda, mps or cpu; auto takes the first there is")
    dtype: str = option("auto", "bfloat16 or float32; auto takes bfloat16 where it is faster")
    compile: bool = option(False, "use torch.compile: slow to start, then faster")

    @property
    def micro_batches(self):
        return self.tokens_per_step // (self.batch_size * self.block_size)


PRESETS = {
    "demo": dict(
        dataset="stdlib", n_layer=4, n_head=4, n_embd=128, moe_every=1, block_size=128, steps=800,
        tokens_per_step=3072, batch_size=24, learning_rate=4e-3, warmup_steps=50, eval_interval=200,
        eval_tokens=16384, log_interval=20,
    ),
    "55m": dict(),
    "322m": dict(n_layer=12, n_head=12, n_embd=768, steps=12000, batch_size=16, learning_rate=4e-4),
    "1b": dict(n_layer=24, n_head=16, n_embd=1024, steps=30000, batch_size=8, learning_rate=3e-4),
}  # fmt: skip

# what a resumed run may change; anything else would make it another run
MAY_CHANGE = set("resume out_dir steps eval_interval eval_tokens log_interval device compile".split())


def parse_options(argv=None):
    """The command line -> (preset, TrainConfig, the names of the options that were given)."""
    preset, o, given = parse(TrainConfig, __doc__, argv, PRESETS)
    other = "" if o.recipe == TrainConfig.recipe else f"-{o.recipe}"
    o.out_dir = o.out_dir or f"out/{preset}{other}"
    return preset, o, given


def check_options(o):
    """What one option alone cannot say. Refuse what cannot work before anything is spent or written."""
    if o.recipe not in RECIPES:
        raise UsageError(f"--recipe must be one of {', '.join(RECIPES)}, not {o.recipe!r}")
    if o.recipe != "moe" and o.n_expert == 1:
        raise UsageError(f"--recipe={o.recipe} needs experts to slim: use --recipe=moe with --n_expert=1")
    check_width(o.train_width, "--train_width")
    if o.seed >= 2**63:
        raise UsageError(f"--seed must be below 2**63, not {o.seed}")
    micro = o.batch_size * o.block_size
    if o.tokens_per_step % micro:
        raise UsageError(
            f"--tokens_per_step {o.tokens_per_step} must be a multiple of batch_size * block_size = {micro}: "
            f"try {max(1, round(o.tokens_per_step / micro)) * micro}"
        )
    if o.eval_tokens < o.block_size:
        raise UsageError(f"--eval_tokens {o.eval_tokens} must be at least one sequence, block_size = {o.block_size}")


def make_config(o, vocab_size):
    """The model that the options describe, for data with this many token ids."""
    shared = {f.name: getattr(o, f.name) for f in dataclasses.fields(GPTConfig) if hasattr(o, f.name)}
    shared["expert_hidden"] = width_to_neurons(o.train_width, o.expert_hidden or 4 * o.n_embd)
    return GPTConfig(vocab_size=-(-vocab_size // 64) * 64, **shared)  # padded: matrix units like multiples


# -----------------------------------------------------------------------------
# The machine


def choose_device(device, dtype, n_embd):
    """Resolve "auto" for a model of width n_embd. Returns device, dtype of matrix products, a line that says why.

    On a CPU it also turns oneDNN on or off for this process.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = device.partition(":")
    n = torch.cuda.device_count()
    if kind not in ("cuda", "mps", "cpu") or (index and not (kind == "cuda" and index.isdecimal() and int(index) < n)):
        raise UsageError(f"--device must be cuda, cuda:0 to cuda:{max(0, n - 1)}, mps or cpu, not {device!r}")
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise UsageError(f"--device={device}: this machine, or this build of PyTorch, has none")
    if kind == "cuda":
        name, fast = torch.cuda.get_device_name(device), torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        name = f"{torch.get_num_threads()} CPU threads"
        # small products of ever new shapes, as a router makes them, cost bfloat16 more than they save
        fast = n_embd >= 256 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    else:
        name, fast = "Apple GPU", False
    why = "asked for"
    if dtype == "auto":
        dtype, why = ("bfloat16", "fast here") if fast else ("float32", "bfloat16 would not be faster here")
    if dtype not in ("bfloat16", "float32"):
        raise UsageError(f"--dtype must be bfloat16 or float32, not {dtype!r}")
    if kind == "cpu":  # oneDNN keeps code and memory for 1,024 shapes, and a router makes ever new ones; MKL keeps none
        torch.backends.mkldnn.enabled = dtype == "bfloat16" or not torch.backends.mkl.is_available()
    return device, getattr(torch, dtype), f"{kind} ({name}), {dtype} ({why})"


def autocast(device, dtype):
    """Matrix products in dtype; parameters, norms and losses stay float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.split(":")[0], dtype=dtype)


def join_processes(device):
    """Under torchrun, join the others: returns (rank, number of processes, this one's device)."""
    if "RANK" not in os.environ:
        return 0, 1, device
    gpu = device.startswith("cuda")
    if not gpu and device != "cpu":
        raise UsageError(f"several processes need CUDA or --device=cpu, not {device}")
    if gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def all_sum(tensor):
    """The sum of every process's tensor, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class Stop:
    """Ctrl-C and SIGTERM: finish the step, save, leave. A second Ctrl-C does not wait."""

    def __enter__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)
        return self

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# -----------------------------------------------------------------------------
# Checkpoints and the log

KEYS = ("model", "config", "tokenizer", "vocab_size", "recipe", "step", "options")
RESUME_KEYS = KEYS + ("optimizer", "state", "data", "preset")


def save_checkpoint(path, checkpoint):
    """Write so that path always holds a complete checkpoint: the old one until the new one is on the disk."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:  # torch wraps what the disk says in a RuntimeError
        Path(temporary).unlink(missing_ok=True)
        reason = (e.__context__ if isinstance(e, RuntimeError) else None) or e
        old = ": the one before is intact" if os.path.exists(path) else ""
        raise UsageError(f"{path} could not be written ({str(reason).splitlines()[0]}){old}") from e
    os.replace(temporary, path)


def load_checkpoint(path, keys=KEYS):
    """Read a checkpoint without running code from it. Raises UsageError if it is missing, damaged or not ours."""
    if not os.path.isfile(path):
        raise UsageError(f"no checkpoint {path}: train.py writes them")
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise UsageError(f"{path} is damaged: its record {damaged} does not match its checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as e:
        raise UsageError(f"{path} is damaged or not a checkpoint ({type(e).__name__})") from e
    missing = [key for key in keys if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise UsageError(f"{path} is not a checkpoint of train.py: it lacks {', '.join(missing)}")
    return checkpoint


def load_model(path):
    """A checkpoint's path -> (its model in evaluation mode, the checkpoint)."""
    checkpoint = load_checkpoint(path)
    try:
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError) as e:
        raise UsageError(f"{path} does not fit this version of model.py: {str(e).splitlines()[0]}") from e
    return model.eval(), checkpoint


def to_inference(model, device, dtype):
    """Ready to generate: all weights in dtype, so that none is cast for every token; the routers stay float32."""
    for name, p in model.eval().to(device).named_parameters():
        if "router" not in name:
            p.data = p.data.to(dtype)
    return model


def resumed(preset, o, given):
    """The options and the checkpoint of the run in out_dir, with what may change taken from the command line."""
    checkpoint = load_checkpoint(Path(o.out_dir) / "last.pt", RESUME_KEYS)
    saved = checkpoint["options"]
    for name in given - MAY_CHANGE:
        old, new = saved.get(name), getattr(o, name)
        if old != new:
            raise UsageError(f"--{name}={new} contradicts the run in {o.out_dir}, which has {old}; leave it out")
    if preset != checkpoint["preset"]:
        raise UsageError(f"the run in {o.out_dir} is of preset {checkpoint['preset']}, not {preset}")
    return TrainConfig(**{**saved, **{name: getattr(o, name) for name in given}, "out_dir": o.out_dir}), checkpoint


def lock_folder(folder):
    """Keep other runs out of the folder for as long as this process lives, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UsageError(f"another run is writing to {folder}: wait for it, or choose another --out_dir") from e
    return lock


class Log:
    """log.jsonl. A resumed run drops the lines after its step, and a last line that is not whole."""

    def __init__(self, path, step):
        self.path = path
        whole = [line for line in open(path) if line.endswith("\n")] if path.exists() else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
        os.replace(temporary, path)

    def __call__(self, **entry):
        with open(self.path, "a") as f:
            f.write(json.dumps(entry) + "\n")


# -----------------------------------------------------------------------------
# Training


def learning_rate(step, o):
    """Linear warm-up, then a cosine from the peak to a tenth of it at the last step."""
    if step < o.warmup_steps:
        return o.learning_rate * (step + 1) / o.warmup_steps
    done = (step - o.warmup_steps) / max(1, o.steps - o.warmup_steps)
    return o.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def make_optimizer(model, o):
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [dict(params=decayed, weight_decay=o.weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=o.learning_rate, betas=(0.9, 0.95), fused=True)


class RandomExperts:
    """Width policy of recipe m-moe: every block draws how many of its selected experts run, 1 to top_k."""

    def __init__(self, rng, top_k):
        self.rng, self.top_k = rng, top_k

    def at(self, layer):
        return FewerExperts(1 + self.rng.integers(self.top_k))


def training_passes(o, rng, device="cpu"):
    """The passes of one micro-batch: [(width or width policy, what its mean loss counts), ...]."""
    if o.recipe == "moe":
        return [(1.0, 1)]
    if o.recipe == "m-moe":
        return [(RandomExperts(rng, o.top_k), 1)]
    if o.recipe == "mose":  # the paper's equation 6
        return [(1.0, 0.5), (rng.integers(1, GRID).item() / GRID, 0.5)]
    # serve: what inference will ask for, drawn for every sequence
    draws = rng.uniform((0.1, 0.0), (1.0, 3.0), (o.batch_size, 2)).repeat(o.block_size, axis=0)  # (N, 2)
    budget, gamma = torch.tensor(draws, dtype=torch.float32, device=device).split(1, dim=1)
    return [(RouterWidth(budget, gamma), 1)]


def accumulate(o, model, data, step, micros, device, dtype, stats):
    """Add up the gradients of one step. Returns its mean loss at full width and its mean loss at other widths.

    Batch, widths and dropout of a micro-batch are functions of the seed, the step and the micro-batch alone: so a
    resumed run is the run that was never stopped, and several processes make the run of one.
    """
    losses = {True: [], False: []}  # at full width, narrower
    for micro in micros:
        rng = np.random.default_rng([o.seed, step, micro + 1])  # [seed, step] is the batch's, and so is [..., 0]
        batch = data.random_batch(o.seed, step, micro * o.batch_size, o.batch_size)
        idx, targets = (t.pin_memory().to(device, non_blocking=True) if "cuda" in device else t.to(device) for t in batch)
        passes = training_passes(o, rng, device)
        torch.manual_seed(rng.integers(2**62))  # dropout
        for i, (width, weight) in enumerate(passes):
            # gradients are exchanged once, at the end (what DDP's no_sync toggles)
            model.require_backward_grad_sync = micro == micros[-1] and i == len(passes) - 1
            with autocast(device, dtype):
                _, loss, aux = model(idx, targets, width, stats=stats)
            ((loss + aux) * (weight / len(micros))).backward()
            losses[width == 1].append(loss.detach())
    return [torch.stack(l).mean() if l else torch.zeros((), device=device) for l in (losses[True], losses[False])]


def balance_by_bias(model, load, rate):
    """DeepSeek-V3's balancing without a loss: busy experts become a little less likely."""
    load = all_sum(load).float()
    for block, n in zip(model.transformer.h, load):
        if block.moe:
            block.mlp.bias += rate * (n.mean() - n).sign()


@torch.no_grad()
def sequence_losses(model, batches, width, device, dtype, stats=None):
    """Mean loss of every sequence of batches [(idx, targets), ...] at one width, in nats per token: (sequences,)."""
    losses = [torch.zeros(0, device=device)]
    for idx, targets in batches:
        with autocast(device, dtype):
            logits = model(idx.to(device), width=width, stats=stats)[0]
        pairs = zip(logits, targets.to(device))  # a sequence at a time: float32 of a whole batch may not fit
        losses.append(torch.stack([F.cross_entropy(l.float(), t) for l, t in pairs]))
    return torch.cat(losses).cpu()


def evaluate(model, batches, device, dtype):
    """Validation loss {width: nats per token}, and each expert's load as a multiple of its fair share (layers, E)."""
    model.eval()
    losses, stats = {}, Stats(model.config, device)
    for width in EVAL_WIDTHS if model.config.n_expert > 1 else (1.0,):
        mine = sequence_losses(model, batches, width, device, dtype, stats if width == 1 else None)
        total, n = all_sum(torch.tensor([mine.sum(), len(mine)], device=device)).tolist()
        losses[width] = total / n
    model.train()
    load = all_sum(stats.load).cpu().float()
    load = load[load.sum(1) > 0]  # the blocks with experts
    return losses, load / load.mean(1, keepdim=True)


@dataclass
class State:
    """Where a run is, besides its weights and optimizer. All of it is in last.pt."""

    step: int = 0  # steps done
    evaluated: int = -1  # the step of the last evaluation
    best: float = math.inf  # the validation loss of ckpt.pt
    flops: float = 0.0  # spent on training


def train(preset, o, given):
    # what to do, and whether it can be done
    out, last = Path(o.out_dir), Path(o.out_dir) / "last.pt"
    if not o.resume and (last.exists() or (out / "ckpt.pt").exists()):
        raise UsageError(f"{out} already holds a run: add --resume to continue it, or choose another --out_dir")
    written = last.stat().st_mtime_ns if last.exists() else None
    o, checkpoint = resumed(preset, o, given) if o.resume else (o, None)
    check_options(o)
    device, dtype, why = choose_device(o.device, o.dtype, o.n_embd)
    train_data, val_data, tokenizer, vocab_size = open_dataset(o.dataset, o.block_size)
    config = make_config(o, vocab_size)
    identity = dict(config=asdict(config), tokenizer=tokenizer, vocab_size=vocab_size, recipe=o.recipe, preset=preset)
    identity["data"] = [train_data.fingerprint(), val_data.fingerprint(), tokenizer]
    if checkpoint and checkpoint["data"] != identity["data"]:
        raise UsageError(f"the data in {o.dataset} is not what the run in {out} was trained on: it has changed since")
    if checkpoint and checkpoint["config"] != identity["config"]:
        raise UsageError(f"the run in {out} was made by another version of model.py: its config has other fields")
    rank, world, device = join_processes(device)
    if o.micro_batches % world:
        raise UsageError(
            f"{world} processes cannot share {o.micro_batches} micro-batch(es): lower --batch_size, so that their "
            f"number, tokens_per_step / (batch_size * block_size), is a multiple of {world}"
        )
    if rank == 0:
        lock = lock_folder(out)  # noqa: F841, held until the process ends
        if written != (last.stat().st_mtime_ns if last.exists() else None):
            raise UsageError(f"another run has just written {last}: try again")

    # model, optimizer, state
    torch.manual_seed(o.seed)
    torch.set_float32_matmul_precision("high")
    model = GPT(config).to(device)
    optimizer = make_optimizer(model, o)
    state = State()
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        state = State(**checkpoint["state"])
        if checkpoint["options"]["eval_tokens"] != o.eval_tokens:
            state.best = math.inf  # of another text
    resuming, checkpoint = checkpoint is not None, None  # as large as the model and its optimizer
    if o.compile:
        model.body = torch.compile(model.body)
    parallel = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    micros = range(rank, o.micro_batches, world)
    val_batches = val_data.fixed_batches(o.eval_tokens, o.batch_size)
    val_batches = [(i[rank::world], t[rank::world]) for i, t in val_batches if len(i) > rank]

    say = print if rank == 0 else lambda *args, **kwargs: None
    log = Log(out / "log.jsonl", state.step or -1) if rank == 0 else lambda **entry: None

    def save(path, **more):
        if rank == 0:
            everything = dict(model=model.state_dict(), options=asdict(o), state=asdict(state), step=state.step, **identity)
            save_checkpoint(path, dict(everything, tokens=state.step * o.tokens_per_step, **more))

    total, active = model.num_params()
    say(f"{preset}, recipe {o.recipe}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M per token at full width")
    say(f"{why}; {o.tokens_per_step:,} tokens per step, {o.micro_batches} micro-batch(es) of {o.batch_size} x "
        f"{o.block_size}" + (f", on {world} processes" if world > 1 else ""))  # fmt: skip
    say(f"{train_data.n_tokens:,} training and {val_data.n_tokens:,} validation tokens ({tokenizer}) from {o.dataset}", flush=True)
    if resuming:
        say(f"resuming after step {state.step}" + (", the last one: raise --steps to go on" if state.step >= o.steps else ""))
    else:
        save(last, optimizer=optimizer.state_dict())  # from here on --resume works, whatever happens

    with Stop() as stop:
        began, first, uneven = time.perf_counter(), state.step, set()
        while True:
            # evaluate, save
            last_step = state.step >= o.steps
            if (last_step or state.step % o.eval_interval == 0) and state.evaluated != state.step:
                losses, load = evaluate(model, val_batches, device, dtype)
                state.evaluated = state.step
                # ckpt.pt is the best at full width, or over the uniform widths if the recipe is to serve others too
                loss = losses[1.0] if o.recipe in ("moe", "m-moe") else sum(losses.values()) / len(losses)
                line = f"eval {state.step}/{o.steps} | " + " | ".join(f"width {w:g}: {l:.4f}" for w, l in losses.items())
                log(step=state.step, val_loss={f"{w:g}": l for w, l in losses.items()},
                    busiest=load.amax(1).tolist(), idlest=load.amin(1).tolist())  # fmt: skip
                if loss < state.best:
                    state.best, line = loss, line + " | best"
                    save(out / "ckpt.pt")
                save(last, optimizer=optimizer.state_dict())
                say(line, flush=True)
                limit = min(3.0, 1 + 0.9 * (o.n_expert / o.top_k - 1))  # n_expert / top_k is the most
                before, uneven = uneven, {i for i, most in enumerate(load.amax(1).tolist()) if most > limit and state.step > o.warmup_steps}
                for i in sorted(uneven & before):  # once can be chance
                    most = load[i].max()
                    say(f"warning: one expert of MoE layer {i} gets {most:.1f} times its fair share: the router is "
                        "collapsing. Begin anew with a higher --balance_coef or --bias_rate=0.001")  # fmt: skip
            if last_step:
                break

            # one step
            started, stats = time.perf_counter(), Stats(config, device)
            full, narrow = accumulate(o, parallel, train_data, state.step, micros, device, dtype, stats)
            norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
            means = torch.stack([full, narrow, norm, stats.mean_width(stats.ran), full.new_tensor(float(stop.asked))])
            full, narrow, norm, width, stopping = (all_sum(means) / world).tolist()  # the only synchronisation
            if not all(map(math.isfinite, (full, narrow, norm))):
                save(last, optimizer=optimizer.state_dict())
                all_sum(torch.zeros(1, device=device))  # who leaves first would have torchrun kill the one who saves
                raise UsageError(
                    f"step {state.step + 1}: loss {full:g} at full width, {narrow:g} at others, gradient norm {norm:g}; "
                    f"stopped before the update, saved {last}. First gradients that are not finite: "
                    f"{', '.join(not_finite(model)[:3]) or 'none'}. A new run with a lower --learning_rate or a longer "
                    "--warmup_steps usually helps"
                )
            if o.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), o.grad_clip, torch.tensor(norm))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, o)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if o.bias_rate:
                balance_by_bias(model, stats.load, o.bias_rate)
            state.step += 1
            state.flops += 3 * stats.tokens * world * model.flops_per_token(width)[0]

            # report
            seconds = time.perf_counter() - started
            means = dict(loss_full=full, loss_narrow=narrow)
            if o.recipe == "moe":
                means.pop("loss_narrow")
            if o.recipe in ("serve", "m-moe"):
                means.pop("loss_full")
            log(step=state.step, **means, grad_norm=norm, lr=learning_rate(state.step - 1, o),
                tokens_per_s=o.tokens_per_step / seconds, flops=state.flops)  # fmt: skip
            if state.step % o.log_interval == 0 or state.step == o.steps:
                left = int((o.steps - state.step) * (time.perf_counter() - began) / (state.step - first))
                shown = " | ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in means.items())
                say(f"step {state.step}/{o.steps} | {shown} | {o.tokens_per_step / seconds:,.0f} tokens/s | "
                    f"{left // 60}m{left % 60:02d}s left", flush=True)  # fmt: skip
            if stopping:
                save(last, optimizer=optimizer.state_dict())
                all_sum(torch.zeros(1, device=device))
                say(f"stopped at step {state.step}; {last} is saved: continue with --resume", flush=True)
                sys.exit(130)
    say(f"{out / 'ckpt.pt'} is the best model, {last} the latest")


def not_finite(model):
    """Names of the parameters whose gradients are not finite."""
    return [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]


def main():
    train(*parse_options())
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main, "train.py")
