"""bench.py: points that a loop confirms, test-time training that helps, and tables of times."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bench
import prepare
import train
from model import PerLayer, RouterWidth, TopExperts, UsageError

OPTIONS = (
    "demo --dataset=text --n_layer=2 --n_embd=32 --n_head=2 --n_expert=4 --block_size=32 --batch_size=16 "
    "--total_batch_size=512 --max_iters=60 --warmup_iters=5 --eval_interval=60 --eval_tokens=512 --learning_rate=1e-2"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a dataset and the runs out/mose and out/dense."""
    folder = tmp_path_factory.mktemp("bench")
    before = os.getcwd()
    os.chdir(folder)
    Path("text.py").write_text("".join(f"def f{i}(x{i % 7}):\n    return x{i % 7} + {i}\n" for i in range(2000)))
    prepare.main(prepare.PrepareConfig(("text.py",)))
    for name, more in (("mose", []), ("dense", ["--n_expert=1", "--recipe=moe"])):
        train.train(train.parse_args([*OPTIONS, f"--out_dir=out/{name}", *more]))
    os.chdir(before)
    return folder


@pytest.fixture
def checkpoint(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return "out/mose/last.pt"


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["bench.py", *args])
    bench.tyro.extras.subcommand_cli_from_dict({"frontier": bench.frontier, "speed": bench.speed})


def mean_losses(model, idx, targets, width):
    logits = model(idx, width=width)[0]
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


def test_frontier_agrees_with_a_loop_over_the_validation_text(checkpoint, monkeypatch, capsys):
    run(monkeypatch, "frontier", checkpoint, "out/dense/last.pt", "--budgets", "0.5", "--eval_tokens=640")
    points = json.loads(Path("out/mose/frontier.json").read_text())["points"]
    assert Path("out/mose/frontier.png").stat().st_size > 10_000
    model, saved = train.load_model(checkpoint)
    idx, targets = prepare.open_dataset("text", 32)[1].eval_batches(640, 100)[0]
    with torch.no_grad():
        full = mean_losses(model, idx, targets, 1.0)
        for p in points[:-1]:
            trained = p["layers"] and PerLayer([RouterWidth(*pair) for pair in p["layers"]])
            names = {"uniform": p["budget"], "router": RouterWidth(0.5), "top experts": TopExperts(1)}
            names |= {f"skip below {s}": bench.Skip(s) for s in (0.4, 0.7)}
            names |= {f"top-p {s}": bench.TopP(s) for s in (0.4, 0.7)}
            width = trained or names[p["policy"]]
            losses, stats = mean_losses(model, idx, targets, width), model(idx, width=width)[2]
            assert p["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
            assert p["minus_full"] == pytest.approx((losses - full).mean().item(), abs=1e-5)
            assert p["minus_full_se"] == pytest.approx(
                (losses - full).std().item() / len(full) ** 0.5, rel=1e-3, abs=1e-6
            )
            assert p["mean_width"] == pytest.approx(stats.width.mean().item())
            assert p["flops"] == model.flops_per_token(p["mean_width"]) and p["tokens_per_s"] > 0
            assert (p["step"], p["best_val_loss"]) == (60, saved["best_val_loss"])
    assert [p["policy"] for p in points[:6]] == [
        "uniform", "uniform", "router", "trained gamma", "trained layers", "top experts",
    ]  # fmt: skip
    assert points[-1]["recipe"] == "moe" and points[-1]["checkpoint"] == "out/dense/last.pt", (
        "a dense model has one point"
    )
    router = next(p for p in points if p["policy"] == "router")
    for p in points[3:5]:
        assert p["minus_router"] == pytest.approx(p["loss"] - router["loss"], abs=1e-6)
    assert "trained layers 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("per_layer", [False, True])
def test_test_time_training_moves_towards_lower_loss_and_keeps_the_budget(checkpoint, per_layer):
    model, _ = train.load_model(checkpoint)
    with torch.no_grad():  # a model in which the likelier expert does all the work
        for block in model.transformer.h:
            block.mlp.router.weight *= 4
    batches = prepare.open_dataset("text", 32)[1].eval_batches(4000, 6, between=True)[:20]
    for budget in (0.25, 0.5, 0.875):
        learned = bench.test_time_train(model, batches, budget, "cpu", torch.float32, per_layer)
        before, after = (
            train.estimate_loss(model, batches, policy, "cpu", torch.float32)[0].mean()
            for policy in (RouterWidth(budget), learned)
        )
        assert after <= before
        budgets = [policy.budget for policy in learned.policies]
        assert sum(budgets) == 2 * budget and min(budgets) >= 1 / 16 and max(budgets) <= 1
    gammas = {p.gamma for p in bench.test_time_train(model, batches, 0.25, "cpu", torch.float32, per_layer).policies}
    assert gammas != {1.0} and len(gammas) == (2 if per_layer else 1)


def test_speed_writes_times_of_every_width_beside_dense_networks(checkpoint, monkeypatch):
    monkeypatch.setitem(bench.PRESETS, "demo", ("", train.parse_args(OPTIONS)))
    run(monkeypatch, "speed", "--seconds=0", "--batch_size=2")
    results = json.loads(Path("out/demo/speed.json").read_text())["results"]
    assert {(r["table"], r["width"]) for r in results} == {
        (table, width) for width in bench.WIDTHS
        for table in ("layer, forward", "layer, forward and backward", "training step", "decoding, batch 1")
    }  # fmt: skip
    assert all(r["seconds"] > 0 for r in results) and Path("out/demo/speed.png").exists()


def test_mistakes_are_refused_in_one_line_before_anything_is_measured(checkpoint, monkeypatch):
    monkeypatch.setattr(bench, "estimate_loss", None)
    with pytest.raises(UsageError, match=r"cannot read the checkpoint out/none.pt"):
        run(monkeypatch, "frontier", checkpoint, "out/none.pt")
    with monkeypatch.context() as patch, pytest.raises(UsageError, match="written to out/mose, which is not writable"):
        patch.setattr(bench.os, "access", lambda path, mode: False)
        run(patch, "frontier", checkpoint)
    meta = Path("data/text/meta.json")
    before = meta.read_text()
    meta.write_text(before.replace("byte", "gpt2"))
    with pytest.raises(UsageError, match="needs byte tokens, but its dataset has gpt2"):
        run(monkeypatch, "frontier", checkpoint)
    meta.write_text(before)
