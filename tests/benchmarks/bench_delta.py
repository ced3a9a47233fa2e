"""Bytes of an update: our deltas beside zstd, over successive real distillations with small, medium and large steps.

Run by `make bench NAME=delta`. A teacher is trained on CPython's documentation, a student is distilled from it and
packed, and three further distillations begin from that release, as the worker begins: from its bf16 file, with the
trainer and the packing of the product. Each makes one update:

    small   200 steps at a learning rate of 1e-5
    medium  200 steps at 1e-4
    large   1,000 steps at 1e-4

With --seeds the first two are made again with each seed, for the loss alone. The rate is constant, which makes updates
larger than the product's schedule does. Every delta is applied again and compared with the file that it stands for.
zstd runs in an environment of its own.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve each other

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy"))

from rivals import environments

from demo import corpus, teacher
from ebbflow.cloud.distillation.corpus import Text
from ebbflow.cloud.distillation.mixture import Documents, Sequences
from ebbflow.cloud.distillation.recipe import Recipe
from ebbflow.cloud.distillation.schedule import Schedule
from ebbflow.cloud.distillation.trainer import Trainer
from ebbflow.cloud.distillation.worker import native_precision
from ebbflow.cloud.release.measure import document_losses
from ebbflow.cloud.teacher.model import Teacher
from ebbflow.common.codes import delta
from ebbflow.common.codes.artefact import PRECISIONS, Precision, read_variant, write_variant
from ebbflow.common.codes.twin import load_student
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student

ZSTANDARD = "zstandard==0.25.0"


@dataclass(frozen=True, kw_only=True)
class Constant(Recipe):
    """A recipe whose learning rate neither warms up nor decays."""

    @property
    def schedule(self) -> Schedule:
        """The rate, at every step."""
        return _Flat(self.learning_rate, self.steps, 0)


@dataclass(frozen=True)
class _Flat(Schedule):
    def rate(self, step: int) -> float:
        return self.peak


class World:
    """Teacher, texts and the shape of the student."""

    def __init__(self, folder: Path, teacher_steps: int) -> None:
        texts = [Text(d.topic, d.text, d.split) for d in corpus.build() if d.split in {"train", "gate"}]
        teacher.train([t.text for t in texts if t.split == "train"], folder, steps=teacher_steps, seed=0)
        self.teacher = Teacher.load(str(folder))
        self.tokenizer = self.teacher.tokenizer
        self.documents = Documents.encode([t for t in texts if t.split == "train"], self.tokenizer)
        self.held_out = [self.tokenizer.encode(t.text) for t in texts if t.split == "gate"]

    def student(self) -> Student:
        """A student of random weights: 3.4 million parameters."""
        return Student.random(
            StudentConfig(
                vocab_size=self.tokenizer.size,
                hidden_size=192,
                intermediate_size=576,
                num_hidden_layers=6,
                num_attention_heads=6,
                num_key_value_heads=6,
                head_dim=32,
                max_position_embeddings=512,
                rope_theta=10_000.0,
                pad_token_id=self.tokenizer.pad_id,
                bos_token_id=self.tokenizer.bos_id,
                eos_token_id=self.tokenizer.eos_id,
            ),
            seed=0,
        )

    def distil(self, student: Student, recipe: Recipe) -> Student:
        """Distils a copy of a student further."""
        trained = copy.deepcopy(student).requires_grad_(True).train()
        order = Sequences(self.documents, {}, length=recipe.sequence_length, count=recipe.sequences, seed=recipe.seed)
        Trainer(trained, order, recipe, self.teacher).run(lambda _: None)
        return trained.eval()

    def loss(self, student: Student) -> float:
        """Held-out loss in nats per token."""
        totals = document_losses(student, self.held_out, self.tokenizer.bos_id)
        return sum(totals) / sum(len(ids) - 1 for ids in self.held_out)


def recipe(kind: type[Recipe], steps: int, learning_rate: float, seed: int) -> Recipe:
    """1,024 tokens a step, nine tenths of the loss from the teacher."""
    return kind(
        steps=steps,
        batch_size=8,
        sequence_length=128,
        learning_rate=learning_rate,
        seed=seed,
        precision=native_precision(),
    )


@dataclass(frozen=True)
class Release:
    """The files of one release by precision, packed with the scales of the one before and with fresh ones."""

    kept: Mapping[Precision, Path]
    fresh: Mapping[Precision, Path]


def pack(student: Student, folder: Path, before: Release | None) -> Release:
    """Packs a student as the worker does."""
    folder.mkdir()
    tensors = {name: tensor.detach().float().numpy() for name, tensor in student.state_dict().items()}
    scales = read_variant(before.kept["int8"]) if before else None
    kept = {precision: folder / f"{precision}.safetensors" for precision in PRECISIONS}
    fresh = {precision: folder / f"{precision}.fresh.safetensors" for precision in PRECISIONS}
    for precision in PRECISIONS:
        write_variant(kept[precision], tensors, student.config, precision, kept=scales)
        write_variant(fresh[precision], tensors, student.config, precision)
    return Release(kept, fresh)


def measure(base: Path, target: Path, zstd: Path, folder: Path) -> dict[str, float]:
    """Bytes of one update in per cent of the full file, by method, and the speed of ours."""
    encoded, decoded = folder / "delta", folder / "decoded"
    size_bytes = target.stat().st_size
    begin = time.perf_counter()
    info = delta.encode(base, target, encoded)
    encode_s = time.perf_counter() - begin
    begin = time.perf_counter()
    delta.apply(base, encoded, decoded, target_size_bytes=size_bytes)
    decode_s = time.perf_counter() - begin
    assert decoded.read_bytes() == target.read_bytes(), "the delta does not lead to its target"
    rival = json.loads(
        subprocess.run(
            [zstd, Path(__file__).parent / "rivals" / "zstd_sizes.py", base, target],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    percent = 100 / size_bytes
    entropy_bytes = float(info.statistics["entropy_bytes"])
    return {
        "bytes": size_bytes,
        "ours": encoded.stat().st_size * percent,
        "entropy": entropy_bytes * percent,
        "over_entropy": 100 * (encoded.stat().st_size / entropy_bytes - 1) if entropy_bytes else 0.0,
        "encode_mb_s": size_bytes / encode_s / 1e6,
        "decode_mb_s": size_bytes / decode_s / 1e6,
        **{name: size * percent for name, size in rival.items()},
    }


def update_ratio(base: Student, target: Student, codes: Path) -> float:
    """r of one update: root mean square of the weights' change over the median step of the INT8 codes."""
    old, new = base.state_dict(), target.state_dict()
    change = torch.cat([(new[name] - old[name]).flatten() for name in old if old[name].dim() > 1])
    variant = read_variant(codes)
    steps = [np.asarray(a, np.float32).ravel() for name, a in variant.tensors.items() if name.endswith(".scales")]
    return float(change.pow(2).mean().sqrt()) / float(np.median(np.concatenate(steps)))


