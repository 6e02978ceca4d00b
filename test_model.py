"""What model.py promises, checked against slow and obvious formulas in float64."""

import math

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
    RouterWidth,
    SlimmableMoE,
    TopExperts,
    UsageError,
    run_experts,
    width_to_neurons,
)

torch.set_num_threads(1)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def tiny_config(**options):
    defaults = dict(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=32, n_expert=4, moe_every=1)
    return GPTConfig(**defaults | options)


def tiny_model(seed=0, **options):
    """A GPT with weights so large that routers have clear opinions."""
    torch.manual_seed(seed)
    model = GPT(tiny_config(**options))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model


def tiny_layer(seed=0, **options):
    torch.manual_seed(seed)
    layer = SlimmableMoE(tiny_config(**options))
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return layer


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12)).item()


class Rows:
    """A policy of a reader: the same widths for all tokens."""

    def __init__(self, *row):
        self.row = torch.tensor(row)

    def widths(self, probs):
        return self.row.to(probs.device).expand(probs.shape)


def reference_layer(layer, x, width):
    """The layer token by token and expert by expert in float64. Selection and widths are decided in float32."""
    c, w_in, w_out = layer.config, layer.w_in.double(), layer.w_out.double()
    logits = F.linear(x, layer.router.weight)
    probs, all_p = logits.softmax(-1), F.linear(x.double(), layer.router.weight.double()).softmax(-1)
    outputs = []
    for n, token in enumerate(x.double()):
        chosen = (probs[n] + layer.bias).topk(c.top_k).indices
        chosen = chosen[probs[n, chosen].argsort(descending=True, stable=True)]
        if isinstance(width, float):
            widths = [width] * c.top_k
        else:
            own = {name: v[n : n + 1] if torch.is_tensor(v) and name != "row" else v for name, v in vars(width).items()}
            policy = object.__new__(type(width))
            policy.__dict__.update(own)
            widths = policy.widths(probs[n : n + 1, chosen].detach())[0].tolist()
        p = torch.stack([all_p[n, e] * (w > 0) for e, w in zip(chosen, widths)])
        p = p / p.sum() if c.norm_topk_prob else p
        visits = [(e, weight, w) for e, weight, w in zip(chosen.tolist(), p, widths)]
        shared = round(STEPS * sum(widths) / len(widths)) / STEPS if not isinstance(width, float) else width
        visits += [(c.n_expert + i, 1.0, shared) for i in range(c.n_shared)]
        y = torch.zeros_like(token)
        for e, weight, w in visits:
            if w > 0:
                h = width_to_neurons(w, c.hidden)
                y = y + weight * (F.gelu(w_in[e, :h] @ token) @ w_out[e, :h])
        outputs.append(y)
    return torch.stack(outputs)


WIDTHS = [
    1.0,
    0.5,
    0.3,
    RouterWidth(0.5),
    RouterWidth(0.25, 3.0),
    RouterWidth(0.9, 0.5),
    TopExperts(1),
    TopExperts(1.6),
]
LAYERS = [
    dict(), dict(top_k=1, norm_topk_prob=False), dict(top_k=1), dict(n_expert=16, top_k=5, expert_hidden=24),
    dict(n_shared=2, top_k=3), dict(norm_topk_prob=False), dict(bias_rate=0.1), dict(n_embd=8, n_head=1, expert_hidden=72),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", WIDTHS, ids=lambda w: w if isinstance(w, float) else str(vars(w)))
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_layer_and_its_gradients_equal_the_slow_formula(options, width, device):
    layer = tiny_layer(**options).to(device)
    layer.bias += torch.linspace(-0.3, 0.3, len(layer.bias), device=device) * (layer.config.bias_rate > 0)
    x = torch.randn(25, layer.config.n_embd, device=device, requires_grad=True)
    neurons = width_to_neurons(width, layer.config.hidden) if isinstance(width, float) else width
    y, expected = layer(x, neurons)[0], reference_layer(layer, x, width)
    tolerance = 1e-5 if device == "cpu" else 5e-3  # tensor cores round
    assert relative_error(y, expected) < tolerance
    inputs, g = (x, layer.w_in, layer.w_out, layer.router.weight), torch.randn_like(y)
    pairs = zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g.double(), allow_unused=True))
    for got, slow in pairs:
        assert got.norm() < 1e-3 if slow is None or slow.norm() < 1e-6 else relative_error(got, slow) < 5 * tolerance


