"""Privacy accounts and the audit log."""

from ebbflow.api.v1 import ledger_pb2
from ebbflow.cloud.registry.tables import AuditEntry, PrivacyAccount
from ebbflow.cloud.services.convert.common import timestamp
from ebbflow.common import names
from ebbflow.common.privacy import accounting


def account(row: PrivacyAccount, entries: int) -> ledger_pb2.PrivacyAccount:
    """A privacy account, with epsilon at its own delta."""
    return ledger_pb2.PrivacyAccount(
        agent=names.make("agents", row.agent_id),
        student=names.make("students", row.student_id),
        window=row.window,
        rho_spent_nano=row.rho_spent_nano,
        rho_cap_nano=row.rho_cap_nano,
        epsilon_spent=accounting.epsilon_of(row.rho_spent_nano, row.delta),
        epsilon_left=accounting.epsilon_left(row.rho_spent_nano, row.rho_cap_nano, row.delta),
        delta=row.delta,
        entries=entries,
    )


def audit_entry(row: AuditEntry) -> ledger_pb2.AuditEntry:
    """An entry of the audit log."""
    return ledger_pb2.AuditEntry(
        name=names.make("auditEntries", str(row.id)),
        create_time=timestamp(row.create_time),
        actor=row.actor,
        method=row.method,
        resource=row.resource,
        code=row.code,
        request_id=row.request_id,
    )
