"""Engines: what runs a student on the device."""
