"""What model.py promises, checked against slow and obvious formulas in float64."""

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from model import (
    GPT,
    STEPS,
    GPTConfig,
    KVCache,
    PerLayer,
    RouterStats,
    RouterWidth,
    SlimmableMoE,
    TopExperts,
    UsageError,
    grouped_mm,
    run_experts,
    width_to_neurons,
)

torch.set_num_threads(1)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def tiny_config(**options):
    defaults = dict(block_size=32, vocab_size=64, n_layer=2, n_head=1, n_embd=32, n_expert=4, moe_every=1)
    return GPTConfig(**defaults | options)


def tiny_model(**options):
    """A GPT with weights so large that its routers have clear preferences."""
    torch.manual_seed(0)
    model = GPT(tiny_config(**options))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model


def tiny_layer(**options):
    torch.manual_seed(0)
    layer = SlimmableMoE(tiny_config(**options))
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return layer


def random_tokens(*shape, n_vocab=64):
    return torch.randint(n_vocab, shape, generator=torch.Generator().manual_seed(0))


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(0.01)).item()


def neurons_or_policy(width):
    """A layer takes a number of neurons where GPT takes a number: here of 128."""
    return width_to_neurons(width, 128) if isinstance(width, float) else width


# -----------------------------------------------------------------------------
# The layer


def reference_layer(layer, x, width):
    """The layer token by token and expert by expert in float64. Experts and widths are chosen in float32, as in model.py.

    x: (N, d). width: a number or a policy. A width between two steps is a mixture of both.
    """
    c, router, w_in, w_out = layer.config, layer.router.weight, layer.w_in.double(), layer.w_out.double()
    probs = F.linear(x.float(), router.float()).softmax(-1)
    chosen = (probs + layer.bias).topk(c.top_k).indices
    chosen = chosen.gather(-1, probs.gather(-1, chosen).argsort(-1, descending=True))  # the likeliest first
    exact = F.linear(x.double(), router.double()).softmax(-1).gather(-1, chosen)
    uniform = isinstance(width, float)
    widths = torch.full_like(exact, width) if uniform else width.widths(probs.gather(-1, chosen).detach()).double()

    def expert(e, token, width):
        h = width_to_neurons(width, c.hidden) if width > 0 else 0
        return F.gelu(w_in[e, :h] @ token) @ w_out[e, :h]

    def slimmable_expert(e, token, width):
        if uniform:
            return expert(e, token, width.item())
        low = min(math.floor(STEPS * width), STEPS - 1)
        share = STEPS * width - low
        return (1 - share) * expert(e, token, low / STEPS) + share * expert(e, token, (low + 1) / STEPS)

    outputs = []
    for n, token in enumerate(x.double()):
        weights = exact[n] * (widths[n] > 0)
        if c.norm_topk_prob:
            weights = weights / weights.sum()
        y = sum(p * slimmable_expert(e, token, w) for e, p, w in zip(chosen[n], weights, widths[n]))
        shared = widths[n].mean()
        if not uniform and not getattr(width, "continuous", False):
            shared = (STEPS * shared).round() / STEPS
        outputs.append(y + sum(slimmable_expert(c.n_expert + i, token, shared) for i in range(c.n_shared)))
    return torch.stack(outputs)


class Rows:
    """A policy of the reader's own: the first token gets the first row of widths, and so on, again and again."""

    def __init__(self, *rows):
        self.rows = rows

    def widths(self, probs):
        n, k = probs.shape
        rows = [self.rows[i % len(self.rows)] for i in range(n)]
        return torch.tensor([(row * k)[:k] for row in rows], device=probs.device)


