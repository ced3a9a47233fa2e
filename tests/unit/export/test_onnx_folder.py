"""ONNX: ONNX Runtime computes the same logits, with and without what came before."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import export_world as world
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx_running import AS_DEVICES, EXACT, Running

from ebbflow.common.codes.artefact import PRECISIONS, Precision
from ebbflow.common.codes.twin import load_student
from ebbflow.common.export.onnx_folder import write_onnx
from ebbflow.common.export.onnx_matrices import pack_int4
from ebbflow.common.student.model import Student

Released = Callable[[str], Path]
IDS = list(range(3, 40))


def exported(released: Released, shape: str, precision: Precision, folder: Path) -> Path:
    write_onnx(world.source(released(shape), precision), folder / "onnx")
    return folder / "onnx"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", world.SHAPES)
def test_the_logits_are_those_of_the_releases_numbers(
    released: Released, shape: str, precision: Precision, tmp_path: Path
) -> None:
    folder = exported(released, shape, precision, tmp_path)
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    found = Running(folder, world.SHAPES[shape], EXACT).step([IDS])[0]
    wanted = world.logits(world.plain(released(shape) / f"{precision}.safetensors"), IDS)
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_onnx_runtime_multiplies_codes_as_devices_do(released: Released, precision: Precision, tmp_path: Path) -> None:
    running = Running(exported(released, "tied", precision, tmp_path), world.SHAPES["tied"], AS_DEVICES)
    kinds = Counter(node.op_type for node in onnx.load(running.optimised, load_external_data=False).graph.node)
    assert kinds["MatMulNBits"] == 7 * world.SHAPE.num_hidden_layers + 1, "every matrix, the tied head too"
    assert "DequantizeLinear" not in kinds
    twin = load_student(released("tied") / f"{precision}.safetensors")
    ids = world.tokenizer().encode(world.TEXT, bos=True)
    found = torch.from_numpy(running.step([ids])[0])
    # Keys and values are float32 there, so without the twin's rounding of those.
    wanted = twin.logits(Student.hidden(twin, torch.tensor([ids])))[0]
    assert (found - wanted).abs().median() < 1e-4 * wanted.std()
    assert (found - wanted).std() < 0.01 * wanted.std(), "where a rounding fell to the other side"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_answers_are_ours(released: Released, precision: Precision, tmp_path: Path) -> None:
    folder, tokenizer = exported(released, "tied", precision, tmp_path), world.tokenizer()
    twin = load_student(released("tied") / f"{precision}.safetensors")
    for prompt in world.PROMPTS:
        ids = tokenizer.encode(prompt, bos=True)
        assert Running(folder, world.SHAPE).greedy(ids, 12) == world.greedy(twin, ids, 12), prompt


def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(released: Released, tmp_path: Path) -> None:
    folder = exported(released, "tied", "int4", tmp_path)
    whole = Running(folder, world.SHAPE, EXACT).step([IDS])[0]
    pieces = Running(folder, world.SHAPE, EXACT)
    found = np.concatenate([pieces.step([IDS[begin:end]])[0] for begin, end in ((0, 5), (5, 6), (6, 30), (30, 37))])
    np.testing.assert_allclose(found, whole, rtol=1e-3, atol=1e-4)


def test_a_padded_batch_gives_each_sequence_its_own_logits(released: Released, tmp_path: Path) -> None:
    folder = exported(released, "untied", "int8", tmp_path)
    short, config = IDS[:9], world.SHAPES["untied"]
    padded, mask = [0] * (len(IDS) - len(short)) + short, [0] * (len(IDS) - len(short)) + [1] * len(short)
    batch = Running(folder, config, EXACT, batch=2)
    found = batch.step([IDS, padded], [[1] * len(IDS), mask])
    alone = [Running(folder, config, EXACT), Running(folder, config, EXACT)]
    wanted = [alone[0].step([IDS])[0], alone[1].step([short])[0]]
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found[1, -len(short) :], wanted[1], rtol=1e-3, atol=1e-4)
    following = batch.step([[7], [7]])
    np.testing.assert_allclose(following[1], alone[1].step([[7]])[0], rtol=1e-3, atol=1e-4)


def test_a_student_of_fixed_shapes_answers_token_by_token(released: Released, tmp_path: Path) -> None:
    """As docs/how-to/run-with-nnapi.md says."""
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

    folder = exported(released, "tied", "int8", tmp_path)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for name, size in (("batch", 1), ("sequence", 1), ("past", 63), ("total", 64)):
        make_dim_param_fixed(model.graph, name, size)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    ids = world.tokenizer().encode(world.PROMPTS[0], bos=True)
    fixed = Running(folder, world.SHAPE)
    fixed.past = {name: np.zeros((1, 2, 63, 16), np.float32) for name in fixed.past}
    fixed.mask = np.zeros((1, 63), np.int64)
    tokens = list(ids)
    for position in range(len(ids) + 11):
        logits_BTV = fixed.step([[tokens[position]]])
        fixed.past = {name: part[:, :, 1:] for name, part in fixed.past.items()}
        fixed.mask = fixed.mask[:, 1:]
        if position + 1 >= len(ids):
            tokens.append(int(logits_BTV[0, -1].argmax()))
    wanted = world.greedy(load_student(released("tied") / "int8.safetensors"), ids, 12)
    assert tokens[len(ids) :] == wanted


def test_the_file_of_weights_holds_codes_and_not_their_numbers(released: Released, tmp_path: Path) -> None:
    for precision, most in (("int4", 1.5), ("int8", 2.1), ("bf16", 3.8)):
        (tmp_path / precision).mkdir()
        folder = exported(released, "untied", precision, tmp_path / precision)  # type: ignore[arg-type]
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        stored_bytes = sum(
            int(entry.value)
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "length"
        )
        assert stored_bytes < most * world.SHAPES["untied"].parameters


@given(hnp.arrays(np.int8, st.integers(0, 70), elements=st.integers(-7, 7)))
def test_int4_is_packed_as_onnx_reads_it(codes: np.ndarray) -> None:
    tensor = onnx.helper.make_tensor("t", onnx.TensorProto.INT4, codes.shape, pack_int4(codes).tobytes(), raw=True)
    assert np.array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), codes)
