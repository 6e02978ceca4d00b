"""What model.py promises, checked against slow and obvious formulas in float64."""

import copy
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from model import GPT, STEPS, GPTConfig, KVCache, PerLayer, RouterWidth, TopExperts, UsageError, width_to_neurons

torch.set_num_threads(1)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def tiny_model(**options):
    """A GPT with weights so large that its routers have clear preferences."""
    torch.manual_seed(0)
    defaults = dict(block_size=32, vocab_size=64, n_layer=2, n_head=1, n_embd=32, n_expert=4, moe_every=1)
    model = GPT(GPTConfig(**defaults | options))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model


def tiny_layer(**options):
    return tiny_model(n_layer=1, **options).transformer.h[0].mlp


def run_layer(layer, x, width):
    """A layer takes a number of neurons or a policy."""
    return layer(x, width_to_neurons(width, layer.config.hidden) if isinstance(width, float) else width)


def random_tokens(*shape, n_vocab=64):
    return torch.randint(n_vocab, shape, generator=torch.Generator().manual_seed(0))


def relative_error(a, b, floor=1e-6):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(floor)).item()


def reference_layer(layer, x, width):
    """A layer token by token and expert by expert, in float64. It chooses experts and widths in float32, like model.py.

    x: (N, d). width: a number of whole steps, or a policy. A width between two steps is a mixture of both.
    """
    c, router, w_in, w_out = layer.config, layer.router.weight, layer.w_in.double(), layer.w_out.double()
    probs = F.linear(x.float(), router.float()).softmax(-1)
    chosen = (probs + layer.bias).topk(c.top_k).indices
    chosen = chosen.gather(-1, probs.gather(-1, chosen).argsort(-1, descending=True))  # the likeliest first
    exact = F.linear(x.double(), router.double()).softmax(-1).gather(-1, chosen)
    if isinstance(width, float):
        widths = torch.full_like(exact, width)
    else:
        widths = width.widths(probs.gather(-1, chosen).detach()).double()

    def expert(e, token, step):
        h = width_to_neurons(step / STEPS, c.hidden) if step > 0 else 0
        return F.gelu(w_in[e, :h] @ token) @ w_out[e, :h]

    def mixture(e, token, steps):
        low = min(math.floor(steps), STEPS - 1)
        return (low + 1 - steps) * expert(e, token, low) + (steps - low) * expert(e, token, low + 1)

    outputs = []
    for n, token in enumerate(x.double()):
        weights = exact[n] * (widths[n] > 0)
        if c.norm_topk_prob:
            weights = weights / weights.sum()
        y = sum(p * mixture(e, token, STEPS * w) for e, p, w in zip(chosen[n], weights, widths[n]))
        shared = STEPS * widths[n].mean()
        if not getattr(width, "continuous", False):
            shared = shared.round()
        outputs.append(y + sum(mixture(c.n_expert + i, token, shared) for i in range(c.n_shared)))
    return torch.stack(outputs)


def check_layer(layer, x, y, width, tolerance=1e-5):
    """The output y of a layer, and its gradients, are those of the reference."""
    expected = reference_layer(layer, x.flatten(0, -2), width).view(x.shape)
    assert relative_error(y, expected) < tolerance
    inputs, g = (x, layer.w_in, layer.w_out, layer.router.weight), torch.randn_like(expected)
    grads = torch.autograd.grad(y, inputs, g.to(y)), torch.autograd.grad(expected, inputs, g)
    for got, slow in zip(*grads):
        assert relative_error(got, slow, floor=1) < 5 * tolerance  # the router of top-1 can have a gradient of 0


WIDTHS = {
    "full": 1.0, "half": 0.5, "router 0.5": RouterWidth(0.5), "router 0.25": RouterWidth(0.25, 3.0),
    "router 0.9": RouterWidth(0.9, 0.5), "top 1": TopExperts(1), "top 1.6": TopExperts(1.6),
    "blend": RouterWidth(0.4, 2.0, continuous=True), "blend full": RouterWidth(1.0, continuous=True),
    "own": SimpleNamespace(widths=lambda probs: 1 - (STEPS * probs).floor() / STEPS),
}  # fmt: skip
LAYERS = {
    "top-2": dict(), "top-1": dict(top_k=1), "top-1, not normalized": dict(top_k=1, norm_topk_prob=False),
    "not normalized": dict(norm_topk_prob=False), "fine-grained": dict(n_expert=32, top_k=7, expert_hidden=24),
    "shared": dict(n_shared=2, top_k=3), "bias": dict(bias_rate=0.1, top_k=3), "all": dict(top_k=4, n_shared=1),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("options", LAYERS)
def test_layer_and_its_gradients_match_slow_formula(options, width, dtype, device):
    rng, low = random.Random(options + width), dtype == torch.bfloat16
    sizes = dict(n_embd=8 * rng.randint(1, 6), expert_hidden=8 * rng.randint(1, 20))
    layer = tiny_layer(**sizes | LAYERS[options]).to(device, torch.float32 if low else dtype)
    if options == "bias":
        layer.state_dict()["bias"] += torch.linspace(-0.3, 0.3, 4, device=device)  # checkpoints contain the bias
    x = torch.randn(2, rng.randint(1, 12), layer.config.n_embd).to(layer.w_in).requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=low):
        y, _ = run_layer(layer, x, WIDTHS[width])
    assert y.dtype == dtype
    check_layer(layer, x, y, WIDTHS[width], 0.02 if low else 1e-5 if device == "cpu" else 5e-3)  # tensor cores round


