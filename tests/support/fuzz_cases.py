"""Cases of the property test: a valid command on a valid input, and some mutations of either, all drawn from the seed and the number of the case.

The working folder of a case holds in/ (what the command reads), out/ (the only place where it may write) and outside/ (what links lead to).
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from random import Random

import fuzz_mutations as mutate
from fuzz_world import PRETRAINING, SMALL, TUNING

Mutation = Callable[[Random], None]

VALID_OPTIONS = {
    "--json": None, "--quiet": None, "--resume": None, "--overwrite": None, "--skip-bad": None, "--batch-size": "3",
    "--num-workers": "0", "--device": "cpu", "--revision": "main",
    "--density": "0.1", "--max-active": "4", "--values": "float16", "--columns": "label", "--license": "mit", "--name": "a/b", "--limit": "4",
    "--split": "train", "--allow-change": "optim.lr",
}  # fmt: skip
COMMANDS = (
    "check",
    "train",
    "finetune",
    "embed",
    "dial",
    "eval",
    "report",
    "list",
    "card",
    "push",
    "export",
    "bench",
    "zoo",
    "demo",
    "predict",
    "search",
)
FREE = (
    "checks",
    "trains",
    "tunes",
    "embeds",
    "continues",
    "loads",
    "dials",
    "evaluates",
    "reports",
    "cards",
    "pushes",
    "lists",
    "verifies",
    "exports",
    "measures",
    "demonstrates",
)
WEIGHTS = (20, 6, 5, 22, 5, 12, 4, 3, 1, 7, 9, 3, 3, 0.4, 1, 1)
LOAD = "load"
"""Name of a command that exists here only: it loads an embeddings file, as `SparseEmbeddings.load` does."""


@dataclasses.dataclass
class Case:
    """One command line in a folder, and what was done to them."""

    folder: Path
    world: Path
    arguments: list[str] = dataclasses.field(default_factory=list)
    options: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    tail: list[str] = dataclasses.field(default_factory=list)
    mutations: list[Mutation] = dataclasses.field(default_factory=list)
    names: list[str] = dataclasses.field(default_factory=list)
    stdout: str = "file"
    environment: dict[str, str | None] = dataclasses.field(default_factory=dict)
    """Variables to set, or to remove if None; ./ stands for the folder of the case."""
    damaged: str | None = None
    """An embeddings file that was changed: if it loads, the values must be those before."""

    def take(self, member: str, place: str = "in") -> str:
        """Copy a member of the world into the folder of the case; its relative path."""
        source, target = self.world / member, self.folder / place / member
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        return f"{place}/{member}"

    def write(self, name: str, content: bytes) -> str:
        (self.folder / "in" / name).write_bytes(content)
        return f"in/{name}"

    def may(self, *mutations: Mutation, times: int = 1) -> None:
        self.mutations += mutations * times

    @property
    def outside(self) -> Path:
        return self.folder / "outside" / "secret.png"

    @property
    def command(self) -> list[str]:
        options = [word for name, value in self.options for word in ((name,) if value is None else (name, value))]
        return [*self.arguments, *options, *self.tail]

    def targets(self) -> list[str]:
        """Paths that the command may write to."""
        named = {"--out", "--plot"}
        given = [value for name, value in self.options if name in named and value is not None]
        words = self.command
        given += [words[i + 1] for i, word in enumerate(words[:-1]) if word in named] + [
            word.partition("=")[2] for word in words if word.startswith("--out=")
        ]
        return [*given, "runs/latest", "rlpjepa-demo"]

    # --- what a case can be ---

    def checks(self, rng: Random) -> None:
        shipped = sorted(path for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"))
        text = rng.choice((PRETRAINING, TUNING, rng.choice(shipped).read_text()))
        self.arguments = ["check", rng.choice(shipped).stem] if rng.random() < 0.4 else ["check", self._recipe(text)]
        if "in/encoder" in text:
            self.take("encoder")
        self.may(self.overridden, times=3)

    def trains(self, rng: Random) -> None:
        self._data()
        self.arguments = ["train", self._recipe(PRETRAINING)]
        self.options = [("--out", "out/run"), ("--quiet", None)]
        self.tail = list(SMALL)
        if rng.random() < 0.4:
            self.take("run", "out")
            self.options.append(("--resume", None))
            self.may(self.damage_of("out/run", "json", "jsonl", "yaml", "safetensors"), times=4)
        self.may(self.overridden, self.spoil_folder("in/images"), self.pointed_elsewhere)

    def tunes(self, rng: Random) -> None:
        self._data()
        self.take("encoder")
        self.arguments = ["finetune", self._recipe(TUNING)]
        self.options = [("--out", "out/run"), ("--quiet", None)]
        self.tail = [text for text in SMALL if text.startswith(("data.", "train."))]
        self.may(
            self.overridden,
            self.spoil_folder("in/images"),
            self.damage_of("in/encoder", "json", "safetensors", "yaml"),
            self.pointed_elsewhere,
        )

    def embeds(self, rng: Random) -> None:
        images = self.take(rng.choice(("images", "images", "photo.tar", "photo.parquet", "photo.zip")))
        encoder = self.take("encoder")
        self.arguments = ["embed", encoder, images]
        out = rng.choice(("out/codes.safetensors", "out/codes.npz", "out/codes.parquet", "out/parts", "out/parts.v1.0"))
        self.options = [
            ("--out", out),
            ("--num-workers", "0"),
            *rng.sample(
                sorted((k, v) for k, v in {"--quiet": None, "--skip-bad": None, "--part-rows": "3", "--batch-size": "3"}.items()), 2
            ),
        ]
        self.may(self.spoil_images(images), times=6)
        self.may(self.damage_of("in/encoder", "json", "safetensors", "yaml"), self.renamed(images, 2), self.listed)

    def continues(self, rng: Random) -> None:
        self.arguments = ["embed", self.take("encoder"), self.take("images")]
        self.take("parts", "out")
        self.options = [("--out", "out/parts"), ("--num-workers", "0"), ("--part-rows", "3"), ("--quiet", None)]
        if rng.random() < 0.6:
            for part in sorted((self.folder / "out/parts").glob("*.parquet"))[rng.randrange(3) :]:
                part.unlink()
        self.may(self.damage_of("out/parts", "json", "jsonl", "parquet"), self.spoil_layout("out/parts"), times=2)
        self.may(self.spoil_folder("in/images"))

    def loads(self, rng: Random) -> None:
        file = self.take(rng.choice(("codes.safetensors", "codes.npz", "codes.parquet", "parts")))
        self.arguments = [LOAD, file]
        self.damaged = f"{self.world}/{Path(file).name}"
        self.may(self.damage_of(file, "safetensors", "npz", "parquet", "json"), times=6)
        self.may(self.renamed(file, 1))

    def dials(self, rng: Random) -> None:
        self.arguments = ["dial", self.take("encoder")]
        self.options = [("--out", "out/dialled"), rng.choice((("--density", "0.1"), ("--budget", "4"))), ("--quiet", None)]
        if rng.random() < 0.5:
            self.options = [
                ("--out", "out/dialled"),
                ("--density", "0.1"),
                ("--mode", "threshold"),
                ("--images", self._data()),
                ("--num-workers", "0"),
            ]
            self.may(self.spoil_folder("in/images"))
        self.may(self.damage_of("in/encoder", "json", "safetensors", "yaml"))

    def evaluates(self, rng: Random) -> None:
        self.arguments = ["eval", self.take("encoder")]
        self.options = [
            ("--data", self._data()),
            ("--probes", rng.choice(("knn", "few_shot", "retrieval"))),
            ("--seeds", "1"),
            ("--no-pixels", None),
            ("--quiet", None),
        ]
        self.may(self.spoil_folder("in/images"), self.damage_of("in/encoder", "json", "safetensors"), self.extra_option({"--budgets": "1,2",
        "--shots": "1", "--against": "random", "--plot": "out/a.png", "--out": "out/a.json", "--queries": "3"}))  # fmt: skip

    def reports(self, rng: Random) -> None:
        self._data()
        self.arguments = ["report", self.take("run", "out")]
        self.options = [("--images", "4"), ("--out", "out/page.html"), ("--quiet", None)]
        self.may(self.damage_of("out/run", "json", "jsonl", "yaml", "safetensors"), times=3)

    def cards(self, rng: Random) -> None:
        self.arguments = ["card", self.take(rng.choice(("encoder", "classifier")), "out")]
        self.options = rng.choice(([], [("--out", "out/card")], [("--write", None)]))
        self.may(self.damage_of(self.arguments[1], "json", "md", "yaml", "safetensors"), times=4)
        self.may(self.noted, self.extra_option({"--name": "a/b", "--license": "mit"}), self.spoil_layout(self.arguments[1]))

    def pushes(self, rng: Random) -> None:
        self.arguments = ["push", self.take(rng.choice(("encoder", "classifier", "parts", "run"))), "you/things"]
        self.options = [("--dry-run", None)]
        self.may(
            self.damage_of(self.arguments[1], "json", "md", "yaml", "safetensors", "parquet"), self.spoil_layout(self.arguments[1]), times=3
        )
        self.may(self.noted, self.odd_argument)

    def lists(self, rng: Random) -> None:
        self.arguments = rng.choice((["list"], ["list", "*"], ["list", "--recipes"], ["list", "--recipes", "cifar*"], []))
        self.may(self.odd_argument, self.extra_option({"--data": "*", "--max-megabytes": "3", "--min-density": "0.1", "--min-knn": "1"}))

    def verifies(self, rng: Random) -> None:
        self.arguments = rng.choice((["zoo", "verify", "no-such-*"], ["zoo", "push", "you", "test_*"]))
        self.options = [("--folder", "in") if self.arguments[1] == "verify" else ("--dry-run", None)]
        self.may(self.odd_argument)

    def exports(self, rng: Random) -> None:
        self.arguments = ["export", self.take("encoder")]
        self.options = [("--out", rng.choice(("out/encoder.onnx", "out/encoder.txt", "out/none/encoder.pt2", "out")))]
        self.may(self.damage_of("in/encoder", "json", "safetensors"))

    def measures(self, rng: Random) -> None:
        odd = rng.choice(("0", "-1", "x", "1.5", "nan", "9" * 400))
        if rng.random() < 0.4:
            self.arguments = rng.choice((["bench"], ["bench", "loss"]))
            small = {"--batch": "8", "--dim": "16", "--directions": "32", "--repeats": "1"}
            self.options = [*(small | {rng.choice(sorted(small)): odd}).items()]
            return
        self._data()
        self.arguments = ["bench", "codes", self._recipe(PRETRAINING)]
        self.options = [("--methods", rng.choice(("ours,csr,pq", "features,ncl", "pca,random,csrv2"))), ("--k", "2,4"), ("--seeds", "1")]
        self.options += [("--linear", "none"), ("--quiet", None), ("--out", "out/codes.json")]
        self.tail = [*SMALL, "encoder.freeze_backbone=true", "encoder.cached_views=2"]
        self.may(self.overridden, self.spoil_folder("in/images"), self.pointed_elsewhere)
        self.may(self.extra_option({"--methods": "csr", "--k": odd, "--seeds": odd, "--linear": "all"}), times=3)

    def demonstrates(self, rng: Random) -> None:
        self.arguments = ["demo"]
        self.options = [
            ("--out", "out/demo"),
            rng.choice(
                (
                    ("--density", rng.choice(("0", "1", "nan", "x", "-1", "1e400"))),
                    ("--epochs", rng.choice(("0", "-1", "nan", "inf", "x", "1e400"))),
                )
            ),
        ]

    # --- mutations ---

    def overridden(self, rng: Random) -> None:
        keys = _keys(self.arguments[1])
        self.arguments += [mutate.override(rng, keys) for _ in range(rng.choice((1, 1, 2)))]

    def rewritten(self, rng: Random) -> None:
        path = self.folder / "in/recipe.yaml"
        path.write_bytes(mutate.of_yaml(rng, path.read_text()))

    def pointed_elsewhere(self, rng: Random) -> None:
        """Another source of images."""
        source, member = rng.choice(
            (("parquet", "photo.parquet"), ("webdataset", "photo.tar"), ("hf", "photo.parquet"), ("folder", "photo.zip"))
        )
        path = self.take(member)
        self.arguments += [f"data.source={source}", f"data.path={rng.choice((path, 'in'))}"]
        self.spoil_images(path)(rng)

    def spoil_images(self, place: str) -> Mutation:
        def spoil(rng: Random) -> None:
            path = self.folder / place
            if path.is_dir():
                mutate.layout(rng, path, self.outside)
            elif path.suffix == ".parquet":
                mutate.table_file(rng, path, self.outside)
            elif path.suffix == ".tar":
                mutate.tar_file(rng, path)
            else:
                path.write_bytes(mutate.of_bytes(rng, path.read_bytes()))

        return spoil

    spoil_folder = spoil_layout = spoil_images

    def damage_of(self, place: str, *endings: str) -> Mutation:
        """Damage one of the files of a folder, or the file."""

        def damage(rng: Random) -> None:
            path = self.folder / place
            files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file() and p.suffix[1:] in endings]
            if not files:
                return
            victim = rng.choice(files)
            content = victim.read_bytes()
            if rng.random() < 0.1:
                victim.unlink()
                {0: lambda: None, 1: lambda: os.mkfifo(victim), 2: lambda: victim.mkdir(), 3: lambda: victim.symlink_to(self.outside)}[
                    rng.randrange(4)
                ]()
            elif victim.suffix == ".json" and rng.random() < 0.8:
                try:
                    victim.write_bytes(mutate.of_json_text(rng, content.decode()))
                except ValueError:  # damaged before
                    victim.write_bytes(mutate.of_bytes(rng, content))
            elif victim.suffix in (".yaml", ".md") and content and rng.random() < 0.5:
                victim.write_bytes(mutate.of_yaml(rng, content.decode("utf-8", "replace")) if content.strip() else b"")
            else:
                victim.write_bytes(mutate.of_bytes(rng, content))

        return damage

    def renamed(self, place: str, position: int) -> Mutation:
        """Give an input an odd name."""

        def rename(rng: Random) -> None:
            path = self.folder / place
            name = os.fsencode(rng.choice(mutate.NAMES)[:200]).replace(b"/", b"_").decode("utf-8", "surrogateescape") + rng.choice(
                ("", path.suffix)
            )
            target = path.with_name(name)
            if name not in ("", ".", "..") and path.exists() and not os.path.lexists(target):
                path.rename(target)
                self.arguments[position] = f"in/{name}"

        return rename

    def listed(self, rng: Random) -> None:
        """A list of image files."""
        known = [f"in/images/a/{i:02d}.png" for i in range(2)]
        lines = [
            rng.choice((*known, "", "in/none.png", "/dev/zero", "http://127.0.0.1:9/x", mutate.odd(rng)[:3000]))
            for _ in range(rng.randrange(6))
        ]
        self.arguments[2] = self.write("list.txt", "\n".join(lines).encode("utf-8", "surrogateescape"))

    def noted(self, rng: Random) -> None:
        contents = (
            b"",
            b"# Notes\n",
            b"\xff\xfe",
            b"---\nlicense: x\n---\n",
            b"\x1b[31m\xe2\x80\xae",
            b"x" * 2_000_000,
            b"{{ x }} {% for %}",
        )
        self.options.append(("--notes", rng.choice((self.write("notes.md", rng.choice(contents)), "/dev/zero", "in", "in/none.md"))))

    def extra_option(self, values: dict[str, str]) -> Mutation:
        def add(rng: Random) -> None:
            name = rng.choice(sorted(values))
            self.options.append((name, values[name] if rng.random() < 0.5 else mutate.odd(rng)))

        return add

    def odd_argument(self, rng: Random) -> None:
        if self.arguments[1:]:
            self.arguments[rng.randrange(1, len(self.arguments))] = mutate.odd(rng)
        else:
            self.arguments.append(mutate.odd(rng))

    def odd_value(self, rng: Random) -> None:
        given = [i for i, (_, value) in enumerate(self.options) if value is not None]
        if given:
            i = rng.choice(given)
            self.options[i] = (self.options[i][0], mutate.odd(rng))

    def odd_line(self, rng: Random) -> None:
        """A mistake of the command line: something missing, given twice, unknown or out of place."""
        name = rng.choice(sorted(VALID_OPTIONS))
        value = VALID_OPTIONS[name]
        match rng.randrange(8):
            case 0 if self.arguments:
                del self.arguments[rng.randrange(len(self.arguments))]
            case 1 if self.options:
                del self.options[rng.randrange(len(self.options))]
            case 2 if self.options:
                self.options.append(rng.choice(self.options))
            case 3:
                self.options.append(
                    (
                        rng.choice(("--nope", "-z", "---", "--out-", "--Quiet", "--json=", f"--{mutate.odd(rng)[:40]}")),
                        rng.choice((None, "x")),
                    )
                )
            case 4 if self.arguments:
                self.arguments[0] = rng.choice((mutate.misspelt(rng, self.arguments[0]), mutate.odd(rng)))
            case 5:
                self.options.append((name, None))
            case 6:
                self.arguments.append(mutate.odd(rng))
            case _:
                self.options.append((name, value if rng.random() < 0.5 or value is None else mutate.odd(rng)))

    def odd_stdout(self, rng: Random) -> None:
        self.stdout = rng.choice(("ascii", "closed", "full"))

    def odd_environment(self, rng: Random) -> None:
        name = rng.choice(("HOME", "XDG_CACHE_HOME", "LC_ALL", "COLUMNS", "TERM", "PYTHONIOENCODING", "USER"))
        self.environment[name] = rng.choice((None, "", "./none", "./outside/secret.png", "/dev/null", "1", "x" * 5000))

    # --- helpers ---

    def _data(self) -> str:
        return "in/images" if (self.folder / "in/images").exists() else self.take("images")

    def _recipe(self, text: str) -> str:
        self.may(self.rewritten, times=2)
        return self.write("recipe.yaml", text.encode())


def _keys(recipe: str) -> list[str]:
    """Dotted keys that a recipe of that kind has."""
    from rlpjepa_zoo.config.finetune import TuningRecipe
    from rlpjepa_zoo.config.pretrain import Recipe

    kind = TuningRecipe if "finetune" in recipe else Recipe
    keys = [name for name in kind.model_fields]
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
            keys += [f"{name}.{key}" for key in field.annotation.model_fields]
    return sorted(
        {
            *keys,
            "target.density",
            "target.mu",
            "target.sigma",
            "target.p",
            "objective.name",
            "objective.num_directions",
            "objective.directions",
            "views.local.size",
            "encoder.args.img_size",
        }
    )


def build(seed: int, number: int, folder: Path, world: Path, only: Collection[int] | None = None) -> Case:
    """Make the folder of a case and draw its command.

    Args:
        only: the mutations to make, by position; all if None.
    """
    rng = Random(f"{seed}/{number}")
    for name in ("in", "out", "outside", "home", "tmp"):
        (folder / name).mkdir(parents=True)
    case = Case(folder, world)
    case.outside.write_bytes((world / "images/a/00.png").read_bytes())
    for member in ("photo.tar", "photo.parquet", "photo.zip"):
        shutil.copy(world / member, case.outside.parent)
    kind = rng.choices(FREE, WEIGHTS)[0]
    getattr(case, kind)(Random(f"{seed}/{number}/{kind}"))
    case.may(*[case.odd_line, case.odd_value], times=1)
    case.may(case.odd_argument if rng.random() < 0.3 else case.odd_line)
    case.may(*[case.odd_stdout, case.odd_environment] * (rng.random() < 0.3))
    for position in range(rng.choice((0, 1, 1, 1, 2, 2, 3))):
        chosen = rng.choice(case.mutations)
        if only is None or position in only:
            name = re.sub(r"^.*Case[.]|[.]<locals>.*$", "", chosen.__qualname__)
            try:
                chosen(Random(f"{seed}/{number}/{position}"))
            except Exception as error:  # what an earlier mutation has left may not allow this one
                name += f" (not possible: {type(error).__name__})"
            case.names.append(f"{position}: {name}")
    return case


def describe(case: Case) -> str:
    """The command as JSON, without the folder of this machine."""
    return json.dumps(case.command).replace(str(case.folder), ".")
