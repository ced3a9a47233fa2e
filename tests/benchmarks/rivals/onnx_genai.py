"""ONNX Runtime GenAI: its INT4 model as its own builder writes it, and a session on it, run by `speed.session`."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rivals import environments
from speed.session import main
from speed.shapes import CONTEXT_TOKENS, Shape

_REQUIREMENTS = ("onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "onnx-ir==1.1.0", "numpy==2.4.6")
_BUILD = """
import runpy, sys
package, arguments = sys.argv[1], sys.argv[2:]
sys.path.append(package)  # behind the packages that this interpreter has: torch and transformers are there
sys.path.insert(0, f"{package}/onnxruntime_genai/models")
sys.argv = ["builder.py", *arguments]
runpy.run_path(f"{package}/onnxruntime_genai/models/builder.py", run_name="__main__")
"""


def interpreter() -> Path:
    """The interpreter of its environment.

    Raises:
        subprocess.CalledProcessError: It could not be installed.
    """
    return environments.python("onnx-genai", _REQUIREMENTS)


def model(hf: Path) -> Path:
    """Lets its builder write a folder beside a Hugging Face folder: INT4 in blocks of 32, int8 activations.

    Raises:
        subprocess.CalledProcessError: The builder failed.
    """
    path = hf.with_name("onnx")
    if not path.exists():
        print(f"building the model of ONNX Runtime GenAI in {path}", file=sys.stderr, flush=True)
        (package,) = interpreter().parent.parent.glob("lib/python*/site-packages")
        options = ["--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]
        with tempfile.TemporaryDirectory(dir=path.parent) as name:
            made = Path(name) / path.name
            arguments = ["-i", hf, "-o", made, "-p", "int4", "-e", "cpu", "-c", Path(name) / "cache", *options]
            command = list(map(str, [sys.executable, "-c", _BUILD, package, *arguments]))
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            made.rename(path)
    return path


class OnnxGenai:
    """One model; each new set of prompts is a generator of its own, as the library has it."""

    def __init__(self, shape: Shape, path: Path, threads: int) -> None:
        api = import_module("onnxruntime_genai")  # in its own environment only

        config = api.Config(str(path))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._api, self._model = api, api.Model(config)
        self._generator: Any = None

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """All prompts in one pass."""
        import numpy as np

        self._generator = None
        settings = self._api.GeneratorParams(self._model)
        most = min(CONTEXT_TOKENS, len(prompts[0]) + 512)
        settings.set_search_options(max_length=most, min_length=most, batch_size=len(prompts), do_sample=False)
        self._generator = self._api.Generator(self._model, settings)
        self._generator.append_tokens(np.array(prompts, np.int32))
        self._generator.generate_next_token()

    def next(self) -> None:
        """One token of each."""
        self._generator.generate_next_token()

    def close(self) -> None:
        """Frees it all."""
        del self._generator, self._model


if __name__ == "__main__":
    main(OnnxGenai)
