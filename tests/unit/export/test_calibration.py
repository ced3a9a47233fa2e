"""Static int8: integers all the way, in ranges that texts have shown."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import export_world as world
import numpy as np
import onnx
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx_running import Running

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.export import calibration
from ebbflow.common.export.onnx_folder import write_onnx

Released = Callable[[str], Path]


def test_a_calibrated_student_multiplies_integers_and_answers_as_before(released: Released, tmp_path: Path) -> None:
    source = world.source(released("tied"), "bf16")
    write_onnx(source, tmp_path / "static", calibration.calibrated(source, [world.TEXT], tmp_path))
    onnx.checker.check_model(tmp_path / "static" / "model.onnx", full_check=True)
    running = Running(tmp_path / "static", world.SHAPE)
    kinds = Counter(node.op_type for node in onnx.load(running.optimised, load_external_data=False).graph.node)
    assert kinds["MatMulIntegerToFloat"] == 7 * world.SHAPE.num_hidden_layers + 1
    plain, ids = world.plain(released("tied") / "bf16.safetensors"), world.tokenizer().encode(world.TEXT, bos=True)
    found, wanted = torch.from_numpy(running.step([ids])[0]), world.logits(plain, ids)
    assert (found - wanted).std() < 0.1 * wanted.std()
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.9


def test_ranges_reach_as_far_as_the_activations_did(released: Released, tmp_path: Path) -> None:
    source = world.source(released("tied"), "bf16")
    ranges = calibration.measure(source, world.PROMPTS, tmp_path)
    plain, seen = world.plain(released("tied") / "bf16.safetensors"), list[torch.Tensor]()
    projection = plain.get_submodule("model.layers.0.self_attn.q_proj")
    projection.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    for prompt in world.PROMPTS:
        world.logits(plain, source.tokenizer.encode(prompt, bos=True))
    wanted = min(float(x.min()) for x in seen), max(float(x.max()) for x in seen)
    assert ranges["model.layers.0.self_attn.q_proj.weight"] == pytest.approx(wanted, rel=1e-4)
    assert set(ranges) == {name for name, shape in world.SHAPE.tensor_shapes().items() if len(shape) == 2}


@given(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32))
def test_a_range_holds_zero_exactly_and_reaches_both_ends(one: float, other: float) -> None:
    low, high = sorted((one, other))
    scale, zero = calibration.activation_scale(low, high)
    assert 0 <= zero <= 255
    assert scale > 0
    for end in (low, high):
        code = np.clip(np.rint(end / scale) + zero, 0, 255)
        assert abs((code - zero) * scale - end) <= scale * 1.001


@given(hnp.arrays(np.float32, (3, 8), elements=st.floats(-1e6, 1e6, width=32)))
@example(np.full((3, 8), 1e-45, np.float32))
@example(np.full((3, 8), 190 * 2.0**-149, np.float32))
def test_weights_are_within_half_a_step(weight_OI: np.ndarray) -> None:
    codes_OI, scales_O = calibration.per_output(weight_OI)
    assert int(codes_OI.min()) >= -127
    assert bool((scales_O > 0).all())
    assert np.all(np.abs(codes_OI * scales_O[:, None] - weight_OI) <= scales_O[:, None] * 0.5001)


def test_texts_are_read_from_a_corpus_or_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    path.write_text('{"topic": "sea", "text": "The tide"}\n\nplain words\n{"topic": "no text"}\n17\n')
    assert calibration.read_texts(path) == ["The tide", "plain words", "17"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe", b'{"text": 1}'])
def test_a_file_without_a_text_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "corpus").write_bytes(content)
    with pytest.raises(EbbflowError) as caught:
        calibration.read_texts(tmp_path / "corpus")
    assert caught.value.reason is Reason.CORPUS_INVALID


def test_nothing_to_calibrate_with_is_refused(released: Released, tmp_path: Path) -> None:
    with pytest.raises(EbbflowError) as caught:
        calibration.read_texts(tmp_path / "nowhere")
    assert caught.value.reason is Reason.CORPUS_INVALID
    with pytest.raises(EbbflowError) as caught:
        calibration.measure(world.source(released("tied"), "bf16"), [], tmp_path)
    assert caught.value.reason is Reason.CORPUS_INVALID
    assert list(tmp_path.iterdir()) == []