def test_float64_takes_the_path_without_a_kernel_and_agrees():
    layer, x = tiny_layer(), torch.randn(20, 32)
    for width in (64, RouterWidth(0.5)):
        slow = layer.double()(x.double(), width)[0]
        assert relative_error(layer.float()(x, width)[0], slow) < 1e-5


def test_policies_of_a_reader_work():
    layer, x = tiny_layer(top_k=3), torch.randn(10, 32)
    for row in ((1.0, 0.5, 0.0), (0.0, 0.25, 1.0)):
        assert relative_error(layer(x, Rows(*row))[0], reference_layer(layer, x, Rows(*row))) < 1e-5


@pytest.mark.parametrize("width", [0.25, 0.6, 1.0])
def test_neurons_beyond_the_width_neither_matter_nor_learn(width):
    layer, x, h = tiny_layer(), torch.randn(30, 32), width_to_neurons(width, 128)
    y = layer(x, h)[0]
    y.square().sum().backward()
    for w in (layer.w_in, layer.w_out):
        assert w.grad[:, :h].abs().sum() > 0 and not w.grad[:, h:].any()
        w.data[:, h:] = math.nan
    assert torch.equal(layer(x, h)[0], y)


def test_an_expert_that_is_skipped_neither_matters_nor_learns():
    layer, x = tiny_layer(n_expert=2), torch.randn(30, 32)
    layer.router.weight.data[1] = layer.router.weight[0]
    x[:, 0], layer.router.weight.data[0, 0] = 5.0, 2.0  # expert 0 is the likelier one for all tokens
    layer(x, TopExperts(1))[0].sum().backward()
    assert layer.w_in.grad[0].any() and not layer.w_in.grad[1].any()


@pytest.mark.parametrize("width", [1.0, 0.5, RouterWidth(0.5), TopExperts(1.5)], ids=str)
def test_a_token_depends_on_no_other_token_of_the_layer_and_no_later_token_of_the_text(width):
    layer, x = tiny_layer(), torch.randn(40, 32)
    neurons = width_to_neurons(width, 128) if isinstance(width, float) else width
    alone = torch.cat([layer(token[None], neurons)[0] for token in x])
    assert relative_error(layer(x, neurons)[0], alone) < 1e-5
    model, idx = tiny_model().eval(), torch.randint(64, (2, 20))
    before = model(idx, width=width)[0][:, :12]
    idx[:, 12:] = torch.randint(64, (2, 8))
    assert relative_error(model(idx, width=width)[0][:, :12], before) < 1e-5


def water_filling(probs, total, gamma):
    """Give out the total bit by bit, in proportion to p^gamma, to the experts that are not full."""
    width, share = [0.0] * len(probs), [p**gamma for p in probs]
    while total > 1e-12:
        free = [i for i, w in enumerate(width) if w < 1 - 1e-12]
        norm = sum(share[i] for i in free)
        drop = min(total, *((1 - width[i]) / share[i] * norm for i in free))
        for i in free:
            width[i] += drop * share[i] / norm
        total -= drop
    return width


