"""tasks.py: lm_eval's numbers at any width are those of a slow loop. Needs requirements-extras.txt."""

import functools
import json
import runpy
import sys

import pytest

pytest.importorskip("lm_eval", reason="tasks.py needs pip install -r requirements-extras.txt")
import torch
import tyro

import tasks
from model import GPT, GPTConfig, RouterWidth, TopExperts, UsageError
from train import load_model

CONFIG = dict(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=32, n_expert=4, moe_every=1)
TASKS = {
    "index": "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: label",
    "answer": "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: right",
    "blank": "output_type: multiple_choice\ndoc_to_text: label\ndoc_to_choice: choices\ndoc_to_target: it is",
    "word": "output_type: loglikelihood\ndoc_to_text: question\ndoc_to_target: \"{{['??', '?!'][label]}}\"",
    "text": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: question",
    "write": "output_type: generate_until\ndoc_to_text: question\ndoc_to_target: right",
}
DOCUMENTS = []
for i in range(12):
    question, choices, label = f"What is {i * i}{' and so on' * (i % 7)}?", [f"{i}!", "no"], int(i % 3 == 0)
    DOCUMENTS.append(dict(question=question, choices=choices, label=label, right=choices[label]))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with random models and tasks. lm_eval's own take 7 s to find and are left out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    data = tmp_path / "documents.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    for name, text in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{validation: {data}}}, cache_dir: {tmp_path}}}"
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{text}\n{source}\nvalidation_split: validation")
    (tmp_path / "both.yaml").write_text("group: both\ntask: [index, blank]")
    for name, config in (("ckpt.pt", CONFIG), ("dense.pt", CONFIG | dict(n_expert=1))):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**config))
        model.transformer.wte.weight.data.mul_(3)  # it often repeats a token
        state = dict(model=model.state_dict(), config=config, tokenizer="byte", vocab_size=257, recipe="mose", step=1)
        torch.save(state, name)


def run(args):
    tasks.main(tyro.cli(tasks.TasksConfig, args=[*args.split(), "--include_path=."]))


def slow_nats(model, width, context, continuation):
    """The log-probability of bytes in float64, and whether all are the likeliest, in at most 32 tokens of context."""
    ids = [*context, *continuation][-33:]
    logits = model(torch.tensor([ids[:-1]]), width=width)[0][0, :, :257]
    logprobs = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    n = min(len(continuation), len(ids) - 1)
    return logprobs[-n:].sum().item(), logits[-n:].argmax(-1).tolist() == ids[-n:]


def slow_values(model, width, document):
    """{(task, metric): value} of a document."""
    question, label = document["question"].encode(), document["label"]
    scores = [slow_nats(model, width, question, f" {choice}".encode())[0] for choice in document["choices"]]
    blank = [slow_nats(model, width, choice.encode(), b" it is")[0] for choice in document["choices"]]
    word, greedy = slow_nats(model, width, question, [b"??", b"?!"][label])
    text, windows = [256, *question], [(i, min(i + 32, len(question))) for i in range(0, len(question), 32)]
    parts = [slow_nats(model, width, text[max(0, j - 32) : i + 1], question[i:j])[0] for i, j in windows]
    values = {("word", "nats"): word, ("word", "acc"): greedy, ("text", "nats"): sum(parts)}
    for task, nats in (("index", scores), ("answer", scores), ("blank", blank)):
        values |= {(task, "nats"): nats[label], (task, "acc"): nats.index(max(nats)) == label}
    return values


@torch.no_grad()
def test_results_are_those_of_a_slow_loop_and_differences_are_paired(folder, tmp_path, capsys):
    run("ckpt.pt --tasks both answer word text --width 0.5 1 --budget 0.25 --gamma 2 --experts 1 --batch_size=5")
    report, out = json.loads((tmp_path / "tasks.json").read_text()), capsys.readouterr().out
    assert (report["checkpoint"], report["recipe"], report["step"]) == ("ckpt.pt", "mose", 1)
    rows = {(r["width"], r["task"], r["metric"]): r for r in report["results"]}
    model, full = load_model("ckpt.pt")[0].double(), None
    widths = {"width 1": 1, "width 0.5": 0.5, "budget 0.25, gamma 2": RouterWidth(0.25, 2), "experts 1": TopExperts(1)}
    assert list(dict.fromkeys(width for width, _, _ in rows)) == list(widths)
    texts = [f"{d['question']} {choice}" for d in DOCUMENTS for choice in d["choices"]]
    n_cut = 2 * sum(len(text) > 33 for text in texts) + sum(len(d["question"]) > 31 for d in DOCUMENTS)
    assert n_cut > 0 and f"width 0.5: {n_cut} requests were longer than the context and cut" in out
    for name, width in widths.items():
        values = [slow_values(model, width, document) for document in DOCUMENTS]
        full = full or values
        for key in values[0]:
            row = rows.pop((name, *key))
            value = torch.tensor([float(v[key]) for v in values], dtype=torch.double)
            difference = value - torch.tensor([float(v[key]) for v in full], dtype=torch.double)
            assert row["value"] == pytest.approx(value.mean().item(), abs=1e-4)
            assert row["minus_full"] == pytest.approx(difference.mean().item(), abs=1e-4)
            assert row["minus_full_se"] == pytest.approx(difference.std().item() / 12**0.5, abs=1e-4)
            assert key[1] != "acc" or 0 < row["value"] < 1
            assert f"{row['minus_full']:+.4f} ± {row['minus_full_se']:.4f} against full width" in out
            assert (row["documents"], row["cut_requests"]) == (12, n_cut)
    assert {metric for _, _, metric in rows} == {"acc_norm"}  # no perplexities: they are not means
    assert not any(line.endswith("N/A|") for line in out.splitlines() if "|acc " in line)  # lm_eval's standard errors


def test_mistakes_are_one_line_before_anything_is_measured(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "simple_evaluate", None)
    monkeypatch.setattr(tasks.os, "access", lambda path, mode: path != tmp_path)
    for args, message in (
        ("ckpt.pt --tasks index nothing", "lm_eval has no task nothing:"),
        ("ckpt.pt --tasks index write", "tasks that generate text are not supported: leave out write"),
        ("ckpt.pt --tasks index --width 0.5 2", "width must be"),
        ("ckpt.pt --tasks index --limit 1", "--limit must be at least 2"),
        ("dense.pt --tasks index", "a dense model runs at full width only"),
        (f"{tmp_path}/ckpt.pt --tasks index", f"written to {tmp_path}, which is not writable"),
    ):
        with pytest.raises(UsageError, match=message):
            run(args)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match=r"^tasks.py: .*lm_eval.*: pip install -r requirements-extras.txt$"):
        runpy.run_path(tasks.__file__)
