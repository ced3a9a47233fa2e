"""Fetches, verifies and installs releases."""
