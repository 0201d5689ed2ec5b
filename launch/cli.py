"""`weft VERB [flags] [overrides]`: the command line.

A verb that takes a recipe is a Hydra application, so `--cfg job`, `--multirun`, `--info` and group overrides mean what
Hydra's users expect. A verb's own flags are taken off before Hydra sees the line. A `UserError`, wherever it comes
from, is printed once and ends the command with exit code 2.
"""

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel.errors import UserError

HYDRA_COMMANDS = ["--cfg", "-c", "--run", "-r", "--multirun", "-m", "--info", "-i"]
# No flags for the configuration's file, which recipe=PATH.yaml names, and none that reads a pickle.
HYDRA_FLAGS = [*HYDRA_COMMANDS, "--resolve", "--package", "-p", "--help", "-h", "--hydra-help"]
Job = Callable[[Any, argparse.Namespace], int]  # (recipe, the verb's own flags) -> exit code


@dataclass(frozen=True)
class Verb:
    """One verb: what it does, an example, its own flags (with the names of their values), whether it takes a recipe."""

    does: str
    example: str
    job: Job
    flags: dict[str, str] = field(default_factory=dict)
    recipe: bool = True
    words: str = ""  # what a verb without a recipe takes
    keys: dict[str, tuple[str | None, str]] = field(default_factory=dict)  # its own beside the recipe's: default, doc


def train(recipe: Any, flags: argparse.Namespace) -> int:
    from launch import local

    return local.train(recipe.validate())


def schedule(recipe: Any, flags: argparse.Namespace) -> int:
    """Only the program's keys count: the model need not have that many stages. A run to compare brings its own."""
    if flags.compare:
        return compare(Path(flags.compare), flags)
    from launch import draw
    from parallel.schedule import build

    parallel, microbatches = recipe.parallel, recipe.parallel.microbatches
    if microbatches is None:
        microbatches = recipe.microbatches(recipe.train.batch.start)
    program = build(parallel.schedule, parallel.pipeline, microbatches, parallel.chunks)
    if flags.json:
        write(flags.json, program.to_json())
    if flags.svg:
        write(flags.svg, draw.svg(program, parallel.schedule))
    if not (flags.json or flags.svg):
        print(draw.text(program, parallel.schedule))
    return 0


def compare(run: Path, flags: argparse.Namespace) -> int:
    """A recorded step of `run` under its program."""
    from launch import compare
    from parallel import timeline

    measured = timeline.read(run)
    if flags.json:
        write(flags.json, measured.program.to_json())
    if flags.svg:
        write(flags.svg, compare.svg(measured, str(run)))
    if "-" not in (flags.json, flags.svg):
        print(compare.text(measured, str(run)))
    return 0


def simulate(recipe: Any, flags: argparse.Namespace) -> int:
    """One step of the recipe on the cluster that a sheet describes."""
    from launch.simulate import result
    from launch.simulate.cluster import sheet
    from launch.simulate.step import skew

    recipe.validate(data=False)
    noise = skew.Noise.read(flags.skew, flags.jitter, flags.seed)
    if flags.rank is not None:
        return as_rank(recipe, sheet.read(flags.cluster), flags)
    found = result.simulate(recipe, sheet.read(flags.cluster), noise=noise)
    if flags.json:
        write(flags.json, found.to_json())
    if flags.html:
        from launch.simulate.output import page

        write(flags.html, page.html(found))
    if flags.trace:
        from launch.simulate.output import trace

        trace.write(found, Path(flags.trace))
    if "-" not in (flags.json, flags.html):
        print(result.text(found))
    return 0


def as_rank(recipe: Any, cluster: Any, flags: argparse.Namespace) -> int:
    """The trainer's step as single ranks of the cluster; 1 if these would not agree."""
    from launch.simulate.ranks import rank, report

    if flags.html or flags.trace:
        raise UserError(f"rank={flags.rank}: expected neither --html nor --trace with it, only --json")
    steps = rank.look(recipe, cluster, rank.chosen(flags.rank, recipe))
    found = report.as_json(steps)
    if flags.json:
        write(flags.json, json.dumps(found, indent=1))
    if flags.json != "-":
        print(report.text(steps, recipe, cluster))
    return 1 if found["disagreements"] else 0


