"""Reads the mirror of the agents' privacy accounts. The agents' own accounts are authoritative."""

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.registry.paging import page
from ebbflow.cloud.registry.tables import PrivacyAccount, PrivacyEntry


def list_accounts(
    session: Session, agent_id: str = "", page_size: int = 0, page_token: str = ""
) -> tuple[list[tuple[PrivacyAccount, int]], str]:
    """Returns one page of accounts with the number of their entries, and the token of the next page.

    Epsilon of a row is `accounting.epsilon_of(row.rho_spent_nano, row.delta)`, what is left is
    `accounting.epsilon_left`.

    Args:
        session: a reading transaction.
        agent_id: only those of this agent; empty means all.
        page_size: as in `registry.paging.page`.
        page_token: likewise.

    Raises:
        EbbflowError: INVALID_REQUEST, PAGE_TOKEN_INVALID.
    """
    query = sa.select(PrivacyAccount)
    if agent_id:
        query = query.where(PrivacyAccount.agent_id == agent_id)
    key = [PrivacyAccount.agent_id, PrivacyAccount.student_id, PrivacyAccount.window]
    rows, following = page(session, query, key, page_size, page_token)
    columns = (PrivacyEntry.agent_id, PrivacyEntry.student_id, PrivacyEntry.window)
    agents = {row.agent_id for row in rows}
    tally = sa.select(*columns, sa.func.count()).where(PrivacyEntry.agent_id.in_(agents)).group_by(*columns)
    entries = {(row[0], row[1], row[2]): row[3] for row in session.execute(tally)}
    return [(row, entries.get((row.agent_id, row.student_id, row.window), 0)) for row in rows], following
