"""An export runs where torch is not installed."""

import os
import subprocess
import sys
from pathlib import Path

import export_world as world

PROGRAM = """
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys(("torch", "transformers", "safetensors")))
from ebbflow.common.export import calibration, gguf_file, hf_folder, onnx_folder, source
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
int4 = source.Source.read(folder / "int4.safetensors", folder / "tokenizer.json", "faq/3")
bf16 = source.Source.read(folder / "bf16.safetensors", folder / "tokenizer.json", "faq/3")
gguf_file.write_gguf(int4, out / "faq.gguf")
hf_folder.write_hf(int4, out / "hf")
onnx_folder.write_onnx(bf16, out / "static", calibration.calibrated(bf16, ["The tide"], out))
"""


def test_every_format_is_written_without_torch(tmp_path: Path) -> None:
    world.write(world.make("untied"), tmp_path)
    (tmp_path / "out").mkdir()
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["faq.gguf", "hf", "static"]
