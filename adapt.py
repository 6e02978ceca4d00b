"""
Make the experts of a Hugging Face MoE slimmable, and slice it to plain checkpoints of any width.

    python adapt.py sort  MODEL OUT [--text=TEXT]               # neurons by importance: same function, better prefixes
    python adapt.py train MODEL OUT --text=TEXT                 # continued training at many widths, sorted first
    python adapt.py eval  MODEL --text=TEXT [--budget=0.5,...]  # loss and FLOPs per token at every width
    python adapt.py slice MODEL OUT --width=0.5                 # a standard checkpoint with half of every expert

MODEL: a folder or a name on the hub. TEXT: a file or folder as prepare.py reads them, or a dataset that it wrote; every
tenth document is for eval. --dry_run says what a model would need, from its config.json alone. As a library:

    import adapt                                                # registers the experts implementation "slimmable"
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="slimmable")
    adapt.set_width(model, 0.5)                                 # or a policy: RouterWidth(0.5)

Neuron j of an expert is row j of its gate and up projections and column j of its down projection. Their order means
nothing to the full model: `sort` puts first what matters most, so that a prefix is worth running.
"""

import collections
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
from bench import draw, write_json
from model import GRID, RouterWidth, UsageError, check_width, compute_dtype, grouped_mm, is_policy, run_experts
from model import width_to_neurons as to_neurons
from prepare import option, parse, run

try:
    import accelerate  # noqa: F401, transformers' Trainer stands on it
    import huggingface_hub
    import safetensors
    import transformers
    from transformers.integrations import moe
except ImportError as e:
    missing = UsageError(f"{e.name} is missing: pip install -r requirements-extras.txt")
    if __name__ == "__main__":
        print(f"adapt.py: {missing}", file=sys.stderr)
        sys.exit(2)
    raise missing from e

# -----------------------------------------------------------------------------
# Experts and their neurons, in every layout


class Slim:
    """What adapt.py knows about one module of experts: its attribute `slim`. None of it is saved with the model."""

    width = 1.0  # a number or a policy, set by set_width
    drawn = None  # the policy of this training micro-batch, set by train_widths
    load = None  # tokens of each expert (E,), if they are counted
    seen = None  # the sum of each neuron's squared activations (E, H), if they are measured: then at full width
    used = ran = 0  # counted by run_experts: neurons that widths asked for, and neurons that ran

    def now(self, training):
        return 1.0 if self.seen is not None else self.width if self.drawn is None or not training else self.drawn


def experts_of(model):
    """{name: module} of its routed experts. Raises UsageError if they cannot be slimmed."""
    kind = type(model).__name__
    for name, p in model.named_parameters():
        if ".experts." in name and (p.dtype.itemsize < 2 or not p.is_floating_point()):
            raise UsageError(f"{kind} has experts in {p.dtype}: {DEQUANTISE}")
    found = {n: m for n, m in model.named_modules() if hasattr(m, "is_transposed") and hasattr(m, "has_gate")}
    if not found:
        raise UsageError(f"{kind} has no experts that transformers can dispatch (@use_experts_implementation)")
    for name, m in found.items():
        if m._is_expert_parallel or type(m.down_proj.data).__name__ == "DTensor":
            raise UsageError(f"{name} is split by expert or tensor parallelism: use FSDP or device_map")
        if (size := neurons(m)[-1].size(1)) % 8:
            raise UsageError(f"{name} has {size} neurons an expert, and widths are multiples of 8")
    return found


DEQUANTISE = "load it with FineGrainedFP8Config or Mxfp4Config(dequantize=True), save it, and take that"


def shared_of(model):
    """{name: module} of the MLPs that every token visits beside its experts. Those without a gate stay as they are."""
    names, parts = ("shared_expert", "shared_experts", "shared_mlp"), ("gate_proj", "up_proj", "down_proj")
    is_mlp = lambda m: all(isinstance(getattr(m, part, None), nn.Module) for part in parts)
    return {n: m for n, m in model.named_modules() if n.split(".")[-1] in names and is_mlp(m)}