@pytest.mark.parametrize("k", range(1, 9))
def test_router_widths_split_the_budget_and_keep_its_sum(k):
    torch.manual_seed(k)
    probs = (2 * torch.randn(60, k)).softmax(-1).sort(-1, descending=True).values
    budget, gamma = torch.rand(60, 1).clamp_min(0.1), 4 * torch.rand(60, 1)
    widths = RouterWidth(budget, gamma).widths(probs)
    assert torch.equal(widths * STEPS, (widths * STEPS).round()) and widths.min() >= 0 and widths.max() <= 1
    steps = (STEPS * k * budget).round().clamp_min(1)
    assert torch.equal(STEPS * widths.sum(-1, keepdim=True), steps)
    for row, p, b, g in zip(widths, probs, steps[:, 0] / STEPS / k, gamma[:, 0]):
        slow = torch.tensor(water_filling(p.tolist(), k * b.item(), g.item()))
        assert (row - slow).abs().max() <= 1 / STEPS + 1e-4, "rounding a running sum moves a width by one step at most"
        assert torch.equal(RouterWidth(b.item(), g.item()).widths(p[None])[0], row)
        exact = RouterWidth(b, g, continuous=True).widths(p[None])[0]
        assert (exact - slow).abs().max() < 1e-4


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


def test_widths_between_two_steps_blend_both_and_have_the_right_gradient():
    layer, x = tiny_layer(n_shared=1).double(), torch.randn(20, 32).double()
    whole = RouterWidth(0.5, 0.0)
    assert relative_error(layer(x, RouterWidth(0.5, 0.0, continuous=True))[0], layer(x, whole)[0]) < 1e-12
    gamma = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    budget = torch.tensor(0.43, dtype=torch.float64, requires_grad=True)

    def loss(budget, gamma):
        return layer(x, RouterWidth(budget, gamma, continuous=True))[0].square().mean()

    grads, e = torch.autograd.grad(loss(budget, gamma), (budget, gamma)), 1e-3
    slopes = loss(budget + e, gamma) - loss(budget - e, gamma), loss(budget, gamma + e) - loss(budget, gamma - e)
    for grad, slope in zip(grads, slopes):
        assert grad.item() == pytest.approx(slope.item() / (2 * e), rel=0.02)  # routers are float32


def test_each_layer_can_have_its_own_policy():
    model, idx = tiny_model(n_layer=3, moe_every=2).eval(), torch.randint(64, (2, 16))
    policies = [RouterWidth(0.5, 0.0), None, TopExperts(1)]
    logits, _, stats = model(idx, width=PerLayer(policies))
    model.transformer.h[0].mlp.w_in.data[:, 64:] = math.nan  # a uniform half of 128 neurons
    assert torch.equal(model(idx, width=PerLayer(policies))[0], logits) and stats.width.tolist() == [0.5, 0.5]


def test_run_experts_takes_other_experts_than_gelu():
    def swiglu(x, offs, gate, up, down):
        from model import grouped_mm

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


def test_router_losses_load_and_width_are_their_formulas():
    layer, x = tiny_layer(), torch.randn(50, 32)
    _, stats = layer(x, RouterWidth(0.5))
    logits = F.linear(x, layer.router.weight)
    chosen = torch.zeros(50, 4).scatter(1, logits.topk(2).indices, 1.0)
    balance = 4 * (chosen.sum(0) / 100 * logits.softmax(-1).mean(0)).sum()  # Switch Transformers, equation 4
    assert stats.loss.item() == pytest.approx((0.01 * balance + 0.001 * logits.logsumexp(-1).square().mean()).item())
    assert stats.load.tolist() == chosen.sum(0).tolist() and stats.width.item() == 0.5
    model, idx = tiny_model(), torch.randint(64, (2, 16))
    stats = model(idx, idx, width=0.25)[2]
    assert stats.load.shape == (2, 4) and stats.load.sum(1).tolist() == [64, 64] and stats.width.tolist() == [0.25] * 2
    assert stats.loss > 0 == model.eval()(idx, idx)[2].loss


def test_a_nan_in_a_router_becomes_a_nan_loss():
    model, idx = tiny_model(), torch.randint(64, (2, 16))
    model.transformer.h[0].mlp.router.weight.data.fill_(math.nan)
    for width in (1.0, RouterWidth(0.5), TopExperts(1)):
        assert model(idx, idx, width=width)[1].isnan()


