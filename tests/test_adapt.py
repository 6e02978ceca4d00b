"""adapt.py against transformers' own code, on tiny random models of eight architectures."""

import contextlib
import json
import os
import resource
import shutil
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
import prepare
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
    glm4_moe=dict(
        QWEN, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, head_dim=8, n_group=1, topk_group=1
    ),
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
    for m in adapt.slim_all(model).values():
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

    def count(m, args):
        load.add_(torch.bincount(args[1].flatten(), minlength=4))

    experts.register_forward_pre_hook(count)
    widths = adapt.train_widths(model, "moe", bias_rate=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        model(input_ids=IDX, labels=IDX).loss.backward()
    optimizer.step()
    assert torch.equal(bias, before + 0.01 * (load.mean() - load).sign()) and load.min() < load.max()
    widths.remove()


# -----------------------------------------------------------------------------
# Counting


def test_flops_are_those_that_torch_counts(model):
    from torch.utils.flop_counter import FlopCounterMode

    fixed, experts = adapt.count_flops(model.config, IDX.size(1))
    for width in (1.0, 0.5):
        by_hand = tiny(model.config.model_type) if width == 1 else adapt.slice_experts(model, width)
        by_hand.set_experts_implementation("eager")
        by_hand.set_attn_implementation("eager")  # torch does not count the fused one on a CPU
        with FlopCounterMode(display=False) as counter:
            logits(by_hand, IDX[:1])
        assert fixed + width * experts == counter.get_total_flops() / IDX.size(1)


def test_evaluate():
    model = tiny("qwen2_moe")
    windows = torch.randint(2, 384, (6, 16), dtype=torch.int32)
    rows = adapt.evaluate(model, windows, {"full": 1.0, "half": 0.5, "router": RouterWidth(0.5)}, batch_size=4)
    first = None
    for row, width in zip(rows, (1.0, 0.5)):
        out = logits(adapt.set_width(model, width), windows.long())[:, :-1]
        losses = (
            F.cross_entropy(out.flatten(0, 1), windows[:, 1:].flatten().long(), reduction="none").view(6, -1).mean(1)
        )
        first = losses if first is None else first
        assert row["loss"] == pytest.approx(losses.mean().item(), rel=1e-5) and row["mean_width"] == width
        assert row["change"] == pytest.approx((losses - first).mean().item(), abs=1e-6)
        assert row["error"] == pytest.approx((losses - first).std(correction=0).item() / 6**0.5, abs=1e-6)
    assert rows[2]["mean_width"] == pytest.approx(0.5, abs=0.05) and rows[2]["flops_total"] < rows[0]["flops_total"]


# -----------------------------------------------------------------------------
# Text


def test_documents_of_a_dataset_are_those_that_were_prepared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [f"document {i} äöü\n" * 5 for i in range(30)]
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text)
    prepare.main(["texts", "--name=tiny"])
    of_files, of_dataset = [sorted(d for d in adapt.documents(name) if d[0]) for name in ("texts", "tiny")]
    assert of_files == of_dataset and sorted(d[0] for d in of_files) == sorted(texts)
    assert sum(is_val for _, _, is_val in of_files) == 3


# -----------------------------------------------------------------------------
# Command line

