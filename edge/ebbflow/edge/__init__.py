"""The agent: fetches, verifies, probes and serves students on one device, and sends private feedback back."""
