"""Asks ONNX Runtime GenAI: run by an interpreter that has it. One JSON object in, one out."""

import json
import sys
from importlib import import_module


def main() -> None:
    """Reads {folder, prompts, count, texts}; prints continuations of prompts and tokens of texts."""
    api, numpy = import_module("onnxruntime_genai"), import_module("numpy")
    asked = json.load(sys.stdin)
    model = api.Model(asked["folder"])
    said = []
    for prompt in asked["prompts"]:
        settings = api.GeneratorParams(model)
        settings.set_search_options(max_length=len(prompt) + asked["count"])
        generator = api.Generator(model, settings)
        generator.append_tokens(numpy.array([prompt], numpy.int32))
        while not generator.is_done():
            generator.generate_next_token()
        said.append([int(token) for token in generator.get_sequence(0)][len(prompt) :])
    tokenizer = api.Tokenizer(model)
    json.dump({"said": said, "tokens": [tokenizer.encode(text).tolist() for text in asked["texts"]]}, sys.stdout)


if __name__ == "__main__":
    main()
