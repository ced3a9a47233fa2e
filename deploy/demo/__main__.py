"""`make demo`: one student goes round the whole loop on this machine, on real parts, and comes back better.

Example: python -m demo --folder ./demo-run --keep
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, here and in the children: spinning starves others

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from demo import corpus, fleet, sizes, teacher, traffic, users
from demo.cloud import Cloud
from demo.learning import asked_by_topic, weighted_bits
from demo.processes import DemoError, Processes, tail
from demo.report import AgentReport, Report
from demo.steps import Steps
from ebbflow.api.v1 import release_pb2, round_pb2
from ebbflow.common.codes.twin import load_student
from ebbflow.common.errors import EbbflowError
from ebbflow.common.privacy.weights import weights
from ebbflow.common.student.tokens import Tokenizer

MARKER = ".ebbflow-demo"
INTERRUPTED = 130


class Demo:
    """One run in one folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Makes the folder anew."""
        self.folder = folder
        self.seed = seed
        prepare(folder)
        self.steps = Steps()
        self.processes = Processes(folder / "log")
        self.cloud = Cloud(folder / "cloud", self.processes)
        self.devices: list[fleet.Device] = []

    def run(self) -> Report:
        """Goes round the loop; returns what came of it."""
        step, cloud = self.steps.step, self.cloud
        documents = corpus.build()
        asked = asked_by_topic(documents)
        sites = users.crowd(asked, agents=sizes.AGENTS, users=sizes.USERS, seed=self.seed)
        demand = users.demand(sites)

        with step("teacher", "training a teacher, a mixture of experts, on Python's own documentation"):
            self._train_teacher(documents)
        with step("start", "starting the cloud and three agents"):
            cloud.start(self.folder / "teacher")
            cloud.create_student(self.folder / "teacher", self.folder / "corpus.jsonl")
            self.devices = fleet.start(sizes.AGENTS, self.folder / "agents", cloud, self.processes)
        with step("first_distillation", "distilling the first student"):
            first = cloud.distil(sizes.first_recipe(self.seed), self.steps.note)
        with step("first_rollout", "rolling it out: one agent, then all"):
            cloud.roll_out(first.name)
        with step("use", f"{sizes.AGENTS * sizes.USERS} users ask the agents over HTTP and say what they made of it"):
            tally = traffic.work([device.url for device in self.devices], sites)
        with step(
            "round", f"collecting one private round, ε = {sizes.EPSILON:g} for {sizes.ROUNDS_PER_WINDOW} of them"
        ):
            collected = cloud.collect()
        runs = {"first": first}
        with step("feedback_distillation", "distilling again with the round's mixture"):
            runs["feedback"] = self._distil_further(first, round=collected.name)
        with step("feedback_rollout", "rolling it out"):
            cloud.roll_out(runs["feedback"].name)
        with step("control_distillation", "the control: the same steps and seeds without feedback"):
            runs["control"] = self._distil_further(first)
        with step("no_privacy_distillation", "for comparison: as if the cloud saw every request (ε = ∞)"):
            runs["no_privacy"] = self._distil_further(first, mixture=plain_mixture(tally))
        with step("evaluation", "measuring all of them on held-out documents"):
            bits = {name: self._measure(release, asked, demand) for name, release in runs.items()}
        return self._report(bits, tally, collected, demand)

    def _train_teacher(self, documents: list[corpus.Document]) -> None:
        texts = [document.text for document in documents if document.split == "train"]
        (self.folder / "corpus.jsonl").write_bytes(corpus.corpus_lines(documents))

        def report(step: int, loss: float) -> None:
            self.steps.note(f"step {step} of {sizes.TEACHER_STEPS}, loss {loss:.2f}")

        teacher.train(texts, self.folder / "teacher", steps=sizes.TEACHER_STEPS, seed=self.seed, report=report)

    def _distil_further(self, base: release_pb2.Release, **options: object) -> release_pb2.Release:
        return self.cloud.distil(sizes.next_recipe(self.seed), self.steps.note, base_release=base.name, **options)

    def _measure(
        self, release: release_pb2.Release, asked: Mapping[str, list[str]], demand: Mapping[str, float]
    ) -> float:
        student = load_student(self.cloud.fetch_weights(release, self.folder))
        tokenizer = Tokenizer.from_file(self.folder / "teacher" / "tokenizer.json")
        return weighted_bits(student, tokenizer, asked, demand)

    def _report(
        self, bits: dict[str, float], tally: traffic.Tally, collected: round_pb2.Round, demand: dict[str, float]
    ) -> Report:
        accounts = {account.agent.partition("/")[2]: account for account in self.cloud.accounts()}
        reports = [
            AgentReport(
                agent=device.name,
                epsilon_spent=accounts[device.name].epsilon_spent,
                epsilon_left=accounts[device.name].epsilon_left,
                batch_bytes=device.batch_bytes,
                fetched_bytes=device.fetched_bytes,
            )
            for device in self.devices
        ]
        return Report(
            seed=self.seed,
            bits_per_byte=bits,
            epsilon=sizes.EPSILON,
            delta=sizes.DELTA,
            epsilon_spent=max(report.epsilon_spent for report in reports),
            agents=reports,
            users=sizes.AGENTS * sizes.USERS,
            requests=tally.requests,
            accepted_share=tally.accepted_share,
            batches_accepted=collected.batches_accepted,
            informative=collected.aggregate.informative,
            bytes_sent=sum(report.batch_bytes for report in reports),
            bytes_fetched=sum(report.fetched_bytes for report in reports),
            demand=demand,
            mixture={bin_.bin_id: bin_.weight for bin_ in collected.aggregate.bins},
            seconds={**self.steps.seconds, "total": self.steps.total_s},
        )

    def look_around(self) -> str:
        """Commands for whoever wants to see more."""
        bin_ = Path(sys.executable).parent
        device = self.devices[0]
        pids = " ".join(str(pid) for pid in reversed(self.processes.ids.values()))
        return "\n".join(
            [
                "Everything is still running. To look around:",
                f"  export PATH={bin_}:$PATH EBBFLOW_CONTEXT={self.cloud.context}",
                "  ebbflow agent list",
                "  ebbflow release list",
                "  ebbflow rollout list",
                "  ebbflow round list",
                "  ebbflow privacy show",
                "  ebbflow audit list",
                f"  ebbflow-edge status --state {device.state}",
                f"  ebbflow-edge privacy show --state {device.state}",
                f"""  curl -s {device.url}/completions -H 'content-type: application/json' \\
    -d '{{"model": "{sizes.STUDENT}", "prompt": "os.path.join(path, ", "max_tokens": 24, "user": "me"}}'""",
                f"Logs: {self.folder / 'log'} and {self.cloud.home / 'log'}",
                f"To stop: kill {pids}",
            ]
        )


def plain_mixture(tally: traffic.Tally) -> dict[str, float]:
    """The mixture that the product's formula makes of what users really asked, without noise or mistaken bins."""
    topics = list(corpus.TOPICS)
    seen = [float(tally.accepted.get(topic, 0)) for topic in topics]
    failed = [float(tally.rejected.get(topic, 0)) for topic in topics]
    return dict(zip(topics, weights(seen, failed), strict=True))


