"""adapt.py against transformers' own code, on tiny random models of eight architectures."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="adapt.py needs pip install -r requirements-extras.txt")
pytest.importorskip("accelerate", reason="adapt.py needs pip install -r requirements-extras.txt")
import torch
import transformers
from torch.nn import functional as F

import adapt
from model import GRID, FewerExperts, PerLayer, RouterWidth, UsageError

COMMON = dict(
    vocab_size=384, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
MLA = dict(
    moe_intermediate_size=64, intermediate_size=96, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=2,
    first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
)  # fmt: skip
QWEN = dict(moe_intermediate_size=64, intermediate_size=96, num_experts=4, num_experts_per_tok=2)
MODELS = dict(
    deepseek_v2=dict(MLA, topk_method="greedy", n_group=None, topk_group=None, head_dim=8),
    deepseek_v3=dict(MLA, n_group=1, topk_group=1),
    olmoe=dict(intermediate_size=64, num_experts=4, num_experts_per_tok=2),
    qwen2_moe=dict(QWEN, shared_expert_intermediate_size=128),
    qwen3_moe=dict(QWEN, head_dim=8),
    mixtral=dict(intermediate_size=64, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    gpt_oss=dict(intermediate_size=64, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    glm4_moe=dict(QWEN, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, head_dim=8, n_group=1, topk_group=1),
)  # fmt: skip


def tiny(kind, **more):
    """A random model whose experts matter: its weights are three times as large as usual, its biases not zero."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**COMMON, **MODELS[kind], **more})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.1) if "bias" in name or "sinks" in name else p.mul_(3) if p.dim() > 1 else None
    return model


