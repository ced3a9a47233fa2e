"""Who may call what: every method of every service, by name. What is not listed is refused to everybody."""

from dataclasses import dataclass
from typing import Literal

from ebbflow.common.identity.peers import Identity

AdminRole = Literal["viewer", "operator", "owner"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Who may call one method."""

    agents: bool = False
    """Whether agents may, each as itself."""
    admins: AdminRole | None = None
    """The weakest role of admins that may; None means none."""
    anyone: bool = False
    """Whether a peer without a certificate may; only the enrolment listener has such peers."""
    mutates: bool = False
    """Whether every call goes into the audit log."""

    def allows(self, identity: Identity | None) -> bool:
        """Whether this peer may call."""
        if identity is None or self.anyone:
            return self.anyone
        if identity.kind == "agent":
            return self.agents
        return self.admins is not None and identity.allows(self.admins)

    def wanted(self) -> str:
        """Who would have been allowed, for the message."""
        who = ["agents"] if self.agents else []
        return " or ".join([*who, *([f"admins with role {self.admins}"] if self.admins else [])]) or "nobody"


_DEVICE = Rule(agents=True)
_DEVICE_WRITES = Rule(agents=True, mutates=True)
_READ = Rule(admins="viewer")
_FETCH = Rule(agents=True, admins="viewer")
_OPERATE = Rule(admins="operator", mutates=True)
_OWN = Rule(admins="owner", mutates=True)
_ENTER = Rule(anyone=True, mutates=True)

_BY_SERVICE: dict[str, dict[str, Rule]] = {
    "EnrolmentService": {"Enrol": _ENTER, "Recover": _ENTER},
    "AgentService": {
        "Renew": _DEVICE_WRITES,
        "Connect": _DEVICE,
        "GetDesiredState": _DEVICE,
        "ReportInstallation": _DEVICE_WRITES,
    },
    "ArtefactService": {"ReadMetadata": _FETCH, "ReadBlob": _FETCH, "FindDeltas": _FETCH, "WriteBlob": _OPERATE},
    "FeedbackService": {"GetPlan": _DEVICE, "SubmitBatch": _DEVICE_WRITES},
    "StudentService": {
        "CreateStudent": _OPERATE,
        "GetStudent": _READ,
        "ListStudents": _READ,
        "UpdateRolloutPolicy": _OWN,
        "UpdateEscalationPolicy": _OWN,
        "UpdatePrivacyPolicy": _OWN,
        "ListPrivacyPolicies": _READ,
    },
    "DistillationService": {
        "CreateDistillation": _OPERATE,
        "GetDistillation": _READ,
        "ListDistillations": _READ,
        "WatchDistillation": _READ,
        "CancelDistillation": _OPERATE,
        "DeletePrivateCorpus": _OPERATE,
    },
    "ReleaseService": {
        "GetRelease": _READ,
        "ListReleases": _READ,
        "CompareReleases": _READ,
        "RevokeRelease": _OWN,
        "RaiseMinRelease": _OWN,
    },
    "TrustService": {"GetTrust": _READ, "PublishMetadata": _OWN},
    "RolloutService": {
        "CreateRollout": _OPERATE,
        "GetRollout": _READ,
        "ListRollouts": _READ,
        "WatchRollout": _READ,
        "PauseRollout": _OPERATE,
        "ResumeRollout": _OPERATE,
        "AbortRollout": _OPERATE,
        "ApproveRollout": _OPERATE,
        "RetryRollout": _OPERATE,
        "RollBack": _OPERATE,
        "PreviewRollout": _READ,
    },
    "FleetService": {
        "GetAgent": _READ,
        "ListAgents": _READ,
        "LabelAgent": _OPERATE,
        "RevokeAgent": _OWN,
        "ReinstateAgent": _OPERATE,
        "PinAgent": _OPERATE,
        "UnpinAgent": _OPERATE,
        "CreateEnrolmentToken": _OPERATE,
        "ListEnrolmentTokens": _READ,
        "RevokeEnrolmentToken": _OPERATE,
        "CreateAdmin": _OWN,
    },
    "RoundService": {"OpenRound": _OPERATE, "CloseRound": _OPERATE, "GetRound": _READ, "ListRounds": _READ},
    "PopulationService": {"EvolvePopulation": _OPERATE, "GetPopulation": _READ, "ListPopulations": _READ},
    "LedgerService": {"ListPrivacyAccounts": _READ, "ListAuditEntries": _READ},
}

PACKAGE = "ebbflow.api.v1"
POLICY: dict[str, Rule] = {
    f"/{PACKAGE}.{service}/{method}": rule
    for service, methods in _BY_SERVICE.items()
    for method, rule in methods.items()
}
"""The rule of every method of ours, by its full path."""

STANDARD = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")
"""Health and reflection: any peer that the listener lets in."""


def rule_of(path: str) -> Rule | None:
    """The rule of a method; None refuses everybody."""
    if path.startswith(STANDARD):
        return Rule(agents=True, admins="viewer", anyone=True)
    return POLICY.get(path)
