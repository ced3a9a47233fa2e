"""Students small enough to train by the dozen, by the parts that a distillation is made of."""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from private_feedback.requests import Request, Requests

from ebbflow.cloud.distillation.corpus import Text
from ebbflow.cloud.distillation.losses import IGNORE, align
from ebbflow.cloud.distillation.mixture import Documents, Sequences, encode_documents, pad
from ebbflow.cloud.distillation.recipe import Recipe
from ebbflow.cloud.distillation.trainer import Trainer
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student
from ebbflow.common.student.tokens import Tokenizer

VOCABULARY = 1024
WIDTH, LAYERS, HEADS = 64, 2, 4
LENGTH, BATCH = 48, 32
LEARNING_RATE = 3e-3
FAILING_SHARE = 0.25
"""Share of what is asked that the student which serves fails: where its loss is largest."""

Nats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Steps:
    """How long students learn."""

    base: int
    following: int


class School:
    """Trains and measures students on one corpus.

    Attributes:
        tokenizer: of all of them.
        intent_of_held_out: place of the intent of each held-out request.
        tokens: of each held-out request.
    """

    def __init__(self, requests: Requests, steps: Steps) -> None:
        """Encodes everything."""
        self.tokenizer = Tokenizer.train([request.text for request in requests.public], VOCABULARY)
        self._steps, self._requests = steps, requests
        texts = [Text(request.intent, request.text, "train") for request in requests.public]
        self._documents = Documents.encode(texts, self.tokenizer)
        self._inputs_BT, self._labels_BT = self._encode(requests.held_out)
        self.tokens = (self._labels_BT != IGNORE).sum(1).numpy()
        places = {intent: at for at, intent in enumerate(requests.intents)}
        self.intent_of_held_out = np.array([places[request.intent] for request in requests.held_out])

    def base(self, seed: int = 0) -> Student:
        """The student that serves: it learnt from all topics alike."""
        tokenizer = self.tokenizer
        config = StudentConfig(
            vocab_size=tokenizer.size,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2,
            head_dim=WIDTH // HEADS,
            max_position_embeddings=2 * LENGTH,
            pad_token_id=tokenizer.pad_id,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
        )
        student = Student.random(config, seed)
        self._train(student, [request.intent for request in self._requests.public], {}, self._steps.base, seed)
        return student

    def following(self, base: Student, topics: list[str], mixture: Mapping[str, float], seed: int) -> Nats:
        """Trains the next student from the one that serves; returns its nats on each held-out request.

        Args:
            base: the student that serves.
            topics: topic of each public request.
            mixture: shares of topics; empty leaves the corpus' own.
            seed: of the order of documents.
        """
        student = copy.deepcopy(base)
        self._train(student, topics, mixture, self._steps.following, seed)
        return self.nats(student)

    def failed(self, base: Student) -> list[bool]:
        """Which of the requests that users make the serving student fails."""
        inputs_BT, labels_BT = self._encode(self._requests.asked)
        loss = self._nats(base, inputs_BT, labels_BT) / (labels_BT != IGNORE).sum(1).numpy()
        return [bool(one) for one in loss > np.quantile(loss, 1 - FAILING_SHARE)]

    def nats(self, student: Student) -> Nats:
        """Nats of a student on each held-out request."""
        return self._nats(student, self._inputs_BT, self._labels_BT)

    def nats_per_token(self, nats: Nats, demand_I: npt.NDArray[np.float64]) -> float:
        """Quality on what a fleet asks: held-out requests, weighted by the fleet's demand."""
        count_I = np.bincount(self.intent_of_held_out, minlength=len(demand_I))
        weight = (demand_I / count_I)[self.intent_of_held_out]
        return float(weight @ nats / (weight @ self.tokens))

    def _train(self, student: Student, topics: list[str], mixture: Mapping[str, float], steps: int, seed: int) -> None:
        recipe = Recipe(
            steps=steps,
            batch_size=BATCH,
            sequence_length=LENGTH,
            learning_rate=LEARNING_RATE,
            warmup_steps=steps // 20,
            kl_weight=0.0,
            seed=seed,
        )
        documents = dataclasses.replace(self._documents, topics=topics)
        sequences = Sequences(documents, mixture, length=LENGTH, count=recipe.sequences, seed=seed)
        Trainer(student.train(), sequences, recipe, None).run(lambda progress: None)

    def _encode(self, requests: list[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = encode_documents(self.tokenizer, [request.text for request in requests])
        tokens_BS, ignored_BS = pad(ids, self.tokenizer.bos_id, self.tokenizer.pad_id)
        return align(torch.from_numpy(tokens_BS), torch.from_numpy(ignored_BS))

    @staticmethod
    @torch.inference_mode()
    def _nats(student: Student, inputs_BT: torch.Tensor, labels_BT: torch.Tensor) -> Nats:
        """Sum of the cross-entropy of each row."""
        found = []
        for inputs, labels in zip(torch.split(inputs_BT, 500), torch.split(labels_BT, 500), strict=True):
            counts_BT = labels != IGNORE
            logits_NV = student.eval().hidden(inputs)[counts_BT] @ student.head_weight.T
            loss_N = torch.nn.functional.cross_entropy(logits_NV, labels[counts_BT], reduction="none")
            found.append(torch.zeros(len(labels)).index_add(0, counts_BT.nonzero()[:, 0], loss_N))
        return torch.cat(found).double().numpy()
