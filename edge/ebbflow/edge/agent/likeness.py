"""How a plan likens texts to its bins, by what this device serves."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.privacy.lexical import Lexicon
from ebbflow.edge.feedback.votes import Embed
from ebbflow.edge.serving.hub import Hub


def likeness_of(plan: pb.RoundPlan, hub: Hub) -> Embed | None:
    """Returns the plan's measure, or None without the student: then nobody was served, and the report has no votes.

    Either measure looks at one text at a time and knows public texts alone besides it, so that no user's text moves
    another user's vote.
    """
    found = [model.tokenizer for model in hub.models() if model.student == plan.student]
    if not found:
        return None
    if plan.measure != pb.RoundPlan.MEASURE_STUDENT:
        return Lexicon([text for bin_ in plan.bins for text in bin_.texts], found[0].encode, found[0].size)

    def embed(texts: Sequence[str]) -> npt.NDArray[np.floating]:
        return np.stack(hub.embed(plan.student, texts))

    return embed
