"""What fp4compile adds to the cold compile of a training step, against the same model in BF16.

    python benchmarks/compile_time.py

Prints three things, each against its bar: the time in our passes as a share of BF16's cold compile, the whole cold
compile as a ratio to BF16's, and how pass time grows with the number of graph nodes. Every compile is a fresh process
with an empty cache; BF16 and FP4 alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

BARS = {"pass_share": 0.15, "cold_ratio": 1.6, "growth": 1.5}


def llama(layers: int) -> Any:
    """A small Llama in bf16; only the number of layers matters here."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def compile_once(recipe: str, layers: int) -> dict[str, float]:
    """Seconds of the first forward and backward of a compiled model, and of a second one; runs in a child process."""
    import torch

    import fp4compile

    model = llama(layers)
    tokens = torch.randint(0, 256, (2, 64))
    options: dict[str, Any] = {"backend": "inductor"}
    if recipe != "bf16":
        options = {"backend": "fp4compile", "options": {"recipe": recipe}}
    compiled = torch.compile(model, **options)
    torch.ones(2, requires_grad=True).sum().backward()  # start autograd's threads before the clock

    def step() -> float:
        start = time.perf_counter()
        compiled(input_ids=tokens, use_cache=False).logits.float().mean().backward()
        return time.perf_counter() - start

    cold, warm = step(), step()
    report = fp4compile.last_report()
    return {"cold": cold - warm, "passes": sum(report.pass_seconds.values()) if report else 0.0}


def passes_once(recipe: str, layers: int) -> dict[str, float]:
    """Seconds in our passes and nodes of the joint graph; runs in a child process, without Inductor."""
    import torch

    import fp4compile

    nodes: list[int] = []

    def observe(step: Any, graph: Any, context: Any) -> None:
        if step is None:
            nodes.append(len(graph.nodes))

    inputs = {"input_ids": torch.randint(0, 256, (2, 64)), "use_cache": False}
    report = fp4compile.explain(llama(layers), inputs, recipe, train=True, observe=observe)
    return {"passes": sum(report.pass_seconds.values()), "nodes": float(sum(nodes))}


def child(task: str, recipe: str, layers: int) -> dict[str, float]:
    """Run a task in a fresh process with an empty compile cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-W", "ignore", __file__, "--child", task, recipe, str(layers)]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "XDG_CACHE_HOME": cache}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure and print the table."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["hif4", "mxfp4", "nvfp4"])
    parser.add_argument("--layers", type=int, default=8, help="depth of the model that is compiled (default 8)")
    parser.add_argument("--depths", type=int, nargs="+", default=[25, 50, 100, 200], help="depths for the growth")
    parser.add_argument("--runs", type=int, default=3, help="cold compiles of each variant (default 3)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    cold: dict[str, list[dict[str, float]]] = {name: [] for name in ["bf16", *args.recipes]}
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        task = progress.add_task("cold compiles", total=args.runs * len(cold) + len(args.depths))
        for _ in range(args.runs):
            for name, found in cold.items():
                found.append(child("compile", name, args.layers))
                progress.advance(task)
        growth = {}
        for depth in args.depths:
            growth[depth] = child("passes", args.recipes[0], depth)
            progress.advance(task)

    base = statistics.median(r["cold"] for r in cold["bf16"])
    rows = {}
    for name in args.recipes:
        ratios = [r["cold"] / b["cold"] for r, b in zip(cold[name], cold["bf16"], strict=True)]
        rows[name] = {
            "cold_ratio": statistics.median(ratios),
            "spread": max(ratios) - min(ratios),
            "pass_share": statistics.median(r["passes"] for r in cold[name]) / base,
        }
    per_node = {depth: 1e6 * g["passes"] / g["nodes"] for depth, g in growth.items()}
    linear = per_node[max(per_node)] / per_node[min(per_node)]
    if args.json:
        print(json.dumps({"layers": args.layers, "recipes": rows, "us_per_node": per_node, "growth": linear}))
        return
    out = Console()
    table = Table(title=f"cold compile of a {args.layers}-layer Llama training step, ratio to BF16 ({args.runs} runs)")
    cold_bar, pass_bar = f"bar {BARS['cold_ratio']}", f"bar {BARS['pass_share']}"
    for column in ("recipe", "whole compile / BF16", "spread", cold_bar, "passes / BF16", pass_bar):
        table.add_column(column)
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['cold_ratio']:.2f}",
            f"{row['spread']:.2f}",
            "holds" if row["cold_ratio"] <= BARS["cold_ratio"] else "MISSED",
            f"{row['pass_share']:.3f}",
            "holds" if row["pass_share"] <= BARS["pass_share"] else "MISSED",
        )
    out.print(table)
    table = Table(title=f"pass time of {args.recipes[0]} by depth")
    for column in ("layers", "nodes", "microseconds per node", f"relative to {min(per_node)} layers"):
        table.add_column(column)
    for depth, cost in per_node.items():
        relative = cost / per_node[min(per_node)]
        table.add_row(str(depth), f"{growth[depth]['nodes']:.0f}", f"{cost:.0f}", f"{relative:.2f}")
    out.print(table)
    verdict = "holds" if linear <= BARS["growth"] else "MISSED"
    out.print(f"growth per node {linear:.2f}, linear means 1; bar {BARS['growth']}: {verdict}")


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1] == "--child":
        tasks = {"compile": compile_once, "passes": passes_once}
        print(json.dumps(tasks[sys.argv[2]](sys.argv[3], int(sys.argv[4]))))
    else:
        main()
