"""Pushes random codes to every node: 1 MB to get warm, then what is measured."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

ARRAYS = 64
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Writes a row for each push to the file that the configuration names."""
    config = context.run_config
    while len(list(grid.get_node_ids())) < int(config["nodes"]):
        time.sleep(0.2)
    for round_number in range(int(config["rounds"]) + 1):
        row = _push(grid, 1 if round_number == 0 else int(config["mb"]), round_number)
        with Path(str(config["out"])).open("a") as file:
            file.write(json.dumps(row) + "\n")


def _push(grid: Grid, size_mb: int, round_number: int) -> dict[str, object]:
    random = np.random.default_rng(round_number)
    length = (size_mb << 20) // ARRAYS
    arrays = {f"w{n}": Array(random.integers(0, 256, length, dtype=np.uint8)) for n in range(ARRAYS)}
    content = RecordDict({"arrays": ArrayRecord(arrays)})
    told_time = time.time()
    messages = [
        Message(content=content, dst_node_id=node, message_type="query", group_id=str(round_number))
        for node in grid.get_node_ids()
    ]
    waiting, had, errors = set(grid.push_messages(messages)), [], []
    while waiting:
        for answer in grid.pull_messages(waiting):
            waiting.discard(answer.metadata.reply_to_message_id)
            if answer.has_error():
                errors.append(str(answer.error))
            else:
                had.append(dict(answer.content["said"]))
        time.sleep(0.05)
    return {"told_time": told_time, "had": had, "errors": errors, "size_mb": size_mb}