WIDTHS = {
    "full": 1.0, "half": 0.5, "0.3": 0.3, "router 0.5": RouterWidth(0.5), "router 0.25": RouterWidth(0.25, 3.0),
    "router 0.9": RouterWidth(0.9, 0.5), "top 1": TopExperts(1), "top 1.6": TopExperts(1.6),
    "own": Rows([1.0, 0.5, 0.0], [0.125, 0.75], [0.25]), "blend": RouterWidth(0.4, 2.0, continuous=True),
    "blend full": RouterWidth(1.0, continuous=True),
}  # fmt: skip
LAYERS = {
    "top-2": dict(), "top-1": dict(top_k=1), "plain weights": dict(norm_topk_prob=False),
    "top-1, plain weights": dict(top_k=1, norm_topk_prob=False), "fine-grained": dict(n_expert=32, top_k=7, expert_hidden=24),
    "shared": dict(n_shared=2, top_k=3), "bias": dict(bias_rate=0.1, top_k=3), "all experts": dict(top_k=4, n_shared=1),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_and_its_gradients_match_slow_formula(layer, width, device):
    rng = random.Random(layer + width)
    sizes = dict(n_embd=8 * rng.randint(1, 6), expert_hidden=8 * rng.randint(1, 20))
    layer, width = tiny_layer(**sizes | LAYERS[layer]).to(device), WIDTHS[width]
    if layer.config.bias_rate:
        layer.bias += torch.linspace(-0.3, 0.3, 4, device=device)
    x = torch.randn(2, rng.randint(1, 12), layer.config.n_embd, device=device, requires_grad=True)
    y, _ = layer(x, width_to_neurons(width, layer.config.hidden) if isinstance(width, float) else width)
    expected = reference_layer(layer, x.flatten(0, 1), width).view_as(y)
    inputs, g = (x, layer.w_in, layer.w_out, layer.router.weight), torch.randn_like(y)
    grads = torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g.double())
    tolerance = 1e-5 if device == "cpu" else 5e-3  # tensor cores round
    assert relative_error(y, expected) < tolerance
    for got, slow in zip(*grads):
        assert relative_error(got, slow) < 5 * tolerance


@pytest.mark.parametrize("device", DEVICES)
def test_float64_layer_matches_float32_layer(device):
    layer, x = tiny_layer().to(device), torch.randn(20, 32, device=device)
    for width in (64, RouterWidth(0.5)):
        y = layer.float()(x, width)[0]
        assert relative_error(y, layer.double()(x.double(), width)[0]) < (1e-5 if device == "cpu" else 5e-3)


def test_gpt_with_a_policy_per_layer_and_its_gradients_match_slow_layers():
    model, idx, targets = tiny_model(n_layer=5, moe_every=2, n_head=2), random_tokens(2, 16), random_tokens(2, 16)
    each_token = RouterWidth(torch.rand(32, 1).clamp_min(0.1), 3 * torch.rand(32, 1))
    policies = [each_token, None, TopExperts(3 * torch.rand(32, 1)), None, RouterWidth(0.5, 0.0)]
    slow = copy.deepcopy(model).double()
    for block, policy in zip(slow.transformer.h, policies):
        if policy is not None:

            def forward(x, width, layer=block.mlp, policy=policy):
                y = reference_layer(layer, x.flatten(0, 1), policy).view_as(x)
                return y, RouterStats(y.new_zeros(()), y.new_zeros(4), y.new_ones(()))

            block.mlp.forward = forward
    loss, expected = model(idx, targets, width=PerLayer(policies))[1], slow(idx, targets)[1]
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for p, q in zip(model.parameters(), slow.parameters()):
        assert relative_error(p.grad, q.grad) < 1e-3


@pytest.mark.parametrize("width", [0.25, 0.6, 1.0])
def test_neurons_beyond_the_width_neither_matter_nor_learn(width):
    layer, x, h = tiny_layer(), torch.randn(30, 32), width_to_neurons(width, 128)
    y = layer(x, h)[0]
    y.square().sum().backward()
    for w in (layer.w_in, layer.w_out):
        assert w.grad[:, :h].abs().sum(-1).all() and not w.grad[:, h:].any()
        w.data[:, h:] = math.nan
    assert torch.equal(layer(x, h)[0], y)


def test_skipped_experts_neither_matter_nor_learn():
    layer, x = tiny_layer(n_expert=2), torch.randn(30, 32).abs()
    layer.router.weight.data = torch.tensor([[0.1], [0.0]]).expand(2, 32).clone()  # expert 0 is likelier for all tokens
    y = layer(x, TopExperts(1))[0]
    y.sum().backward()
    assert layer.w_in.grad[0].any() and not layer.w_in.grad[1].any()
    layer.w_in.data[1] = math.nan
    assert torch.equal(layer(x, TopExperts(1))[0], y)


@pytest.mark.parametrize("width", ["full", "half", "router 0.5", "top 1.6", "blend"])
def test_outputs_depend_on_no_other_token_of_the_layer_and_no_later_token_of_the_text(width):
    layer, x, width = tiny_layer(n_shared=1), torch.randn(40, 32), WIDTHS[width]
    alone = torch.cat([layer(token[None], neurons_or_policy(width))[0] for token in x])
    assert relative_error(layer(x, neurons_or_policy(width))[0], alone) < 1e-5
    model, idx = tiny_model().eval(), random_tokens(2, 20)
    before = model(idx, width=width)[0]
    idx[0, 12:], idx[1] = 1, 2
    after = model(idx, width=width)[0]
    assert relative_error(after[0, :12], before[0, :12]) < 1e-5 < relative_error(after[0, 12:], before[0, 12:])


