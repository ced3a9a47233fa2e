"""The one code space: quantisation, the artefact of a variant, and its torch twin."""
