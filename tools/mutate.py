"""Put small faults into the package, one at a time, and see that the tests notice each.

``tools/mutations.yml`` lists the faults: a snippet that stands once in a file, what takes its place, and the tests that
must fail then. A fault that no test can notice says why under ``equivalent`` and is not run. The checkout is never
changed: the tests run in a copy, first without a fault, then with each, for at most five times as long.

    python tools/mutate.py --check                      # does each entry still fit the code? In a second
    python tools/mutate.py --sample 5 --seed 3
    python tools/mutate.py --only evit-rounds-down gtp-ascending
    python tools/mutate.py --all --jobs 2 --shard 1/2   # every second fault

Exits with 1 where a fault survives, an entry does not fit, or tests fail without a fault.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from multiprocessing import connection, get_context
from multiprocessing.context import ForkProcess
from pathlib import Path

import yaml

__all__ = ["Mutation", "faults_of_list", "main", "read_mutations", "run_mutations"]

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tools" / "mutations.yml"
COPIED = ("effvit", "tests", "tools")  # tests look for the rest of the project beside themselves
PATIENCE = 5  # times what the tests take without a fault
LEAST_SECONDS = 30.0  # given to any run, on a machine that does other things too
CLEAN_SECONDS = 900.0  # given to tests without a fault
# Imported once, before the processes of the tests are forked; those behind the first row where the tests name them.
PRELOADED = ("pytest", "hypothesis", "xdist", "torch._dynamo", "timm", "fvcore.nn")
PRELOADED_IF_NAMED = ("mmengine.runner", "mmdet.apis", "mmseg.apis", "mmpretrain.models")
FORK = get_context("fork")


@dataclass(frozen=True)
class Mutation:
    """A fault that somebody might make.

    Attributes:
        id: Its name.
        file: The file, from the root of the project.
        old: A snippet that stands in it once.
        new: What takes its place.
        tests: A file of tests, from the folder of tests, and perhaps ``-k`` with an expression.
        why: What it would spoil, in a few words.
        equivalent: Why no test can notice it; then there are no tests.
    """

    id: str
    file: str
    old: str
    new: str
    tests: str = ""
    why: str = ""
    equivalent: str = ""


def read_mutations(path: Path = LIST) -> list[Mutation]:
    """The faults of a list.

    Raises:
        ValueError: An entry with a field that is missing or unknown, or no text.
    """
    known = {field.name for field in fields(Mutation)}
    mutations = []
    for entry in yaml.safe_load(path.read_text()):
        odd = sorted(name for name, value in entry.items() if name not in known or not isinstance(value, str))
        missing = sorted({"id", "file", "old", "new"} - entry.keys())
        if odd or missing:
            raise ValueError(f"{path.name}: {entry.get('id')} lacks {missing} or has odd fields {odd}; quote all texts")
        mutations.append(Mutation(**entry))
    return mutations


def faults_of_list(mutations: Sequence[Mutation], root: Path = ROOT) -> list[str]:
    """What is wrong with entries of the list, a sentence each, such as a snippet that stands nowhere in its file."""
    times = Counter(mutation.id for mutation in mutations)
    faults = [f"{name}: {number} entries have this id" for name, number in times.items() if number > 1]
    for mutation in mutations:
        found = (_fault_of_code(mutation, root), _fault_of_tests(mutation, root))
        faults += [f"{mutation.id}: {fault}" for fault in found if fault is not None]
    return faults


def _fault_of_code(mutation: Mutation, root: Path) -> str | None:
    path = root / mutation.file
    if not path.is_file():
        return f"there is no file {mutation.file}"
    text = path.read_text()
    if (number := text.count(mutation.old)) != 1:
        return f"its snippet stands {number} times in {mutation.file}: {mutation.old!r}"
    if mutation.old == mutation.new:
        return "it changes nothing"
    try:
        compile(text.replace(mutation.old, mutation.new), mutation.file, "exec")
    except SyntaxError as error:
        return f"what it makes of {mutation.file} is no Python: {error}"
    return None


def _fault_of_tests(mutation: Mutation, root: Path) -> str | None:
    if bool(mutation.tests) == bool(mutation.equivalent):
        return "it needs tests, or the reason why it is equivalent, and not both"
    if mutation.equivalent:
        return None
    if not mutation.why:
        return "it does not say why it matters"
    name, *options = shlex.split(mutation.tests)
    path = root / "tests" / name
    if not path.is_file():
        return f"there is no file tests/{name}"
    if options and (len(options) != 2 or options[0] != "-k"):
        return f"tests may be a file and -k with an expression, got {mutation.tests!r}"
    words = set(re.findall(r"\w+", options[1]) if options else []) - {"and", "or", "not"}
    unknown = sorted(word for word in words if not any(word in text for text in _test_texts(root)))
    return f"no test has {', '.join(unknown)} in its name or parameters" if unknown else None


@cache
def _test_texts(root: Path) -> list[str]:
    """What names of tests and of their parameters are taken from."""
    return [path.read_text() for path in (*root.glob("tests/*.py"), *root.glob("effvit/testing/*.py"))]


# -- runs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Tests to run, without a fault if ``mutation`` is None."""

    tests: str
    mutation: Mutation | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run: Which.
        code: Exit status of pytest; negative for a signal.
        seconds: What it took.
        tail: The last lines it wrote.
    """

    run: Run
    code: int | None
    seconds: float
    tail: str


@dataclass
class _Running:
    run: Run
    folder: Path
    original: str  # text of the file that holds the fault
    process: ForkProcess
    start: float
    deadline: float


def copy_project(root: Path, folder: Path) -> None:
    """Copy what is mutated and what looks for its neighbours; link the rest."""
    folder.mkdir()
    for entry in root.iterdir():
        if entry.name in COPIED:
            shutil.copytree(entry, folder / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)


def _compiled(folder: Path) -> Path:
    """Where Python keeps the compiled modules of a copy and of all that the tests import."""
    return folder.parent / f"{folder.name}-compiled"


def _write(folder: Path, name: str, text: str) -> None:
    """Write a file of a copy, whose compiled form must not be taken for that of another text of the same second."""
    path = folder / name
    path.write_text(text)
    for compiled in _compiled(folder).joinpath(*path.parent.parts[1:]).glob(f"{path.stem}.*"):
        compiled.unlink()


def _test(folder: Path, tests: str) -> None:
    """Run tests in the copy, in a process of their own that ends here."""
    os.setsid()  # so that what the tests start ends with them
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(_compiled(folder))
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    gc.freeze()  # or the end of every session looks through all that is preloaded
    with (folder / "log.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    name, *options = shlex.split(tests)
    quiet = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:anyio"]
    quiet += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that were imported with the rest
    code = importlib.import_module("pytest").main([*quiet, f"tests/{name}", *options])
    sys.stdout.flush()
    os._exit(int(code))


def outcomes(waiting: deque[Run], folders: Sequence[Path], seconds: Mapping[str, float]) -> Iterator[Outcome]:
    """Make the runs, one at a time in each copy.

    Args:
        waiting: Which; the caller may add to them as outcomes come.
        folders: Copies of the project.
        seconds: What each kind of tests may take.
    """
    idle, running = list(folders), list[_Running]()
    while waiting or running:
        while waiting and idle:
            running.append(_start(waiting.popleft(), idle.pop(), seconds))
        left = max(0.0, min(job.deadline for job in running) - time.monotonic())
        connection.wait([job.process.sentinel for job in running], left)
        for job in list(running):
            if job.process.is_alive() and time.monotonic() < job.deadline:
                continue
            running.remove(job)
            idle.append(job.folder)
            yield _end(job)


def _start(run: Run, folder: Path, seconds: Mapping[str, float]) -> _Running:
    original = ""
    if run.mutation is not None:
        original = (folder / run.mutation.file).read_text()
        _write(folder, run.mutation.file, original.replace(run.mutation.old, run.mutation.new))
    process = FORK.Process(target=_test, args=(folder, run.tests))
    process.start()
    start = time.monotonic()
    return _Running(run, folder, original, process, start, start + seconds[run.tests])


def _end(job: _Running) -> Outcome:
    code = job.process.exitcode
    job.process.kill()
    with suppress(ProcessLookupError):
        os.killpg(job.process.pid or 0, signal.SIGKILL)
    job.process.join()
    if job.run.mutation is not None:
        _write(job.folder, job.run.mutation.file, job.original)
    log = job.folder / "log.txt"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.is_file() else ""
    return Outcome(job.run, code, time.monotonic() - job.start, tail)


def preload(selections: Sequence[str], root: Path = ROOT) -> None:
    """Import what the tests need beside the package itself, which takes longer than most of them."""
    texts = "".join((root / "tests" / shlex.split(tests)[0]).read_text() for tests in selections)
    named = [module for module in PRELOADED_IF_NAMED if module.partition(".")[0] in texts]
    for module in (*PRELOADED, *named):
        with warnings.catch_warnings(), suppress(ImportError):
            warnings.simplefilter("ignore")
            importlib.import_module(module)


def run_mutations(mutations: Sequence[Mutation], jobs: int = 1, root: Path = ROOT) -> list[str]:
    """Run the tests without and then with each fault, and print how each ended.

    Args:
        mutations: Faults that fit the code.
        jobs: Copies of the project, in each of which tests run at the same time as in the others.
        root: The project.

    Returns:
        The faults that survive, and the tests that fail without one.
    """
    kinds: dict[str, list[Mutation]] = {}
    for mutation in mutations:
        kinds.setdefault(mutation.tests, []).append(mutation)
    preload(list(kinds), root)
    waiting = deque(Run(tests) for tests in kinds)
    seconds = dict.fromkeys(kinds, CLEAN_SECONDS)
    failed, survivors, killed = list[str](), list[str](), 0
    with tempfile.TemporaryDirectory(prefix="mutate-") as temporary:
        folders = [Path(temporary) / f"copy{number}" for number in range(jobs)]
        for folder in folders:
            copy_project(root, folder)
        for outcome in outcomes(waiting, folders, seconds):
            tests, mutation = outcome.run.tests, outcome.run.mutation
            print(describe(outcome), flush=True)
            if mutation is None and outcome.code == 0:
                seconds[tests] = max(LEAST_SECONDS, PATIENCE * outcome.seconds)
                waiting.extendleft(Run(tests, fault) for fault in reversed(kinds[tests]))
            elif mutation is None:
                failed.append(tests)
            elif outcome.code == 0:
                survivors.append(mutation.id)
            else:
                killed += 1
    print(f"killed {killed} / {len(mutations)}", *(f"survived: {name}" for name in survivors), sep="\n")
    return failed + survivors


def describe(outcome: Outcome) -> str:
    """A line on a run; where tests fail without a fault, what they wrote too."""
    if outcome.run.mutation is None:
        word, text = ("passed", outcome.run.tests) if outcome.code == 0 else ("FAILED", f"{outcome.run.tests} as it is")
    else:
        word, text = {None: "timed out", 0: "SURVIVED"}.get(outcome.code, "killed"), outcome.run.mutation.id
    line = f"{word:9} {outcome.seconds:6.1f} s  {text}"
    return f"{line}\n{outcome.tail}" if word == "FAILED" else line


def _chosen(arguments: argparse.Namespace, mutations: Sequence[Mutation]) -> list[Mutation]:
    """The faults that the command line asks for."""
    if arguments.only:
        known = {mutation.id: mutation for mutation in mutations}
        unknown = [name for name in arguments.only if name not in known]
        if unknown:
            raise SystemExit(f"no such mutation: {', '.join(unknown)}; tools/mutations.yml has {len(known)} others")
        return [known[name] for name in arguments.only]
    runnable = [mutation for mutation in mutations if not mutation.equivalent]
    if arguments.sample is not None:
        return random.Random(arguments.seed).sample(runnable, min(arguments.sample, len(runnable)))
    part, parts = arguments.shard
    return runnable[part - 1 :: parts]


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"a shard is I/N with I from 1 to N, got {text!r}")
    return int(part), int(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="only look whether each entry fits the code")
    what.add_argument("--sample", type=int, metavar="N", help="run N faults drawn by chance")
    what.add_argument("--only", nargs="+", metavar="ID", help="run these")
    what.add_argument("--all", action="store_true", help="run all of them")
    parser.add_argument("--seed", type=int, default=0, help="of --sample")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N", help="of --all: every N-th, from the I-th"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    arguments = _parser().parse_args(argv)
    mutations = read_mutations()
    faults = faults_of_list(mutations)
    if faults or arguments.check:
        equivalent = sum(bool(mutation.equivalent) for mutation in mutations)
        print(*faults, f"{len(mutations)} mutations, {equivalent} of them equivalent; {len(faults)} faults", sep="\n")
        return int(bool(faults))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("EFFVIT_GOLDEN", str(ROOT.parent / "shared" / "golden"))
    return int(bool(run_mutations(_chosen(arguments, mutations), arguments.jobs)))


if __name__ == "__main__":
    raise SystemExit(main())