def test_run_experts_takes_any_mlp():
    def swiglu(x, offs, gate, up, down):
        return grouped_mm(F.silu(grouped_mm(x, gate.mT, offs)) * grouped_mm(x, up.mT, offs), down, offs)

    torch.manual_seed(0)
    x, weight, matrices = torch.randn(30, 16), torch.randn(30, 3), [torch.randn(5, 40, 16) for _ in range(3)]
    expert, neurons = torch.randint(5, (30, 3)), 8 * torch.randint(6, (30, 3))
    expected = torch.zeros(30, 16)
    for n in range(30):
        for e, w, h in zip(expert[n], weight[n], neurons[n]):
            gate, up, down = (m[e, :h] for m in matrices)
            expected[n] += w * ((F.silu(gate @ x[n]) * (up @ x[n])) @ down)
    assert relative_error(run_experts(x, expert, weight, neurons, swiglu, *matrices), expected) < 1e-5


@pytest.mark.parametrize("width, neurons", [(1.0, 128), (0.25, 32), (RouterWidth(0.5), 64)])
def test_router_losses_load_and_width_follow_their_formulas(width, neurons):
    layer, x = tiny_layer(), torch.randn(50, 32)
    stats = layer(x, neurons_or_policy(width))[1]
    logits = F.linear(x, layer.router.weight).double()
    selected = torch.zeros(50, 4).scatter(1, logits.topk(2).indices, 1.0)
    balance = 4 * (selected.sum(0) / 100 * logits.softmax(-1).mean(0)).sum()  # Switch Transformers, equation 4
    assert stats.loss.item() == pytest.approx((0.01 * balance + 0.001 * logits.logsumexp(-1).square().mean()).item())
    assert stats.load.tolist() == selected.sum(0).tolist() and stats.width.item() == neurons / 128
    model, idx = tiny_model(n_layer=3, moe_every=2), random_tokens(2, 16)
    stats = model(idx, idx, width=width)[2]
    assert stats.load.sum(1).tolist() == [64, 64] and stats.width.tolist() == [neurons / 128] * 2
    assert stats.loss > 0.02 and model.eval()(idx, idx)[2].loss == 0


# -----------------------------------------------------------------------------
# Widths and policies


def test_neurons_are_the_nearest_multiple_of_8_and_at_least_8():
    for hidden in (8, 72, 1536):
        for width in (0.001, 0.1, 0.3, 0.5, 0.77, 1.0, 1):
            neurons = width_to_neurons(width, hidden)
            assert neurons % 8 == 0 and (abs(neurons - width * hidden) <= 4 or neurons == 8)
        assert width_to_neurons(1.0, hidden) == hidden


def water_filling(probs, total, gamma):
    """Split the total in proportion to p^gamma among the experts that are not full, until all of it is given out."""
    width, share = [0.0] * len(probs), [p**gamma for p in probs]
    while total > 1e-12:
        free = [i for i, w in enumerate(width) if w < 1 - 1e-12]
        norm = sum(share[i] for i in free)
        given = min(total, *((1 - width[i]) / share[i] * norm for i in free))
        for i in free:
            width[i] += given * share[i] / norm
        total -= given
    return torch.tensor(width)


@pytest.mark.parametrize("k", range(1, 9))
def test_router_widths_split_the_budget_and_keep_its_sum(k):
    torch.manual_seed(k)
    probs = (2 * torch.randn(60, k)).softmax(-1).sort(-1, descending=True).values
    budget, gamma = torch.rand(60, 1).clamp_min(0.1), 4 * torch.rand(60, 1)
    widths = RouterWidth(budget, gamma).widths(probs)
    assert torch.equal(widths * STEPS, (widths * STEPS).round()) and 0 <= widths.min() and widths.max() <= 1
    assert ((widths.sum(-1, keepdim=True) - k * budget).abs() <= 0.5 / STEPS + 1e-6).all()
    for row, p, b, g in zip(widths, probs, budget[:, 0].tolist(), gamma[:, 0].tolist()):
        assert torch.equal(RouterWidth(b, g).widths(p[None])[0], row)
        # rounding a running sum moves a width by one step at most
        assert (row - water_filling(p.tolist(), row.sum().item(), g)).abs().max() <= 1 / STEPS + 1e-4
        exact = RouterWidth(b, g, continuous=True).widths(p[None])[0]
        assert (exact - water_filling(p.tolist(), k * b, g)).abs().max() < 1e-4


