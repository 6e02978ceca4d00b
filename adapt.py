"""
Make the experts of a Hugging Face MoE slimmable, and slice it to plain checkpoints of any width.

    python adapt.py sort  MODEL OUT [--text=TEXT]               # neurons by importance: same function, better prefixes
    python adapt.py train MODEL OUT --text=TEXT                 # continued training at many widths, sorted first
    python adapt.py eval  MODEL --text=TEXT [--budget=0.5,...]  # loss and FLOPs per token at every width
    python adapt.py slice MODEL OUT --width=0.5                 # a standard checkpoint with half of every expert

MODEL: a folder or a name on the hub. TEXT: files and folders as prepare.py reads them, or a dataset of its; every
tenth document is for eval. --dry_run says what a model would need, from its config.json alone. As a library:

    import adapt                                                # registers the experts implementation "slimmable"
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="slimmable")
    adapt.set_width(model, 0.5)                                 # or a policy: RouterWidth(0.5)

Neuron j of an expert is row j of its gate and up projections and column j of its down projection. Their order means
nothing to the full model: `sort` puts first what matters most, so that a prefix is worth running.
"""

import copy
import functools
import itertools
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

import prepare
from model import (
    GRID, RouterWidth, UsageError, check_width, compute_dtype, grouped_mm, is_policy, run_experts, width_to_neurons,
)  # fmt: skip
from prepare import option, parse, run

try:
    import accelerate  # noqa: F401, transformers' Trainer stands on it
    import huggingface_hub
    import safetensors
    import transformers
    from transformers.integrations import moe
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as e:
    missing = UsageError(f"{e.name} is missing: pip install -r requirements-extras.txt")
    if __name__ == "__main__":
        print(f"adapt.py: {missing}", file=sys.stderr)
        sys.exit(2)
    raise missing from e

# -----------------------------------------------------------------------------
# Experts and their neurons, in every layout

DEQUANTISE = "load it dequantised, quantization_config=FineGrainedFP8Config(dequantize=True) or Mxfp4Config(dequantize=True), and save it"


class Slim:
    """What adapt.py knows about one module of experts: its attribute `slim`. None of it is saved with the model."""

    width = 1.0  # a number or a policy, set by set_width
    drawn = None  # the policy of this training micro-batch, set by train_widths
    used = ran = 0  # neurons that widths asked for, and that ran: see run_experts
    load = seen = None  # tensors to count in: tokens of each expert (E,), squared activations of each neuron (E, H)

    def now(self, training):
        if self.seen is not None:
            return 1.0
        return self.drawn if training and self.drawn is not None else self.width


def experts_of(model):
    """{name: module} of its routed experts. Raises UsageError if they cannot be slimmed."""
    kind = type(model).__name__
    for name, p in model.named_parameters():
        if ".experts." in name and (p.dtype.itemsize < 2 or not p.is_floating_point()):
            raise UsageError(f"{kind} holds {p.dtype} experts: {DEQUANTISE}")
    found = {n: m for n, m in model.named_modules() if hasattr(m, "is_transposed") and hasattr(m, "has_gate")}
    if not found:
        raise UsageError(
            f"{kind} has no experts that transformers can dispatch: it is dense, or of an architecture without @use_experts_implementation"
        )
    for name, m in found.items():
        if m._is_expert_parallel or type(m.down_proj.data).__name__ == "DTensor":
            raise UsageError(
                f"{name} is split over devices by expert or tensor parallelism: use FSDP or device_map instead"
            )
        if (size := neurons(m)[-1].size(1)) % 8:
            raise UsageError(f"{name} has {size} neurons an expert: widths are multiples of 8, so the size must be one")
    return found


def shared_of(model):
    """{name: module} of the MLPs that every token visits beside its experts. Those without a gate stay as they are."""
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    names = ("shared_expert", "shared_experts", "shared_mlp")
    return {n: m for n, m in model.named_modules() if n.split(".")[-1] in names and all(hasattr(m, p) for p in parts)}


