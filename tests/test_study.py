"""study/study.py: every row is trained once, and what it reports is what was measured."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from conftest import HERE

from model import UsageError


@pytest.fixture
def study(workshop, tmp_path, monkeypatch):
    """The study, of two tiny rows, in a folder of its own."""
    spec = importlib.util.spec_from_file_location("study", HERE / "study/study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "study"):
        Path(folder).mkdir()
    os.symlink(workshop / "data/tiny", "data/stdlib")
    for program in ("train.py", "bench.py"):
        os.symlink(HERE / program, program)
    small = dict(n_layer=2, n_head=2, n_embd=32, n_expert=4, block_size=32, batch_size=8, tokens_per_step=512)
    small.update(steps=30, warmup_steps=5, eval_tokens=512, eval_interval=30, learning_rate=1e-2, device="cpu")
    monkeypatch.setattr(module, "HERE", tmp_path / "study")
    monkeypatch.setattr(module, "EVAL_TOKENS", 1024)
    monkeypatch.setattr(module, "SCALE", small)
    monkeypatch.setattr(module, "ROWS", {"moe": (2, dict(recipe="moe")), "serve": (1, dict(recipe="serve"))})

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["study.py", *args])
        module.main()

    return module, call


def test_it_trains_its_rows_once_and_reports_them(study, capsys):
    module, call = study
    call("--jobs=1")
    runs = json.loads(Path("study/study.json").read_text())
    assert [(r["row"], r["seed"]) for r in runs] == [("moe", 1337), ("moe", 1338), ("serve", 1337)]
    assert runs[2]["flops"] < 0.95 * runs[0]["flops"] == 0.95 * runs[1]["flops"]
    one, two, serve = (r["points"][0]["loss"] for r in runs)
    table = Path("study/study.md").read_text()
    assert f"| moe | 2 | 0.0M | 1.00 | {(one + two) / 2:.3f} ± {abs(one - two) / 2:.3f} |" in table
    assert f"| serve minus moe, full width, equal text | {serve - one:+.3f} |" in table
    assert all((Path("study") / f"{name}.png").stat().st_size > 10_000 for name in ("study", "training", "tradeoff"))

    files = {f: f.stat().st_mtime_ns for f in Path("out").rglob("*.*")}
    call("--jobs=1")  # everything is there
    assert files == {f: f.stat().st_mtime_ns for f in Path("out").rglob("*.*")}
    module.ROWS["serve"][1]["learning_rate"] = 0.1
    with pytest.raises(UsageError, match="--learning_rate"):
        call("--jobs=1")


def test_what_it_cannot_do_is_refused_before_anything_is_trained(study):
    _, call = study
    for args, word in ((["--rows=moose"], "moose"), (["--jobs=0"], "--jobs"), (["--rows=serve"], "moe")):
        with pytest.raises(UsageError, match=word):
            call(*args)
    assert not Path("out").exists()


def test_losses_are_compared_where_as_many_flops_ran(study):
    module, _ = study
    point = lambda policy, flops, loss: dict(policy=policy, flops_expert=flops, loss=loss)
    one = dict(points=[point("uniform", 100.0, 1.0), point("uniform", 25.0, 2.0), point("router", 60.0, 1.1),
                       point("router", 40.0, 1.5), point("skip", 70.0, 0.9)])  # fmt: skip
    assert module.best_at(one, 1.0) == (1.0, "full width")
    assert module.best_at(one, 0.5) == (pytest.approx(1.3), "router")  # uniform would have 1.67
    assert module.best_at(one, 0.85) == (pytest.approx(0.95), "skip")
    assert module.best_at(one, 0.25) == (2.0, "uniform") and module.best_at(one, 0.2) is None
