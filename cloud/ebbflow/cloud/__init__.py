"""The cloud service: teaches, distils, releases, rolls out and learns from feedback."""
