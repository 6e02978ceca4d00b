"""
What MoSE promises, as tests. Every fast path is held against the slow, obvious formula, written out here.

    make test        or        pytest test_model.py
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F

import bench
import prepare
import sample
import train
from model import GPT, GPTConfig, KVCache, RouterWidth, SlimmableMoE, UsageError, cross_entropy, width_to_neurons

torch.set_num_threads(1)  # the models are tiny
HERE = Path(__file__).parent
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
LONG = pytest.mark.skipif("LONG" not in os.environ, reason="takes minutes: make test-long")
WIDTHS = [1.0, 0.75, 0.5, 0.05]
SHAPES = [  # tokens, d, H, E, k
    (1, 16, 32, 4, 2), (3, 32, 64, 64, 2), (50, 64, 256, 8, 2), (200, 24, 40, 5, 1), (120, 48, 128, 16, 6),
]  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def config(**kwargs):
    base = dict(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=32, n_expert=4, top_k=2, expert_hidden=64)
    return GPTConfig(**{**base, **kwargs})


def make_layer(d, H, E, k, seed=0, scale=10.0, **kwargs):
    """A layer with weights large enough for a router that has opinions and outputs that are far from zero."""
    torch.manual_seed(seed)
    layer = SlimmableMoE(config(n_embd=d, n_head=1, expert_hidden=H, n_expert=E, top_k=k, **kwargs))
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.02 * scale)
    return layer


def reference_moe(layer, x, width):
    """Token by token, expert by expert, in float64; routing decisions in float32 as the layer makes them."""
    w_in, w_out, (E, H) = layer.w_in.double(), layer.w_out.double(), (layer.router.out_features, layer.w_in.size(1))
    out = []
    x, shape = x.reshape(-1, x.size(-1)), x.shape
    # decisions are made for all tokens at once: float32 rounds a little differently one by one, and ties would flip
    probs = F.softmax(F.linear(x.float(), layer.router.weight.float()), dim=-1)
    experts = (probs + layer.bias).topk(layer.top_k).indices
    all_widths = None if isinstance(width, float) else width.widths(probs.gather(-1, experts).detach())
    for n, token in enumerate(x):
        expert, routed = experts[n].tolist() + list(range(E, E + layer.n_shared)), probs[n, experts[n]]
        if isinstance(width, float):
            widths = [width] * len(expert)
        else:
            widths = [round(20 * w) / 20 for w in all_widths[n].tolist()]  # the grid in float64
            if getattr(width, "renormalize", False):
                routed = routed * torch.tensor([w > 0 for w in widths])
            widths += [getattr(width, "budget", 1.0)] * layer.n_shared
        weights = torch.cat(
            [routed / routed.sum() if layer.norm_topk_prob else routed, routed.new_ones(layer.n_shared)]
        )
        y = torch.zeros(len(token), dtype=torch.float64, device=token.device)
        for p_e, e, w in zip(weights, expert, widths):
            if w > 0:
                h = width_to_neurons(w, H)
                y = y + p_e.double() * (F.gelu(w_in[e, :h] @ token.double()) @ w_out[e, :h])
        out.append(y)
    return torch.stack(out).view(shape)


class OnlyFirst:
    """A policy that leaves every token its likeliest expert, alone."""

    renormalize = True

    def widths(self, probs):
        return (torch.arange(probs.size(-1)) == 0).float().expand(probs.shape)


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# -----------------------------------------------------------------------------
# Widths


class TestWidths:
    def test_neurons_are_the_nearest_multiple_of_8_and_at_least_8(self):
        for H in (8, 64, 128, 384, 1536):
            previous = 0
            for level in range(1, 21):
                h = width_to_neurons(level / 20, H)
                assert h % 8 == 0 and 8 <= h <= H and h >= previous
                assert h == 8 or abs(h - level / 20 * H) <= 4
                previous = h
            assert h == H

    @pytest.mark.parametrize("width", [0, -0.5, 1.01, math.nan, math.inf, "0.5", None, True])
    def test_a_width_out_of_range_is_refused(self, width):
        for call in (lambda: width_to_neurons(width, 64), lambda: RouterWidth(width, 1.0)):
            with pytest.raises(UsageError, match=r"above 0 and at most 1"):
                call()
        with pytest.raises(UsageError):
            GPT(config())(torch.zeros(1, 2, dtype=torch.long), width=width)

    @pytest.mark.parametrize("gamma", [-1.0, math.nan, math.inf])
    def test_a_gamma_out_of_range_is_refused(self, gamma):
        with pytest.raises(UsageError, match="gamma"):
            RouterWidth(0.5, gamma)

    @pytest.mark.parametrize("seed", range(40))
    def test_router_widths_keep_the_budget_of_every_token(self, seed):
        g = torch.Generator().manual_seed(seed)
        k = int(torch.randint(1, 9, (), generator=g))
        budget, gamma = (torch.rand(2, generator=g) * torch.tensor([0.95, 8.0]) + torch.tensor([0.05, 0.0])).tolist()
        probs = (torch.randn(300, k, generator=g) * 3).softmax(-1) * torch.rand(300, 1, generator=g)
        widths = RouterWidth(budget, gamma).widths(probs)
        assert widths.shape == probs.shape and widths.min() >= 0 and widths.max() <= 1
        assert torch.equal((widths * 20).round() / 20, widths), "off the grid"
        assert (widths.mean(-1) - budget).abs().max() <= 0.025 + 1e-6
        order = probs.argsort(-1, descending=True)
        assert (widths.gather(-1, order).diff(dim=-1) <= 1e-6).all(), "a less likely expert got more"

    def test_router_widths_are_the_clipped_shares_and_the_rest_is_handed_on(self):
        def slow(probs, budget, gamma):  # hand out the budget in tiny drops, in proportion, to those not yet full
            width, share = np.zeros(len(probs)), probs**gamma
            left = budget * len(probs)
            while left > 1e-12:
                free = width < 1 - 1e-12
                drop = min(left, ((1 - width[free]) / (share[free] / share[free].sum())).min())
                width[free] += drop * share[free] / share[free].sum()
                left -= drop
            return width

        rng = np.random.default_rng(0)
        for _ in range(100):
            probs, budget, gamma = rng.dirichlet(np.ones(rng.integers(1, 7))), rng.uniform(0.1, 1), rng.uniform(0, 4)
            fast = RouterWidth(budget, gamma).widths(torch.tensor(probs)[None])[0].numpy()
            assert np.abs(fast - slow(probs, budget, gamma)).max() <= 0.025 + 1e-6

    def test_every_token_can_have_its_own_budget_and_gamma(self):
        probs, budget, gamma = torch.rand(50, 3).softmax(-1), torch.rand(50, 1) * 0.9 + 0.05, torch.rand(50, 1) * 3
        widths = RouterWidth(budget, gamma).widths(probs)
        for i in range(50):
            alone = RouterWidth(budget[i].item(), gamma[i].item()).widths(probs[i : i + 1])
            assert (widths[i] - alone).abs().max() <= 0.05 + 1e-6 and (widths[i] == alone).float().mean() > 0.5

    def test_gamma_0_is_uniform_and_a_large_gamma_is_top_1(self):
        probs = torch.tensor([[0.5, 0.3], [0.9, 0.1]])
        assert torch.allclose(RouterWidth(0.6, 0.0).widths(probs), torch.full((2, 2), 0.6))
        assert RouterWidth(0.5, 1e6).widths(probs).tolist() == [[1, 0], [1, 0]]
        assert RouterWidth(0.75, 1e6).widths(probs).tolist() == [[1, 0.5], [1, 0.5]]
        assert RouterWidth(1.0, 3.0).widths(probs).tolist() == [[1, 1], [1, 1]]


# -----------------------------------------------------------------------------
# The layer


class TestLayer:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("width", WIDTHS + [RouterWidth(0.5, 1.0), RouterWidth(0.25, 3.0), RouterWidth(0.9, 0.5)])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_it_is_the_slow_formula(self, shape, width, device):
        n, *sizes = shape
        layer = make_layer(*sizes).to(device)
        x = torch.randn(n, sizes[0], device=device)
        y, _ = layer(x, width)
        assert y.shape == x.shape and relative_error(y, reference_moe(layer, x, width)) < 1e-4

    @pytest.mark.parametrize("width", [1.0, 0.4, RouterWidth(0.3, 2.0), OnlyFirst()])
    @pytest.mark.parametrize("regime", [
        dict(n_shared=1), dict(n_shared=2, norm_topk_prob=False), dict(bias_rate=0.01), dict(norm_topk_prob=False),
    ], ids=str)  # fmt: skip
    def test_every_routing_regime_is_the_slow_formula(self, regime, width):
        layer, x = make_layer(32, 64, 6, 3, **regime), torch.randn(40, 32, requires_grad=True)
        if "bias_rate" in regime:
            layer.bias += torch.linspace(-0.5, 0.5, 6)
            assert "bias" in layer.state_dict()  # a resumed run needs it
        y, slow = layer(x, width)[0], reference_moe(layer, x, width)
        assert relative_error(y, slow) < 1e-4
        with torch.no_grad():
            assert relative_error(layer(x[:1], width)[0], slow[:1]) < 1e-4  # decoding
        inputs, g = [x, layer.w_in, layer.w_out, layer.router.weight], torch.randn_like(y)
        for a, b in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(slow, inputs, g.double())):
            assert (b.norm() < 1e-5 and a.norm() < 1e-5) or relative_error(a, b) < 1e-4

    @pytest.mark.parametrize("seed", range(12))
    def test_it_is_the_slow_formula_on_random_shapes(self, seed):
        rng = np.random.default_rng(seed)
        d, H, E = (int(8 * rng.integers(1, 8)) for _ in range(3))
        k, n = int(rng.integers(1, E + 1)), int(rng.integers(1, 40))
        layer, x = make_layer(d, H, E, k), torch.randn(n, d)
        for width in (float(rng.uniform(0.01, 1)), RouterWidth(rng.uniform(0.05, 1), rng.uniform(0, 4))):
            assert relative_error(layer(x, width)[0], reference_moe(layer, x, width)) < 1e-4

    def test_its_gradients_are_finite_differences(self):
        layer, x = make_layer(8, 16, 3, 2).double(), torch.randn(5, 8, dtype=torch.float64)
        for width in (1.0, 0.5, RouterWidth(0.5, 1.0)):

            def f(w_in, w_out, width=width):
                return torch.func.functional_call(layer, dict(w_in=w_in, w_out=w_out), (x, width))[0]

            assert torch.autograd.gradcheck(f, (layer.w_in, layer.w_out))

    @pytest.mark.parametrize("width", WIDTHS + [RouterWidth(0.5, 1.0), RouterWidth(0.25, 5.0)])
    @pytest.mark.parametrize("shape", SHAPES[:3])
    def test_it_is_the_slow_formula_when_decoding_too(self, shape, width):
        n, *sizes = shape
        layer = make_layer(*sizes)
        x = torch.randn(min(n, 2), sizes[0])
        with torch.no_grad():
            y, aux = layer(x, width)
        used, run, load = layer.neurons_used.clone(), layer.neurons_run.clone(), layer.load.clone()
        other, other_aux = layer(x, width)  # with gradients it takes the other path
        assert relative_error(y, reference_moe(layer, x, width)) < 1e-4 and relative_error(y, other) < 1e-5
        assert aux == other_aux and used == layer.neurons_used - used and run <= layer.neurons_run - run
        assert torch.equal(load, layer.load - load)

    @pytest.mark.parametrize("width", [1.0, 0.4, RouterWidth(0.5, 2.0)])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_its_gradients_are_those_of_the_slow_formula(self, shape, width):
        n, *sizes = shape
        layer = make_layer(*sizes)
        x, g = torch.randn(n, sizes[0], requires_grad=True), torch.randn(n, sizes[0])
        inputs = [x, layer.w_in, layer.w_out, layer.router.weight]
        fast = torch.autograd.grad(layer(x, width)[0], inputs, g)
        slow = torch.autograd.grad(reference_moe(layer, x, width), inputs, g.double())
        for name, a, b in zip(("x", "w_in", "w_out", "router"), fast, slow):
            # with one expert a token its weight is 1 whatever the router says, so the router's gradient is 0
            assert (b.norm() < 1e-5 and a.norm() < 1e-5) or relative_error(a, b) < 1e-4, name

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("width", [1.0, 0.5, RouterWidth(0.5, 1.0)])
    def test_bfloat16_is_the_same_up_to_its_rounding_forward_and_backward(self, width, device):
        layer = make_layer(64, 256, 8, 2).to(device)
        low = make_layer(64, 256, 8, 2).to(device)
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

    def test_float64_works(self):
        layer = make_layer(16, 32, 4, 2).double()
        x = torch.randn(7, 16, dtype=torch.float64)
        assert relative_error(layer(x, 0.5)[0], reference_moe(layer, x, 0.5)) < 1e-6  # the router is float32

    @pytest.mark.parametrize("width", [0.25, 0.6])
    def test_neurons_beyond_the_width_neither_count_nor_learn(self, width):
        layer = make_layer(32, 128, 4, 2)
        x, h = torch.randn(50, 32), width_to_neurons(width, 128)
        y, _ = layer(x, width)
        y.square().sum().backward()
        for w in (layer.w_in, layer.w_out):
            assert (w.grad[:, h:] == 0).all() and (w.grad[:, :h] != 0).any()
            w.data[:, h:] = math.nan
        assert torch.equal(layer(x, width)[0], y)

    def test_skipped_experts_cost_and_change_nothing(self):
        layer, x = make_layer(32, 64, 4, 2), torch.randn(40, 32)
        only_first, _ = layer(x, RouterWidth(0.5, 1e6))
        probs, expert = F.softmax(layer.router(x), -1).topk(2)
        slow = torch.stack([
            p[0] / p.sum() * F.gelu(layer.w_in[e[0]] @ t) @ layer.w_out[e[0]] for t, p, e in zip(x, probs, expert)
        ])  # fmt: skip
        assert relative_error(only_first, slow) < 1e-5
        assert layer.neurons_run.item() == 40 * 64

    def test_a_token_does_not_depend_on_the_others(self):
        layer, x = make_layer(32, 64, 4, 2), torch.randn(40, 32)
        for width in (1.0, 0.5, RouterWidth(0.5, 1.0)):
            together = layer(x, width)[0]
            alone = torch.cat([layer(t[None], width)[0] for t in x])
            assert relative_error(together, alone) < 1e-5

    def test_experts_can_be_permuted_with_their_router_rows(self):
        layer, x, order = make_layer(32, 64, 6, 3), torch.randn(40, 32), torch.randperm(6)
        for width in (1.0, 0.5, RouterWidth(0.5, 1.0)):
            before, aux = layer(x, width)
            other = make_layer(32, 64, 6, 3)
            for name, p in other.named_parameters():
                p.data = layer.get_parameter(name).data[order]
            after, other_aux = other(x, width)
            assert relative_error(after, before) < 1e-5 and torch.allclose(aux, other_aux)

    @pytest.mark.parametrize("width", [1.0, RouterWidth(0.5, 1.0)])
    def test_experts_without_tokens_get_zero_gradients(self, width):
        layer, x = make_layer(32, 64, 8, 2), torch.rand(30, 32) + 0.1
        layer.router.weight.data[2:] = -100.0  # positive inputs never choose these
        layer(x, width)[0].square().sum().backward()
        assert layer.load.tolist()[2:] == [0] * 6
        for w in (layer.w_in, layer.w_out):
            assert (w.grad[2:] == 0).all() and (w.grad[:2] != 0).any()

    def test_router_losses_are_their_formulas(self):
        layer, x = make_layer(32, 64, 4, 2), torch.randn(50, 32)
        logits = layer.router(x).double()
        p = logits.softmax(-1)
        share = torch.bincount(p.topk(2)[1].flatten(), minlength=4) / 100
        expected = 0.01 * 4 * (share * p.mean(0)).sum() + 0.001 * logits.logsumexp(-1).square().mean()
        assert torch.allclose(layer(x)[1].double(), expected, rtol=1e-5)
        layer.router.weight.data.zero_()  # no preference: perfectly balanced in probability
        assert layer(x)[1].item() == pytest.approx(0.01 + 0.001 * math.log(4) ** 2, rel=1e-5)

    def test_a_token_that_a_policy_leaves_no_expert_gets_zeros(self):
        class Nothing:
            renormalize = True

            def widths(self, probs):
                return torch.zeros_like(probs)

        assert (make_layer(32, 64, 4, 2)(torch.randn(5, 32), Nothing())[0] == 0).all()

    def test_calibration_is_exact_on_the_grid_and_its_gradient_is_true(self):
        layer, x = make_layer(32, 256, 4, 2), torch.randn(64, 32)
        target = torch.randn(64, 32)

        def loss(gamma):
            return (layer(x, RouterWidth(0.5, gamma))[0] * target).sum()

        gamma = torch.tensor(0.0, requires_grad=True)  # all widths 0.5, a point of the grid
        assert torch.allclose(loss(gamma), loss(0.0), rtol=1e-5)
        gamma = torch.tensor(1.0, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(gamma), gamma)
        layer = layer.double()
        x, target, eps = x.double(), target.double(), 1e-4
        up, down = (loss(torch.tensor(1.0 + s, requires_grad=True)).item() for s in (eps, -eps))
        assert gradient.item() == pytest.approx((up - down) / (2 * eps), rel=1e-2)

    def test_a_policy_of_the_readers_own_works(self):
        class Alternate:
            def widths(self, probs):
                return torch.tensor([1.0, 0.25]).expand(probs.shape)

        layer, x = make_layer(32, 64, 4, 2), torch.randn(20, 32)
        assert relative_error(layer(x, Alternate())[0], reference_moe(layer, x, Alternate())) < 1e-4
        assert layer.neurons_run.item() == 20 * (64 + 16)

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
        block = lambda: nn.ModuleDict(dict(  # noqa: E731
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
        for millions, sizes in (
            (55.1, dict()),
            (322.6, dict(n_layer=12, n_head=12, n_embd=768)),
            (1059.3, dict(n_layer=24, n_head=16, n_embd=1024)),
        ):
            with torch.device("meta"):
                total, active = GPT(GPTConfig(**sizes)).num_params()
            assert round(total / 1e6, 1) == millions
        assert round(active / 1e6) == 455  # 2 of 8 experts

    def test_a_nanogpt_checkpoint_without_biases_gives_the_same_logits(self):
        c = config(n_expert=1, expert_hidden=None, n_layer=3)
        torch.manual_seed(0)
        theirs, ours = NanoGPT(c), GPT(c)
        for p in theirs.parameters():
            nn.init.normal_(p, std=0.2)
        ours.load_state_dict(theirs.state_dict())  # strict: every name and shape
        idx = torch.randint(0, c.vocab_size, (3, 20))
        assert relative_error(ours(idx)[0], theirs(idx)) < 1e-5

    def test_names_and_shapes_of_an_moe_block(self):
        names = {
            n: tuple(p.shape) for n, p in GPT(config()).state_dict().items() if n.startswith("transformer.h.0.mlp")
        }
        assert names == {
            "transformer.h.0.mlp.router.weight": (4, 32), "transformer.h.0.mlp.w_in": (4, 64, 32),
            "transformer.h.0.mlp.w_out": (4, 64, 32),
        }  # fmt: skip
        assert [b.moe for b in GPT(config(n_layer=5, moe_every=2)).transformer.h] == [True, False, True, False, True]

    @pytest.mark.parametrize("width", [1.0, 0.25, RouterWidth(0.5, 1.0)])
    def test_neither_the_future_nor_a_neighbour_changes_a_logit(self, width):
        torch.manual_seed(0)
        model = GPT(config()).eval()
        idx = torch.randint(0, 64, (3, 20))
        before = model(idx, width=width)[0]
        other = idx.clone()
        other[1:] = torch.randint(0, 64, (2, 20))
        other[0, 10:] = torch.randint(0, 64, (10,))
        after = model(other, width=width)[0]
        assert torch.allclose(before[0, :10], after[0, :10], atol=1e-6)
        assert not torch.allclose(before[0, 10:], after[0, 10:], atol=1e-3)

    def test_loss_is_the_plain_cross_entropy_and_aux_is_apart(self):
        model, idx = GPT(config()), torch.randint(0, 64, (2, 16))
        logits, loss, aux = model(idx, idx)
        log_p = logits.double().log_softmax(-1)
        assert loss.item() == pytest.approx(-log_p.gather(-1, idx[..., None]).mean().item(), rel=1e-5)
        assert aux > 0 and model(idx)[1] is None
        ignored = torch.where(torch.arange(16) < 8, idx, -1)
        assert model(idx, ignored)[1].item() == pytest.approx(
            -log_p[:, :8].gather(-1, idx[:, :8, None]).mean().item(), rel=1e-5
        )

    @pytest.mark.parametrize("n, vocab", [(1, 50), (60, 50), (1, 2**17), (32, 2**17), (33, 2**17), (70, 2**17)])
    def test_the_gradient_of_the_loss_and_what_it_keeps_for_it(self, n, vocab):
        logits, targets = torch.randn(n, vocab, requires_grad=True), torch.randint(0, vocab, (n,))
        targets[n // 2 + 1 :] = -1
        kept = []  # numbers in float32 until the backward pass; the logits themselves are there anyway
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = cross_entropy(logits, targets)
        assert {t.untyped_storage().data_ptr() for t in kept if t.is_floating_point() and t.numel() >= vocab} <= {
            logits.data_ptr()
        }
        loss.backward()
        used = (targets >= 0).double()
        one_hot = F.one_hot(targets.clamp_min(0), vocab)
        slow = (logits.detach().double().softmax(-1) - one_hot) * (used / used.sum()).unsqueeze(1)
        assert relative_error(logits.grad, slow) < 1e-6

    @pytest.mark.parametrize(
        "sizes",
        [dict(), dict(n_expert=1, top_k=1), dict(moe_every=1, top_k=3, n_expert=8, n_layer=3), dict(n_shared=2)],
    )
    def test_flops_are_those_that_torch_counts(self, sizes):
        from torch.utils.flop_counter import FlopCounterMode

        def grouped(a, b, *args, out_shape=None, **kwargs):  # (S, K) @ (E, K, M); torch has no count for it
            return 2 * a[0] * a[1] * b[-1]

        model = GPT(config(**sizes)).eval()
        idx = torch.randint(0, 64, (2, 32))
        for width in [1.0] if model.config.n_expert == 1 else [1.0, 0.5, 0.25, RouterWidth(0.5, 0.0)]:
            counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped})
            model.read_stats()
            with counter, torch.no_grad(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
                model(idx, width=width)
            mean_width, width_run, _ = model.read_stats() if model.config.n_expert > 1 else (1.0, 1.0, None)
            slots = model.config.top_k + model.config.n_shared
            combine = 2 * slots * 32 * sum(b.moe for b in model.transformer.h)  # weighting experts' outputs
            total, expert = model.flops_per_token(width_run, 32)
            assert counter.get_total_flops() / idx.numel() == pytest.approx(total + combine, rel=1e-3)
            nominal = width if isinstance(width, float) else width.budget
            assert mean_width == pytest.approx(nominal, rel=1e-3) and expert == pytest.approx(
                nominal * model.flops_per_token(1.0, 32)[1]
            )

    def test_measured_widths_and_loads_are_what_ran(self):
        model, idx = GPT(config()), torch.randint(0, 64, (2, 32))
        for width, mean in ((1.0, 1.0), (0.25, 0.25), (RouterWidth(0.5, 0.0), 0.5)):
            model(idx, width=width)
            mean_width, width_run, load = model.read_stats()
            assert mean_width == width_run == pytest.approx(mean) and load.shape == (1, 4) and load.sum() == 2 * 64
        model(idx, width=RouterWidth(0.5, 2.0))
        mean_width, width_run, _ = model.read_stats()  # neurons that ran and were discarded count as run, not as width
        assert mean_width == pytest.approx(0.5, abs=0.025) and mean_width <= width_run < mean_width + 0.1
        assert model.read_stats()[0] == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_compiled_it_is_the_same_and_every_width_shares_two_graphs(self, dtype):
        torch._dynamo.reset()
        model, idx = GPT(config(n_layer=1)), torch.randint(0, 64, (2, 32))

        def gradients(width):
            model.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                _, loss, aux = model(idx, idx, width)
            (loss + aux).backward()
            return [loss.detach(), *(p.grad for p in model.parameters())]

        widths = [1.0, 0.5] + [level / 20 for level in range(2, 20, 3)]
        eager, graphs = [gradients(w) for w in widths], torch._dynamo.utils.counters["stats"]["unique_graphs"]
        model.body = torch.compile(model.body, fullgraph=True)  # no graph breaks
        for width, expected in zip(widths, eager):
            for a, b in zip(gradients(width), expected):
                assert relative_error(a, b) < (1e-5 if dtype == torch.float32 else 0.1)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs == 2  # the first width, then any width

    def test_compiled_decoding_shares_a_graph_at_every_position(self):
        torch._dynamo.reset()
        model, idx = GPT(config()).eval(), torch.randint(0, 64, (1, 5))
        expected = model.generate(idx, 20, temperature=0)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        model.body = torch.compile(model.body, fullgraph=True)
        assert torch.equal(model.generate(idx, 20, temperature=0), expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs == 2  # the prompt, then any position

    def test_compiled_router_widths_of_any_budget_share_graphs_too(self):
        torch._dynamo.reset()
        model, idx = GPT(config(n_layer=1)), torch.randint(0, 64, (2, 32))
        body = model.body
        model.body = torch.compile(body)
        counts = []
        for budget, gamma in ((0.5, 1.0), (0.3, 2.0), (0.7, 0.5), (0.2, 3.0)):
            _, loss, _ = model(idx, idx, RouterWidth(budget, gamma))
            loss.backward()
            assert relative_error(loss.detach(), body(idx, idx, RouterWidth(budget, gamma), None)[1].detach()) < 1e-5
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert counts[0] == counts[-1]

    @pytest.mark.parametrize("bad", [
        dict(top_k=5), dict(expert_hidden=12), dict(n_embd=33), dict(n_embd=36, n_head=2), dict(n_layer=0),
        dict(dropout=1.0), dict(n_shared=-1), dict(n_shared=1, n_expert=1),
    ])  # fmt: skip
    def test_a_config_that_cannot_work_is_refused(self, bad):
        with pytest.raises(UsageError, match=next(iter(bad))):
            config(**bad)

    def test_a_dense_model_has_no_width(self):
        for width in (0.5, RouterWidth(0.5)):
            with pytest.raises(UsageError, match="dense"):
                GPT(config(n_expert=1))(torch.zeros(1, 2, dtype=torch.long), width=width)


class TestGeneration:
    @pytest.mark.parametrize("width", [1.0, 0.25, RouterWidth(0.5, 1.0)])
    def test_the_cache_changes_no_token_also_when_the_context_is_full(self, width):
        torch.manual_seed(0)
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

    def test_the_cache_gives_the_logits_of_any_split_of_the_tokens(self):
        model, idx = GPT(config()).eval(), torch.randint(0, 64, (2, 20))
        whole, cache = model(idx)[0], KVCache(model.config)
        for start, stop in ((0, 7), (7, 8), (8, 15), (15, 20)):
            logits = model(idx[:, start:stop], cache=cache)[0]
            assert torch.allclose(logits[:, 0], whole[:, stop - 1], atol=1e-5)

    def test_sampling_is_seeded_and_never_leaves_the_vocabulary(self):
        model = GPT(config()).eval()
        idx = torch.zeros(1, 1, dtype=torch.long)

        def draw(seed, **kw):
            return model.generate(idx, 50, generator=torch.Generator().manual_seed(seed), **kw)

        assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
        assert draw(3, n_vocab=10).max() < 10 and draw(3).max() >= 10
        assert torch.equal(draw(1, top_k=1), model.generate(idx, 50, temperature=0))

    def test_a_prompt_that_does_not_fit_is_refused(self):
        model = GPT(config())
        for length in (0, 33):
            with pytest.raises(UsageError, match="do not fit"):
                model.generate(torch.zeros(1, length, dtype=torch.long), 1)


# -----------------------------------------------------------------------------
# The command lines, on a small model and the text of this repository


def command(program, *args, cwd):
    """Run a command line as a user would; returns (status, stdout, stderr)."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    p = subprocess.run(
        [sys.executable, HERE / f"{program}.py", *map(str, args)], cwd=cwd, capture_output=True, text=True, env=env
    )
    return p.returncode, p.stdout, p.stderr


