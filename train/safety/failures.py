"""What a rank that fails leaves behind, in torchrun's error files, and how the cause is found among its consequences.

torchrun gives each rank of each attempt a file, LOG/attempt_N/LOCAL_RANK/error.json. An error goes there with the time
to the nanosecond; the earliest is the cause, and the only one that is shown: by weft's launcher at the end
(`launch/local.py`), by the first rank of the next attempt after a restart.
"""

import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

from parallel.errors import UserError


def _file() -> Path | None:
    """This rank's error file, if torchrun has given it one."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(file) if file else None


def record(error: BaseException) -> bool:
    """Write `error` into this rank's error file; False if there is none."""
    file = _file()
    if not file:
        return False
    now = time.time_ns()
    mistake = isinstance(error, UserError)
    details = {
        "py_callstack": "".join(traceback.format_exception(error)),
        "timestamp": str(now // 10**9),
        "nanoseconds": now,
        "rank": int(os.environ.get("RANK", "0")),
        "user_error": str(error) if mistake else "",
        "culprit": getattr(error, "culprit", None),  # the rank that it names
    }
    file.write_text(json.dumps({"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": details}}))
    if mistake:
        (file.parents[2] / "mistake").touch()  # beside all attempts
    return True


def hopeless() -> bool:
    """Whether an earlier attempt ended with a mistake that only the user can mend."""
    file = _file()
    return file is not None and (file.parents[2] / "mistake").exists()


def speaks(what: str = "told") -> bool:
    """Whether this rank, of all that torchrun started here, is the one that tells the user `what` each has found."""
    file = _file()
    if not file:
        return os.environ.get("RANK", "0") == "0"
    try:
        (file.parents[1] / what).touch(exist_ok=False)  # beside the folders of these ranks
        return True
    except FileExistsError:
        return False


def first_failure(logs: Path) -> dict[str, Any] | None:
    """The earliest error that a rank wrote down below `logs`, or None; the others are mostly its consequences."""
    errors = [json.loads(file.read_text())["message"]["extraInfo"] for file in logs.rglob("error.json")]
    return min(errors, key=lambda error: error["nanoseconds"], default=None)


def before_restart() -> str:
    """Why torchrun has started these ranks again, once per attempt; empty if it has not, or another rank tells."""
    file, attempt = _file(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not file or not attempt or not speaks("restarted"):
        return ""
    earlier = file.parents[2] / f"attempt_{attempt - 1}"
    cause = first_failure(earlier) if earlier.is_dir() else None
    of = f"restart {attempt} of {os.environ.get('TORCHELASTIC_MAX_RESTARTS', '?')}, from the newest checkpoint"
    if cause is None:
        return f"{of}: a rank died without a word"
    return f"{of}: rank {cause['rank']} had failed:\n\n{cause['py_callstack']}"
