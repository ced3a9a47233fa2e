"""The lock under which one student's rollouts and assignments change."""

from sqlalchemy.orm import Session

from ebbflow.cloud.registry.locks import exclusive


def lock(session: Session, student_id: str) -> None:
    """Excludes other steps on a student's rollouts and assignments. Taken before any of their rows, always."""
    exclusive(session, f"rollouts/{student_id}")
