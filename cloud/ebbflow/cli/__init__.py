"""The admin CLI, on top of the client library. Imports neither torch nor SQLAlchemy."""