def plan(recipe: Any, flags: argparse.Namespace) -> int:
    """The layouts that the cluster could run the recipe in, and the best of them as a recipe."""
    from launch.simulate.cluster import sheet
    from launch.simulate.planner import layouts, plan
    from train.compose import save

    recipe.validate(data=False)
    cluster = sheet.read(flags.cluster)
    precisions, gpus = layouts.choices(recipe, cluster, flags.any_precision), None
    if flags.gpus is not None:
        if not (flags.gpus.isdecimal() and 0 < int(flags.gpus) <= cluster.gpus):
            raise UserError(f"gpus={flags.gpus}: expected a number from 1 to the cluster's {cluster.gpus}")
        gpus = int(flags.gpus)
    found = plan.plan(recipe, cluster, precisions, gpus, quiet=False)
    if flags.json:
        write(flags.json, found.to_json())
    if flags.json != "-":
        print(plan.text(found))
    if found.winner is None:
        return 1
    if flags.recipe:
        try:
            save(found.winner.recipe, Path(flags.recipe))
        except OSError as error:
            raise UserError(f"{flags.recipe}: expected a file to write; {error.strerror}") from None
    return 0


def prepare(recipe: Any, flags: argparse.Namespace) -> int:
    from train.data.preparation import prepare

    recipe.data.check()
    prepared = prepare(
        recipe.data,
        vocab_size=recipe.model.vocab_size,
        sequence_length=recipe.train.sequence_length,
        seed=recipe.train.seed,
    )
    print(f"{prepared.directory}: {len(prepared.train)} rows to train on, {len(prepared.heldout)} held out")
    return 0


def load(recipe: None, flags: argparse.Namespace) -> int:
    from launch import load

    run = Path(flags.words[0])
    history = load.read(run)
    if flags.svg:
        write(flags.svg, load.svg(history, str(run)))
        return 0
    print(load.text(history, str(run)))
    print(f"\n{load.write(run)}")
    return 0


def export(recipe: None, flags: argparse.Namespace) -> int:
    """The newest whole checkpoint, unless --step names one."""
    from train.checkpoint.export import export

    run, out = map(Path, flags.words)
    if flags.step is not None and not flags.step.isdecimal():
        raise UserError(f"--step {flags.step}: expected the number of a step")
    step = export(run, out, average=flags.ema, step=int(flags.step) if flags.step else None)
    print(f"{out}: the model{', averaged,' if flags.ema else ''} of step {step}, BF16, for inference only")
    return 0


def verify(recipe: None, flags: argparse.Namespace) -> int:
    """1 if a checkpoint is damaged."""
    from launch import verify

    verdicts = verify.verify(Path(flags.words[0]))
    print(verify.text(verdicts))
    return 1 if any(each.problems for each in verdicts) else 0


def calibrate(recipe: None, flags: argparse.Namespace) -> int:
    from launch.calibrate.document import calibrate

    return calibrate(flags.out, flags.quick)


def doctor(recipe: None, flags: argparse.Namespace) -> int:
    if flags.fp8:
        from launch import fp8

        return fp8.main()
    from launch import doctor

    return doctor.main()


