"""Takes the weights of each round, notes when, and gives them back: NVFLARE has no message without an answer."""

import json
import os
import time
from pathlib import Path

import nvflare.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    had_time = time.time()
    row = {"round": model.current_round, "had_time": had_time, "size_bytes": model.params["numpy_key"].nbytes}
    with Path(os.environ["EBBFLOW_BENCH_ROWS"]).open("a") as file:
        file.write(json.dumps(row) + "\n")
    flare.send(flare.FLModel(params=model.params, params_type=flare.ParamsType.FULL, current_round=model.current_round))
