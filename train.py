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

from model import GPT, GRID, FewerExperts, GPTConfig, Stats, UsageError, check_width, width_to_neurons
from prepare import open_dataset, option, parse, run

# -----------------------------------------------------------------------------
# Options

RECIPES = {
    "serve": "with 0 to top_k experts, random for each token, 0 being 0.2 to 1 of one",
    "mose": "at full width and again at one random uniform width, as in the paper",
    "moe": "at full width only",
    "m-moe": "with a random number of experts in every layer",
}


@dataclass
class TrainConfig:
    # data and output
    dataset: str = option("openwebtext", "folder in data/, or a path to any with *train*.bin and *val*.bin shards")
    out_dir: str = option("", "for checkpoints and log; default out/PRESET, and -RECIPE if that is not the default one")
    resume: bool = option(False, "continue the run in out_dir; options not given are taken from it")
    # what to train
    recipe: str = option("serve", "how micro-batches run: " + "; ".join(f"{k}, {v}" for k, v in RECIPES.items()))
    seed: int = option(1337, "of initial weights, data order, widths and dropout", least=0, most=2**63 - 1)
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

# what a resumed run may change (of the dataset the place, not the content); anything else would make it another run
MAY_CHANGE = set("resume out_dir dataset steps eval_interval eval_tokens log_interval device compile".split())


def parse_options(argv=None):
    """The command line -> (preset, TrainConfig, the names of the options that were given)."""
    preset, o, given = parse(TrainConfig, __doc__, argv, PRESETS)
    other = "" if o.recipe == TrainConfig.recipe else f"-{o.recipe}"
    o.out_dir = o.out_dir or f"out/{preset}{other}"
    return preset, o, given


def check_options(o):
    """Refuse what cannot work together, before anything is spent or written."""
    if o.recipe not in RECIPES:
        raise UsageError(f"--recipe must be one of {', '.join(RECIPES)}, not {o.recipe!r}")
    if o.recipe != "moe" and o.n_expert == 1:
        raise UsageError(f"--recipe={o.recipe} needs experts to slim: use --recipe=moe with --n_expert=1")
    check_width(o.train_width, "--train_width")
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
    dist.init_process_group()  # NCCL for what is on GPUs, gloo for what is on CPUs
    return dist.get_rank(), dist.get_world_size(), device


