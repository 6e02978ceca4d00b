"""
What the model promises, as tests: every fast path is held against the slow, obvious formula, written out here.

    make test        or        pytest test_model.py

The command lines have theirs in tests/.
"""

import math  # noqa: I001, which wants a line for every name
import numbers

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import (
    GPT, GRID, MAX_CHUNKS, FewerExperts, GPTConfig, KVCache, PerLayer, RouterWidth, SlimmableMoE, Stats, UsageError,
    cross_entropy, grouped_mm, plan_chunks, run_experts, width_to_neurons,
)  # fmt: skip

torch.set_num_threads(1)  # the models are tiny
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def config(**kwargs):
    base = dict(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=32, n_expert=4, top_k=2, expert_hidden=64)
    return GPTConfig(**{**base, **kwargs})


def make_layer(d, H, E, k, layer=0, **kwargs):
    """A layer with weights large enough for a router that has opinions and outputs that are far from zero."""
    torch.manual_seed(0)
    layer = SlimmableMoE(config(n_embd=d, n_head=1, expert_hidden=H, n_expert=E, top_k=k, **kwargs), layer)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.2)
    return layer


def relative_error(a, b):
    a, b = a.double(), b.double()
    return 0.0 if max(a.norm(), b.norm()) < 1e-4 else ((a - b).norm() / b.norm()).item()


class Rows:
    """A policy of the reader's own: every token's likeliest expert at the first width, the next at the second, ..."""

    def __init__(self, *row):
        self.row = row

    def widths(self, probs):
        return torch.tensor(self.row, device=probs.device).expand(len(probs), -1)


POLICIES = [1.0, 0.75, 0.4, 0.05, RouterWidth(0.5, 1.0), RouterWidth(0.25, 3.0), RouterWidth(0.9, 0.5), FewerExperts(1),
            FewerExperts(1.55), FewerExperts(0.3),             PerLayer([1.0, RouterWidth(0.3, 2.0)])]  # fmt: skip
SHAPES = [  # tokens, d, H, E, k
    (1, 16, 32, 4, 2), (3, 8, 8, 64, 2), (50, 64, 256, 8, 2), (60, 24, 40, 5, 1), (40, 48, 128, 6, 6),
]  # fmt: skip


def reference_moe(layer, x, width):
    """Token by token, expert by expert, in float64; routing decisions in float32 as the layer makes them."""
    c, w_in, w_out, tokens = layer.config, layer.w_in.double(), layer.w_out.double(), x.reshape(-1, x.size(-1))
    # decisions are made for all tokens at once: float32 rounds a little differently one by one, and ties would flip
    probs = F.softmax(F.linear(tokens.float(), layer.router.weight.float()), dim=-1)
    experts = (probs + layer.bias).topk(c.top_k).indices
    policy = width.at(layer.layer) if hasattr(width, "at") else width
    uniform = isinstance(policy, numbers.Real)
    all_widths = None if uniform else policy.widths(probs.gather(-1, experts).detach())
    out = []
    for n, token in enumerate(tokens):
        p = probs[n, experts[n]].double()
        widths = [policy] * c.top_k if uniform else [round(20 * w) / 20 for w in all_widths[n].tolist()]
        if getattr(policy, "renormalize", False):
            p = p * torch.tensor([w > 0 for w in widths], device=p.device)
        if c.norm_topk_prob:
            p = p / p.sum().clamp_min(1e-30)
        visits = list(zip(experts[n].tolist(), p, widths))
        shared = policy if uniform else round(20 * getattr(policy, "budget", 1.0)) / 20
        visits += [(c.n_expert + s, 1.0, shared) for s in range(c.n_shared)]
        y = torch.zeros_like(token, dtype=torch.float64)
        for e, weight, w in visits:
            if w > 0:
                h = width_to_neurons(w, c.expert_hidden)
                y = y + weight * (F.gelu(w_in[e, :h] @ token.double()) @ w_out[e, :h])
        out.append(y)
    return torch.stack(out).view(x.shape)


def check_against_reference(layer, x, width):
    """The layer's output and all its gradients are those of the slow formula."""
    x = x.detach().requires_grad_()
    y, slow = layer(x, width)[0], reference_moe(layer, x, width)
    assert y.shape == x.shape and relative_error(y, slow) < 1e-4
    inputs = dict(x=x, w_in=layer.w_in, w_out=layer.w_out, router=layer.router.weight)
    g = torch.randn_like(y)
    grads = torch.autograd.grad(y, inputs.values(), g), torch.autograd.grad(slow, inputs.values(), g.double())
    for name, a, b in zip(inputs, *grads):
        assert relative_error(a, b) < 1e-4, name


