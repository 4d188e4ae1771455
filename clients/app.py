"""An institution's Flower ClientApp: joins, starts a party, nothing else.

What the party is, where its data lies and which keys it uses stand in the institution's own configuration; the message
names the session only. What goes wrong is told to the coordinator by the name of its type, never by its text.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.config import CONFIG_VARIABLE, ClientConfig
from lpm.errors import Interrupted, LpmError

__all__ = ["answer", "app"]

_log = logging.getLogger(__name__)

app = ClientApp()


@app.query("start")
def start(message: Message, context: Context) -> Message:
    """Take part in one session, from joining to its end.

    Args:
        message: its record "order" has session, data_address and task ("start").
        context: not used; a party keeps its state in its own folder.

    Returns:
        The record "status": party, exit, and error (a type's name, "" if all went well).
    """
    return answer(ClientConfig.read(Path(os.environ[CONFIG_VARIABLE])), message)


def answer(config: ClientConfig, message: Message) -> Message:
    """Take part in the session that a message names, as the party of a configuration.

    Args:
        config: the institution's own.
        message: as `start` takes it.

    Returns:
        As `start` does.
    """
    status: dict[str, int | str] = {"party": config.party, "exit": 0, "error": ""}
    try:
        order = message.content.config_records["order"]
        config = dataclasses.replace(
            config,
            session=str(order["session"]),
            coordinator=config.coordinator or str(order["data_address"]),
        )
        from clients.party import serve  # brings torch and the simulator

        serve(config)
    except KeyboardInterrupt:
        _log.warning("Stopped. The run is kept; the coordinator can resume it.")
        status |= {"exit": Interrupted.exit_code, "error": Interrupted.__name__}
    except LpmError as problem:
        _log.error("%s", problem)
        status |= {"exit": problem.exit_code, "error": type(problem).__name__}
    except Exception as problem:  # its text may hold private values: it stays in the institution's own log
        logging.getLogger().error("the session failed", exc_info=True)
        _log.error("Failed (%s); %s says where.", type(problem).__name__, config.folder / "party.log")
        status |= {"exit": 1, "error": type(problem).__name__}
    return Message(RecordDict({"status": ConfigRecord({**status})}), reply_to=message)
