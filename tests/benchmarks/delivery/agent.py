"""One device: fetches, verifies and commits a release with the agent's own delivery code. Run as a script.

python agent.py STATE
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from delivery_device import desired, load_bigram

from ebbflow.client.channels import sync_channel
from ebbflow.common import allocator
from ebbflow.edge.agent.credentials import CredentialFiles
from ebbflow.edge.agent.state import StateFolder
from ebbflow.edge.delivery.fetcher import ArtefactSource
from ebbflow.edge.delivery.install import Installer
from ebbflow.edge.delivery.trust import TrustClient
from ebbflow.edge.engine.base import Engine

RELEASE = 1


def main(state: Path) -> None:
    """Gets ready, waits to be told, installs, and says when it had what."""
    allocator.keep_chunks()  # as `ebbflow-edge run` does
    credentials = CredentialFiles(StateFolder(state)).load()
    source = ArtefactSource(sync_channel(credentials.cloud))
    trust = TrustClient(state / "trust", credentials.trust_root, source)
    trust.refresh()
    verified_times = []

    def load(weights_path: Path) -> Engine:
        verified_times.append(time.time())  # whatever reaches an engine is whole and verified
        return load_bigram(weights_path)

    with tempfile.TemporaryDirectory(dir=state) as students:
        installer = Installer(Path(students), trust, source)
        print("ready", flush=True)
        sys.stdin.readline()
        before_s = time.process_time()
        installed, _ = installer.install(desired(RELEASE), load)
        installer.commit(installed)
        told = {
            "verified_time": verified_times[0],
            "committed_time": time.time(),
            "cpu_s": time.process_time() - before_s,
            "fetched_bytes": installed.fetched_bytes,
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
