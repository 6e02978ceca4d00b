"""
MoSE: a GPT whose experts are slimmable. (Mixture of Slimmable Experts, arXiv 2602.06154)

An ordinary mixture-of-experts GPT in nanoGPT's layout, except that every expert can run at any prefix of
its hidden neurons, so one set of weights serves every compute budget:

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=256, vocab_size=320))
    logits, loss, aux = model(idx, targets)                               # every expert at full width
    logits, loss, aux = model(idx, targets, width=0.25)                   # the first quarter of every expert
    logits, loss, aux = model(idx, targets, width=RouterWidth(0.5, 1.0))  # half on average, confident experts wider
    logits, loss, aux = model(idx, targets, width=FewerExperts(0.5))      # half of the likeliest expert, no other

Read downwards: widths and policies, config, experts, the MoE layer, the rest of the transformer, the GPT, generation.
In shape comments B is the batch, T the sequence, d = n_embd, N = B*T tokens, k = top_k experts per token,
E = n_expert, H = the neurons of one expert, S = N*k slots (a slot is one token at one of its experts).
"""

import functools
import math
import numbers
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class UsageError(ValueError):
    """Bad input by the user. The command lines print it as one line and exit with status 2."""


# -----------------------------------------------------------------------------
# Widths: how much of every expert runs
#
# A width is a number in (0, 1], the same for all experts, or a policy: any object with
#     widths(probs): the probabilities (N, k) of the selected experts -> their widths (N, k), multiples of 1 / GRID from
#         0, which skips the expert, to 1 (off the grid if they require grad: see `calibrate` in bench.py)
# and, if it likes,
#     at(layer): the number or policy of block `layer`; without it, the policy itself is every block's
#     budget: the width of shared experts; without it, 1
#     renormalize = True: the experts that still run are weighted as if only they had been selected

GRID = 20  # widths chosen per token are multiples of 1/20, the paper's grid of 0.05: level l is width l / GRID


def is_policy(width):
    return hasattr(width, "widths") or hasattr(width, "at")


def check_width(width, name="width"):
    if isinstance(width, bool) or not isinstance(width, numbers.Real) or not 0 < width <= 1:
        raise UsageError(f"{name} must be a number above 0 and at most 1, not {width!r}")


def width_to_neurons(width, n_hidden):
    """The neurons that run at `width` in (0, 1]: the multiple of 8 nearest to width * n_hidden, at least 8.

    Multiples of 8 keep the rows of bf16 activations (n, h) on the 16-byte boundaries that grouped GEMM kernels need.
    """
    check_width(width)
    if n_hidden < 8 or n_hidden % 8:
        raise UsageError(f"expert_hidden must be a positive multiple of 8, not {n_hidden}")
    return max(8, 8 * round(float(width) * n_hidden / 8))


class RouterWidth:
    """Width policy: split each token's budget over its experts by the router's confidence.

    budget: mean width over a token's k selected experts, at most 1; they share k * budget
    gamma: how strongly confidence counts: s_e = p_e^gamma / sum p^gamma is an expert's share. 0 is uniform width; a
        large gamma at budget 1/k runs only the likeliest expert (with the weight that it has among the k)
    Both can be tensors (N, 1), a value per token, or require grad, to be learned; then they are not checked.
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
        """No width exceeds 1. What one expert cannot use goes to the token's other experts in proportion to their
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


class FewerExperts:
    """Width policy: the likeliest experts first. n = 1 runs the likeliest one of the selected experts whole and the
    others not at all, n = 1.5 half of the second besides, n = 0.5 half of the likeliest.

    n: experts that run, at least one step of the width grid; a tensor (N, 1) gives every token its own, unchecked.
        Shared experts are as wide as the likeliest one. (Of many, one that runs in part may cost as much as a whole
        one: see `plan_chunks`)
    """

    renormalize = True

    def __init__(self, n):
        if not torch.is_tensor(n) and (isinstance(n, bool) or not isinstance(n, numbers.Real) or not n >= 1 / GRID):
            raise UsageError(f"experts must be a number of at least {1 / GRID}, one step of the width grid, not {n!r}")
        self.n, self.budget = n, n.clamp(max=1) if torch.is_tensor(n) else min(n, 1)

    def widths(self, probs):
        width = (self.n - torch.arange(probs.size(-1), device=probs.device)).clamp(0, 1)
        return ((width * GRID).round() / GRID).to(probs.dtype).expand(probs.shape)


