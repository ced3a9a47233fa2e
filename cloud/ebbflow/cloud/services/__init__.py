"""The gRPC services of the control plane: thin shells around the other rooms."""