SEVERAL = ("small", "medium")
"""Updates that are made with several seeds."""
CODED: tuple[Precision, ...] = ("int8", "int4")
UPDATES = {"small": (200, 1e-5), "medium": (200, 1e-4), "large": (1000, 1e-4)}


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Distils, packs and measures; sizes by update and precision, and losses by update."""
    zstd = environments.python("zstd", [ZSTANDARD])
    world = World(folder / "teacher", max(1, int(options.teacher_steps * options.scale)))
    say(f"teacher trained; the base takes {int(options.base_steps * options.scale)} steps")
    first = world.distil(world.student(), recipe(Recipe, max(1, int(options.base_steps * options.scale)), 1.5e-3, 1))
    base = pack(first, folder / "base", None)
    begun = load_student(base.kept["bf16"])
    sizes: dict[str, dict[str, dict[str, float]]] = {}
    losses: dict[str, dict[str, float]] = {"base": {"float32": world.loss(first)}}
    for seed, (name, (steps, rate)) in enumerate(UPDATES.items(), 2):
        student = world.distil(begun, recipe(Constant, max(1, int(steps * options.scale)), rate, seed))
        release = pack(student, folder / name, base)
        say(f"{name}: r = {update_ratio(begun, student, base.kept['int8']):.3f} of an INT8 step")
        sizes[name] = {p: measure(base.kept[p], release.kept[p], zstd, folder) for p in PRECISIONS}
        losses[name] = {"float32": world.loss(student)}
        for precision in ("int8", "int4"):
            losses[name][precision] = world.loss(load_student(release.kept[precision]))
            losses[name][f"{precision} fresh"] = world.loss(load_student(release.fresh[precision]))
    over = [loss_over_fresh(world, begun, base, folder / f"seed {seed}", options.scale, seed) for seed in options.seeds]
    show(sizes, losses)
    show_over_fresh(over)
    return {**sizes, "loss": losses, "over fresh": mean_over_fresh(over)}


Over = dict[str, dict[str, float]]
"""Loss with kept scales less that with fresh ones, in nats per token, by update and precision."""


def loss_over_fresh(world: World, begun: Student, base: Release, folder: Path, scale: float, seed: int) -> Over:
    """Distils the updates of 200 steps once more with another seed, and compares the losses of both kinds of scales."""
    folder.mkdir()
    over: Over = {}
    for name in SEVERAL:
        steps, rate = UPDATES[name]
        student = world.distil(begun, recipe(Constant, max(1, int(steps * scale)), rate, seed))
        release = pack(student, folder / name, base)
        over[name] = {
            precision: world.loss(load_student(release.kept[precision]))
            - world.loss(load_student(release.fresh[precision]))
            for precision in CODED
        }
        say(f"seed {seed}, {name}: {over[name]}")
    return over


def show_over_fresh(over: Sequence[Over]) -> None:
    """Prints each seed's row."""
    table = Table(title="Held-out loss over that with fresh scales, nats per token", caption="one row for each seed")
    columns = [(name, precision) for name in SEVERAL for precision in CODED]
    for name, precision in columns:
        table.add_column(f"{name} {precision}", justify="right")
    for row in over:
        table.add_row(*(f"{row[name][precision]:+.5f}" for name, precision in columns))
    Console(width=120).print(table)


