"""sample.py: text at the widths that were asked for, and refusals, through the command line."""

import json
import sys
from pathlib import Path

import pytest
import torch
import tyro

import sample
from model import GPT, GPTConfig, PerLayer, RouterWidth, TopExperts, UsageError

CONFIG = dict(block_size=64, vocab_size=320, n_layer=2, n_head=2, n_embd=32, n_expert=4, moe_every=1)


@pytest.fixture(autouse=True)
def model(tmp_path, monkeypatch):
    """A random model, which is also in ckpt.pt, with a frontier.json beside it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**CONFIG)).eval()
    state = dict(model=model.state_dict(), config=CONFIG, tokenizer="byte", vocab_size=257, step=7, best_val_loss=1.5)
    torch.save(state, "ckpt.pt")
    point = dict(step=7, best_val_loss=1.5, policy="trained layers", budget=0.5, layers=[[0.75, 2.0], [0.25, 0.5]])
    Path("frontier.json").write_text(json.dumps(dict(points=[point | dict(best_val_loss=9), point])))
    return model


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--checkpoint=ckpt.pt", *args])
    sample.main(tyro.cli(sample.SampleConfig))


@pytest.mark.parametrize("args, widths", [
    ([], {"width 1": 1.0}),
    (["--width", "1", "0.5"], {"width 1": 1.0, "width 0.5": 0.5}),
    (["--budget", "0.5", "--gamma", "2"], {"budget 0.5": RouterWidth(0.5, 2)}),
    (["--budget", "0.5", "--trained"], {"budget 0.5": PerLayer([RouterWidth(0.75, 2.0), RouterWidth(0.25, 0.5)])}),
    (["--experts", "1", "0.5"], {"experts 1": TopExperts(1), "experts 0.5": TopExperts(0.5)}),
])  # fmt: skip
def test_each_width_gets_the_text_that_the_model_generates(model, monkeypatch, capsys, args, widths):
    Path("prompt.txt").write_bytes("\ufeffa prompt,\r\n".encode())
    run(monkeypatch, "--prompt=FILE:prompt.txt", "--temperature=0", "--max_new_tokens=80", *args)
    out = capsys.readouterr().out
    idx = torch.tensor([[256, *b"a prompt,\r\n"]])
    for name, width in widths.items():
        text = model.generate(idx, 80, temperature=0, width=width, n_vocab=257)[0, len(idx[0]) :].tolist()
        text = b"".join(b"<|endoftext|>" if t == 256 else bytes([t]) for t in text).decode(errors="replace")
        assert f"--- {name}\na prompt,\r\n{text}"[:-3] in out and " tokens/s" in out


@pytest.mark.parametrize("args, message", [
    (["--budget", "0.5", "--width", "1"], "choose one of --width, --budget and --experts"),
    (["--trained"], "--trained and --gamma need a --budget"),
    (["--budget", "0.25", "--trained"], "run bench.py frontier ckpt.pt --budgets 0.25"),
    (["--width", "2"], "width must be above 0 and at most 1, not 2"),
    (["--temperature", "-1"], "temperature must be at least 0, not -1"),
    (["--top_k", "0"], "top_k must be at least 1, not 0"),
    (["--prompt=" + 64 * "x"], "the prompt has 65 tokens, more than the context of 64"),
])  # fmt: skip
def test_mistakes_are_refused_in_one_line(monkeypatch, args, message):
    with pytest.raises(UsageError, match=message):
        run(monkeypatch, *args)
