"""Rounds on a population's prompts as the registry keeps them, and texts that a small grammar makes."""

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from google.protobuf import json_format

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import population_pb2, round_pb2
from ebbflow.cloud.distillation.likeness import by_words
from ebbflow.cloud.feedback import population, population_queue
from ebbflow.cloud.feedback.aggregate import aggregate
from ebbflow.cloud.feedback.pool import Space
from ebbflow.cloud.registry import clock
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import Population, Round, RoundState, Student
from ebbflow.common.privacy.calibration import calibrate
from ebbflow.common.privacy.release import privatise
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.feedback.interactions import Interaction
from ebbflow.edge.feedback.votes import contributions_of

GRAMMAR = {
    "bank": (
        ["please", "kindly", "could you", "i want to", "help me", "can you"],
        ["open", "close", "freeze", "check", "move", "rename"],
        ["my savings account", "my credit card", "the loan", "the direct debit", "my balance", "the standing order"],
        ["today", "before friday", "right now", "this week", "for my son"],
    ),
    "trip": (
        ["please", "kindly", "could you", "i want to", "help me", "can you"],
        ["book", "cancel", "change", "find", "compare", "upgrade"],
        ["a flight to oslo", "the hotel room", "a rental car", "the train seat", "my travel plan", "a ferry ticket"],
        ["for monday", "near the sea", "without a layover", "for two people", "with breakfast"],
    ),
}
"""Begin, verb, thing and end of every request, by topic."""


def sentences(topic: str) -> list[str]:
    """Every request that the grammar makes of a topic, in a fixed order."""
    return [" ".join(parts) for parts in itertools.product(*GRAMMAR[topic])]


def public_texts(count: int = 200) -> dict[str, list[str]]:
    """A public part of each topic, the same each time."""
    return {topic: random.Random(topic).sample(sentences(topic), count) for topic in GRAMMAR}


def corpus_bytes(texts: dict[str, list[str]]) -> bytes:
    """Lines of a corpus with a gate text in every topic."""
    lines = [{"topic": topic, "text": text} for topic, found in texts.items() for text in found]
    lines += [{"topic": topic, "text": f"only measured: {topic}", "split": "gate"} for topic in texts]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def add_student(registry: Registry, corpus_sha256: str, teacher: str = "", student_id: str = "faq") -> None:
    """Adds a student of the grammar's topics."""
    with registry.transaction() as session:
        session.add(
            Student(
                id=student_id,
                teacher=teacher,
                architecture={},
                corpus_sha256=corpus_sha256,
                topics=list(GRAMMAR),
                privacy_policy={"epsilon": 4.0},
                selector="",
                create_time=clock.now(),
            )
        )


def queue(registry: Registry, **fields: object) -> Population:
    """Asks for the next generation."""
    request = population_pb2.EvolvePopulationRequest(student="students/faq", **fields)  # type: ignore[arg-type]
    with registry.transaction() as session:
        return population_queue.queue(session, session.get_one(Student, "faq"), request, clock.now())


def generation(registry: Registry, number: int) -> Population:
    with registry.reading() as session:
        return population.find(session, "faq", number)


def prompts(registry: Registry, number: int) -> list[population_pb2.Prompt]:
    return population.prompts_of(generation(registry, number))