def test_every_layer_of_a_gpt_can_have_its_own_policy_and_every_token_its_own_budget():
    model, idx, calls = tiny_model(n_layer=5, moe_every=2), random_tokens(2, 16), []
    each_token = RouterWidth(torch.rand(32, 1).clamp_min(0.1), 3 * torch.rand(32, 1))
    policies = [each_token, None, TopExperts(3 * torch.rand(32, 1)), None, RouterWidth(0.5, 0.0)]
    for block in model.transformer.h[::2]:
        block.mlp.register_forward_hook(lambda layer, args, output: calls.append((layer, args[0], output[0])))
    model(idx, width=PerLayer(policies))
    for (layer, x, y), policy in zip(calls, policies[::2], strict=True):
        check_layer(layer, x, y, policy)


@pytest.mark.parametrize("width, h", [(0.01, 8), (0.6, 80), (0.65, 80), (1.0, 128)])  # the nearest multiple of 8
def test_neurons_beyond_the_width_neither_matter_nor_learn(width, h):
    layer, x = tiny_layer(), torch.randn(30, 32)
    y = run_layer(layer, x, width)[0]
    y.square().sum().backward()
    for w in (layer.w_in, layer.w_out):
        assert w.grad[:, :h].any(-1).all() and not w.grad[:, h:].any()
        w.data[:, h:] = math.nan
    assert torch.equal(run_layer(layer, x, width)[0], y)


@pytest.mark.parametrize("width", ["full", "half", "router 0.5", "top 1.6", "blend"])
def test_outputs_depend_on_no_other_token_of_the_layer_and_no_later_token_of_the_text(width):
    layer, x, width = tiny_layer(n_shared=1), torch.randn(40, 32), WIDTHS[width]
    alone = torch.cat([run_layer(layer, token[None], width)[0] for token in x])
    assert relative_error(run_layer(layer, x, width)[0], alone) < 1e-5
    model, idx = tiny_model().eval(), random_tokens(2, 20)
    before = model(idx, width=width)[0]
    idx[0, 12:], idx[1] = 1, 2
    after = model(idx, width=width)[0]
    assert relative_error(after[0, :12], before[0, :12]) < 1e-5 < relative_error(after[0, 12:], before[0, 12:])


@pytest.mark.parametrize("width, neurons", [(1.0, 128), (0.25, 32), (RouterWidth(0.5), 64)])
def test_router_losses_load_and_width_follow_their_formulas(width, neurons):
    layer, x = tiny_layer(), torch.randn(50, 32)
    stats = run_layer(layer, x, width)[1]
    logits = F.linear(x, layer.router.weight).double()
    selected = torch.zeros(50, 4).scatter(1, logits.topk(2).indices, 1.0)
    balance = 4 * (selected.sum(0) / 100 * logits.softmax(-1).mean(0)).sum()  # Switch Transformers, equation 4
    assert stats.loss.item() == pytest.approx((0.01 * balance + 0.001 * logits.logsumexp(-1).square().mean()).item())
    assert stats.load.tolist() == selected.sum(0).tolist() and stats.width.item() == neurons / 128
    model, idx = tiny_model(n_layer=3, moe_every=2), random_tokens(2, 16)
    stats = model(idx, idx, width=width)[2]
    assert stats.load.sum(1).tolist() == [64, 64] and stats.width.tolist() == [neurons / 128] * 2
    assert stats.loss > 0.02 and model.eval()(idx, idx)[2].loss == 0


def water_filling(probs, total, gamma):
    """Widths min(1, level * p^gamma), with the level at which they add up to the total."""
    share = probs.double() ** gamma
    for n_full in range(len(probs)):
        level = (total - n_full) / share[n_full:].sum()
        if level * share[n_full] < 1 + 1e-6:
            return (level * share).clamp_max(1)


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
        assert (row - water_filling(p, row.sum().item(), g)).abs().max() <= 1 / STEPS + 1e-4
        exact = RouterWidth(b, g, continuous=True).widths(p[None])[0]
        assert (exact - water_filling(p, k * b, g)).abs().max() < 1e-4


