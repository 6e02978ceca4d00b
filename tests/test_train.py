"""train.py: recipes, resuming bit for bit after any stop, several processes, and refusals, through the command line."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
import train
from model import GPT, UsageError

torch.set_num_threads(1)  # as in the processes that the tests start: results are the same bit for bit
SCRIPT = Path(train.__file__)
SMALL = (
    "demo --dataset=text --n_layer=2 --n_embd=32 --n_head=2 --n_expert=4 --block_size=32 --batch_size=8 "
    "--total_batch_size=512 --max_iters=12 --warmup_iters=2 --eval_interval=5 --eval_tokens=512 --learning_rate=1e-2 "
    "--dropout=0.1 --log_interval=1 --device=cpu"
).split()
RECIPES = ("mose", "mose-router", "random-experts", "moe", "m-moe")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a dataset and a finished run in out/whole."""
    folder = tmp_path_factory.mktemp("train")
    before = os.getcwd()
    os.chdir(folder)
    Path("text.py").write_text("".join(f"def f{i}(x{i % 7}):\n    return x{i % 7} + {i}\n" for i in range(2000)))
    prepare.main(prepare.PrepareConfig(("text.py",)))
    run("--out_dir=out/whole")
    os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def run(*args):
    train.train(train.parse_args([*SMALL, *args]))


def start(*args, command=(sys.executable, SCRIPT), **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *SMALL, *args], env=environment, text=True, **options)


def wait_for_step(out, step):
    """Wait until a run has logged a step."""
    log = Path(out, "log.jsonl")
    while not (log.exists() and f'"step": {step}, "loss"' in log.read_text()):
        time.sleep(0.01)


def read_log(out):
    entries = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "tokens_per_s"} for entry in entries]


def assert_same_run(a, b, tolerance=0.0):
    """The files of two runs hold the same weights, optimizer state, best loss and log."""
    for name in ("last.pt", "ckpt.pt"):
        x, y = (torch.load(Path(out, name), weights_only=True) for out in (a, b))
        assert x["step"] == y["step"] and abs(x["best_val_loss"] - y["best_val_loss"]) <= tolerance
        for key, p in x["model"].items():
            assert (p - y["model"][key]).abs().max() <= tolerance, key
        states = [checkpoint.get("optimizer", {"state": {}})["state"].values() for checkpoint in (x, y)]
        for p, q in zip(*states, strict=True):
            assert all((p[key] - q[key]).abs().max() <= tolerance for key in p)
    if tolerance == 0:
        assert read_log(a) == read_log(b)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_stopped_and_resumed_run_equals_uninterrupted_run(number):
    out = f"out/{number.name}"
    process = start(f"--out_dir={out}", stdout=subprocess.PIPE)
    wait_for_step(out, 6)
    process.send_signal(number)
    shown, _ = process.communicate()
    step = torch.load(f"{out}/last.pt")["step"]
    if number == signal.SIGKILL:
        assert step == 5, "the last evaluation"
    else:
        assert process.returncode == 130 and step > 6
        assert number == signal.SIGHUP or f"stopped after step {step}. Continue with --resume" in shown
    run("--resume", f"--out_dir={out}")
    assert_same_run("out/whole", out)


def test_a_run_saves_when_its_terminal_is_gone():
    main, terminal = pty.openpty()
    args = "--out_dir=out/pty", "--max_iters=500", "--eval_interval=2"
    process = start(*args, stdout=terminal, start_new_session=True)
    wait_for_step("out/pty", 3)
    os.close(main)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    process.wait()
    assert torch.load("out/pty/last.pt")["step"] == 1 + read_log("out/pty")[-1]["step"] > 3


