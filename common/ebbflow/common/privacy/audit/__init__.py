"""Looks for leaks in the release code by running it many times. Needs scipy, of the extra `cloud`."""