def add_round(
    registry: Registry,
    bins: Sequence[pb.Bin],
    seen: Sequence[float],
    *,
    round_id: str = "5c1e",
    noise_std: float = 1.0,
    epsilon: float = 4.0,
    state: RoundState = RoundState.CLOSED,
    student_id: str = "faq",
) -> str:
    """Puts a round in place whose batches add up to so many votes of each bin; returns its name."""
    now, whole = clock.now(), sum(seen) or 1.0
    plan = pb.RoundPlan(round=f"rounds/{round_id}", bins=bins, policy=pb.PrivacyPolicy(epsilon=epsilon))
    estimates = [
        round_pb2.BinEstimate(bin_id=bin_.bin_id, seen=votes, weight=votes / whole)
        for bin_, votes in zip(bins, seen, strict=True)
    ]
    said = round_pb2.Aggregate(bins=estimates, noise_std=noise_std, informative=max(seen, default=0) > 3 * noise_std)
    row = Round(
        id=round_id,
        student_id=student_id,
        state=state,
        plan=plan.SerializeToString(),
        signature=b"",
        key_id="",
        window="2026-11-03",
        end_time=now,
        create_time=now,
        aggregate=json_format.MessageToDict(said) if state is RoundState.CLOSED else {},
    )
    with registry.transaction() as session:
        session.add(row)
    return f"rounds/{round_id}"


def bins_of(registry: Registry, number: int) -> list[pb.Bin]:
    with registry.reading() as session:
        return population.bins(session, "faq", number)


TOPIC_BINS = [pb.Bin(bin_id=topic, texts=[topic]) for topic in GRAMMAR]


def save_teacher(folder: Path, texts: Sequence[str], steps: int, seed: int = 0) -> Path:
    """Writes a small Llama that was trained on texts for so many steps of 16; 100 of them take about a second."""
    tokenizer = Tokenizer.train([text for found in public_texts().values() for text in found], 400)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    encoded = [[tokenizer.bos_id or 0, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    for _ in range(steps):
        chosen = [encoded[at] for at in torch.randint(len(encoded), (16,)).tolist()]
        longest = max(map(len, chosen))
        tokens_BT = torch.full((16, longest), tokenizer.pad_id)
        labels_BT = torch.full((16, longest), -100)
        for row, ids in enumerate(chosen):
            tokens_BT[row, : len(ids)] = labels_BT[row, : len(ids)] = torch.tensor(ids)
        loss = model(input_ids=tokens_BT, labels=labels_BT).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


@dataclass
class Fleet:
    """Users on agents, who ask requests that are not public and vote through the devices' own code.

    Attributes:
        agents: number of agents.
        users: users of each.
        asked: requests that users draw from.
        dice: of what users ask; noise is the operating system's.
    """

    agents: int
    users: int
    asked: Sequence[str]
    dice: random.Random

    def vote(
        self, prompts: Sequence[population_pb2.Prompt], epsilon: float
    ) -> tuple[pb.RoundPlan, round_pb2.Aggregate]:
        """One round on some prompts, with the noise of a window of four rounds at this epsilon for each user."""
        bins = [pb.Bin(bin_id=prompt.prompt_id, texts=[prompt.text]) for prompt in prompts]
        plan = pb.RoundPlan(
            bins=bins,
            metrics=[pb.Metric(kind=pb.Metric.KIND_NEAR, cap=1)],
            mechanism=calibrate(epsilon, 1e-6, 4, 2),
            null_bins=64,
            near_micro=600_000,
            max_users=1000,
        )
        likeness = by_words([prompt.text for prompt in prompts])
        reports = []
        for _ in range(self.agents):
            asked = [self.dice.choice(self.asked) for _ in range(self.users)]
            users = {str(at).encode(): [Interaction(str(at), str(at).encode())] for at in range(self.users)}
            texts = {str(at): text for at, text in enumerate(asked)}
            votes = contributions_of(plan, users, _prompts(texts), likeness)
            reports.append(privatise(plan, votes))
        return plan, aggregate(plan, reports)


def _prompts(texts: dict[str, str]) -> Callable[[Sequence[str]], dict[str, str]]:
    return lambda ids: {id_: texts[id_] for id_ in ids}


def nearness(space: Space, prompts: Sequence[population_pb2.Prompt], asked: Sequence[str]) -> float:
    """Mean cosine between what is asked and the nearest prompt: what private evolution is to raise."""
    rows_NE = space.rows([prompt.text for prompt in prompts])
    return float((space.rows(asked) @ rows_NE.T).max(axis=1).mean())
