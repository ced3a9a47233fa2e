"""This device's part in rounds of adapter updates: finds the weights that a plan takes, and trains a change per user.

Without the extra "edge-torch" such rounds are declined; torch is imported only where one is answered.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import util
from pathlib import Path

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import resources_pb2 as rpb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.vector import AdapterContribution
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.agent.background import Halt, in_background
from ebbflow.edge.delivery.slots import SlotStore
from ebbflow.edge.feedback.interactions import Interaction
from ebbflow.edge.feedback.plans import AdmittedPlan
from ebbflow.edge.feedback.store import FeedbackStore


class Updates:
    """Trains what the users of this device would change of a student.

    Args:
        slots: the releases on this device.
        store: what users did.
    """

    def __init__(self, slots: SlotStore, store: FeedbackStore) -> None:
        self._slots, self._store = slots, store

    def contributions(
        self, admitted: AdmittedPlan, begin: Callable[[], None], halt: Halt | None = None
    ) -> tuple[list[AdapterContribution], int]:
        """Returns one change for each user, and the release that they change.

        A device that serves no release that the plan takes has no change to tell, and returns release 0: its batch is
        noise alone. Takes as long as training some dozens of sequences for each user, on one core at the lowest
        priority.

        Args:
            admitted: the plan.
            begin: called before users are looked at; what is raised before that says nothing about them.
            halt: asked before each step of training.

        Raises:
            EbbflowError: EXTRA_MISSING without torch or Opacus; PLAN_INVALID if the student has not the plan's values;
                OUT_OF_MEMORY; FILE_CORRUPT if the weights cannot be read; AGENT_STOPPING.
        """
        _check_extra()
        halt = halt or Halt()
        plan, student_id = admitted.plan.adapter, admitted.student_id
        slot = self._slots.read(student_id).current
        if slot is None or not plan.release - plan.max_staleness <= slot.release <= plan.release:
            return [], 0
        weights = self._slots.path(student_id, slot, "weights")
        tokenizer = Tokenizer.from_file(self._slots.path(student_id, slot, "tokenizer"))
        users = self._sequences(admitted, tokenizer, begin, halt)
        return in_background(lambda: _train(weights, plan, users, halt)), slot.release

    def _sequences(
        self, admitted: AdmittedPlan, tokenizer: Tokenizer, begin: Callable[[], None], halt: Halt
    ) -> Iterable[dict[str, list[int]]]:
        """Yields the tokens of each user's texts by the ids of their interactions, user by user."""
        begin()
        halt.check()
        for interactions in self._store.users(admitted).values():
            halt.check()  # the store may be closed by now
            texts = self._store.texts([each.id for each in interactions])
            yield {
                each.id: tokens_of(each, *texts[each.id], tokenizer, admitted.plan.adapter.sequence_length)
                for each in interactions
                if each.id in texts
            }


def tokens_of(interaction: Interaction, prompt: str, answer: str, tokenizer: Tokenizer, length: int) -> list[int]:
    """Returns what is learnt from one interaction: what was asked, and what was answered if the user took it.

    Args:
        interaction: with its outcome.
        prompt: what was asked.
        answer: what was answered.
        tokenizer: the student's.
        length: most tokens.
    """
    tokens = tokenizer.encode(prompt, bos=True)
    if interaction.outcome == rpb.OUTCOME_ACCEPTED:
        tokens += [*tokenizer.encode(answer), tokenizer.eos_id]
    return tokens[:length]


def _check_extra() -> None:
    missing = [name for name in ("torch", "opacus") if util.find_spec(name) is None]
    if missing:
        message = f'adapter updates need {missing[0]}, of the extra "edge-torch"'
        raise EbbflowError(Reason.EXTRA_MISSING, message, extra="edge-torch")


def _train(
    weights: Path, plan: pb.AdapterPlan, users: Iterable[dict[str, list[int]]], halt: Halt | None = None
) -> list[AdapterContribution]:
    import torch

    from ebbflow.common.codes.twin import load_weights
    from ebbflow.edge.feedback.adapters import Trainer

    # Another number of threads gives other last bits, and the one that engines are given follows the load. Torch keeps
    # it for each thread, and gives the last one set to threads that begin later.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer = Trainer(load_weights(weights), plan, (halt or Halt()).check)
        return [replace(trainer.change(list(texts.values())), made_of=frozenset(texts)) for texts in users]
    except MemoryError as error:
        raise EbbflowError(Reason.OUT_OF_MEMORY, "there is no memory to train an adapter") from error
    finally:
        torch.set_num_threads(threads)