class PerLayer:
    """Width policy: policies[layer], numbers or policies, for every block."""

    def __init__(self, policies):
        self.policies = policies

    def at(self, layer):
        return self.policies[layer]


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
    expert_hidden: int | None = None  # neurons of one expert, None means 4 * n_embd; in a dense GPT, of those blocks
    moe_every: int = 2  # blocks 0, moe_every, 2 * moe_every, ... hold experts, the others a dense MLP
    dropout: float = 0.0
    balance_coef: float = 0.01  # weight of the load-balancing loss
    z_coef: float = 0.001  # weight of the router's z-loss
    bias_rate: float = 0.0  # loss-free balancing (DeepSeek-V3): the step of a bias that steers selection only
    norm_topk_prob: bool = True  # renormalise the selected experts' probabilities; not for top_k=1: always 1

    def __post_init__(self):
        self.expert_hidden = self.expert_hidden or 4 * self.n_embd
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
# Slimmable experts: tokens, their experts, weights and widths in, outputs out. Nothing here knows a router.

MATRICES = 2  # of an expert: parameters and FLOPs are counted by it


def gelu_mlp(rows, ends, keep, w_in, w_out):
    """The expert itself: the one place to change it. Row j of each matrix belongs to neuron j.

    rows, ends: (n, d) grouped by expert, see `grouped_mm`; in dense blocks ends is None
    keep: (n, h), a factor from 0 to 1 for each neuron of each row; None if all are 1
    w_in, w_out: (E, h, d), cut to the h neurons that run; (h, d) in dense blocks
    """
    a = F.gelu(grouped_mm(rows, w_in.mT, ends))  # (n, h)
    return grouped_mm(a if keep is None else a * keep, w_out, ends)  # (n, d)


def grouped_mm(a, b, ends):
    """Multiply rows ends[e-1]:ends[e] of a (n, K) by b[e] of b (E, K, M), for every e; all of a by b (K, M) if ends is
    None. Returns (n, M). b may be a slice of a larger stack: nothing is copied.
    """
    if ends is None:
        return a @ b
    if a.dtype == torch.float64 or a.device.type not in ("cpu", "cuda"):  # no kernel for these: one product per group
        return torch.cat([rows @ w for rows, w in zip(a.tensor_split(ends[:-1].tolist()), b)])
    return F.grouped_mm(a, b, offs=ends)


def run_experts(x, expert, weight, width, mlp, matrices, stats=None):
    """Take tokens x (N, d) through their experts (N, k) and add up the outputs times weight (N, k). Returns (N, d).

    width: the neurons that every slot runs, an int; or the width of each slot, (N, k), as a policy gives them
    mlp, matrices: the expert, as gelu_mlp; and its matrices (E, H, d), of which row j belongs to neuron j, so that a
        width is a prefix of the rows of all of them
    stats: a Stats, to which the neurons that run are added
    """
    E, H = matrices[0].shape[:2]
    chunk, sizes, neurons, mixed = 0, [expert.numel()], [width], [False]  # one width for all: one chunk
    table = joins = level = None
    if not isinstance(width, int):
        table, joins = level_table(H, x.device)
        level, neurons, mixed = width.float() * GRID, [H], [True]
        if not width.requires_grad:  # while widths are learned all neurons run, faded
            level = level.round().nan_to_num()  # of NaN probabilities: the loss will show them
            chunk, sizes, levels, mixed = plan_chunks(level)
            neurons = [table[l] for l in levels]
    if stats is not None:
        used = sizes[0] * width if level is None else torch.tensor(table, device=x.device)[level.long()].sum()
        stats.used += used
        stats.ran += sum(size * h for size, h in zip(sizes, neurons))
    matrices = [w[:, : neurons[-1]].to(x.dtype) for w in matrices]  # the last chunk is the widest

    def run(c, rows, ends, slot):
        h, keep = neurons[c], None
        if h == 0:  # skipped slots
            return torch.zeros_like(rows)
        if mixed[c]:  # 1 for a slot's own neurons, 0 beyond; between two levels a fraction
            keep = (level.view(-1, 1)[slot] - joins[:h]).clamp_(0, 1).to(x.dtype)
        return mlp(rows, ends, keep, *(w[:, :h] for w in matrices))

    return dispatch(x, expert, weight, E, chunk, sizes, run)