def neurons(m):
    """What belongs to neurons, as views in which neuron j is [:, j]: inputs, their biases, and the output vectors last.

    Gate and up are two of (E, H, d); where the checkpoint interleaves them, one of (E, H, 2, d). A shared MLP has E = 1.
    """
    if not hasattr(m, "has_gate"):
        ins = [m.gate_proj, m.up_proj]
        return (
            [l.weight[None] for l in ins]
            + [l.bias[None] for l in ins if l.bias is not None]
            + [m.down_proj.weight.mT[None]]
        )
    name = "gate_up_proj" if m.has_gate else "up_proj"
    up, down = getattr(m, name), m.down_proj
    up, down = (up.mT, down) if m.is_transposed else (up, down.mT)  # (E, 2H, d), (E, H, d)
    ins = [up, getattr(m, name + "_bias")] if m.has_bias else [up]
    if m.has_gate:
        ins = [half for w in ins for half in (w.chunk(2, 1) if m.is_concatenated else [w.unflatten(1, (-1, 2))])]
    return [*ins, down]


def slim_all(model):
    """Ready all experts to be slimmed -> {name: module}, the shared MLPs last. Raises UsageError."""
    experts, shared = experts_of(model), shared_of(model)
    if model.config._experts_implementation != "slimmable":
        model.set_experts_implementation("slimmable")
    unit = neurons(next(iter(experts.values())))[-1].size(1)
    for n, m in {**experts, **shared}.items():
        if not hasattr(m, "slim"):
            m.slim, H = Slim(), neurons(m)[-1].size(1)
            m.slim.unit = unit if n in shared and H % unit == 0 else H
            if n in shared:
                m.forward = shared_forward.__get__(m)
    return {**experts, **shared}


def cut(m, width):
    """How many neurons of m run at a width: a shared MLP as large as several experts is cut as they are."""
    return neurons(m)[-1].size(1) // m.slim.unit * width_to_neurons(width, m.slim.unit)


def set_width(model, width, shared=True):
    """From now on `model` runs its experts at `width`, a number or a policy (see model.py), and its shared experts at
    it or at the policy's budget; those stay full with shared=False. Returns the model. Raises UsageError."""
    if not is_policy(width):
        check_width(width)
    for name, m in slim_all(model).items():
        layer = next((int(part) for part in name.split(".") if part.isdecimal()), 0)
        m.slim.width = width.at(layer) if hasattr(width, "at") else width
        if not shared and not hasattr(m, "has_gate"):
            m.slim.width = 1.0
    return model


# -----------------------------------------------------------------------------
# Running a prefix


def slimmable(m, x, expert, weight):
    """The experts implementation. m: the module; x (N, d); expert, weight (N, k), chosen by its router -> (N, d)"""
    s = getattr(m, "slim", None) or Slim()
    if s.load is not None and m.training:
        s.load += torch.bincount(expert.flatten(), minlength=len(s.load))
    width, (*ins, down) = s.now(m.training), neurons(m)
    if not is_policy(width):
        width = width_to_neurons(width, down.size(1))
        if width == down.size(1) and s.seen is None:  # stock code, bit for bit
            s.used, s.ran = s.used + expert.numel() * width, s.ran + expert.numel() * width
            if x.is_meta:  # see count_flops
                return torch.empty_like(x)
            return moe.grouped_mm_experts_forward(m, x, expert, weight)
    else:
        weight, order = weight.sort(-1, descending=True)  # likeliest first, as policies may expect
        expert, policy = expert.gather(-1, order), width
        width = policy.widths(weight.detach().float())
        if getattr(policy, "renormalize", False) and getattr(m.config, "norm_topk_prob", True):
            kept = weight * (width > 0)
            weight = kept * (weight.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True))
    dtype = compute_dtype(x) if torch.is_autocast_enabled(x.device.type) else down.dtype
    mlp = functools.partial(expert_mlp, m)
    return run_experts(x.to(dtype), expert, weight.to(dtype), width, mlp, [*ins, down], s).to(x.dtype)