def call(program, *args):
    """The same, in this process: quicker. Raises what the command line would print."""
    argv, sys.argv = sys.argv, [f"{program.__name__}.py", *map(str, args)]
    try:
        program.main()
    finally:
        sys.argv = argv


TINY = [
    "--dataset=tiny", "--n_layer=2", "--n_head=2", "--n_embd=32", "--n_expert=4", "--moe_every=1", "--block_size=32",
    "--batch_size=8", "--tokens_per_step=512", "--steps=40", "--eval_interval=20", "--eval_tokens=512",
    "--log_interval=5", "--warmup_steps=5", "--learning_rate=1e-2", "--device=cpu", "--dtype=float32",
]  # fmt: skip


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A folder with data/tiny and trained models in out/mose, out/moe and out/dense."""
    folder = tmp_path_factory.mktemp("workshop")
    before = os.getcwd()
    os.chdir(folder)
    try:
        call(prepare, *sorted(HERE.glob("*.py")), "--name=tiny")
        call(train, "demo", *TINY, "--out_dir=out/mose", "--recipe=mose")
        call(train, "demo", *TINY, "--out_dir=out/moe", "--recipe=moe")
        call(train, "demo", *TINY, "--out_dir=out/dense", "--recipe=moe", "--n_expert=1", "--top_k=1")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def inside(workshop, monkeypatch):
    monkeypatch.chdir(workshop)
    return workshop


def read_shard(path):
    header = np.fromfile(path, np.int32, 256)
    assert header[0] == 20240520 and header[1] == 1
    tokens = np.fromfile(path, np.uint16, offset=1024)
    assert len(tokens) == header[2]
    return tokens


def dataset_text(folder, split):
    ids = np.concatenate([read_shard(f) for f in sorted(Path(folder).glob(f"{split}_*.bin"))])
    return prepare.ByteTokenizer().decode_bytes(ids.tolist()).decode()


class TestPrepare:
    def test_stdlib_is_the_same_every_time_and_holds_no_tests(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        call(prepare, "stdlib")
        first = {f.name: f.read_bytes() for f in Path("data/stdlib").iterdir()}
        call(prepare, "stdlib")
        assert first == {f.name: f.read_bytes() for f in Path("data/stdlib").iterdir()}
        assert not any("test" in f.parts or "site-packages" in f.parts for f in prepare.stdlib_files())
        meta = json.loads(first["meta.json"])
        train_ids, val_ids = read_shard("data/stdlib/train_000000.bin"), read_shard("data/stdlib/val_000000.bin")
        assert (len(train_ids), len(val_ids)) == (meta["train_tokens"], meta["val_tokens"]) and meta[
            "vocab_size"
        ] == 257
        assert (train_ids == 256).sum() + (val_ids == 256).sum() == meta["documents"] > 100
        assert 0.02 < len(val_ids) / len(train_ids) < 0.3 and sorted(os.listdir("data")) == ["stdlib"]

    def test_files_of_all_kinds_arrive_whole(self, tmp_path, monkeypatch):
        import datasets

        monkeypatch.chdir(tmp_path)
        texts = [f"document {i}: äöü\r\n" + "x" * i for i in range(30)]
        os.mkdir("d")
        Path("d/a.txt").write_text(texts[0], newline="")
        Path("d/b.md").write_text(texts[1], newline="")
        Path("d/c.bin").write_bytes(b"\0not read")
        Path("d/empty.txt").write_text("")
        os.mkdir("d/.hidden")
        Path("d/.hidden/no.txt").write_text("not read")
        Path("e.jsonl").write_text("".join(json.dumps(dict(text=t, id=3)) + "\n" for t in texts[2:15]))
        datasets.Dataset.from_dict(dict(text=texts[15:])).to_parquet("f.parquet")
        call(prepare, "d", "e.jsonl", "f.parquet", "--name=all")
        end = "<|endoftext|>"
        assert dataset_text("data/all", "val") == "".join(t + end for t in texts[9::10])
        assert dataset_text("data/all", "train") == "".join(t + end for i, t in enumerate(texts) if i % 10 != 9)

    def test_a_single_file_is_split_at_its_tail(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        text = "".join(f"line {i}\n" for i in range(1000))
        Path("one.txt").write_text(text)
        call(prepare, "one.txt")
        a, b = dataset_text("data/one", "train"), dataset_text("data/one", "val")
        assert a + b == text + "<|endoftext|>" and a.endswith("\n") and 0.05 < len(b) / len(text) < 0.15

    def test_long_texts_and_many_shards_lose_nothing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(prepare, "PIECE", 100)
        monkeypatch.setattr(prepare, "SHARD_TOKENS", 1000)
        text = "".join(f"line {i}\n\n  indented\n" for i in range(500)) + "y" * 1000
        Path("long.txt").write_text(text)
        pieces = list(prepare.read_text(Path("long.txt")))
        assert "".join(p for p, _ in pieces) == text and [e for _, e in pieces] == [False] * (len(pieces) - 1) + [True]
        call(prepare, "long.txt")
        shards = sorted(Path("data/long").glob("*.bin"))
        assert [len(read_shard(f)) for f in shards].count(1000) >= 9
        assert sum(len(read_shard(f)) for f in shards) == len(text) + 1

    def test_a_killed_run_leaves_nothing_under_a_final_name_and_the_old_data_intact(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

        def killed():
            for i in range(50):
                yield "text " * 100, True
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare.write_dataset("d", killed(), "byte", "a test")
        assert not Path("data/d").exists()
        prepare.write_dataset("d", ((f"text {i}\n", True) for i in range(50)), "byte", "a test")
        before = Path("data/d/train_000000.bin").read_bytes()
        with pytest.raises(KeyboardInterrupt):
            prepare.write_dataset("d", killed(), "byte", "a test")
        assert Path("data/d/train_000000.bin").read_bytes() == before

    def test_openwebtext_checks_the_disk_then_takes_the_hubs_table(self, tmp_path, monkeypatch):
        import datasets

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        table = datasets.Dataset.from_dict(dict(text=[f"web page {i}" for i in range(40)]))
        asked = []

        def load_dataset(name, split, revision=None):
            asked.append((name, revision))
            if revision is None:
                raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
            return table

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 60e9))
        with pytest.raises(UsageError, match="72 GB are needed but 60 GB are free"):
            call(prepare, "openwebtext", "--tokenizer=byte")
        assert not asked and os.listdir("data") == []
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 80e9))
        call(prepare, "openwebtext", "--tokenizer=byte")
        assert asked == [("Skylion007/openwebtext", None), ("Skylion007/openwebtext", "refs/convert/parquet")]
        assert dataset_text("data/openwebtext", "val").split("<|endoftext|>")[:2] == ["web page 9", "web page 19"]

    def test_gpt2_tokens_do_not_depend_on_how_a_text_is_cut(self, tmp_path, monkeypatch):
        try:
            tokenizer = prepare.get_tokenizer("gpt2")
        except UsageError as e:
            pytest.skip(str(e))
        monkeypatch.setattr(prepare, "PIECE", 500)  # every 500 characters of prose have a place to cut
        text = (HERE / "README.md").read_text()
        (tmp_path / "t.txt").write_text(text)
        pieces = [piece for piece, _ in prepare.read_text(tmp_path / "t.txt")]
        assert len(pieces) > 15 and sum(
            (tokenizer.encode_ordinary(p) for p in pieces), []
        ) == tokenizer.encode_ordinary(text)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(prepare, "PIECE", len(text))
        call(prepare, "t.txt", "--tokenizer=gpt2")
        ids = np.concatenate([read_shard("data/t/train_000000.bin"), read_shard("data/t/val_000000.bin")])
        assert ids[-1] == 50256 and tokenizer.decode(ids[:-1].tolist()) == text


class TestTrain:
    def test_it_learns_and_logs_what_it_learned(self, inside):
        log = {name: [json.loads(line) for line in open(f"out/{name}/log.jsonl")] for name in ("mose", "moe", "dense")}
        for name, lines in log.items():
            val = [line["val_loss"] for line in lines if "val_loss" in line]
            assert [line["step"] for line in lines if "val_loss" in line] == [0, 20, 40]
            assert val[-1]["1"] < val[0]["1"] - 1.5
            assert set(val[0]) == ({"1"} if name == "dense" else {"1", "0.75", "0.5", "0.25"})
        steps = [line for line in log["mose"] if "grad_norm" in line]
        assert [line["step"] for line in steps] == list(range(5, 41, 5))
        assert all(line["loss_full"] > 0 and line["loss_narrow"] > 0 and line["tokens_per_s"] > 0 for line in steps)

    def test_checkpoints_are_plain_and_say_what_they_are(self, inside):
        for name in ("ckpt.pt", "last.pt"):
            c = torch.load(f"out/mose/{name}", weights_only=True)
            assert c["tokenizer"] == "byte" and c["vocab_size"] == 257 and c["recipe"] == "mose" and c["step"] == 40
            assert GPTConfig(**c["config"]).vocab_size == 320
            assert c["tokens"] == 40 * 512 and set(c["model"]) == set(GPT(GPTConfig(**c["config"])).state_dict())
        assert "optimizer" in c and "optimizer" not in torch.load("out/mose/ckpt.pt", weights_only=True)

    def test_a_resumed_run_is_the_run_that_was_never_stopped(self, inside, tmp_path):
        whole = torch.load("out/mose/last.pt", weights_only=True)
        out = f"--out_dir={tmp_path}/r"
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, HERE / "train.py", "demo", *TINY, out, "--recipe=mose"],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        for line in process.stdout:
            if line.startswith("step 10/"):
                process.send_signal(2)  # Ctrl-C
                break
        rest = process.stdout.read()
        assert process.wait() == 130 and "saved" in rest
        stopped = torch.load(tmp_path / "r/last.pt", weights_only=True)["step"]
        assert 10 <= stopped < 40
        call(train, "demo", "--resume", out, "--eval_interval=7")
        resumed = torch.load(tmp_path / "r/last.pt", weights_only=True)
        for name, p in whole["model"].items():
            assert torch.equal(p, resumed["model"][name]), name
        for a, b in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values()):
            assert all(torch.equal(a[key], b[key]) for key in a)

    def test_accumulation_does_not_change_which_tokens_a_step_sees(self, inside):
        data = train.open_dataset("tiny", 32)[0]
        whole = data.random_batch(7, 3, 0, 16)
        parts = [data.random_batch(7, 3, first, 4) for first in (0, 4, 8, 12)]
        assert torch.equal(whole[0], torch.cat([p[0] for p in parts])) and torch.equal(
            whole[1], torch.cat([p[1] for p in parts])
        )
        assert torch.equal(whole[0][:, 1:], whole[1][:, :-1])
        assert not torch.equal(whole[0], data.random_batch(7, 4, 0, 16)[0]) and not torch.equal(
            whole[0], data.random_batch(8, 3, 0, 16)[0]
        )

    def test_windows_cover_every_shard_and_never_cross_one(self, tmp_path):
        lengths, n = (10, 3, 8), 0
        for i, length in enumerate(lengths):
            header = np.zeros(256, np.int32)
            header[:3] = 20240520, 1, length
            (tmp_path / f"x_train_{i:06d}.bin").write_bytes(
                header.tobytes() + np.arange(n, n + length, dtype=np.uint16).tobytes()
            )
            n += 100
        shards = train.Shards(tmp_path, "train", block_size=4, vocab_size=1000)
        idx, targets = shards.windows(range(shards.ends[-1]))
        assert idx[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 200, 201, 202, 203] and torch.equal(targets, idx + 1)

    def test_a_loss_that_is_not_finite_stops_before_the_update(self, inside, tmp_path):
        with pytest.raises(UsageError, match=r"step \d+: loss .*saved .*last.pt.*--replay=\d"):
            call(
                train,
                "demo",
                *TINY,
                f"--out_dir={tmp_path}/n",
                "--learning_rate=1e30",
                "--grad_clip=0",
                "--warmup_steps=0",
            )
        saved = torch.load(tmp_path / "n/last.pt", weights_only=True)
        assert all(p.isfinite().all() for p in saved["model"].values()) and saved["step"] > 0  # as it was at that step

    def test_learning_rate_warms_up_and_ends_at_a_tenth(self):
        o = train.TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0)
        rates = [train.learning_rate(step, o) for step in range(101)]
        assert rates[0] == 0.1 and max(rates) == rates[9] == rates[10] == 1.0 and rates[100] == pytest.approx(0.1)

    def test_help_explains_every_option(self, workshop):
        status, out, _ = command("train", "--help", cwd=workshop)
        assert status == 0 and all(f"--{name}" in out for name in train.TrainConfig.__dataclass_fields__)

    def test_recipes_run_the_passes_they_promise(self):
        options = lambda recipe: train.TrainConfig(recipe=recipe)  # noqa: E731
        rng = np.random.default_rng(0)
        probs = torch.rand(50, 2).sort(-1, descending=True).values
        for _ in range(50):
            passes = {recipe: train.training_passes(options(recipe), rng) for recipe in train.RECIPES}
            assert passes["moe"] == [(1.0, 1)]
            full, narrow = passes["mose"]
            assert full == (1.0, 0.5) and narrow[0] in train.TRAIN_WIDTHS and narrow[1] == 0.5
            ((served, weight),) = passes["serve"]
            assert served.shape == (16, 2) and len(served.unique(dim=0)) == 16 and weight == 1
            assert (served >= torch.tensor([0.1, 0.0])).all() and (served <= torch.tensor([1.0, 3.0])).all()
            ((policy, weight),) = passes["m-moe"]
            widths = policy.widths(probs)
            assert widths.tolist() in ([[1, 0]] * 50, [[1, 1]] * 50) and policy.renormalize
        drawn = {policy.widths(probs)[0, 1].item() for _ in range(20)}
        assert drawn == {0, 1}, "one number of experts for all layers"

    @pytest.mark.parametrize("recipe", train.RECIPES)
    def test_every_recipe_learns(self, inside, tmp_path, recipe):
        call(train, "demo", *TINY, f"--out_dir={tmp_path}/r", f"--recipe={recipe}")
        lines = [json.loads(line) for line in open(tmp_path / "r/log.jsonl")]
        val = [line["val_loss"]["1"] for line in lines if "val_loss" in line]
        assert val[-1] < val[0] - 1.5
        assert ("loss_full" in lines[1]) == (recipe in ("moe", "mose"))
        assert ("loss_narrow" in lines[1]) == (recipe != "moe")

    def test_slimmable_recipes_keep_their_quality_when_narrow(self, inside, tmp_path):
        gap = {}
        for recipe in ("moe", "mose", "serve"):
            call(train, "demo", *TINY, f"--out_dir={tmp_path}/{recipe}", f"--recipe={recipe}", "--steps=150")
            losses = [json.loads(line) for line in open(tmp_path / recipe / "log.jsonl")][-1]["val_loss"]
            gap[recipe] = losses["0.25"] - losses["1"]
        assert max(gap["mose"], gap["serve"]) < 0.6 * gap["moe"]

    def test_a_narrow_model_has_narrow_experts(self):
        o = train.TrainConfig(train_width=0.25, n_embd=128, n_head=4)
        assert train.make_config(o, 257).expert_hidden == 128 and train.make_config(o, 257).vocab_size == 320

    def test_a_bias_balances_the_experts_without_a_loss(self, inside, tmp_path):
        spread = {}
        for rate in (0, 0.01):
            out = tmp_path / str(rate)
            call(train, "demo", *TINY, f"--out_dir={out}", "--recipe=moe", "--balance_coef=0", f"--bias_rate={rate}")
            last = [json.loads(line) for line in open(out / "log.jsonl")][-1]
            spread[rate] = max(last["busiest"]) - min(last["idlest"])
            model = torch.load(out / "last.pt", weights_only=True)["model"]
            assert ("transformer.h.0.mlp.bias" in model) == (rate > 0)
        assert spread[0.01] < 0.7 * spread[0]

    def test_two_runs_of_the_same_command_write_the_same_log(self, inside, tmp_path):
        def keep(line):
            return {k: v for k, v in json.loads(line).items() if "seconds" not in k and k != "tokens_per_s"}

        logs = []
        for name in ("a", "b"):
            call(train, "demo", *TINY, f"--out_dir={tmp_path}/{name}", "--dropout=0.1", "--recipe=serve")
            logs.append([keep(line) for line in open(tmp_path / name / "log.jsonl")])
        assert logs[0] == logs[1]

    @pytest.mark.parametrize("kills", [3, pytest.param(20, marks=LONG)])
    def test_a_run_killed_at_random_moments_loses_nothing(self, inside, tmp_path, kills):
        whole = torch.load("out/mose/last.pt", weights_only=True)
        out, rng = tmp_path / "k", np.random.default_rng(kills)
        every = [
            *TINY,
            f"--out_dir={out}",
            "--recipe=mose",
            "--eval_interval=1",
        ]  # so that a good part of the time goes into saving
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        killed = 0
        while killed < kills:
            resume = ["--resume"] if (out / "last.pt").exists() else []
            process = subprocess.Popen(
                [sys.executable, HERE / "train.py", "demo", *every, *resume], stdout=subprocess.PIPE, text=True, env=env
            )
            process.stdout.readline()  # from here on it works
            try:
                process.wait(rng.uniform(0.1, 1.5 if kills < 10 else 0.6))
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
            status, rest = process.wait(), process.stdout.read()
            assert status in (0, -9), rest
            for name in ("ckpt.pt", "last.pt"):  # whole, or not there at all
                if (out / name).exists():
                    train.load_checkpoint(out / name)
            if status == 0:  # all steps done: begin again
                self.assert_same(whole, torch.load(out / "last.pt", weights_only=True))
                shutil.rmtree(out)
        call(train, "demo", *every, *(["--resume"] if (out / "last.pt").exists() else []))
        self.assert_same(whole, torch.load(out / "last.pt", weights_only=True))

    @staticmethod
    def assert_same(a, b):
        """The same parameters and the same optimizer state, bit for bit."""
        assert a["step"] == b["step"] and all(torch.equal(p, b["model"][name]) for name, p in a["model"].items())
        for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values()):
            assert all(torch.equal(x[key], y[key]) for key in x)

    def test_a_stop_in_the_middle_of_an_accumulation_changes_nothing(self, inside, tmp_path):
        for name, steps in (("whole", 12), ("parts", 5)):
            call(train, "demo", *TINY, f"--out_dir={tmp_path}/{name}", "--batch_size=4", f"--steps={steps}")
        # the schedule ends elsewhere, so only the options differ: the first run's are what the second resumes to
        call(train, "demo", f"--out_dir={tmp_path}/parts", "--resume", "--steps=12")
        a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
        assert a["step"] == b["step"] == 12

    def test_a_resumed_run_writes_the_same_log(self, inside, tmp_path):
        def losses():
            lines = [json.loads(line) for line in open(tmp_path / "x/log.jsonl")]
            return [{k: v for k, v in line.items() if "seconds" not in k and k != "tokens_per_s"} for line in lines]

        options = [*TINY, f"--out_dir={tmp_path}/x", "--eval_interval=3", "--log_interval=4", "--recipe=serve"]
        call(train, "demo", *options, "--steps=12")
        straight = losses()
        shutil.rmtree(tmp_path / "x")
        stop = [3]  # checkpoints of steps 3 and 9 fall between log lines
        for _ in range(2):
            try:
                with pytest.MonkeyPatch.context() as patch:
                    step_rate = train.learning_rate

                    def killed(step, o):
                        if step == stop[0] + 1:
                            raise KeyboardInterrupt
                        return step_rate(step, o)

                    patch.setattr(train, "learning_rate", killed)
                    resume = ["--resume"] if (tmp_path / "x/last.pt").exists() else []
                    call(train, "demo", *options, "--steps=12", *resume)
            except KeyboardInterrupt:
                with open(tmp_path / "x/log.jsonl", "a") as f:
                    f.write('{"step": 5, "half a li')  # the disk was full, or the power went
            stop[0] = 9
        call(train, "demo", *options, "--steps=12", "--resume")
        assert losses() == straight

    def test_other_data_under_the_same_name_is_refused(self, inside, tmp_path):
        shutil.copytree("data/tiny", tmp_path / "d")
        options = [o for o in TINY if "dataset" not in o]
        call(train, "demo", *options, f"--dataset={tmp_path}/d", f"--out_dir={tmp_path}/x", "--steps=3")
        shard = tmp_path / "d/train_000000.bin"
        body = bytearray(shard.read_bytes())
        body[2000] ^= 1
        shard.write_bytes(body)
        with pytest.raises(UsageError, match="has changed"):
            call(train, "demo", "--resume", f"--out_dir={tmp_path}/x", "--steps=6")

    def test_a_second_run_in_the_same_folder_is_refused(self, inside, tmp_path):
        lock = train.lock_folder(tmp_path / "x")
        status, _, err = command("train", "demo", *TINY, f"--out_dir={tmp_path}/x", cwd=inside)
        assert status == 2 and "another run" in err and not (tmp_path / "x/last.pt").exists()
        lock.close()
        assert command("train", "demo", *TINY, f"--out_dir={tmp_path}/x", "--steps=1", cwd=inside)[0] == 0

    def test_a_full_disk_is_one_line_and_the_old_checkpoint_is_intact(self, inside, tmp_path):
        call(train, "demo", *TINY, f"--out_dir={tmp_path}/x", "--steps=5")
        limit = (tmp_path / "x/last.pt").stat().st_size // 2

        def small_files():  # what a full disk is to one file
            import resource
            import signal

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        p = subprocess.run(
            [sys.executable, HERE / "train.py", "demo", "--resume", f"--out_dir={tmp_path}/x", "--steps=9"],
            capture_output=True, text=True, preexec_fn=small_files,
        )  # fmt: skip
        assert p.returncode == 2 and p.stderr.count("\n") == 1 and "could not be written" in p.stderr
        assert train.load_checkpoint(tmp_path / "x/last.pt")["step"] == 5
        assert not list((tmp_path / "x").glob("*.tmp"))

    @pytest.mark.parametrize("recipe", ["moe", "mose", "serve"])
    def test_two_processes_train_as_one(self, inside, tmp_path, recipe):
        options = [*TINY, f"--recipe={recipe}", "--steps=20", "--eval_tokens=1088"]  # an odd number of sequences

        def losses(name, *launcher, **more):
            args = [*options, f"--out_dir={tmp_path}/{name}", *(f"--{k}={v}" for k, v in more.items())]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *launcher, HERE / "train.py", "demo", *args], check=True, env=env)
            log = [json.loads(line) for line in open(tmp_path / name / "log.jsonl")]
            return [v for line in log for k, v in line.items() if k.startswith("loss")] + [
                v for line in log for v in line.get("val_loss", {}).values()
            ]

        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        # two micro-batches: one each; one micro-batch: half of it each
        for batch_size in (8, 16):
            one = losses(f"1-{batch_size}", batch_size=batch_size)
            two = losses(f"2-{batch_size}", *torchrun, batch_size=batch_size)
            assert np.abs(np.array(one) - np.array(two)).max() < 1e-4 and len(one) > 8

    def test_a_step_can_be_replayed(self, inside, capsys):
        before = Path("out/mose/last.pt").stat().st_mtime_ns
        call(train, "demo", "--out_dir=out/mose", "--replay=3")
        out = capsys.readouterr().out
        assert out.count("step 3, micro-batch") == 4 and "gradient norm" in out  # two micro-batches, two passes each
        assert Path("out/mose/last.pt").stat().st_mtime_ns == before

    def test_a_run_killed_in_its_first_evaluation_goes_on(self, inside, tmp_path, monkeypatch):
        def die(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(train, "sequence_losses", die)
            call(train, "demo", *TINY, f"--out_dir={tmp_path}/a", "--steps=5")
        call(train, "demo", f"--out_dir={tmp_path}/a", "--resume")
        call(train, "demo", *TINY, f"--out_dir={tmp_path}/b", "--steps=5")
        logs = [[json.loads(line) for line in open(tmp_path / run / "log.jsonl")] for run in "ab"]
        assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == [0, 5, 5]
        assert logs[0][2]["val_loss"] == logs[1][2]["val_loss"]

    def test_a_collapsing_router_is_named(self, inside, tmp_path, capsys, monkeypatch):
        class Collapsed(GPT):
            def __init__(self, config):
                super().__init__(config)
                self.transformer.h[1].mlp.bias += torch.tensor([9.0] * 2 + [0.0] * 6)

        monkeypatch.setattr(train, "GPT", Collapsed)
        call(train, "demo", *TINY, f"--out_dir={tmp_path}/c", "--n_expert=8", "--eval_interval=10")
        out = capsys.readouterr().out
        assert "expert of MoE layer 1 gets 4.0 times" in out and "MoE layer 0" not in out
        monkeypatch.undo()
        monkeypatch.chdir(inside)
        call(train, "demo", *TINY, f"--out_dir={tmp_path}/even", "--n_expert=8", "--eval_interval=10")
        assert "warning" not in capsys.readouterr().out

    @pytest.mark.parametrize("steps", [400, pytest.param(2000, marks=LONG)])
    def test_memory_does_not_grow(self, inside, tmp_path, steps):
        script = f"""
