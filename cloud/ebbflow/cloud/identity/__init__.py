"""The embedded certificate authority, enrolment tokens and admins."""