def expert_mlp(m, rows, ends, keep, *matrices):
    """The arithmetic of one of m's experts, for run_experts. matrices: as `neurons` gives them, cut to a width."""
    *ins, down = matrices
    biases = ins[len(ins) // 2 :] if m.has_bias else []
    if m.has_bias or m.slim.seen is not None:
        which = torch.searchsorted(ends, torch.arange(len(rows), device=ends.device, dtype=ends.dtype), right=True)
    a = [grouped_mm(rows, (w.flatten(1, 2) if w.dim() == 4 else w).mT, ends) for w in ins[: len(ins) - len(biases)]]
    a = [z + b.flatten(1)[which] for z, b in zip(a, biases)] if biases else a
    a = m._apply_gate(torch.cat(a, -1)) if m.has_gate else m.act_fn(a[0])  # (n, h)
    if m.slim.seen is not None:
        m.slim.seen.index_add_(0, which, a.detach().float().square())
    y = grouped_mm(a if keep is None else a * keep, down, ends)  # (n, d)
    y = y + m.down_proj_bias[which].to(y.dtype) if m.has_bias else y
    return m.post_expert_norm(y) if m.has_post_expert_norm else y


moe.ALL_EXPERTS_FUNCTIONS.register("slimmable", slimmable)


def shared_forward(m, x):
    """forward of a shared MLP, which runs at the same width, or at the policy's budget: a number, or one a token."""
    s, H = m.slim, m.down_proj.in_features
    width, tokens = s.now(m.training), x.numel() // x.size(-1)
    width = getattr(width, "budget", 1.0) if is_policy(width) else width
    one_width, plain = (
        not torch.is_tensor(width),
        all(type(l) is nn.Linear for l in (m.gate_proj, m.up_proj, m.down_proj)),
    )
    h = cut(m, width) if one_width else H // s.unit * (width * s.unit / 8).round().clamp_min(1) * 8  # (tokens, 1)
    sliced = one_width and plain and s.seen is None
    s.used += h * tokens if one_width else h.sum().long()
    s.ran += h * tokens if sliced else H * tokens
    if x.is_meta:
        return torch.empty_like(x)
    if sliced:
        rows = lambda l: F.linear(x, l.weight[:h], None if l.bias is None else l.bias[:h])
        return F.linear(m.act_fn(rows(m.gate_proj)) * rows(m.up_proj), m.down_proj.weight[:, :h], m.down_proj.bias)
    a = m.act_fn(m.gate_proj(x)) * m.up_proj(x)  # a width for every token, or PEFT's layers: all run, and some count
    if s.seen is not None:
        s.seen += a.detach().float().square().view(-1, H).sum(0)
    keep = torch.arange(H, device=x.device) < h  # (tokens, H) or (H,)
    return m.down_proj(a * (keep.view(*x.shape[:-1], H) if keep.dim() > 1 else keep))


# -----------------------------------------------------------------------------
# Training at many widths, in any loop

RECIPES = {
    "serve": "at router widths, budget and gamma random for each sequence",
    "mose": "every sequence at full width and again at one random uniform width, as in the paper",
    "moe": "at full width only",
}


class TrainWidths:
    """What `train_widths` leaves on a model: hooks on its forward passes, and on the steps of whatever optimizer."""

    def __init__(self, model, recipe, seed, step, bias_rate):
        if recipe not in RECIPES:
            raise UsageError(f"recipe must be one of {', '.join(RECIPES)}, not {recipe!r}")
        self.recipe, self.seed, self.step, self.micro, self.bias_rate = recipe, seed, step, 0, bias_rate
        self.parts, self.biases = slim_all(model), []
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        for name, m in experts_of(model).items():  # DeepSeek-V3's biases, which transformers holds but does not update
            block = model.get_submodule(name.rpartition(".")[0])
            bias = [b for n, b in block.named_buffers() if n.endswith("e_score_correction_bias")]
            bias += [b for n, b in block.named_parameters() if n.endswith("e_score_correction_bias")]
            if bias and bias_rate:
                m.slim.load = torch.zeros(len(m.down_proj), dtype=torch.int64, device=bias[0].device)
                self.biases.append((bias[0], m.slim.load))
        self.hooks = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after),
            register_optimizer_step_post_hook(self.stepped),
        ]

    def before(self, model, args, kwargs):
        """Draw the widths of a micro-batch: a function of seed, step, micro-batch and process."""
        if not model.training or self.recipe == "moe":
            self.micro += model.training
            return None
        rng = np.random.default_rng([self.seed, self.step, self.micro, self.rank])
        self.micro += 1
        x = next(x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if x is not None)
        B, T = x.shape[:2]
        if self.recipe == "serve":
            drawn = rng.uniform((0.1, 0.0), (1.0, 3.0), (B, 2))
        else:  # the batch twice: the mean loss is then the paper's equation 6
            if kwargs.get("labels") is None or args:
                raise UsageError(
                    "recipe mose needs the loss of both widths from the model: call it with input_ids=, labels="
                )
            for name, value in kwargs.items():
                if torch.is_tensor(value) and value.dim() and value.size(0) == B:
                    kwargs[name] = torch.cat([value, value])
            if kwargs.get("num_items_in_batch") is not None:
                kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] * 2
            drawn = np.array([[1.0, 0.0]] * B + [[rng.integers(1, GRID) / GRID, 0.0]] * B)
        drawn = torch.tensor(drawn, dtype=torch.float32, device=x.device).repeat_interleave(T, 0)  # (N, 2)
        for m in self.parts.values():
            m.slim.drawn = RouterWidth(*drawn.split(1, 1))
        return args, kwargs

    def after(self, model, args, out):
        if model.training and self.recipe == "mose":
            out.logits = out.logits[: len(out.logits) // 2]  # at full width, as many as the caller expects
        return out

    @torch.no_grad()
    def stepped(self, optimizer, args, kwargs):
        """After a step of the optimizer: busy experts become a little less likely."""
        if not self.micro:  # a second optimizer of the same step
            return
        self.step, self.micro = self.step + 1, 0
        for bias, load in self.biases:
            if dist.is_initialized():
                dist.all_reduce(load)
            bias += self.bias_rate * (load.float().mean() - load).sign()
            load.zero_()

    def remove(self):
        for hook in self.hooks:
            hook.remove()
        for m in self.parts.values():
            m.slim.drawn = m.slim.load = None


def train_widths(model, recipe="serve", seed=0, step=0, bias_rate=1e-3):
    """From now on model(...) in training mode runs at widths drawn by `recipe`, in whatever loop calls it, and the
    selection biases of DeepSeek-V3 and its kin are balanced at every optimizer step, by bias_rate.

    step: optimizer steps done before, when a run is resumed: widths are a function of seed, step and micro-batch
    Returns an object whose remove() ends it. Raises UsageError.
    """
    return TrainWidths(model, recipe, seed, step, bias_rate)


# -----------------------------------------------------------------------------
# Sorting, slicing, counting


@torch.no_grad()
def sort_neurons(model, batches=()):
    """Put the neurons that matter most first, in every expert and shared MLP: at full width, the same function.

    What matters is the rms activation times the norm of the output vector, measured on batches of tokens (B, T).
    Without them, and for experts that saw none: the product of the norms of all vectors of a neuron.
    """
    modules = slim_all(model).values()
    for m in modules:
        m.slim.seen = neurons(m)[-1].new_zeros(neurons(m)[-1].shape[:2], dtype=torch.float32)  # (E, H)
    model.eval()
    for idx in batches:
        model(input_ids=idx.to(model.device).long(), use_cache=False)
    for m in modules:
        *ins, down = neurons(m)
        seen, m.slim.seen = m.slim.seen, None
        out = down.float().norm(dim=-1)
        norms = [w.float().norm(dim=-1).reshape(*out.shape, -1).prod(-1) for w in ins if w.size(-1) == down.size(-1)]
        by_norm = functools.reduce(torch.mul, norms) * out
        order = torch.where(seen.sum(1, keepdim=True) > 0, seen.sqrt() * out, by_norm).argsort(1, descending=True)
        for w in neurons(m):
            w.copy_(torch.take_along_dim(w, order.view(*order.shape, *[1] * (w.dim() - 2)), 1))


@torch.no_grad()
def slice_experts(model, width):
    """-> a standard model, to be saved: its experts are the first neurons of `model`'s, all else it shares with it.

    Raises UsageError if the architecture's config cannot say so.
    """
    parts, state, kind = slim_all(model), model.state_dict(), type(model.config).__name__
    sizes = sorted({neurons(m)[-1].size(1) for m in experts_of(model).values()})
    if len(sizes) > 1:
        raise UsageError(f"the experts have several sizes, {sizes}: {kind} has one number for them")
    names = [
        n
        for n, v in model.config.get_text_config().to_dict().items()
        if n.endswith("intermediate_size") and v == sizes[0]
    ]
    for name in sorted(names, key=lambda n: "moe" not in n):
        config = copy.deepcopy(model.config)
        text = config.get_text_config()
        setattr(text, name, width_to_neurons(width, sizes[0]))
        if hasattr(text, "shared_expert_intermediate_size"):
            text.shared_expert_intermediate_size = next(
                (cut(m, width) for m in parts.values() if not hasattr(m, "has_gate")), 0
            )
        with torch.device("meta"):
            small = type(model)(config)
        target, inside = small.state_dict(), tuple(f"{n}." for n in parts)
        if all(v.shape == target[k].shape or k.startswith(inside) for k, v in state.items()):
            break
    else:
        raise UsageError(f"no number of {kind} is the size of its experts alone, {sizes[0]}")
    small.load_state_dict(
        {k: v if v.shape == target[k].shape else v.new_empty(target[k].shape) for k, v in state.items()}, assign=True
    )
    for n, m in parts.items():
        little = small.get_submodule(n)
        for ours, theirs in zip(neurons(m), neurons(little)):
            if theirs.size(1) != cut(m, width):
                raise UsageError(f"{kind} cannot say that {n} has {cut(m, width)} neurons")
            theirs.copy_(ours[:, : theirs.size(1)])
    small.tie_weights()
    small._weight_conversions = getattr(model, "_weight_conversions", None)  # names of the original checkpoint
    return small


def neuron_flops(m):
    """Forward FLOPs of one neuron of m for one token: 2 per multiply-add of its vectors."""
    return 2 * sum(w[0, 0].numel() for w in neurons(m) if w.size(-1) == neurons(m)[-1].size(-1))


@torch.no_grad()
def count_flops(config, seq_len):
    """Forward FLOPs per token in a sequence of seq_len: (what is not slimmable, what is, at width 1), on no device."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        parts = slim_all(model).values()
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.zeros(1, seq_len, dtype=torch.int64), use_cache=False)
    return counter.get_total_flops() / seq_len, sum(m.slim.ran * neuron_flops(m) for m in parts) / seq_len


@torch.no_grad()
def evaluate(model, windows, policies, batch_size=8):
    """-> [dict(policy, mean_width, loss, change, error, flops_total, flops_expert), ...] on windows (n, T) of tokens.

    policies: {name: width or policy}. loss in nats per token; change of it from the first policy, with the standard
    error of that paired difference; mean_width and FLOPs per token are of what ran.
    """
    rows, first, (fixed, full) = [], None, count_flops(model.config, windows.size(1))
    parts = slim_all(model.eval()).values()
    for name, policy in policies.items():
        set_width(model, policy)
        losses = []
        for m in parts:
            m.slim.used = m.slim.ran = 0
        for idx in windows.split(batch_size):
            idx = idx.to(model.device).long()
            logits = model(input_ids=idx, use_cache=False).logits
            losses += [
                F.cross_entropy(l[:-1].float(), t[1:]).double().cpu() for l, t in zip(logits, idx)
            ]  # one at a time: less memory
        losses = torch.stack(losses)
        first = losses if first is None else first
        change, experts = losses - first, sum(int(m.slim.ran) * neuron_flops(m) for m in parts) / windows.numel()
        rows.append(dict(
            policy=name, mean_width=experts / full, loss=losses.mean().item(), change=change.mean().item(),
            error=change.std().item() / len(change) ** 0.5, flops_total=fixed + experts, flops_expert=experts,
        ))  # fmt: skip
    return rows


# -----------------------------------------------------------------------------
# Text


def documents(text):
    """Yield (text, whether the document ends here, whether it is for validation) of files, a folder or a dataset."""
    dataset = next((p for p in (Path("data") / text, Path(text)) if (p / "meta.json").is_file()), None)
    if dataset is None:
        files = prepare.find_files([text])
        read = lambda f: prepare.read_table(f) if f.name.endswith(prepare.TABLE) else prepare.read_text(f)
        yield from prepare.split_documents(itertools.chain.from_iterable(map(read, files)))
        return
    *splits, name, _ = prepare.open_dataset(dataset, 1)
    tokenizer = prepare.get_tokenizer(name)
    for shards, is_val in zip(splits, (False, True)):
        for file in shards.files:
            tokens = np.fromfile(file, np.uint16, offset=1024)
            for document in np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_token) + 1):
                yield (
                    tokenizer.decode_bytes(document[document != tokenizer.eot_token].tolist()).decode(errors="replace"),
                    True,
                    is_val,
                )


def read_windows(o, tokenizer, config, count, is_val):
    """Up to count tokens of the training or validation documents, in windows (n, o.seq_len). UsageError if there is none."""
    config, end = config.get_text_config(), tokenizer.eos_token_id
    limit = getattr(config, "max_position_embeddings", o.seq_len)
    if o.seq_len > limit:
        raise UsageError(f"--seq_len must be at most the model's {limit} positions, not {o.seq_len}")
    parts, have = [], 0
    for text, ends, val in documents(o.text):
        if val == is_val and have < count:
            ids = tokenizer(text)["input_ids"]
            parts.append(np.array(ids + [end] * (ends and end is not None and ids[-1:] != [end]), dtype=np.int32))
            have += len(parts[-1])
        if have >= count:
            break
    n = min(have, max(count, o.seq_len)) // o.seq_len
    if n == 0:
        raise UsageError(
            f"{o.text}: {have} tokens for {'validation' if is_val else 'training'}, fewer than --seq_len={o.seq_len}"
        )
    windows = torch.from_numpy(np.concatenate(parts)[: n * o.seq_len]).view(n, o.seq_len)
    if (most := windows.max()) >= config.vocab_size:
        raise UsageError(f"the tokenizer gives token {most}, beyond the model's vocabulary of {config.vocab_size}")
    return windows


# -----------------------------------------------------------------------------
# Commands: MODEL in, OUT whole or not at all

# what goes along with the weights
COMPANIONS = "tokenizer* special_tokens_map.json added_tokens.json vocab* merges.txt *.model *.tiktoken chat_template*"
COMPANIONS = [*COMPANIONS.split(), "*processor_config.json", "generation_config.json", "LICENSE*"]


def first_line(e):
    return (str(e).strip() or type(e).__name__).splitlines()[0]


def inspect(name):
    """A folder or a hub's name -> its folder, its config, and the model without weights. Raises UsageError."""
    if not Path(name).is_dir():
        patterns = [*COMPANIONS, "config.json", "*.safetensors", "*.safetensors.index.json"]
        try:
            name = huggingface_hub.snapshot_download(name, allow_patterns=patterns)
        except (OSError, ValueError) as e:
            raise UsageError(f"{name}: neither a folder nor to be had from the hub: {first_line(e)}") from e
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as e:
        raise UsageError(f"{name}: not a language model that transformers knows: {first_line(e)}") from e
    if method:
        raise UsageError(f"{name} is quantised ({method}): " + DEQUANTISE)
    slim_all(model)
    return Path(name), config, model


def load(folder, device):
    """The model with its weights, in the checkpoint's dtype. Raises UsageError if some are missing."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", experts_implementation="slimmable", output_loading_info=True
        )
        model = model.to(device)
    except (OSError, ValueError, RuntimeError) as e:
        raise UsageError(f"{folder} could not be loaded: {first_line(e)}") from e
    if lost := info["missing_keys"] or info["mismatched_keys"]:
        raise UsageError(
            f"{folder} is not whole: {len(lost)} weights are missing or of another size, such as {min(map(str, lost))}"
        )
    return model


def load_tokenizer(folder):
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as e:
        raise UsageError(f"{folder} has no tokenizer that transformers knows: {first_line(e)}") from e


def save(model, out, folder, **kwargs):
    """Write the model and what goes along with it: `out` appears when all is on the disk, or nothing is left."""
    partial = out.with_name(f".{out.name}.partial")
    need = sum(p.nbytes for p in model.parameters())
    try:
        partial.mkdir(parents=True)
        if (free := shutil.disk_usage(partial).free) < need:
            raise UsageError(f"{out} needs {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        model.save_pretrained(partial, **kwargs)
        for file in {f for pattern in COMPANIONS for f in folder.glob(pattern) if f.is_file()}:
            shutil.copyfile(file, partial / file.name)
        for file in partial.iterdir():
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
        partial.rename(out)
    except (OSError, safetensors.SafetensorError) as e:
        raise UsageError(f"{out} could not be written, and nothing is left of it: {first_line(e)}") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {need / 1e6:,.1f} MB")


def run_sort(o, folder, config, tokenizer, out):
    batches = ()
    if o.text:
        batches = read_windows(o, tokenizer, config, o.sort_tokens, False).split(o.batch_size)
    model = load(folder, o.device)
    sort_neurons(model, batches)
    save(model, out, folder)


def run_slice(o, folder, config, tokenizer, out):
    (width,) = numbers("width", o.width, 1)
    save(slice_experts(load(folder, "cpu"), width), out, folder)


def run_train(o, folder, config, tokenizer, out):
    work, world = out.with_name(f"{out.name}.training"), int(os.environ.get("WORLD_SIZE", 1))
    last = get_last_checkpoint(work) if work.is_dir() else None
    if bool(last) != o.resume:
        raise UsageError(
            f"{work} holds a training that was stopped: add --resume, or remove it"
            if last
            else f"no checkpoint in {work} to resume"
        )
    windows = read_windows(o, tokenizer, config, o.steps * o.accumulate * o.batch_size * world * o.seq_len, False)
    arguments = dict(
        output_dir=str(work), max_steps=o.steps, per_device_train_batch_size=o.batch_size, seed=o.seed,
        gradient_accumulation_steps=o.accumulate, learning_rate=o.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=o.steps // 20, weight_decay=0.1, logging_steps=10, save_steps=max(1, o.steps // 10),
        save_total_limit=1, bf16=torch.cuda.is_available(), report_to="none",
    )  # fmt: skip
    try:
        arguments = transformers.TrainingArguments(**{**arguments, **json.loads(o.trainer)})
    except (TypeError, ValueError) as e:
        raise UsageError(f"--trainer: {first_line(e)}") from e
    if arguments.n_gpu > 1:
        raise UsageError("several GPUs need `accelerate launch adapt.py train ...`")
    model = load(folder, "cpu")
    if o.sort and not last:
        sort_neurons(model, windows[: max(1, o.sort_tokens // o.seq_len)].split(o.batch_size))
    dtypes, coefficient = {n: p.dtype for n, p in model.named_parameters()}, getattr(config, "router_aux_loss_coef", 0)
    model.float().config.output_router_logits = bool(coefficient)  # the model adds its balancing loss itself
    step = int(last.rpartition("-")[2]) if last else 0
    widths = train_widths(model, o.recipe, o.seed, step, o.bias_rate)
    collate = lambda rows: dict.fromkeys(("input_ids", "labels"), torch.stack([row for (row,) in rows]).long())
    trainer = transformers.Trainer(
        model, arguments, train_dataset=torch.utils.data.TensorDataset(windows), data_collator=collate
    )
    trainer.train(resume_from_checkpoint=last)
    widths.remove()
    state = trainer.accelerator.get_state_dict(trainer.model)  # gathered, if FSDP has split it
    if trainer.is_world_process_zero():
        model.config.output_router_logits = getattr(config, "output_router_logits", False)
        save(model, out, folder, state_dict={n: p.to(dtypes.get(n, p.dtype)) for n, p in state.items()})
        trainer.state.save_to_json(out / "trainer_state.json")
        shutil.rmtree(work)


def run_eval(o, folder, config, tokenizer, out):
    policies = {"width 1": 1.0}
    policies |= {f"width {w:g}": w for w in numbers("width", o.width or "1,0.75,0.5,0.25") if w != 1}
    policies |= {f"router {b:g}": RouterWidth(b, o.gamma) for b in numbers("budget", o.budget)}
    windows = read_windows(o, tokenizer, config, o.eval_tokens, True)
    rows = evaluate(load(folder, o.device), windows, policies, o.batch_size)
    print("| policy | width | FLOPs per token | nats per token | change |\n|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['policy']} | {r['mean_width']:.3f} | {r['flops_total']:.4g} | {r['loss']:.4f} | {r['change']:+.4f} ± {r['error']:.4f} |"
        )
    folder = Path(o.model) if Path(o.model).is_dir() else Path("out") / Path(o.model).name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.json").write_text(
        json.dumps(dict(text=o.text, tokens=windows.numel(), gamma=o.gamma, points=rows), indent=1) + "\n"
    )
    draw(rows, folder / "eval.png")
    print(
        f"{folder}/eval.json, eval.png: {windows.numel():,} validation tokens; error of the paired difference to width 1"
    )


def draw(rows, path):
    """Loss over FLOPs per token, a line for uniform widths and one for the router's."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for kind in ("width", "router"):
        if points := sorted((r["flops_total"], r["loss"]) for r in rows if r["policy"].startswith(kind)):
            axes.plot(
                *zip(*points),
                "o-",
                label={"width": "every expert at one width", "router": "widths by the router"}[kind],
            )
    axes.set(xlabel="forward FLOPs per token", ylabel="validation loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def dry_run(o, config, model):
    """What a model needs, from its config: parameters, bytes, FLOPs."""
    parts, total = slim_all(model).values(), sum(p.numel() for p in model.parameters())
    fixed, experts = count_flops(config, o.seq_len)
    dtype = config.dtype or torch.float32
    print(
        f"{type(model).__name__}: {total:,} parameters, {total * dtype.itemsize / 1e9:.1f} GB in {dtype}".replace(
            "torch.", ""
        )
    )
    print(
        f"training all of them: {16 * total / 1e9:.1f} GB of float32 weights, gradients and AdamW's two moments, and activations"
    )
    print(f"| width | parameters | GB | FLOPs per token, of {o.seq_len} |\n|---|---|---|---|")
    for width in numbers("width", o.width or "1,0.75,0.5,0.25"):
        gone = sum(w.numel() // w.size(1) * (w.size(1) - cut(m, width)) for m in parts for w in neurons(m))
        print(
            f"| {width:g} | {total - gone:,} | {(total - gone) * dtype.itemsize / 1e9:.2f} | {fixed + experts * width:.4g} |"
        )


def numbers(name, text, count=None):
    """ "1,0.5" -> [1.0, 0.5], each a width."""
    try:
        values = [float(part) for part in text.split(",") if part]
    except ValueError as e:
        raise UsageError(f"--{name} must be numbers with commas between, not {text!r}") from e
    for value in values:
        check_width(value, f"--{name}")
    if count and len(values) != count:
        raise UsageError(f"--{name} must be one number above 0 and at most 1")
    return values


# -----------------------------------------------------------------------------
# Command line


@dataclass
class Options:
    text: str = option("", "to train on, measure on or evaluate on: a file, a folder, or a dataset of prepare.py")
    seq_len: int = option(512, "tokens of a sequence", least=2)
    batch_size: int = option(8, "sequences at once; recipe mose runs each twice", least=1)
    sort_tokens: int = option(65536, "to measure activations on, for sorting", least=1)
    width: str = option("", "for slice one number, for eval several: 1,0.5,0.25")
    budget: str = option("", "for eval: mean widths, split by the router's confidence: 0.5,0.25")
    gamma: float = option(1.0, "for those: how strongly confidence counts", least=0)
    eval_tokens: int = option(262144, "to evaluate on", least=1)
    recipe: str = option("serve", "how to train: " + "; ".join(f"{k}, {v}" for k, v in RECIPES.items()))
    sort: bool = option(True, "sort before training")
    steps: int = option(1000, "optimizer steps", least=1)
    accumulate: int = option(1, "micro-batches of an optimizer step", least=1)
    learning_rate: float = option(
        1e-4, "peak, after warming up for a twentieth of the steps; then a cosine to 0", least=1e-12
    )
    bias_rate: float = option(1e-3, "step of the biases that balance DeepSeek-V3's experts; 0 leaves them", least=0)
    seed: int = option(0, "of the order of text, and of widths", least=0)
    trainer: str = option("{}", 'other arguments of transformers\' Trainer, as JSON: {"gradient_checkpointing": true}')
    resume: bool = option(False, "continue the training that was stopped, from its last checkpoint")
    device: str = option("", "to sort or evaluate on; default cuda if there is one, else cpu")
    dry_run: bool = option(False, "say what it needs, from the config alone")


TAKES = dict(
    sort="text seq_len batch_size sort_tokens device",
    train="text seq_len batch_size sort_tokens recipe sort steps accumulate learning_rate bias_rate seed trainer resume device",
    eval="text seq_len batch_size width budget gamma eval_tokens device",
    slice="width",
)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    n = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    command, *names = argv[:n] or [""]
    _, o, given = parse(Options, __doc__, argv[n:])
    if command not in TAKES or len(names) != (1 if command == "eval" or o.dry_run else 2):
        raise UsageError("usage: python adapt.py sort|train|slice MODEL OUT or eval MODEL, then --options; see --help")
    if other := given - set(TAKES[command].split()) - {"dry_run"}:
        raise UsageError(f"{command} takes no --{min(other)}; it takes --{' --'.join(TAKES[command].split())}")
    o.model = names[0]
    out = Path(names[1]) if len(names) > 1 else None
    folder, config, model = inspect(names[0])
    if o.dry_run:
        return dry_run(o, config, model)
    if out is not None and out.exists():
        raise UsageError(f"{out} exists: choose another folder, or remove it")
    if command in ("train", "eval") and not o.text:
        raise UsageError(f"{command} needs --text: a file, a folder, or a dataset of prepare.py")
    tokenizer = load_tokenizer(folder) if o.text else None
    try:
        globals()[f"run_{command}"](o, folder, config, tokenizer, out)
    except safetensors.SafetensorError as e:
        raise UsageError(f"{names[0]}: weights could not be read or written: {str(e).splitlines()[0]}") from e


if __name__ == "__main__":
    run(main, "adapt.py")
