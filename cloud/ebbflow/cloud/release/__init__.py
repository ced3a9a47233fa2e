"""Packs, evaluates, signs and publishes releases."""
