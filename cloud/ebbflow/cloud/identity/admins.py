"""Admins: people and programs with a role, known by their certificates."""

import datetime as dt

from sqlalchemy.orm import Session

from ebbflow.cloud.identity import certificates
from ebbflow.cloud.identity.authority import ADMIN_LIFETIME, Authority, Issued
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.peers import ADMIN_ROLES
from ebbflow.common.names import check_id

MAX_LIFETIME = dt.timedelta(days=366)


def create(
    session: Session,
    authority: Authority,
    admin_id: str,
    role: str,
    csr_der: bytes,
    now: dt.datetime,
    lifetime: dt.timedelta = ADMIN_LIFETIME,
    keep_serial: str = "",
) -> Issued:
    """Signs and records a certificate for an admin, and revokes the ones that the admin had.

    So a lost key is shut out, and a role is changed, by creating the admin again.

    Args:
        session: the transaction.
        authority: who signs.
        admin_id: name of the admin, such as "ada".
        role: "viewer", "operator" or "owner".
        csr_der: signing request over the admin's key.
        now: the current time.
        lifetime: how long the certificate works.
        keep_serial: certificate that the caller presents, which stays valid: an owner that renews its own must not be
            locked out when the answer is lost.

    Raises:
        EbbflowError: INVALID_REQUEST naming the wrong field.
    """
    check_id(admin_id, "admin_id")
    if role not in ADMIN_ROLES:
        raise EbbflowError(Reason.INVALID_REQUEST, f"role must be one of {', '.join(ADMIN_ROLES)}", field="role")
    if not dt.timedelta(0) < lifetime <= MAX_LIFETIME:
        message = f"lifetime must be above 0 and at most {MAX_LIFETIME.days} days"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="lifetime")
    issued = authority.issue_admin(csr_der, admin_id, role, lifetime, now)
    certificates.revoke_subject(session, issued.identity.name, now, keep_serial)
    certificates.record(session, issued, now)
    return issued