@functools.lru_cache
def level_table(n_hidden, device):
    """The neurons of every width level, a list, and the level above which each neuron runs, (n_hidden,)."""
    table = [0] + [width_to_neurons(level / GRID, n_hidden) for level in range(1, GRID + 1)]
    joins = torch.bucketize(torch.arange(n_hidden), torch.tensor(table), right=True) - 1
    return table, joins.to(device, torch.float32)


def dispatch(x, expert, weight, n_expert, chunk, sizes, run):
    """Sort the slots by chunk and expert, run each chunk, and bring the outputs back to their tokens. No token is
    dropped, none is padded, and none changes another's output. Returns (N, d).

    x (N, d), expert and weight (N, k): the experts of each token and what their outputs count
    chunk, sizes: the chunk of each slot (N, k), or 0 for all, and the number of slots in each chunk
    run(c, rows, ends, slot) -> (n, d): the experts, for chunk c. rows (n, d) are sorted by expert, expert e owns
        rows[ends[e-1]:ends[e]], and row i is slot[i], an index into expert.flatten().
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
            ys.append(run(c, rows[part], ends[c] - start, slot[part]))  # ends count from the chunk's first row
            start += size
    ys = torch.cat(ys) if len(ys) > 1 else ys[0]
    ys = torch.empty_like(ys).index_copy_(0, slot, ys).view(N, k, -1)  # undoes the sort
    return torch.bmm(weight.unsqueeze(1), ys).squeeze(1)  # (N, 1, k) @ (N, k, d)


# about the most products for one matrix. Router widths at budget 0.5 take 1.2 to 1.3 times as long as uniform 0.5 so;
# with a chunk for every width, 1.8
MAX_CHUNKS = 6


def plan_chunks(level):
    """Decide which slots run together, from their width levels (N, k), whole numbers from 0 to GRID.

    A chunk's product for one expert is slow when it has few rows. So scarce levels wait for the next wider ones until
    1/MAX_CHUNKS of the slots are together, and the chunk runs at the widest of its levels; the neurons beyond a slot's
    own width are zeroed. If 2% of the slots have level 3, 5% level 4 and 30% level 9, all are one chunk at level 9.
    Chunk 0 is level 0: the skipped slots.
    Returns the chunk of each slot (N, k), and of every chunk its number of slots, its level, ascending, and whether it
    holds narrower slots too.
    """
    kind = level.clamp(-1, GRID + 1).long() + 1  # so that what is out of range is counted too
    counts = torch.bincount(kind.flatten(), minlength=GRID + 3).tolist()  # the one place where the host waits
    low, *counts, high = counts
    if low or high:
        bad = (level.min() if low else level.max()).item() / GRID
        raise UsageError(f"widths must be from 0 to 1, not {bad:g}")
    chunk_of, chunks = [0] * (GRID + 1), [(counts[0], 0, False)]
    for l in range(1, GRID + 1):
        if counts[l]:
            if len(chunks) == 1 or chunks[-1][0] * MAX_CHUNKS >= level.numel():  # the open chunk is large enough
                chunks.append((0, 0, False))
            size = chunks[-1][0]
            chunks[-1] = size + counts[l], l, size > 0
            chunk_of[l] = len(chunks) - 1
    return torch.tensor(chunk_of, device=level.device)[kind - 1], *zip(*chunks)


class Stats:
    """Counts what runs in the forward passes that it is given to: model(idx, stats=stats)."""

    def __init__(self, config, device="cpu"):
        self.config, self.tokens = config, 0
        self.load = torch.zeros(
            config.n_layer, config.n_expert, dtype=torch.int64, device=device
        )  # slots sent to each expert
        self.used = torch.zeros((), dtype=torch.int64, device=device)  # neurons that the widths asked for
        self.ran = torch.zeros((), dtype=torch.int64, device=device)  # and that ran: scarce widths run with wider ones

    def mean_width(self, neurons):
        """`used` or `ran` as a share of all neurons of the experts that the tokens visited, a scalar. What the policy
        asked for is `used`; count FLOPs from `ran`. (Neither means anything while widths are learned.)
        """
        c = self.config
        slots = self.tokens * sum(map(c.is_moe, range(c.n_layer))) * (c.top_k + c.n_shared)
        return neurons / max(1, slots * c.expert_hidden)


# -----------------------------------------------------------------------------
# The MoE layer: a router chooses the experts, a policy their widths


class SlimmableMoE(nn.Module):
    def __init__(self, config, layer=0):
        super().__init__()
        self.config, self.layer = config, layer
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.register_buffer("bias", torch.zeros(config.n_expert), persistent=config.bias_rate > 0)  # set by train.py
        stack = (config.n_expert + config.n_shared, config.expert_hidden, config.n_embd)  # shared experts come last
        self.w_in = nn.Parameter(0.02 * torch.randn(stack))  # row j is the input vector of neuron j ...
        self.w_out = nn.Parameter(0.02 * torch.randn(stack))  # ... and its output vector: a width is a prefix of both

    def forward(self, x, width=1.0, stats=None, losses=True):
        """x (..., d) -> y (..., d) and the weighted router losses, a scalar (0 without `losses`: decoding needs none).

        width: in (0, 1], or a width policy; or an int of 8 or more, a number of neurons, as GPT gives it: torch.compile
            can make an int a variable of its graph, but would compile anew for every float
        """
        if not (isinstance(width, int) and width >= 8) and not is_policy(width):
            width = width_to_neurons(width, self.config.expert_hidden)
        in_graph = isinstance(width, int) and compute_dtype(x) == torch.bfloat16
        return (self.run if in_graph else self.run_outside)(x, width, stats, losses)

    @torch.compiler.disable  # sizes that are new every time; and F.grouped_mm, which is traced in bfloat16 only
    def run_outside(self, *args):
        return self.run(*args)

    def run(self, x, width, stats, losses):
        c, shape, x = self.config, x.shape, x.reshape(-1, x.size(-1))  # (N, d)
        # which experts
        with torch.autocast(x.device.type, enabled=False):  # routing decisions are worth float32
            logits = F.linear(x.float(), self.router.weight.float())
        probs = logits.softmax(-1)  # (N, E)
        expert = (probs + self.bias).topk(c.top_k).indices  # (N, k)
        load = expert.new_zeros(c.n_expert).scatter_add_(0, expert.flatten(), torch.ones_like(expert.flatten()))
        aux = self.router_losses(logits, probs, load) if losses else 0.0
        if stats is not None:
            stats.load[self.layer] += load

        # how wide, and what their outputs count
        weight, policy = probs.gather(-1, expert), None  # (N, k)
        if not isinstance(width, int):
            policy = width.at(self.layer) if hasattr(width, "at") else width
            if not is_policy(policy):
                policy, width = None, width_to_neurons(policy, c.expert_hidden)
        if policy is not None:
            width = policy.widths(weight.detach())  # (N, k)
            if width.shape != weight.shape:
                raise UsageError(f"{type(policy).__name__}.widths gave {tuple(width.shape)} for {tuple(weight.shape)}")
            if getattr(policy, "renormalize", False):
                weight = weight * (width > 0)
        if c.norm_topk_prob:
            weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-30)
        if c.n_shared:  # every token's, with weight 1
            shared = torch.arange(c.n_expert, len(self.w_in), device=x.device).expand(len(x), -1)
            expert, weight = torch.cat([expert, shared], 1), torch.cat([weight, torch.ones_like(shared)], 1)
            if policy is not None:
                budget = torch.ones_like(shared, dtype=width.dtype) * getattr(policy, "budget", 1.0)
                width = torch.cat([width, budget], 1)

        # run
        dtype = compute_dtype(x)  # grouped_mm is unknown to autocast: cast here
        try:
            y = run_experts(x.to(dtype), expert, weight.to(dtype), width, gelu_mlp, (self.w_in, self.w_out), stats)
        except UsageError as e:
            raise UsageError(f"{type(policy).__name__}: {e}") from e
        return y.view(shape), aux

    def router_losses(self, logits, probs, load):
        """Balance (Switch): E * sum_e (share of slots) * (mean probability), 1 when even; z-loss (ST-MoE)."""
        balance = probs.size(1) * (load / load.sum() * probs.mean(0)).sum()
        return self.config.balance_coef * balance + self.config.z_coef * logits.logsumexp(-1).square().mean()


def compute_dtype(x):
    """What matrix products of x run in: under autocast its dtype, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# -----------------------------------------------------------------------------
