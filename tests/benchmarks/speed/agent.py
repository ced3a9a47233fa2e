"""An agent's serving, without a cloud: the HTTP API over the native engine, with metrics and the feedback store.

python -m speed.agent ARTEFACT TOKENIZER THREADS FOLDER

Prints its address once it answers, and runs until its input ends.
"""

import asyncio
import sys
from contextlib import closing
from pathlib import Path

from speed.shapes import CONTEXT_TOKENS, STREAMS

from ebbflow.common import allocator
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.engine.load import load_engine
from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving.answering import Answering
from ebbflow.edge.serving.health import Health, add_health
from ebbflow.edge.serving.http import create_app
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.lane import Limits
from ebbflow.edge.serving.metrics import Metrics
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.server import HttpServer

STUDENT = "students/bench"


async def main(artefact: Path, tokenizer: bytes, threads: int, folder: Path) -> None:
    """Serves one student of the artefact, with the parts that `ebbflow-edge run` puts together."""
    allocator.keep_chunks()
    words = Tokenizer.from_bytes(tokenizer)
    engine = load_engine(artefact, prefer="native", threads=threads, context_tokens=CONTEXT_TOKENS)
    metrics = Metrics()
    hub = Hub(Limits(running=STREAMS), metrics.meters)
    hub.swap(Model(STUDENT, f"{STUDENT}/releases/1", engine, words))
    with closing(FeedbackStore(folder / "feedback.db")) as store:
        app = create_app(hub, Answering(hub, store), store)
        add_health(app, Health(hub), metrics, None)
        server = HttpServer(app, "127.0.0.1:0", grace_s=1.0)
        await server.start()
        print(server.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.stop()
    hub.stop()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]).read_bytes(), int(sys.argv[3]), Path(sys.argv[4])))
