"""What a lower precision costs in quality: a small student, trained on the spot, on text that it has not read.

The student of the load has random weights, of whose quality there is nothing to say.
"""

import sysconfig
from pathlib import Path

from ebbflow.common.codes.artefact import write_variant
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.engine.load import load_engine
from ebbflow.edge.engine.loss import sequence_loss

VOCABULARY = 2000
LENGTH = 128
BATCH = 16
HELD_OUT = 24
LEARNING_RATE = 2e-3


def losses(folder: Path, steps: int) -> dict[str, float]:
    """Returns the loss in nats per token in each precision of one bf16 artefact, by the native engine."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(errors="ignore") for path in sorted(library.glob("*.py"))]
    tokenizer = Tokenizer.train(texts, VOCABULARY)
    ids = [token for text in texts for token in tokenizer.encode(text[:20_000])]
    kept = HELD_OUT * LENGTH
    weights = folder / "bf16.safetensors"
    _train(ids[:-kept], tokenizer.size, weights, steps)
    pieces = [ids[begin : begin + LENGTH] for begin in range(len(ids) - kept, len(ids), LENGTH)]
    found: dict[str, float] = {}
    for precision in ("bf16", "int8", "int4"):
        engine = load_engine(weights, "native", threads=1, precision=precision)
        found[precision] = sum(sequence_loss(engine, piece) for piece in pieces) / len(pieces)
    return found


def _train(ids: list[int], vocabulary: int, weights: Path, steps: int) -> None:
    import torch
    from torch.nn import functional

    from ebbflow.common.student.model import Student

    torch.manual_seed(0)
    torch.set_num_threads(1)  # more of them wait for each other where others compute
    config = StudentConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=LENGTH,
    )
    student = Student.random(config, seed=0).requires_grad_(True).train()
    optimiser = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    stream_N = torch.tensor(ids)
    for _ in range(steps):
        start_B1 = torch.randint(len(stream_N) - LENGTH - 1, (BATCH, 1))
        tokens_BT = stream_N[start_B1 + torch.arange(LENGTH + 1)]
        logits_BTV = student(tokens_BT[:, :-1])
        loss = functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
    state = student.state_dict()
    arrays = {name: state[name].float().numpy() for name in config.tensor_shapes()}
    write_variant(weights, arrays, config, "bf16")