# The rest of the transformer


class KVCache:
    """Keys and values of the `length` tokens seen: (n_layer, 2, B, n_head, block_size, head size), allocated once.
    GPT.forward advances the length, once all layers have extended theirs."""

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
        return gelu_mlp(x, None, None, self.c_fc.weight, self.c_proj.weight.mT)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.moe = config.is_moe(layer)
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = SlimmableMoE(config, layer) if self.moe else MLP(config.n_embd, config.dense_hidden(layer))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, width, cache=None, stats=None):
        x = x + self.attn(self.ln_1(x), cache)
        h = self.ln_2(x)
        y, aux = self.mlp(h, width, stats, cache is None) if self.moe else (self.mlp(h), 0.0)
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

    def forward(self, idx, targets=None, width=1.0, cache=None, stats=None):
        """
        idx, targets: (B, T) int64; a target of -1 is ignored
        width: of all experts, in (0, 1], or a width policy such as RouterWidth
        cache: a KVCache holding the tokens before idx; then only the last position's logits are computed
        stats: a Stats, to which what runs is added
        Returns logits (B, T, vocab_size) or (B, 1, vocab_size), the mean cross-entropy in nats (None without
        targets), and aux, the weighted router losses summed over layers: train on loss + aux, report loss.
        """
        T, start = idx.size(1), cache.length if cache is not None else 0
        if T == 0 or start + T > self.config.block_size:
            raise UsageError(f"{start + T} tokens do not fit the context, 1 to block_size = {self.config.block_size}")
        if cache is not None and targets is not None:
            raise UsageError("a cache is for generation, which has no targets: give one or the other")
        if self.config.n_expert == 1 and (is_policy(width) or width != 1):
            raise UsageError("a dense model (n_expert=1) has no experts to slim: width must be 1")
        if stats is not None:
            stats.tokens += idx.numel()
        # torch.compile can make an int a variable of its graph, but would compile anew for every float
        width = width if is_policy(width) else width_to_neurons(width, self.config.expert_hidden)
        return self.body(idx, targets, width, cache, stats)

    def body(self, idx, targets, width, cache, stats):
        """`forward` after its checks: what `train.py --compile` compiles."""
        start = cache.length if cache is not None else 0
        pos = torch.arange(start, start + idx.size(1), device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))  # (B, T, d)
        aux = torch.zeros((), device=idx.device)
        for block in self.transformer.h:
            x, block_aux = block(x, width, cache, stats)
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
        idle = (c.n_expert - c.top_k) * MATRICES * c.n_embd * c.expert_hidden
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
                expert += (c.top_k + c.n_shared) * 2 * MATRICES * d * width * c.expert_hidden
            else:
                total += 2 * MATRICES * d * c.dense_hidden(layer)
        return total + expert, expert

    @torch.no_grad()
    def stream(self, idx, num_tokens, temperature=1.0, top_k=None, width=1.0, n_vocab=None, generator=None, stats=None):
        """Continue idx (B, T) token by token, yielding (B, 1) each time.

        temperature 0 takes the likeliest token; top_k samples from the k likeliest only; ids from n_vocab on (the
        padding of the vocabulary) are never sampled. When the context is full its older half is forgotten and the
        rest read again, so the cost of a token is bounded, however many are generated.
        """
        cache, new = KVCache(self.config), idx
        for _ in range(num_tokens):
            if cache.length == self.config.block_size:
                cache, new = KVCache(self.config), idx[:, -max(1, self.config.block_size // 2) :]
            logits = self(new, width=width, cache=cache, stats=stats)[0][:, -1, :n_vocab].float()  # (B, n_vocab)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    top = logits.topk(min(top_k, logits.size(-1)))  # by index: in bfloat16 many are equal
                    logits = torch.full_like(logits, -math.inf).scatter(1, top.indices, top.values)
                new = torch.multinomial((logits / max(temperature, 1e-5)).softmax(-1), 1, generator=generator)
            idx = torch.cat([idx, new], dim=1)[:, -self.config.block_size :]
            yield new

    def generate(self, idx, num_tokens, **kwargs):
        """`stream`, all at once: (B, T) -> (B, T + num_tokens)."""
        return torch.cat([idx, *self.stream(idx, num_tokens, **kwargs)], dim=1)
