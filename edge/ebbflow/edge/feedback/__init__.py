"""Feedback on the device: what users did, the privacy account, and the batches that leave."""
