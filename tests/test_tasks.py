"""`bench.py tasks`: what lm-evaluation-harness is told is what the model says, at every width."""

import copy
import json
import math
import sys

import pytest
import torch
from conftest import call, command, train_tiny

import bench
import prepare
from model import GPT, FewerExperts, GPTConfig, PerLayer, RouterWidth, UsageError

pytest.importorskip("lm_eval", reason="lm_eval is in requirements-extras.txt")
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

LM = type("LM", (bench.Scorer, TemplateLM), {})
POLICIES = {
    "full": 1.0, "quarter": 0.25, "router": RouterWidth(0.5), "one expert": FewerExperts(1),
    "per layer": PerLayer([RouterWidth(0.25, 2.0), RouterWidth(0.75, 0.5)]),
}  # fmt: skip


def make_lm(width=1.0, batch_size=16, tokenizer="byte", model=None, **config):
    """A Scorer of a random model whose answers differ much."""
    vocab_size = 257 if tokenizer == "byte" else 50257
    if model is None:
        base = dict(block_size=32, n_layer=2, n_head=2, n_embd=32, n_expert=4, expert_hidden=64, moe_every=1)
        torch.manual_seed(0)
        model = GPT(GPTConfig(**{**base, **config}, vocab_size=-(-vocab_size // 64) * 64)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.0 if p.dim() < 2 else 3.0)
    checkpoint = dict(tokenizer=tokenizer, vocab_size=vocab_size)
    return LM(model, checkpoint, width, "cpu", torch.float32, batch_size, "test")


def ask(lm, pairs, kind="loglikelihood"):
    requests = [Instance(kind, {}, arguments, i) for i, arguments in enumerate(pairs)]
    return getattr(lm, kind)(requests)


def spelled_out(lm, context, continuation):
    """Log-probability of a continuation and whether it is greedy: every token from the context that the model would
    have, one at a time, nothing batched or padded, in float64."""
    model, block, n_vocab = copy.deepcopy(lm.model).double(), lm.model.config.block_size, lm.n_vocab
    while context.endswith(" "):
        context, continuation = context[:-1], " " + continuation
    before = lm.tok_encode(context) or [lm.eot_token_id]
    after = lm.tok_encode(context + continuation)[len(lm.tok_encode(context)) :]
    total, greedy = 0.0, True
    for start in range(0, len(after), block):  # one piece, unless the continuation alone is longer than the context
        piece = after[start : start + block]
        seen = (before + after[:start])[-(block + 1 - len(piece)) :]
        for token in piece:
            logp = model(torch.tensor([seen]), width=lm.width)[0][0, -1, :n_vocab].log_softmax(-1)
            total, greedy, seen = total + logp[token].item(), greedy and logp.argmax().item() == token, [*seen, token]
    return total, greedy


PAIRS = [
    ("def main(", "):"), ("", "the beginning"), ("import ", "os"), ("two spaces  ", "x"), ("é", "ü and more"),
    ("a context that is longer than the thirty-two tokens of the model, and so cut from the left ", "and this is not"),
    ("short", " continuation that is longer than the context, more than twice as long: it runs in pieces, all of it"),
    ("a", "b"),
]  # fmt: skip


class TestScorer:
    @pytest.mark.parametrize("name", POLICIES)
    @pytest.mark.parametrize("batch_size", [1, 3, 16])
    def test_is_the_loop_over_tokens_in_float64(self, name, batch_size):
        lm = make_lm(POLICIES[name], batch_size)
        for (total, greedy), pair in zip(ask(lm, PAIRS), PAIRS):
            expected = spelled_out(lm, *pair)
            assert abs(total - expected[0]) < 1e-4 and greedy == expected[1]

    def test_with_tokens_of_gpt2(self):
        try:
            prepare.get_tokenizer("gpt2")
        except UsageError as e:
            pytest.skip(str(e))
        lm = make_lm(RouterWidth(0.5), 3, "gpt2")
        for (total, greedy), pair in zip(ask(lm, PAIRS), PAIRS):
            expected = spelled_out(lm, *pair)
            assert abs(total - expected[0]) < 1e-4 and greedy == expected[1]

    def test_greedy_is_what_the_model_would_write(self):
        lm = make_lm()
        ids = lm.model.generate(torch.tensor([lm.tok_encode("def ")]), 5, temperature=0, n_vocab=257)[0].tolist()
        right = [(None, ids[:-5], ids[-5:]), (None, ids[:-5], [*ids[-5:-1], (ids[-1] + 1) % 256])]
        assert [greedy for _, greedy in lm._loglikelihood_tokens(right)] == [True, False]

    def test_padded_ids_never_count(self):
        lm = make_lm()
        before = ask(lm, PAIRS)
        with torch.no_grad():  # the head's rows beyond the vocabulary, which no input embeds
            lm.model.lm_head.weight[257:] += 100 * torch.randn_like(lm.model.lm_head.weight[257:])
        assert ask(lm, PAIRS) == before

    def test_rolling_covers_every_token_once(self):
        lm = make_lm(0.5, 3)
        texts = ["", "short", "x" * 32, "a text of more than thirty-two bytes, " * 5]
        for total, text in zip(ask(lm, [(text,) for text in texts], "loglikelihood_rolling"), texts):
            assert abs(total - spelled_out(lm, "", text)[0]) < 1e-4

    def test_logits_are_computed_where_they_are_scored_only(self, monkeypatch):
        lm, rows = make_lm(), []
        lm.model.lm_head.register_forward_hook(lambda head, x, y: rows.append(len(y)))
        ask(lm, [("a context of many bytes", "ab"), ("another", "abc")])
        assert rows == [5]

    def test_generation_is_greedy_and_stops(self):
        lm = make_lm(0.5)
        options = dict(until=[], max_gen_toks=60)
        (text,) = ask(lm, [("def main", options)], "generate_until")
        ids = torch.tensor([lm.tok_encode("def main")])
        new = lm.model.generate(ids, 60, temperature=0, width=0.5, n_vocab=257)[0, 8:].tolist()
        assert text == lm.tokenizer.decode_bytes(new).decode(errors="replace").split("<|endoftext|>")[0] and text
        stop = text[2:4]
        (cut,) = ask(lm, [("def main", dict(options, until=["never there", stop]))], "generate_until")
        assert cut == text.split(stop)[0]
        assert isinstance(ask(lm, [("", options)], "generate_until")[0], str)
        with pytest.raises(UsageError, match="greedy"):
            ask(lm, [("a", dict(do_sample=True, temperature=1.0))], "generate_until")


# -----------------------------------------------------------------------------
# Whole tasks, of a folder of their own

TASKS = {
    "choice": dict(
        output_type="multiple_choice", doc_to_text="Question: {{q}}\nAnswer:", doc_to_choice="{{choices}}",
        doc_to_target="{{gold}}", metric_list=[dict(metric="acc"), dict(metric="acc_norm")], metadata=dict(version=7),
    ),
    "last": dict(
        output_type="loglikelihood", doc_to_text="{{q}}", doc_to_target=" {{choices[gold]}}",
        metric_list=[dict(metric="perplexity", aggregation="perplexity", higher_is_better=False), dict(metric="acc")],
    ),
    "rolling": dict(
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{q}} {{choices[gold]}}",
        metric_list=[dict(metric="word_perplexity"), dict(metric="byte_perplexity"), dict(metric="bits_per_byte")],
    ),
    "writing": dict(
        output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{choices[gold]}}",
        generation_kwargs=dict(until=["\n"], max_gen_toks=8), metric_list=[dict(metric="exact_match")],
    ),
    "missing_field": dict(output_type="loglikelihood", doc_to_text="{{quest}}", doc_to_target="{{gold}}"),
    "missing_target": dict(output_type="loglikelihood", doc_to_text="{{q}}", doc_to_target="{{golden}}"),
}  # fmt: skip


def documents(n, seed=0):
    """Questions with four answers, one of them right."""
    rng = torch.Generator().manual_seed(seed)
    word = lambda: "".join(chr(97 + i) for i in torch.randint(26, (4,), generator=rng).tolist())
    question = lambda i: " ".join(word() for _ in range(1 + i % 5))
    return [dict(q=question(i), choices=[word() + "xyz"[: j % 3] for j in range(4)], gold=i % 4) for i in range(n)]


def write_tasks(folder, docs):
    folder.mkdir(exist_ok=True)
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    data = dict(dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(folder / "docs.jsonl"))))
    for name, task in TASKS.items():  # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps(dict(task=name, test_split="test", **data, **task)))
    for name, by_size in (("by_document", True), ("by_task", False)):
        metric = dict(metric="acc", weight_by_size=by_size)
        group = dict(group=name, task=["choice", "last"], aggregate_metric_list=[metric], metadata=dict(version=1))
        (folder / f"{name}.yaml").write_text(json.dumps(group))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"), documents(30))


