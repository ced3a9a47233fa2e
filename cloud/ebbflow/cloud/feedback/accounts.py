"""Reads the mirror of the agents' privacy accounts. The agents' own accounts are authoritative."""

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.registry.paging import page
from ebbflow.cloud.registry.tables import PrivacyAccount, PrivacyEntry


@dataclass(frozen=True)
class Statement:
    """One account and its charges, in billionths of rho."""

    account: PrivacyAccount
    charges_nano: tuple[int, ...]
    """One for each batch of the window."""
    lifetime_nano: tuple[int, ...]
    """One for each batch of the agent and student in any window."""


def list_accounts(
    session: Session, agent_id: str = "", page_size: int = 0, page_token: str = ""
) -> tuple[list[Statement], str]:
    """Returns one page of accounts with their charges, and the token of the next page.

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
    entries = session.scalars(sa.select(PrivacyEntry).where(PrivacyEntry.agent_id.in_({row.agent_id for row in rows})))
    charges: dict[tuple[str, str], list[PrivacyEntry]] = {}
    for entry in entries:
        charges.setdefault((entry.agent_id, entry.student_id), []).append(entry)
    return [_statement(row, charges.get((row.agent_id, row.student_id), [])) for row in rows], following


def _statement(row: PrivacyAccount, entries: list[PrivacyEntry]) -> Statement:
    return Statement(
        account=row,
        charges_nano=tuple(entry.rho_nano for entry in entries if entry.window == row.window),
        lifetime_nano=tuple(entry.rho_nano for entry in entries),
    )
