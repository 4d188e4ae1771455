"""Flower's SuperLink as the control plane: started here as a process, fed with one run, whose ServerApp runs here.

The SuperLink runs in Flower's "process" isolation: it starts no app. This process fetches the ServerApp's task from
it and runs the app that is installed here, so that the process that holds the posterior is the one the user started.
Run as a module, this file is the SuperLink itself, with one guard added: from another machine only the nodes'
interface can be reached, since Flower's interfaces for control and for apps ask nobody who they are.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import threading
import time
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from lpm.errors import InputError, LpmError, PeerLost
from lpm.node_keys import registered_keys
from lpm.processes import end_with_parent, parse_address, start, stop
from server.config import CoordinatorConfig

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["SuperLink"]

_START_SECONDS = 60.0
_POLL_SECONDS = 0.3
_PROJECT = """\
[project]
name = "lpm"
version = "0.1.0"
description = "Points at the installed package; carries no code."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "lpm"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "clients.app:app"
"""


class SuperLink:
    """A running SuperLink that knows the roster's node keys and has one run.

    Args:
        address: HOST:PORT to listen on.
        config: the session.

    Raises:
        InputError: if a node key is missing or the address can't be listened on.
    """

    def __init__(self, address: str, config: CoordinatorConfig) -> None:
        """Start the process, register the roster and submit the run."""
        host, port = parse_address("control-address", address)
        public = registered_keys(config.keys, config.parties)
        self._authority = (config.keys / "authority.pem").read_bytes()
        self._address = f"{'127.0.0.1' if host in {'0.0.0.0', '::'} else host}:{port}"
        folder = config.out / "control"
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "superlink.log"
        self._secret = secrets.token_bytes(32)
        secret = folder / "superexec.secret"
        secret.unlink(missing_ok=True)
        secret.touch(mode=0o600)
        secret.write_bytes(self._secret)
        flags = {
            "host": host,
            "port": str(port),
            "ssl-certfile": str(config.keys / "tls.pem"),
            "ssl-keyfile": str(config.keys / "tls.key"),
            "ssl-ca-certfile": str(config.keys / "authority.pem"),
            "isolation": "process",
            "superexec-auth-secret-file": str(secret),
        }
        command = [sys.executable, "-m", "server.superlink", "--enable-supernode-auth"]
        command += ["--disable-runtime-dependency-installation"]
        command += [part for name, value in flags.items() for part in (f"--{name}", value)]
        home = (folder / "flower").resolve()
        home.mkdir(exist_ok=True)
        os.environ["FLWR_HOME"] = str(home)  # nothing of Flower's in the user's home
        with self._log.open("ab") as log:
            self._child = start(command, output=log, environment={"FLWR_LOG_LEVEL": "INFO"})
        try:
            self._submit(public, address)
        except BaseException:
            self.close()
            raise
        finally:
            secret.unlink(missing_ok=True)

    @property
    def pid(self) -> int:
        """The SuperLink's process."""
        return self._child.pid

    def close(self) -> None:
        """End the process."""
        stop([self._child], grace=4.0)

    def run_app(self) -> dict[str, object]:
        """Run the ServerApp over this SuperLink, in the calling thread.

        Returns:
            The app's record "status".

        Raises:
            PeerLost: if the SuperLink has gone.
        """
        from flwr.common.constant import SubStatus
        from flwr.common.serde import context_from_proto, run_from_proto
        from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
        from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
        from flwr.supercore.task_identity import TaskIdentity
        from flwr.superlink.grid import HttpGrid

        from server.app import app

        grid = HttpGrid(self._address, root_certificates=self._authority, token=self._acquire())
        heart = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
        heart.start()
        try:
            task = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
            TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
            TaskIdentity.node_id = task.context.node_id
            grid.set_run(run_from_proto(task.run))
            context = context_from_proto(task.context)
            app(grid, context)
            status: dict[str, object] = {**context.state.config_records["status"]}
            if self._child.poll() is None:
                with contextlib.suppress(Exception):  # the session is over: what the SuperLink is told is a courtesy
                    grid._retry_invoker.max_tries = 1
                    done = SubStatus.COMPLETED if status["exit"] == 0 else SubStatus.FAILED
                    grid._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status=done, details=""))
            return status
        finally:
            heart.stop()
            grid.close()

    def _submit(self, public: dict[str, Path], address: str) -> None:
        import hashlib

        import httpx
        from cryptography.hazmat.primitives.serialization import load_ssh_public_key
        from flwr.cli.build import build_fab_from_files
        from flwr.common.serde import fab_to_proto
        from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.fab import Fab
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        nodes = []
        for party, path in public.items():
            try:
                key = public_key_to_bytes(load_ssh_public_key(path.read_bytes()))
            except ValueError:
                raise InputError(f"{path} is not a public node key.", f"Ask {party} for its node.pub.") from None
            nodes.append((party, key))
        bundle, _ = build_fab_from_files({"pyproject.toml": _PROJECT.encode()})
        fab = fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {}))
        client = ControlHttpClient.from_server_address(
            self._address, False, self._authority, [RuntimeVersionHttpInterceptor(component_name="Flower CLI")]
        )
        end, pause = time.monotonic() + _START_SECONDS, threading.Event()
        try:
            for party, key in nodes:
                while True:
                    try:
                        client.RegisterNode(RegisterNodeRequest(public_key=key, name=party))
                        break
                    except httpx.ConnectError:
                        if self._child.poll() is not None:
                            raise self._explain(address) from None
                        if time.monotonic() > end:
                            raise PeerLost("the SuperLink", "it does not answer") from None
                        pause.wait(_POLL_SECONDS)
            if not client.StartRun(StartRunRequest(fab=fab)).HasField("run_id"):
                raise LpmError("The SuperLink did not take the run.", f"{self._log} says why.")
        except httpx.HTTPStatusError as problem:
            raise LpmError(
                f"The SuperLink refused a request (HTTP {problem.response.status_code}).", f"{self._log} says why."
            ) from None
        finally:
            client.close()

    def _acquire(self) -> str:
        from flwr.proto.runtime_pb2 import AcquireTaskRequest
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
        from flwr.supercore.runtime import RuntimeHttpClient

        method = "/flwr.proto.Runtime/AcquireTask"
        client = RuntimeHttpClient.from_server_address(
            self._address,
            False,
            self._authority,
            [
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(master_secret=self._secret, protected_methods={method}),
            ],
        )
        pause = threading.Event()
        try:
            while True:
                found = client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
                if found.HasField("task") and found.token:
                    return str(found.token)
                if self._child.poll() is not None:
                    raise PeerLost("the SuperLink", f"its process ended ({self._log} says why)")
                pause.wait(_POLL_SECONDS)
        finally:
            client.close()

    def _explain(self, address: str) -> LpmError:
        said = self._log.read_text(errors="replace")[-4000:]
        if "address already in use" in said or "error while attempting to bind" in said:
            return InputError(
                f"`--control-address` is {address}: it can't be listened on.",
                "Another process may hold it; name a free port of this machine.",
            )
        return LpmError("The SuperLink ended at once.", f"{self._log} says why.")


class _OnlyNodesFromAfar:
    """Refuses what comes from another machine and is not for the nodes' interface."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        near = scope["type"] == "lifespan" or _is_near(scope.get("client"), scope.get("server"))
        if near or str(scope.get("path", "")).startswith("/v1/fleet/"):
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


def _is_near(client: tuple[str, int] | None, server: tuple[str, int] | None) -> bool:
    if client is None or server is None:
        return False
    try:
        return ip_address(client[0]).is_loopback or client[0] == server[0]
    except ValueError:
        return False


def _serve() -> None:
    end_with_parent(grace=3.0)
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink
    from starlette.middleware import Middleware

    extensions.get_middleware = lambda: (Middleware(_OnlyNodesFromAfar),)
    flower_superlink()


if __name__ == "__main__":
    _serve()
