"""Distillation: how a student learns from its teacher, and the worker that carries a queued run through."""