# -----------------------------------------------------------------------------
# Widths


class TestWidths:
    def test_neurons_are_the_nearest_multiple_of_8_and_at_least_8(self):
        for H in (8, 64, 128, 384, 1536):
            neurons = [width_to_neurons(level / GRID, H) for level in range(1, GRID + 1)]
            assert neurons == sorted(neurons) and neurons[-1] == H and min(neurons) >= 8
            assert all(h % 8 == 0 and (h == 8 or abs(h - l * H / GRID) <= 4) for l, h in enumerate(neurons, 1))

    @pytest.mark.parametrize("width", [0, -0.5, 1.01, math.nan, math.inf, "0.5", None, True, np.float32(1.5)])
    def test_a_width_out_of_range_is_refused(self, width):
        for refuses in (lambda: width_to_neurons(width, 64), lambda: RouterWidth(width, 1.0),
                        lambda: GPT(config())(torch.zeros(1, 2, dtype=torch.long), width=width)):  # fmt: skip
            with pytest.raises(UsageError, match="above 0 and at most 1"):
                refuses()

    @pytest.mark.parametrize("width", [1, np.float32(0.5), np.float64(0.25), np.int64(1)])
    def test_every_kind_of_number_is_a_width(self, width):
        model, idx = GPT(config()), torch.randint(0, 64, (1, 8))
        assert torch.equal(model(idx, width=width)[0], model(idx, width=float(width))[0])

    @pytest.mark.parametrize("seed", range(10))
    def test_router_widths_are_the_clipped_shares_and_the_rest_is_handed_on(self, seed):
        def slow(probs, budget, gamma):  # hand out the budget in tiny drops, in proportion, to those not yet full
            width, share = np.zeros(len(probs)), probs**gamma
            left = budget * len(probs)
            while left > 1e-12:
                free = width < 1 - 1e-12
                drop = min(left, ((1 - width[free]) / (share[free] / share[free].sum())).min())
                width[free] += drop * share[free] / share[free].sum()
                left -= drop
            return torch.tensor(width)

        probs = (3 * torch.randn(50, 1 + seed % 8).double()).softmax(-1) * torch.rand(50, 1)
        budget, gamma = 0.05 + 0.95 * torch.rand(50, 1).double(), 5 * torch.rand(50, 1).double()
        budget[0], gamma[0] = 1.0, 0.0
        widths = RouterWidth(budget, gamma).widths(probs)  # every token its own
        assert torch.equal((widths * GRID).round() / GRID, widths), "off the grid"
        assert (widths.mean(-1, keepdim=True) - budget).abs().max() <= 0.025 + 1e-6, "not the budget"
        order = probs.argsort(-1, descending=True)
        assert (widths.gather(-1, order).diff(dim=-1) <= 1e-6).all(), "a less likely expert got more"
        for p, b, g, w in zip(probs, budget, gamma, widths):
            alone = RouterWidth(b.item(), g.item()).widths(p[None])[0]
            assert (alone - slow(p.numpy(), b.item(), g.item())).abs().max() <= 0.025 + 1e-6
            assert torch.allclose(alone, w, atol=1e-6)

    def test_fewer_experts_are_the_likeliest_first_and_the_last_in_part(self):
        rows = {3: [1, 1, 1], 1.5: [1, 0.5, 0], 1: [1, 0, 0], 0.5: [0.5, 0, 0], 2.26: [1, 1, 0.25], 0.05: [0.05, 0, 0]}
        probs = torch.tensor([[0.5, 0.3, 0.1]]).expand(len(rows), -1)
        expected = torch.tensor(list(rows.values()))
        assert torch.allclose(FewerExperts(torch.tensor(list(rows)).unsqueeze(1)).widths(probs), expected)
        for n, row in zip(rows, expected):
            assert torch.allclose(FewerExperts(n).widths(probs), row.expand_as(probs))
        for n in (0, 0.04, -1, math.nan, "1", None, True):
            with pytest.raises(UsageError, match="experts must be"):
                FewerExperts(n)

    def test_every_token_can_have_its_own_number_of_experts(self):
        layer, x, n = make_layer(32, 64, 4, 3, n_shared=1), torch.randn(20, 32), torch.rand(20, 1) * 3 + 0.1
        together = layer(x, FewerExperts(n))[0]
        alone = torch.cat([layer(x[i : i + 1], FewerExperts(n[i].item()))[0] for i in range(20)])
        assert relative_error(together, alone) < 1e-5

    def test_gamma_0_is_uniform_and_a_large_gamma_is_top_1(self):
        probs = torch.tensor([[0.5, 0.3], [0.9, 0.1]])
        assert torch.allclose(RouterWidth(0.6, 0.0).widths(probs), torch.full((2, 2), 0.6))
        assert RouterWidth(0.5, 1e6).widths(probs).tolist() == [[1, 0], [1, 0]]
        assert RouterWidth(0.75, 1e6).widths(probs).tolist() == [[1, 0.5], [1, 0.5]]
        assert RouterWidth(1.0, 3.0).widths(probs).tolist() == [[1, 1], [1, 1]]

    @pytest.mark.parametrize("gamma", [-1.0, math.nan, math.inf])
    def test_a_gamma_out_of_range_is_refused(self, gamma):
        with pytest.raises(UsageError, match="gamma"):
            RouterWidth(0.5, gamma)

    @pytest.mark.parametrize("policy, wrong", [
        (Rows(1.5, 0.5), "1.5"), (Rows(-0.1, 0.5), "-0.1"), (Rows(0.5, 0.5, 0.5), r"\(6, 3\) for \(6, 2\)"),
    ], ids=["1.5", "-0.1", "shape"])  # fmt: skip
    def test_a_policy_that_gives_nonsense_is_named(self, policy, wrong):
        with pytest.raises(UsageError, match=rf"Rows.*{wrong}"):
            GPT(config())(torch.zeros(2, 3, dtype=torch.long), width=policy)


