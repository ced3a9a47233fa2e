"""The learning part of the demo by itself, in one process, over several seeds: is the gain real?

It trains as the worker does and votes as the agents do, with the same noise, but without processes and
releases.
Run from `deploy/`: python -m demo.learning --seeds 5
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve each other

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from google.protobuf.json_format import MessageToDict

from demo import corpus, sizes, teacher, users
from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1.distillation_pb2 import Recipe as Wanted
from ebbflow.cloud.distillation.corpus import Text
from ebbflow.cloud.distillation.mixture import Documents, Sequences
from ebbflow.cloud.distillation.recipe import Recipe
from ebbflow.cloud.distillation.trainer import Trainer
from ebbflow.cloud.distillation.worker import native_precision
from ebbflow.cloud.feedback.plans import TEXT_CHARACTERS, texts_per_bin
from ebbflow.cloud.release.measure import bits_per_byte
from ebbflow.cloud.teacher.model import Teacher
from ebbflow.common.privacy.calibration import calibrate
from ebbflow.common.privacy.gaussian import DiscreteGaussian
from ebbflow.common.privacy.lexical import Lexicon
from ebbflow.common.privacy.weights import weights
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.feedback.votes import Bins

REJECTED_SHARE = 0.6
"""Share of answers that users turn down; measured in the demo."""


class World:
    """The corpus, the teacher and what is computed from them once."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        documents = corpus.build()
        self.topics = list(corpus.TOPICS)
        self.texts = [Text(d.topic, d.text, d.split) for d in documents if d.split != "asked"]
        self.asked = asked_by_topic(documents)
        teacher.train([t.text for t in self.texts if t.split == "train"], folder, steps=sizes.TEACHER_STEPS, seed=seed)
        self.teacher = Teacher.load(str(folder))
        self.tokenizer = self.teacher.tokenizer
        self.documents = Documents.encode([t for t in self.texts if t.split == "train"], self.tokenizer)
        bins = [
            [t.text[:TEXT_CHARACTERS] for t in self.texts if (t.topic, t.split) == (topic, "bin")]
            for topic in self.topics
        ]
        most = texts_per_bin(len(self.topics))
        plan = [pb.Bin(bin_id=topic, texts=texts[:most]) for topic, texts in zip(self.topics, bins, strict=True)]
        public = [text for bin_ in plan for text in bin_.texts]
        self.bins = Bins(plan, Lexicon(public, self.tokenizer.encode, self.tokenizer.size))

    def student(self, seed: int) -> Student:
        """A student of random weights."""
        shape = sizes.SHAPE
        config = StudentConfig(
            vocab_size=self.tokenizer.size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.max_position_embeddings,
            rope_theta=shape.rope_theta,
            pad_token_id=self.tokenizer.pad_id,
            bos_token_id=self.tokenizer.bos_id,
            eos_token_id=self.tokenizer.eos_id,
        )
        return Student.random(config, seed)

    def train(self, student: Student, wanted: Wanted, mixture: Mapping[str, float]) -> Student:
        """Trains a copy of a student further."""
        recipe = Recipe.from_json(MessageToDict(wanted), native_precision())
        trained = copy.deepcopy(student).requires_grad_(True).train()
        order = Sequences(
            self.documents, mixture, length=recipe.sequence_length, count=recipe.sequences, seed=recipe.seed
        )
        Trainer(trained, order, recipe, self.teacher).run(lambda _: None)
        return trained.eval()

    def on_demand(self, student: Student, demand: Mapping[str, float]) -> float:
        """Bits per byte on held-out documents, weighted by what the fleet asks for."""
        return weighted_bits(student, self.tokenizer, self.asked, demand)

    def vote(
        self, sites: Sequence[Sequence[users.User]], seed: int, *, private: bool
    ) -> tuple[list[float], list[float]]:
        """One round: a vote of each user, seen or failed, with or without the agents' noise."""
        dice = torch.Generator().manual_seed(seed)
        mechanism = calibrate(sizes.EPSILON, sizes.DELTA, sizes.ROUNDS_PER_WINDOW, 1)
        noise = DiscreteGaussian(Fraction(mechanism.sigma_squared_numerator, mechanism.sigma_squared_denominator))
        cells = [[0.0] * len(self.topics), [0.0] * len(self.topics)]
        for site in sites:
            for user in site:
                ask = user.asks[int(torch.randint(len(user.asks), (1,), generator=dice))]
                failed = bool(torch.rand((), generator=dice) < REJECTED_SHARE)
                nearest = self.bins.nearest(ask.prompt) if private else self.topics.index(ask.topic)
                if nearest is not None:
                    cells[failed][nearest] += 1
            if private:
                cells = [[a + b for a, b in zip(row, noise.sample(len(row)), strict=True)] for row in cells]
        return cells[0], cells[1]


def asked_by_topic(documents: Sequence[corpus.Document]) -> dict[str, list[str]]:
    """The held-out documents by topic."""
    return {topic: [d.text for d in documents if (d.topic, d.split) == (topic, "asked")] for topic in corpus.TOPICS}


def weighted_bits(
    student: Student, tokenizer: Tokenizer, asked: Mapping[str, Sequence[str]], demand: Mapping[str, float]
) -> float:
    """Bits per byte of each topic's held-out documents, weighted by the topic's share of the requests."""
    texts = [Text(topic, text, "gate") for topic in demand for text in asked[topic]]
    _, by_topic = bits_per_byte(student, tokenizer, texts)
    return sum(share * by_topic[topic] for topic, share in demand.items())


def one_seed(world: World, seed: int) -> dict[str, float]:
    """Bits per byte of every run for one seed."""
    sites = users.crowd(world.asked, agents=sizes.AGENTS, users=sizes.USERS, seed=seed)
    demand = users.demand(sites)
    first = world.train(world.student(seed), sizes.first_recipe(seed), {})
    result = {"first": world.on_demand(first, demand)}
    mixtures: dict[str, Mapping[str, float]] = {"control": {}}
    for name, private in (("feedback", True), ("no_privacy", False)):
        mixtures[name] = dict(zip(world.topics, weights(*world.vote(sites, seed, private=private)), strict=True))
    for name, mixture in mixtures.items():
        result[name] = world.on_demand(world.train(first, sizes.next_recipe(seed), mixture), demand)
    return result


def main() -> None:
    """Prints a line for each seed, the mean gains, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="seeds to run (5)")
    count = parser.parse_args().seeds
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "teacher")
        print(f"teacher trained, {time.monotonic() - begin:.0f} s")
        results = []
        for seed in range(count):
            results.append(one_seed(world, seed))
            print(f"seed {seed}: " + "  ".join(f"{name} {bits:.4f}" for name, bits in results[-1].items()), flush=True)
    gains = {
        name: [100 * (1 - result[name] / result["control"]) for result in results]
        for name in ("feedback", "no_privacy")
    }
    for name, values in gains.items():
        spread = statistics.stdev(values) if count > 1 else 0.0
        print(f"{name}: {statistics.mean(values):+.2f} % fewer bits than the control (standard deviation {spread:.2f})")
    print(json.dumps({"bits_per_byte": results, "gain_percent": gains, "seconds": time.monotonic() - begin}))


if __name__ == "__main__":
    main()