def test_gamma_0_is_uniform_and_a_large_gamma_drops_experts():
    probs = torch.tensor([[0.5, 0.3], [0.9, 0.1]])
    assert RouterWidth(0.5, 0.0).widths(probs).tolist() == [[0.5, 0.5]] * 2
    assert RouterWidth(0.5, 1e6).widths(probs).tolist() == [[1, 0]] * 2
    assert RouterWidth(0.75, 1e6).widths(probs).tolist() == [[1, 0.5]] * 2
    assert RouterWidth(1.0, 3.0).widths(probs).tolist() == [[1, 1]] * 2
    assert RouterWidth(0.01).widths(probs).sum(-1).tolist() == [1 / STEPS] * 2


def test_top_experts_run_the_likeliest_first_and_the_last_in_part():
    rows = {3: [1, 1, 1], 1.5: [1, 0.5, 0], 1: [1, 0, 0], 0.5: [0.5, 0, 0], 2.26: [1, 1, 0.25], 0.01: [0.125, 0, 0]}
    probs = torch.tensor([[0.5, 0.3, 0.1]]).expand(len(rows), -1)
    assert TopExperts(torch.tensor(list(rows)).unsqueeze(1)).widths(probs).tolist() == list(rows.values())
    assert all(TopExperts(n).widths(probs[:1]).tolist() == [row] for n, row in rows.items())


def test_blend_equals_the_rounded_policy_at_whole_steps_and_has_the_right_gradient():
    layer, x = tiny_layer(n_shared=1, top_k=3).double(), torch.randn(20, 32).double()

    def output(budget, gamma):
        return layer(x, RouterWidth(budget, gamma, continuous=True))[0]

    for budget in (0.125, 0.5, 1.0):
        assert relative_error(output(budget, 0.0), layer(x, RouterWidth(budget, 0.0))[0]) < 1e-6
    inputs = [torch.tensor([[value]], dtype=torch.float64, requires_grad=True) for value in (0.43, 0.7)]
    grads, e = torch.autograd.grad(output(*inputs).square().sum(), inputs), 1e-5
    for i, grad in enumerate(grads):
        ends = [output(*(v + sign * e * (i == j) for j, v in enumerate(inputs))).square().sum() for sign in (1, -1)]
        assert grad.item() == pytest.approx((ends[0] - ends[1]).item() / (2 * e), rel=1e-4)


# -----------------------------------------------------------------------------
# The GPT


def test_cached_passes_equal_the_full_pass():
    model, idx = tiny_model(n_head=2).eval(), random_tokens(3, 32)
    for width in (1.0, RouterWidth(0.5)):
        full, cache = model(idx, width=width)[0], KVCache(model.config, 3)
        for start, end in ((0, 5), (5, 12), (12, 13), *((i, i + 1) for i in range(13, 32))):
            logits = model(idx[:, start:end], width=width, cache=cache)[0]
            assert logits.shape == (3, 1, 64) and relative_error(logits[:, 0], full[:, end - 1]) < 1e-5


def test_generated_text_is_the_argmax_of_full_passes_also_past_the_context():
    model, idx = tiny_model().eval(), random_tokens(2, 5)
    for width in (0.5, RouterWidth(0.25)):
        expected, seen = idx, 5
        for _ in range(60):
            if seen > 32:  # the older half of a full context is forgotten
                seen = 16
            expected = torch.cat([expected, model(expected[:, -seen:], width=width)[0][:, -1:].argmax(-1)], 1)
            seen += 1
        assert torch.equal(model.generate(idx, 60, temperature=0, width=width), expected)
        assert len(expected[:, 5:].unique()) > 5


def test_tokens_are_sampled_as_often_as_they_are_likely_and_only_those_allowed():
    model, idx = GPT(tiny_config()).eval(), torch.zeros(4000, 1, dtype=torch.long)
    top = (model(idx[:1])[0][0, -1, :20] / 0.5).topk(5)
    new = [
        model.generate(idx, 1, 0.5, 5, n_vocab=20, generator=torch.Generator().manual_seed(s))[:, 1] for s in (1, 1, 2)
    ]
    assert torch.equal(new[0], new[1]) and not torch.equal(new[0], new[2])
    share = torch.bincount(new[0], minlength=64)[top.indices] / 4000
    assert share.sum() == 1 and (share - top.values.softmax(-1)).abs().max() < 0.03