# -----------------------------------------------------------------------------
# Experts without a router


def swiglu(rows, ends, keep, gate, up, down):
    a = F.silu(grouped_mm(rows, gate.mT, ends)) * grouped_mm(rows, up.mT, ends)
    return grouped_mm(a if keep is None else a * keep, down, ends)


class TestExperts:
    @pytest.mark.parametrize("uniform", [True, False])
    def test_other_experts_run_as_their_slow_formula(self, uniform):
        """Experts of three matrices, weights that sum to nothing in particular, an expert twice for one token."""
        N, k, d, E, H = 30, 3, 16, 5, 40
        x, weight, matrices = torch.randn(N, d), torch.randn(N, k), [torch.randn(E, H, d) for _ in range(3)]
        expert, level = torch.randint(0, E, (N, k)), torch.randint(0, GRID + 1, (N, k))
        fast = run_experts(x, expert, weight, 24 if uniform else level / GRID, swiglu, matrices)
        slow = torch.zeros(N, d, dtype=torch.float64)
        for n in range(N):
            for e, p, l in zip(expert[n], weight[n], level[n].tolist()):
                h = 24 if uniform else width_to_neurons(l / GRID, H) if l else 0
                gate, up, down = (m[e, :h].double() for m in matrices)
                slow[n] += p * ((F.silu(gate @ x[n].double()) * (up @ x[n].double())) @ down)
        assert relative_error(fast, slow) < 1e-5

    @pytest.mark.parametrize("seed", range(10))
    def test_chunks_hold_every_slot_once_and_wide_enough(self, seed):
        g = torch.Generator().manual_seed(seed)
        n = int(torch.randint(1, 500, (), generator=g))
        peak, spread = torch.randint(0, GRID + 1, (), generator=g), torch.randint(1, 9, (), generator=g)
        level = (peak + spread * torch.randn(n, 2, generator=g)).round().clamp(0, GRID)
        chunk, sizes, levels, mixed = plan_chunks(level)
        assert torch.bincount(chunk.flatten(), minlength=len(sizes)).tolist() == list(sizes)
        assert levels[0] == 0 and list(levels) == sorted(set(levels))
        for c in range(len(sizes)):
            mine = level[chunk == c]
            assert not len(mine) or mine.max() == levels[c], "the widest slot decides"
            assert mixed[c] == (len(mine.unique()) > 1)
        assert all(size * MAX_CHUNKS >= level.numel() for size in sizes[1:-1]) and sizes[0] == (level == 0).sum()


