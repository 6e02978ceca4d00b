import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, HERE, TINY, call, read_log, train_tiny, write_shard

import train
from model import GPT, FewerExperts, GPTConfig, Stats, UsageError
from prepare import Shards, open_dataset

LINE = [sys.executable, HERE / "train.py", "demo", *TINY]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def load(out):
    return torch.load(Path(out) / "last.pt", weights_only=True)


def assert_same(a, b):
    """Two runs came to the same weights and the same optimizer state, bit for bit."""
    assert a["step"] == b["step"] and a["model"].keys() == b["model"].keys()
    for name, p in a["model"].items():
        assert torch.equal(p, b["model"][name]), name
    for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(x[key], y[key]) for key in x)


def without_times(log):
    return [{k: v for k, v in line.items() if "seconds" not in k and k != "tokens_per_s"} for line in log]


def evaluations(log):
    return {line["step"]: line["val_loss"] for line in log if "val_loss" in line}


class TestRecipes:
    def test_they_run_the_passes_they_promise(self):
        rng, probs = np.random.default_rng(0), torch.rand(50, 2)
        o = {recipe: train.TrainConfig(recipe=recipe, block_size=8) for recipe in train.RECIPES}
        narrow, few, drawn = set(), set(), []
        for _ in range(300):
            passes = {recipe: train.training_passes(o[recipe], rng) for recipe in train.RECIPES}
            assert passes["moe"] == [(1.0, 1)]
            assert passes["mose"][0] == (1.0, 0.5) and passes["mose"][1][1] == 0.5
            narrow.add(passes["mose"][1][0])
            ((policy, weight),) = passes["serve"]
            assert weight == 1 and policy.n.shape == (16 * 8, 1) and policy.n.min() >= 0.2  # every token's own
            drawn += policy.n.flatten().tolist()
            ((policy, weight),) = passes["m-moe"]
            rows = policy.at(0).widths(probs).unique(dim=0).tolist(), policy.at(1).widths(probs).unique(dim=0).tolist()
            assert weight == 1 and all(len(row) == 1 for row in rows)
            few.add((sum(rows[0][0]), sum(rows[1][0])))
        assert narrow == {level / 20 for level in range(1, 20)}
        parts = [n for n in drawn if n < 1]
        for share in (len(parts), drawn.count(1), drawn.count(2)):
            assert share / len(drawn) == pytest.approx(1 / 3, abs=0.03)
        assert len(set(parts)) > 0.99 * len(parts) and np.mean(parts) == pytest.approx(0.6, abs=0.03)
        assert few == {(1, 1), (1, 2), (2, 1), (2, 2)}, "every layer draws its own number of experts"

    def test_they_learn_what_they_are_for(self, inside, tmp_path):
        narrow, fewer, half = {}, {}, {}
        for recipe in train.RECIPES:
            log = train_tiny(tmp_path / recipe, f"--recipe={recipe}", "--steps=120", "--eval_interval=40")
            val = evaluations(log)
            assert val[120]["1"] < 2.2, "worse than letters alone"
            served = ["1"]
            if recipe == "mose":
                served += ["0.75", "0.5", "0.25"]
            if recipe == "serve":
                served += ["1 experts", "0.5 experts"]
            best = min(val, key=lambda step: np.mean([val[step][name] for name in served]))
            model, checkpoint = train.load_model(tmp_path / recipe / "ckpt.pt")
            assert checkpoint["step"] == best
            narrow[recipe] = val[120]["0.25"] - val[120]["1"]
            batches = open_dataset("tiny", 32)[1].fixed_batches(2048, 8)
            widths = {"half of one": FewerExperts(0.5), "one": FewerExperts(1), "all": 1.0}
            losses, load = train.evaluate(model, batches, widths, "cpu", torch.float32)
            plain = [model(idx, targets)[1].item() for idx, targets in batches]
            assert losses["all"] == pytest.approx(np.mean(plain), rel=1e-5)
            assert load.shape == (2, 4) and torch.allclose(load.mean(1), torch.ones(2))
            fewer[recipe], half[recipe] = losses["one"] - losses["all"], losses["half of one"] - losses["all"]
        assert narrow["mose"] < 0.5 * narrow["moe"]
        assert max(fewer["m-moe"], fewer["serve"]) < 0.5 * fewer["moe"]
        assert half["serve"] < 0.5 * half["moe"]

    def test_a_bias_balances_the_experts_without_a_loss(self, inside, tmp_path):
        spread = {}
        for rate in (0, 0.01):
            log = train_tiny(tmp_path / str(rate), "--recipe=moe", "--balance_coef=0", f"--bias_rate={rate}")
            spread[rate] = max(log[-1]["busiest"]) - min(log[-1]["idlest"])
            assert ("transformer.h.0.mlp.bias" in load(tmp_path / str(rate))["model"]) == (rate > 0)
        assert spread[0.01] < 0.7 * spread[0]

    def test_accumulation_does_not_change_a_step(self, inside):
        steps = []
        for batch_size in (16, 4):
            o = train.TrainConfig(recipe="moe", batch_size=batch_size, block_size=32, tokens_per_step=512,
                                  n_layer=2, n_head=2, n_embd=32, balance_coef=0.0)  # fmt: skip
            torch.manual_seed(0)
            model, data = GPT(train.make_config(o, 257)), open_dataset("tiny", 32)[0]
            micros, stats = range(o.micro_batches), Stats(model.config)
            loss, _ = train.accumulate(o, model, data, 7, micros, "cpu", torch.float32, stats)
            steps.append([loss, *(p.grad for p in model.parameters())])
            assert stats.tokens == 512
        for a, b in zip(*steps):
            assert torch.allclose(a, b, atol=1e-6, rtol=1e-4)

    def test_a_narrow_model_has_narrow_experts(self):
        o = train.TrainConfig(train_width=0.25, n_embd=128, n_head=4)
        assert train.make_config(o, 257).expert_hidden == 128 and train.make_config(o, 257).vocab_size == 320