def mean_over_fresh(over: Sequence[Over]) -> dict[str, float]:
    """Means over the seeds and their standard errors, by metric; nothing for fewer than two seeds."""
    found: dict[str, float] = {}
    for name, precision in ((name, precision) for name in SEVERAL for precision in CODED if len(over) > 1):
        values = [row[name][precision] for row in over]
        found[f"{precision}_{name}_loss_over_fresh_mean"] = round(statistics.fmean(values), 5)
        found[f"{precision}_{name}_loss_over_fresh_error"] = round(statistics.stdev(values) / len(values) ** 0.5, 5)
    return found


def show(sizes: Mapping[str, Mapping[str, Mapping[str, float]]], losses: Mapping[str, Mapping[str, float]]) -> None:
    """Prints both tables."""
    console = Console(width=120)
    columns = ("entropy", "ours", "patch_from_19", "patch_from_3", "full_19")
    table = Table(title="Bytes of one update, % of the full file", caption="entropy: zero order, of the differences")
    for heading in ("update", "precision", "full file", *columns, "over entropy", "encode", "decode"):
        table.add_column(heading, justify="left" if heading in {"update", "precision"} else "right")
    for name, by_precision in sizes.items():
        for precision, row in by_precision.items():
            figures = [f"{row[column]:.2f}" for column in columns]
            speeds = [f"{row[speed]:.0f} MB/s" for speed in ("encode_mb_s", "decode_mb_s")]
            full = f"{row['bytes'] / 1e6:.2f} MB"
            table.add_row(name, precision, full, *figures, f"{row['over_entropy']:.2f} %", *speeds)
    console.print(table)
    headings = ("float32", "int8", "int8 fresh", "int4", "int4 fresh")
    table = Table(title="Held-out loss, nats per token", caption="fresh: scales made anew instead of kept")
    for heading in ("update", *headings):
        table.add_column(heading, justify="left" if heading == "update" else "right")
    for name, row in losses.items():
        table.add_row(name, *(f"{row[heading]:.4f}" if heading in row else "" for heading in headings))
    console.print(table)


def summary(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The last line: our figures, the rivals', and how many times shorter ours is."""
    metrics: dict[str, float] = {}
    rivals: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for name in UPDATES:
        for precision, row in found[name].items():
            key = f"{precision}_{name}"
            metrics[f"{key}_pct"] = round(row["ours"], 3)
            metrics[f"{key}_over_entropy_pct"] = round(row["over_entropy"], 3)
            for rival in ("full_19", "patch_from_3", "patch_from_19"):
                rivals[f"{key}_{rival}_pct"] = round(row[rival], 3)
            ratios[f"{key}_vs_zstd_19"] = round(row["full_19"] / row["ours"], 2)
            ratios[f"{key}_vs_patch_from"] = round(min(row["patch_from_3"], row["patch_from_19"]) / row["ours"], 2)
        loss = found["loss"][name]
        for precision in CODED:
            metrics[f"{precision}_{name}_loss_over_fresh"] = round(loss[precision] - loss[f"{precision} fresh"], 5)
    metrics |= found["over fresh"]
    metrics["over_entropy_pct"] = metrics["int4_small_over_entropy_pct"]
    return {"metrics": metrics, "rivals": rivals, "ratios": ratios}


def say(text: str) -> None:
    """Progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-steps", type=int, default=700, help="steps of the first distillation")
    parser.add_argument("--teacher-steps", type=int, default=420, help="steps of the teacher's training")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every number of steps, to try it quickly")
    parser.add_argument(
        "--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[], help="such as 11,12,13"
    )
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0 leaves its own choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        found = run(options, Path(folder))
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