# -----------------------------------------------------------------------------
# The layer


class TestLayer:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("width", POLICIES, ids=range(len(POLICIES)))
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_it_is_the_slow_formula_forward_and_backward(self, shape, width, device):
        n, *sizes = shape
        check_against_reference(make_layer(*sizes, layer=1).to(device), torch.randn(n, sizes[0], device=device), width)

    @pytest.mark.parametrize("seed", range(30))
    def test_it_is_the_slow_formula_in_random_configurations(self, seed):
        rng = np.random.default_rng(seed)
        d, H, E = (int(8 * rng.integers(1, 8)) for _ in range(3))
        regime = dict(n_shared=int(rng.integers(3)), norm_topk_prob=seed % 2 == 0, bias_rate=rng.choice([0, 0.01]))
        layer = make_layer(d, H, E, int(rng.integers(1, E + 1)), **regime)
        if regime["bias_rate"]:
            assert "bias" in layer.state_dict(), "a resumed run needs it"
            layer.bias += torch.linspace(-0.5, 0.5, E)
        dtype = torch.float64 if seed % 5 == 0 else torch.float32
        layer, x = layer.to(dtype), torch.randn(2, int(rng.integers(1, 20)), d, dtype=dtype)
        for width in (rng.uniform(0.01, 1), RouterWidth(rng.uniform(0.05, 1), rng.uniform(0, 4)),
                      FewerExperts(rng.uniform(0.05, 4))):  # fmt: skip
            check_against_reference(layer, x, width)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("width", [1.0, 0.5, RouterWidth(0.5, 1.0)])
    def test_bfloat16_is_the_same_up_to_its_rounding_forward_and_backward(self, width, device):
        layer, low = make_layer(64, 256, 8, 2).to(device), make_layer(64, 256, 8, 2).to(device)
        low.w_in.data, low.w_out.data = low.w_in.data.bfloat16(), low.w_out.data.bfloat16()  # the router stays float32
        x = torch.randn(100, 64, device=device).bfloat16()
        y, low_y = layer(x.float(), width)[0], low(x, width)[0]
        assert low_y.dtype == torch.bfloat16 and relative_error(low_y, y) < 0.02
        y.sum().backward()
        low_y.sum().backward()
        assert relative_error(low.w_in.grad, layer.w_in.grad) < 0.03 and low.w_in.grad.dtype == torch.bfloat16
        with torch.autocast(device, dtype=torch.bfloat16):  # grouped_mm is not on autocast's list; the layer casts
            y, _ = layer(x.float(), width)
        assert y.dtype == torch.bfloat16 and relative_error(y, low_y) < 0.02

    @pytest.mark.parametrize("width", [0.25, 0.6, 1.0])
    def test_what_does_not_run_neither_counts_nor_learns(self, width):
        layer, x, stats = make_layer(32, 128, 8, 2), torch.rand(30, 32) + 0.1, Stats(config(n_expert=8))
        layer.router.weight.data[2:] = -100.0  # positive inputs never choose these
        y = layer(x, width, stats)[0]
        y.square().sum().backward()
        assert stats.load.tolist() == [[30, 30, 0, 0, 0, 0, 0, 0], [0] * 8]
        for w in (layer.w_in, layer.w_out):
            ran = w.grad[:2, : width_to_neurons(width, 128)]
            assert (ran != 0).any() and w.grad.count_nonzero() == ran.count_nonzero()
            w.data[:, width_to_neurons(width, 128) :], w.data[2:] = math.nan, math.nan
        assert torch.equal(layer(x, width)[0], y)

    @pytest.mark.parametrize("width", [1.0, 0.5, RouterWidth(0.5, 1.0)])
    def test_a_token_does_not_depend_on_the_others_nor_on_the_order_of_experts(self, width):
        layer, x, order = make_layer(32, 64, 6, 3), torch.randn(40, 32), torch.randperm(6)
        together, aux = layer(x, width)
        assert relative_error(torch.cat([layer(t[None], width)[0] for t in x]), together) < 1e-5
        for p in layer.parameters():
            p.data = p.data[order]
        after, other_aux = layer(x, width)
        assert relative_error(after, together) < 1e-5 and torch.allclose(aux, other_aux)

    def test_router_losses_are_their_formulas_at_any_width(self):
        layer, x = make_layer(32, 64, 4, 2), torch.randn(50, 32)
        logits = layer.router(x).double()
        p = logits.softmax(-1)
        share = torch.bincount(p.topk(2)[1].flatten(), minlength=4) / 100
        expected = 0.01 * 4 * (share * p.mean(0)).sum() + 0.001 * logits.logsumexp(-1).square().mean()
        for width in (1.0, 0.3, RouterWidth(0.5, 1.0)):
            assert torch.allclose(layer(x, width)[1].double(), expected, rtol=1e-5)
        assert layer(x, losses=False)[1] == 0
        layer.router.weight.data.zero_()  # no preference: perfectly balanced in probability
        assert layer(x)[1].item() == pytest.approx(0.01 + 0.001 * math.log(4) ** 2, rel=1e-5)

    def test_policies_that_skip_experts_cost_and_change_nothing_more(self):
        layer, x = make_layer(32, 64, 4, 3), torch.randn(20, 32)
        for policy, same, neurons in ((FewerExperts(1), None, 64), (FewerExperts(3), 1.0, 192),
                                      (Rows(0.0, 0.0, 0.0), None, 0), (Rows(0.25, 1.0, 0.0), None, 80)):  # fmt: skip
            stats = Stats(layer.config)
            y = layer(x, policy, stats)[0]
            assert relative_error(y, layer(x, same)[0] if same else reference_moe(layer, x, policy)) < 1e-5
            assert stats.used == stats.ran == 20 * neurons

    def test_calibration_is_exact_on_the_grid_and_its_gradient_is_true(self):
        layer, x, target = make_layer(32, 256, 4, 2), torch.randn(64, 32), torch.randn(64, 32)
        loss = lambda gamma: (layer(x, RouterWidth(0.5, gamma))[0] * target).sum()
        gamma = torch.tensor(0.0, requires_grad=True)  # all widths 0.5, a point of the grid
        assert torch.allclose(loss(gamma), loss(0.0), rtol=1e-5)
        gamma = torch.tensor(1.0, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(gamma), gamma)
        layer, x, target, eps = layer.double(), x.double(), target.double(), 1e-4
        up, down = (loss(torch.tensor(1.0 + s, requires_grad=True)).item() for s in (eps, -eps))
        assert gradient.item() == pytest.approx((up - down) / (2 * eps), rel=1e-2)

    def test_it_is_nanomoes_layer_with_unlimited_capacity(self):
        """nanoMoE: one-hot dispatch and combine masks of shape (tokens, experts, capacity), capacity = all tokens."""
        N, d, H, E, k = 30, 16, 64, 4, 2
        layer, x = make_layer(d, H, E, k), torch.randn(30, 16)
        top, expert = layer.router(x).topk(k)
        p = torch.full((N, E), -math.inf).scatter_(-1, expert, top).softmax(-1)
        mask = F.one_hot(expert, E).permute(1, 0, 2)  # (k, N, E)
        rank = (mask.reshape(k * N, E).cumsum(0) - 1).reshape(k, N, E)
        place = F.one_hot((rank * mask).sum(-1), k * N)  # (k, N, capacity)
        combine = torch.einsum("kne,ne,knc->nec", mask.float(), p, place.float())
        batches = torch.einsum("nec,nd->ecd", combine.bool().float(), x)
        out = torch.bmm(F.gelu(torch.bmm(batches, layer.w_in.mT)), layer.w_out)
        assert relative_error(layer(x)[0], torch.einsum("nec,ecd->nd", combine, out)) < 1e-5


