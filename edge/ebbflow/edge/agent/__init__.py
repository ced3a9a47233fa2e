"""The long-lived process on a device: identity, the line to the cloud, and what it does on its own."""