CLUSTER = "h800x2048", "a sheet of recipes/cluster, the path of another, or local, which weft calibrate makes"
VERBS = {
    "train": Verb("train a recipe with all its ranks on this machine", "weft train recipe=tiny train.steps=20", train),
    "schedule": Verb(
        "draw the pipeline program of a recipe",
        "weft schedule parallel.pipeline=8 parallel.microbatches=20",
        schedule,
        {
            "--json FILE": "write the program as JSON",
            "--svg FILE": "write the program as a picture",
            "--compare RUN": "draw a step that RUN recorded with trace=on under its program",
        },
    ),
    "simulate": Verb(
        "price one step of a recipe on a cluster, without the cluster",
        "weft simulate recipe=v3 cluster=h800x2048",
        simulate,
        {
            "--json FILE": "write the figures as JSON",
            "--html FILE": "write them and the timeline as a page that needs no network",
            "--trace DIR": "write the timeline of each pipeline rank as trace=on does, for Perfetto and --compare DIR",
        },
        keys={
            "cluster": CLUSTER,
            "rank": (None, "run the trainer's own step as these of the cluster's ranks: 5, 0-15, all"),
            "skew": ("0", "rows that the fullest rank of an expert group gets beyond the mean, as a part of it: 0.3"),
            "jitter": ("0", "how unlike the times of GPUs are that do the same: 0.02 for 2 %"),
            "seed": ("0", "what skew and jitter are drawn from"),
        },
    ),
    "plan": Verb(
        "find the layout in which a recipe costs least on a cluster",
        "weft plan recipe=v3 cluster=h800x2048",
        plan,
        {
            "--recipe FILE": "write the best plan as a recipe (.yaml), for recipe=FILE",
            "--json FILE": "write all plans, with the reasons of the rejected ones, as JSON",
            "--any-precision": "choose the precision too, not only the layout",
        },
        keys={"cluster": CLUSTER, "gpus": (None, "how many of the cluster's GPUs to use; all, unless told")},
    ),
    "calibrate": Verb(
        "measure this machine, for weft simulate cluster=local",
        "weft calibrate",
        calibrate,
        {"--out FILE": "write the cluster sheet (.yaml) there, for cluster=FILE", "--quick": "measure less"},
        recipe=False,
    ),
    "data prepare": Verb(
        "turn text into memory-mapped token rows", "weft data prepare data=hf data.path=FILE", prepare
    ),
    "load": Verb(
        "say how evenly a run has loaded its experts, and draw it",
        "weft load runs/tiny",
        load,
        {"--svg FILE": "write the picture there, not into the run's folder"},
        recipe=False,
        words="RUN",
    ),
    "export": Verb(
        "write the model of a run's checkpoint for inference, as Hugging Face's safetensors in BF16",
        "weft export runs/tiny tiny-model",
        export,
        {
            "--ema": "the average of the parameters instead of themselves (optim.ema_decay)",
            "--step STEP": "of this step instead of the newest",
        },
        recipe=False,
        words="RUN OUT",
    ),
    "verify": Verb(
        "read every checkpoint of a run and say whether it is whole",
        "weft verify runs/tiny",
        verify,
        recipe=False,
        words="RUN",
    ),
    "doctor": Verb(
        "say what this machine has and lacks",
        "weft doctor",
        doctor,
        {"--fp8": "run every FP8 backend that works here against the reference"},
        recipe=False,
    ),
}


