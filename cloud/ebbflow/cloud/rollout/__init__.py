"""Rollouts: the staged assignment of releases to agents."""