def neurons(m):
    """What belongs to neurons, as views in which neuron j is [:, j]: inputs, their biases, and outputs (E, H, d) last.

    Gate and up are two of (E, H, d); where the checkpoint interleaves them, one of (E, H, 2, d). Shared MLPs: E is 1.
    """
    if not hasattr(m, "has_gate"):
        ins = [*(l.weight for l in (m.gate_proj, m.up_proj)), *(l.bias for l in (m.gate_proj, m.up_proj))]
        return [w[None] for w in [*ins, m.down_proj.weight.mT] if w is not None]
    name = "gate_up_proj" if m.has_gate else "up_proj"
    up, down = getattr(m, name), m.down_proj
    up, down = (up.mT, down) if m.is_transposed else (up, down.mT)  # (E, 2H, d), (E, H, d)
    ins = [up, getattr(m, name + "_bias")] if m.has_bias else [up]
    if m.has_gate:
        ins = [half for w in ins for half in (w.chunk(2, 1) if m.is_concatenated else [w.unflatten(1, (-1, 2))])]
    return [*ins, down]


def vectors(m):
    """Of `neurons`, all but biases."""
    *ins, down = neurons(m)
    return [w for w in ins if w.dim() > 2 and w.size(-1) == down.size(-1)] + [down]


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
                m.register_forward_pre_hook(before_shared)
                for l, forward in ((m.gate_proj, rows_of), (m.up_proj, rows_of), (m.down_proj, columns_of)):
                    l.slim, l.forward = m.slim, forward.__get__(l)
    return {**experts, **shared}


def cut(m, width):
    """How many neurons of m run at a width: a shared MLP as large as several experts is cut as they are."""
    return neurons(m)[-1].size(1) // m.slim.unit * to_neurons(width, m.slim.unit)


def set_width(model, width, shared=True):
    """From now on `model` runs its experts at `width`, a number or a policy (see model.py), and its shared experts at
    it or at the policy's budget; those stay full with shared=False. Returns the model. Raises UsageError.
    """
    if not is_policy(width):
        check_width(width)
    for name, m in slim_all(model).items():
        layer = next((int(part) for part in name.split(".") if part.isdecimal()), 0)
        slimmed = shared or hasattr(m, "has_gate")
        m.slim.width = 1.0 if not slimmed else width.at(layer) if hasattr(width, "at") else width
    return model


# -----------------------------------------------------------------------------
# Running a prefix


def slimmable(m, x, expert, weight):
    """The experts implementation. m: the module; x (N, d); expert, weight (N, k), chosen by its router -> (N, d)"""
    s = getattr(m, "slim", None) or Slim()
    if s.load is not None and m.training:
        s.load = s.load + torch.bincount(expert.flatten(), minlength=len(m.down_proj))
    width, matrices = s.now(m.training), neurons(m)
    H = matrices[-1].size(1)
    if not is_policy(width):
        width = to_neurons(width, H)
        if width == H and s.seen is None:  # stock code, bit for bit
            s.ran += expert.numel() * H
            return torch.empty_like(x) if x.is_meta else moe.grouped_mm_experts_forward(m, x, expert, weight)
    else:
        weight, order = weight.sort(-1, descending=True)  # likeliest first, as policies may expect
        expert, policy = expert.gather(-1, order), width
        width = policy.widths(weight.detach().float())
        if getattr(policy, "renormalize", False) and getattr(m.config, "norm_topk_prob", True):
            kept = weight * (width > 0)
            weight = kept * (weight.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True))
    dtype = compute_dtype(x) if torch.is_autocast_enabled(x.device.type) else matrices[-1].dtype
    mlp = functools.partial(expert_mlp, m)
    return run_experts(x.to(dtype), expert, weight.to(dtype), width, mlp, matrices, s).to(x.dtype)