def main(words: list[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    try:
        return run(sys.argv[1:] if words is None else words)
    except UserError as error:
        return complain(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `weft schedule | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def complain(error: UserError) -> int:
    """Print what the user can mend; returns the exit code."""
    print(f"weft: {error}", file=sys.stderr)
    return 2


def run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"weft {importlib.metadata.version('weft')}")
        return 0
    name = next((name for name in VERBS if words[: len(name.split())] == name.split()), None)
    if name is None:
        hint = suggestion(" ".join(words[:2]), VERBS) or suggestion(words[0], VERBS)
        raise UserError(f"{words[0]}: expected a verb, one of {', '.join(VERBS)}{hint}")
    verb, rest = VERBS[name], words[len(name.split()) :]
    flags, rest = own_flags(verb, rest)
    if verb.recipe:
        return with_recipe(name, verb, flags, rest)
    if {"--help", "-h"} & set(rest):
        print(verb_usage(name, verb))
        return 0
    if len(rest) != len(verb.words.split()):
        expected = f"weft {name} {verb.words}" if verb.words else f"no words after {name}"
        raise UserError(f"{' '.join([name, *rest])}: expected {expected}")
    flags.words = rest
    return verb.job(None, flags)


def own_flags(verb: Verb, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The verb's flags, and the words that are left for Hydra."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag, *value in map(str.split, verb.flags):
        if value:
            parser.add_argument(flag, metavar=value[0])
        else:
            parser.add_argument(flag, action="store_true")
    own = {word.partition("=")[0]: word.partition("=")[2] for word in words if word.partition("=")[0] in verb.keys}
    try:
        flags, rest = parser.parse_known_args([word for word in words if word.partition("=")[0] not in own])
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    for key, (default, _) in verb.keys.items():
        setattr(flags, key, own.get(key, default))
    return flags, rest


def with_recipe(name: str, verb: Verb, flags: argparse.Namespace, words: list[str]) -> int:
    """Run the verb as a Hydra application on `words`; several times with --multirun. Returns the worst exit code."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from train.compose import CommandLine, explain, recipe_of

    overrides, hydra_flags = split(words, verb)
    line = CommandLine.read(overrides, sweep=bool({"--multirun", "-m"} & set(hydra_flags)))
    line.compose()  # so that a recipe is known to be good before Hydra acts on any of it
    codes = [0]

    def job(config: Any) -> None:
        running = HydraConfig.get()
        try:
            recipe = recipe_of(config, line.name)
            if running.mode == RunMode.MULTIRUN and OmegaConf.select(config, "run.name") is None:
                recipe.run.name = f"{line.name}-{running.job.num}"  # a run directory for each
            codes.append(verb.job(recipe, flags))
        except UserError as error:  # here, because Hydra would add words of its own
            codes.append(complain(error))

    help_header = []
    if {"--help", "-h"} & set(hydra_flags):
        print(verb_usage(name, verb))
        help_header = ["hydra.help.header=''"]
    words_before, full_error_before = sys.argv, os.environ.get("HYDRA_FULL_ERROR", "0")
    sys.argv = [f"weft {name}", *hydra_flags, *help_header, *line.hydra_overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through, for `main` to print
    try:
        hydra.main(version_base="1.3", config_path=line.folder or "pkg://recipes", config_name=line.name)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        explain(error, line.name)
    finally:
        sys.argv, os.environ["HYDRA_FULL_ERROR"] = words_before, full_error_before
    return max(codes)


def split(words: list[str], verb: Verb) -> tuple[list[str], list[str]]:
    """(overrides, Hydra's flags, each followed by its value). Raises `UserError` for a flag that means nothing here."""
    overrides: list[str] = []
    flags: list[str] = []
    for word, before in zip(words, ["", *words], strict=False):
        if word.startswith("-"):
            flag = word.split("=")[0]
            if flag not in HYDRA_FLAGS:
                raise UserError(
                    f"{flag}: no such flag{suggestion(flag, [*(own.split()[0] for own in verb.flags), *HYDRA_FLAGS])}"
                )
            flags.append(word)
        elif before.startswith("-") and "=" not in word:
            flags.append(word)
        else:
            overrides.append(word)
    commands = [word for word in flags if word.split("=")[0] in HYDRA_COMMANDS]
    if len(commands) > 1:
        raise UserError(f"{' '.join(commands)}: expected one of them at a time")
    return overrides, flags


def suggestion(word: str, choices: Iterable[str]) -> str:
    """The nearest choice as a question; loads the schema only when something is wrong."""
    from train.recipe import did_you_mean

    return did_you_mean(word, choices)


def write(file: str, text: str) -> None:
    """Write `text` to `file`, or to standard output if it is `-`. Raises `UserError`."""
    if file == "-":
        print(text.rstrip())
        return
    try:
        Path(file).write_text(text.rstrip() + "\n")
    except OSError as error:
        raise UserError(f"{file}: expected a file to write; {error.strerror}") from None


def verb_usage(name: str, verb: Verb) -> str:
    """What `weft VERB --help` prints, before Hydra's groups and keys if the verb takes a recipe."""
    line = " ".join(["weft", name, *verb.words.split(), *(["[key=value ...]"] if verb.recipe else [])])
    rows = [*verb.flags.items()]
    rows += [(f"{key}={default or '...'}", does) for key, (default, does) in verb.keys.items()]
    width = max((len(left) for left, _ in rows), default=0)
    return "\n".join(
        [
            f"{line}: {verb.does}",
            *(["", *(f"  {left:<{width}}  {does}" for left, does in rows)] if rows else []),
            "",
            f"For example: {verb.example}",
        ]
    )


def usage() -> str:
    """What `weft --help` prints."""
    rows = [f"  {f'weft {name}':<20}{verb.does}\n{'':<22}{verb.example}" for name, verb in VERBS.items()]
    flags = [
        f"  {f'weft {name} {flag}':<34}{does}" for name, verb in VERBS.items() for flag, does in verb.flags.items()
    ]
    return "\n".join(
        [
            "weft VERB [flags] [recipe=NAME|PATH.yaml] [key=value ...]",
            "",
            *rows,
            "",
            *flags,
            "",
            f"{', '.join(name for name, verb in VERBS.items() if verb.recipe)} take a recipe (tiny unless named) and"
            " Hydra's flags:",
            "--cfg job shows the composed recipe, --multirun sweeps over values (train.seed=1,2).",
            "weft VERB --help tells more of a verb, and lists a recipe's keys.",
        ]
    )
