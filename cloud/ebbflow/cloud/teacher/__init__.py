"""The teacher: loading it, and answering for it over gRPC in batches and within quotas."""
