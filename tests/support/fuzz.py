"""Property test of the command line: random mistakes of a user end with a code of rlpjepa_zoo.errors and one line, quickly, in little memory.

    python -m tests.support.fuzz --seconds 300               as many cases as fit
    python -m tests.support.fuzz --seed 3 --case 1234        one case again, with its command, output and traceback; shrinks a failure

A server process imports everything once. Each case runs in a fork of it, with an own folder, home, temporary folder, time limit and memory limit.
What is checked is in `verdict`. Memory is the largest resident size of the fork minus its resident size when it starts, which is that of the imported
libraries; a limit of the address space stops a case that would take far more.
"""

import argparse
import contextlib
import dataclasses
import errno
import faulthandler
import hashlib
import io
import itertools
import json
import os
import re
import resource
import select
import shutil
import signal
import stat
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "MPLBACKEND": "agg", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import fuzz_cases  # noqa: E402
import fuzz_world  # noqa: E402

CODES = {0, 2, 3, 4, 5, 6, 7}
MOST_CHARACTERS = 500
MOST_MEMORY = 1 << 30
ADDRESS_SPACE = 2 << 30
FOREIGN = {".ses"}
"""Temporary files of libraries that stay: onnxruntime's."""
SECONDS = float(os.environ.get("RLPJEPA_FUZZ_SECONDS_PER_CASE", 90))  # the cores may be busy: a case takes one second on an idle machine
PRELOADED = (
    "accelerate", "datasets", "matplotlib.figure", "peft", "pyarrow.parquet", "pyarrow.compute", "sklearn.linear_model", "sklearn.cluster",
    "sklearn.datasets", "safetensors.torch",
    "scipy.optimize", "timm", "torch._dynamo", "torchvision.transforms.v2", "tqdm.auto", "PIL.ImageOps", "rich.console", "rich.table", "jinja2",
    "yaml", "transformers.utils", "tensorboard",
    "rlpjepa_zoo.cli.app", "rlpjepa_zoo.config.finetune", "rlpjepa_zoo.data.sources", "rlpjepa_zoo.embedding.extract", "rlpjepa_zoo.embedding.card",
    "rlpjepa_zoo.evaluation.evaluate",
    "rlpjepa_zoo.evaluation.datasets", "rlpjepa_zoo.hub.card", "rlpjepa_zoo.hub.push", "rlpjepa_zoo.models.pretrained", "rlpjepa_zoo.models.export",
    "rlpjepa_zoo.report.report",
    "rlpjepa_zoo.training.tasks.pretrain", "rlpjepa_zoo.training.tasks.finetune", "rlpjepa_zoo.report.demo", "rlpjepa_zoo.bench.loss",
    "rlpjepa_zoo.bench.codes", "rlpjepa_zoo.bench.tables",
)  # fmt: skip


@dataclasses.dataclass
class Failure:
    """A case whose end is not what a user may expect."""

    seed: int
    case: int
    kind: str
    """What is wrong, without the values of the case: failures of one cause have one kind."""
    command: str
    mutations: list[str]
    detail: str

    def replay(self) -> str:
        return f"python -m tests.support.fuzz --seed {self.seed} --case {self.case}"


@dataclasses.dataclass
class Ending:
    """How a case ended."""

    code: int | None  # None: killed, or out of time
    out: str
    err: str
    memory: int
    seconds: float
    notes: list[str]


# --- one case in a fork -----------------------------------------------------------------------------------------------------------------


def import_everything() -> None:
    import importlib

    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import PIL.Image
    import torch

    PIL.Image.init()
    torch.set_num_threads(1)


def _resident(field: str) -> int:
    return int(re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)[1]) << 10  # type: ignore[index]


PATHS = {
    "open": 1,
    "os.mkdir": 1,
    "os.rename": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.link": 2,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.chmod": 1,
}
"""Audit events that write, and how many of their first arguments are paths."""
DESCRIPTORS = {
    "os.mkdir": (2,),
    "os.rename": (2, 3),
    "os.remove": (1,),
    "os.rmdir": (1,),
    "os.link": (2, 3),
    "os.symlink": (2,),
    "os.chmod": (2,),
}
"""The arguments of these events that are descriptors of the folders which paths are relative to."""