@pytest.fixture
def manager(folder, monkeypatch):
    """lm_eval's 14,000 task files take seconds to read: leave them out."""
    real = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda self, **o: real(self, **{**o, "include_defaults": False}))
    return TaskManager(include_path=str(folder))


def run_tasks(*args):
    call(bench, "tasks", *args, "--device=cpu")
    path = next((a for a in args if not a.startswith("--")), "out/demo/ckpt.pt")
    with open(path.replace("ckpt.pt", "tasks.json")) as f:
        return json.load(f)


def find(results, **what):
    (found,) = [r for r in results if what.items() <= r.items()]
    return found


BAD = [
    (["--tasks=choise"], "no task 'choise'; did you mean choice?"),
    (["--tasks="], "which tasks"),
    (["--tasks=missing_field"], "missing_field: UndefinedError: 'quest'"),
    (["--tasks=missing_target"], "missing_target: UndefinedError: 'golden'"),
    (["--tasks=choice", "--limit=0"], "--limit"),
    (["--tasks=choice", "--width=0.5,x"], "0.5,x"),
    (["--tasks=choice", "--width=1.5"], "--width"),
    (["--tasks=choice", "--budget=0"], "budget"),
    (["--tasks=choice", "--experts=0"], "experts must be"),
    (["--tasks=choice", "--include_path=nowhere"], "nowhere"),
    (["--tasks=choice", "--calibrated"], "--budget"),
    (["--tasks=choice,last", "--bugdet=1"], "did you mean --budget"),
    (["--tasks=choice", "--budget=0.5", "--calibrated"], "not calibrated"),
    (["out/dense/ckpt.pt", "--tasks=choice", "--width=0.5"], "dense"),
    (["out/none.pt", "--tasks=choice"], "none.pt"),
]


