"""Asks llama.cpp: run by an interpreter that has llama-cpp-python. One JSON object in, one out."""

import json
import sys

from llama_cpp import Llama


def main() -> None:
    """Reads {gguf, texts, prompts, count}; prints tokens of texts, and logits and continuations of prompts."""
    asked = json.load(sys.stdin)
    model = Llama(asked["gguf"], n_ctx=256, n_batch=256, n_threads=1, logits_all=True, verbose=False, seed=0)
    tokens = [model.tokenize(text.encode(), add_bos=True, special=False) for text in asked["texts"]]
    pieces = [model.detokenize(ids[1:]).decode("utf-8", "replace") for ids in tokens]
    logits, said = [], []
    for prompt in asked["prompts"]:
        model.reset()
        model.eval(prompt)
        logits.append(model.scores[: len(prompt)].tolist())
        model.reset()
        answer: list[int] = []
        for token in model.generate(prompt, temp=0.0):
            answer.append(int(token))
            if len(answer) == asked["count"]:
                break
        said.append(answer)
    found = {"tokens": tokens, "pieces": pieces, "logits": logits, "said": said, "metadata": model.metadata}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
