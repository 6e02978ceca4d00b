"""`bench.py frontier` and `speed`: what they say is what ran, and what calibration learns can be served."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import call

import bench
import sample
import train
from model import GPT, GPTConfig, PerLayer, RouterWidth, Stats, UsageError
from prepare import open_dataset

NARROW = bench.BUDGETS[1:]


def config(**kwargs):
    base = dict(block_size=32, vocab_size=64, n_layer=3, n_head=2, n_embd=32, n_expert=4, top_k=2, expert_hidden=64)
    return GPTConfig(**{**base, **kwargs})


@pytest.fixture(scope="module")
def frontier(workshop):
    """The points of three checkpoints, {(run, policy): points}, measured once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop)
        paths = [f"out/{run}/ckpt.pt" for run in ("mose", "moe", "dense")]
        call(bench, "frontier", *paths, "--eval_tokens=2048", "--device=cpu")
        points = {}
        for p in json.loads(Path("out/mose/frontier.json").read_text())["points"]:
            points.setdefault((p["checkpoint"].split("/")[1], p["policy"]), []).append(p)
    return points


class TestFrontier:
    def test_measures_every_policy_and_budget_and_draws_them(self, frontier, inside):
        n = len(NARROW)
        assert {key: len(points) for key, points in frontier.items()} == {
            ("mose", "uniform"): n + 1, ("mose", "router"): n, ("mose", "calibrated"): n, ("mose", "skip"): 2,
            ("mose", "fewer experts"): 1, ("moe", "uniform"): 1, ("moe", "truncated"): n, ("moe", "skip"): 2,
            ("moe", "fewer experts"): 1, ("dense", "uniform"): 1,
        }  # fmt: skip
        assert Path("out/mose/frontier.png").read_bytes().startswith(b"\x89PNG")

    def test_a_point_says_what_ran(self, frontier, inside):
        (val,) = [open_dataset("tiny", 32)[1].fixed_batches(2048, 16)]
        for (run, policy), points in frontier.items():
            model, _ = train.load_model(f"out/{run}/ckpt.pt")
            c = model.config
            for p in points:
                assert p["mean_width"] == pytest.approx(p["budget"], abs=0.025) and p["tokens_per_s"] > 0
                assert p["bits_per_byte"] == pytest.approx(p["loss"] / math.log(2))
                if run != "dense":
                    asked = p["mean_width"] * 2 * c.n_layer * 4 * c.n_embd * c.expert_hidden
                    assert asked * 0.999 <= p["flops_expert"] <= asked * 1.2
                    assert (
                        p["flops_total"] - p["flops_expert"]
                        == model.flops_per_token(0.5)[0] - model.flops_per_token(0.5)[1]
                    )
                if policy in ("uniform", "truncated"):
                    losses = train.sequence_losses(model, val, p["budget"], "cpu", torch.float32)
                    assert p["loss"] == pytest.approx(losses.double().mean().item(), abs=1e-6)

    @pytest.mark.parametrize("top_k, n_shared", [(2, 0), (4, 2), (4, 0)])
    def test_serve_is_measured_by_experts_at_every_budget(self, top_k, n_shared):
        model = GPT(config(top_k=top_k, n_shared=n_shared, expert_hidden=160))  # every step of the grid is whole
        policies = list(bench.frontier_policies(model, "serve", [], "cpu", torch.float32))
        fewer = [(what["budget"], policy) for what, policy in policies if what["policy"] == "fewer experts"]
        assert [budget for budget, _ in fewer] == pytest.approx(NARROW)
        for budget, policy in fewer:
            stats = Stats(model.config)
            model(torch.randint(64, (2, 32)), width=policy, stats=stats)
            assert stats.mean_width(stats.used).item() == pytest.approx(budget, abs=0.013)  # half a step of the grid

    def test_differences_are_taken_sequence_by_sequence(self, frontier, inside):
        model, _ = train.load_model("out/mose/ckpt.pt")
        val = open_dataset("tiny", 32)[1].fixed_batches(2048, 16)
        for p, u in zip(frontier["mose", "router"], frontier["mose", "uniform"][1:]):
            assert p["minus_uniform"] == pytest.approx(p["loss"] - u["loss"], abs=1e-6)
            router, uniform = (
                train.sequence_losses(model, val, width, "cpu", torch.float32).double()
                for width in (RouterWidth(p["budget"]), p["budget"])
            )
            assert p["minus_uniform_se"] == pytest.approx((router - uniform).std().item() / math.sqrt(64), abs=1e-6)

    def test_top_1_spends_its_budget_across_tokens(self, inside, tmp_path):
        torch.manual_seed(0)
        model = GPT(config(top_k=1, norm_topk_prob=False, n_expert=8)).eval()
        idx = torch.randint(0, 64, (4, 32))
        policy = bench.fit_scale(model, [(idx, idx)], 0.4, 1.0, "cpu", torch.float32)
        stats = Stats(model.config)
        model(idx, width=policy, stats=stats)
        assert stats.mean_width(stats.used) == pytest.approx(0.4, abs=0.02)

    def test_policies_of_whole_experts(self):
        probs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]])
        assert bench.skip(0.4).widths(probs).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
        assert bench.top_p(0.7).widths(probs).tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]