SMALL = ["--seq_len=32", "--batch_size=4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the model m, its tokenizer and some text."""
    folder = tmp_path_factory.mktemp("adapt")
    tiny("deepseek_v3").save_pretrained(folder / "m")
    transformers.ByT5Tokenizer().save_pretrained(folder / "m")
    (folder / "text.txt").write_text("".join(f"line {i}: the quick brown fox\n" for i in range(300)))
    return folder


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_sort_slice_and_eval(inside, capsys):
    adapt.main(["sort", "m", "sorted", "--text=text.txt", *SMALL])
    assert worst(logits(load("sorted")), logits(load("m"))) < 2e-6
    adapt.main(["sort", "m", "by-weights"])
    adapt.main(["slice", "sorted", "half", "--width=0.5"])
    half = load("half")
    assert half.config.moe_intermediate_size == 32 and half.num_parameters() < load("m").num_parameters()
    assert transformers.AutoTokenizer.from_pretrained("half")("fox")["input_ids"] == [105, 114, 123, 1]
    assert Path("half/generation_config.json").read_bytes() == Path("m/generation_config.json").read_bytes()
    capsys.readouterr()
    for name in ("sorted", "half"):
        adapt.main(["eval", name, "--text=text.txt", "--budget=0.5", "--eval_tokens=400", "--device=cpu", *SMALL])
    points = [
        {p["policy"]: p for p in json.loads(Path(name, "eval.json").read_text())["points"]}
        for name in ("sorted", "half")
    ]
    assert list(points[0]) == ["width 1", "width 0.75", "width 0.5", "width 0.25", "router 0.5"]
    assert points[0]["width 0.5"]["loss"] == points[1]["width 1"]["loss"]
    assert points[0]["width 0.5"]["flops_total"] == points[1]["width 1"]["flops_total"]
    assert Path("half/eval.png").exists() and "| router 0.5 | 0.5" in capsys.readouterr().out
    assert not list(inside.glob(".*"))  # no leftovers


def test_dry_run_needs_a_config_only(inside, capsys):
    transformers.AutoConfig.from_pretrained("m").save_pretrained("config-only")
    adapt.main(["eval", "config-only", "--dry_run", "--width=1,0.5", "--seq_len=32"])
    out = capsys.readouterr().out
    assert f"{load('m').num_parameters():,} parameters" in out and "| 0.5 |" in out


def test_a_stopped_training_goes_on_as_if_it_had_not_been(inside, monkeypatch):
    options = ["--text=text.txt", "--steps=6", "--accumulate=2", "--seed=5", "--learning_rate=1e-3", *SMALL]
    options.append('--trainer={"save_steps": 2}')
    adapt.main(["train", "m", "trained", *options])
    assert not Path("trained.training").exists() and Path("trained/trainer_state.json").exists()
    stepped = adapt.TrainWidths.stepped

    def stop(self, *args):
        stepped(self, *args)
        if self.step == 5:
            raise InterruptedError

    monkeypatch.setattr(adapt.TrainWidths, "stepped", stop)
    with pytest.raises(InterruptedError):
        adapt.main(["train", "m", "stopped", *options])
    assert not Path("stopped").exists()
    monkeypatch.setattr(adapt.TrainWidths, "stepped", stepped)
    with pytest.raises(UsageError, match="add --resume"):
        adapt.main(["train", "m", "stopped", *options])
    adapt.main(["train", "m", "stopped", *options, "--resume"])
    a, b, before = load("trained").state_dict(), load("stopped").state_dict(), load("m").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert not torch.equal(a[bias], before[bias])


def test_auxiliary_loss_is_trained_on(inside, monkeypatch):
    tiny("olmoe").bfloat16().save_pretrained("olmoe")
    transformers.ByT5Tokenizer().save_pretrained("olmoe")
    seen = []
    monkeypatch.setattr(
        transformers.Trainer, "train", lambda self, **kw: seen.append(self.model.config.output_router_logits)
    )
    adapt.main(["train", "olmoe", "olmoe-trained", "--text=text.txt", "--steps=1", *SMALL])
    config = json.loads(Path("olmoe-trained/config.json").read_text())
    assert seen == [True] and not config["output_router_logits"]
    assert load("olmoe-trained").dtype == torch.bfloat16


def test_refused_in_one_line_and_nothing_written(inside):
    transformers.LlamaConfig(**COMMON, intermediate_size=64).save_pretrained("dense")
    transformers.AutoConfig.for_model(
        "deepseek_v2", **{**COMMON, **MODELS["deepseek_v2"], "moe_intermediate_size": 28}
    ).save_pretrained("odd")
    for name, method in (("fp8", "fp8"), ("mxfp4", "mxfp4")):
        config = json.loads(Path("m/config.json").read_text())
        Path(name).mkdir(exist_ok=True)
        Path(name, "config.json").write_text(json.dumps(dict(config, quantization_config=dict(quant_method=method))))
    os.makedirs("lacking", exist_ok=True)
    for file in Path("m").iterdir():
        Path("lacking", file.name).write_bytes(file.read_bytes())
    from safetensors.torch import load_file, save_file

    weights = load_file("m/model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, "lacking/model.safetensors", metadata=dict(format="pt"))
    os.makedirs("damaged", exist_ok=True)
    for file in Path("m").iterdir():
        Path("damaged", file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    Path("empty").mkdir(exist_ok=True)
    Path("short.txt").write_text("x" * 300)
    before = sorted(inside.rglob("*"))
    for line, says in (
        ("", "sort|train|slice MODEL OUT"),
        ("sort m", "sort|train|slice MODEL OUT"),
        ("sort m m", "exists"),
        ("polish m new", "sort|train|slice"),
        ("slice m new", "--width"),
        ("slice m new --width=1.5", "--width must be a number above 0 and at most 1"),
        ("slice m new --width=half", "numbers"),
        ("slice m new --width=1,0.5", "one --width"),
        ("slice m new --steps=3", "takes no --steps"),
        ("slice m new --widht=0.5", "did you mean --width"),
        ("sort dense new", "no experts that transformers can dispatch"),
        ("slice odd new --width=0.5", "28 neurons"),
        ("slice fp8 new --width=0.5", "FineGrainedFP8Config"),
        ("slice mxfp4 new --width=0.5", "Mxfp4Config"),
        ("slice lacking new --width=0.5", "lacks 1 weights"),
        ("slice damaged new --width=0.5", "could not be loaded"),
        ("slice empty new --width=0.5", "no language model"),
        ("slice nowhere/at-all new --width=0.5", "no language model"),
        ("sort m new --text=nothing.txt --seq_len=32", "no such file"),
        ("sort m new --text=text.txt --seq_len=65", "64 positions"),
        ("eval m --text=short.txt --seq_len=64", "31 tokens for validation"),
        ("eval m", "needs --text"),
        ("train m new", "needs --text"),
        ("train m new --text=text.txt --recipe=best", "--recipe must be one of"),
        ("train m new --text=text.txt --seed=4294967296", "--seed must be"),
        ("train m new --text=text.txt --resume", "no checkpoint"),
        ("train m new --text=text.txt --trainer={}x", "--trainer"),
        ('train m new --text=text.txt --trainer={"lr":1}', "--trainer"),
    ):
        with pytest.raises(UsageError) as e:
            adapt.main(line.split())
        assert says in str(e.value) and "\n" not in str(e.value), (line, str(e.value))
        assert sorted(inside.rglob("*")) == before, line


def test_refused_in_a_model():
    model = tiny("mixtral")
    adapt.experts_of(model)["model.layers.0.mlp.experts"]._is_expert_parallel = True
    with pytest.raises(UsageError, match="parallelism"):
        adapt.set_width(model, 0.5)
    model = tiny("mixtral")
    experts = adapt.experts_of(model)["model.layers.0.mlp.experts"]
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UsageError, match="dequantize"):
        adapt.set_width(model, 0.5)
    model = tiny("deepseek_v3")  # as PEFT leaves it
    shared = model.model.layers[1].mlp.shared_experts
    shared.down_proj.__class__ = type("LoraLinear", (torch.nn.Linear,), {})
    with pytest.raises(UsageError, match="LoraLinear in shared experts"):
        logits(adapt.set_width(model, 0.5))
    full = logits(adapt.set_width(model, 0.5, shared=False))
    assert full.isfinite().all()
    model = tiny("qwen3_moe")
    second = adapt.experts_of(model)["model.layers.1.mlp.experts"]
    second.down_proj = torch.nn.Parameter(second.down_proj[:, :, :32])
    with pytest.raises(UsageError, match="several sizes"):
        adapt.slice_experts(model, 0.5)


@contextlib.contextmanager
def files_of_at_most(n_bytes):
    """As on a disk that is full: writing more to a file fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", [["slice", "m", "new", "--width=1"], ["sort", "m", "new"]])
def test_a_disk_that_fills_leaves_nothing(inside, command):
    before = sorted(inside.rglob("*"))
    with files_of_at_most(50_000), pytest.raises(UsageError, match="new could not be written, and nothing is left"):
        adapt.main(command)
    assert sorted(inside.rglob("*")) == before


@pytest.mark.parametrize("n_bytes", [50_000, 500_000])  # too little for the weights, for AdamW's moments
def test_a_disk_that_fills_during_training(inside, n_bytes):
    command = ["train", "m", "full", "--text=text.txt", "--steps=1", *SMALL]
    with files_of_at_most(n_bytes), pytest.raises((UsageError, OSError)) as e:
        adapt.main(command)
    assert "\n" not in str(e.value) and not Path("full").exists()
    adapt.main(command)  # with more room; nothing to resume, as no checkpoint is whole
    shutil.rmtree("full")


def test_a_missing_extra_is_one_line(tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('none here', name='transformers')")
    here = str(Path(__file__).parent.parent)
    line = [sys.executable, f"{here}/adapt.py", "sort", "a", "b"]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{here}"}
    p = subprocess.run(line, capture_output=True, text=True, env=env)
    message = "adapt.py: transformers is missing: pip install -r requirements-extras.txt\n"
    assert (p.returncode, p.stdout, p.stderr) == (2, "", message)
