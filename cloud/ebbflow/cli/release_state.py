"""Where a release stands."""

from typing import Any

from ebbflow.cli.output import word
from ebbflow.common.errors import EbbflowError, Reason


def state_of(release: Any) -> str:
    """Returns the word for it, such as "published"."""
    from ebbflow.api.v1.release_pb2 import Release

    return word(Release.State, release.state)


def check(release: Any) -> None:
    """Ends the command with the right exit code.

    Raises:
        EbbflowError: RELEASE_NOT_PUBLISHED or RELEASE_REVOKED, exit code 5, unless the release is published.
    """
    state = state_of(release)
    if state != "published":
        reason = Reason.RELEASE_REVOKED if state == "revoked" else Reason.RELEASE_NOT_PUBLISHED
        message = f"{release.name} {state}" + (f": {release.reason}" if release.reason else "")
        raise EbbflowError(reason, message, name=release.name)
