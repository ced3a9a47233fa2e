"""What the agent and the commands beside it open alike."""

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.agent.credentials import CredentialFiles
from ebbflow.edge.agent.settings import AgentSettings
from ebbflow.edge.feedback.identity import Identity
from ebbflow.edge.feedback.interactions import Retention
from ebbflow.edge.feedback.plans import Ceiling
from ebbflow.edge.feedback.store import FeedbackStore


def ceiling_of(settings: AgentSettings) -> Ceiling:
    """Returns the device's own privacy limit.

    Raises:
        EbbflowError: CONFIG_INVALID if it makes no sense.
    """
    return Ceiling(settings.epsilon, settings.delta, settings.window_days, settings.lifetime_epsilon, settings.adapters)


def identity_of(settings: AgentSettings) -> Identity:
    """Returns how long this device has had its identity; one that is not enrolled has none that would wait.

    Raises:
        EbbflowError: FILE_CORRUPT.
    """
    files = CredentialFiles(settings.folder)
    if not files.exist:
        return Identity()
    known = files.load()
    return Identity(known.enrol_time, known.new_device)


def open_store(settings: AgentSettings, identity: Identity | None = None) -> FeedbackStore:
    """Opens the device's feedback store.

    Args:
        settings: the agent's settings.
        identity: since when the device has been who it is; needed only where rounds are answered.

    Raises:
        EbbflowError: NOT_ENROLLED if there is no state folder; FILE_CORRUPT, DISK_FULL, SCHEMA_NEWER.
    """
    if not settings.state.is_dir():
        raise EbbflowError(Reason.NOT_ENROLLED, f"there is no state folder {settings.state}", path=settings.state)
    retention = Retention(days=settings.retention_days)
    return FeedbackStore(settings.folder.database, retention, settings.consent, identity)