def _places_of(event: str, arguments: tuple[Any, ...]) -> list[str]:
    """The places that an audit event changes, links in their folders resolved."""
    paths, folders = arguments[: PATHS[event]], [arguments[i] for i in DESCRIPTORS.get(event, ())]
    places = []
    for path, folder in itertools.zip_longest(paths, folders[: len(paths)], fillvalue=-1):
        if not isinstance(path, str | bytes | os.PathLike):
            continue
        text = os.fsdecode(path)
        if isinstance(folder, int) and folder >= 0:
            text = os.path.join(os.path.realpath(f"/proc/self/fd/{folder}"), text)
        head, name = os.path.split(text.rstrip("/") or "/")
        places.append(os.path.normpath(os.path.join(os.path.realpath(head), name)))
    return places[-1:] if event in ("os.link", "os.symlink") else places


def _watch_writes(case: fuzz_cases.Case, notes: list[str]) -> None:
    """Note what is written elsewhere than to the places that the command names; forbid what is written outside the folder of the case."""
    home = os.path.realpath(case.folder)
    own = tuple(f"{home}/{name}" for name in ("out", "home", "tmp"))
    asked = tuple(os.path.realpath(os.path.join(home, place)) for place in case.targets() if "\0" not in place)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in PATHS:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)):
            return
        for place in _places_of(event, arguments):
            if place == home or place.startswith(("/dev/", "/proc/")):  # the folder itself is made with exist_ok
                continue
            if "/pymp-" in place:  # the sockets of multiprocessing, in a temporary folder that the parent process chose
                continue
            if not place.startswith(home + "/"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), place)
            # files beside a target: its temporary name, its list of failures, and its parents
            related = any(
                place.startswith(os.path.dirname(t) + "/") and os.path.basename(t)[:20] in place or t.startswith(place) for t in asked
            )
            if not place.startswith(own) and not related:
                notes.append(f"{event} {place.replace(home, '.')}")

    sys.addaudithook(hook)


def _load(path: str, world: str | None) -> int:
    """Load an embeddings file or folder; a changed file that loads must have the values from before."""
    import numpy as np

    from rlpjepa_zoo import SparseEmbeddings
    from rlpjepa_zoo.errors import ZooError

    try:
        loaded = SparseEmbeddings.load(path)
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    loaded.top_k(2), loaded.to_scipy(), loaded.l0
    if world is not None:
        before = SparseEmbeddings.load(world)
        same = loaded.shape == before.shape and all(
            np.array_equal(getattr(loaded, k), getattr(before, k)) for k in ("indptr", "indices", "values")
        )
        if not (same and list(map(str, loaded.ids)) == list(map(str, before.ids))):
            print("accepted: a damaged file was loaded with other values", file=sys.stderr)
            return 99
    return 0


def _run(case: fuzz_cases.Case) -> int:
    if case.arguments[:1] == [fuzz_cases.LOAD] and len(case.arguments) == 2:
        try:
            return _load(case.arguments[1], case.damaged)
        except Exception:
            import traceback

            traceback.print_exc()
            print("error: load", file=sys.stderr)
            return 70
    from rlpjepa_zoo.cli.app import main

    sys.argv = ["rlpjepa", *case.command]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 70
    raise AssertionError("main returned")


def _child(case: fuzz_cases.Case, report: int) -> None:
    """Run a case in this fork, send [code, memory, notes] and end."""
    folder, notes = case.folder, list[str]()
    os.setpgid(0, 0)
    os.chdir(folder)
    os.environ |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "XDG_CACHE_HOME": str(folder / "home/.cache")}
    for name, value in case.environment.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value.replace("./", f"{folder}/")})
    tempfile.tempdir = None
    target = {"closed": None, "full": "/dev/full"}.get(case.stdout, str(folder / "stdout"))
    if target is None:
        read, out = os.pipe()
        os.close(read)
    else:
        out = os.open(target, os.O_WRONLY | os.O_CREAT)
    err = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor, number in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(descriptor, number)
    encoding = "ascii" if case.stdout == "ascii" else "utf-8"
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), "utf-8", "backslashreplace", line_buffering=True)
    faulthandler.enable(2, all_threads=True)
    faulthandler.dump_traceback_later(SECONDS * 0.9, file=2)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, used + ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 30, 2 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = _resident("VmRSS")
    _watch_writes(case, notes)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.write(report, b"\n")  # ready for a Ctrl-C
        code = _run(case)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    sys.stderr.flush()
    os.write(report, json.dumps([code, max(0, _resident("VmHWM") - before), notes[:20]]).encode())
    os._exit(0)


