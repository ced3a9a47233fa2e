"""What signer and device must agree on so that a release can be trusted: paths, roles and the manifest."""
