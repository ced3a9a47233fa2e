"""Real releases that differ by a little, in several precisions, and devices that install them. For tests of deltas."""

import math
from pathlib import Path

import numpy as np
from delivery_world import World
from numpy.typing import NDArray

from ebbflow.api.v1 import agent_pb2, resources_pb2
from ebbflow.common.codes.artefact import PRECISIONS, Precision, read_variant, write_variant
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.trust.manifest import Manifest, ManifestVariant, Probe
from ebbflow.common.trust.targets import path_of, variant_path
from ebbflow.edge.delivery.install import InstalledRelease
from ebbflow.edge.engine.base import Engine
from ebbflow.edge.engine.load import load_engine
from ebbflow.edge.engine.loss import sequence_loss

PROBE = Probe(((1, 70, 80, 90, 100), (1, 75, 85)), 0.01)
CODES = {
    "bf16": resources_pb2.PRECISION_BF16,
    "int8": resources_pb2.PRECISION_INT8,
    "int4": resources_pb2.PRECISION_INT4,
}
Weights = dict[str, NDArray[np.float32]]


def config() -> StudentConfig:
    """About 300,000 weights."""
    return StudentConfig(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=96,
        max_position_embeddings=128,
    )


def load(weights_path: Path) -> Engine:
    return load_engine(weights_path, threads=1)


class Line:
    """A student whose every release is a small step away from the one before."""

    def __init__(self, world: World, precisions: tuple[Precision, ...] = PRECISIONS, step: float = 1e-3) -> None:
        self.world, self.precisions, self._step = world, precisions, step
        self._random = np.random.default_rng(7)
        self._weights: Weights = {}
        self._kept: Path | None = None

    def publish(self, number: int) -> dict[str, bytes]:
        """Trains on a little, packs with the scales of the release before, and publishes; returns the files."""
        self._weights = {name: self._moved(name, shape) for name, shape in config().tensor_shapes().items()}
        kept = read_variant(self._kept) if self._kept else None
        files: dict[str, bytes] = {}
        variants: dict[str, ManifestVariant] = {}
        for precision in self.precisions:
            path = self.world.folder / f"{number}.{precision}.safetensors"
            write_variant(path, self._weights, config(), precision, kept)
            files[precision] = path.read_bytes()
            losses = [sequence_loss(load(path), token_ids) for token_ids in PROBE.token_ids]
            target = variant_path("faq", number, precision)
            variants[precision] = ManifestVariant(target, path.stat().st_size, PROBE.mean(losses))
            if precision == "int8":
                self._kept = path
        manifest = Manifest("faq", number, config().to_hf(), variants, PROBE)

        def packed(packing: dict[str, bytes]) -> None:
            del packing["int8"]
            packing.update(files)

        first = next(iter(self.precisions))
        self.world.publish(number, weights=files[first], manifest=lambda _: manifest, change=packed)
        return files

    def _moved(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        before = self._weights.get(name)
        if before is None:
            return self._random.normal(0, 1 / math.sqrt(shape[-1]), shape).astype(np.float32)
        moved: NDArray[np.float32] = before + self._random.normal(0, self._step, shape).astype(np.float32)
        return moved


def wanted(number: int, precision: str, rollout: str = "rollouts/one") -> agent_pb2.DesiredRelease:
    """What the cloud assigns."""
    release = f"students/faq/releases/{number}"
    return agent_pb2.DesiredRelease(
        student="students/faq", release=release, precision=CODES[precision], rollout=rollout
    )


def sha256_of(world: World, number: int, precision: str) -> str:
    """The signed hash of a release's weights."""
    return world.student().targets[path_of("faq", number, precision)].hashes["sha256"]


def install(world: World, number: int, precision: str, name: str = "device") -> InstalledRelease:
    """Installs and commits on a device, as its agent does."""
    device = world.device(name)
    installed, engine = device.installer.install(wanted(number, precision), load)
    assert engine.precision == precision
    device.installer.commit(installed)
    return installed