class TestCalibration:
    def test_learns_policies_of_the_budget_and_leaves_the_weights_alone(self, inside):
        model, checkpoint = train.load_model("out/mose/ckpt.pt")
        data = open_dataset("tiny", 32)[0]
        batches = [data.random_batch(0, i, 0, 4) for i in range(5)]
        layers = bench.calibrate(model, batches, 0.5, "cpu", torch.float32).policies
        assert len(layers) == 2 and all(p.gamma != 1.0 for p in layers) and layers[0].budget != layers[1].budget
        assert sum(p.budget for p in layers) / 2 == pytest.approx(0.5)
        assert all(torch.equal(p, checkpoint["model"][name]) for name, p in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())

    def test_lowers_the_loss_on_its_text(self, inside):
        model, _ = train.load_model("out/mose/ckpt.pt")
        batches = [open_dataset("tiny", 32)[0].random_batch(0, 0, 0, 8)] * 40
        loss = lambda width: train.sequence_losses(model, batches[:1], width, "cpu", torch.float32).mean().item()
        assert loss(bench.calibrate(model, batches, 0.3, "cpu", torch.float32)) < loss(RouterWidth(0.3)) - 1e-4

    def test_blocks_without_experts_get_none(self):
        model = GPT(config(moe_every=2))
        idx = torch.randint(0, 64, (2, 32))
        policy = bench.calibrate(model, [(idx, idx)] * 3, 0.5, "cpu", torch.float32)
        assert [p is None for p in policy.policies] == [False, True, False]
        model(idx, width=policy)

    def test_what_is_served_is_what_was_measured(self, frontier, inside):
        model, _ = train.load_model("out/mose/ckpt.pt")
        val = open_dataset("tiny", 32)[1].fixed_batches(2048, 16)
        for p in frontier["mose", "calibrated"]:
            policy = bench.load_calibrated("out/mose/ckpt.pt", p["budget"])
            assert isinstance(policy, PerLayer)
            assert [[one.budget, one.gamma] for one in policy.policies] == p["layers"]
            losses = train.sequence_losses(model, val, policy, "cpu", torch.float32)
            assert losses.double().mean().item() == pytest.approx(p["loss"], abs=1e-6)

    def test_checkpoints_of_one_folder_are_told_apart(self, frontier, inside, tmp_path):
        for name in ("ckpt.pt", "last.pt"):
            shutil.copy("out/mose/ckpt.pt", tmp_path / name)
        call(bench, "frontier", tmp_path / "last.pt", "--eval_tokens=64", "--seed=5", "--device=cpu")
        with pytest.raises(UsageError, match=r"ckpt.pt is not calibrated: run .*bench.py frontier .*ckpt.pt"):
            bench.load_calibrated(tmp_path / "ckpt.pt", 0.5)
        call(bench, "frontier", tmp_path / "ckpt.pt", "--eval_tokens=64", "--device=cpu")
        first, second = (bench.load_calibrated(tmp_path / name, 0.5).policies for name in ("last.pt", "ckpt.pt"))
        assert first[0].gamma != second[0].gamma  # another seed

    def test_only_what_was_calibrated_for_these_weights_is_served(self, frontier, inside, tmp_path):
        with pytest.raises(UsageError, match=r"budgets 0.75, 0.5, 0.375, 0.25, 0.2, 0.15, not for 0.4"):
            bench.load_calibrated("out/mose/ckpt.pt", 0.4)
        with pytest.raises(UsageError, match="not calibrated"):
            bench.load_calibrated("out/moe/ckpt.pt", 0.5)
        with pytest.raises(UsageError, match="no checkpoint"):
            bench.load_calibrated("out/mose/none.pt", 0.5)
        shutil.copy("out/mose/last.pt", tmp_path / "ckpt.pt")
        shutil.copy("out/mose/calibrated.json", tmp_path)
        with pytest.raises(UsageError, match="has changed since"):
            bench.load_calibrated(tmp_path / "ckpt.pt", 0.5)
        (tmp_path / "calibrated.json").write_text('{"ckpt.pt": ')
        with pytest.raises(UsageError, match=r"calibrated.json is damaged"):
            bench.load_calibrated(tmp_path / "ckpt.pt", 0.5)

    def test_sample_serves_it(self, frontier, inside, capsys):
        args = ["--checkpoint=out/mose/ckpt.pt", "--num_tokens=20", "--prompt=def ", "--calibrated"]
        call(sample, *args, "--budget=0.5")
        assert "mean width 0.5" in capsys.readouterr().out
        call(sample, *args[:-1], "--experts=2,0.5")
        out = capsys.readouterr().out
        assert "experts 2\n" in out and "mean width 1.000" in out and "mean width 0.250" in out
        with pytest.raises(UsageError, match=r"not for 0.3"):
            call(sample, *args, "--budget=0.3")