@pytest.mark.parametrize("policy, widths", [
    (RouterWidth(0.5, 0.0), [[0.5, 0.5], [0.5, 0.5]]),
    (RouterWidth(0.75, 1e6), [[1, 0.5], [1, 0.5]]),
    (RouterWidth(0.01, 0.0), [[0.125, 0], [0.125, 0]]),
    (TopExperts(1.35), [[1, 0.375], [1, 0.375]]),
    (TopExperts(torch.tensor([[0.01], [0.5]])), [[0.125, 0], [0.5, 0]]),
])  # fmt: skip
def test_policies_give_widths_by_confidence_or_by_rank(policy, widths):
    assert policy.widths(torch.tensor([[0.5, 0.3], [0.9, 0.1]])).tolist() == widths


def test_continuous_policy_equals_the_rounded_one_at_whole_steps_and_has_the_right_gradient():
    layer, x = tiny_layer(n_shared=1, top_k=3).double(), torch.randn(20, 32).double()
    blend = lambda budget, gamma: layer(x, RouterWidth(budget, gamma, continuous=True))[0]
    for budget in (0.125, 0.5, 1.0):
        assert relative_error(blend(budget, 0.0), layer(x, RouterWidth(budget, 0.0))[0]) < 1e-6
    budget, gamma = (torch.tensor([[v]], dtype=torch.float64, requires_grad=True) for v in (0.43, 0.7))
    grads = torch.autograd.grad(blend(budget, gamma).square().sum(), (budget, gamma))
    for grad, db, dg in zip(grads, (1e-5, 0), (0, 1e-5)):
        rise = blend(budget + db, gamma + dg).square().sum() - blend(budget - db, gamma - dg).square().sum()
        assert grad.item() == pytest.approx(rise.item() / 2e-5, rel=1e-4)


def test_cached_passes_equal_the_full_pass():
    model, idx = tiny_model(n_head=2).eval(), random_tokens(3, 32)
    for width in (1.0, RouterWidth(0.5)):
        full, cache = model(idx, width=width)[0], KVCache(model.config, 3)
        for start, end in ((0, 5), (5, 12), (12, 13), *((i, i + 1) for i in range(13, 32))):
            logits = model(idx[:, start:end], width=width, cache=cache)[0]
            assert logits.shape == (3, 1, 64) and relative_error(logits[:, 0], full[:, end - 1]) < 1e-5


@pytest.mark.parametrize("width", ["half", "router 0.25"])
def test_generated_text_is_the_argmax_of_full_passes_also_past_the_context(width):
    model, idx = tiny_model().eval(), random_tokens(2, 5)
    expected, seen = idx, 5
    for _ in range(60):
        if seen > 32:  # the older half of a full context is forgotten
            seen = 16
        logits = model(expected[:, -seen:], width=WIDTHS[width])[0]
        expected, seen = torch.cat([expected, logits[:, -1:].argmax(-1)], 1), seen + 1
    assert torch.equal(model.generate(idx, 60, temperature=0, width=WIDTHS[width]), expected)
    assert len(expected[:, 5:].unique()) > 5


def test_tokens_are_sampled_as_often_as_they_are_likely_and_only_those_allowed():
    model, idx = tiny_model().eval(), torch.zeros(4000, 1, dtype=torch.long)
    top = (model(idx[:1])[0][0, -1, :20] / 0.5).topk(5)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    texts = [model.generate(idx, 2, temperature=0.5, top_k=5, n_vocab=20, generator=g) for g in generators]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    share = torch.bincount(texts[0][:, 1], minlength=64)[top.indices] / 4000
    assert share.sum() == 1 and (share - top.values.softmax(-1)).abs().max() < 0.03 and texts[0].max() < 20


@pytest.mark.parametrize("options", [dict(), dict(n_shared=1, moe_every=2), dict(n_expert=1), dict(top_k=3)], ids=str)
def test_flops_are_those_that_torch_counts(options):
    model, idx = tiny_model(**options).eval(), random_tokens(2, 24)
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
    assert model.flops_per_token() == model.flops_per_token(width=1.0, seq_len=32)


def test_num_params_counts_all_parameters_and_those_that_one_token_uses():
    model = tiny_model(n_shared=1)
    total = sum(p.numel() for p in model.parameters())
    assert model.num_params() == (total, total - 2 * 2 * 2 * 32 * 128)  # two idle experts in each of two layers


