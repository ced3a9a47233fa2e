"""A release in other engines' formats: GGUF, ONNX, Hugging Face. Without torch; the weights are the very codes."""