def prepare(folder: Path) -> None:
    """Makes the folder empty; one that is not a demo's is left alone.

    Raises:
        DemoError: it holds something else, or the run that is in it still goes on.
    """
    if folder.exists() and any(folder.iterdir()):
        marker = folder / MARKER
        if not marker.exists():
            raise DemoError(f"{folder} is not empty and not a demo's: choose another with --folder")
        alive = [pid for pid in json.loads(marker.read_text() or "[]") if Path(f"/proc/{pid}").exists()]
        if alive:
            raise DemoError(f"the run in {folder} still goes on: stop it with kill {' '.join(map(str, alive))}")
        shutil.rmtree(folder)
    for name in ("log", "cloud", "agents"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("[]")


def main() -> int:
    """Runs the command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo-run"), help="where everything goes (demo-run)")
    parser.add_argument("--seed", type=int, default=0, help="seed of users and training (0)")
    parser.add_argument("--keep", action="store_true", help="leave cloud and agents running at the end")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        demo = Demo(options.folder.resolve(), options.seed)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    kept = False
    try:
        report = demo.run()
        report.write(demo.folder / "report.json")
        print(f"\n{report.text()}\n\nThe same for programs: {demo.folder / 'report.json'}")
        if options.keep:
            (demo.folder / MARKER).write_text(json.dumps(list(demo.processes.ids.values())))
            print(f"\n{demo.look_around()}")
            kept = True
    except (DemoError, EbbflowError, OSError) as error:
        log = getattr(error, "log", None)
        print(f"\ndemo: {error}", file=sys.stderr)
        if log is not None:
            print(f"the end of {log}:\n{tail(log)}", file=sys.stderr)
        print(f"the logs are in {demo.folder / 'log'} and {demo.cloud.home / 'log'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; everything that it started is being stopped", file=sys.stderr)
        return INTERRUPTED
    finally:
        demo.cloud.close()
        if not kept:
            demo.processes.stop()
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
