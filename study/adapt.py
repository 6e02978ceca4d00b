"""
How well adapt.py does: a small DeepSeek-V3 made slimmable. Three seeds, 22 minutes of one CPU core.

    python prepare.py stdlib; python study/adapt.py     # or: make study-adapt

For each seed: train a base model at full width only; sort its neurons; continue 15% of the steps at full width only,
sorted afterwards (moe: what anyone would do), or sorted first with recipe mose or serve; the loss of each at every
width; slice it at 0.5 and load that with stock transformers. What is done is kept in out/adapt and not done again.
Writes study/adapt.json, study/adapt.md and study/adapt.png.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import adapt
from bench import draw, write_json
from model import FewerExperts, RouterWidth
from prepare import Parser, open_dataset, run

SEEDS, STEPS, MORE, BATCH, CONTEXT = (1, 2, 3), 600, 90, 16, 128
OUT, STUDY = Path("out/adapt"), Path(__file__).parent
POLICIES = {
    "1": 1.0, "0.75": 0.75, "0.5": 0.5, "0.25": 0.25, "router 0.5": RouterWidth(0.5, 1.0),
    "router 0.25": RouterWidth(0.25, 3.0), "top-1": FewerExperts(1),
}  # fmt: skip
CONFIG = dict(
    vocab_size=257, hidden_size=128, intermediate_size=512, moe_intermediate_size=256, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2,
    first_k_dense_replace=1, n_group=1, topk_group=1, routed_scaling_factor=1.0, norm_topk_prob=True, q_lora_rank=None,
    kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32, max_position_embeddings=CONTEXT,
    tie_word_embeddings=True, bos_token_id=256, eos_token_id=256, pad_token_id=256,
)  # fmt: skip


def train(model, data, seed, first, steps, peak, recipe):
    """AdamW, linear warm-up, a cosine to a tenth. Any loop would do: adapt.train_widths only hangs on to it.

    Returns FLOPs per step, forward and backward, from what ran.
    """
    widths, parts = adapt.train_widths(model.train(), recipe, seed, step=first), adapt.slim_all(model).values()
    for m in parts:
        m.slim.ran = 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warmup = steps // 12
    for step in range(steps):
        done = max(0, step - warmup) / (steps - warmup)
        optimizer.param_groups[0]["lr"] = peak * min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * done))
        idx, _ = data.random_batch(seed, first + step, 0, BATCH)
        loss = model(input_ids=idx, labels=idx).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"seed {seed} {recipe} {first + step}: {loss.item():.3f}", flush=True)
    widths.remove()
    tokens = BATCH * CONTEXT * (2 if recipe == "mose" else 1)
    ran = sum(int(m.slim.ran) * adapt.neuron_flops(m) for m in parts)
    return 3 * (tokens * adapt.count_flops(model.config, CONTEXT)[0] + ran / steps)


def save(model, folder):
    model.eval().save_pretrained(folder.with_suffix(".partial"))
    os.rename(folder.with_suffix(".partial"), folder)


def result(name, make):
    """make() -> dict, kept in OUT/name.json: what is done is not done again."""
    path = OUT / f"{name}.json"
    if not path.exists():
        began = time.process_time()
        made = make()
        text = json.dumps(dict(made, cpu_seconds=round(time.process_time() - began)), indent=1)
        path.with_suffix(".tmp").write_text(text + "\n")
        os.replace(path.with_suffix(".tmp"), path)
        print(name, *(f"{p['loss']:.4f}" for p in made.get("points", [])), flush=True)
    return json.loads(path.read_text())


def run_seed(seed, data, windows, sorting):
    """-> {row: its result}"""
    folder, rows = OUT / f"{seed}-base", {}
    if not folder.exists():
        torch.manual_seed(seed)
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIG))
        train(model, data, seed, 0, STEPS, 4e-3, "moe")
        save(model, folder)
    load = lambda: AutoModelForCausalLM.from_pretrained(folder, experts_implementation="slimmable")
    measure = lambda model, **more: dict(points=adapt.evaluate(model, windows, POLICIES, 64), **more)

    def sort(model, by):
        adapt.sort_neurons(model, by)
        return model

    def more(recipe):
        model = load() if recipe == "moe" else sort(load(), sorting)
        flops = train(model, data, seed, STEPS, MORE, 1e-3, recipe)
        if recipe == "moe":
            sort(model, sorting)
        save(model, OUT / f"{seed}-{recipe}")
        return measure(model, flops_per_step=flops)

    def sliced():
        model = AutoModelForCausalLM.from_pretrained(OUT / f"{seed}-serve", experts_implementation="slimmable")
        adapt.slice_experts(model, 0.5).save_pretrained(OUT / f"{seed}-sliced")
        stock = AutoModelForCausalLM.from_pretrained(OUT / f"{seed}-sliced")
        adapt.set_width(model, 0.5)
        with torch.no_grad():
            worst = max(
                (model(input_ids=i).logits - stock(input_ids=i).logits).abs().max().item()
                for i in windows[:64].long().split(16)
            )
        return dict(parameters=[model.num_parameters(), stock.num_parameters()], largest_difference=worst)

    rows["not sorted"] = result(f"{seed}-unsorted", lambda: measure(load()))
    rows["sorted by weights"] = result(f"{seed}-by-weights", lambda: measure(sort(load(), ())))
    rows["sorted by text"] = result(f"{seed}-by-text", lambda: measure(sort(load(), sorting)))
    rows["moe, sorted afterwards"] = result(f"{seed}-moe", lambda: more("moe"))
    rows["sorted, mose"] = result(f"{seed}-mose", lambda: more("mose"))
    rows["sorted, serve"] = result(f"{seed}-serve", lambda: more("serve"))
    return rows, result(f"{seed}-sliced", sliced)


def mean(values):
    """-> (mean, standard error)"""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def over_seeds(seeds):
    """{seed: (rows, sliced)} -> {row: dict(points, cpu_seconds, flops_per_step)}, means with their standard errors"""
    rows, fair = {}, [rows["moe, sorted afterwards"] for rows, _ in seeds.values()]
    for name in next(iter(seeds.values()))[0]:
        each, points = [rows_of[name] for rows_of, _ in seeds.values()], []
        for i, policy in enumerate(POLICIES):
            losses, flops, widths = ([r["points"][i][k] for r in each] for k in ("loss", "flops_total", "mean_width"))
            loss, error = mean(losses)
            change, change_error = mean([l - f["points"][i]["loss"] for l, f in zip(losses, fair)])  # of the same seed
            points.append(dict(
                policy=policy, loss=loss, error=error, change=change, change_error=change_error, losses=losses,
                flops_total=mean(flops)[0], mean_width=mean(widths)[0],
            ))  # fmt: skip
        costs = {k: mean([r[k] for r in each])[0] for k in ("cpu_seconds", "flops_per_step") if k in each[0]}
        rows[name] = dict(points=points, **costs)
    return rows


def report(seeds, out):
    """{seed: (rows, sliced)} -> out.json, out.md, out.png"""
    rows, sliced = over_seeds(seeds), [s for _, s in seeds.values()]
    (full, half), worst = sliced[0]["parameters"], max(s["largest_difference"] for s in sliced)
    facts = dict(seeds=list(seeds), steps=STEPS, more=MORE, tokens_per_step=BATCH * CONTEXT, config=CONFIG)
    facts |= dict(parameters=full, sliced=dict(width=0.5, parameters=half, largest_difference=worst), rows=rows)
    write_json(out.with_suffix(".json"), facts)

    base, first = rows["moe, sorted afterwards"]["flops_per_step"], rows["sorted, serve"]["points"][0]["flops_total"]
    line = lambda *cells: f"| {' | '.join(cells)} |"
    head = line("nats per byte", "training FLOPs", *POLICIES) + "\n" + "|---" * (2 + len(POLICIES)) + "|"
    text = [head]
    for name, row in rows.items():
        cost = f"{row['flops_per_step'] / base:.2f}" if "flops_per_step" in row else ""
        text.append(line(name, cost, *(f"{p['loss']:.3f} ± {p['error']:.3f}" for p in row["points"])))
    forward = (f"{p['flops_total'] / first:.2f}" for p in rows["sorted, serve"]["points"])
    text.append(line("forward FLOPs", "", *forward))
    text += ["\nAgainst moe, sorted afterwards, seed by seed:\n", head]
    for name in ("sorted, mose", "sorted, serve"):
        changes = (f"{p['change']:+.3f} ± {p['change_error']:.3f}" for p in rows[name]["points"])
        text.append(line(name, f"{rows[name]['flops_per_step'] / base:.2f}", *changes))
    text.append(
        f"\nSliced at 0.5: {half:,} of {full:,} parameters. Loaded by stock transformers, its logits differ by "
    )
    text[-1] += f"{worst:g} at most from those of width 0.5."
    out.with_suffix(".md").write_text("\n".join(text) + "\n")
    print(*text, sep="\n")
    curves = []
    for name, row in rows.items():
        points = [p for p in row["points"] if p["policy"][0] in "01"]
        x, y, error = ([p[key] for p in points] for key in ("flops_total", "loss", "error"))
        curves.append((name, x, y, dict(yerr=error, capsize=2)))
    draw(
        out.with_suffix(".png"),
        [dict(curves=curves, xlabel="forward FLOPs per token", ylabel="validation nats per byte")],
    )


def main():
    Parser(__doc__).parse_args()
    torch.set_num_threads(1)
    train_data, val, *_ = open_dataset("stdlib", CONTEXT)
    windows = val.windows(range(0, int(val.ends[-1]), int(val.ends[-1]) // 512))[0][:512]  # over all of it
    sorting = [train_data.random_batch(0, 10**6 + i, 0, BATCH)[0] for i in range(16)]
    OUT.mkdir(parents=True, exist_ok=True)
    report({seed: run_seed(seed, train_data, windows, sorting) for seed in SEEDS}, STUDY / "adapt")


if __name__ == "__main__":
    run(main, "study/adapt.py")