def test_dense_model_gives_the_logits_of_nanogpt():
    model, idx = tiny_model(n_expert=1, n_head=2, dropout=0.5).eval(), random_tokens(3, 20)
    p = {name.removesuffix(".weight"): p.double() for name, p in model.state_dict().items()}  # nanoGPT's names
    x = p["lm_head"][idx] + p["transformer.wpe"][:20]  # the embedding is the head
    for h in ("transformer.h.0.", "transformer.h.1."):
        y = F.layer_norm(x, (32,), p[h + "ln_1"])
        q, k, v = (y @ w.T for w in p[h + "attn.c_attn"].split(32))
        q, k, v = (t.view(3, 20, 2, 16).transpose(1, 2) for t in (q, k, v))
        att = (q @ k.mT / math.sqrt(16)).masked_fill(torch.ones(20, 20).tril() == 0, -math.inf).softmax(-1)
        x = x + (att @ v).transpose(1, 2).reshape(3, 20, 32) @ p[h + "attn.c_proj"].T
        y = F.layer_norm(x, (32,), p[h + "ln_2"])
        x = x + F.gelu(y @ p[h + "mlp.c_fc"].T) @ p[h + "mlp.c_proj"].T
    assert relative_error(model(idx)[0], F.layer_norm(x, (32,), p["transformer.ln_f"]) @ p["lm_head"].T) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab_size", [64, 5000])
def test_loss_is_the_cross_entropy_and_ignores_targets_of_minus_1(vocab_size, device):
    model, idx = tiny_model(vocab_size=vocab_size).to(device), random_tokens(2, 21, n_vocab=vocab_size).to(device)
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
    with torch.autocast(device, torch.bfloat16):
        loss = model(idx, targets)[1]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_model_gives_the_same_numbers_and_is_not_compiled_for_every_width(dtype, backend):
    model, idx, low = tiny_model(n_layer=1), random_tokens(2, 16), dtype == torch.bfloat16
    eager, graphs = copy.deepcopy(model), torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    policies = [RouterWidth(b, 3 * b) for b in (0.5, 0.3, 0.7, 0.9)], [TopExperts(n) for n in (1, 1.5, 1.75)]
    for widths in ([1.0, 0.5, 0.3, 0.1, 0.85], *policies):
        model.body, counts = torch.compile(model.body, backend=backend, fullgraph=low and 1.0 in widths), []
        for width in widths:
            with torch.autocast("cpu", dtype, enabled=low):
                losses = [m(idx, idx, width=width)[1] for m in (model, eager)]
            grads = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (model, eager))]
            for got, expected in zip(*grads):
                assert relative_error(got, expected, floor=1e-3) < (0.1 if low else 1e-4)
            counts.append(graphs["unique_graphs"])
        assert counts[1] == counts[-1]  # what was compiled for the second width serves all others


def test_nan_in_a_router_becomes_a_nan_loss():
    model, idx = tiny_model(), random_tokens(2, 16)
    model.transformer.h[0].mlp.router.weight.data[1, 3] = math.nan
    for width in WIDTHS.values():
        assert model(idx, idx, width=width)[1].isnan()


@pytest.mark.parametrize("call, message", [
    *((lambda v=v: width_to_neurons(v, 64), f"width must be .* at most 1, not {v}") for v in (0, 1.5, math.nan)),
    *((lambda v=v: RouterWidth(v), f"budget must be above 0 and at most 1, not {v}") for v in (0, 1.5, math.nan)),
    *((lambda v=v: RouterWidth(0.5, v), f"gamma must be .* at least 0, not {v}") for v in (-1, math.inf, math.nan)),
    *((lambda v=v: TopExperts(v), f"number of experts must be positive, not {v}") for v in (0, -1, math.nan)),
    (lambda: PerLayer([RouterWidth(0.5), 0.5]), "PerLayer needs policies"),
    *((lambda v=v: tiny_model(n_expert=1)(random_tokens(1, 2), width=v), "dense model") for v in (0.5, TopExperts(1))),
    (lambda: tiny_model()(random_tokens(1, 33)), "33 tokens are more than block_size = 32"),
    (lambda: tiny_model(n_head=3), "n_embd 32 must be divisible by n_head 3"),
    (lambda: tiny_model(top_k=5), "top_k 5 must be at most n_expert 4"),
    (lambda: tiny_model(expert_hidden=20), "n_embd 32 and expert_hidden 20 must be multiples of 8"),
    (lambda: tiny_model(n_embd=12), "n_embd 12 and expert_hidden 48 must be multiples of 8"),
])  # fmt: skip
def test_mistakes_are_refused_in_one_line(call, message):
    with pytest.raises(UsageError, match=message):
        call()