class TestSpeed:
    def test_times_every_row_beside_dense(self, inside):
        call(bench, "speed", "--checkpoint=out/mose/ckpt.pt", "--seconds=0", "--device=cpu")
        results = json.loads(Path("out/mose/speed.json").read_text())["results"]
        rows = {}
        for r in results:
            rows.setdefault(r["row"], {})[r["kind"], r["width"], r["column"]] = r
            assert r["seconds"] > 0 and r["tokens_per_s"] > 0 and r["flops_per_s"] > 0
        assert {"layer forward", "layer forward and backward", "training step", "prefill", "decode, batch 1"} <= set(
            rows
        )
        for row in ("layer forward", "prefill", "decode, batch 16"):
            for width, column in ((1.0, "uniform"), (0.25, "uniform"), (0.5, "router")):
                assert rows[row]["moe", width, column]["vs_dense"] > 0 and ("dense", width, column) in rows[row]
        assert {kind for kind, _, _ in rows["training step"]} == {"moe", "serve", "mose", "dense"}
        assert Path("out/mose/speed.png").read_bytes().startswith(b"\x89PNG")

    def test_a_preset_has_its_own_sizes_and_folder(self, inside, monkeypatch):
        monkeypatch.setitem(
            bench.PRESETS, "small", dict(n_layer=2, n_head=2, n_embd=32, block_size=32, expert_hidden=64)
        )
        monkeypatch.setattr(bench, "time_in_turns", lambda cases, *_: {name: (1.0, None) for name in cases})
        call(bench, "speed", "--preset=small", "--device=cpu")
        report = json.loads(Path("out/small/speed.json").read_text())
        assert report["model"] == "small" and report["config"]["n_embd"] == 32

    def test_flops_of_a_step_are_those_of_its_passes(self):
        c = config()
        model, cases = GPT(c), bench.train_cases(c, None, "cpu", torch.float32, False, 2)
        full, half = (model.flops_per_token(width)[0] for width in (1.0, 0.5))
        assert cases["moe", 1.0][1:] == (64, 3 * 64 * full)
        assert cases["mose", 0.5][1:] == (64, 3 * 64 * (full + half))

    def test_what_is_timed_has_all_gradients_every_time(self, monkeypatch):
        counts, grad = [], torch.autograd.grad
        monkeypatch.setattr(torch.autograd, "grad", lambda y, x, g: counts.append(len(x)) or grad(y, x, g))
        for f, _, _ in bench.layer_cases(config(), None, "cpu", torch.float32, False, 64, True).values():
            f(), f()
        assert counts == [4, 4, 3, 3] * len(bench.COLUMNS)


class TestResults:
    def test_means_and_errors(self):
        values = torch.randn(50).double()
        mean, error = bench.mean_and_error([(v, 1) for v in values.tolist()])
        assert mean == pytest.approx(values.mean().item())
        assert error == pytest.approx(values.std().item() / math.sqrt(50))
        assert bench.mean_and_error([(3.0, 1)]) == (3.0, 0.0)

    def test_the_error_of_a_ratio_is_that_of_repeated_draws(self):
        torch.manual_seed(0)
        size = torch.randint(1, 20, (2000, 100)).double()
        value = size * (2 + 0.5 * torch.randn_like(size)) + torch.randn_like(size)
        ratios = value.sum(1) / size.sum(1)
        errors = [bench.mean_and_error(list(zip(v, n)))[1] for v, n in zip(value[:50].tolist(), size[:50].tolist())]
        assert sum(errors) / 50 == pytest.approx(ratios.std().item(), rel=0.1)

    def test_json_is_written_whole_or_not_at_all(self, tmp_path):
        results = dict(points=[dict(a=1, b=[1, 2]), dict(a=None)], name="ü", empty=[])
        bench.write_json(tmp_path / "x.json", results)
        assert json.loads((tmp_path / "x.json").read_text()) == results == bench.read_json(tmp_path / "x.json")
        with pytest.raises(TypeError):
            bench.write_json(tmp_path / "x.json", dict(a=object()))
        assert bench.read_json(tmp_path / "x.json") == results and bench.read_json(tmp_path / "y.json") == {}

    def test_draws_many_panels(self, tmp_path):
        panel = dict(curves=[("a", [1, 2], [1, 2]), ("b", [1], [1], dict(yerr=[0.5]))], title="t", ylim=(0, 3))
        bench.draw(tmp_path / "x.png", [panel] * 6, size=(2, 2))
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