@pytest.mark.parametrize("options", [dict(), dict(n_shared=1, moe_every=2), dict(n_expert=1), dict(top_k=3)], ids=str)
def test_flops_are_those_that_torch_counts(options):
    model, idx = GPT(tiny_config(**options)).eval(), random_tokens(2, 24)
    uncounted = {
        torch.ops.aten._grouped_mm: lambda a, b, *args, **kwargs: 2 * a[0] * a[1] * b[-1],
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **kw: sdpa_flop_count(q, k, v),
    }
    c = model.config
    n_moe = sum(c.is_moe(layer) for layer in range(c.n_layer))
    weighting = 2 * (c.top_k + c.n_shared) * c.n_embd * n_moe  # the weighted sum of outputs, which model.py leaves out
    for width in (1.0, 0.3, RouterWidth(0.5), TopExperts(1)) if n_moe else (1.0,):
        with FlopCounterMode(display=False, custom_mapping=uncounted) as counter, torch.no_grad():
            stats = model(idx, width=width)[2]
        flops = model.flops_per_token(stats.width.mean().item(), seq_len=24)
        assert counter.get_total_flops() / 48 - weighting == pytest.approx(flops)
    assert model.flops_per_token(seq_len=32) == model.flops_per_token()


def test_parameters_are_counted_in_all_and_for_a_token():
    model = GPT(tiny_config(n_shared=1))
    total = sum(p.numel() for p in model.parameters())
    assert model.num_params() == (total, total - 2 * 2 * 2 * 32 * 128)  # two idle experts in each of two layers
    with torch.device("meta"):
        assert round(GPT(GPTConfig()).num_params()[0] / 1e5) == 551  # the paper's 55M


def nanogpt_logits(p, idx, n_layer, n_head):
    """nanoGPT's forward pass without biases, from its parameters by name."""
    x = p["transformer.wte.weight"][idx] + p["transformer.wpe.weight"][: idx.size(1)]
    B, T, d = x.shape
    for layer in range(n_layer):
        ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj = (
            p[f"transformer.h.{layer}.{name}.weight"]
            for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        )
        qkv = F.linear(F.layer_norm(x, (d,), ln_1), c_attn).split(d, dim=2)
        q, k, v = (t.view(B, T, n_head, d // n_head).transpose(1, 2) for t in qkv)
        att = (q @ k.mT / math.sqrt(d // n_head)).masked_fill(torch.ones(T, T).tril() == 0, -math.inf)
        x = x + F.linear((att.softmax(-1) @ v).transpose(1, 2).reshape(B, T, d), attn_proj)
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (d,), ln_2), c_fc)), mlp_proj)
    return F.linear(F.layer_norm(x, (d,), p["transformer.ln_f.weight"]), p["lm_head.weight"])


def test_dense_model_gives_the_logits_of_nanogpt():
    model, idx = tiny_model(n_expert=1, n_head=2, n_layer=3, dropout=0.5).eval(), random_tokens(2, 20)
    assert relative_error(model(idx)[0], nanogpt_logits(model.state_dict(), idx, n_layer=3, n_head=2)) < 1e-6
    assert relative_error(model.train()(idx)[0], model.eval()(idx)[0]) > 0.1


@pytest.mark.parametrize("vocab_size", [64, 5000])
def test_loss_is_the_cross_entropy_and_ignores_targets_of_minus_1(vocab_size):
    model, idx = tiny_model(vocab_size=vocab_size), random_tokens(2, 21, n_vocab=vocab_size)
    idx, targets = idx[:, :-1], idx[:, 1:].clone()
    targets[0, 3:9] = -1
    each = F.cross_entropy(model(idx)[0].flatten(0, 1).double(), targets.flatten(), ignore_index=-1, reduction="none")
    expected = each.sum() / (targets >= 0).sum()
    logits, loss, _ = model(idx, targets)
    assert logits is None and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(model(idx, targets, reduction="none")[1], each) < 1e-5
    weights = list(model.parameters())
    for got, slow in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights)):
        assert relative_error(got, slow) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", ["full", "half", "router 0.5"])
