"""Writes the job: python job.py MB CLIENTS ROUNDS."""

import sys

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe

size_mb, clients, rounds = map(int, sys.argv[1:])
np.save("./init.npy", np.random.default_rng(0).random((size_mb << 20) // 4, dtype=np.float32))
NumpyFedAvgRecipe(
    name="push", min_clients=clients, num_rounds=rounds, initial_ckpt="./init.npy", train_script="client.py"
).export("./jobs")
