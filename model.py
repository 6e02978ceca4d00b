"""
MoSE: a GPT whose experts are slimmable. (Mixture of Slimmable Experts, arXiv 2602.06154)

An ordinary mixture-of-experts GPT in nanoGPT's layout, except that every expert can run at any prefix of
its hidden neurons, so one set of weights serves every compute budget:

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=256, vocab_size=320))
    logits, loss, aux = model(idx, targets)                               # every expert at full width
    logits, loss, aux = model(idx, targets, width=0.25)                   # the first quarter of every expert
    logits, loss, aux = model(idx, targets, width=RouterWidth(0.5, 1.0))  # half on average, confident experts wider

Read downwards: widths, config, experts and their dispatch, attention, the GPT, generation.
In shape comments B is the batch, T the sequence, d = n_embd, N = B*T tokens, k = top_k experts per token,
E = n_expert, H = the neurons of one expert, S = N*k slots (a slot is one token at one of its experts).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class UsageError(ValueError):
    """Bad input by the user. The command lines print it as one line and exit with status 2."""


# -----------------------------------------------------------------------------
# Widths: how much of every expert runs

GRID = 20  # widths chosen per token are multiples of 1/20, the paper's grid of 0.05: level l is width l / GRID


def check_width(width, name="width"):
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width <= 1:
        raise UsageError(f"{name} must be a number above 0 and at most 1, not {width!r}")


def width_to_neurons(width, n_hidden):
    """The neurons that run at `width` in (0, 1]: the multiple of 8 nearest to width * n_hidden, at least 8.

    Multiples of 8 keep the rows of bf16 activations (n, h) on the 16-byte boundaries that grouped GEMM kernels need.
    """
    check_width(width)
    if n_hidden < 8 or n_hidden % 8:
        raise UsageError(f"expert_hidden must be a positive multiple of 8, not {n_hidden}")
    return max(8, 8 * round(width * n_hidden / 8))


class RouterWidth:
    """Width policy: split each token's budget over its experts by the router's confidence.

    budget: mean width over a token's selected experts, at most 1; the k of them share k * budget.
    gamma: how strongly confidence counts: s_e = p_e^gamma / sum p^gamma is an expert's share. 0 is uniform width; a
        large gamma at budget 1/k runs only the likeliest expert (with the weight that it has among the k).

    Both can be tensors (N, 1), one value per token: then they are not checked. If one requires grad, it is being
    learned (see `calibrate` in bench.py), and widths are continuous, off the grid.

    Any object with a method `widths(probs) -> (N, k) multiples of 1/20 in [0, 1]` can stand in its place. If it has an
    attribute `budget`, that is the width of shared experts (else 1); if it has a true attribute `renormalize`, the
    experts that it leaves (width above 0) are weighted as if they had been selected alone.
    """

    def __init__(self, budget, gamma=1.0):
        if not torch.is_tensor(budget):
            check_width(budget, "budget")
            if budget < 1 / GRID:
                raise UsageError(f"budget must be at least {1 / GRID}, one step of the width grid, not {budget}")
        if not torch.is_tensor(gamma) and not 0 <= gamma <= 1e6:
            raise UsageError(f"gamma must be a number from 0 to 1e6, not {gamma!r}")
        self.budget, self.gamma = budget, gamma

    def widths(self, probs):
        """(N, k) probabilities of the selected experts -> (N, k) widths on the grid; 0 skips the expert.

        No width exceeds 1. What one expert cannot use goes to the token's other experts in proportion to their
        shares, so the mean width is the budget, up to rounding (at most half a grid step).
        """
        k = probs.size(-1)
        score = self.gamma * probs.clamp_min(1e-30).log()  # p^gamma, kept as a logarithm so that it cannot underflow
        width = k * self.budget * score.softmax(-1)
        for _ in range(k - 1):  # each round fills at least one more expert, or changes nothing
            full = width >= 1
            left = k * self.budget - full.sum(-1, keepdim=True)
            others = score.masked_fill(full, torch.finfo(score.dtype).min)  # not -inf: if all are full, softmax is NaN
            width = torch.where(full, 1.0, left * others.softmax(-1))
        width = width.clamp(0, 1)  # float round-off
        return width if width.requires_grad else (width * GRID).round() / GRID


# -----------------------------------------------------------------------------
# Config


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    n_expert: int = 8  # 1 makes a plain dense GPT
    top_k: int = 2
    n_shared: int = 0  # experts that every token visits besides its top_k
    expert_hidden: int | None = None  # neurons of one expert; None means 4 * n_embd
    moe_every: int = 2  # blocks 0, moe_every, 2 * moe_every, ... hold experts, the others a dense MLP
    dropout: float = 0.0
    balance_coef: float = 0.01  # weight of the load-balancing loss
    z_coef: float = 0.001  # weight of the router's z-loss
    bias_rate: float = 0.0  # loss-free balancing (DeepSeek-V3): the step of a bias that steers selection only
    norm_topk_prob: bool = True  # renormalise the selected experts' probabilities; not for top_k=1: always 1

    def __post_init__(self):
        if self.expert_hidden is None:
            self.expert_hidden = 4 * self.n_embd
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_expert", "top_k", "moe_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise UsageError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
        width_to_neurons(1.0, self.expert_hidden)  # refuses what is not a multiple of 8
        if self.n_expert > 1 and self.n_embd % 8:
            raise UsageError(f"n_embd must be a multiple of 8 for grouped matrix products, not {self.n_embd}")
        if self.n_expert > 1 and self.top_k > self.n_expert:
            raise UsageError(f"top_k {self.top_k} must be at most n_expert {self.n_expert}")
        if self.n_shared < 0 or (self.n_shared and self.n_expert == 1):
            raise UsageError(f"n_shared must be at least 0, and 0 in a dense model, not {self.n_shared}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, not {self.dropout}")

    def is_moe(self, layer):
        return self.n_expert > 1 and layer % self.moe_every == 0

    def dense_hidden(self, layer):
        """Hidden neurons of a dense MLP. In a dense model, blocks that would hold experts use expert_hidden."""
        return self.expert_hidden if layer % self.moe_every == 0 else 4 * self.n_embd


# -----------------------------------------------------------------------------
# Slimmable experts
#
# Slots are sorted, then processed in chunks, each at one width: one pair of grouped matrix products over all experts.
# With one width for all there is one chunk. With a width per slot, chunks collect the slots of similar width.

MAX_CHUNKS = 6  # router widths at budget 0.5 take 1.2 to 1.3 times as long as uniform 0.5; with a chunk per width, 1.8


def grouped_mm(a, b, ends):
    """Multiply rows ends[e-1]:ends[e] of a (S, K) by b[e] of b (E, K, M), for every e. Returns (S, M).

    b may be a slice of a larger stack: nothing is copied.
    """
    if a.dtype == torch.float64 or a.device.type not in ("cpu", "cuda"):  # no kernel for these: one product per group
        return torch.cat([rows @ w for rows, w in zip(a.tensor_split(ends[:-1].tolist()), b)])
    if torch.compiler.is_compiling() and a.dtype != torch.bfloat16:
        return opaque_grouped_mm(a, b, ends)
    return F.grouped_mm(a, b, offs=ends)


# torch.compile traces F.grouped_mm in bfloat16 only. This is the same product as an operator that it does not trace.
@torch.library.custom_op("mose::grouped_mm", mutates_args=())
def opaque_grouped_mm(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return F.grouped_mm(a, b, offs=ends)


@opaque_grouped_mm.register_fake
def _(a, b, ends):  # two matrices: groups of columns of a times groups of rows of b, as the gradient of b needs
    return a.new_empty((a.size(0), b.size(2)) if b.dim() == 3 else (ends.size(0), a.size(0), b.size(1)))


def opaque_backward(ctx, grad):
    a, b, ends = ctx.saved_tensors
    return opaque_grouped_mm(grad, b.mT, ends), opaque_grouped_mm(a.mT, grad, ends), None


opaque_grouped_mm.register_autograd(
    opaque_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def plan_chunks(level):
    """Decide which slots are processed together, from their width levels (N, k), each from 0 to GRID.

    A chunk's product for one expert is slow when it has few rows. So scarce levels wait for the next wider ones until
    1/MAX_CHUNKS of the slots are together, and the chunk runs at the widest of its levels; what the others run too
    much is zeroed. If 2% of the slots have level 3, 5% level 4 and 30% level 9, all of them are one chunk at level 9.
    Chunk 0 is level 0: the skipped slots.
    Returns the chunk of each slot (N, k), and lists of each chunk's number of slots and level, in ascending order.
    """
    # the host learns the counts here; it is the only place where per-token widths wait for the device
    counts = (level.reshape(-1, 1) == torch.arange(GRID + 1, device=level.device)).sum(0).tolist()
    chunk_of, sizes, levels = [0] * (GRID + 1), counts[:1], [0]
    for l in range(1, GRID + 1):
        if counts[l]:
            if len(sizes) == 1 or sizes[-1] * MAX_CHUNKS >= level.numel():  # the open chunk is large enough
                sizes.append(0)
                levels.append(0)
            chunk_of[l] = len(sizes) - 1
            sizes[-1] += counts[l]
            levels[-1] = l
    return torch.tensor(chunk_of, device=level.device)[level], sizes, levels


def dispatch(x, expert, weight, n_expert, mlp, chunk, sizes):
    """Take every token to its experts and add up what they return, weighted. No token is dropped, none is padded.

    x: (N, d) tokens
    expert, weight: (N, k), the experts of each token and what their outputs count
    chunk, sizes: the chunk of each slot (N, k) and the slots of each chunk, as plan_chunks returns; None for one chunk
    mlp(rows, ends, c, slot) -> (n, d): the experts, for chunk c. rows (n, d) are sorted by expert, expert e owns
        rows[ends[e-1]:ends[e]], and row i is slot[i], an index into expert.flatten().
    Returns (N, d).
    """
    N, k = expert.shape
    key, slot = (chunk * n_expert + expert).flatten().sort(stable=True)
    groups = torch.arange(len(sizes) * n_expert, device=x.device)
    ends = torch.searchsorted(key, groups, right=True, out_int32=True).view(len(sizes), n_expert)
    rows = x.index_select(0, slot // k)  # (S, d), every token k times
    ys, start = [], 0
    for c, size in enumerate(sizes):
        if size:
            part = slice(start, start + size)
            ys.append(mlp(rows[part], ends[c] - start, c, slot[part]))  # ends count from the chunk's first row
            start += size
    ys = torch.cat(ys) if len(ys) > 1 else ys[0]
    back = torch.empty_like(slot).scatter_(0, slot, torch.arange(N * k, device=x.device))  # undoes the sort
    ys = ys.index_select(0, back).view(N, k, -1)
    return torch.bmm(weight.unsqueeze(1), ys).squeeze(1)  # (N, 1, k) @ (N, k, d)


class SlimmableMoE(nn.Module):
    """Top-k mixture of experts, each of which runs at a prefix of its neurons.

    Expert e at h neurons is w_out[e, :h].T @ gelu(w_in[e, :h] @ x): narrow experts are inside the wide ones.
    """

    def __init__(self, config):
        super().__init__()
        E, H, d = config.n_expert, config.expert_hidden, config.n_embd
        self.top_k, self.n_shared, self.norm_topk_prob = config.top_k, config.n_shared, config.norm_topk_prob
        self.balance_coef, self.z_coef, self.split_batch = config.balance_coef, config.z_coef, False
        self.router = nn.Linear(d, E, bias=False)
        self.register_buffer("bias", torch.zeros(E), persistent=config.bias_rate > 0)  # updated by train.py
        stack = (E + config.n_shared, H, d)  # shared experts come last
        self.w_in = nn.Parameter(0.02 * torch.randn(stack))  # row j is the input vector of neuron j ...
        self.w_out = nn.Parameter(0.02 * torch.randn(stack))  # ... and its output vector: a width is a prefix of both
        self.level_neurons = [0] + [width_to_neurons(level / GRID, H) for level in range(1, GRID + 1)]
        for name, size in dict(load=E, tokens=(), neurons_used=(), neurons_run=()).items():  # see GPT.read_stats
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64), persistent=False)

    def forward(self, x, width=1.0, losses=True):
        """x (..., d) -> y (..., d) and the weighted router losses, a scalar (0 without `losses`: decoding needs none).

        width: in (0, 1], or a width policy; or an int above 1, a number of neurons, as GPT gives it: torch.compile can
        make an int a variable of its graph, but would compile anew for every float.
        """
        if isinstance(width, int) and width > 1:
            return self.run(x, width, None, losses)
        if hasattr(width, "widths"):
            return self.run_policy(x, None, width, losses)
        return self.run(x, width_to_neurons(width, self.w_in.size(1)), None, losses)

    @torch.compiler.disable  # with a width per token, the sizes of the products are new every time
    def run_policy(self, *args):
        return self.run(*args)

    def run(self, x, neurons, policy, losses):
        shape, x = x.shape, x.reshape(-1, x.size(-1))  # (N, d)
        with torch.autocast(x.device.type, enabled=False):  # routing decisions are worth float32
            router_logits = F.linear(x.float(), self.router.weight.float())
        probs = router_logits.softmax(-1)  # (N, E)
        expert = (probs + self.bias).topk(self.top_k).indices  # (N, k)
        top_p = probs.gather(-1, expert)
        widths = None if policy is None else policy.widths(top_p.detach())  # (N, k)
        if getattr(policy, "renormalize", False):
            top_p = top_p * (widths > 0)
        weight = top_p / top_p.sum(-1, keepdim=True).clamp_min(1e-30) if self.norm_topk_prob else top_p
        load = torch.zeros_like(self.load).scatter_add_(0, expert.flatten(), torch.ones_like(expert.flatten()))
        self.load += load
        self.tokens += len(x)
        aux = torch.zeros((), device=x.device)
        if losses:  # balance (Switch): E * sum_e (share of slots) * (mean probability), 1 when even; z-loss (ST-MoE)
            share = load / expert.numel()
            if self.split_batch and self.training:  # the rest of the batch is in other processes
                torch.distributed.all_reduce(share)
                share = share / share.sum()
            balance = probs.size(1) * (share * probs.mean(0)).sum()
            aux = self.balance_coef * balance + self.z_coef * router_logits.logsumexp(-1).square().mean()

        if self.n_shared:
            shared = torch.arange(probs.size(1), len(self.w_in), device=x.device).expand(len(x), -1)
            expert, weight = torch.cat([expert, shared], 1), torch.cat([weight, torch.ones_like(shared)], 1)
            if widths is not None:
                budget = torch.ones_like(shared, dtype=widths.dtype) * getattr(policy, "budget", 1.0)
                widths = torch.cat([widths, budget], 1)
        level = mask = None
        if widths is not None and widths.requires_grad:  # being learned: all neurons run, and count more or less
            neurons, mask = self.w_in.size(1), self.soft_mask(widths)
        elif widths is not None:
            level = (widths * GRID).round().nan_to_num().long()  # (N, k); a NaN shows in the loss, not here

        # grouped_mm is unknown to autocast: cast here
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        decoding = expert.numel() <= 4 and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        experts = self.run_slots if decoding and x.device.type == "cpu" else self.run_chunks
        y = experts(x.to(dtype), expert, weight.to(dtype), neurons, level, mask)
        return y.view(shape), aux

    def run_chunks(self, x, expert, weight, neurons, level, mask):
        """The experts' weighted outputs (N, d), at one number of neurons or at the width levels (N, k) of the slots."""
        chunk, sizes, limit = 0, [expert.numel()], None
        if level is None:
            neurons = [neurons]  # of every chunk: there is one
            self.neurons_used += expert.numel() * neurons[0]
        else:
            chunk, sizes, levels = plan_chunks(level)
            neurons = [self.level_neurons[l] for l in levels]
            limit = torch.tensor(self.level_neurons, device=x.device)[level].view(-1, 1)  # (S, 1) neurons
            self.neurons_used += limit.sum()
        w_in, w_out = (w[:, : neurons[-1]].to(x.dtype) for w in (self.w_in, self.w_out))  # the last chunk is the widest

        def mlp(rows, ends, c, slot):
            h = neurons[c]
            if h == 0:  # skipped slots
                return torch.zeros_like(rows)
            self.neurons_run += len(rows) * h
            a = F.gelu(grouped_mm(rows, w_in[:, :h].mT, ends))
            if mask is not None:
                a = a * mask[slot].to(a.dtype)
            if limit is not None:
                sure = neurons[c - 1]  # the chunk before (0 is the skipped) is no wider than any slot
                a[:, sure:].masked_fill_(torch.arange(sure, h, device=a.device) >= limit[slot], 0)
            return grouped_mm(a, w_out[:, :h], ends)

        return dispatch(x, expert, weight, self.w_in.size(0), mlp, chunk, sizes)

    def run_slots(self, x, expert, weight, neurons, level, mask):
        """The same for the few slots of decoding on a CPU, without sorting: a token takes 5 to 30% less time."""
        slots = expert.flatten().tolist()
        limits = [neurons] * len(slots) if level is None else [self.level_neurons[l] for l in level.flatten().tolist()]
        ys = x.new_zeros(len(slots), x.size(1))
        for i, (e, h) in enumerate(zip(slots, limits)):
            if h:
                n = i // expert.size(1)
                a = F.gelu(F.linear(x[n : n + 1], self.w_in[e, :h].to(x.dtype)))
                torch.mm(a, self.w_out[e, :h].to(x.dtype), out=ys[i : i + 1])
        self.neurons_used += sum(limits)
        self.neurons_run += sum(limits)
        return torch.bmm(weight.unsqueeze(1), ys.view(*expert.shape, -1)).squeeze(1)

    def soft_mask(self, widths):
        """Continuous widths (N, k) -> what each neuron of each slot counts, (S, H), for learning widths by gradient.

        Neurons join in blocks, one per grid step. A width between two grid points fades the block between them in
        linearly, so the output is exact on the grid, piecewise linear in between, and has a true gradient.
        """
        neuron = torch.arange(self.w_in.size(1), device=widths.device)
        block = torch.bucketize(neuron, torch.tensor(self.level_neurons, device=widths.device), right=True) - 1
        return (widths.flatten().unsqueeze(1) * GRID - block).clamp(0, 1)


