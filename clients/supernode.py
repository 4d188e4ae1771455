"""Flower's SuperNode as an institution's end of the control plane; its ClientApp's task is run by this process.

The SuperNode runs in Flower's "process" isolation: it starts no app. This process fetches the task and runs the
ClientApp that the institution has installed; the bundle that came with the run is never unpacked. So the coordinator
can't choose the code that runs here, which Flower would otherwise let it. Run as a module, this file is the SuperNode.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
import time
from typing import TYPE_CHECKING

from clients.config import ClientConfig
from clients.node import connect
from lpm.errors import PeerLost, SessionRefused
from lpm.node_keys import node_key
from lpm.processes import end_with_parent, free_port, start, stop
from lpm.protocol.identity import COORDINATOR

if TYPE_CHECKING:
    from flwr.supercore.protobuf.client import ProtobufClientInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

__all__ = ["SuperNode"]

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.3
_FAREWELL_SECONDS = 5.0
_FETCH_SECONDS = 1.0
_TRIES = 5


class SuperNode:
    """A running SuperNode of one party.

    Args:
        address: HOST:PORT of the coordinator's SuperLink.
        config: the party.
        patience: seconds to wait for the SuperLink to listen.

    Raises:
        PeerLost: nobody listens there.
        SessionRefused: the SuperLink's certificate is refused.
    """

    def __init__(self, address: str, config: ClientConfig, patience: float) -> None:
        """Wait for the SuperLink and start the process."""
        key, new = node_key(config.keys)
        if new:
            _log.warning("Made %s; give node.pub beside it to the coordinator, as nodes/%s.pub.", key, config.party)
        connect(address, config.keys, patience=patience).close()  # a refusal is told here, and in full
        folder = config.folder.resolve()
        self._log = folder / "supernode.log"
        self._secret_path = folder / "superexec.secret"
        self._secret = secrets.token_bytes(32)
        self._home = folder / "flower"
        self._home.mkdir(exist_ok=True)
        os.environ["FLWR_HOME"] = str(self._home)
        self._flags = {
            "superlink": address,
            "root-certificates": str((config.keys / "authority.pem").resolve()),
            "auth-supernode-private-key": str(key.resolve()),
            "isolation": "process",
            "host": "127.0.0.1",
            "superexec-auth-secret-file": str(self._secret_path),
        }
        self._tries = 0
        self._start()

    @property
    def pid(self) -> int:
        """The SuperNode's process."""
        return self._child.pid

    def close(self) -> None:
        """End the process."""
        stop([self._child], grace=4.0)
        self._secret_path.unlink(missing_ok=True)

    def run_app(self) -> int:
        """Run the ClientApp on the one message of a session, in the calling thread.

        Returns:
            The exit code of its status.

        Raises:
            SessionRefused: the SuperLink does not let this node in.
        """
        from flwr.common.constant import SubStatus
        from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
        from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor
        from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

        import clients.party  # noqa: F401 - torch and the simulator load while the SuperNode starts
        from clients.app import app

        token = self._acquire()
        client = _runtime(self.address, "flwr-clientapp", RuntimeTokenHttpInterceptor(token))
        heart = HeartbeatSender(make_task_heartbeat_fn_http(client))
        heart.start()
        try:
            message, context, _, _ = pull_task_input(client)
            reply = app(message, context)
            exit_code = int(str(reply.content.config_records["status"]["exit"]))
            if self._child.poll() is None:
                push_message(client, reply, context)
                push_task_output(client, context, SubStatus.COMPLETED, "")
                self._until_sent()
        finally:
            heart.stop()
            client.close()
        return exit_code

    def _start(self) -> None:
        self._tries += 1
        self.address = f"127.0.0.1:{free_port()}"
        self._secret_path.unlink(missing_ok=True)
        self._secret_path.touch(mode=0o600)
        self._secret_path.write_bytes(self._secret)
        flags = self._flags | {"port": self.address.rpartition(":")[2]}
        command = [sys.executable, "-m", "clients.supernode"]
        command += [part for name, value in flags.items() for part in (f"--{name}", value)]
        with self._log.open("wb") as log:
            self._child = start(command, output=log, environment={"FLWR_LOG_LEVEL": "INFO"})

    def _acquire(self) -> str:
        import httpx
        from flwr.proto.runtime_pb2 import AcquireTaskRequest
        from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor

        pause = threading.Event()
        while True:
            method = {"/flwr.proto.Runtime/AcquireTask"}
            signs = SuperExecAuthHttpInterceptor(master_secret=self._secret, protected_methods=method)
            client = _runtime(self.address, "SuperExec", signs)
            try:
                while self._child.poll() is None:
                    try:
                        found = client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
                    except httpx.TransportError:
                        pause.wait(_POLL_SECONDS)
                        continue
                    self._secret_path.unlink(missing_ok=True)
                    if found.HasField("task") and found.token:
                        return str(found.token)
                    pause.wait(_POLL_SECONDS)
            finally:
                client.close()
            stop([self._child])
            if self._tries == _TRIES:
                raise self._explain()
            pause.wait(1.0)  # the SuperLink may listen before it has been told of this node
            self._start()

    def _until_sent(self) -> None:
        end, pause = time.monotonic() + _FAREWELL_SECONDS, threading.Event()
        while time.monotonic() < end and self._child.poll() is None:
            if "Sent successfully" in self._log.read_text(errors="replace"):
                # A SuperLink gives out no answer of a node that has signed off: leave it time to be fetched.
                pause.wait(_FETCH_SECONDS)
                return
            pause.wait(_POLL_SECONDS)

    def _explain(self) -> SessionRefused | PeerLost:
        said = self._log.read_text(errors="replace")[-4000:]
        if "Failed to initialize the connection" in said:
            return SessionRefused(
                "The coordinator's SuperLink does not let this party's node in.",
                "Give it the node.pub of this party's key folder.",
            )
        return PeerLost(COORDINATOR, f"the SuperNode ended ({self._log} says why)")


def _runtime(address: str, name: str, interceptor: ProtobufClientInterceptor) -> RuntimeHttpClient:
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    # No retries: the SuperNode is on this machine, and if it does not answer it has gone.
    return RuntimeHttpClient.from_server_address(
        address, True, None, [RuntimeVersionHttpInterceptor(component_name=name), interceptor]
    )


def _serve() -> None:
    end_with_parent(grace=3.0)
    from flwr.supernode.cli import flower_supernode

    flower_supernode()


if __name__ == "__main__":
    _serve()