def _wait(pid: int, seconds: float) -> bool:
    """Whether the process ended in time; it and its children are killed."""
    descriptor = os.pidfd_open(pid)
    ended = bool(select.select([descriptor], [], [], seconds)[0])
    os.close(descriptor)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return ended


def snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Kind, mode, size, time and contents of everything in a folder."""
    found: dict[str, tuple[Any, ...]] = {}
    for parent, folders, files in os.walk(os.fsencode(folder)):
        for name in folders + files:
            path = os.path.join(parent, name)
            status = os.lstat(path)
            content = hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else ""
            time_of_change = 0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns
            found[os.fsdecode(os.path.relpath(path, os.fsencode(folder)))] = (
                stat.S_IFMT(status.st_mode),
                status.st_mode,
                status.st_size if content else 0,
                time_of_change,
                content,
            )
    return found


def perform(case: fuzz_cases.Case, interrupt_after: float | None = None) -> Ending:
    """Run a case in a fork, which gets a Ctrl-C after some seconds if asked."""
    kept = ("in", "outside")
    before = {name: snapshot(case.folder / name) for name in kept}
    read, write = os.pipe()
    start = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the command starts
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            _child(case, write)
        finally:
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.close(write)
    if interrupt_after is not None:
        select.select([read], [], [], SECONDS)
        time.sleep(interrupt_after)
        os.kill(pid, signal.SIGINT)
    ended = _wait(pid, SECONDS)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - start
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    texts = [
        (case.folder / name).read_bytes()[:2_000_000].decode("utf-8", "backslashreplace") if (case.folder / name).exists() else ""
        for name in ("stdout", "stderr")
    ]
    if answer.strip():
        code, memory, notes = json.loads(answer)
    else:
        code, memory = None, max(0, (usage.ru_maxrss << 10) - _resident("VmRSS"))
        notes = [f"killed by signal {status & 127}" if ended else "out of time"]
    targets = [os.path.realpath(case.folder / place) for place in case.targets() if "\0" not in place]
    for name in kept:
        if any(f"{target}/".startswith(f"{os.path.realpath(case.folder)}/{name}/") for target in targets):
            continue  # the command was asked to write there
        after = snapshot(case.folder / name)
        changed = sorted(key for key in after.keys() | before[name].keys() if after.get(key) != before[name].get(key))
        notes += [f"changed {name}/{key}" for key in changed[:3]]
    asked = {os.path.relpath(target, os.path.realpath(case.folder)).split("/")[0] for target in targets}
    usual = {"in", "out", "outside", "home", "tmp", "stdout", "stderr"}
    others = [p.name for p in case.folder.iterdir() if p.name not in usual and not any(name[:20] in p.name for name in asked)]
    extra = [] if asked & {".", ".."} else sorted(others)
    left = [f"tmp/{p.name}" for p in (case.folder / "tmp").iterdir() if p.name not in FOREIGN] + [
        f"home/{p.name}" for p in (case.folder / "home").iterdir() if p.name != ".cache"
    ]
    notes += [f"wrote {name}" for name in extra + left]
    return Ending(code, *texts, memory, seconds, notes)


# --- the verdict ------------------------------------------------------------------------------------------------------------------------


def _shape(text: str) -> str:
    """A message without what differs between cases."""
    text = re.sub(r"[^ -~]+|(.)\1{9,}", "", text)
    text = re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`", "'...'", text)
    return re.sub(r"\d+", "0", re.sub(r"(?:\.?/?[\w.-]*/)+[^\s:]*", "PATH", text))[:90]


def _place(err: str) -> str:
    """Error type and the last place in the package of the last traceback."""
    frames = re.findall(r'File "[^"]*/(rlpjepa_zoo/[^"]+)", line (\d+),? in (\w+)', err)
    kinds = re.findall(r"^([A-Za-z_][\w.]*(?:Error|Exception|Warning|Iteration|Exit|Interrupt))\b", err, re.M)
    file, line, function = frames[-1] if frames else ("?", "?", "?")
    return f"{kinds[-1] if kinds else '?'} at {file}:{line} {function}"


def _hung(err: str) -> str:
    """The innermost place in the package, of the tracebacks that faulthandler prints innermost first."""
    frames = re.findall(r'File "[^"]*?([\w.]+/[\w.]+)", line (\d+) in (\w+)', err)
    own = re.findall(r'File "[^"]*/(rlpjepa_zoo/[^"]+)", line (\d+) in (\w+)', err)
    file, line, function = (own or frames or [("?", "?", "?")])[0]
    return f"{file}:{line} {function}"


def unprintable(text: str) -> str | None:
    """The first character that a terminal would obey rather than show."""
    return next((c for c in text if c not in "\n\r\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Co")), None)


def verdict(case: fuzz_cases.Case, ending: Ending) -> Iterator[tuple[str, str]]:
    """What is wrong with the end of a case: (kind, detail) pairs."""
    name = case.arguments[0] if case.arguments and case.arguments[0] in (*fuzz_cases.COMMANDS, fuzz_cases.LOAD) else "?"
    errors = [line for line in ending.err.splitlines() if line.startswith("error: ")]
    if "out of time" in ending.notes:
        yield f"hang: {_hung(ending.err)}", ending.err[-3000:]
        return
    if ending.code is None:
        yield f"killed: {ending.notes[0]} ({name}) {_hung(ending.err)}", ending.err[-3000:]
        return
    if ending.memory > MOST_MEMORY:
        yield f"memory: {name}, {_shape(errors[0]) if errors else 'success'}", f"{ending.memory >> 20} MB"
    if ending.code == 99:
        yield f"silent: a damaged {Path(case.arguments[1]).suffix or 'folder'} is loaded with other values", ending.err[-500:]
        return
    if ending.code == 70 or "Traceback (most recent call last)" in ending.err:
        yield f"bug: {_place(ending.err)}", ending.err[-3000:]
        return
    if ending.code not in (CODES | {141} if case.stdout == "closed" else CODES):
        yield f"code: {ending.code} ({name})", ending.err[-1000:]
    if ending.code not in (0, 141) and len(errors) != 1 and not (ending.code == 2 and not case.command):
        yield f"lines: {len(errors)} error lines with code {ending.code} ({name})", ending.err[-1000:]
    if ending.code == 0 and errors:
        yield f"lines: an error line with code 0 ({name})", errors[0][:500]
    for line in errors:
        if len(line) > MOST_CHARACTERS:
            yield f"long: {name}, {_shape(line)}", f"{len(line)} characters: {line[:300]} ..."
    for stream, text in (("stderr", ending.err), ("stdout", ending.out)):
        if (found := unprintable(text)) is not None:
            line = next(line for line in text.split("\n") if found in line)
            yield (
                f"unprintable on {stream}: {name}, {_shape(line)}",
                f"{found!r} in {line[:300]!r}",
            )
    if ending.notes:
        yield f"writes: {name}, {re.sub(r'[0-9a-f]{6,}|[0-9]+', '0', ending.notes[0])[:60]}", "; ".join(ending.notes)


# --- a session --------------------------------------------------------------------------------------------------------------------------


def make_world(folder: Path) -> None:
    """Build the world in a fork, so that the server stays without threads."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                fuzz_world.build(folder)
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1] != 0:
        raise RuntimeError("the world of the property test cannot be built")