import json, os, sys
sys.path.insert(0, {str(HERE)!r})
import train
resident = {{}}
load = train.Shards.random_batch
def watch(self, seed, step, *args):
    if step in ({steps} // 10, {steps} - 1):
        resident[step] = int(open("/proc/self/statm").read().split()[1])
    return load(self, seed, step, *args)
train.Shards.random_batch = watch
sys.argv = ["train.py", "demo", *{TINY!r}, "--out_dir={tmp_path}/m", "--steps={steps}", "--recipe=serve"]
train.main()
print(json.dumps(list(resident.values())))
"""
        p = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        early, late = json.loads(p.stdout.splitlines()[-1])
        assert late < 1.05 * early


class TestBench:
    def test_frontier_measures_every_policy_and_draws_it(self, inside, capsys):
        call(
            bench,
            "frontier",
            "out/mose/ckpt.pt",
            "out/moe/ckpt.pt",
            "out/dense/ckpt.pt",
            "--eval_tokens=2048",
            "--device=cpu",
        )
        results = json.load(open("out/mose/frontier.json"))
        points = {}
        for p in results["points"]:
            points.setdefault((p["checkpoint"].split("/")[1], p["policy"]), []).append(p)
            assert p["mean_width"] == pytest.approx(p["budget"], abs=0.025)
            assert p["flops_expert"] < p["flops_total"] and p["tokens_per_s"] > 0
            assert p["bits_per_byte"] == pytest.approx(p["loss"] / math.log(2))
        narrow = len(bench.BUDGETS) - 1
        assert {key: len(v) for key, v in points.items()} == {
            ("mose", "uniform"): narrow + 1, ("mose", "router"): narrow, ("mose", "calibrated"): narrow,
            ("mose", "skip"): 2, ("mose", "fewer experts"): 1,
            ("moe", "uniform"): 1, ("moe", "truncated"): narrow, ("moe", "fewer experts"): 1,
            ("moe", "skip"): 2, ("dense", "uniform"): 1,
        }  # fmt: skip
        for policy in ("router", "calibrated"):
            for p, u in zip(points["mose", policy], points["mose", "uniform"][1:]):
                assert (
                    p["minus_uniform"] == pytest.approx(p["loss"] - u["loss"], abs=1e-6) and p["minus_uniform_se"] > 0
                )
        for p in points["mose", "calibrated"]:
            assert len(p["layers"]) == 2 and all(0 <= b <= 1 and g >= 0 for b, g in p["layers"])
        assert Path("out/mose/frontier.png").read_bytes().startswith(b"\x89PNG")
        assert "calibrated" in capsys.readouterr().out

    def test_the_same_budget_costs_the_same_in_every_policy(self, inside):
        points = json.load(open("out/mose/frontier.json"))["points"] if Path("out/mose/frontier.json").exists() else []
        for p in points:
            if p["recipe"] == "mose":
                c = GPTConfig(**torch.load(p["checkpoint"], weights_only=True)["config"])
                at_mean = p["mean_width"] * 2 * c.n_layer * 4 * c.n_embd * c.expert_hidden
                assert at_mean * 0.999 <= p["flops_expert"] < at_mean * 1.2

    def test_policies_per_layer_give_shared_experts_their_budget(self):
        model = GPT(config(n_shared=1))
        policy = bench.PerLayer([RouterWidth(b, 2.0) for b in (0.25,)])
        model(torch.randint(0, 64, (4, 32)), width=policy)
        assert model.read_stats()[0] == pytest.approx(0.25, abs=0.02)

    def test_losses_are_compared_where_as_many_flops_ran(self):
        point = lambda policy, flops, loss: dict(policy=policy, flops_expert=flops, loss=loss)  # noqa: E731
        one = dict(points=[point("uniform", 100.0, 1.0), point("uniform", 25.0, 2.0), point("router", 60.0, 1.1),
                           point("router", 40.0, 1.5), point("skip", 70.0, 0.9)])  # fmt: skip
        assert bench.best_at(one, 1.0) == (1.0, "full width")
        assert bench.best_at(one, 0.5) == (pytest.approx(1.3), "router")  # uniform would have 1.67
        assert bench.best_at(one, 0.85) == (pytest.approx(0.95), "skip")
        assert bench.best_at(one, 0.25) == (2.0, "uniform") and bench.best_at(one, 0.2) is None

    def test_the_study_trains_its_rows_once_and_reports_them(self, workshop, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("data").mkdir()
        os.symlink(workshop / "data/tiny", "data/stdlib")
        small = dict(n_layer=2, n_head=2, n_embd=32, n_expert=4, block_size=32, batch_size=8, tokens_per_step=512)
        small.update(steps=40, warmup_steps=5, eval_tokens=512, device="cpu")
        rows = {"moe": (2, dict(recipe="moe", **small)), "serve": (1, dict(recipe="serve", **small))}
        monkeypatch.setattr(bench, "STUDY", rows)
        call(bench, "study")
        runs = json.load(open("results/study.json"))["runs"]
        assert [(r["row"], r["seed"], r["steps"]) for r in runs] == [
            ("moe", 1337, 40), ("moe", 1338, 40), ("serve", 1337, 40)
        ]  # fmt: skip
        assert runs[2]["training_flops"] < 0.95 * runs[0]["training_flops"] == 0.95 * runs[1]["training_flops"]
        table = Path("results/study.md").read_text()
        losses = [r["points"][0]["loss"] for r in runs]
        moe = f"{(losses[0] + losses[1]) / 2:.3f} ± {abs(losses[0] - losses[1]) / 2:.3f}"
        assert f"| moe | 2 | 40 | {runs[0]['training_flops']:.3g} | {moe} |" in table
        assert f"| serve: full width, minus moe | {losses[2] - losses[0]:+.3f} |" in table
        assert all((Path("results") / f"{name}.png").stat().st_size > 10_000 for name in ("study", "training"))

        files = {f: f.stat().st_mtime_ns for f in Path("out").rglob("*.*")}
        call(bench, "study")  # everything is there
        assert files == {f: f.stat().st_mtime_ns for f in Path("out").rglob("*.*")}
        rows["serve"][1]["learning_rate"] = 0.1
        with pytest.raises(UsageError, match="other options"):
            call(bench, "study")

    def test_what_speed_times_has_all_gradients_every_time(self, monkeypatch):
        counts = []
        grad = torch.autograd.grad
        monkeypatch.setattr(torch.autograd, "grad", lambda y, x, g: counts.append(len(x)) or grad(y, x, g))
        for f, _, _ in bench.layer_cases(config(), "cpu", torch.float32, 64, True).values():
            f(), f()
        assert counts == [4, 4, 3, 3] * len(bench.COLUMNS)

    def test_calibration_does_not_touch_the_weights(self, inside):
        model, _ = train.load_model("out/mose/ckpt.pt")
        before = {n: p.clone() for n, p in model.state_dict().items()}
        data = train.open_dataset("tiny", 32)[0]
        batches = [data.random_batch(0, i, 0, 4) for i in range(5)]
        layers = bench.calibrate(model, batches, 0.5, "cpu", torch.float32).policies
        assert len(layers) == 2 and all(p.gamma != 1.0 for p in layers) and layers[0].budget != layers[1].budget
        assert sum(p.budget for p in layers) / 2 == pytest.approx(0.5) and all(
            torch.equal(p, before[n]) for n, p in model.state_dict().items()
        )
        assert all(p.grad is None for p in model.parameters())


class TestSample:
    def test_the_same_seed_gives_the_same_text_at_a_width_and_reports_it(self, inside, capsys):
        def text(*args):
            call(sample, "--checkpoint=out/mose/ckpt.pt", "--num_tokens=40", "--prompt=def ", *args)
            return capsys.readouterr().out

        a, b = text("--width=0.5"), text("--width=0.5")
        strip = lambda out: [line for line in out.splitlines() if "tokens/s" not in line]  # noqa: E731
        assert strip(a) == strip(b) and a.splitlines()[1].startswith("def ") and "mean width 0.500" in a
        assert strip(text("--seed=1")) != strip(text("--seed=2"))
        assert "mean width 0.2" in text("--budget=0.25", "--gamma=2")
        out = text("--compare=1.0,0.25")
        assert (
            out.index("width 1\n")
            < out.index("mean width 1.000")
            < out.index("width 0.25\n")
            < out.index("mean width 0.250")
        )
        Path("prompt.txt").write_text("import os")
        assert "import os" in text("--prompt=FILE:prompt.txt", "--num_samples=2")


# -----------------------------------------------------------------------------
# Bad input: one clear line, status 2, nothing written


def damaged(path, kind):
    """Write a shard, text or checkpoint that is damaged in the given way."""
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 100
    tokens = np.arange(100, dtype=np.uint16)
    body = {
        "empty": b"", "short header": header.tobytes()[:100], "magic": bytes(1024) + tokens.tobytes(),
        "count": header.tobytes() + tokens[:50].tobytes(), "ids": header.tobytes() + (tokens + 60000).tobytes(),
    }[kind]  # fmt: skip
    Path(path).mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        (Path(path) / f"{split}_000000.bin").write_bytes(body)


BAD = [  # program, arguments, what the line must name
    ("train", ["dmeo"], "dmeo"),
    ("train", ["demo", "--lerning_rate=1"], "did you mean --learning_rate"),
    ("train", ["demo", "--steps=many"], "many"),
    ("train", ["demo", "--recipe=mouse"], "mouse"),
    ("train", ["demo", "--dataset=nowhere"], "nowhere"),
    ("train", ["demo", *TINY, "--out_dir=x", "--top_k=5"], "top_k 5"),
    ("train", ["demo", *TINY, "--out_dir=x", "--expert_hidden=100"], "expert_hidden"),
    ("train", ["demo", *TINY, "--out_dir=x", "--tokens_per_step=100"], "multiple"),
    ("train", ["demo", *TINY, "--out_dir=x", "--block_size=100000000", "--tokens_per_step=800000000"], "eval_tokens"),
    ("train", ["demo", *TINY, "--out_dir=x", "--n_expert=1"], "needs experts"),
    ("train", ["demo", *TINY, "--out_dir=x", "--device=tpu"], "tpu"),
    ("train", ["demo", *TINY, "--out_dir=x", "--steps=0"], "steps"),
    ("train", ["demo", *TINY, "--out_dir=out/mose"], "already holds a run"),
    ("train", ["demo", "--resume", "--out_dir=out/mose", "--n_layer=5"], "n_layer=5 contradicts"),
    ("train", ["55m", "--resume", "--out_dir=out/mose"], "preset demo"),
    ("train", ["demo", "--resume", "--out_dir=x"], "no checkpoint"),
    *[("train", ["demo", *TINY, "--out_dir=x", f"--dataset=bad/{kind}"], word) for kind, word in (
        ("empty", "not a shard"), ("short header", "not a shard"), ("magic", "20240520"),
        ("count", "header says 100"), ("ids", "60099"),
    )],
    ("sample", ["--checkpoint=nowhere.pt"], "nowhere.pt"),
    ("sample", ["--checkpoint=foreign.pt"], "lacks"),
    ("sample", ["--checkpoint=garbage.pt"], "damaged"),
    ("sample", ["--checkpoint=out/mose/ckpt.pt", "--width=1.5"], "1.5"),
    ("sample", ["--checkpoint=out/mose/ckpt.pt", "--budget=0"], "budget"),
    ("sample", ["--checkpoint=out/mose/ckpt.pt", "--width=0.5", "--budget=0.5"], "exclude each other"),
    ("sample", ["--checkpoint=out/mose/ckpt.pt", "--gamma=2"], "--budget too"),
    ("sample", ["--checkpoint=out/mose/ckpt.pt", "--compare=1,two"], "1,two"),
    ("sample", ["--checkpoint=out/mose/ckpt.pt", "--prompt=" + "a" * 40], "40 tokens"),
    ("sample", ["--checkpoint=out/mose/ckpt.pt", "--prompt=FILE:nowhere.txt"], "nowhere.txt"),
    ("sample", ["--checkpoint=out/mose/ckpt.pt", "--temperature=nan"], "temperature"),
    ("sample", ["--checkpoint=out/dense/ckpt.pt", "--width=0.5"], "dense"),
    ("bench", ["frontier", "nowhere.pt"], "nowhere.pt"),
    ("bench", ["frontier", "out/mose/ckpt.pt", "--dataset=nowhere"], "nowhere"),
    ("bench", ["frontyear"], "frontyear"),
    ("prepare", ["nowhere.txt"], "nowhere.txt"),
    ("prepare", ["bad/blank.txt"], "too little text"),
    ("prepare", ["bad/binary.txt"], "NUL"),
    ("prepare", ["bad/latin.txt"], "UTF-8"),
    ("prepare", ["bad/picture.png"], "picture.png"),
    ("prepare", ["bad/nothing"], "bad/nothing"),
    ("prepare", ["bad/other.jsonl"], "field 'text'"),
    ("prepare", ["bad/broken.jsonl"], "broken.jsonl"),
    ("prepare", ["bad/broken.parquet"], "broken.parquet"),
    ("prepare", ["stdlib", "--tokenizer=gpt5"], "gpt5"),
    ("prepare", ["stdlib", "--name=../up"], "../up"),
    ("prepare", ["stdlib", "notes.txt"], "alone"),
    ("prepare", ["bad/latin.txt", "--name=precious"], "not written by prepare.py"),
    # options that cannot work together, or at all
    ("train", [], "preset"),
    ("train", ["demo", "--resume=maybe"], "maybe"),
    ("train", ["demo", *TINY, "--out_dir=x", "--seed=-1"], "seed"),
    ("train", ["demo", *TINY, "--out_dir=x", "--seed=99999999999999999999"], "2**63"),
    ("train", ["demo", *TINY, "--out_dir=x", "--device=cpu:x"], "cpu:x"),
    ("sample", ["--checkpoint=out/mose/ckpt.pt", "--budget=0.5", "--gamma=1e39"], "1e6"),
    ("train", ["demo", *TINY, "--out_dir=x", "--learning_rate=nan"], "learning_rate"),
    ("train", ["demo", *TINY, "--out_dir=x", "--learning_rate=0"], "learning_rate"),
    ("train", ["demo", *TINY, "--out_dir=x", "--weight_decay=inf"], "weight_decay"),
    ("train", ["demo", *TINY, "--out_dir=x", "--dropout=1"], "dropout"),
    ("train", ["demo", *TINY, "--out_dir=x", "--train_width=1.5"], "--train_width"),
    ("train", ["demo", *TINY, "--out_dir=x", "--n_shared=-1"], "n_shared"),
    ("train", ["demo", *TINY, "--out_dir=x", "--n_head=3"], "n_head 3"),
    ("train", ["demo", *TINY, "--out_dir=x", "--dtype=float16"], "float16"),
    ("train", ["demo", *TINY, "--out_dir=x", "--eval_tokens=8"], "eval_tokens"),
    ("train", ["demo", *TINY, "--out_dir=garbage.pt"], "garbage.pt"),
    ("train", ["demo", "--out_dir=out/mose", "--replay=41"], "1 to 40"),
    ("train", ["demo", *TINY, "--out_dir=bad/model"], "already holds a run"),
    ("sample", ["--checkpoint=bad/flipped.pt"], "does not match its checksum"),
    ("bench", ["frontier", "out/mose/ckpt.pt", "--eval_tokens=10"], "eval_tokens"),
    ("bench", ["frontier", "out/mose/ckpt.pt", "--batch_size=0"], "batch_size"),
    ("prepare", ["bad/two words.txt"], "--name"),
    ("train", ["demo", "--out_dir=x", "--replay=3"], "no checkpoint"),
    ("train", ["demo", "--resume", "--out_dir=out/mose", "--seed=2"], "seed=2 contradicts"),
    ("train", ["demo", "--resume", "--out_dir=out/mose", "--recipe=moe"], "recipe=moe contradicts"),
    ("train", ["demo", "--resume", "--out_dir=out/mose", "--dataset=other"], "dataset=other contradicts"),
    ("train", ["demo", "--resume", "--out_dir=bad/half"], "damaged"),
    ("train", ["demo", "--resume", "--out_dir=bad/bomb"], "damaged"),
    ("train", ["demo", "--resume", "--out_dir=bad/best"], "lacks optimizer"),
    # shards
    ("train", ["demo", *TINY, "--out_dir=x", "--dataset=bad/directory"], "train_000000.bin"),
    ("train", ["demo", *TINY, "--out_dir=x", "--dataset=bad/loop"], "train_000000.bin"),
    ("train", ["demo", *TINY, "--out_dir=x", "--dataset=bad/nothing"], "no *train*.bin"),
    ("train", ["demo", *TINY, "--out_dir=x", "--dataset=bad/short"], "block_size 32"),
    ("train", ["demo", *TINY, "--out_dir=x", "--dataset=bad/meta"], "meta.json is damaged"),
    # checkpoints
    ("sample", ["--checkpoint=bad/empty.pt"], "damaged"),
    ("sample", ["--checkpoint=bad/half/last.pt"], "damaged"),
    ("sample", ["--checkpoint=bad/bomb/last.pt"], "damaged"),
    ("sample", ["--checkpoint=bad"], "no checkpoint"),
    ("sample", ["--checkpoint=bad/other.pt"], "does not fit"),
    ("sample", ["--checkpoint=bad/newer.pt"], "does not fit"),
    ("sample", ["--checkpoint=bad/keys.pt"], "does not fit"),
    ("bench", ["frontier", "bad/bomb/last.pt"], "damaged"),
    ("bench", ["frontier", "out/mose/ckpt.pt", "--eval_tokens=-1"], "eval_tokens"),
    ("bench", ["speed", "--preset=2b"], "2b"),
    ("bench", ["speed", "--checkpoint=out/dense/ckpt.pt"], "dense"),
    ("bench", ["study", "--rows=moose"], "moose"),
    # prompts
    ("sample", ["--checkpoint=out/mose/ckpt.pt", "--prompt=FILE:bad/latin.txt"], "UTF-8"),
    ("sample", ["--checkpoint=out/mose/ckpt.pt", "--prompt=FILE:bad"], "bad"),
    ("sample", ["--checkpoint=out/mose/ckpt.pt", "--num_tokens=0"], "num_tokens"),
    ("sample", ["--checkpoint=out/mose/ckpt.pt", "--top_k=-3"], "top_k"),
    ("sample", ["--checkpoint=out/mose/ckpt.pt", "--budget=0.01"], "budget"),
    ("sample", ["--checkpoint=out/mose/ckpt.pt", "--budget=0.5", "--gamma=-1"], "gamma"),
    ("sample", ["--checkpoint=bad/tokenizer.pt"], "tokenizer"),
    # text
    ("prepare", [], "source"),
    ("prepare", ["bad/loop/train_000000.bin"], "no such file"),
    ("prepare", ["bad/numbers.jsonl"], "field 'text'"),
    ("prepare", ["bad/lines.jsonl"], "lines.jsonl"),
    ("prepare", ["bad/one.txt"], "too little text"),
]  # fmt: skip


class Bomb:
    def __reduce__(self):
        return open, ("bomb_went_off", "w")


class TestBadInput:
    @pytest.fixture(scope="class")
    @staticmethod
    def scene(workshop):
        for kind in ("empty", "short header", "magic", "count", "ids"):
            damaged(workshop / "bad" / kind, kind)
        for name, body in {
            "bad/blank.txt": b"", "bad/binary.txt": b"a\0b" * 100, "bad/latin.txt": "é".encode("latin-1") * 10,
            "bad/picture.png": b"\x89PNG", "bad/nothing/x.png": b"", "bad/other.jsonl": b'{"body": "a"}\n',
            "bad/broken.jsonl": b'{"text": "a"', "bad/broken.parquet": b"PAR1 no",
            "garbage.pt": os.urandom(1000), "data/precious/diary": b"x",
        }.items():  # fmt: skip
            (workshop / name).parent.mkdir(parents=True, exist_ok=True)
            (workshop / name).write_bytes(body)
        torch.save({"weights": torch.zeros(3)}, workshop / "foreign.pt")
        bad = workshop / "bad"
        for folder in (
            "directory/train_000000.bin",
            "directory/val_000000.bin",
            "half",
            "bomb",
            "best",
            "loop",
            "meta",
        ):
            (bad / folder).mkdir(parents=True)
        for split in ("train", "val"):
            os.symlink(f"{split}_000000.bin", bad / f"loop/{split}_000000.bin")
            header = np.zeros(256, np.int32)
            header[:3] = 20240520, 1, 20
            (bad / "short").mkdir(exist_ok=True)
            (bad / f"short/{split}_000000.bin").write_bytes(header.tobytes() + bytes(40))
        (bad / "meta/meta.json").write_text("{")
        whole = (workshop / "out/mose/last.pt").read_bytes()
        (bad / "half/last.pt").write_bytes(whole[: len(whole) // 2])
        (bad / "empty.pt").write_bytes(b"")
        (bad / "model").mkdir()
        (bad / "model/ckpt.pt").write_bytes(whole)
        (bad / "flipped.pt").write_bytes(whole[:20000] + bytes([whole[20000] ^ 64]) + whole[20001:])
        (bad / "two words.txt").write_text("text\n" * 100)
        torch.save(Bomb(), bad / "bomb/last.pt")  # a pickle that runs code
        shutil.copy(workshop / "out/mose/ckpt.pt", bad / "best/last.pt")
        for name, change in {
            "other": lambda c: c["config"].update(n_embd=64), "newer": lambda c: c["config"].update(n_moons=2),
            "keys": lambda c: c["model"].pop("transformer.wpe.weight"),
            "tokenizer": lambda c: c.update(tokenizer="llama"),
        }.items():  # fmt: skip
            c = torch.load(workshop / "out/mose/ckpt.pt", weights_only=True)
            change(c)
            torch.save(c, bad / f"{name}.pt")
        (bad / "numbers.jsonl").write_text('{"text": 3}\n')
        (bad / "lines.jsonl").write_text("no json\n" * 3)
        (bad / "one.txt").write_text("x")
        return workshop

    @staticmethod
    def files(folder):
        return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}

    @pytest.mark.parametrize(
        "program, args, word", BAD, ids=[f"{p} {' '.join(x for x in a if x not in TINY)[:50]}" for p, a, _ in BAD]
    )
    def test_is_one_clear_line(self, scene, monkeypatch, capsys, program, args, word):
        monkeypatch.chdir(scene)
        before, started = self.files(scene), time.process_time()
        with pytest.raises(SystemExit) as e:
            prepare.run(
                lambda: call({"train": train, "sample": sample, "bench": bench, "prepare": prepare}[program], *args),
                program,
            )
        err = capsys.readouterr().err.splitlines()
        assert e.value.code == 2 and len(err) == 1 and err[0].startswith(f"{program}: ") and word in err[0], err
        assert self.files(scene) == before and not Path("bomb_went_off").exists()
        assert time.process_time() - started < 2

    def test_and_status_2_from_the_shell(self, scene):
        for program, args in (
            ("train", ["demo", "--stepps=1"]),
            ("sample", ["--checkpoint=garbage.pt"]),
            ("prepare", ["nowhere"]),
            ("bench", []),
        ):
            status, out, err = command(program, *args, cwd=scene)
            assert status == 2 and err.startswith(f"{program}.py: ") and err.count("\n") == 1
