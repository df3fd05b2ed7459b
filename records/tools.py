#!/usr/bin/env python3
"""Records that can be trusted: every number of a record is taken from what its runs left behind.

    python records/tools.py new RUN ... --name NAME   a record folder from runs, one per seed
    python records/tools.py check DIR                 judge anybody's record folder by dated rules
    python records/tools.py audit DIR                 run a record's own code, without a network
    python records/tools.py compare BASE NEW ...      is NEW better than BASE?
    python records/tools.py analyze RUN               where the loss lies, what the weights cost
    python records/tools.py report DIR                one HTML page with pictures
    python records/tools.py table                     write the leaderboard of records/README.md
    python records/tools.py probes [NAME=VALUE ...]   look for leaks in an evaluation, from outside
    python records/tools.py ablate run SPEC           compare techniques on equal tokens
    python records/tools.py quantisers run SPEC       compare quantisers: bytes against loss
    python records/tools.py gains run SPEC            compare ways of scoring the same artifacts
    python records/tools.py plan [PRESET] [--on 8xH100]   time, memory, dollars before renting
    python records/tools.py pack --out FILE           the script as one small file, as it is shipped
    python records/tools.py unpack FILE               print a wrapped script, without running it

Every command takes --help, and --json for machines. Exit code 0: done, nothing found; 1: a check
failed; 2: a mistake in the input.
"""

import argparse
import inspect
import io
import json
import signal
import sys
from pathlib import Path

RECORDS = Path(__file__).resolve().parent
SCRIPT = RECORDS.parent / "train_gpt.py"
sys.path[:0] = [str(RECORDS), str(RECORDS.parent)]
from facts.files import write_atomic  # noqa: E402


def pack(asked) -> int:
    """Write the wrapper of a script."""
    from toolkit import pack as tool

    if asked.out.resolve() == asked.script.resolve():
        raise ValueError(f"--out {asked.out}: is the script itself")
    result = tool.pack_file(asked.script, asked.out)
    show(
        asked,
        result,
        f"{result['out']}: {result['raw_bytes']:,} -> {result['packed_bytes']:,} bytes",
    )
    return 0


def unpack(asked) -> int:
    """Print the innermost script of a wrapper. Code in files beside it is found; nothing is run."""
    from facts.files import read_bounded
    from facts.wrappers import MAX_SOURCE_BYTES, unwrapped

    def beside(name: str) -> bytes | None:
        path = asked.file.with_name(name)
        if path.is_symlink() or not path.is_file():
            return None
        return read_bounded(path, MAX_SOURCE_BYTES)

    sys.stdout.buffer.write(
        unwrapped(read_bounded(asked.file, MAX_SOURCE_BYTES), asked.file.name, beside)
    )
    return 0


def check(asked) -> int:
    """Judge a record folder by dated rules; nothing of it is executed. Exit code 1 when a binding
    rule is broken."""
    from toolkit import check as tool

    result = tool.check(asked.folder)
    show(asked, result, tool.as_text(result))
    return 0 if result["passed"] else 1


def audit(asked) -> int:
    """Run a record's own code in fresh processes without a network; --write keeps the results in
    the folder. A folder of another make needs --adapter: see records/toolkit/adapter.py."""
    if asked.adapter and (asked.data or asked.runs or asked.write):
        raise ValueError(
            "--adapter does not go with --data, --runs or --write: "
            "those are for folders that `new` made"
        )
    from toolkit import audit as tool

    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # so that its processes end with it
    if asked.adapter:
        from toolkit.adapter import audit_foreign

        found = audit_foreign(asked.folder, asked.adapter)
    else:
        found = tool.audit(asked.folder, asked.data, asked.runs)
    if asked.write:
        tool.record_audits(asked.folder, found)
    show(asked, found, tool.as_text(found))
    return int(any(a["status"] == "fail" for a in found))


def new(asked) -> int:
    """Make a record folder of finished runs of one configuration, one run folder per seed."""
    from toolkit import snapshot as tool

    wanted = tool.Wanted(**{f: getattr(asked, f) for f in tool.Wanted.__dataclass_fields__})
    place = tool.new(asked.runs, asked.script, asked.records, wanted)
    show(asked, dict(folder=str(place)), f"{place}")
    return 0


def compare(asked) -> int:
    """Compare groups of runs: one-sided Welch with the 0.005-nat margin, power, paired documents;
    Holm for chains."""
    from toolkit import compare as tool

    results = tool.compare_all([asked.base, *asked.new], asked.paired, asked.margin)
    if asked.write:
        tool.record_statistics(Path(asked.new[-1]), results[-1])
    show(asked, results, "\n\n".join(tool.as_text(r, len(results) > 1) for r in results))
    return 0


def analyze(asked) -> int:
    """Score a run's artifact token by token and read its weights; keeps analysis.json, which report
    and new use."""
    from toolkit.analyze import analyze as tool

    found = tool(asked.run, dict(word.split("=", 1) for word in asked.knobs))
    text = json.dumps(found, indent=1)
    write_atomic(asked.run / "analysis.json", text)
    print(text)
    return 0