# -----------------------------------------------------------------------------
# The GPT


class NanoGPT(nn.Module):
    """nanoGPT's forward pass without biases, on its own parameter names; attention spelled out."""

    def __init__(self, c):
        super().__init__()
        d, linear = c.n_embd, lambda i, o: nn.Linear(i, o, bias=False)
        block = lambda: nn.ModuleDict(dict(
            ln_1=nn.LayerNorm(d, bias=False), attn=nn.ModuleDict(dict(c_attn=linear(d, 3 * d), c_proj=linear(d, d))),
            ln_2=nn.LayerNorm(d, bias=False), mlp=nn.ModuleDict(dict(c_fc=linear(d, 4 * d), c_proj=linear(4 * d, d))),
        ))  # fmt: skip
        self.n_head = c.n_head
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, d), wpe=nn.Embedding(c.block_size, d),
            h=nn.ModuleList(block() for _ in range(c.n_layer)), ln_f=nn.LayerNorm(d, bias=False),
        ))  # fmt: skip
        self.lm_head = linear(d, c.vocab_size)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx):
        B, T = idx.shape
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(T))
        for b in self.transformer.h:
            q, k, v = b.attn.c_attn(b.ln_1(x)).split(x.size(-1), dim=2)
            q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))
            att = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))
            att = att.masked_fill(torch.ones(T, T).tril() == 0, -math.inf).softmax(-1)
            x = x + b.attn.c_proj((att @ v).transpose(1, 2).reshape(B, T, -1))
            x = x + b.mlp.c_proj(F.gelu(b.mlp.c_fc(b.ln_2(x))))
        return self.lm_head(self.transformer.ln_f(x))


