"""What escalating hard questions pays and costs: a real student on its engine, a real teacher behind mutual TLS.

Run by `make bench NAME=escalation`; ARGS="--questions 50" makes it short. A world of 182 facts is asked about by Zipf's
law; the student knows the frequent ones, the teacher all. The curve says how many answers are right when the least sure
questions go to the teacher, against chance and against an oracle.
"""

import argparse
import asyncio
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))

from escalation import line, pair
from escalation.curve import (
    Asked,
    at_threshold,
    best_quality,
    by_mean,
    calibration_error,
    gained,
    quality,
    random_quality,
)
from escalation.facts import Fact, World

from ebbflow.edge.engine.load import load_engine
from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving.answering import Answering, Question
from ebbflow.edge.serving.batcher import Batcher
from ebbflow.edge.serving.calibrations import read
from ebbflow.edge.serving.confidence import Calibration, fit
from ebbflow.edge.serving.escalation import Escalation, EscalationLimits
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.lane import Limits
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sampling import Sampling
from ebbflow.edge.serving.sequences import Finished

FAQ = "students/faq"
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
DEFAULT = 0.5
SAMPLING = Sampling(max_tokens=24, temperature=0.0, stop=("\n",))


@dataclass
class Device:
    """A student that serves."""

    hub: Hub
    store: FeedbackStore

    async def answer(self, fact: Fact, escalation: Escalation | None = None) -> tuple[str, list[float], float]:
        """Asks a question; returns text, log-probabilities and milliseconds."""
        consent = escalation is not None
        sampling = SAMPLING if consent else replace(SAMPLING, top_log_probs=0)
        begin_s = time.perf_counter()
        question = Question(FAQ, fact.question, sampling, None, escalate=consent)
        answer = await Answering(self.hub, self.store, escalation=escalation).ask(question)
        text, log_probs = "", list[float]()
        async for event in answer.events():
            if not isinstance(event, Finished):
                text += event.text
                log_probs += [chance.log_prob for chance in event.chances]
        return text, log_probs, (time.perf_counter() - begin_s) * 1000


def main() -> None:
    """Prints the tables and, on the last line, one JSON object."""
    asked = _arguments()
    torch.set_num_threads(asked.threads)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asyncio.run(_run(asked, Path(folder)))))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--student-steps", type=int, default=350)
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1, help="of the teacher, and of training")
    return parser.parse_args()


async def _run(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    world, begin_s = World(seed=0), time.perf_counter()
    made = pair.train(world, folder, teacher_steps=asked.teacher_steps, student_steps=asked.student_steps)
    engine = load_engine(made.weights, threads=1)
    print(f"trained in {time.perf_counter() - begin_s:.0f} s; the student runs on the {engine.name} engine, int8")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    device = Device(Hub(Limits()), FeedbackStore(folder / "agent.db"))
    device.hub.swap(Model(FAQ, f"{FAQ}/releases/1", engine, made.tokenizer))
    try:
        calibration, errors = await _calibrate(device.hub.batcher(FAQ), made.held_out)
        async with line.to(made.teacher, folder) as teacher:
            found, times = await _ask_all(device, teacher, world.asked(asked.questions), calibration, made)
    finally:
        device.hub.stop()
        device.store.close()
    _print(found, errors, times, calibration)
    return _figures(found, errors, times)


async def _calibrate(batcher: Batcher, held_out: list[list[int]]) -> tuple[Calibration, dict[str, float]]:
    """Fits to as many texts as a release's probe holds, and measures on the others."""
    seen = [await read(batcher, token_ids) for token_ids in held_out]
    curve = fit([each for text in seen[: pair.PROBE_TEXTS] for each in text])
    others = [each for text in seen[pair.PROBE_TEXTS :] for each in text]
    log_probs, hits = (np.concatenate([getattr(each, name) for each in others]) for name in ("log_probs", "hits"))
    errors = {
        "raw": calibration_error(np.exp(log_probs), hits),
        "calibrated": calibration_error(curve.right(log_probs), hits),
    }
    return curve, errors


async def _ask_all(
    device: Device, teacher: Any, facts: list[Fact], calibration: Calibration, made: pair.Pair
) -> tuple[list[Asked], dict[str, list[float]]]:
    """Asks every question twice: the student alone, and with everything escalated."""
    limits = EscalationLimits(students=frozenset({FAQ}), confidence=1.01, most=10_000, timeout_s=60.0)
    escalation = Escalation(teacher, limits, lambda _: made.held_out[: pair.PROBE_TEXTS])
    await device.answer(facts[0], escalation)  # calibrates, opens the channel
    found, times = list[Asked](), {"local": list[float](), "escalated": list[float]()}
    for fact in facts:
        text, log_probs, local_ms = await device.answer(fact)
        taught, _, escalated_ms = await device.answer(fact, escalation)
        right = f"{fact.where}."
        confidence, mean = calibration.confidence(log_probs), float(calibration.right(log_probs).mean())
        found.append(Asked(confidence, mean, text.strip() == right, taught.strip() == right))
        times["local"].append(local_ms)
        times["escalated"].append(escalated_ms)
    return found, times


def _print(found: list[Asked], errors: dict[str, float], times: dict[str, list[float]], curve: Calibration) -> None:
    print("| share escalated | right answers | by chance | oracle |\n| ---: | ---: | ---: | ---: |")
    for share in SHARES:
        row = (quality(found, share), random_quality(found, share), best_quality(found, share))
        print(f"| {share:.0%} | " + " | ".join(f"{value:.1%}" for value in row) + " |")
    print("\n| threshold | share escalated | right answers |\n| ---: | ---: | ---: |")
    for threshold in THRESHOLDS:
        share, right = at_threshold(found, threshold)
        print(f"| {threshold:g} | {share:.1%} | {right:.1%} |")
    means = by_mean(found)
    print(f"\nof what an oracle gains over chance: {gained(found):.2f}; judged by the mean: {gained(means):.2f}")
    print(f"judged by the mean, a threshold of {DEFAULT:g} sends {at_threshold(means, DEFAULT)[0]:.1%}")
    print(f"calibration error on fresh texts: {errors['raw']:.3f} raw, {errors['calibrated']:.3f} calibrated")
    print(f"(slope {curve.slope:.2f}, offset {curve.offset:.2f}, from {curve.tokens} tokens)")
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"median time of an answer: {medians['local']:.1f} ms local, {medians['escalated']:.1f} ms escalated\n")


def _figures(found: list[Asked], errors: dict[str, float], times: dict[str, list[float]]) -> dict[str, Any]:
    share, right = at_threshold(found, DEFAULT)
    return {
        "benchmark": "escalation",
        "metrics": {
            "quality_local": quality(found, 0.0),
            "quality_teacher": quality(found, 1.0),
            "share_at_default": share,
            "quality_at_default": right,
            "share_at_default_by_mean": at_threshold(by_mean(found), DEFAULT)[0],
            "gained_by_mean": gained(by_mean(found)),
            "calibration_error_raw": errors["raw"],
            "calibration_error": errors["calibrated"],
            "local_ms": statistics.median(times["local"]),
            "escalated_ms": statistics.median(times["escalated"]),
        },
        "ratios": {"gained_vs_oracle": gained(found)},
        "curve": [[share, quality(found, share)] for share in SHARES],
    }


if __name__ == "__main__":
    main()
