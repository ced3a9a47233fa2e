"""Version of the software on this device."""

from importlib.metadata import PackageNotFoundError, version


def agent_version() -> str:
    """Returns the version of the installed software, or "0" in a checkout that is not installed."""
    try:
        return version("ebbflow")
    except PackageNotFoundError:
        return "0"
