"""One rank of a run: `python -m train --config FILE` under weft's launcher, `recipe=NAME key=value` under torchrun.

Under a launcher, an error goes into the file that the launcher named, with the time to the nanosecond, so that it can
tell the cause from its consequences and print it once.
"""

import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

from parallel.errors import UserError
from train.compose import compose, load, write
from train.recipe import Recipe


def read(words: list[str]) -> Recipe:
    """The recipe of a command line, refused unless this world has as many processes as it needs."""
    launched = words[:1] == ["--config"]
    recipe = load(Path(words[1])) if launched else compose(words)
    recipe.parallel.check_world(int(os.environ.get("WORLD_SIZE", "1")))
    if not launched and os.environ.get("RANK", "0") == "0":
        write(recipe)
    return recipe


def record(error: BaseException) -> bool:
    """Write `error` into the launcher's error file, in torchrun's format; False if there is none."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return False
    now = time.time_ns()
    details = {
        "py_callstack": "".join(traceback.format_exception(error)),
        "timestamp": str(now // 10**9),
        "nanoseconds": now,
        "rank": int(os.environ.get("RANK", "0")),
        "user_error": str(error) if isinstance(error, UserError) else "",
    }
    Path(file).write_text(
        json.dumps({"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": details}})
    )
    return True


def speaks() -> bool:
    """Whether this rank, of all that torchrun started here, is the one that tells the user what each has found."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return os.environ.get("RANK", "0") == "0"
    try:
        (Path(file).parent.parent / "told").touch(exist_ok=False)  # beside the folders of these ranks
        return True
    except FileExistsError:
        return False


def main(words: list[str]) -> int:
    """Train as this process's rank; returns the exit code."""
    # torch 2.13 has new names for two collectives, which torch 2.11 lacks.
    warnings.filterwarnings("ignore", message=".*(reduce_scatter|all_gather)_single", category=FutureWarning)
    launched = words[:1] == ["--config"]  # weft's launcher speaks for all ranks
    try:
        recipe = read(words)
        from train import trainer

        trainer.main(recipe)
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        recorded = record(error)
        if not (recorded and launched) and speaks():
            print(f"weft: {error}", file=sys.stderr, flush=True)
        return 2
    except Exception as error:
        if not record(error):
            raise
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code:  # at once: other threads may still wait for a peer that is gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