def expert_mlp(m, rows, ends, keep, *matrices):
    """The arithmetic of one of m's experts, for run_experts. matrices: as `neurons` gives them, cut to a width."""
    *ins, down = matrices
    weights, biases = (ins[: len(ins) // 2], ins[len(ins) // 2 :]) if m.has_bias else (ins, [])
    which = torch.arange(len(rows), device=ends.device, dtype=ends.dtype)
    which = (
        torch.searchsorted(ends, which, right=True) if m.has_bias or m.slim.seen is not None else None
    )  # the experts
    a = [grouped_mm(rows, (w.flatten(1, 2) if w.dim() == 4 else w).mT, ends) for w in weights]
    a = [z + b.flatten(1)[which] for z, b in zip(a, biases)] or a
    a = m._apply_gate(torch.cat(a, -1)) if m.has_gate else m.act_fn(a[0])  # (n, h)
    if m.slim.seen is not None:
        m.slim.seen.index_add_(0, which, a.float().square())
    y = grouped_mm(a if keep is None else a * keep, down, ends)  # (n, d)
    y = y + m.down_proj_bias[which].to(y.dtype) if m.has_bias else y
    return m.post_expert_norm(y) if m.has_post_expert_norm else y


moe.ALL_EXPERTS_FUNCTIONS.register("slimmable", slimmable)


def before_shared(m, args):
    """Shared MLPs run their own forward, on Linears that are cut, or whose neurons are masked token by token."""
    s, x = m.slim, args[0]
    width, H, tokens = s.now(m.training), m.down_proj.in_features, x.numel() // x.size(-1)
    width = getattr(width, "budget", 1.0) if is_policy(width) else width
    s.cut, s.keep = H, None
    if torch.is_tensor(width):  # (tokens, 1)
        h = H // s.unit * (width * s.unit / 8).round().clamp_min(1) * 8
        s.keep = (torch.arange(H, device=x.device) < h).view(*x.shape[:-1], H)
    else:
        s.cut = cut(m, width)
    s.ran += s.cut * tokens
    if (s.keep is not None or s.cut < H) and not all(
        type(l) is nn.Linear for l in (m.gate_proj, m.up_proj, m.down_proj)
    ):
        raise UsageError(
            f"{type(m.down_proj).__name__} in shared experts: leave them out of it, or set_width(shared=False)"
        )


def rows_of(l, x):
    """forward of the gate and up projections of a shared MLP"""
    return F.linear(x, l.weight[: l.slim.cut], None if l.bias is None else l.bias[: l.slim.cut])


def columns_of(l, a):
    """and of its down projection"""
    s = l.slim
    if s.seen is not None:
        s.seen += a.float().square().flatten(0, -2).sum(0)
    return F.linear(a if s.keep is None else a * s.keep, l.weight[:, : s.cut], l.bias)


# -----------------------------------------------------------------------------
# Training at many widths, in any loop

RECIPES = {  # serve trains widths here, not numbers of experts as in train.py: these models are also cut by `slice`
    "serve": "at router widths (train.py's is another), budget and gamma random for each sequence",
    "mose": "every sequence at full width and again at one random uniform width, as in the paper",
    "moe": "at full width only",
}


def train_widths(model, recipe="serve", seed=0, step=0, bias_rate=1e-3):
    """From now on model(...) in training mode runs at widths drawn by `recipe`, in whatever loop calls it, and the
    selection biases of DeepSeek-V3 and its kin are balanced at every optimizer step, by bias_rate.

    step: optimizer steps done before, when a run is resumed: widths are a function of seed, step and micro-batch
    Returns an object whose remove() ends it. Raises UsageError.
    """
    return TrainWidths(model, recipe, seed, step, bias_rate)


class TrainWidths:
    """What `train_widths` leaves on a model: hooks on its forward passes, and on the steps of whatever optimizer."""

    def __init__(self, model, recipe, seed, step, bias_rate):
        if recipe not in RECIPES:
            raise UsageError(f"recipe must be one of {', '.join(RECIPES)}, not {recipe!r}")
        self.recipe, self.seed, self.step, self.micro, self.bias_rate = recipe, seed, step, 0, bias_rate
        self.parts, self.biased = slim_all(model).values(), []  # (experts, the router with their bias)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        for name, m in experts_of(model).items():  # transformers holds these biases, but does not update them
            block = model.get_submodule(name.rpartition(".")[0])
            routers = [r for r in block.modules() if hasattr(r, "e_score_correction_bias")]
            if routers and bias_rate:
                m.slim.load = 0
                self.biased.append((m, routers[0]))
        self.hooks = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after),
            register_optimizer_step_post_hook(self.stepped),
        ]

    def before(self, model, args, kwargs):
        """Draw the widths of a micro-batch: a function of seed, step, micro-batch and process."""
        if not model.training:
            return None
        rng = np.random.default_rng([self.seed, self.step, self.micro, self.rank])
        self.micro += 1
        if self.recipe == "moe":
            return None
        x = next(x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if x is not None)
        B, T = x.shape[:2]
        if self.recipe == "serve":
            drawn = rng.uniform((0.1, 0.0), (1.0, 3.0), (B, 2))
        else:  # the batch twice: the mean loss is the paper's equation 6
            if args or kwargs.get("labels") is None:
                raise UsageError("recipe mose has the model compute the loss: call it with input_ids= and labels=")
            twice = lambda v: torch.cat([v, v]) if torch.is_tensor(v) and v.dim() and len(v) == B else v
            kwargs = {name: twice(value) for name, value in kwargs.items()}
            if kwargs.get("num_items_in_batch") is not None:  # what the model divides by
                kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] * 2
            drawn = [[1.0, 0.0]] * B + [[rng.integers(1, GRID) / GRID, 0.0]] * B
        drawn = torch.tensor(np.array(drawn), dtype=torch.float32, device=x.device).repeat_interleave(T, 0)  # (N, 2)
        for m in self.parts:
            m.slim.drawn = RouterWidth(*drawn.split(1, 1))
        return args, kwargs

    def after(self, model, args, out):
        if model.training and self.recipe == "mose":
            out.logits = out.logits[: len(out.logits) // 2]  # those at full width: as many as the caller expects

    @torch.no_grad()
    def stepped(self, optimizer, args, kwargs):
        """After a step of the optimizer: busy experts become a little less likely."""
        if self.micro:  # else it is a second optimizer, in the same step
            self.step, self.micro = self.step + 1, 0
            for m, router in self.biased:
                if dist.is_initialized():
                    dist.all_reduce(m.slim.load)
                load, m.slim.load = m.slim.load.float(), 0
                router.e_score_correction_bias += self.bias_rate * (load.mean() - load).sign()

    def remove(self):
        for hook in self.hooks:
            hook.remove()
        for m in self.parts:
            m.slim.drawn = m.slim.load = None


# -----------------------------------------------------------------------------
# Sorting, slicing, evaluating


@torch.no_grad()
def sort_neurons(model, batches=()):
    """Put the neurons that matter most first, in every expert and shared MLP: at full width, the same function.

    What matters is the rms activation times the norm of the output vector, measured on batches of tokens (B, T).
    Without them, and for experts that saw none: the product of the norms of all vectors of a neuron.
    """
    parts = slim_all(model.eval()).values()
    for m in parts:
        m.slim.seen = neurons(m)[-1].new_zeros(neurons(m)[-1].shape[:2], dtype=torch.float32)  # (E, H)
    for idx in batches:
        model(input_ids=idx.to(model.device).long(), use_cache=False)
    for m in parts:
        norms = [w.float().norm(dim=-1) for w in vectors(m)]
        seen, out, m.slim.seen = m.slim.seen, norms[-1], None
        by_norm = torch.stack([n.reshape(*out.shape, -1).prod(-1) for n in norms]).prod(0)
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
        raise UsageError(f"the experts have several sizes, {sizes}, and {kind} one number for them")
    names = [n for n, v in model.config.get_text_config().to_dict().items() if v == sizes[0]]
    for name in sorted((n for n in names if n.endswith("intermediate_size")), key=lambda n: "moe" not in n):
        config = copy.deepcopy(model.config)
        text = config.get_text_config()
        setattr(text, name, to_neurons(width, sizes[0]))
        if getattr(text, "shared_expert_intermediate_size", None):
            text.shared_expert_intermediate_size = cut(next(reversed(parts.values())), width)
        with torch.device("meta"):
            small = type(model)(config)
        target, inside = small.state_dict(), tuple(f"{n}." for n in parts)
        if all(v.shape == target[n].shape or n.startswith(inside) for n, v in state.items()):
            break
    else:
        raise UsageError(f"no number of {kind} is the size of its experts alone, {sizes[0]}")
    fits = lambda n, v: v if v.shape == target[n].shape else v.new_empty(target[n].shape)
    small.load_state_dict({n: fits(n, v) for n, v in state.items()}, assign=True)
    for n, m in parts.items():
        for theirs, ours in zip(neurons(small.get_submodule(n)), neurons(m)):
            if theirs.size(1) != cut(m, width):
                raise UsageError(f"{kind} cannot say that {n} has {cut(m, width)} neurons")
            theirs.copy_(ours[:, : theirs.size(1)])
    for n, buffer in model.named_buffers():
        if n not in state:  # rotary frequencies
            small.get_submodule(n.rpartition(".")[0]).register_buffer(n.split(".")[-1], buffer, persistent=False)
    small.tie_weights()
    small._weight_conversions = getattr(model, "_weight_conversions", None)  # names of the original checkpoint
    return small


def neuron_flops(m):
    """Forward FLOPs of one neuron of m for one token: 2 per multiply-add."""
    return 2 * sum(w[0, 0].numel() for w in vectors(m))


@torch.no_grad()
def count_flops(config, seq_len):
    """Forward FLOPs per token in a sequence of seq_len: (what is not slimmable, what is, at width 1), on no device."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        parts = slim_all(model).values()
        with FlopCounterMode(display=False) as counter:
            mask = torch.zeros(1, 1, seq_len, seq_len)  # given whole: transformers would look into any other
            model(input_ids=torch.zeros(1, seq_len, dtype=torch.int64), attention_mask=mask, use_cache=False)
    shared, routed = 0, 0
    for m in parts:
        flops = m.slim.ran * neuron_flops(m)
        shared, routed = (shared, routed + flops) if hasattr(m, "has_gate") else (shared + flops, routed)
    return (counter.get_total_flops() - shared) / seq_len, (shared + routed) / seq_len


@torch.no_grad()
def evaluate(model, windows, policies, batch_size=8):
    """-> [dict(policy, mean_width, loss, change, error, flops_total, flops_expert), ...] on windows (n, T) of tokens.

    policies: {name: width or policy}. loss is in nats per token, change that from the first policy, with the standard
    error of this paired difference; mean_width, and forward FLOPs per token, are of what ran.
    """
    rows, first, parts = [], None, slim_all(model.eval()).values()
    fixed, full = count_flops(model.config, windows.size(1))
    for name, policy in policies.items():
        set_width(model, policy)
        losses = []
        for m in parts:
            m.slim.ran = 0
        for idx in windows.split(batch_size):
            idx = idx.to(model.device).long()
            logits = model(input_ids=idx, use_cache=False).logits
            losses += [F.cross_entropy(l[:-1].float(), t[1:]).item() for l, t in zip(logits, idx)]  # float32 of one
        losses = np.array(losses)
        first = losses if first is None else first
        change, expert = losses - first, sum(int(m.slim.ran) * neuron_flops(m) for m in parts) / windows.numel()
        rows.append(dict(
            policy=name, mean_width=expert / full, loss=losses.mean(), change=change.mean(),
            error=change.std() / len(change) ** 0.5, flops_total=fixed + expert, flops_expert=expert,
        ))  # fmt: skip
    return rows


# -----------------------------------------------------------------------------
# Models and texts


def first_line(e):
    return (str(e).strip() or type(e).__name__).splitlines()[0]


COMPANIONS = (  # of the weights
    "tokenizer* special_tokens_map.json added_tokens.json vocab* merges.txt *.model *.tiktoken chat_template* "
    "*processor_config.json generation_config.json LICENSE*"
).split()


def look(name, weights=True):
    """A folder or a hub's name -> its folder, its config, and the model without its weights. Raises UsageError."""
    try:
        if not Path(name).is_dir():
            files = ["config.json"] + [*COMPANIONS, "*.safetensors", "*.safetensors.index.json"] * weights
            name = huggingface_hub.snapshot_download(name, allow_patterns=files)
        config = transformers.AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as e:
        raise UsageError(f"{name}: no language model that transformers knows: {first_line(e)}") from e
    if quantised := getattr(config, "quantization_config", None):
        raise UsageError(f"{name} is quantised ({quantised.get('quant_method')}): {DEQUANTISE}")
    slim_all(model)
    return Path(name), config, model


def load(folder, device=""):
    """The model with its weights, in the checkpoint's dtype. Raises UsageError if any is missing."""
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", experts_implementation="slimmable", output_loading_info=True
        )
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as e:
        raise UsageError(f"{folder} could not be loaded: {first_line(e)}") from e
    if lost := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise UsageError(f"{folder} lacks {len(lost)} weights, or has them in another size: {lost[0]}")
    return model


