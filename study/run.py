"""
Train and measure the models behind the README's numbers.

    python study/run.py                             # two runs at a time: many hours
    python study/run.py --only=s2-flops- --jobs=1   # the runs whose names begin with s2-flops-

A run calls train.py, then bench.py frontier on last.pt, and writes study/results/NAME.json. A run whose file exists is
skipped, and a stopped run is resumed. All are variants of the demo preset, on its dataset. report.py makes the tables.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import GPT
from train import PRESETS

RESULTS = Path("study/results")
SEEDS = (1337, 1338, 1339)
STEPS = 2000  # of runs with equal text: a model reads about 20 bytes of text for each parameter
SIZES = {  # n_layer, n_embd, n_head, sequences of 128 bytes in a step
    "s1": (2, 32, 2, 12),  # 0.15M parameters
    "s2": (2, 48, 2, 26),  # 0.34M
    "s3": (4, 64, 4, 89),  # 1.15M
    "s4": (4, 88, 4, 168),  # 2.15M
}
RECIPES = ("moe", "mose", "mose-router", "random-experts")
REGIMES = {
    "top1": dict(top_k=1, norm_topk_prob=False),
    "fine": dict(n_expert=32, top_k=8, expert_hidden=48),
    "shared": dict(n_shared=1),
    "bias": dict(bias_rate=0.001, balance_coef=0.0),
}
BASELINES = {
    "half": dict(expert_hidden=96),
    "quarter": dict(expert_hidden=48),
    "dense": dict(n_expert=1, expert_hidden=384),  # the FLOPs of two experts
}
# passes of a step and their mean width, see training_passes in train.py
COST = {"moe": (1, 1.0), "mose": (2, 0.75), "mose-router": (2, 0.775), "random-experts": (1, 0.6), "m-moe": (1, 0.75)}


def cost(size, recipe, options):
    """FLOPs per token of training a model with a recipe, without the factor of the backward passes."""
    passes, width = COST[recipe]
    shape = dict(zip(("n_layer", "n_embd", "n_head"), SIZES[size]))
    config = replace(PRESETS["demo"][1].model, vocab_size=320, **shape, **options)
    return passes * GPT(config).flops_per_token(width)


def all_runs():
    """[(name, size, recipe, seed, steps, options of the model)]."""
    runs = []
    for seed in SEEDS:
        for size in SIZES if seed == SEEDS[0] else ("s1", "s2", "s3"):  # the trend; s4 takes hours: one seed
            for recipe in RECIPES if size != "s4" else RECIPES[:3]:
                runs.append((f"{size}-{recipe}-{seed}", size, recipe, seed, STEPS, {}))
        for recipe in (*RECIPES, "m-moe"):  # equal training FLOPs
            steps = round(2 * STEPS * cost("s2", "moe", {}) / cost("s2", recipe, {}))
            runs.append((f"s2-flops-{recipe}-{seed}", "s2", recipe, seed, steps, {}))
        for recipe in ("moe", "random-experts") if seed == SEEDS[0] else ("moe",):  # for the FLOPs of s3-mose
            steps = round(STEPS * cost("s3", "mose", {}) / cost("s3", recipe, {}))
            runs.append((f"s3-flops-{recipe}-{seed}", "s3", recipe, seed, steps, {}))
        for regime, options in REGIMES.items():
            for recipe in RECIPES[:3]:
                runs.append((f"s2-{regime}-{recipe}-{seed}", "s2", recipe, seed, STEPS, options))
        runs.append((f"s2-m-moe-{seed}", "s2", "m-moe", seed, STEPS, {}))
        for name, options in BASELINES.items():
            runs.append((f"s2-{name}-{seed}", "s2", "moe", seed, STEPS, options))
        for name in ("half", "quarter"):
            steps = round(STEPS * cost("s2", "moe", {}) / cost("s2", "moe", BASELINES[name]))
            runs.append((f"s2-flops-{name}-{seed}", "s2", "moe", seed, steps, BASELINES[name]))
    return runs


def hardware():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"one thread of {names[0].split(': ')[1]}"


def run(name, size, recipe, seed, steps, options):
    """Train and measure one model, in two processes. Their output goes to out/study/NAME.txt."""
    result, out = RESULTS / f"{name}.json", Path("out/study", name)
    if result.exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    batch_size = SIZES[size][-1]
    arguments = dict(zip(("n_layer", "n_embd", "n_head", "batch_size"), SIZES[size]), recipe=recipe, seed=seed)
    arguments |= dict(total_batch_size=128 * batch_size, max_iters=steps, warmup_iters=steps // 20, eval_interval=1000)
    arguments |= options
    flags = [f"--no-{key}" if value is False else f"--{key}={value}" for key, value in arguments.items()]
    flags += ["--resume"] if (out / "last.pt").exists() else []
    with open(f"{out}.txt", "a") as log:
        for command in (["train.py", "demo", f"--out_dir={out}", *flags], ["bench.py", "frontier", f"{out}/last.pt"]):
            subprocess.run([sys.executable, *command], stdout=log, stderr=log, check=True)
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    parameters = sum(p.numel() for key, p in checkpoint["model"].items() if key != "lm_head.weight")
    summary = dict(name=name, size=size, recipe=recipe, seed=seed, arguments=arguments)
    summary |= dict(parameters=parameters, tokens=steps * 128 * batch_size, training_flops=checkpoint["flops"])
    summary |= dict(hardware=hardware(), torch=torch.__version__)
    points = json.loads((out / "frontier.json").read_text())["points"]
    temporary = result.with_suffix(".tmp")
    temporary.write_text(json.dumps(summary | dict(points=points), indent=1))
    temporary.rename(result)
    print(name, flush=True)


def main(only: str = "", jobs: int = 2):
    """Do the runs that are not done yet.

    Args:
        only: the beginning of the names of runs
        jobs: runs at the same time, one thread each
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = ThreadPoolExecutor(jobs)
    try:
        for future in [pool.submit(run, *r) for r in all_runs() if r[0].startswith(only)]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C or an error, start no other run


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