IDX = torch.randint(2, 384, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(model, idx=IDX):
    with torch.no_grad():
        return model(input_ids=idx, use_cache=False).logits


def worst(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(params=MODELS)
def model(request):
    return tiny(request.param)


def without(model, width):
    """The model with the neurons beyond a width taken out by hand: what writes them to the output is zero."""
    with torch.no_grad():
        for name, m in model.named_modules():
            if name.endswith("experts") and hasattr(m, "gate_up_proj"):
                down = m.down_proj if m.is_transposed else m.down_proj.mT  # (E, H, d)
                down[:, int(width * down.size(1)) :] = 0
            elif name.endswith(("shared_expert", "shared_experts")):
                m.down_proj.weight[:, int(width * m.down_proj.in_features) :] = 0
    model.set_experts_implementation("eager")
    return model


def test_a_width_is_a_prefix(model):
    stock = logits(model)
    assert adapt.set_width(model, 1.0) is model and model.config._experts_implementation == "slimmable"
    assert worst(logits(model), stock) == 0
    for width in (0.75, 0.5, 0.25):
        got = logits(adapt.set_width(model, width))
        expected = logits(without(tiny(model.config.model_type), width))
        assert worst(got, expected) < 2e-6
        assert worst(got, stock) > 1e-3
    assert worst(logits(adapt.set_width(model, 1.0)), stock) == 0


def test_a_policy_gives_every_token_its_widths(model):
    """Tokens of the same width together must be what each width gives alone: checked at the experts module itself."""
    experts = next(m for n, m in model.named_modules() if n.endswith("experts") and hasattr(m, "gate_up_proj"))
    x, expert = torch.randn(40, 32), torch.stack([torch.randperm(4)[:2] for _ in range(40)])
    weight = torch.rand(40, 2)
    policy = RouterWidth(0.5, 1.0)
    with torch.no_grad():
        adapt.set_width(model, policy)
        got, expected, widths = experts(x, expert, weight), torch.zeros(40, 32), policy.widths(weight)
        assert len(widths.unique()) > 5
        for level in range(1, GRID + 1):
            adapt.set_width(model, level / GRID)
            for k in range(2):
                mine = (widths[:, k] * GRID).round() == level
                if mine.any():
                    expected[mine] += experts(x[mine], expert[mine, k : k + 1], weight[mine, k : k + 1])
    assert worst(got, expected) < 2e-6


def test_sorting_changes_the_order_only(model):
    stock = logits(model)
    for batches in ((), (IDX,)):
        adapt.sort_neurons(model, batches)
        assert worst(logits(model), stock) < 2e-6
    for m in adapt.slim_all(model).values():  # by text, in descending order, against activations spelled out
        assert m.slim.seen is None
    # sorted, half a model is nearer to the whole one than when it is sorted the other way round
    near = worst(logits(adapt.set_width(model, 0.5)), stock)
    with torch.no_grad():
        for m in adapt.slim_all(model).values():
            for w in adapt.neurons(m):
                w.copy_(w.flip(1))
    assert near < worst(logits(model), stock)


def test_importance_is_rms_activation_times_output_norm():
    model = tiny("qwen3_moe", num_hidden_layers=1)
    experts, seen = model.model.layers[0].mlp.experts, []
    experts.register_forward_pre_hook(lambda m, args: seen.append(args))
    gate_up, down = experts.gate_up_proj.detach().clone(), experts.down_proj.detach().clone()
    adapt.sort_neurons(model, [IDX])
    x, expert, _ = seen[0]
    for e in range(4):
        gate, up = F.linear(x[(expert == e).any(1)], gate_up[e]).chunk(2, -1)
        importance = (F.silu(gate) * up).square().mean(0).sqrt() * down[e].norm(dim=0)
        order = importance.argsort(descending=True)
        assert torch.equal(experts.down_proj[e], down[e][:, order])
        assert torch.equal(experts.gate_up_proj[e], torch.cat([gate_up[e][:64][order], gate_up[e][64:][order]]))


def test_saved_and_sliced_models_are_stock(model, tmp_path):
    adapt.sort_neurons(model)
    model.save_pretrained(tmp_path / "sorted")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sorted")
    assert again.config._experts_implementation != "slimmable"
    assert worst(logits(again), logits(adapt.set_width(model, 1.0))) == 0
    for width in (0.5, 0.25):
        adapt.slice_experts(model, width).save_pretrained(tmp_path / f"{width}")
        sliced = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{width}")
        assert worst(logits(sliced), logits(adapt.set_width(model, width))) == 0
        assert sliced.num_parameters() < again.num_parameters()
        names = [set(safe_names(tmp_path / name)) for name in ("sorted", f"{width}")]
        assert names[0] == names[1]  # those of the original checkpoint


def safe_names(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as f:
        return list(f.keys())


def gradients(model):
    model.zero_grad()
    model(input_ids=IDX, labels=IDX, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradients(model):
    stock = gradients(model)
    adapt.set_width(model, 1.0)
    for name, g in gradients(model).items():
        assert (g - stock[name]).norm() <= 1e-6 * stock[name].norm()
    got = gradients(adapt.set_width(model, 0.5))
    for name, m in adapt.slim_all(model).items():
        for p in m.parameters():
            p.data = p.grad  # so that `neurons` shows gradients
        for w in adapt.neurons(m):
            assert w[:, : w.size(1) // 2].any() and not w[:, w.size(1) // 2 :].any()
    spelled_out = without(tiny(model.config.model_type), 0.5)
    for name, g in gradients(spelled_out).items():
        if "down_proj" not in name:  # there, those of what was zeroed
            assert (g - got[name]).norm() <= 2e-5 * g.norm()


def test_generation_and_batches(model):
    adapt.set_width(model, 0.5)
    alone = torch.cat([logits(model, row[None]) for row in IDX])
    assert worst(logits(model), alone) < 1e-5
    got, idx = model.generate(IDX, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0), IDX
    for _ in range(8):
        idx = torch.cat([idx, logits(model, idx)[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, idx)


def test_policies():
    model = tiny("qwen2_moe")
    layers = [m for m in adapt.slim_all(model).values() if hasattr(m, "has_gate")]
    adapt.set_width(model, PerLayer([0.5, RouterWidth(0.25)]))
    assert layers[0].slim.width == 0.5 and layers[1].slim.width.budget == 0.25
    adapt.set_width(model, 0.5, shared=False)
    assert [m.slim.width for m in adapt.slim_all(model).values()] == [0.5, 0.5, 1, 1]
    # the first expert alone is a model of one expert per token, also where the router normalises
    for kind in ("mixtral", "olmoe"):
        one = logits(tiny(kind, num_experts_per_tok=1))
        assert worst(logits(adapt.set_width(tiny(kind), FewerExperts(1))), one) < 2e-6
    for bad in (0, 1.5, True, "half"):
        with pytest.raises(UsageError, match="width must be"):
            adapt.set_width(model, bad)


def test_bfloat16_rows_are_computed_as_stock_computes_them():
    stock, model = tiny("qwen3_moe").bfloat16(), tiny("qwen3_moe").bfloat16()
    assert worst(logits(adapt.set_width(model, 1.0)).float(), logits(stock).float()) == 0
    assert worst(logits(adapt.set_width(model, 0.5)).float(), logits(without(stock, 0.5)).float()) < 0.05


# -----------------------------------------------------------------------------
# Training


def test_widths_are_a_function_of_seed_step_and_micro_batch():
    def drawn(seed, step, micros):
        model = tiny("deepseek_v3").train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        widths, seen = adapt.train_widths(model, "serve", seed, step), []
        for _ in range(2):
            for _ in range(micros):
                model(input_ids=IDX, labels=IDX).loss.backward()
                policy = adapt.slim_all(model)["model.layers.1.mlp.experts"].slim.drawn
                seen.append(torch.cat([policy.budget, policy.gamma], 1))
            optimizer.step()
        assert widths.step == step + 2
        model.eval()
        full = logits(model)
        widths.remove()
        assert worst(full, logits(model)) == 0  # outside training mode it is at its own width
        model.train()
        assert worst(logits(model), full) == 0  # and after remove()
        return seen

    first = drawn(0, 0, 2)
    assert all(len(w.unique(dim=0)) == 2 and ((w >= 0.0) & (w <= 3)).all() for w in first)  # one per sequence
    assert len(torch.stack(first).unique(dim=0)) == 4
    assert all(map(torch.equal, first, drawn(0, 0, 2)))
    assert all(map(torch.equal, first[2:], drawn(0, 1, 2)))  # a resumed run
    assert not torch.equal(first[0], drawn(1, 0, 2)[0])


def test_recipe_mose_is_equation_6():
    """The mean of the losses, and of the gradients, at full width and at the width that is drawn."""
    got, hand = tiny("qwen2_moe").train(), tiny("qwen2_moe").train()
    widths = adapt.train_widths(got, "mose", seed=3)
    out = got(input_ids=IDX, labels=IDX)
    out.loss.backward()
    assert len(out.logits) == len(IDX)
    drawn = adapt.slim_all(got)["model.layers.0.mlp.experts"].slim.drawn.budget.unique().tolist()
    assert len(drawn) == 2 and drawn[1] == 1
    losses = [adapt.set_width(hand, round(w, 2))(input_ids=IDX, labels=IDX).loss for w in drawn]
    (sum(losses) / 2).backward()
    assert out.loss.item() == pytest.approx(sum(losses).item() / 2, rel=1e-6)
    for (name, a), b in zip(got.named_parameters(), hand.parameters()):
        if "shared" not in name:  # whose steps of 8 neurons are of another size, one width for all against one a token
            assert (a.grad - b.grad).norm() <= 2e-5 * b.grad.norm(), name
    with pytest.raises(UsageError, match="labels"):
        got(input_ids=IDX)
    widths.remove()


def test_gradient_checkpointing_runs_the_same_widths_again():
    def grads(checkpointing):
        model = tiny("deepseek_v2").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        adapt.train_widths(model, "serve", seed=1)
        return gradients(model)

    plain, again = grads(False), grads(True)
    assert all((plain[n] - again[n]).norm() <= 1e-6 * plain[n].norm() for n in plain)


def test_selection_biases_move_towards_balance():
    model = tiny("deepseek_v3").train()
    bias = dict(model.named_buffers())["model.layers.1.mlp.gate.e_score_correction_bias"]
    experts, load = adapt.experts_of(model)["model.layers.1.mlp.experts"], torch.zeros(4)
    before = bias.clone()
    experts.register_forward_pre_hook(lambda m, args: load.add_(torch.bincount(args[1].flatten(), minlength=4)).sum() < 0 or None)
    widths = adapt.train_widths(model, "moe", bias_rate=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        model(input_ids=IDX, labels=IDX).loss.backward()
    optimizer.step()
    assert torch.equal(bias, before + 0.01 * (load.mean() - load).sign()) and load.min() < load.max()
    widths.remove()