def save(model, out, folder, **kwargs):
    """Write the model and what goes with it: `out` appears when all is on the disk, or nothing is left."""
    partial, size = out.with_name(f".{out.name}.partial"), sum(p.nbytes for p in model.parameters())
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if (free := shutil.disk_usage(partial).free) < size:
            raise UsageError(f"{out} needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
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
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {size / 1e6:,.1f} MB")


def documents(text):
    """Yield (text, whether the document ends here, whether it is for validation), of files or a dataset."""
    dataset = next((p for p in (Path("data") / text, Path(text)) if (p / "meta.json").is_file()), None)
    if dataset is None:
        skipped = collections.Counter()
        table = lambda f: prepare.read_table(f, "text", skipped)
        read = lambda f: (table if f.name.endswith(prepare.TABLE) else prepare.read_text)(f)
        texts = map(read, prepare.find_files([text]))
        yield from prepare.split_documents(itertools.chain.from_iterable(texts))
        return
    *splits, name, _ = prepare.open_dataset(dataset, 1)
    tokenizer = prepare.get_tokenizer(name)
    for is_val, shards in enumerate(splits):
        for file in shards.files:
            tokens = np.fromfile(file, np.uint16, offset=1024)
            for ids in np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_token) + 1):
                ids = ids[ids != tokenizer.eot_token].tolist()
                yield tokenizer.decode_bytes(ids).decode(errors="replace"), True, bool(is_val)


