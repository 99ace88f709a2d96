"""The names of what lies in a run's folder, and the state that it says it is in."""

import json
from pathlib import Path
from typing import Any

STATUS = "run_status.json"
CONFIG = "config.yaml"
METRICS = "metrics.json"
HISTORY = "history.json"
PAGE = "report.html"
PICTURE = "curves.png"
SAMPLES = "samples.txt"
CARD = "README.md"
PREFLIGHT = "preflight.json"
# Where a run lies that another one is about to replace.
ASIDE = "_overwritten"


def read_seen(folder: Path) -> dict[str, Any]:
    """Return what was seen before the first update, by the name of the check; {} where none was."""
    try:
        found = json.loads((folder / PREFLIGHT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return the run's status, or None where no run of ours has been."""
    try:
        return {"state": "unknown", **json.loads((folder / STATUS).read_text())}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # empty after a loss of power, say
        return {"state": "unknown"}
