"""Rounds have their turn one after the other, and what is wrong with one keeps no other waiting."""

import logging
from collections.abc import Callable, Iterable

from ebbflow.cloud.services.faults import describe
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError

_log = logging.getLogger(__name__)


def each(what: str, round_ids: Iterable[str], act: Callable[[str], bool]) -> list[str]:
    """Does something with every round. Where that fails an error is logged, and the next call tries again.

    Args:
        what: what is done, for the log: "closing".
        round_ids: in this order.
        act: does it; says whether there was anything to do.

    Returns:
        The rounds with which something was done.
    """
    return [round_id for round_id in round_ids if _guarded(what, round_id, act)]


def _guarded(what: str, round_id: str, act: Callable[[str], bool]) -> bool:
    try:
        return act(round_id)
    except EbbflowError as error:
        why = f"{error} ({error.reason.name})"
    except Exception as error:  # noqa: BLE001 - the others must have their turn, whatever it is
        why = describe(error)
    _log.error("%s %s failed, and is tried again: %s", what, names.make("rounds", round_id), why)
    return False
