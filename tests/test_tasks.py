"""tasks.py: lm_eval's numbers at any width are those of a slow loop. Needs requirements-extras.txt."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="tasks.py needs pip install -r requirements-extras.txt")
import torch
import torch.nn.functional as F
import tyro

import tasks
import train
from model import GPT, GPTConfig, RouterWidth, TopExperts, UsageError

CONFIG = dict(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=32, n_expert=4, moe_every=1)
FILES = """
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{validation: {path}}}}}
training_split: null
test_split: null
validation_split: validation
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: label",
    "word": "output_type: loglikelihood\ndoc_to_text: '{{question}}'\ndoc_to_target: ' {{choices[0]}}'",
    "write": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: ' {{choices[0]}}'",
}
QUESTIONS = [f"What is {i * i}{' and so on' * (i % 5)}?" for i in range(12)]
DOCUMENTS = [dict(question=q, choices=[f"number {i}", "no"], label=i % 2) for i, q in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """lm_eval's tasks and our local ones."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{text}" + FILES.format(path=folder / "documents.jsonl"))
    return tasks.TaskManager(include_path=str(folder))


@pytest.fixture
def folder(tmp_path, monkeypatch, manager):
    """A folder with a random model in ckpt.pt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "TaskManager", lambda include_path: manager)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = GPT(GPTConfig(**CONFIG))
    for p in model.parameters():
        p.data.mul_(3 if p.dim() > 1 else 1)
    state = dict(model=model.state_dict(), config=CONFIG, tokenizer="byte", vocab_size=257, recipe="mose", step=1)
    torch.save(state, "ckpt.pt")
    return tmp_path


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["tasks.py", "ckpt.pt", *args])
    tyro.cli(tasks.main)


def slow_nats(model, context, continuation, width):
    """The log-probability of a continuation in float64, and whether it is greedy, in at most 32 tokens of context."""
    ids = [*context.encode(), *continuation.encode()][-33:]
    logits = model(torch.tensor([ids[:-1]]), width=width)[0][0, :, :257].double()
    logprobs = F.log_softmax(logits, -1)[torch.arange(len(ids) - 1), ids[1:]]
    n = min(len(continuation.encode()), len(ids) - 1)
    return logprobs[-n:].sum().item(), logits[-n:].argmax(-1).tolist() == ids[-n:]


def test_results_are_those_of_a_slow_loop_and_differences_are_paired(folder, monkeypatch, capsys):
    run(monkeypatch, *"--tasks choice word --width 0.5 --budget 0.25 --experts 1 --batch_size=5".split())
    report = json.loads(Path("tasks.json").read_text())
    model, _ = train.load_model("ckpt.pt")
    widths = {"width 1": 1.0, "width 0.5": 0.5, "budget 0.25": RouterWidth(0.25), "experts 1": TopExperts(1)}
    assert list(report["results"]) == list(widths) and (report["recipe"], report["step"]) == ("mose", 1)
    full = {}
    for name, width in widths.items():
        choice = [[slow_nats(model, d["question"], f" {c}", width)[0] for c in d["choices"]] for d in DOCUMENTS]
        word = [slow_nats(model, d["question"], f" {d['choices'][0]}", width) for d in DOCUMENTS]
        right = [scores.index(max(scores)) == d["label"] for scores, d in zip(choice, DOCUMENTS)]
        values = {
            ("choice", "acc"): right,
            ("choice", "nats"): [scores[d["label"]] for scores, d in zip(choice, DOCUMENTS)],
            ("word", "nats"): [nats for nats, _ in word],
            ("word", "acc"): [greedy for _, greedy in word],
        }
        full = full or values
        for (task, metric), expected in values.items():
            got, expected = report["results"][name][task][metric], torch.tensor(expected).double()
            difference = expected - torch.tensor(full[task, metric]).double()
            assert got["value"] == pytest.approx(expected.mean().item(), abs=1e-4)
            assert got["minus_full"] == pytest.approx(difference.mean().item(), abs=1e-4)
            assert got["minus_full_se"] == pytest.approx(difference.std().item() / 12**0.5, abs=1e-4)
    out = capsys.readouterr().out
    n_cut = sum(len(f"{d['question']} {c}") > 33 for d in DOCUMENTS for c in [*d["choices"], d["choices"][0]])
    assert n_cut > 0 and f"budget 0.25: {n_cut} requests were longer than the context and cut" in out
    assert "choice nats: " in out and "|word " in out


def test_mistakes_are_refused_in_one_line(folder, monkeypatch):
    for args, message in (
        (("--tasks", "nothing"), "lm_eval has no task nothing"),
        (("--tasks", "write"), "write generates text, which is not supported"),
        (("--tasks", "choice", "--width", "2"), "width must be"),
    ):
        with pytest.raises(UsageError, match=message):
            run(monkeypatch, *args)
    monkeypatch.setattr(tasks.os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="which is not writable"):
        run(monkeypatch, "--tasks", "choice")
    state = torch.load("ckpt.pt")
    state["config"] = CONFIG | dict(n_expert=1)
    state["model"] = GPT(GPTConfig(**state["config"])).state_dict()
    torch.save(state, "ckpt.pt")
    with pytest.raises(UsageError, match="a dense model runs at full width only"):
        run(monkeypatch, "--tasks", "choice")