class TestGPT:
    def test_parameter_counts_are_the_papers(self):
        for millions, sizes in ((55.1, dict()), (322.6, dict(n_layer=12, n_head=12, n_embd=768)),
                                (1059.3, dict(n_layer=24, n_head=16, n_embd=1024))):  # fmt: skip
            with torch.device("meta"):
                total, active = GPT(GPTConfig(**sizes)).num_params()
            assert round(total / 1e6, 1) == millions
        assert round(active / 1e6) == 455  # 2 of 8 experts

    def test_a_nanogpt_checkpoint_without_biases_gives_the_same_logits(self):
        c = config(n_expert=1, expert_hidden=None, n_layer=3)
        theirs, ours = NanoGPT(c), GPT(c)
        for p in theirs.parameters():
            nn.init.normal_(p, std=0.2)
        ours.load_state_dict(theirs.state_dict())  # strict: every name and shape
        idx = torch.randint(0, c.vocab_size, (3, 20))
        assert relative_error(ours(idx)[0], theirs(idx)) < 1e-5

    def test_names_and_shapes_of_an_moe_block(self):
        mlp = {n: tuple(p.shape) for n, p in GPT(config()).transformer.h[0].mlp.state_dict().items()}
        assert mlp == {"router.weight": (4, 32), "w_in": (4, 64, 32), "w_out": (4, 64, 32)}
        assert [b.moe for b in GPT(config(n_layer=5, moe_every=2)).transformer.h] == [True, False, True, False, True]

    @pytest.mark.parametrize("width", [1.0, 0.25, RouterWidth(0.5, 1.0)])
    def test_neither_the_future_nor_a_neighbour_changes_a_logit(self, width):
        model, idx = GPT(config()).eval(), torch.randint(0, 64, (3, 20))
        other = idx.clone()
        other[1:], other[0, 10:] = torch.randint(0, 64, (2, 20)), torch.randint(0, 64, (10,))
        before, after = model(idx, width=width)[0], model(other, width=width)[0]
        assert torch.allclose(before[0, :10], after[0, :10], atol=1e-6)
        assert not torch.allclose(before[0, 10:], after[0, 10:], atol=1e-3)

    def test_loss_is_the_plain_cross_entropy_and_aux_is_apart(self):
        model, idx = GPT(config()), torch.randint(0, 64, (2, 16))
        logits, loss, aux = model(idx, idx)
        nll = -logits.double().log_softmax(-1).gather(-1, idx[..., None])
        assert loss.item() == pytest.approx(nll.mean().item(), rel=1e-5) and aux > 0 and model(idx)[1] is None
        ignored = torch.where(torch.arange(16) < 8, idx, -1)
        assert model(idx, ignored)[1].item() == pytest.approx(nll[:, :8].mean().item(), rel=1e-5)

    @pytest.mark.parametrize("n, vocab", [(1, 50), (60, 50), (1, 2**17), (33, 2**17), (70, 2**17)])
    def test_the_gradient_of_the_loss_and_what_it_keeps_for_it(self, n, vocab):
        logits, targets = torch.randn(n, vocab, requires_grad=True), torch.randint(0, vocab, (n,))
        targets[n // 2 + 1 :] = -1
        kept = []  # in float32 until the backward pass; the logits themselves are there anyway
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = cross_entropy(logits, targets)
        large = [t for t in kept if t.is_floating_point() and t.numel() >= vocab]
        assert {t.untyped_storage().data_ptr() for t in large} <= {logits.data_ptr()}
        loss.backward()
        used = (targets >= 0).double()
        slow = logits.detach().double().softmax(-1) - F.one_hot(targets.clamp_min(0), vocab)
        assert relative_error(logits.grad, slow * (used / used.sum())[:, None]) < 1e-6

    @pytest.mark.parametrize("sizes", [
        dict(), dict(n_expert=1), dict(moe_every=1, top_k=3, n_expert=8, n_layer=3), dict(n_shared=2),
    ], ids=str)  # fmt: skip
    def test_flops_and_widths_are_those_that_ran(self, sizes):
        # (S, K) @ (E, K, M); torch has no count for it
        count = {torch.ops.aten._grouped_mm: lambda a, b, *args, **kwargs: 2 * a[0] * a[1] * b[-1]}
        model, idx = GPT(config(**sizes)).eval(), torch.randint(0, 64, (2, 32))
        c, n_moe = model.config, sum(b.moe for b in model.transformer.h)
        for width in [1.0] if c.n_expert == 1 else [1.0, 0.25, RouterWidth(0.5, 0.0), RouterWidth(0.5, 2.0)]:
            stats, counter = Stats(c), FlopCounterMode(display=False, custom_mapping=count)
            with counter, torch.no_grad(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
                model(idx, width=width, stats=stats)
            used, ran = stats.mean_width(stats.used).item(), stats.mean_width(stats.ran).item()
            combine = 2 * (c.top_k + c.n_shared) * 32 * n_moe  # weighting experts' outputs
            total, expert = model.flops_per_token(ran if n_moe else 1.0, 32)
            assert counter.get_total_flops() / idx.numel() == pytest.approx(total + combine, rel=1e-3)
            if not n_moe:
                assert expert == 0
                continue
            nominal = getattr(width, "budget", width)
            assert expert == pytest.approx(ran * model.flops_per_token(1.0, 32)[1])
            assert used == pytest.approx(nominal, abs=1e-6 if getattr(width, "gamma", 0) == 0 else 0.025)
            assert used <= ran + 1e-6 and ran < used + 0.1, "what ran and was discarded counts as run"
            assert stats.load.sum(1).tolist() == [64 * c.top_k * b.moe for b in model.transformer.h]

    def test_numbers_per_layer_are_those_numbers(self):
        model, idx = GPT(config(moe_every=1)).eval(), torch.randint(0, 64, (2, 32))
        assert torch.equal(model(idx, width=PerLayer([0.5, 0.5]))[0], model(idx, width=0.5)[0])
        stats = Stats(model.config)
        model(idx, width=PerLayer([0.25, 0.75]), stats=stats)
        assert stats.mean_width(stats.ran) == 0.5

    def test_stats_add_up_and_change_nothing(self):
        model, idx = GPT(config(n_shared=1)), torch.randint(0, 64, (2, 32))
        one, two, width = Stats(model.config), Stats(model.config), PerLayer([RouterWidth(0.25, 2.0), None])
        plain = model(idx, width=width)[0]
        assert torch.equal(model(idx, width=width, stats=one)[0], plain)
        for _ in range(2):
            model(idx, width=width, stats=two)
        assert two.tokens == 2 * one.tokens and two.ran == 2 * one.ran and torch.equal(two.load, 2 * one.load)
        assert two.mean_width(two.used) == pytest.approx(0.25, abs=0.02), "shared experts run the policy's budget"

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_compiled_it_is_the_same_and_new_widths_need_no_new_graph(self, dtype, backend):
        model, idx, graphs, low = GPT(config(n_layer=1)), torch.randint(0, 64, (2, 32)), [], dtype == torch.bfloat16
        # in the graph are bfloat16 experts at a uniform width: all else needs graph breaks
        widths = [1.0, 0.5, 0.3, 0.1, 0.85] + ([] if low else [RouterWidth(b, 3 * b) for b in (0.5, 0.3, 0.7)] + [0.4])
        eager = [gradients(model, idx, w, dtype) for w in widths]
        compile_body(model, backend, fullgraph=low)
        for width, expected in zip(widths, eager):
            for a, b in zip(gradients(model, idx, width, dtype), expected):
                assert relative_error(a, b) < (1e-5 if not low else 0.02 if backend == "aot_eager" else 0.1)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        # the first width, then any width; router widths share theirs too
        assert graphs == [1] + [2] * 4 if low else graphs[1:5] == [graphs[1]] * 4 and graphs[5:] == [graphs[5]] * 4

    def test_compiled_decoding_shares_a_graph_at_every_position(self):
        model, idx = GPT(config()).eval().bfloat16(), torch.randint(0, 64, (1, 5))
        expected = model.generate(idx, 20, temperature=0)
        compile_body(model, "aot_eager", fullgraph=True)
        assert torch.equal(model.generate(idx, 20, temperature=0), expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the prompt, then any position

    @pytest.mark.parametrize("bad", [
        dict(top_k=5), dict(expert_hidden=12), dict(n_embd=33), dict(n_embd=36, n_head=2), dict(n_layer=0),
        dict(dropout=1.0), dict(n_shared=-1), dict(n_shared=1, n_expert=1), dict(n_head=3),
    ], ids=str)  # fmt: skip
    def test_a_config_that_cannot_work_is_refused(self, bad):
        with pytest.raises(UsageError, match=next(iter(bad))):
            config(**bad)

    @pytest.mark.parametrize("width", [0.5, RouterWidth(0.5), PerLayer([RouterWidth(0.5)] * 2)])
    def test_a_dense_model_has_no_width(self, width):
        with pytest.raises(UsageError, match="dense"):
            GPT(config(n_expert=1))(torch.zeros(1, 2, dtype=torch.long), width=width)


def gradients(model, idx, width, dtype=torch.float32):
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        _, loss, aux = model(idx, idx, width)
    (loss + aux).backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def compile_body(model, backend, **kwargs):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.body = torch.compile(model.body, backend=backend, **kwargs)


class TestGeneration:
    @pytest.mark.parametrize("width", [1.0, 0.25, RouterWidth(0.5, 1.0)])
    def test_the_cache_changes_no_token_also_when_the_context_is_full(self, width):
        model = GPT(config(block_size=24)).eval()
        for p in model.parameters():
            p.data *= 3  # so that the likeliest token is not always the same one
        idx = torch.randint(0, 64, (2, 5))
        fast = model.generate(idx, 60, temperature=0, width=width)
        slow, start = idx, 0
        for _ in range(60):
            if slow.size(1) - start > 24:  # full: the older half is forgotten
                start = slow.size(1) - 12
            logits = model(slow[:, start:], width=width)[0][:, -1]
            slow = torch.cat([slow, logits.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(fast, slow) and len(fast.unique()) > 5

    @pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
    def test_the_cache_gives_the_logits_of_any_split_of_the_tokens(self, dtype, error):
        model, idx = GPT(config()).eval().to(dtype), torch.randint(0, 64, (2, 20))
        whole, cache = model(idx)[0], KVCache(model.config)
        for start, stop in ((0, 7), (7, 8), (8, 15), (15, 20)):
            assert relative_error(model(idx[:, start:stop], cache=cache)[0][:, 0], whole[:, stop - 1]) < error

    def test_sampling_is_seeded_and_never_leaves_the_vocabulary(self):
        model, idx = GPT(config()).eval(), torch.zeros(1, 1, dtype=torch.long)
        draw = lambda seed, **kw: model.generate(idx, 50, generator=torch.Generator().manual_seed(seed), **kw)
        assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
        assert draw(3, n_vocab=10).max() < 10 and draw(3).max() >= 10
        assert torch.equal(draw(1, top_k=1), model.generate(idx, 50, temperature=0))

    def test_tokens_are_drawn_as_often_as_they_are_likely(self):
        model, idx = GPT(config()).eval(), torch.zeros(4000, 1, dtype=torch.long)
        logits = model(idx[:1])[0][0, -1].double() / 0.5
        likely = logits.topk(10).indices
        expected = logits[likely].softmax(-1)
        drawn = model.generate(idx, 1, temperature=0.5, top_k=10, generator=torch.Generator().manual_seed(0))[:, 1]
        often = torch.bincount(drawn, minlength=64)[likely] / 4000
        assert often.sum() == 1 and (often - expected).abs().max() < 0.03

    @pytest.mark.parametrize("length", [0, 33])
    def test_a_prompt_that_does_not_fit_is_refused(self, length):
        with pytest.raises(UsageError, match="do not fit"):
            GPT(config()).generate(torch.zeros(1, length, dtype=torch.long), 1)
