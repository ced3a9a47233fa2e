"""The demo's cloud: `ebbflow cloud serve` with its worker, gate and teacher, and what an admin asks of it."""

import json
import tomllib
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from google.protobuf.duration_pb2 import Duration

from demo import sizes
from demo.processes import Child, DemoError, Processes, program
from ebbflow.api.v1 import distillation_pb2 as dpb
from ebbflow.api.v1 import feedback_pb2, fleet_pb2, ledger_pb2, release_pb2, round_pb2, student_pb2
from ebbflow.api.v1 import rollout_pb2 as rpb
from ebbflow.client.admin import AdminClient, listed
from ebbflow.client.context import FILE_NAME
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.processes import init
from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.common import names

START_S = 60.0
RUN_S = 900.0
"""Longest that distillations, a rollout or a round may take."""
PARENT = names.make("students", sizes.STUDENT)


class Cloud:
    """A running cloud, and its owner's client.

    Attributes:
        home: its folder.
        context: the owner's context file.
        blobs: its blob store.
    """

    def __init__(self, home: Path, processes: Processes) -> None:
        """Takes a folder to be made."""
        self.home = home
        self.context = home / "admin" / FILE_NAME
        self.blobs = LocalBlobStore(home / "blobs")
        self._processes = processes
        self._server: Child | None = None
        self._client: AdminClient | None = None

    def start(self, teacher: Path) -> None:
        """Makes the cloud's folder and starts it on free ports.

        Raises:
            DemoError: it ended, or is not ready in time.
        """
        config = {
            "listen": "127.0.0.1:0",
            "enrol_listen": "127.0.0.1:0",
            "teacher_listen": "127.0.0.1:0",
            "teacher": str(teacher),
            "tick_interval_s": 0.25,
            "hint_spread_ms": 100,
            "heartbeat_interval_s": 2,
        }
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in config.items()]
        (self.home / "config.toml").write_text("".join(lines))
        init.initialise(CloudSettings.load(self.home))
        command = program("ebbflow.cli.main", "cloud", "serve", "--home", str(self.home))
        self._server = self._processes.start("cloud", command, {})
        self._processes.wait("the cloud's start", lambda: self._bound() or None, START_S, self._server.log)
        self._client = AdminClient.from_context(self.context)

    def close(self) -> None:
        """Closes the client; the processes end the server."""
        if self._client is not None:
            self._client.close()

    @property
    def admin(self) -> AdminClient:
        """The owner's client."""
        if self._client is None:
            raise DemoError("the cloud has not been started")
        return self._client

    @property
    def enrolment_address(self) -> str:
        """host:port of the listener for devices without a certificate."""
        return self._bound()["enrolment"]

    def token(self, uses: int) -> str:
        """Makes an enrolment token."""
        return self.admin.fleet.CreateEnrolmentToken(fleet_pb2.CreateEnrolmentTokenRequest(uses=uses)).secret

    def create_student(self, teacher: Path, corpus: Path) -> None:
        """Creates the student with its corpus and privacy policy."""
        policy = feedback_pb2.PrivacyPolicy(
            epsilon=sizes.EPSILON, delta=sizes.DELTA, window_days=30, rounds_per_window=sizes.ROUNDS_PER_WINDOW
        )
        student = student_pb2.Student(
            teacher=str(teacher),
            architecture=sizes.SHAPE,
            corpus_sha256=self.admin.upload(corpus).sha256,
            privacy_policy=policy,
        )
        self.admin.students.CreateStudent(
            student_pb2.CreateStudentRequest(student_id=sizes.STUDENT, student=student, request_id=str(uuid.uuid4()))
        )

    def distil(self, recipe: dpb.Recipe, note: Callable[[str], None], **options: object) -> release_pb2.Release:
        """Runs one distillation and waits until its release is published.

        Args:
            recipe: how to train.
            note: is told how far it is.
            options: further fields of `Distillation`: base_release, round, mixture.

        Raises:
            DemoError: it failed, or the gate turned the release down.
        """
        wanted = dpb.Distillation(student=PARENT, recipe=recipe, **options)  # type: ignore[arg-type]
        request = dpb.CreateDistillationRequest(distillation=wanted, request_id=str(uuid.uuid4()))
        name = self.admin.distillations.CreateDistillation(request).distillation.name
        log = self.home / "log" / "work.log"
        job = self._processes.wait(name, lambda: self._ended(name, note), RUN_S, log)
        if job.state != dpb.Distillation.STATE_SUCCEEDED:
            raise DemoError(f"{name} failed: {job.error}", log)
        note("the gate evaluates")
        gate_log = self.home / "log" / "gate.log"
        release = self._processes.wait(job.release, lambda: self._decided(job.release), RUN_S, gate_log)
        if release.state != release_pb2.Release.STATE_PUBLISHED:
            raise DemoError(f"the gate turned {release.name} down: {release.reason}", gate_log)
        return release

    def _ended(self, name: str, note: Callable[[str], None]) -> dpb.Distillation | None:
        job = self.admin.distillations.GetDistillation(dpb.GetDistillationRequest(name=name)).distillation
        note(f"step {job.step} of {job.recipe.steps}, {job.tokens_per_second:,.0f} tokens/s")
        return job if job.state > dpb.Distillation.STATE_RUNNING else None

    def _decided(self, name: str) -> release_pb2.Release | None:
        release = self.admin.releases.GetRelease(release_pb2.GetReleaseRequest(name=name)).release
        return release if release.state >= release_pb2.Release.STATE_PUBLISHED else None

    def roll_out(self, release: str) -> rpb.Rollout:
        """Brings a release to every agent: a canary first, then all.

        Raises:
            DemoError: the rollout halted.
        """
        phases = [rpb.Phase(share=share, success_share=1.0, min_answers=1) for share in (1 / sizes.AGENTS, 1.0)]
        request = rpb.CreateRolloutRequest(
            rollout=rpb.Rollout(release=release, phases=phases), request_id=str(uuid.uuid4())
        )
        name = self.admin.rollouts.CreateRollout(request).rollout.name

        def ended() -> rpb.Rollout | None:
            rollout = self.admin.rollouts.GetRollout(rpb.GetRolloutRequest(name=name)).rollout
            return rollout if rollout.state > rpb.Rollout.STATE_PAUSED else None

        rollout = self._processes.wait(name, ended, RUN_S, self._log)
        if rollout.state != rpb.Rollout.STATE_SUCCEEDED:
            raise DemoError(f"{name} halted: {rollout.reason}")
        return rollout

    def collect(self) -> round_pb2.Round:
        """Opens a round, waits for every agent's batch, closes it.

        Raises:
            DemoError: not every batch came.
        """
        request = round_pb2.OpenRoundRequest(
            student=PARENT, duration=Duration(seconds=3600), request_id=str(uuid.uuid4())
        )
        name = self.admin.rounds.OpenRound(request).round.name

        def complete() -> round_pb2.Round | None:
            opened = self.admin.rounds.GetRound(round_pb2.GetRoundRequest(name=name)).round
            return opened if opened.batches_accepted + opened.batches_refused >= opened.cohort_size else None

        self._processes.wait(f"the batches of {name}", complete, RUN_S, self._log)
        return self.admin.rounds.CloseRound(round_pb2.CloseRoundRequest(name=name)).round

    def accounts(self) -> list[ledger_pb2.PrivacyAccount]:
        """What every agent has spent."""
        ledger = self.admin.ledger.ListPrivacyAccounts
        return list(listed(ledger, ledger_pb2.ListPrivacyAccountsRequest(), "privacy_accounts"))

    def fetch_weights(self, release: release_pb2.Release, folder: Path) -> Path:
        """Copies the bf16 weights of a release out of the blob store."""
        path = folder / f"{release.name.rpartition('/')[2]}.safetensors"
        (artefact,) = (v.artefact for v in release.variants if v.artefact.target_path.endswith(".bf16.safetensors"))
        self.blobs.fetch(artefact.sha256.hex(), path)
        return path

    @property
    def _log(self) -> Path | None:
        return self._server.log if self._server else None

    def _bound(self) -> Mapping[str, str]:
        """Where the listeners are; empty until they are."""
        path = self.home / "endpoints.toml"
        return tomllib.loads(path.read_text()) if path.exists() else {}