def read_windows(o, folder, config, n_tokens, is_val):
    """Up to n_tokens of the training or validation documents, in windows (n, o.seq_len). Raises UsageError."""
    config = config.get_text_config()
    if o.seq_len > (limit := getattr(config, "max_position_embeddings", o.seq_len)):
        raise UsageError(f"--seq_len must be at most the model's {limit} positions, not {o.seq_len}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as e:
        raise UsageError(f"{folder} has no tokenizer that transformers knows: {first_line(e)}") from e
    parts, have, end = [], 0, tokenizer.eos_token_id
    for text, ends, val in documents(o.text):
        if val == is_val and text:
            ids = tokenizer(text)["input_ids"]
            ids += [end] if ends and end is not None and ids[-1:] != [end] else []
            parts.append(np.array(ids, dtype=np.int32))
            have += len(ids)
            if have >= n_tokens:
                break
    n = min(have, max(n_tokens, o.seq_len)) // o.seq_len
    if n == 0:
        kind = "validation" if is_val else "training"
        raise UsageError(f"{o.text}: {have} tokens for {kind}, fewer than --seq_len={o.seq_len}")
    windows = torch.from_numpy(np.concatenate(parts)[: n * o.seq_len]).view(n, o.seq_len)
    if (most := int(windows.max())) >= config.vocab_size:
        raise UsageError(f"the tokenizer gives token {most}, beyond the model's vocabulary of {config.vocab_size}")
    return windows


# -----------------------------------------------------------------------------
# Command line


@dataclass
class Options:
    words: tuple = option((), "sort, train, eval or slice; MODEL; and OUT, unless it is eval")
    text: str = option("", "to measure, train or evaluate on: a file, a folder, or a dataset of prepare.py")
    seq_len: int = option(512, "tokens of a sequence", least=2)
    batch_size: int = option(8, "sequences at once; recipe mose runs each twice", least=1)
    sort_tokens: int = option(65536, "to measure activations on, for sorting", least=1)
    width: str = option("", "for slice one number, for eval several (default 1,0.75,0.5,0.25)")
    budget: str = option("", "for eval: mean widths that the router's confidence splits, such as 0.5,0.25")
    gamma: float = option(1.0, "for those: how strongly confidence counts", least=0)
    eval_tokens: int = option(262144, "to evaluate on", least=1)
    recipe: str = option("serve", "how to train: " + "; ".join(f"{k}, {v}" for k, v in RECIPES.items()))
    sort: bool = option(True, "sort before training")
    steps: int = option(1000, "optimizer steps", least=1)
    accumulate: int = option(1, "micro-batches of batch_size in a step", least=1)
    learning_rate: float = option(1e-4, "peak, after warming up for a twentieth of the steps; a cosine", least=1e-12)
    bias_rate: float = option(1e-3, "step of the biases that balance DeepSeek-V3's experts; 0 leaves them", least=0)
    seed: int = option(0, "of the order of text, and of widths", least=0, most=2**32 - 1)
    trainer: str = option("{}", "more arguments of transformers' Trainer, as JSON")
    resume: bool = option(False, "the same command again, to go on from its last checkpoint")
    device: str = option("", "to sort or evaluate on; default cuda if there is one, else cpu")
    dry_run: bool = option(False, "say what it needs, from the config alone")


def numbers(o, name, default=""):
    """Option --name, "1,0.5" -> [1.0, 0.5], each a width."""
    text = getattr(o, name) or default
    try:
        values = [float(part) for part in text.split(",") if part]
    except ValueError as e:
        raise UsageError(f"--{name} must be numbers with commas between, not {text!r}") from e
    for value in values:
        check_width(value, f"--{name}")
    return values


def run_sort(o, folder, config, out):
    windows = read_windows(o, folder, config, o.sort_tokens, False).split(o.batch_size) if o.text else ()
    model = load(folder, o.device)
    sort_neurons(model, windows)
    save(model, out, folder)


def run_slice(o, folder, config, out):
    if len(numbers(o, "width")) != 1:
        raise UsageError("slice needs one --width, above 0 and at most 1")
    save(slice_experts(load(folder, "cpu"), *numbers(o, "width")), out, folder)


def run_train(o, folder, config, out):
    work, world = out.with_name(f"{out.name}.training"), int(os.environ.get("WORLD_SIZE", 1))
    whole = [f for f in work.glob("checkpoint-*") if (f / "trainer_state.json").is_file()]  # which is written last
    last = max(whole, key=lambda f: int(f.name.split("-")[1]), default=None)
    if o.recipe not in RECIPES:
        raise UsageError(f"--recipe must be one of {', '.join(RECIPES)}, not {o.recipe!r}")
    if bool(last) != o.resume:
        raise UsageError(f"{work} holds {'a stopped training: add --resume' if last else 'no checkpoint to resume'}")
    try:
        arguments = transformers.TrainingArguments(**{**dict(
            output_dir=str(work), max_steps=o.steps, per_device_train_batch_size=o.batch_size, seed=o.seed,
            gradient_accumulation_steps=o.accumulate, learning_rate=o.learning_rate, lr_scheduler_type="cosine",
            warmup_steps=o.steps // 20, weight_decay=0.1, logging_steps=10, save_steps=max(1, o.steps // 10),
            save_total_limit=1, bf16=torch.cuda.is_available(), use_cpu=not torch.accelerator.is_available(),
            report_to="none",
        ), **json.loads(o.trainer)})  # fmt: skip
    except (TypeError, ValueError) as e:
        raise UsageError(f"--trainer: {first_line(e)}") from e
    if arguments.n_gpu > 1:
        raise UsageError("several GPUs need `accelerate launch adapt.py train ...`")
    windows = read_windows(o, folder, config, o.steps * o.accumulate * o.batch_size * world * o.seq_len, False)
    # the Trainer restores the rest of a checkpoint, but not experts that have other names in files than in memory
    model = load(last if last and any(last.glob("*.safetensors")) else folder, "cpu")
    if o.sort and not last:
        sort_neurons(model, windows[: max(1, o.sort_tokens // o.seq_len)].split(o.batch_size))
    model.float()  # what AdamW needs; products are in bfloat16 where there is CUDA
    # then the model adds its balancing loss
    model.config.output_router_logits = bool(getattr(config, "router_aux_loss_coef", 0))
    collate = lambda rows: dict.fromkeys(("input_ids", "labels"), torch.stack([row for (row,) in rows]).long())
    data = torch.utils.data.TensorDataset(windows)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, data_collator=collate)
    widths = train_widths(model, o.recipe, o.seed, int(last.name.split("-")[1]) if last else 0, o.bias_rate)
    try:
        trainer.train(resume_from_checkpoint=last and str(last))
    except (safetensors.SafetensorError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not any(w in str(e) for w in ("inline_container", "iostream")):
            raise  # not by torch.save
        raise UsageError(f"{work} could not be written ({first_line(e)}): make room and --resume") from e
    finally:
        widths.remove()
    state = trainer.accelerator.get_state_dict(trainer.model)  # gathered, if FSDP has split it
    if trainer.is_world_process_zero():
        model.config.output_router_logits = getattr(config, "output_router_logits", False)
        for p in model.parameters():
            p.data = p.data.to(config.dtype or p.dtype)
        mine = dict(model.named_parameters())
        save(model, out, folder, state_dict={n: v.to(mine[n].dtype) if n in mine else v for n, v in state.items()})
        trainer.state.save_to_json(str(out / "trainer_state.json"))
        shutil.rmtree(work)


def run_eval(o, folder, config, out):
    policies = {"width 1": 1.0}
    policies |= {f"width {w:g}": w for w in numbers(o, "width", "1,0.75,0.5,0.25")}
    policies |= {f"router {b:g}": RouterWidth(b, o.gamma) for b in numbers(o, "budget")}
    windows = read_windows(o, folder, config, o.eval_tokens, True)
    rows = evaluate(load(folder, o.device), windows, policies, o.batch_size)
    print("| | mean width | FLOPs per token | nats per token | change |\n|---|---|---|---|---|")
    for r in rows:
        change = f"{r['change']:+.4f} ± {r['error']:.4f}"
        print(f"| {r['policy']} | {r['mean_width']:.3f} | {r['flops_total']:.4g} | {r['loss']:.4f} | {change} |")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "eval.json", dict(text=o.text, tokens=windows.numel(), gamma=o.gamma, points=rows))
    curve = lambda kind: zip(*sorted((r["flops_total"], r["loss"]) for r in rows if r["policy"].startswith(kind)))
    curves = [("every expert at one width", *curve("width")), ("widths by the router", *curve("router"))]
    curves = curves[: 1 + bool(o.budget)]
    draw(out / "eval.png", [dict(curves=curves, xlabel="forward FLOPs per token", ylabel="validation nats per token")])
    print(f"{windows.numel():,} validation tokens; ± is of the paired difference. Written: {out}/eval.json, eval.png")


def dry_run(o, config, model):
    """What a model needs, from its config: parameters, bytes, FLOPs."""
    parts, total = slim_all(model).values(), sum(p.numel() for p in model.parameters())
    (fixed, experts), size = count_flops(config, o.seq_len), (config.dtype or torch.float32).itemsize
    print(f"{type(model).__name__}, {total:,} parameters: {total * size / 1e9:.1f} GB")
    print(f"trained: {total * 16 / 1e9:.1f} GB of weights, gradients and AdamW's moments in float32, and activations")
    print(f"| width | parameters | GB | FLOPs per token, of {o.seq_len} |\n|---|---|---|---|")
    for width in numbers(o, "width", "1,0.75,0.5,0.25"):
        left = total - sum(w.numel() // w.size(1) * (w.size(1) - cut(m, width)) for m in parts for w in neurons(m))
        print(f"| {width:g} | {left:,} | {left * size / 1e9:.2f} | {fixed + experts * width:.4g} |")


COMMANDS = {  # and the options that each takes
    "sort": (run_sort, "text seq_len batch_size sort_tokens device dry_run"),
    "train": (
        run_train,
        "text seq_len batch_size recipe steps accumulate learning_rate bias_rate sort sort_tokens seed trainer resume "
        "dry_run",
    ),
    "eval": (run_eval, "text seq_len batch_size width budget gamma eval_tokens device dry_run"),
    "slice": (run_slice, "width seq_len dry_run"),
}


def main(argv=None):
    _, o, given = parse(Options, __doc__, argv)
    command, *names = o.words or [""]
    if command not in COMMANDS or len(names) not in ((1,) if command == "eval" else (1, 2) if o.dry_run else (2,)):
        raise UsageError("it is adapt.py sort|train|slice MODEL OUT, or eval MODEL, and --options: see --help")
    function, takes = COMMANDS[command]
    if other := given - {"words", *takes.split()}:
        raise UsageError(f"{command} takes no --{min(other)}; its options: --{takes.replace(' ', ' --')}")
    out = Path(names[-1] if len(names) > 1 or Path(names[0]).is_dir() else f"out/{Path(names[0]).name}")
    if len(names) > 1 and out.exists():
        raise UsageError(f"{out} exists: choose another OUT, or remove it")
    if command in ("train", "eval") and not o.text and not o.dry_run:
        raise UsageError(f"{command} needs --text: a file, a folder, or a dataset of prepare.py")
    transformers.utils.logging.set_verbosity_error()
    folder, config, model = look(names[0], weights=not o.dry_run)
    if o.dry_run:
        dry_run(o, config, model)
    else:
        function(o, folder, config, out)


if __name__ == "__main__":
    run(main, "adapt.py")
