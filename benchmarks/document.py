"""A result file while it grows: replaced in one step after every part, so that a cut loses nothing.

docs/result-schema.md describes the files of every kind.
"""

import json
import os
import re
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# Raised when a reader of the files before would misread the new ones.
SCHEMA_VERSION = 1

RUNNING, COMPLETE, CUT = "running", "complete", "interrupted"


class Document:
    """A JSON document of one run.

    Args:
        path: the file.
        kind: which command made it, such as "bench".
        options: of the command, JSON-ready.
        environment: of environment.describe().
        more: what else the kind has, with its values at the start.
    """

    def __init__(
        self, path: Path, kind: str, options: dict, environment: dict, **more: Any
    ) -> None:
        self.path = path
        self._started = time.perf_counter()
        self.data: dict = {
            "schema_version": SCHEMA_VERSION,
            "kind": kind,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "state": RUNNING,
            "seconds": 0.0,
            "options": options,
            "environment": environment,
            **more,
        }

    def finish(self, state: str) -> None:
        """Saves it for the last time; ``state`` is COMPLETE or CUT."""
        self.data["state"] = state
        self.save()

    def save(self) -> None:
        """Writes the document as it is."""
        self.data["seconds"] = round(time.perf_counter() - self._started, 1)
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text(_at_home(json.dumps(self.data, indent=1)) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def _at_home(text: str) -> str:
    """With "~" for the home folder, which names a user: files are committed and passed on."""
    home = json.dumps(os.path.expanduser("~"))[1:-1]
    return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text) if len(home) > 1 else text


def read(path: Path, kind: "str | None" = None) -> dict:
    """A document from its file.

    Raises:
        ValueError: it is no result file, one of another version, or not of this kind.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a result file: {error}") from None
    if not isinstance(data, dict) or "schema_version" not in data:
        raise ValueError(f"{path} is not a result file: it has no schema_version")
    if data["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {data['schema_version']}; this version reads "
            f"{SCHEMA_VERSION}"
        )
    if kind and data.get("kind") != kind:
        raise ValueError(f"{path} holds a {data.get('kind')!r} result; wanted is {kind!r}")
    return data