def test_cached_and_full_passes_agree():
    model, idx = tiny_model().eval(), torch.randint(64, (3, 32))
    for width in (1.0, RouterWidth(0.5)):
        full, cache = model(idx, width=width)[0], KVCache(model.config, 3)
        for start, end in ((0, 5), (5, 12), (12, 13), *((i, i + 1) for i in range(13, 32))):
            logits = model(idx[:, start:end], width=width, cache=cache)[0]
            assert relative_error(logits[:, 0], full[:, end - 1]) < 1e-5


def test_generated_text_is_the_argmax_of_full_passes_also_past_the_context():
    model, idx = tiny_model().eval(), torch.randint(64, (2, 5))
    got, expected, seen = model.generate(idx, 60, temperature=0, width=0.5), idx, 5
    for _ in range(60):
        if seen > 32:  # the older half of a full context is forgotten
            seen = 16
        expected = torch.cat([expected, model(expected[:, -seen:], width=0.5)[0][:, -1:].argmax(-1)], 1)
        seen += 1
    assert got.shape == (2, 65) and torch.equal(got, expected)


def test_sampling_repeats_with_its_seed_and_leaves_out_what_it_should():
    model, idx = tiny_model().eval(), torch.zeros(1, 1, dtype=torch.long)
    texts = [
        model.generate(idx, 40, top_k=5, n_vocab=20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2]) and max(t.max() for t in texts) < 20
    logits = model(texts[0][:, :1])[0][0, -1, :20]
    assert texts[0][0, 1] in logits.topk(5).indices


@pytest.mark.parametrize("options", [dict(), dict(n_shared=1, moe_every=2), dict(n_expert=1), dict(top_k=3)], ids=str)
def test_flops_are_those_that_torch_counts(options):
    model, idx = GPT(tiny_config(**options)).eval(), torch.randint(64, (2, 24))
    uncounted = {
        torch.ops.aten._grouped_mm: lambda a, b, *args, **kwargs: 2 * a[0] * a[1] * b[-1],
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **kw: sdpa_flop_count(q, k, v),
    }
    weighting = 2 * model.config.top_k + 2 * model.config.n_shared  # the weighted sum of outputs, not counted by us
    for width in (1.0, 0.25) if model.config.n_expert > 1 else (1.0,):
        with FlopCounterMode(display=False, custom_mapping=uncounted) as counter, torch.no_grad():
            model(idx, width=width)
        n_moe = sum(model.config.is_moe(layer) for layer in range(2))
        assert counter.get_total_flops() / 48 - weighting * 32 * n_moe == model.flops_per_token(width, seq_len=24)


def test_parameters_are_counted_in_all_and_for_a_token():
    model = GPT(tiny_config(n_shared=1))
    total = sum(p.numel() for p in model.parameters())
    assert model.num_params() == (total, total - 2 * 2 * 2 * 32 * 128)  # two idle experts in each of two layers