def one(
    seed: int, number: int, world: Path, only: Collection[int] | None = None, keep: Path | None = None
) -> tuple[fuzz_cases.Case, Ending, list[tuple[str, str]]]:
    """Build and run a case and judge its end."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-case-")) if keep is None else keep
    try:
        case = fuzz_cases.build(seed, number, folder, world, only)
        ending = perform(case)
        return case, ending, list(verdict(case, ending))
    finally:
        if keep is None:
            for parent, _, _ in os.walk(folder):
                os.chmod(parent, 0o700)
            shutil.rmtree(folder, ignore_errors=True)


def session(seed: int, cases: int | None, seconds: float, report: Path, first: int = 0) -> None:
    """Run cases until their number or the time is reached; write {"cases", "seconds", "memory", "codes", "failures"} as JSON."""
    import_everything()
    failures, codes, memory, slowest = dict[str, Failure](), Counter[str](), 0, (0.0, 0)
    with tempfile.TemporaryDirectory(prefix="fuzz-world-") as home:
        world = Path(home).resolve()
        make_world(world)
        start, number = time.monotonic(), first
        while (cases is None or number < first + cases) and time.monotonic() - start < seconds:
            case, ending, wrong = one(seed, number, world)
            codes[str(ending.code)] += 1
            memory, slowest = max(memory, ending.memory), max(slowest, (ending.seconds, number))
            for kind, detail in wrong:
                failures.setdefault(kind, Failure(seed, number, kind, fuzz_cases.describe(case)[:1500], case.names, detail))
            number += 1
        done = {"cases": number - first, "seconds": time.monotonic() - start, "memory": memory, "slowest": slowest, "codes": codes}
    report.write_text(json.dumps(done | {"failures": [dataclasses.asdict(f) for f in failures.values()]}, indent=1))


def summary(done: dict[str, Any]) -> str:
    """The failures of a session, each with the command that repeats it."""
    lines = [
        f"{done['cases']} cases in {done['seconds']:.0f} s, exit codes {dict(sorted(done['codes'].items()))}, at most {done['memory'] >> 20} MB above the imported "
        f"libraries, slowest {done['slowest'][0]:.1f} s (case {done['slowest'][1]}); {len(done['failures'])} kinds of failure"
    ]
    for failure in map(lambda values: Failure(**values), done["failures"]):
        lines += [
            f"\n{failure.kind}\n    {failure.replay()}\n    {failure.command[:300]}\n    {', '.join(failure.mutations)}\n    {failure.detail.strip()[-400:]!r}"
        ]
    return "\n".join(lines).encode("ascii", "backslashreplace").decode()


def _cut(detail: str) -> str:
    return "\n".join(line[:200] for line in detail.strip().splitlines())[-600:]


def shrink(seed: int, number: int, world: Path, kinds: set[str]) -> list[int]:
    """A smallest set of mutations with one of these failures."""
    needed = list(range(3))
    for position in reversed(range(3)):
        fewer = [i for i in needed if i != position]
        if kinds & {kind for kind, _ in one(seed, number, world, fewer)[2]}:
            needed = fewer
    return needed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="repeat one case")
    parser.add_argument("--only", help="positions of the mutations to make, such as 0,2")
    parser.add_argument("--cases", type=int)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--report", type=Path, help="write the result as JSON")
    parser.add_argument("--keep", type=Path, help="leave the folder of the repeated case here")
    options = parser.parse_args()
    if options.case is None:
        with tempfile.TemporaryDirectory() as scratch:
            report = options.report or Path(scratch) / "report.json"
            session(options.seed, options.cases, options.seconds, report, options.first)
            done = json.loads(report.read_text())
        print(summary(done))
        sys.exit(bool(done["failures"]))
    import_everything()
    with tempfile.TemporaryDirectory(prefix="fuzz-world-") as home:
        world = Path(home).resolve()
        make_world(world)
        only = None if options.only is None else [int(i) for i in options.only.split(",") if i]
        if options.keep is not None:
            options.keep.mkdir(parents=True)
        case, ending, wrong = one(options.seed, options.case, world, only, options.keep and options.keep.resolve())
        print(fuzz_cases.describe(case)[:2000], *case.names, sep="\n  ")
        print(f"code {ending.code}, {ending.memory >> 20} MB, {ending.seconds:.1f} s, notes {ending.notes}")
        print(f"--- stdout\n{ending.out[-2000:]!r}\n--- stderr\n{ending.err[-6000:].encode('ascii', 'backslashreplace').decode()}")
        for kind, detail in wrong:
            print(f"WRONG {kind}: {detail[-300:]!r}")
        if wrong and only is None:
            needed = shrink(options.seed, options.case, world, {kind for kind, _ in wrong})
            print(f"smallest: --only {','.join(map(str, needed))}")
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
