"""Privacy accounts and the audit log."""

from ebbflow.api.v1 import ledger_pb2
from ebbflow.cloud.feedback.accounts import Statement
from ebbflow.cloud.registry.tables import AuditEntry
from ebbflow.cloud.services.convert.common import timestamp
from ebbflow.common import names
from ebbflow.common.privacy import accounting, loss_distribution


def account(statement: Statement) -> ledger_pb2.PrivacyAccount:
    """A privacy account, with epsilon at its own delta by every law. May take a fraction of a second."""
    row = statement.account
    window = loss_distribution.epsilons(statement.charges_nano, row.delta)
    lifetime = loss_distribution.epsilons(statement.lifetime_nano, row.delta)
    return ledger_pb2.PrivacyAccount(
        agent=names.make("agents", row.agent_id),
        student=names.make("students", row.student_id),
        window=row.window,
        rho_spent_nano=row.rho_spent_nano,
        rho_cap_nano=row.rho_cap_nano,
        epsilon_spent=window.quoted,
        epsilon_left=max(0.0, accounting.epsilon_of(row.rho_cap_nano, row.delta) - window.quoted),
        delta=row.delta,
        entries=len(statement.charges_nano),
        epsilon_zcdp=window.zcdp,
        epsilon_gaussian=window.gaussian,
        epsilon_pld=window.loss_distribution,
        epsilon_lifetime=lifetime.quoted,
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
