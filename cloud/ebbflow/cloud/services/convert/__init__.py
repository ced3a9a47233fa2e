"""Rows of the registry as messages of the contract, one module for each resource."""