def test_bfloat16_is_float32_up_to_rounding(width, device):
    model, idx = tiny_model(vocab_size=5000).to(device), random_tokens(4, 32).to(device)
    loss, grads = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(device, dtype, enabled=dtype == torch.bfloat16):
            loss[dtype] = model(idx, idx, width=WIDTHS[width])[1]
        grads[dtype] = torch.autograd.grad(loss[dtype], list(model.parameters()))
    assert loss[torch.bfloat16].item() == pytest.approx(loss[torch.float32].item(), rel=0.02)
    for low, exact in zip(grads[torch.bfloat16], grads[torch.float32]):
        assert low.dtype == torch.float32 and relative_error(low, exact) < 0.2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_model_gives_the_same_numbers_and_is_not_compiled_for_every_width(dtype, backend):
    model, idx, low = tiny_model(n_layer=1), random_tokens(2, 16), dtype == torch.bfloat16
    eager, weights = copy.deepcopy(model), list(model.parameters())
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    policies = [RouterWidth(b, 3 * b) for b in (0.5, 0.3, 0.7, 0.9)], [TopExperts(n) for n in (1, 1.5, 1.75)]
    for widths in ([1.0, 0.5, 0.3, 0.1, 0.85], *policies):
        # one graph for experts in bfloat16 and a uniform width, the others run uncompiled
        model.body = torch.compile(model.body, backend=backend, fullgraph=low and widths[0] == 1.0)
        counts = []
        for width in widths:
            with torch.autocast("cpu", dtype, enabled=low):
                loss, expected = model(idx, idx, width=width)[1], eager(idx, idx, width=width)[1]
            grads = torch.autograd.grad(loss, weights), torch.autograd.grad(expected, list(eager.parameters()))
            for got, slow in zip(*grads):
                assert relative_error(got, slow) < (0.1 if low else 1e-4)
            counts.append(graphs["unique_graphs"])
        assert counts[1] == counts[-1]  # the second width is compiled for all widths


def test_nan_in_a_router_becomes_a_nan_loss():
    model, idx = tiny_model(), random_tokens(2, 16)
    model.transformer.h[0].mlp.router.weight.data[1, 3] = math.nan
    for width in (1.0, *WIDTHS.values()):
        assert model(idx, idx, width=width)[1].isnan()


def test_checkpoints_hold_the_bias_of_the_selection_only_where_it_is_learned():
    names = {name: tuple(p.shape) for name, p in tiny_layer(bias_rate=0.1, n_shared=1).state_dict().items()}
    assert names == {"bias": (4,), "router.weight": (4, 32), "w_in": (5, 128, 32), "w_out": (5, 128, 32)}
    assert "bias" not in tiny_layer().state_dict()


@pytest.mark.parametrize("call, message", [
    (lambda: width_to_neurons(1.5, 64), "width must be above 0 and at most 1, not 1.5"),
    (lambda: width_to_neurons(math.nan, 64), "width must .* not nan"),
    (lambda: tiny_model()(random_tokens(1, 2), width=0), "width must .* not 0"),
    (lambda: RouterWidth(0), "budget must be above 0 and at most 1, not 0"),
    (lambda: RouterWidth(math.nan), "budget must .* not nan"),
    (lambda: RouterWidth(0.5, -1), "gamma must .* not -1"),
    (lambda: RouterWidth(0.5, math.inf), "gamma must .* not inf"),
    (lambda: RouterWidth(0.5, math.nan), "gamma must .* not nan"),
    (lambda: TopExperts(0), "number of experts must be positive, not 0"),
    (lambda: TopExperts(math.nan), "number of experts must be positive, not nan"),
    (lambda: PerLayer([RouterWidth(0.5), 0.5]), "needs policies"),
    (lambda: tiny_model(n_expert=1)(random_tokens(1, 2), width=0.5), "dense model"),
    (lambda: tiny_model(n_expert=1)(random_tokens(1, 2), width=TopExperts(1)), "dense model"),
    (lambda: tiny_model()(random_tokens(1, 33)), "33 tokens are more than block_size = 32"),
    (lambda: tiny_config(n_head=3), "n_embd 32 must be divisible by n_head 3"),
    (lambda: tiny_config(top_k=5), "top_k 5 must be at most n_expert 4"),
    (lambda: tiny_config(expert_hidden=20), "expert_hidden 20 must be multiples of 8"),
    (lambda: tiny_config(n_embd=12), "n_embd 12 and .* must be multiples of 8"),
])  # fmt: skip
def test_mistakes_are_refused_in_one_line(call, message):
    with pytest.raises(UsageError, match=message):
        call()
