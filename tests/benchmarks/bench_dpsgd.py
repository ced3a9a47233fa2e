"""Speed and memory of private training against plain training on the same student.

Run by `make bench NAME=dpsgd`. Three ways to train on the same texts: plain (every weight, AdamW, no clipping of single
texts, no noise: the rival), private (every weight) and private with a low-rank change (only the matrices B). Each runs
in a process of its own, which reports its own peak memory. Texts of private runs are drawn at random, so their figures
are of the texts that were really in the steps.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "demo": {  # the student of the demo
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "10M": {
        "vocab_size": 10_240,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}
WAYS = {"plain": None, "private": 0, "private, rank 4": 4}
BATCH, TOKENS = 16, 64


def measure(shape: str, way: str, steps: int) -> dict[str, float]:
    """Trains in this process; returns texts per second of processor time and of wall time, and peak memory."""
    import torch

    from ebbflow.cloud.distillation import private_noise
    from ebbflow.common.student.config import StudentConfig
    from ebbflow.common.student.model import Student

    torch.set_num_threads(1)
    config = StudentConfig(**SHAPES[shape], max_position_embeddings=512)
    student = Student.random(config, 0).train()
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(3, config.vocab_size, (8 * BATCH, TOKENS + 1), generator=generator).tolist()
    drawn: list[int] = []
    rank = WAYS[way]
    if rank is None:
        advance = plain(student, texts)
        drawn = [BATCH] * steps
    else:
        from ebbflow.cloud.distillation.private_recipe import PrivateRecipe
        from ebbflow.cloud.distillation.private_training import PrivateTrainer

        recipe = PrivateRecipe(
            epsilon=8.0,
            steps=steps,
            batch_size=BATCH,
            corpus_size=len(texts),
            learning_rate=1e-3,
            sequence_length=TOKENS,
            rank=rank,
        )
        sample = private_noise.poisson_sample

        def noting(count: int, batch_size: int, corpus_size: int) -> Sequence[int]:
            found = sample(count, batch_size, corpus_size)
            drawn.append(len(found))
            return found

        private_noise.poisson_sample = noting
        advance = PrivateTrainer(student, texts, recipe, 1.0).advance
    advance()
    drawn = drawn[1:]
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps - 1):
        advance()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    count = sum(drawn)
    return {"texts_per_cpu_s": count / cpu, "texts_per_s": count / wall, "peak_mib": peak_mib}


def plain(student: Any, texts: list[list[int]]) -> Any:
    """A step of plain training on the same texts with the same loss."""
    import torch

    from ebbflow.cloud.distillation.private_training import TextLoss

    loss = TextLoss(student)
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
    tokens_NS = torch.tensor(texts)
    step = 0

    def advance() -> None:
        nonlocal step
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(tokens_NS)
        step += 1
        optimiser.zero_grad(set_to_none=True)
        loss(tokens_NS[rows, :-1], tokens_NS[rows, 1:]).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()

    return advance


def main() -> None:
    """Prints the table and, on the last line, one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--one", nargs=2, metavar=("SHAPE", "WAY"))
    said = parser.parse_args()
    if said.one:
        shape, way = said.one
        print(json.dumps(measure(shape, way, said.steps)))
        return
    found: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        for way in WAYS:
            command = [sys.executable, __file__, "--steps", str(said.steps), "--one", shape, way]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[f"{shape}, {way}"] = json.loads(done.stdout.splitlines()[-1])
    print(f"{BATCH} texts of {TOKENS} tokens in a step, one thread")
    print(f"{'':24} {'texts/CPU-s':>12} {'of plain':>9} {'texts/s':>9} {'peak MiB':>9}")
    ratios = {}
    for name, figures in found.items():
        shape = name.split(",")[0]
        ratios[name] = figures["texts_per_cpu_s"] / found[f"{shape}, plain"]["texts_per_cpu_s"]
        print(
            f"{name:24} {figures['texts_per_cpu_s']:12.1f} {ratios[name]:9.2f} {figures['texts_per_s']:9.1f}"
            f" {figures['peak_mib']:9.0f}"
        )
    rivals = {name: figures for name, figures in found.items() if name.endswith("plain")}
    metrics = {name: figures for name, figures in found.items() if name not in rivals}
    print(json.dumps({"metrics": metrics, "rivals": rivals, "ratios": ratios}))


if __name__ == "__main__":
    main()
