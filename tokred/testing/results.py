# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Results of benchmarks as JSON files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from tokred.testing.bench import Row
from tokred.testing.machine import Ceilings

SCHEMA = 2  # of the file; a reader takes its own only


class WrongFile(Exception):
    """A file that is no result of this version's benchmark; the message says why in one line."""


@dataclasses.dataclass
class Results:
    """One run.

    Args:
        facts: Machine, versions, commit.
        ceilings: Measured in the run, one for each thread count.
        rows: What was measured.
        peers: Versions of the plug-ins that ran.
        skipped: Plug-ins that did not, with the reason.
        name: Of the file.
    """

    facts: dict[str, Any]
    ceilings: list[Ceilings]
    rows: list[Row]
    peers: dict[str, str] = dataclasses.field(default_factory=dict)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    name: str = ""


def save(results: Results, path: Path) -> None:
    """Write a run as JSON."""
    content = dataclasses.asdict(results)
    del content["name"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": SCHEMA, **content}, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file, or raise WrongFile."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise WrongFile(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise WrongFile(f"{path}: expected JSON, got {error}") from None
    if not isinstance(content, dict):
        raise WrongFile(f"{path}: expected an object with results, got {type(content).__name__}")
    return content


def load(path: Path) -> Results:
    """Read a run, or raise WrongFile."""
    content = read_json(path)
    schema = content.get("schema")
    if schema != SCHEMA:
        raise WrongFile(f"{path}: expected results of schema {SCHEMA}, got {schema}; measure again with tokred bench")
    try:
        return Results(
            facts=content["facts"],
            ceilings=[Ceilings(**c) for c in content["ceilings"]],
            rows=[Row(**row) for row in content["rows"]],
            peers=content["peers"],
            skipped=content["skipped"],
            name=path.name,
        )
    except (KeyError, TypeError) as error:
        raise WrongFile(f"{path}: says schema {SCHEMA}, but does not hold it: {error}") from None