def as_gpt2(transformers, model, n_vocab):
    """A dense GPT as transformers' GPT-2, with biases of 0 and without the padding of the vocabulary."""
    c = model.config
    config = transformers.GPT2Config(
        vocab_size=n_vocab, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        n_inner=c.expert_hidden, activation_function="gelu", bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    gpt2, mine = transformers.GPT2LMHeadModel(config).eval(), model.state_dict()
    with torch.no_grad():
        for name, p in gpt2.named_parameters():
            if name.endswith(".bias"):
                p.zero_()
            else:  # its Conv1D holds the transpose
                p.copy_(mine[name].T if ".c_" in name else mine[name][: len(p)])
    return gpt2


def bytes_for_transformers(transformers):
    """Its tokenizer whose tokens are our bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = Tokenizer(models.BPE({char: byte for byte, char in bytes_to_unicode().items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def equal(a, b):
    """Answers and scores: numbers to 1e-4, all else exactly."""
    if isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == (pytest.approx(b, abs=1e-4, rel=1e-5) if isinstance(b, float) else b)


class TestTasks:
    def test_batches_do_not_change_answers(self, manager):
        said = []
        for batch_size in (1, 7, 32):
            out = evaluate(make_lm(RouterWidth(0.5), batch_size), manager.load(list(TASKS)[:4]), bootstrap_iters=0)
            said.append([sample["filtered_resps"] for samples in out["samples"].values() for sample in samples])
        assert equal(said[0], said[1]) and equal(said[0], said[2])

    def test_a_dense_model_scores_as_lm_evals_own_model_of_transformers(self, manager):
        transformers = pytest.importorskip("transformers", reason="transformers is in requirements-extras.txt")
        from lm_eval.models.huggingface import HFLM

        lm = make_lm(n_expert=1, top_k=1, expert_hidden=64)
        tokenizer = bytes_for_transformers(transformers)
        assert tokenizer.encode("ü a") == lm.tok_encode("ü a") and tokenizer.eos_token_id == lm.eot_token_id
        hf = HFLM(as_gpt2(transformers, lm.model, 257), tokenizer=tokenizer, batch_size=5, max_length=32)
        mine, theirs = (evaluate(one, manager.load(list(TASKS)[:4]), bootstrap_iters=0) for one in (lm, hf))
        for name, samples in theirs["samples"].items():
            for a, b in zip(mine["samples"][name], samples):
                assert equal(a["filtered_resps"], b["filtered_resps"]), (name, b["arguments"])
            assert equal(list(mine["results"][name].values()), list(theirs["results"][name].values()))

    def test_scores_errors_and_differences_are_those_of_the_documents(self, inside, manager, folder):
        args = [
            "out/mose/ckpt.pt",
            "--tasks=choice,last,rolling",
            f"--include_path={folder}",
            "--width=0.25",
            "--budget=0.5",
            "--experts=0.5",
        ]
        results = run_tasks(*args)["results"]
        assert {(r["task"], r["policy"], r["budget"]) for r in results} == {
            (task, *width) for task in ("choice", "last", "rolling")
            for width in (("uniform", 1.0), ("uniform", 0.25), ("router", 0.5), ("fewer experts", 0.25))
        }  # fmt: skip
        model, checkpoint = bench.load_model("out/mose/ckpt.pt")
        for policy, budget, width in (
            ("uniform", 0.25, 0.25), ("router", 0.5, RouterWidth(0.5)), ("fewer experts", 0.25, FewerExperts(0.5)),
        ):  # fmt: skip
            lms = [LM(model, checkpoint, w, "cpu", torch.float32, 16, "") for w in (width, 1.0)]
            narrow, full = (evaluate(lm, manager.load(["choice", "last", "rolling"]), bootstrap_iters=2) for lm in lms)
            choice = find(results, task="choice", policy=policy, budget=budget)
            assert choice["chance"] == 0.25 and choice["version"] == 7 and choice["documents"] == 30
            for metric in ("acc", "acc_norm"):
                scores, wholes = ([sample[metric] for sample in one["samples"]["choice"]] for one in (narrow, full))
                mine, theirs = choice["metrics"][metric], narrow["results"]["choice"]
                assert mine["value"] == pytest.approx(theirs[f"{metric},none"])
                assert mine["se"] == pytest.approx(theirs[f"{metric}_stderr,none"])
                difference = torch.tensor(scores).double() - torch.tensor(wholes)
                assert mine["minus_full"] == pytest.approx(difference.mean().item())
                assert mine["minus_full_se"] == pytest.approx(difference.std().item() / math.sqrt(30))
            best = [
                [max(range(4), key=lambda i: s["filtered_resps"][i][0]) for s in one["samples"]["choice"]]
                for one in (narrow, full)
            ]
            assert choice["metrics"]["acc"]["changed"] == sum(a != b for a, b in zip(*best))
            last = find(results, task="last", policy=policy, budget=budget)["metrics"]["nats/token"]
            logp = [sample["perplexity"] for sample in narrow["samples"]["last"]]
            tokens = [len(sample["arguments"][0][1].encode()) for sample in narrow["samples"]["last"]]
            assert last["value"] == pytest.approx(-sum(logp) / sum(tokens))
            assert math.exp(-sum(logp) / 30) == pytest.approx(narrow["results"]["last"]["perplexity,none"])
            rolling = find(results, task="rolling", policy=policy, budget=budget)["metrics"]
            bits = narrow["results"]["rolling"]["bits_per_byte,none"]
            assert rolling["nats/token"]["value"] == pytest.approx(bits * math.log(2)) and list(rolling) == [
                "nats/token"
            ]

    def test_flops_are_those_of_the_width_that_ran(self, inside, manager, folder):
        run_tasks("out/mose/ckpt.pt", "--tasks=choice", f"--include_path={folder}", "--width=1,0.25", "--budget=0.5")
        with open("out/mose/tasks.json") as f:
            results = [r for r in json.load(f)["results"] if r["task"] == "choice"]
        c = bench.load_model("out/mose/ckpt.pt")[0].config
        for r in results:
            assert r["flops_expert"] == pytest.approx(r["width_run"] * 2 * 2 * 4 * c.n_embd * c.expert_hidden)
            assert r["mean_width"] == pytest.approx(r["budget"], abs=0.03) and r["width_run"] >= r["mean_width"] - 1e-6

    def test_an_interrupted_run_goes_on_and_what_changed_runs_anew(self, inside, manager, tmp_path, monkeypatch):
        docs, ran = documents(12), []
        path = write_tasks(tmp_path / "tasks", docs)
        real = bench.run_task
        monkeypatch.setattr(bench, "run_task", lambda lm, name, *rest: ran.append(lm.name) or real(lm, name, *rest))
        args = ["out/moe/ckpt.pt", "--tasks=choice,last", f"--include_path={path}", "--width=1,0.5"]
        first = run_tasks(*args)
        assert ran == ["choice, uniform 1", "choice, uniform 0.5", "last, uniform 1", "last, uniform 0.5"]
        assert run_tasks(*args) == first and len(ran) == 4
        run_tasks(*args, "--budget=0.5")
        assert ran[4:] == ["choice, router 0.5", "last, router 0.5"]
        run_tasks(*args, "--batch_size=3")
        assert len(ran) == 6  # of no consequence
        run_tasks(*args, "--limit=5")
        assert len(ran) == 10
        docs[3]["gold"] = (docs[3]["gold"] + 1) % 4
        write_tasks(path, docs)
        changed = run_tasks(*args)
        assert len(ran) == 14 and len(changed["results"]) == 6
        checkpoint = torch.load("out/moe/ckpt.pt", weights_only=True)
        checkpoint["model"]["transformer.wpe.weight"][0] += 1
        (tmp_path / "out").mkdir()
        torch.save(checkpoint, tmp_path / "out/ckpt.pt")
        (tmp_path / "out/tasks.json").write_text(json.dumps(changed).replace("out/moe", f"{tmp_path}/out"))
        run_tasks(str(tmp_path / "out/ckpt.pt"), *args[1:])
        assert len(ran) == 18

    def test_a_run_that_is_killed_keeps_what_is_finished(self, inside, manager, tmp_path, monkeypatch):
        path, ran = write_tasks(tmp_path / "tasks", documents(8)), []
        real = bench.run_task

        def dies(lm, name, *rest):
            ran.append(lm.name)
            if len(ran) == 2:
                raise KeyboardInterrupt
            return real(lm, name, *rest)

        monkeypatch.setattr(bench, "run_task", dies)
        args = ["out/moe/ckpt.pt", "--tasks=writing", f"--include_path={path}", "--width=0.25"]
        with pytest.raises(KeyboardInterrupt):
            run_tasks(*args)
        run_tasks(*args)
        assert ran == ["writing, uniform 1", "writing, uniform 0.25", "writing, uniform 0.25"]

    def test_groups_are_summed_up_as_lm_eval_does_it(self, inside, manager, folder, capsys):
        args = [f"--include_path={folder}", "--width=0.25"]
        for name in ("by_document", "by_task"):
            results = run_tasks("out/mose/ckpt.pt", f"--tasks={name}", *args)
            model, checkpoint = bench.load_model("out/mose/ckpt.pt")
            lm = LM(model, checkpoint, 0.25, "cpu", torch.float32, 16, "")
            theirs = evaluate(lm, manager.load([name]), bootstrap_iters=2)["results"][name]
            mine = find(results["groups"], budget=0.25)["metrics"]["acc"]
            assert mine["value"] == pytest.approx(theirs["acc,none"])
            assert mine["se"] == pytest.approx(theirs["acc_stderr,none"], rel=0.05)
            parts = [find(results["results"], task=task, policy="uniform", budget=0.25) for task in ("choice", "last")]
            assert mine["minus_full"] == pytest.approx(sum(p["metrics"]["acc"]["minus_full"] for p in parts) / 2)
            assert f"{name}, 60 documents" in capsys.readouterr().out

    def test_several_checkpoints_and_calibrated_widths(self, inside, manager, folder, capsys):
        call(bench, "frontier", "out/mose/ckpt.pt", "--eval_tokens=512", "--device=cpu")
        args = ["--tasks=choice", f"--include_path={folder}", "--limit=10"]
        results = run_tasks("out/mose/ckpt.pt", *args, "--budget=0.5,0.25", "--calibrated")["results"]
        calibrated = find(results, task="choice", policy="calibrated", budget=0.5)
        model, checkpoint = bench.load_model("out/mose/ckpt.pt")
        lm = LM(model, checkpoint, bench.load_calibrated("out/mose/ckpt.pt", 0.5), "cpu", torch.float32, 16, "")
        theirs = evaluate(lm, manager.load(["choice"]), limit=10, bootstrap_iters=0)["results"]["choice"]
        assert calibrated["metrics"]["acc"]["value"] == pytest.approx(theirs["acc,none"])
        results = run_tasks("out/mose/ckpt.pt", "out/moe/ckpt.pt", "out/dense/ckpt.pt", *args)["results"]
        assert {r["checkpoint"] for r in results} == {f"out/{name}/ckpt.pt" for name in ("mose", "moe", "dense")}
        with open("out/mose/tasks.png", "rb") as f:
            assert f.read(4) == b"\x89PNG"
        with pytest.raises(UsageError, match=r"calibrated for budgets 0.75, .*, not for 0.4"):
            run_tasks("out/mose/ckpt.pt", *args, "--budget=0.4", "--calibrated")

    @pytest.mark.parametrize("args, words", BAD, ids=lambda value: value if isinstance(value, str) else " ".join(value))
    def test_bad_input_is_one_line(self, inside, manager, folder, capfd, args, words):
        args = args if not args[0].startswith("--") else ["out/moe/ckpt.pt", *args]
        args = args if any("include" in a for a in args) else [*args, f"--include_path={folder}"]
        before = {p: p.stat().st_mtime_ns for p in inside.rglob("out/*/*")}
        with pytest.raises(SystemExit) as e:
            prepare.run(lambda: call(bench, "tasks", *args), "bench.py")
        out, err = capfd.readouterr()
        assert e.value.code == 2 and words in err and err.startswith("bench.py: ") and err.count("\n") == 1 and not out
        assert before == {p: p.stat().st_mtime_ns for p in inside.rglob("out/*/*")}

    def test_without_lm_eval_it_says_what_to_install(self, inside, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval.api.task", None)
        with pytest.raises(UsageError, match=r"lm_eval is missing .*pip install -r requirements-extras.txt"):
            call(bench, "tasks", "out/moe/ckpt.pt", "--tasks=choice")

    def test_damaged_results_are_refused(self, inside, manager, folder):
        (inside / "out/dense/tasks.json").write_text('{"results": [')
        with pytest.raises(UsageError, match=r"tasks.json is damaged"):
            call(bench, "tasks", "out/dense/ckpt.pt", "--tasks=choice", f"--include_path={folder}")
        (inside / "out/dense/tasks.json").unlink()

    @pytest.mark.slow
    def test_who_knows_the_answers_forgets_them_at_widths_not_trained_for(self, manager, tmp_path, monkeypatch):
        """The control: contaminated on purpose."""
        monkeypatch.chdir(tmp_path)
        docs, text = documents(64), tmp_path / "text"
        path = write_tasks(tmp_path / "tasks", docs)
        text.mkdir()
        for i in range(20):
            lines = [f"Question: {doc['q']}\nAnswer: {doc['choices'][doc['gold']]}\n" for doc in docs]
            (text / f"{i}.txt").write_text("".join(lines))
        call(prepare, "text", "--name=answers")
        for recipe in ("moe", "serve"):
            sizes = ["--n_head=4", "--n_embd=64", "--block_size=64", "--batch_size=16", "--tokens_per_step=1024"]
            schedule = ["--steps=400", "--eval_interval=400", "--warmup_steps=20", "--learning_rate=5e-3"]
            train_tiny(f"out/{recipe}", "--dataset=answers", f"--recipe={recipe}", *sizes, *schedule)
        paths = [f"out/{recipe}/ckpt.pt" for recipe in ("moe", "serve")]
        results = run_tasks(*paths, "--tasks=choice", f"--include_path={path}", "--width=0.25", "--experts=0.5")[
            "results"
        ]
        acc = lambda path, **width: find(results, checkpoint=path, **width)["metrics"]["acc"]
        assert acc(paths[0], budget=1.0)["value"] > 0.95 and acc(paths[1], budget=1.0)["value"] > 0.95
        moe = acc(paths[0], policy="uniform", budget=0.25)
        serve = acc(paths[1], policy="fewer experts", budget=0.25)
        assert moe["minus_full"] < -0.15 and moe["minus_full"] < -3 * moe["minus_full_se"]
        assert serve["minus_full"] > -0.08 and serve["minus_full"] - moe["minus_full"] > 0.1
        assert moe["changed"] >= -64 * moe["minus_full"]

    @pytest.mark.slow
    def test_without_a_network_a_stock_task_is_one_line(self, inside):
        status, out, err = command("bench", "tasks", "out/moe/ckpt.pt", "--tasks=hellaswag", cwd=inside)
        assert status == 2 and "hellaswag" in err and err.count("\n") == 1 and not out