def check_processes(o, world, data):
    """Refuse what several processes cannot share: micro-batches that do not divide, and different data."""
    if o.micro_batches % world:
        sequences, left = divmod(o.tokens_per_step // o.block_size, world)
        fits = [b for b in range(1, o.batch_size + 1) if sequences % b == 0]
        raise UsageError(
            f"{world} processes cannot share {o.micro_batches} micro-batch(es) of --batch_size={o.batch_size} equally: "
            + (f"--tokens_per_step must be a multiple of {world * o.block_size}" if left or not fits else
               f"take --batch_size={fits[-1]}")
        )  # fmt: skip
    everybodys = [data] * world
    if world > 1:
        dist.all_gather_object(everybodys, data)
    if any(theirs != data for theirs in everybodys):
        raise UsageError(f"the processes have different data in {o.dataset}: copy it from one machine to all")


def all_sum(tensor):
    """The sum of every process's tensor, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def is_main():
    """Whether this is the one process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


class Stop:
    """Ctrl-C, SIGTERM, or nobody left who reads what we print: finish the step, save, leave. A second Ctrl-C does not
    wait."""

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

    def say(self, text):
        if is_main():
            try:
                print(text, flush=True)
            except BrokenPipeError:  # a pipe's reader, `tee` say, got the same Ctrl-C
                self.asked, sys.stdout = True, open(os.devnull, "w")


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
    if bad := [name for name, p in model.named_parameters() if not p.isfinite().all()]:
        raise UsageError(f"{path} holds weights that are not finite, first in {bad[0]}: use an earlier checkpoint")
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


def check_same(checkpoint, identity, o):
    """Refuse to go on with other data (in the same place, or another) or another model."""
    if checkpoint["data"] != identity["data"]:
        raise UsageError(f"the data in {o.dataset} is not what {o.out_dir} was trained on: it has changed since")
    if checkpoint["config"] != identity["config"]:
        raise UsageError(f"the run in {o.out_dir} was made by another version of model.py: its config has other fields")


def modified(path):
    return path.stat().st_mtime_ns if path.exists() else None


def lock_folder(folder):
    """Keep other runs out of the folder for as long as the returned file is open, however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UsageError(f"another run is writing to {folder}: wait for it, or choose another --out_dir") from e
    return lock


class Log:
    """log.jsonl, one line for every step and evaluation. A resumed run drops the lines after its step, and those that
    are not whole."""

    def __init__(self, path, step):
        self.path = path
        kept = []
        for line in open(path, errors="replace") if path.exists() else ():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # cut off by a full disk, or an editor's
                continue
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)

    def __call__(self, **entry):
        with open(self.path, "a") as f:
            f.write(json.dumps(entry) + "\n")


@dataclass
class State:
    """Where a run is, besides its weights and optimizer. All of it is in last.pt."""

    step: int = 0  # steps done
    evaluated: int = -1  # the step of the last evaluation
    best: float = math.inf  # the validation loss of ckpt.pt
    flops: float = 0.0  # spent on training


def save(path, model, o, state, identity, optimizer=None):
    """Save a run: for --resume with its optimizer, otherwise for those who use the model."""
    if is_main():
        checkpoint = dict(model=model.state_dict(), step=state.step, tokens=state.step * o.tokens_per_step, **identity)
        if optimizer:
            checkpoint["optimizer"] = optimizer.state_dict()
        save_checkpoint(path, dict(checkpoint, options=asdict(o), state=asdict(state)))


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
    """What multi-width training is: the passes of one micro-batch, [(width or policy, weight), ...]. Each runs all of
    its sequences; the step descends the weighted sum of their losses.
    """
    if o.recipe == "moe":
        return [(1.0, 1)]
    if o.recipe == "m-moe":
        return [(RandomExperts(rng, o.top_k), 1)]
    if o.recipe == "mose":  # the paper's equation 6
        return [(1.0, 0.5), (rng.integers(1, GRID).item() / GRID, 0.5)]
    # serve: whole experts first, widths for what is less than one
    n = rng.integers(o.top_k + 1, size=(o.batch_size * o.block_size, 1))  # (N, 1), of every token
    n = np.where(n > 0, n, rng.uniform(0.2, 1, n.shape))
    return [(FewerExperts(torch.tensor(n, dtype=torch.float32, device=device)), 1)]


def accumulate(o, model, data, step, micros, device, dtype, stats):
    """Add up the gradients of one step. Returns its mean loss at full width and its mean loss at other widths (0 if
    there was no such pass), in nats.

    Batch, widths and dropout of a micro-batch are functions of the seed, the step and the micro-batch alone: so a
    resumed run is the run that was never stopped, and several processes make the run of one.
    """
    losses = {True: [], False: []}  # at full width, at others
    for micro in micros:
        rng = np.random.default_rng([o.seed, step, micro + 1])  # + 1: to NumPy [..., 0] is [seed, step], the batch's
        batch = data.random_batch(o.seed, step, micro * o.batch_size, o.batch_size)
        batch = (t.pin_memory() if device.startswith("cuda") else t for t in batch)
        idx, targets = (t.to(device, non_blocking=True) for t in batch)
        passes = training_passes(o, rng, device)
        torch.manual_seed(rng.integers(2**62))  # dropout
        for i, (width, weight) in enumerate(passes):
            # processes exchange gradients once, after the last pass (what DistributedDataParallel.no_sync toggles)
            model.require_backward_grad_sync = micro == micros[-1] and i == len(passes) - 1
            with autocast(device, dtype):
                _, loss, aux = model(idx, targets, width, stats=stats)
            ((loss + aux) * (weight / len(micros))).backward()
            losses[width == 1].append(loss.detach())
    return [torch.stack(l).mean() if l else torch.zeros((), device=device) for l in losses.values()]


def take_step(o, model, parallel, optimizer, data, state, micros, device, dtype, stop):
    """One step of training, over all processes. Returns (mean loss at full width, at others, gradient norm, whether a
    process was told to stop). Where one of the first three is not finite nothing is updated.
    """
    stats = Stats(model.config, device)
    full, narrow = accumulate(o, parallel, data, state.step, micros, device, dtype, stats)
    norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
    news = torch.stack([full, narrow, norm, stats.mean_width(stats.ran), full.new_tensor(float(stop.asked))])
    world = o.micro_batches // len(micros)
    full, narrow, norm, width, stopping = (all_sum(news) / world).tolist()  # the only wait for the device
    if not math.isfinite(full + narrow + norm):
        return full, narrow, norm, False
    if o.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), o.grad_clip, torch.tensor(norm))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(state.step, o)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if o.bias_rate:
        balance_by_bias(model, all_sum(stats.load).float(), o.bias_rate)
    state.step += 1
    state.flops += 3 * stats.tokens * world * model.flops_per_token(width)[0]
    return full, narrow, norm, stopping > 0


def not_finite(model, full, narrow, norm):
    """The message for a step that gave these numbers: where it begins, what helps."""
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return (
        f"loss {full:g} at full width, {narrow:g} at others, gradient norm {norm:g}; first gradients that are not "
        f"finite: {', '.join(bad[:3]) or 'none'}. A new run with a lower --learning_rate or a longer --warmup_steps "
        "usually helps"
    )


def balance_by_bias(model, load, rate):
    """DeepSeek-V3's balancing without a loss: busy experts become a little less likely. load: (layers, E) slots."""
    for block, n in zip(model.transformer.h, load):
        if block.moe:
            block.mlp.bias += rate * (n.mean() - n).sign()


# -----------------------------------------------------------------------------
# Evaluation


def eval_widths(o):
    """What evaluation measures, {name: width or policy}, and the names of what the recipe is to serve: their mean loss
    chooses ckpt.pt."""
    if o.n_expert == 1:
        return {"1": 1.0}, ["1"]
    widths = {f"{width:g}": width for width in (1.0, 0.75, 0.5, 0.25)}
    if o.recipe == "mose" or (o.recipe == "serve" and o.top_k == 1):
        return widths, list(widths)
    if o.recipe == "serve":  # which was not trained for uniform widths of several experts
        fewer = {f"{n:g} experts": FewerExperts(n) for n in (o.top_k / 2, o.top_k / 4)}
        return {**widths, **fewer}, ["1", *fewer]
    return widths, ["1"]


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


def evaluate(model, batches, widths, device, dtype):
    """Validation losses {name: nats per token} at widths {name: width or policy}, and how busy the experts of every MoE
    block are at full width, in multiples of a fair share: (MoE blocks, E)."""
    model.eval()
    losses, stats = {}, Stats(model.config, device)
    for name, width in widths.items():
        mine = sequence_losses(model, batches, width, device, dtype, stats if width == 1 else None).double()
        total, n = all_sum(torch.tensor([mine.sum(), len(mine)], dtype=torch.float64)).tolist()
        losses[name] = total / n
    model.train()
    load = all_sum(stats.load).cpu().float()
    load = load[load.sum(1) > 0]
    return losses, load / load.mean(1, keepdim=True)


def warn_of_collapse(say, o, step, load, before):
    """Name the blocks one of whose experts gets far too much, if it did `before`, at the last evaluation, too: once can
    be chance. load: see `evaluate`. Returns {MoE block: how much} of now."""
    limit = min(3.0, 1 + 0.9 * (o.n_expert / o.top_k - 1))  # n_expert / top_k is the most
    now = {i: l.max().item() for i, l in enumerate(load) if l.max() > limit and step > o.warmup_steps}
    for i in sorted(before.keys() & now.keys()):
        say(
            f"warning: one expert of MoE layer {i * o.moe_every} gets {now[i]:.1f} times its fair share: the router is "
            "collapsing. Begin anew with a higher --balance_coef or --bias_rate=0.001"
        )
    return now


def describe(o, preset, model, why, world):
    total, active = model.num_params()
    processes = f", on {world} processes" if world > 1 else ""
    warning = "\nwarning: with --top_k=1 the router learns nothing from the loss: add --norm_topk_prob=False"
    return (
        f"{preset}, recipe {o.recipe}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M per token at full width\n"
        f"{why}; {o.tokens_per_step:,} tokens per step, {o.micro_batches} micro-batch(es) of {o.batch_size} x "
        f"{o.block_size}{processes}" + (warning if o.top_k == 1 < o.n_expert and o.norm_topk_prob else "")
    )


# -----------------------------------------------------------------------------
# The loop


def train(preset, o, given):
    """Train as the options say, or go on with the run in out_dir. Raises UsageError before anything is spent."""
    out, last = Path(o.out_dir), Path(o.out_dir) / "last.pt"
    if not o.resume and (last.exists() or (out / "ckpt.pt").exists()):
        raise UsageError(f"{out} already holds a run: add --resume to continue it, or choose another --out_dir")
    written = modified(last)
    o, checkpoint = resumed(preset, o, given) if o.resume else (o, None)
    check_options(o)
    device, dtype, why = choose_device(o.device, o.dtype, o.n_embd)
    train_data, val_data, tokenizer, vocab_size = open_dataset(o.dataset, o.block_size)
    config = make_config(o, vocab_size)
    identity = dict(config=asdict(config), tokenizer=tokenizer, vocab_size=vocab_size, recipe=o.recipe, preset=preset)
    identity["data"] = [train_data.fingerprint(), val_data.fingerprint(), tokenizer]
    if checkpoint:
        check_same(checkpoint, identity, o)
    rank, world, device = join_processes(device)
    check_processes(o, world, identity["data"])
    if is_main():
        lock = lock_folder(out)  # noqa: F841, held until the run ends
        if written != modified(last):
            raise UsageError(f"another run has just written {last}: try again")

    torch.manual_seed(o.seed)
    torch.set_float32_matmul_precision("high")
    model = GPT(config).to(device)
    optimizer, state = make_optimizer(model, o), State()
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        state = State(**checkpoint["state"])
        if checkpoint["options"]["eval_tokens"] != o.eval_tokens:
            state.best = math.inf  # of another text
        checkpoint = None  # as large as the model and its optimizer
    what = (model, o, state, identity)
    if o.compile:
        model.body = torch.compile(model.body)
    parallel = DistributedDataParallel(model) if world > 1 else model
    micros = range(rank, o.micro_batches, world)
    val_batches = val_data.fixed_batches(o.eval_tokens, o.batch_size)
    val_batches = [(i[rank::world], t[rank::world]) for i, t in val_batches if len(i) > rank]
    widths, served = eval_widths(o)
    log = Log(out / "log.jsonl", max(state.step or -1, state.evaluated)) if is_main() else lambda **entry: None

    with Stop() as stop:
        stop.say(describe(o, preset, model, why, world))
        tokens = f"{train_data.n_tokens:,} training and {val_data.n_tokens:,} validation tokens"
        stop.say(f"{tokens} ({tokenizer}) from {o.dataset}")
        if o.resume:
            finished = ", the last one: raise --steps to go on" if state.step >= o.steps else ""
            stop.say(f"resuming after step {state.step}{finished}")
        else:
            save(last, *what, optimizer)  # from here on --resume works, whatever happens
        began, first, uneven = time.perf_counter(), state.step, {}
        while True:  # each turn evaluates and saves if that is due, then takes a step; the last takes none
            final = state.step >= o.steps
            if (final or state.step % o.eval_interval == 0) and state.evaluated != state.step:
                started = time.perf_counter()
                losses, load = evaluate(model, val_batches, widths, device, dtype)
                state.evaluated, loss = state.step, sum(losses[name] for name in served) / len(served)
                improved, state.best = loss < state.best, min(loss, state.best)
                log(step=state.step, val_loss=losses, busiest=[n.max().item() for n in load],
                    idlest=[n.min().item() for n in load], eval_seconds=time.perf_counter() - started)  # fmt: skip
                if improved:
                    save(out / "ckpt.pt", *what)
                save(last, *what, optimizer)
                shown = " | ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
                stop.say(f"eval {state.step}/{o.steps} | {shown}" + (" | best" if improved else ""))
                uneven = warn_of_collapse(stop.say, o, state.step, load, uneven)
            if final:
                break

            started = time.perf_counter()
            full, narrow, norm, stopping = take_step(
                o, model, parallel, optimizer, train_data, state, micros, device, dtype, stop
            )
            failed = not math.isfinite(full + narrow + norm)
            if failed or stopping:  # before anything is printed
                save(last, *what, optimizer)
                all_sum(torch.zeros(1))  # who leaves first would have torchrun kill the one who saves
            if failed:
                reason = not_finite(model, full, narrow, norm)
                raise UsageError(f"step {state.step + 1}: {reason}. Stopped before the update, saved {last}")
            speed = o.tokens_per_step / (time.perf_counter() - started)
            losses = {
                name: l for name, l in (("loss_full", full), ("loss_narrow", narrow)) if l
            }  # a pass of its kind ran
            log(step=state.step, **losses, grad_norm=norm, lr=learning_rate(state.step - 1, o), tokens_per_s=speed,
                flops=state.flops)  # fmt: skip
            if state.step % o.log_interval == 0 or state.step == o.steps:
                left = int((o.steps - state.step) * (time.perf_counter() - began) / (state.step - first))
                shown = " | ".join(f"{name.replace('_', ' ')} {loss:.4f}" for name, loss in losses.items())
                shown += f" | {speed:,.0f} tokens/s | {left // 60}m{left % 60:02d}s left"
                stop.say(f"step {state.step}/{o.steps} | {shown}")
            if stopping:
                stop.say(f"stopped at step {state.step}; {last} is saved: continue with --resume")
                sys.exit(130)
        stop.say(f"{out / 'ckpt.pt'} is the best model, {last} the latest")


def main():
    try:
        train(*parse_options())
    finally:  # also after a refusal: threads of the exchange would abort the process at its end
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run(main, "train.py")