def table(asked) -> int:
    """Write the leaderboard of records/README.md anew from the record folders."""
    from toolkit import table as tool

    text = tool.refreshed(asked.records)
    write_atomic(asked.records / "README.md", text)
    show(asked, dict(readme=str(asked.records / "README.md")), tool.leaderboard(asked.records))
    return 0


def report(asked) -> int:
    """Write one self-contained HTML page about a run folder or a record folder."""
    from toolkit import report as tool

    out = asked.out or asked.folder / "report.html"
    write_atomic(out, tool.report(asked.folder))
    show(asked, dict(report=str(out)), str(out))
    return 0


def probes(asked) -> int:
    """Probe an evaluation of train_gpt.py, of random weights or of ARTIFACT=FILE. Exit code 1 when
    something leaks."""
    from toolkit.probes import probe

    found = probe(dict(word.split("=", 1) for word in asked.knobs))
    print(json.dumps(found, indent=1))
    return int(bool(found["flags"]))


def plan(asked) -> int:
    """Predict a run on given cards: milliseconds by class of kernel, tokens, evaluation, memory,
    dollars.

    The model is fitted to published runs on eight H100s; --check shows its errors, each row
    predicted from other architectures' runs, and ends with exit code 1 when they are too large.
    """
    from toolkit import plan as tool
    from toolkit.step_time import cluster

    if asked.json not in (None, "-") and ("=" in asked.json or not Path(asked.json).suffix):
        raise ValueError(f"--json {asked.json}: want a file name with a suffix, or nothing")
    if asked.check:
        if asked.words:
            raise ValueError(f"--check goes without {asked.words[0]}: it is about published runs")
        result = tool.checked()
        text, failed = tool.check_text(result), tool.too_wrong(result)
    else:
        if asked.price is not None and not 0 <= asked.price < 1e6:
            raise ValueError(f"--price {asked.price}: want dollars an hour, 0 or more")
        on = cluster(asked.on)
        result = tool.Planned(tool.configuration(asked.words), on, asked.price).result()
        text, failed = tool.as_text(result), False
    if asked.json and asked.json != "-":
        write_atomic(Path(asked.json), json.dumps(result, indent=1))
    print(json.dumps(result, indent=1) if asked.json == "-" else text)
    return int(failed)


def ablate(asked) -> int:
    """Compare techniques on equal tokens: every variant, seed and text as a run of its own.

    SPEC: {"base": {knob: value}, "texts": {name: {knob: value}}, "seeds": [..], "variants": {name:
    {knob: value}}}. A variant is the base with some knobs changed; knobs of a text may use {NAME}
    for an environment variable. `run` finishes what is missing in the folder of SPEC; `report` only
    writes table.md and plot.svg anew.
    """
    from toolkit import ablate as kind

    return swept(asked, kind)


def quantisers(asked) -> int:
    """Compare quantisers on the same trained models: bytes against loss, several step sizes each.

    SPEC: {"base": {knob: value}, "seeds": [..], "reference": name, "variants": {name: {knob:
    value}}, "factors": [..], "bits": [..]}. Every variant quantises, packs and scores the weights
    that a run of the base ended with. Knobs of the base may use {NAME} for an environment variable.
    `run` trains each seed once and finishes what is missing; `report` only writes table.md and
    plot.svg anew.
    """
    from toolkit import quantisers as kind

    return swept(asked, kind)


def gains(asked) -> int:
    """Compare ways of scoring on the same trained models, document by document.

    SPEC: {"base": {knob: value}, "seeds": [..], "variants": {name: {"against": name, "knobs":
    {knob: value}}}}. A run of the base leaves one artifact per seed; every variant scores that very
    file in a process of its own. `run` finishes what is missing; `report` only writes table.md and
    plot.svg anew.
    """
    from toolkit import scoring_gains as kind

    return swept(asked, kind)


def swept(asked, kind) -> int:
    """Run what is missing of a specification, then write its table and plot."""
    from toolkit.sweep import perform

    table = perform(kind, asked.spec, asked.scratch, asked.share if asked.what == "run" else None)
    show(asked, dict(table=str(asked.spec.with_name("table.md"))), table.rstrip("\n"))
    return 0


def part(text: str) -> tuple[int, int]:
    """I/N of --share, or a complaint."""
    words = text.split("/")
    if (
        len(words) == 2
        and all(w.isdecimal() for w in words)
        and 1 <= int(words[0]) <= int(words[1])
    ):
        return int(words[0]), int(words[1])
    raise argparse.ArgumentTypeError(f"{text!r}: want I/N with 1 <= I <= N")


def show(asked, result, text: str):
    """A result as JSON or as text."""
    print(json.dumps(result, indent=1) if asked.json else text)


def knob(text: str) -> str:
    """NAME=VALUE, or a complaint."""
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r}: want NAME=VALUE")
    return text


