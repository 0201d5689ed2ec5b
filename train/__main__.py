"""One rank of a run: `python -m train --config FILE` under weft's launcher, `recipe=NAME key=value` under torchrun.

Under a launcher, an error goes into the file that the launcher named (`train/safety/failures.py`), and signals that
come before training end the rank (`train/safety/preemption.py`).
"""

import os
import signal
import sys
from pathlib import Path

from parallel.errors import UserError
from train.compose import compose, load, write
from train.recipe import Recipe
from train.safety import failures, preemption


def read(words: list[str]) -> Recipe:
    """The recipe of a command line, refused unless this world has as many processes as it needs."""
    launched = words[:1] == ["--config"]
    recipe = load(Path(words[1])) if launched else compose(words)
    recipe.parallel.check_world(int(os.environ.get("WORLD_SIZE", "1")))
    if not launched and os.environ.get("RANK", "0") == "0":
        write(recipe)
    return recipe


def main(words: list[str]) -> int:
    """Train as this process's rank; returns the exit code."""
    launched = words[:1] == ["--config"]  # weft's launcher speaks for all ranks
    preemption.follow_parent()
    if preemption.asked_before_start():
        return 128 + signal.SIGTERM
    if failures.hopeless():
        return 2
    if why := failures.before_restart():
        print(f"weft: {why}", file=sys.stderr, flush=True)
    try:
        recipe = read(words)
        from train import trainer

        finished = trainer.main(recipe)
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        recorded = failures.record(error)
        if not (recorded and launched) and failures.speaks():
            print(f"weft: {error}", file=sys.stderr, flush=True)
        return 2
    except Exception as error:
        if not failures.record(error):
            raise
        return 1
    # An agent would take any other code for a failure, and start the ranks again.
    return 0 if finished or preemption.under_agent() else preemption.EXIT_CODE


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code:  # at once: other threads may still wait for a peer that is gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