# -----------------------------------------------------------------------------
# The rest of the transformer


class KVCache:
    """Keys and values of the tokens seen so far: (n_layer, 2, B, n_head, block_size, head size), allocated once.

    `length` of them are filled. GPT.forward advances it, once all layers have extended theirs.
    """

    def __init__(self, config):
        self.n_layer, self.size, self.length, self.kv = config.n_layer, config.block_size, 0, None

    def extend(self, layer, kv):
        """Store the new tokens' keys and values (2, B, n_head, T, head size); return those of all tokens so far."""
        if self.kv is None:
            self.kv = kv.new_empty(self.n_layer, *kv.shape[:3], self.size, kv.size(4))
        stop = self.length + kv.size(3)
        self.kv[layer, :, :, :, self.length : stop] = kv
        return self.kv[layer, :, :, :, :stop]


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, d = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4)
        (q, k, v), dtype, mask = qkv, qkv.dtype, None  # q, k, v: (B, n_head, T, head size)
        if cache is not None:
            if x.device.type == "cpu":  # in bfloat16, attention of a single query takes six times as long there
                qkv = qkv.float()
            q, (k, v) = qkv[0], cache.extend(self.layer, qkv[1:])
            seen = k.size(2)
            if 1 < T < seen:  # the T new tokens see all old ones, and each other causally
                mask = torch.ones(T, seen, dtype=torch.bool, device=x.device).tril(seen - T)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, dropout_p=self.dropout if self.training else 0.0
        )
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, d).to(dtype)))