class TestReports:
    def test_the_log_has_every_step_and_evaluation(self, inside):
        for name in ("mose", "moe", "dense"):
            log = read_log(f"out/{name}")
            val, steps = evaluations(log), [line for line in log if "grad_norm" in line]
            assert list(val) == [0, 20, 40] and val[40]["1"] < val[0]["1"] - 1.5
            assert set(val[0]) == ({"1"} if name == "dense" else {"1", "0.75", "0.5", "0.25"})
            assert [line["step"] for line in steps] == list(range(1, 41))
            assert all(("loss_narrow" in line) == (name == "mose") and line["loss_full"] > 0 for line in steps)
            o = load(f"out/{name}")["options"]
            assert [line["lr"] for line in steps] == [train.learning_rate(i, train.TrainConfig(**o)) for i in range(40)]
        flops = lambda width: 3 * 512 * train.load_model("out/moe/ckpt.pt")[0].flops_per_token(width)[0]
        spent = {name: read_log(f"out/{name}")[-2]["flops"] for name in ("moe", "mose")}
        assert spent["moe"] == pytest.approx(40 * flops(1.0)) and spent["mose"] > 40 * (flops(1.0) + flops(0.05))

    def test_checkpoints_are_plain_and_say_what_they_are(self, inside):
        for name in ("ckpt.pt", "last.pt"):
            c = torch.load(f"out/mose/{name}", weights_only=True)
            assert c["tokenizer"] == "byte" and c["vocab_size"] == 257 and c["recipe"] == "mose" and c["step"] == 40
            assert GPTConfig(**c["config"]).vocab_size == 320
            assert c["tokens"] == 40 * 512 and set(c["model"]) == set(GPT(GPTConfig(**c["config"])).state_dict())
            assert ("optimizer" in c) == (name == "last.pt")

    def test_learning_rate_warms_up_and_ends_at_a_tenth(self):
        o = train.TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0)
        rates = [train.learning_rate(step, o) for step in range(101)]
        assert rates[0] == 0.1 and max(rates) == rates[9] == rates[10] == 1.0 and rates[100] == pytest.approx(0.1)
        assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)

    def test_help_explains_every_option(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            call(train, "--help")
        out = capsys.readouterr().out
        assert all(f"--{name}" in out for name in train.TrainConfig.__dataclass_fields__)

    def test_what_is_likely_a_mistake_is_a_warning(self, inside, tmp_path, capsys, monkeypatch):
        train_tiny(tmp_path / "even", "--n_expert=8", "--eval_interval=10")
        assert "warning" not in capsys.readouterr().out
        train_tiny(tmp_path / "one", "--top_k=1", "--steps=1")
        assert "warning: with --top_k=1" in capsys.readouterr().out
        train_tiny(tmp_path / "right", "--top_k=1", "--steps=1", "--norm_topk_prob=False")
        assert "warning" not in capsys.readouterr().out

        class Collapsed(GPT):
            def __init__(self, config):
                super().__init__(config)
                self.transformer.h[1].mlp.bias += torch.tensor([9.0] * 2 + [0.0] * 6)

        monkeypatch.setattr(train, "GPT", Collapsed)
        train_tiny(tmp_path / "c", "--n_expert=8", "--eval_interval=10")
        out = capsys.readouterr().out
        assert "expert of MoE layer 1 gets 4.0 times" in out and "MoE layer 0" not in out

    def test_a_loss_that_is_not_finite_stops_before_the_update(self, inside, tmp_path):
        with pytest.raises(UsageError, match=r"step \d+: loss .*not finite: \S*\.weight.*saved .*last.pt"):
            train_tiny(tmp_path / "n", "--learning_rate=1e30", "--grad_clip=0", "--warmup_steps=0")
        saved = load(tmp_path / "n")
        assert all(p.isfinite().all() for p in saved["model"].values()) and saved["step"] > 0  # as it was at that step

    def test_only_the_gradients_that_are_not_finite_are_named(self):
        model = GPT(GPTConfig(block_size=8, vocab_size=8, n_layer=2, n_head=1, n_embd=8))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        model.transformer.h[0].mlp.w_in.grad[0, 0] = math.nan
        model.transformer.h[1].ln_1.weight.grad[2] = math.inf
        text = train.not_finite(model, 1.0, 2.0, math.nan)
        assert "transformer.h.0.mlp.w_in, transformer.h.1.ln_1.weight." in text


class TestResume:
    @pytest.mark.parametrize("recipe", ["mose", "serve", "m-moe"])
    def test_a_run_stopped_anywhere_is_the_run_that_was_never_stopped(self, inside, tmp_path, monkeypatch, recipe):
        options = [f"--recipe={recipe}", "--steps=12", "--eval_interval=5", "--dropout=0.1", "--batch_size=4"]
        straight, out = train_tiny(tmp_path / "straight", *options), tmp_path / "x"

        def interrupted(name, call_number, interrupt):
            """Train on, and at this call of a function of train.py, interrupt."""
            plain, calls = getattr(train, name), []

            def counted(*args):
                calls.append(0)
                if len(calls) == call_number:
                    interrupt()
                return plain(*args)

            status = "done"
            with monkeypatch.context() as patch:
                patch.setattr(train, name, counted)
                try:
                    train_tiny(out, *options, *(["--resume"] if (out / "last.pt").exists() else []))
                except (SystemExit, KeyboardInterrupt) as e:  # not pytest.raises: its traceback would keep the lock
                    status = getattr(e, "code", None)
            return load(out)["step"], status

        def die():
            raise KeyboardInterrupt

        ask = lambda number: lambda: os.kill(os.getpid(), number)
        # 4 micro-batches a step: the third step's second, the eighth's last, the ninth's first
        assert interrupted("sequence_losses", 1, die) == (0, None), "in the first evaluation"
        assert interrupted("training_passes", 10, ask(signal.SIGINT)) == (3, 130)
        assert interrupted("training_passes", 20, die) == (5, None), "what the last evaluation saved"
        assert interrupted("training_passes", 9, ask(signal.SIGTERM)) == (8, 130)
        whole = (out / "log.jsonl").read_text().splitlines(keepends=True)
        whole[4:4] = ["\n", "no json\n", "[1, 2]\n"]  # an editor's; and the disk was full, or the power went
        (out / "log.jsonl").write_text("".join(whole) + '{"step": 5, "half a li')
        log = train_tiny(out, *options, "--resume")
        assert_same(load(tmp_path / "straight"), load(out))
        assert without_times(log) == without_times(straight)
        best = [torch.load(folder / "ckpt.pt", weights_only=True) for folder in (tmp_path / "straight", out)]
        assert best[0]["step"] == best[1]["step"] and load(out)["state"] == load(tmp_path / "straight")["state"]

    @pytest.mark.parametrize("closed, interrupt", [(False, True), (True, True), (True, False)])
    def test_ctrl_c_or_a_reader_that_left_saves_and_ends_with_130(self, inside, tmp_path, closed, interrupt):
        out = tmp_path / "r"
        options = [f"--out_dir={out}", "--recipe=mose", "--steps=4000", "--log_interval=1"]
        process = subprocess.Popen([*LINE, *options], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        next(line for line in process.stdout if line.startswith("step 3/"))
        if closed:
            process.stdout.close()
        if interrupt:
            process.send_signal(signal.SIGINT)
        rest = "" if closed else process.stdout.read()
        assert process.wait(60) == 130 and (closed or "saved: continue with --resume" in rest)
        saved = load(out)
        assert 3 <= saved["step"] < 4000 and read_log(out)[-1]["step"] == saved["step"]

    @pytest.mark.slow
    def test_a_run_killed_at_random_moments_loses_nothing(self, inside, tmp_path):
        whole, out, rng, killed = load("out/mose"), tmp_path / "k", np.random.default_rng(0), 0
        options = [f"--out_dir={out}", "--recipe=mose", "--eval_interval=1"]  # a good part of the time goes into saving
        while killed < 20:
            resume = ["--resume"] if (out / "last.pt").exists() else []
            process = subprocess.Popen([*LINE, *options, *resume], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
            process.stdout.readline()  # from here on it works
            try:
                process.wait(rng.uniform(0.1, 0.6))
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
            status, rest = process.wait(), process.stdout.read()
            assert status in (0, -9), rest
            for name in ("ckpt.pt", "last.pt"):  # whole, or not there at all
                if (out / name).exists():
                    train.load_checkpoint(out / name)
            if status == 0:  # all steps done: begin again
                assert_same(whole, load(out))
                shutil.rmtree(out)
        train_tiny(out, *options[1:], *(["--resume"] if (out / "last.pt").exists() else []))
        assert_same(whole, load(out))

    def test_a_resumed_run_replaces_the_best_model_by_a_better_one_only(self, inside, tmp_path):
        train_tiny(tmp_path / "x", "--steps=3")
        saved = load(tmp_path / "x")
        saved["state"]["best"] = 0.0
        torch.save(saved, tmp_path / "x/last.pt")
        call(train, "demo", "--resume", f"--out_dir={tmp_path}/x", "--steps=5")
        assert torch.load(tmp_path / "x/ckpt.pt", weights_only=True)["step"] == 3

    def test_a_run_killed_after_its_first_evaluation_keeps_it_in_the_log(self, inside, tmp_path, monkeypatch):
        def killed(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, "take_step", killed)
            train_tiny(tmp_path / "x", "--steps=3")
        call(train, "--resume", "demo", f"--out_dir={tmp_path}/x")  # options may come first
        assert [line["step"] for line in read_log(tmp_path / "x") if "val_loss" in line] == [0, 3]

    def test_data_may_move_but_not_change(self, inside, tmp_path):
        shutil.copytree("data/tiny", tmp_path / "a")
        train_tiny(tmp_path / "x", f"--dataset={tmp_path}/a", "--steps=3")
        (tmp_path / "a").rename(tmp_path / "b")
        resume = ["demo", "--resume", f"--out_dir={tmp_path}/x", f"--dataset={tmp_path}/b"]
        call(train, *resume, "--steps=5")
        assert load(tmp_path / "x")["step"] == 5
        shard = tmp_path / "b/train_000000.bin"
        body = bytearray(shard.read_bytes())
        body[2000] ^= 1
        shard.write_bytes(body)
        with pytest.raises(UsageError, match="has changed"):
            call(train, *resume, "--steps=6")

    def test_a_second_run_in_the_same_folder_is_refused(self, inside, tmp_path):
        lock = train.lock_folder(tmp_path / "x")
        with pytest.raises(UsageError, match="another run"):
            train_tiny(tmp_path / "x")
        assert not (tmp_path / "x/last.pt").exists()
        lock.close()
        train_tiny(tmp_path / "x", "--steps=1")

    def test_a_full_disk_is_one_line_and_the_old_checkpoint_is_intact(self, inside, tmp_path, monkeypatch):
        train_tiny(tmp_path / "x", "--steps=5")
        old, limits = (tmp_path / "x/last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:  # what a full disk is to one file
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
            with pytest.raises(UsageError, match=r"could not be written.*File too large.*the one before is intact"):
                call(train, "demo", "--resume", f"--out_dir={tmp_path}/x", "--steps=9")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert (tmp_path / "x/last.pt").read_bytes() == old and not list((tmp_path / "x").glob("*.tmp"))


class TestMachine:
    @pytest.mark.parametrize("recipe", [*(pytest.param(r, marks=pytest.mark.slow) for r in ("moe", "mose")), "serve"])
    def test_two_processes_train_as_one(self, inside, tmp_path, recipe):
        options = [f"--recipe={recipe}", "--steps=15", "--eval_tokens=1088"]  # an odd number of sequences
        one = without_times(train_tiny(tmp_path / "1", *options))
        line = [*TORCHRUN, *LINE[1:], *options, f"--out_dir={tmp_path}/2"]
        subprocess.run(line, check=True, env=ENVIRONMENT, capture_output=True)
        two = without_times(read_log(tmp_path / "2"))
        flat = lambda log: [v for line in log for k, v in line.items() if "loss" in k or k == "grad_norm"]
        numbers = lambda v: list(v.values()) if isinstance(v, dict) else [v]
        one, two = (np.array([n for v in flat(log) for n in numbers(v)]) for log in (one, two))
        assert len(one) == len(two) > 30 and np.abs(one - two).max() < 1e-3

    @pytest.mark.parametrize("world, batch_size, fits", [(2, 16, 8), (3, 16, 0), (4, 8, 4), (16, 8, 1), (2, 8, 8)])
    def test_processes_that_do_not_divide_are_told_what_would(self, world, batch_size, fits, monkeypatch):
        monkeypatch.setattr(train.dist, "all_gather_object", lambda out, mine: None)
        check = lambda batch: train.check_processes(
            train.TrainConfig(batch_size=batch, block_size=32, tokens_per_step=512), world, "data"
        )
        if fits != batch_size:
            with pytest.raises(UsageError, match=f"take --batch_size={fits}$" if fits else "multiple of 96$"):
                check(batch_size)
        if fits:
            check(fits)

    def test_processes_with_different_data_are_refused(self, inside, tmp_path):
        shutil.copytree("data", tmp_path / "data")
        write_shard(tmp_path / "data/tiny/val_000000.bin", np.arange(2000) % 200)
        env = dict(ENVIRONMENT, WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(20000 + os.getpid() % 20000))
        both = [
            subprocess.Popen([*LINE, f"--out_dir={tmp_path}/x"], cwd=cwd, stderr=subprocess.PIPE, text=True,
                             env=dict(env, RANK=str(rank), LOCAL_RANK=str(rank)))
            for rank, cwd in enumerate((inside, tmp_path))
        ]  # fmt: skip
        for process in both:
            assert "different data in tiny" in process.communicate(timeout=60)[1] and process.returncode == 2
        assert not (tmp_path / "x/last.pt").exists()

    @pytest.mark.slow
    def test_compiled_it_trains_the_same(self, inside, tmp_path):
        runs = [train_tiny(tmp_path / str(c), "--recipe=serve", "--steps=5", f"--compile={c}") for c in (False, True)]
        for a, b in zip(*map(evaluations, runs)):
            assert a == b
        for a, b in zip(evaluations(runs[0])[5].values(), evaluations(runs[1])[5].values()):
            assert a == pytest.approx(b, abs=1e-3)

    @pytest.mark.slow
    def test_memory_does_not_grow(self, inside, tmp_path, monkeypatch):
        resident, plain = {}, Shards.random_batch

        def watch(self, seed, step, *args):
            resident[step] = int(Path("/proc/self/statm").read_text().split()[1])
            return plain(self, seed, step, *args)

        monkeypatch.setattr(Shards, "random_batch", watch)
        train_tiny(tmp_path / "m", "--steps=2000", "--recipe=serve")
        assert resident[1999] < 1.05 * resident[200]