def test_two_processes_give_the_run_of_one_and_save_when_stopped():
    args = "--out_dir=out/two", "--dropout=0", "--max_iters=30", "--eval_interval=30"
    process = start(*args, command=TORCHRUN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for_step("out/two", 7)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert torch.load("out/two/last.pt")["step"] > 7
    run("--out_dir=out/one", *args[1:])
    run("--resume", *args)
    assert_same_run("out/one", "out/two", tolerance=1e-4)


def test_recipes_draw_the_widths_that_they_promise():
    probs, rng = torch.rand(8 * 32, 2), np.random.default_rng(0)
    config = {recipe: train.parse_args([*SMALL, f"--recipe={recipe}"]) for recipe in RECIPES}
    passes = {r: [train.training_passes(c, rng, "cpu") for _ in range(200)] for r, c in config.items()}
    assert all(p == [(1.0, 1.0)] for p in passes["moe"])
    assert {p[1][0] for p in passes["mose"]} == {i / 20 for i in range(1, 20)}
    assert all(p[0] == (1.0, 0.5) and p[1][1] == 0.5 for r in ("mose", "mose-router") for p in passes[r])
    policies = [p[1][0] for p in passes["mose-router"]]
    budget, gamma = (torch.stack([getattr(p, name).view(8, 32) for p in policies]) for name in ("budget", "gamma"))
    assert (budget == budget[..., :1]).all() and (gamma == gamma[..., :1]).all(), "the same for a sequence's tokens"
    for draws, low, high in ((budget, 0.1, 1.0), (gamma, 0.0, 3.0)):
        assert low <= draws.min() < low + 0.05 and high - 0.05 < draws.max() <= high
    n = torch.cat([p[0][0].n for p in passes["random-experts"]])
    assert all(abs((n == i).float().mean() - 1 / 3) < 0.01 for i in (1, 2)) and n.min() >= 0.2
    rows = [str([layer.widths(probs)[0].tolist() for layer in p[0][0].policies]) for p in passes["m-moe"]]
    assert len(set(rows)) == 2**2, "1 or 2 experts in each of two layers"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns(recipe):
    run(f"--recipe={recipe}", f"--out_dir=out/{recipe}", "--max_iters=30", "--eval_interval=30")
    first, last = (entry["val_loss"] for entry in read_log(f"out/{recipe}") if "val_loss" in entry)
    assert all(last[name] < first[name] - 1 for name in first)
    model, checkpoint = train.load_model(f"out/{recipe}/ckpt.pt")
    assert checkpoint["recipe"] == recipe
    assert {"options", "step", "tokenizer", "vocab_size", "config", "model"} < checkpoint.keys()
    batches = prepare.open_dataset("text", 32)[1].eval_batches(512, 5)
    for name, width in train.eval_widths(train.parse_args([*SMALL, f"--recipe={recipe}"])).items():
        losses, mean_width = train.estimate_loss(model, batches, width, "cpu", torch.float32)
        slow = [model(idx[None], targets[None], width) for batch in batches for idx, targets in zip(*batch)]
        assert losses.tolist() == pytest.approx([loss.item() for _, loss, _ in slow], abs=1e-5)
        assert mean_width == pytest.approx(np.mean([stats.width.mean().item() for _, _, stats in slow]))
        assert losses.mean().item() == pytest.approx(last[name], abs=1e-5)


def test_the_gradient_is_the_mean_over_micro_batches_and_passes():
    config = train.parse_args([*SMALL, "--dropout=0", "--batch_size=4"])
    config.model.vocab_size, data = 320, prepare.open_dataset("text", 32)[0]
    torch.manual_seed(0)
    model = GPT(config.model)
    _, load, width = train.accumulate_gradients(config, model, data, 3, range(4), "cpu", torch.float32)
    got, total, widths = [p.grad.clone() for p in model.parameters()], 0.0, []
    model.zero_grad()
    for micro in range(4):
        rng = np.random.default_rng([config.seed, 3, 1 + micro])
        rng.integers(2**62)
        idx, targets = (t[4 * micro : 4 * micro + 4] for t in data.batch(config.seed, 3, 0, 16))
        for w, weight in train.training_passes(config, rng, "cpu"):
            _, loss, router = model(idx, targets, w)
            total, widths = total + weight * (loss + router.loss) / 4, [*widths, router.width.mean()]
    total.backward()
    assert all((a - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-7 for a, p in zip(got, model.parameters()))
    assert width.item() == pytest.approx(torch.stack(widths).mean().item()) and load.sum() == 2 * 2 * 2 * 16 * 32


def test_learning_rate_schedule_and_balancing_by_bias():
    config = train.parse_args([*SMALL, "--warmup_iters=10", "--max_iters=110"])
    rates = [train.get_lr(i, config) for i in (0, 9, 10, 60, 110, 200)]
    assert rates == pytest.approx([1e-3, 1e-2, 1e-2, 5.5e-3, 1e-3, 1e-3])
    run("--bias_rate=0.5", "--balance_coef=0", "--max_iters=1", "--out_dir=out/bias")
    bias = torch.load("out/bias/last.pt")["model"]["transformer.h.0.mlp.bias"]
    assert set(bias.abs().tolist()) <= {0.0, 0.5} and bias.unique().numel() > 1
    model = GPT(train.GPTConfig(**torch.load("out/bias/last.pt")["config"]))
    train.balance_experts(model, torch.tensor([[9.0, 5, 1, 5], [5, 5, 5, 5]]), 0.1)
    assert [b.mlp.bias.tolist() for b in model.transformer.h] == [pytest.approx([-0.1, 0, 0.1, 0]), [0, 0, 0, 0]]


def test_a_loss_that_is_not_finite_stops_before_the_update():
    with pytest.raises(UsageError, match="stopped. out/nan/last.pt is the latest save"):
        run("--learning_rate=1e30", "--warmup_iters=0", "--out_dir=out/nan")
    assert all(p.isfinite().all() for p in torch.load("out/nan/last.pt")["model"].values())


def test_resuming_with_other_options_says_what_changes(capsys):
    run("--resume", "--out_dir=out/whole", "--max_iters=13", "--batch_size=4")
    out = capsys.readouterr().out
    assert "resuming at step 12: the learning rate was 0.00122 and goes on at 0.00118" in out
    assert "batch_size was 8: from here on, other random widths are drawn" in out


def test_weights_and_biases_gets_every_step_and_continues_its_run(monkeypatch):
    logged, started = [], []
    stub = types.SimpleNamespace(run=types.SimpleNamespace(id="run-7"), log=lambda entry, step: logged.append(step))
    stub.init = lambda **options: started.append(options["id"])
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setattr(train, "find_spec", lambda name: True)
    run("--wandb_project=p", "--out_dir=out/wandb", "--max_iters=3")
    run("--resume", "--out_dir=out/wandb", "--max_iters=5")
    assert started == [None, "run-7"] and sorted(set(logged)) == list(range(6))


@pytest.mark.parametrize("args, message", [
    ("--dataset=none --out_dir=out/x", "no dataset 'none' in data/"),
    ("--resume --out_dir=out/none", "cannot read the checkpoint out/none/last.pt: No such file"),
    ("--out_dir=out/whole", "out/whole already holds a run: continue it with --resume"),
    ("--resume --out_dir=out/whole --recipe=moe", "the run in out/whole has --recipe=mose: it cannot be changed"),
    ("--resume --out_dir=out/whole --n_expert=8", "has another model or other data"),
    ("--n_expert=1", "a dense model has no widths for recipe mose to train: choose --recipe=moe"),
    ("--top_k=1", "top_k=1 needs --no-norm_topk_prob"),
    ("--batch_size=7", "total_batch_size 512 is no multiple of batch_size"),
    ("--eval_interval=0", "eval_interval and log_interval must be at least 1"),
    ("--vocab_size=100 --out_dir=out/x", "--vocab_size comes from the data and is 320"),
    ("--wandb_project=p --out_dir=out/x", "pip install wandb"),
])  # fmt: skip
def test_mistakes_are_refused_in_one_line_before_anything_is_written(args, message, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=message) as error:
        run(*args.split())
    assert "\n" not in str(error.value) and not Path("out/x").exists()


def test_files_that_are_no_checkpoints_are_refused_in_one_line():
    Path("damaged.pt").write_bytes(Path("out/whole/last.pt").read_bytes()[:5000])
    torch.save({"model_args": {}}, "nanogpt.pt")
    for path, message in (("damaged.pt", "damaged"), ("nanogpt.pt", "is not a checkpoint"), ("out", "Is a directory")):
        with pytest.raises(UsageError, match=message):
            train.load_model(path)