class MLP(nn.Module):
    def __init__(self, n_embd, n_hidden):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, n_hidden, bias=False)
        self.c_proj = nn.Linear(n_hidden, n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.moe = config.is_moe(layer)
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = SlimmableMoE(config) if self.moe else MLP(config.n_embd, config.dense_hidden(layer))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, neurons, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        h = self.ln_2(x)
        y, aux = self.mlp(h, neurons, cache is None) if self.moe else (self.mlp(h), 0.0)
        return x + self.dropout(y), aux


def cross_entropy(logits, targets):
    """Mean cross-entropy of logits (N, vocab_size) against targets (N,), of which -1 is ignored, in nats.

    In pieces that the backward pass computes again: a softmax in float32 for every token at once would take three times
    the memory of the logits, and with GPT-2's vocabulary, on a CPU, most of the training step's time.
    """

    def summed(logits, targets):
        return F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="sum")

    n = max(2**22 // logits.size(-1), -(-len(logits) // 32))  # at least 4M logits at once, at most 32 pieces
    pieces = zip(logits.split(n), targets.split(n))
    if torch.compiler.is_compiling():  # fuses it all
        total = summed(logits, targets)
    else:
        total = sum(checkpoint(summed, *piece, use_reentrant=False) for piece in pieces)
    return total / (targets >= 0).sum()


class GPT(nn.Module):
    """Parameter names are nanoGPT's, so its checkpoints without biases load into a dense model (n_expert=1)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, bias=False),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied, as in GPT-2
        std = 0.02 * math.sqrt(768 / config.n_embd)  # GPT-2's 0.02 at its width of 768
        for name, p in self.named_parameters():
            if p.dim() > 1:
                # what writes to the residual stream starts smaller the deeper the model, as in GPT-2
                residual = name.endswith(("c_proj.weight", "w_out"))
                nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer) if residual else std)

    def forward(self, idx, targets=None, width=1.0, cache=None):
        """
        idx, targets: (B, T) int64; a target of -1 is ignored
        width: of all experts, in (0, 1], or a width policy such as RouterWidth
        cache: a KVCache holding the tokens before idx; then only the last position's logits are computed
        Returns logits (B, T, vocab_size) or (B, 1, vocab_size), the mean cross-entropy in nats (None without
        targets), and aux, the weighted router losses summed over layers: train on loss + aux, report loss.
        """
        B, T = idx.shape
        start = cache.length if cache is not None else 0
        if T == 0 or start + T > self.config.block_size:
            raise UsageError(f"{start + T} tokens do not fit the context, 1 to block_size = {self.config.block_size}")
        if cache is not None and targets is not None:
            raise UsageError("a cache is for generation, which has no targets: give one or the other")
        if self.config.n_expert == 1 and width != 1:
            raise UsageError("a dense model (n_expert=1) has no experts to slim: width must be 1")
        neurons = width if hasattr(width, "widths") else width_to_neurons(width, self.config.expert_hidden)
        return self.body(idx, targets, neurons, cache)

    def body(self, idx, targets, neurons, cache):
        """`forward` after its checks: what `train.py --compile` compiles."""
        start = cache.length if cache is not None else 0
        pos = torch.arange(start, start + idx.size(1), device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))  # (B, T, d)
        aux = torch.zeros((), device=idx.device)
        for block in self.transformer.h:
            x, block_aux = block(x, neurons, cache)
            aux = aux + block_aux
        if cache is not None:
            cache.length += idx.size(1)
            x = x[:, -1:]
        logits = self.lm_head(self.transformer.ln_f(x))
        loss = None if targets is None else cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss, aux

    def num_params(self):
        """All parameters, and those that one token uses at full width."""
        total = sum(p.numel() for p in self.parameters())
        c = self.config
        idle = (c.n_expert - c.top_k) * 2 * c.n_embd * c.expert_hidden
        return total, total - sum(idle for layer in range(c.n_layer) if c.is_moe(layer))

    def flops_per_token(self, width=1.0, seq_len=None):
        """Forward FLOPs per token at a mean expert width, in a sequence of seq_len (block_size if None).

        2 per multiply-add, counting what the matrix units do: projections, attention scores, router, dense MLPs,
        the expert neurons that run, and the head. Norms, softmaxes, activations and embeddings are left out.
        Attention counts every position of the sequence, as torch.utils.flop_counter does, though causality halves it.
        Returns (total, the experts' part). Training costs three times as much.
        """
        c, d = self.config, self.config.n_embd
        T = c.block_size if seq_len is None else seq_len
        total, expert = 2 * d * c.vocab_size, 0.0  # head
        for layer in range(c.n_layer):
            total += 2 * d * 3 * d + 2 * d * d  # c_attn, attn.c_proj
            total += 4 * d * T  # q @ k, att @ v
            if c.is_moe(layer):
                total += 2 * d * c.n_expert  # router
                expert += (c.top_k + c.n_shared) * 4 * d * width * c.expert_hidden  # w_in, w_out
            else:
                total += 4 * d * c.dense_hidden(layer)  # c_fc, c_proj
        return total + expert, expert

    def read_stats(self):
        """What the MoE layers did since the last call: (mean width, mean width run, slots of each expert (layers, E)).

        Both are measured, as shares of all neurons of the top_k + n_shared experts of all tokens. The mean width is
        what the policy used; what ran is a little more, because plan_chunks lets scarce widths run with wider ones:
        count FLOPs from that. (Neither means anything while gamma is learned.) A dense model gives Nones.
        """
        moes = [block.mlp for block in self.transformer.h if block.moe]
        if not moes:
            return None, None, None
        totals = []
        for name in ("load", "tokens", "neurons_used", "neurons_run"):
            counters = [getattr(moe, name) for moe in moes]
            totals.append(torch.stack(counters).cpu())
            for counter in counters:
                counter.zero_()
        load, tokens, used, run = totals
        c = self.config
        possible = max(1, tokens.sum().item() * (c.top_k + c.n_shared) * c.expert_hidden)
        return used.sum().item() / possible, run.sum().item() / possible, load

    @torch.no_grad()
    def stream(self, idx, num_tokens, temperature=1.0, top_k=None, width=1.0, n_vocab=None, generator=None):
        """Continue idx (B, T) token by token, yielding (B, 1) each time.

        temperature 0 takes the likeliest token; top_k samples from the k likeliest only; ids from n_vocab on (the
        padding of the vocabulary) are never sampled. When the context is full its older half is forgotten and the
        rest read again, so the cost of a token is bounded, however many are generated.
        """
        cache, new = KVCache(self.config), idx
        for _ in range(num_tokens):
            if cache.length == self.config.block_size:
                cache, new = KVCache(self.config), idx[:, -max(1, self.config.block_size // 2) :]
            logits = self(new, width=width, cache=cache)[0][:, -1, :n_vocab].float()  # (B, n_vocab)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    top = logits.topk(min(top_k, logits.size(-1)))  # by index: in bfloat16 many are equal
                    logits = torch.full_like(logits, -math.inf).scatter(1, top.indices, top.values)
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            idx = torch.cat([idx, new], dim=1)[:, -self.config.block_size :]
            yield new

    def generate(self, idx, num_tokens, **kwargs):
        """`stream`, all at once: (B, T) -> (B, T + num_tokens)."""
        return torch.cat([idx, *self.stream(idx, num_tokens, **kwargs)], dim=1)
