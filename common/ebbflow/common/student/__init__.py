"""The student: one decoder, its configuration, checkpoints and tokenizer."""
