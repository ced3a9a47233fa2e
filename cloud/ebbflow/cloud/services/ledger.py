"""LedgerService: what was spent and what was done."""

from typing import Any

import grpc
import sqlalchemy as sa

from ebbflow.api.v1 import ledger_pb2 as pb
from ebbflow.api.v1 import ledger_pb2_grpc
from ebbflow.cloud.feedback.accounts import list_accounts
from ebbflow.cloud.registry.paging import page
from ebbflow.cloud.registry.tables import AuditEntry
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.convert import ledger
from ebbflow.common import names

Context = grpc.aio.ServicerContext[Any, Any]


class LedgerService(ledger_pb2_grpc.LedgerServiceServicer):
    """See ledger.proto."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    async def ListPrivacyAccounts(
        self, request: pb.ListPrivacyAccountsRequest, context: Context
    ) -> pb.ListPrivacyAccountsResponse:
        """Returns a page of accounts, by agent, student and window."""
        agent_id = names.parse(request.agent, "agents") if request.agent else ""
        cloud = self._cloud
        statements, token = await cloud.read(
            lambda session: list_accounts(session, agent_id, request.page_size, request.page_token)
        )
        accounts = await cloud.in_thread(cloud.files, lambda: [ledger.account(one) for one in statements])
        return pb.ListPrivacyAccountsResponse(privacy_accounts=accounts, next_page_token=token)

    async def ListAuditEntries(
        self, request: pb.ListAuditEntriesRequest, context: Context
    ) -> pb.ListAuditEntriesResponse:
        """Returns a page of the audit log, newest first."""
        query = sa.select(AuditEntry)
        if request.actor:
            query = query.where(AuditEntry.actor == request.actor)
        rows, token = await self._cloud.read(
            lambda session: page(
                session, query, [AuditEntry.id], request.page_size, request.page_token, descending=True
            )
        )
        return pb.ListAuditEntriesResponse(audit_entries=map(ledger.audit_entry, rows), next_page_token=token)