def arguments() -> argparse.ArgumentParser:
    """The command line: one sub-command per function above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(work, *names: str):
        sub = commands.add_parser(
            work.__name__,
            help=work.__doc__.splitlines()[0],
            description=inspect.cleandoc(work.__doc__),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if work is not plan:
            sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(work=work)
        for name in names:
            sub.add_argument(name, type=Path)
        return sub

    sub = command(pack)
    sub.add_argument("script", type=Path, nargs="?", default=SCRIPT)
    sub.add_argument("--out", type=Path, required=True, help="where the wrapper goes")
    command(unpack, "file")
    command(check, "folder")
    sub = command(audit, "folder")
    sub.add_argument(
        "--data",
        type=Path,
        help="folder of the record's shards: its artifacts are scored again in full",
    )
    sub.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        default=[],
        help="run folders of the record, where it was made without --keep-artifacts",
    )
    sub.add_argument(
        "--write", action="store_true", help="put the results into submission.json and README.md"
    )
    sub.add_argument(
        "--adapter",
        metavar="FILE.py:FUNCTION",
        help="what runs the evaluation of a script of another make: tokens in, losses out",
    )
    sub = command(new)
    sub.add_argument("runs", type=Path, nargs="+", help="run folders, one per seed")
    sub.add_argument("--name", required=True, help="short name of the record, no score in it")
    sub.add_argument(
        "--track", choices=("non_record_16mb", "10min_16mb"), default="non_record_16mb"
    )
    for name, text in (
        ("author", "name of the author"),
        ("github-id", "account of the author"),
        ("blurb", "one paragraph: what is new"),
        ("date", "YYYY-MM-DD; else that of the last run"),
        ("left-out", "why finished runs of the same configuration are not in the record"),
    ):
        sub.add_argument(f"--{name}", help=text)
    sub.add_argument("--keep-artifacts", action="store_true", help="copy model.golf of every seed")
    sub.add_argument(
        "--data",
        type=Path,
        help="folder of the runs' shards, for smoke/; else where the runs had it",
    )
    sub.add_argument(
        "--tokenizer",
        type=Path,
        help="the runs' tokenizer, where it does not lie beside the shards",
    )
    sub.add_argument(
        "--without-smoke",
        action="store_true",
        help="make the folder although its text is not at hand; audit cannot run it then",
    )
    sub.add_argument(
        "--script", type=Path, default=SCRIPT, help="the script that ran; else the repository's"
    )
    sub.add_argument("--records", type=Path, default=RECORDS, help="where records lie")
    sub = command(compare)
    sub.add_argument("base", help="record folder, or run folders joined by commas")
    sub.add_argument(
        "new", nargs="+", help="the same; several make a chain, each compared with the one before"
    )
    sub.add_argument(
        "--paired", action="store_true", help="pair by seed; refused outside one lineage"
    )
    sub.add_argument(
        "--write", action="store_true", help="put the last comparison into its new record"
    )
    sub.add_argument("--margin", type=float, default=0.005, help="nats per token (default 0.005)")
    command(analyze, "run").add_argument(
        "knobs",
        nargs="*",
        metavar="NAME=VALUE",
        type=knob,
        help="how to read the text, for example DATA_PATH=folder",
    )
    command(table).add_argument("--records", type=Path, default=RECORDS, help="where records lie")
    command(report, "folder").add_argument(
        "--out", type=Path, help="the page; else report.html in the folder"
    )
    command(probes).add_argument(
        "knobs",
        nargs="*",
        metavar="NAME=VALUE",
        type=knob,
        help="knobs of train_gpt.py, for example PRESET=phased_ttt EVAL=doc",
    )
    sub = command(plan)
    sub.add_argument("words", nargs="*", metavar="PRESET or KNOB=VALUE", help="of train_gpt.py")
    sub.add_argument("--on", default="8xH100", help="H100, 8xH200, 2x8xA100 or 4090 and the like")
    sub.add_argument("--price", type=float, help="dollars an hour and card; else an assumption")
    sub.add_argument("--check", action="store_true", help="errors against published runs")
    sub.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="print JSON, or write it to FILE too"
    )
    for work in (ablate, quantisers, gains):
        sub = command(work)
        sub.add_argument("what", choices=("run", "report"))
        sub.add_argument("spec", type=Path, metavar="SPEC.json")
        sub.add_argument(
            "--scratch", type=Path, default=SCRIPT.parent / "runs", help="where run folders go"
        )
        sub.add_argument(
            "--share",
            default=(1, 1),
            metavar="I/N",
            type=part,
            help="only the I-th of N equal parts, so that N processes can share the work",
        )
    return parser


def main(args: list[str] | None = None) -> int:
    """Run one command; a mistake in the input is one line, never a traceback."""
    for stream in (sys.stdout, sys.stderr):  # whatever the locale says
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    asked = arguments().parse_args(args)
    try:
        return asked.work(asked)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    except (ValueError, SyntaxError) as error:
        message = str(error)
    except ImportError as error:
        message = f"{error.name} is not installed; see requirements.txt"
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
