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

import argparse
import dataclasses
import fcntl
import glob
import json
import math
import os
import pickle
import signal
import sys
import time
import warnings
import zipfile
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GRID, GPTConfig, RouterWidth, UsageError, check_width, width_to_neurons
from prepare import MAGIC, VERSION, Parser, run

RECIPES = ("serve", "mose", "moe", "m-moe")
RECIPES_HELP = (
    "how micro-batches are run: serve, at router widths, budget and gamma random for each sequence; mose, at full "
    "width and again at one random uniform width, as in the paper; moe, at full width only; m-moe, with a random "
    "number of experts in every layer"
)
EVAL_WIDTHS = (1.0, 0.75, 0.5, 0.25)
TRAIN_WIDTHS = [level / GRID for level in range(1, GRID)]  # the whole grid below 1, which recipe mose draws from

# -----------------------------------------------------------------------------
# Options


def option(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    # data and output
    dataset: str = option("openwebtext", "folder in data/, or a path to any with *train*.bin and *val*.bin shards")
    out_dir: str = option("", "for checkpoints and log; default out/PRESET, and -RECIPE if that is not the default one")
    resume: bool = option(False, "continue the run in out_dir; options not given are taken from it")
    replay: int | None = option(None, "show the passes of this step of the run in out_dir, on the weights of last.pt")
    # what to train
    recipe: str = option("serve", RECIPES_HELP)
    seed: int = option(1337, "of initial weights, data order, widths and dropout")
    n_layer: int = option(6, "blocks")
    n_head: int = option(6, "attention heads")
    n_embd: int = option(384, "model width d")
    n_expert: int = option(8, "experts in an MoE block; 1 trains a dense GPT")
    top_k: int = option(2, "experts a token is sent to")
    n_shared: int = option(0, "experts that every token visits besides")
    expert_hidden: int = option(0, "neurons of one expert, a multiple of 8; 0 means 4 * n_embd")
    train_width: float = option(1.0, "share of those neurons that experts get: a narrow model, for comparison")
    moe_every: int = option(2, "every how many blocks one holds experts, starting with the first")
    block_size: int = option(1024, "context length in tokens")
    dropout: float = option(0.0, "dropout rate")
    balance_coef: float = option(0.01, "weight of the load-balancing loss")
    z_coef: float = option(0.001, "weight of the router's z-loss")
    bias_rate: float = option(0.0, "step of balancing by a bias instead, with --balance_coef=0; 0.001 in DeepSeek-V3")
    norm_topk_prob: bool = option(True, "renormalise the selected probabilities; False for --top_k=1")
    # optimisation: AdamW, linear warm-up, cosine decay to a tenth
    steps: int = option(6000, "optimizer steps")
    tokens_per_step: int = option(524288, "tokens in one optimizer step, over all micro-batches")
    batch_size: int = option(16, "sequences in one micro-batch: as many as memory holds")
    learning_rate: float = option(6e-4, "peak learning rate")
    warmup_steps: int = option(200, "steps until the peak")
    weight_decay: float = option(0.1, "of matrices; norms are not decayed")
    grad_clip: float = option(1.0, "largest gradient norm; 0 turns clipping off")
    # reporting
    eval_interval: int = option(250, "steps between evaluations, each of which also saves")
    eval_tokens: int = option(262144, "validation tokens per evaluation, always the same ones")
    log_interval: int = option(10, "steps between progress lines")
    # machine
    device: str = option("auto", "cuda, mps or cpu; auto takes the first there is")
    dtype: str = option("auto", "bfloat16 or float32; auto takes bfloat16 where it is faster")
    compile: bool = option(False, "use torch.compile: slow to start, then faster")


PRESETS = {
    "demo": dict(
        dataset="stdlib",
        n_layer=4,
        n_head=4,
        n_embd=128,
        moe_every=1,
        block_size=128,
        steps=800,
        tokens_per_step=3072,
        batch_size=24,
        learning_rate=4e-3,
        warmup_steps=50,
        eval_interval=200,
        eval_tokens=16384,
        log_interval=20,
    ),  # fmt: skip
    "55m": dict(),
    "322m": dict(n_layer=12, n_head=12, n_embd=768, steps=12000, batch_size=16, learning_rate=4e-4),
    "1b": dict(n_layer=24, n_head=16, n_embd=1024, steps=30000, batch_size=8, learning_rate=3e-4),
}

# what a resumed run may change; anything else would make it another run
MAY_CHANGE = set("resume replay out_dir steps eval_interval eval_tokens log_interval device compile".split())


def parse_bool(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be True or False, not {text!r}")
    return text.lower() == "true"


def parse_options(argv=None):
    """The command line -> (preset, TrainConfig, the names of the options that were given)."""
    parser = Parser(__doc__)
    parser.add_argument("preset", choices=PRESETS, help="sizes and schedule to start from")
    for f in dataclasses.fields(TrainConfig):
        presets = ", ".join(f"{p} {v[f.name]}" for p, v in PRESETS.items() if f.name in v)
        text = f"{f.metadata['help']} (default {f.default!r}{'; ' + presets if presets else ''})"
        type_ = int if f.name == "replay" else f.type
        kind = dict(type=parse_bool, nargs="?", const=True) if type_ is bool else dict(type=type_)
        parser.add_argument(f"--{f.name}", help=text, default=None, metavar=type_.__name__.upper(), **kind)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    preset = given.pop("preset")
    options = TrainConfig(**{**PRESETS[preset], **given})
    other = "" if options.recipe == TrainConfig.recipe else f"-{options.recipe}"
    options.out_dir = options.out_dir or f"out/{preset}{other}"
    return preset, options, set(given)


def check_options(o):
    """Refuse what cannot work, before anything is spent or written."""
    if o.recipe not in RECIPES:
        raise UsageError(f"--recipe must be one of {', '.join(RECIPES)}, not {o.recipe!r}")
    if o.recipe != "moe" and o.n_expert == 1:
        raise UsageError(f"--recipe={o.recipe} needs experts to slim: use --recipe=moe with --n_expert=1")
    check_width(o.train_width, "--train_width")
    if o.replay is not None and not 1 <= o.replay <= o.steps:
        raise UsageError(f"--replay must be a step of the run, 1 to {o.steps}, not {o.replay}")
    for name in "steps tokens_per_step batch_size eval_interval eval_tokens log_interval block_size".split():
        if getattr(o, name) < 1:
            raise UsageError(f"--{name} must be at least 1, not {getattr(o, name)}")
    for name in "seed warmup_steps weight_decay grad_clip balance_coef z_coef bias_rate expert_hidden".split():
        if not 0 <= getattr(o, name) < math.inf:
            raise UsageError(f"--{name} must be a finite number of at least 0, not {getattr(o, name)}")
    if o.seed >= 2**63:
        raise UsageError(f"--seed must be below 2**63, not {o.seed}")
    if not 0 < o.learning_rate < math.inf:
        raise UsageError(f"--learning_rate must be above 0, not {o.learning_rate}")
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


# -----------------------------------------------------------------------------
# Data


class Shards:
    """The tokens of one split, in llm.c's format, read window by window: no memory map that grows, no state."""

    def __init__(self, folder, split, block_size, vocab_size):
        self.block_size, self.vocab_size = block_size, vocab_size
        self.files, starts = sorted(glob.glob(f"{glob.escape(str(folder))}/*{split}*.bin")), []
        if not self.files:
            raise UsageError(f"no *{split}*.bin in {folder}: run prepare.py")
        self.n_tokens = 0
        for file in self.files:
            header = np.fromfile(file, dtype=np.int32, count=256)
            if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION:
                raise UsageError(f"{file}: not a shard of tokens (its header should begin with {MAGIC}, {VERSION})")
            held = (os.path.getsize(file) - 1024) / 2
            if held != header[2]:
                raise UsageError(
                    f"{file}: holds {held:g} tokens but its header says {header[2]}: copy or prepare it again"
                )
            if self.n_tokens < 100_000_000:  # small datasets are checked whole; every batch is checked again
                self.check(np.fromfile(file, dtype=np.uint16, offset=1024), file)
            self.n_tokens += int(header[2])
            starts.append(max(0, int(header[2]) - block_size))  # where a window and its next token fit
        self.ends = np.cumsum(starts)
        if self.ends[-1] == 0:
            raise UsageError(
                f"{folder}: the {split} split has {self.n_tokens} tokens, no shard of more than block_size {block_size}"
            )

    def fingerprint(self):
        """What tells this split from another: its length and a checksum of the beginning of every shard."""
        return [self.n_tokens, [zlib.crc32(np.fromfile(file, np.uint16, 500_000)) for file in self.files]]

    def check(self, tokens, file):
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise UsageError(
                f"{file}: token id {tokens.max()} is beyond the vocabulary of {self.vocab_size}: another tokenizer's?"
            )

    def windows(self, starts):
        """Windows at the given starts, each in [0, self.ends[-1]) -> idx, targets (len(starts), block_size)."""
        out = np.empty((len(starts), self.block_size + 1), dtype=np.int64)
        for row, start in zip(out, starts):
            shard = int(np.searchsorted(self.ends, start, side="right"))
            start -= self.ends[shard - 1] if shard else 0
            row[:] = np.fromfile(self.files[shard], np.uint16, self.block_size + 1, offset=1024 + 2 * int(start))
            self.check(row, self.files[shard])
        tokens = torch.from_numpy(out)
        return tokens[:, :-1], tokens[:, 1:]

    def random_batch(self, seed, step, first, count):
        """Sequences first to first + count of step's batch: a pure function of its arguments."""
        starts = np.random.default_rng([seed, step]).integers(self.ends[-1], size=first + count)
        return self.windows(starts[first:])

    def fixed_batches(self, n_tokens, batch_size):
        """Non-overlapping windows from the beginning of the split, the same every time: [(idx, targets), ...]."""
        starts = np.arange(0, self.ends[-1], self.block_size)[: n_tokens // self.block_size]
        return [self.windows(starts[i : i + batch_size]) for i in range(0, len(starts), batch_size)]


def open_dataset(dataset, block_size):
    """data/DATASET or a path -> (train, val, tokenizer name, size of its vocabulary)."""
    folder = next((p for p in (Path("data") / dataset, Path(dataset)) if p.is_dir()), None)
    if folder is None:
        source = dataset if dataset in ("stdlib", "openwebtext") else f"YOUR_FILES --name={dataset}"
        raise UsageError(f"no dataset {dataset!r} in data/: run `python prepare.py {source}`")
    tokenizer, vocab_size = "gpt2", 50257  # shards of llm.c and modded-nanogpt
    if (folder / "meta.json").exists():
        try:
            meta = json.loads((folder / "meta.json").read_text())
            tokenizer, vocab_size = meta["tokenizer"], int(meta["vocab_size"])
        except (ValueError, KeyError, TypeError) as e:
            raise UsageError(f"{folder}/meta.json is damaged ({e!r}): prepare the dataset again") from e
    train, val = (Shards(folder, split, block_size, vocab_size) for split in ("train", "val"))
    return train, val, tokenizer, vocab_size


# -----------------------------------------------------------------------------
# Checkpoints

KEYS = ("model", "config", "tokenizer", "vocab_size", "recipe", "step", "options")
RESUME_KEYS = KEYS + ("optimizer", "best", "flops", "window", "data", "preset")


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


@torch.no_grad()
def sequence_losses(model, batches, width, device, dtype):
    """Mean loss of every sequence of batches [(idx, targets), ...] at one width, in nats per token: (sequences,)."""
    losses = [torch.zeros(0, device=device)]
    for idx, targets in batches:
        with autocast(device, dtype):
            logits = model(idx.to(device), width=width)[0]
        pairs = zip(logits, targets.to(device))  # a sequence at a time: float32 of a whole batch may not fit
        losses.append(torch.stack([F.cross_entropy(l.float(), t) for l, t in pairs]))
    return torch.cat(losses).cpu()


class RandomExperts:
    """Width policy of recipe m-moe: in every layer the likeliest 1 to k experts, at full width, the others skipped.

    Layers ask in their order, so one rng gives every layer its own number, the same in every run.
    """

    renormalize = True

    def __init__(self, rng):
        self.rng = rng

    def widths(self, probs):
        k = probs.size(-1)
        return (torch.arange(k, device=probs.device) <= self.rng.integers(k)).to(probs.dtype).expand(probs.shape)


def training_passes(o, rng):
    """The passes of one micro-batch: [(width, weight), ...], weight being what its mean loss counts.

    width is a number, a width policy, or budget and gamma of RouterWidth for every sequence, (batch_size, 2).
    """
    if o.recipe == "moe":
        return [(1.0, 1)]
    if o.recipe == "m-moe":
        return [(RandomExperts(rng), 1)]
    if o.recipe == "mose":  # the paper's equation 6
        return [(1.0, 0.5), (TRAIN_WIDTHS[rng.integers(len(TRAIN_WIDTHS))], 0.5)]
    # what inference will ask for
    return [(torch.tensor(rng.uniform((0.1, 0.0), (1.0, 3.0), (o.batch_size, 2)), dtype=torch.float32), 1)]


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


def sum_over_processes(tensor, device):
    """The sum of every process's tensor, on device, where they can exchange it; alone, the tensor itself."""
    if not dist.is_initialized():
        return tensor
    total = tensor.to(device, copy=True)
    dist.all_reduce(total)
    return total


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


def trim_log(path, step):
    """Drop the lines after step, and a last line that is not whole: the run goes on from there."""
    whole = [line for line in open(path) if line.endswith("\n")] if path.exists() else []
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
    os.replace(temporary, path)


def train(preset, o, given):
    out, last = Path(o.out_dir), Path(o.out_dir) / "last.pt"
    resuming = o.resume or o.replay is not None
    written = last.stat().st_mtime_ns if last.exists() else None
    if not resuming and (last.exists() or (out / "ckpt.pt").exists()):
        raise UsageError(f"{out} already holds a run: add --resume to continue it, or choose another --out_dir")
    o, checkpoint = resumed(preset, o, given) if resuming else (o, None)
    check_options(o)
    device, dtype, why = choose_device(o.device, o.dtype, o.n_embd)
    train_data, val_data, tokenizer, vocab_size = open_dataset(o.dataset, o.block_size)
    data = [train_data.fingerprint(), val_data.fingerprint(), tokenizer]
    config = make_config(o, vocab_size)
    if checkpoint and checkpoint["data"] != data:
        raise UsageError(f"the data in {o.dataset} is not what the run in {out} was trained on: it has changed since")
    if checkpoint and checkpoint["config"] != dataclasses.asdict(config):
        raise UsageError(f"the run in {out} was made by another version of model.py: its config has other fields")
    rank, world, device = join_processes(device)
    # micro-batches are dealt out to the processes; where there are too few, each process takes a part of each
    accumulate = o.tokens_per_step // (o.batch_size * o.block_size)
    if accumulate % world == 0:
        micros, rows = range(rank, accumulate, world), slice(None)
    elif o.batch_size % world == 0:
        micros, rows = range(accumulate), slice(rank, None, world)
    else:
        raise UsageError(
            f"{world} processes cannot share {accumulate} micro-batch(es) of --batch_size {o.batch_size}: their number "
            f"must be a multiple of {world}, or each must divide into {world} parts"
        )
    if rank == 0 and o.replay is None:
        lock = lock_folder(out)  # noqa: F841, held until the process ends
        if written != (last.stat().st_mtime_ns if last.exists() else None):
            raise UsageError(f"another run has just written {last}: try again")

    torch.manual_seed(o.seed)
    torch.set_float32_matmul_precision("high")
    model = GPT(config).to(device)
    optimizer = make_optimizer(model, o)
    moes = [block.mlp for block in model.transformer.h if block.moe]
    start, best, flops = 0, math.inf, 0.0
    window = dict(steps=0, seconds=0.0, loss_full=0.0, loss_narrow=0.0, grad_norm=0.0)  # sums since the last log line
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start, flops, window = checkpoint["step"], checkpoint["flops"], checkpoint["window"]
        if checkpoint["options"]["eval_tokens"] == o.eval_tokens:  # or its losses are of another text
            best = checkpoint["best"]
        checkpoint = None  # as large as the model and its optimizer
    if o.compile:
        model.body = torch.compile(model.body)
    parallel = model
    if world > 1:
        # the buffers count what each process did. (New names for this option are not in every version yet.)
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
        for moe in moes:
            moe.split_batch = rows != slice(None)
    eval_widths = EVAL_WIDTHS if moes else (1.0,)
    val_batches = val_data.fixed_batches(o.eval_tokens, o.batch_size)
    val_batches = [(i[rank::world], t[rank::world]) for i, t in val_batches if len(i) > rank]
    collapsed = set()  # layers whose load was uneven at the last evaluation
    passed = 0  # tokens that went through the model since FLOPs were last counted
    stop_signals = []

    def say(text):
        if rank == 0:
            print(text, flush=True)

    total, active = model.num_params()
    say(f"{preset}, recipe {o.recipe}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M per token at full width")
    say(
        f"{why}; {o.tokens_per_step:,} tokens per step, {accumulate} micro-batch(es) of {o.batch_size} x {o.block_size}"
        + (f", on {world} processes" if world > 1 else "")
    )
    say(f"{train_data.n_tokens:,} training and {val_data.n_tokens:,} validation tokens ({tokenizer}) from {o.dataset}")

    def log(**entry):
        if rank == 0:
            with open(out / "log.jsonl", "a") as f:
                f.write(json.dumps(entry) + "\n")

    def save(path, step, **more):
        state = dict(
            model=model.state_dict(), config=dataclasses.asdict(config), tokenizer=tokenizer, vocab_size=vocab_size,
            recipe=o.recipe, preset=preset, step=step, tokens=step * o.tokens_per_step, best=best, flops=flops,
            options=dataclasses.asdict(o), data=data, window=window, **more,
        )  # fmt: skip
        if rank == 0:
            save_checkpoint(path, state)

    def save_last(step):
        count_flops()
        save(last, step, optimizer=optimizer.state_dict())

    def count_flops():
        """Add what was spent since the last call: three forward passes' worth at the widths that ran."""
        nonlocal flops, passed
        width = torch.tensor(model.read_stats()[1] or 1.0, dtype=torch.float64)
        mean_width = (sum_over_processes(width, device) / world).item()
        flops += 3 * passed * world * model.flops_per_token(mean_width)[0]
        passed = 0

    def evaluate(step):
        nonlocal best, collapsed
        count_flops()
        started = time.perf_counter()
        model.eval()
        losses = {}
        for width in eval_widths:
            mine = sequence_losses(model, val_batches, width, device, dtype).double()
            total = sum_over_processes(torch.tensor([mine.sum(), len(mine)], dtype=torch.float64), device)
            losses[width] = (total[0] / total[1]).item()
            if width == 1 and moes:
                load = sum_over_processes(torch.stack([moe.load for moe in moes]), device).cpu()
        model.read_stats()
        model.train()
        entry = dict(step=step, val_loss={f"{w:g}": l for w, l in losses.items()})
        line = f"eval {step}/{o.steps} | " + " | ".join(f"width {w:g}: {l:.4f}" for w, l in losses.items())
        warnings_due = []
        if moes:
            share = load / load.sum(1, keepdim=True) * o.n_expert  # (L, E), 1 is fair, n_expert / top_k the most
            busiest, limit = share.amax(1).tolist(), min(3.0, 1 + 0.9 * (o.n_expert / o.top_k - 1))
            entry.update(busiest=busiest, idlest=share.amin(1).tolist())
            line += f" | experts get {share.min():.2f} to {share.max():.2f} of a fair share"
            uneven = {i for i, most in enumerate(busiest) if most > limit and step > o.warmup_steps}
            warnings_due = [(i, busiest[i]) for i in sorted(uneven & collapsed)]
            collapsed = uneven
        log(**entry, eval_seconds=time.perf_counter() - started)
        # ckpt.pt is the best at full width, or over the uniform widths if the recipe is to serve others too
        loss = losses[1.0] if o.recipe in ("moe", "m-moe") else sum(losses.values()) / len(losses)
        if improved := loss < best:
            best = loss
            save(out / "ckpt.pt", step)
        save_last(step)
        say(line + (" | best" if improved else ""))
        for i, most in warnings_due:
            say(
                f"warning: one expert of MoE layer {i} gets {most:.1f} times its fair share, as at the last "
                "evaluation: the router is collapsing. Begin anew with a higher --balance_coef or --bias_rate=0.001"
            )

    def run_step(step, report=None):
        """Gradients of one step. Returns (mean loss of its passes at full width, of the others, gradient norm, whether
        a process was told to stop), as one tensor, over all processes. report is called after every pass."""
        nonlocal passed
        sums = torch.zeros(2, device=device)
        n_passes = torch.zeros(2)
        for micro in micros:
            rng = np.random.default_rng([o.seed, step, micro + 1])  # [seed, step] is the batch's, and so is [..., 0]
            batch = train_data.random_batch(o.seed, step, micro * o.batch_size, o.batch_size)
            idx, targets = (t[rows].pin_memory() if device.startswith("cuda") else t[rows] for t in batch)
            idx, targets = idx.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            passes = training_passes(o, rng)
            torch.manual_seed(rng.integers(2**62) + (rows.start or 0))  # dropout
            for i, (width, weight) in enumerate(passes):
                if torch.is_tensor(width):  # (N, 1): a value for every token
                    width = RouterWidth(*width[rows].to(device).T.repeat_interleave(o.block_size, 1).unsqueeze(-1))
                final = micro == micros[-1] and i == len(passes) - 1  # gradients are exchanged once, at the end
                with nullcontext() if final or world == 1 else parallel.no_sync():
                    with autocast(device, dtype):
                        _, loss, aux = parallel(idx, targets, width)
                    ((loss + aux) * (weight / len(micros))).backward()
                narrow = int(not isinstance(width, float) or width < 1)
                sums[narrow] += loss.detach()
                n_passes[narrow] += 1
                passed += idx.numel()
                if report:
                    report(micro, width, loss)
        norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
        if o.grad_clip and report is None:  # clipping by a norm that is not finite would hide where that comes from
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), o.grad_clip, norm)
        means = sums / n_passes.clamp_min(1).to(device)
        stopping = norm.new_tensor([float(bool(stop_signals))])
        return sum_over_processes(torch.cat([means, norm.view(1), stopping]), device) / world

    def on_interrupt(signum, frame):  # finish the step, save, leave; a second Ctrl-C does not wait
        stop_signals.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if o.replay is not None:
        print(f"on the weights of {last}, after step {start}:")
        replay(o, model, run_step)
        return
    if rank == 0:
        trim_log(out / "log.jsonl", start or -1)
    signal.signal(signal.SIGINT, on_interrupt)
    signal.signal(signal.SIGTERM, on_interrupt)
    if resuming:
        say(f"resuming after step {start}" + (", the last one: raise --steps to go on" if start >= o.steps else ""))
    else:
        save_last(0)  # from here on --resume works, whatever happens
    if start == 0:
        evaluate(0)
    began = time.perf_counter()
    for step in range(start, o.steps):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, o)
        loss_full, loss_narrow, norm, stopping = run_step(step).tolist()  # at uniform widths the only synchronisation
        if not all(map(math.isfinite, (loss_full, loss_narrow, norm))):
            save_last(step)
            sum_over_processes(torch.zeros(1), device)  # who leaves first would have torchrun kill the one who saves
            raise UsageError(
                f"step {step + 1}: loss {loss_full:g} at full width, {loss_narrow:g} at others, gradient norm "
                f"{norm:g}; stopped before the update, saved {last}. --replay={step + 1} shows its passes; "
                "a new run with a lower --learning_rate or a longer --warmup_steps usually helps"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if o.bias_rate:  # DeepSeek-V3's balancing without a loss: busy experts become a little less likely
            for moe in moes:
                load = sum_over_processes(moe.load, device).float()
                moe.bias += o.bias_rate * (load.mean() - load).sign()
                moe.load.zero_()
        news = dict(
            steps=1, seconds=time.perf_counter() - started, loss_full=loss_full, loss_narrow=loss_narrow, grad_norm=norm
        )
        window = {name: value + news[name] for name, value in window.items()}

        done = step + 1
        if done % o.log_interval == 0 or done == o.steps:
            n, speed = window["steps"], window["steps"] * o.tokens_per_step / window["seconds"]
            # a recipe without passes of one kind has no loss of that kind
            means = {name: window[name] / n for name in ("loss_full", "loss_narrow", "grad_norm") if window[name]}
            window = dict.fromkeys(window, 0)
            count_flops()
            log(step=done, **means, lr=learning_rate(step, o), tokens_per_s=speed, flops=flops)
            left = int((o.steps - done) * (time.perf_counter() - began) / (done - start))
            shown = " | ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in means.items())
            say(f"step {done}/{o.steps} | {shown} | {speed:,.0f} tokens/s | {left // 60}m{left % 60:02d}s left")
        if done % o.eval_interval == 0 or done == o.steps:
            evaluate(done)
        if stopping:
            save_last(done)
            sum_over_processes(torch.zeros(1), device)
            say(f"stopped at step {done}; {last} is saved: continue with --resume")
            sys.exit(130)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    say(f"{out / 'ckpt.pt'} is the best model, {last} the latest")


def replay(o, model, run_step):
    """Run one step again, on the weights of last.pt, and show every pass; nothing is updated or written."""

    def report(micro, width, loss):
        kind = f"width {width:g}" if isinstance(width, float) else type(width).__name__
        print(f"step {o.replay}, micro-batch {micro}, {kind}: loss {loss.item():.4f}")

    print(f"gradient norm {run_step(o.replay - 1, report)[2].item():.4f}")
    for name, p in model.named_parameters():
        bad = [(~values.isfinite()).sum().item() for values in (p, p.grad)]
        if any(bad):
            print(f"{name}: {bad[0]} weights and {bad[1]} gradients are not finite")


def main():
    preset, options, given = parse_options()
    train(preset, options, given)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main, "train.py")