def nanogpt_logits(p, idx, n_layer, n_head):
    """nanoGPT's forward pass without biases, from its parameters by name."""
    x = p["transformer.wte.weight"][idx] + p["transformer.wpe.weight"][: idx.size(1)]
    B, T, d = x.shape
    for i in range(n_layer):
        q = lambda name, i=i: p[f"transformer.h.{i}.{name}.weight"]
        h = F.layer_norm(x, (d,), q("ln_1"))
        heads = [t.view(B, T, n_head, d // n_head).transpose(1, 2) for t in (h @ q("attn.c_attn").T).split(d, 2)]
        y = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(B, T, d)
        x = x + y @ q("attn.c_proj").T
        x = x + F.gelu(F.layer_norm(x, (d,), q("ln_2")) @ q("mlp.c_fc").T) @ q("mlp.c_proj").T
    return F.layer_norm(x, (d,), p["transformer.ln_f.weight"]) @ p["lm_head.weight"].T


def test_a_dense_model_gives_the_logits_of_nanogpt():
    model, idx = tiny_model(n_expert=1).eval(), torch.randint(64, (2, 20))
    assert relative_error(model(idx)[0], nanogpt_logits(model.state_dict(), idx, 2, 2)) < 1e-6


@pytest.mark.parametrize("vocab_size", [64, 5000])
def test_the_loss_is_the_cross_entropy_and_ignores_targets_of_minus_1(vocab_size):
    model, idx = tiny_model(vocab_size=vocab_size), torch.randint(vocab_size, (2, 21))
    targets = idx[:, 1:].clone()
    targets[0, 3:9] = -1
    logits = model(idx[:, :-1])[0].flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")
    no_logits, loss, _ = model(idx[:, :-1], targets)
    assert no_logits is None and loss.item() == pytest.approx((expected.sum() / (targets >= 0).sum()).item(), rel=1e-5)
    assert relative_error(model(idx[:, :-1], targets, reduction="none")[1], expected) < 1e-5
    weights = model.lm_head.weight, model.transformer.h[0].mlp.w_in
    grads = torch.autograd.grad(loss, weights), torch.autograd.grad(expected.sum() / (targets >= 0).sum(), weights)
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(*grads))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1.0, 0.5, RouterWidth(0.5)], ids=str)
def test_bfloat16_is_float32_up_to_rounding(width, device):
    model, idx = tiny_model().to(device), torch.randint(64, (4, 32), device=device)
    exact = model(idx, idx, width=width)[1]
    with torch.autocast(device, torch.bfloat16):
        loss = model(idx, idx, width=width)[1]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.05)
    loss.backward()
    assert model.transformer.h[0].mlp.w_in.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_models_give_the_same_numbers_without_compiling_every_width(dtype):
    torch._dynamo.reset()
    model, idx = tiny_model().eval(), torch.randint(64, (2, 16))
    policies = [RouterWidth(b / 16) for b in range(2, 14)] + [PerLayer([RouterWidth(b / 16)] * 2) for b in range(2, 14)]
    widths, eager = [*(w / 16 for w in range(1, 17)), *policies], []
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        eager = [model(idx, idx, width=w)[1] for w in widths]
        torch._dynamo.utils.counters.clear()
        model.body = torch.compile(model.body)
        for expected, width in zip(eager, widths):
            assert model(idx, idx, width=width)[1].item() == pytest.approx(expected.item(), rel=2e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] < 24


@pytest.mark.parametrize("call, message", [
    (lambda: width_to_neurons(1.5, 64), "above 0 and at most 1, not 1.5"),
    (lambda: width_to_neurons(math.nan, 64), "not nan"),
    (lambda: tiny_model()(torch.zeros(1, 2, dtype=torch.long), width=0), "not 0"),
    (lambda: RouterWidth(0), "budget must be above 0"),
    (lambda: RouterWidth(0.5, -1), "gamma must be"),
    (lambda: TopExperts(0), "number of experts must be positive, not 0"),
    (lambda: PerLayer([0.5]), "needs policies"),
    (lambda: tiny_model(n_expert=1)(torch.zeros(1, 2, dtype=torch.long), width=0.5), "dense model"),
    (lambda: tiny_model(n_expert=1)(torch.zeros(1, 2, dtype=torch.long), width=TopExperts(1)), "dense model"),
    (lambda: tiny_model()(torch.zeros(1, 33, dtype=torch.long)), "33 tokens are more than block_size = 32"),
    (lambda: tiny_config(n_head=3), "n_embd 32 must be divisible by n_head 3"),
    (lambda: tiny_config(top_k=5), "top_k 5 must be at most n_expert 4"),
    (lambda: tiny_config(expert_hidden=20), "multiples of 8"),
])  # fmt: skip
def test_mistakes_are_refused_in_one_line(call, message):
    with pytest.raises(UsageError, match=message):
        call()
