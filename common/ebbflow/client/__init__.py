"""The typed Python client: channels, certificates, retries and errors."""
