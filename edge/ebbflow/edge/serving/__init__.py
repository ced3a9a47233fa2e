"""Answering requests on the device: sampling, batching, the OpenAI-compatible HTTP API and the gRPC service."""
