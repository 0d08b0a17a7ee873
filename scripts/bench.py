"""Measures speed on a CPU, beside others: `python -m scripts.bench`.

Five suites: attention over pages, the update of a cache, generation, more prompts than
rows, and start-up. Each prints a table, and writes its times as JSON with what they were
taken on. Peers run in environments of their own, with the same weights, and must make the
same tokens.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from ._command_line import make_directory, Parser, refuse
from ._suites import (
    agree,
    attention,
    environments,
    generate,
    publish,
    serve,
    startup,
    update,
)
from ._suites.measure import read_ceiling
from ._suites.process import Broken
from ._suites.record import describe, ratios_of, Report, Row
from ._suites.tables import show


PROGRAM = "bench"
SUITES = ("attention", "update", "generate", "serve", "startup")
# By which figures which of our sides are compared with all others.
COMPARED = {
    "attention": (("gb_per_s",), ("paged",)),
    "generate": (("prefill_tok_s", "decode_tok_s", "tok_s", "peak_gib"), ("paged",)),
    "serve": (("tok_s",), ("in turn",)),
    "startup": (("first_token_s",), startup.OURS),
}
MODELS = ("135m", "1b")
DTYPES = ("float32", "bfloat16")
CACHE = pathlib.Path.home() / ".cache" / "eqx_paged_bench"


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Reads `arguments` (the process's own if None), or refuses them."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for suite in options.suites:
        if suite not in SUITES:
            parser.error(f"{suite!r} is none of {', '.join(SUITES)}")
    if options.publish and (options.dry_run or options.quick):
        how = "dry" if options.dry_run else "quick"
        parser.error(f"--publish: a {how} run measures nothing to publish")
    options.suites = [x for x in SUITES if x in (options.suites or SUITES)]
    if options.peers is None:
        small = options.quick or options.dry_run
        options.peers = [] if small else list(environments.PEERS)
    if options.quick:
        options.models = options.models or list(MODELS[:1])
        options.dtypes = options.dtypes or list(DTYPES[:1])
    if options.dry_run:
        options.models, options.dtypes = ["tiny"], ["float32"]
    options.models = options.models or list(MODELS)
    options.dtypes = options.dtypes or list(DTYPES)
    return options


def _parser() -> Parser:
    parser = Parser(PROGRAM, "Measures speed on a CPU, beside others.")
    parser.add_argument(
        "suites",
        nargs="*",
        metavar="SUITE",
        help=f"of {', '.join(SUITES)} (default: all)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--quick",
        action="store_true",
        help="in five minutes, without peers and large models",
    )
    how.add_argument(
        "--dry-run", action="store_true", help="tiny shapes, to see that it runs"
    )
    how.add_argument(
        "--draw", action="store_true", help="only draw what was measured, from the files"
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=environments.PEERS,
        metavar="NAME",
        help=f"of {', '.join(environments.PEERS)}; without a name, no peer (default: all, "
        "of a quick run no peer); PyTorch's attention comes with transformers",
    )
    parser.add_argument(
        "--install-peers",
        action="store_true",
        help="install the peers first, as far as they are not (several GB)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        metavar="NAME",
        help=f"of generate, serve and startup: of {', '.join(MODELS)} (default: all, of a "
        "quick run the first)",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        metavar="DTYPE",
        help=f"of generate and startup: of {', '.join(DTYPES)} (default: all, of a quick "
        "run the first)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=pathlib.Path,
        default=pathlib.Path("build/bench"),
        help="where the files go (default: build/bench)",
    )
    parser.add_argument(
        "--cache",
        metavar="DIR",
        type=pathlib.Path,
        default=CACHE,
        help=f"where peers and checkpoints are kept (default: {CACHE})",
    )
    parser.add_argument(
        "--publish",
        action="store_true",
        help="put what was measured into docs/benchmarks.md, where other cases stay",
    )
    return parser


@dataclasses.dataclass(frozen=True)
class Peers:
    """By name: what serves each, and why others are not there."""

    commands: dict[str, list[str]]
    absent: dict[str, str]
    torch: list[str] | str


def find_peers(options: argparse.Namespace) -> Peers:
    asked = {x: environments.PEERS[x] for x in options.peers}
    if options.install_peers:
        for name in dict.fromkeys(peer.environment for peer in asked.values()):
            print(f"{PROGRAM}: installing {name}", flush=True)
            reason = environments.install(name, options.cache)
            print(f"{PROGRAM}: {name}: {reason or 'installed'}", flush=True)
    found = {x: environments.command_of(peer, options.cache) for x, peer in asked.items()}
    torch = environments.command_of(environments.TORCH, options.cache)
    if not any(x.environment == environments.TORCH.environment for x in asked.values()):
        torch = "it was not asked for"
    return Peers(
        {x: command for x, command in found.items() if isinstance(command, list)},
        {x: reason for x, reason in found.items() if isinstance(reason, str)},
        torch,
    )


def size_of(options: argparse.Namespace) -> str:
    return "quick" if options.quick else "tiny" if options.dry_run else "full"


def rows_of(
    suite: str, options: argparse.Namespace, peers: Peers, about: dict[str, Any]
) -> Iterator[Row]:
    """What the suite finds, as it finds it; `about` gets the peers' versions."""
    size = size_of(options)
    models = tuple((x, dtype) for x in options.models for dtype in options.dtypes)
    shared: dict[str, Any] = {
        "models": models,
        "peers": peers.commands,
        "absent": peers.absent,
        "cache": options.cache,
        "out": options.out,
        "about": about,
    }
    if suite == "attention":
        torch = peers.torch if isinstance(peers.torch, list) else None
        reason = "" if torch else str(peers.torch)
        return attention.run(attention.Plan(size, torch, reason, options.out, about))
    if suite == "update":
        plans = {"full": update.Plan(), "quick": update.QUICK, "tiny": update.REHEARSAL}
        return update.run(plans[size])
    if suite == "generate":
        return generate.run(generate.Plan(quick=options.quick, **shared))
    if suite == "serve":
        served = {"full": ("embedded", *options.models), "quick": ("embedded",)}
        shared["models"] = tuple(
            x for x in served.get(size, ("tiny",)) if x in serve.MODELS
        )
        return serve.run(serve.Plan(quick=options.quick, **shared))
    rounds = {"full": 5, "quick": 1, "tiny": 1}[size]
    return startup.run(startup.Plan(rounds=rounds, **shared))


def run(
    suite: str, options: argparse.Namespace, peers: Peers, about: dict[str, Any]
) -> Report:
    """Writes each row as it is found, so that what breaks off is not lost."""
    report = Report(suite, dict(about), [], [])
    for row in rows_of(suite, options, peers, report.about):
        report.rows.append(row)
        if suite in COMPARED:
            report.ratios[:] = ratios_of(report.rows, *COMPARED[suite])
        report.write(options.out)
        print(f"{suite}: {row.case}: {row.side}", file=sys.stderr, flush=True)
    return report


def main(arguments: list[str] | None = None) -> None:
    """Ends with exit status 1 where one of our sides makes a wrong token, or breaks."""
    options = parse_options(arguments)
    make_directory(PROGRAM, options.out)
    make_directory(PROGRAM, options.cache, "--cache")
    if not options.draw:
        peers = find_peers(options)
        ceiling = round(read_ceiling() / 1e9, 1)
        about = describe(size=size_of(options), read_ceiling_gb_s=ceiling)
        for suite in options.suites:
            try:
                report = run(suite, options, peers, about)
            except (agree.Wrong, Broken) as error:
                print(f"{PROGRAM}: {error}", file=sys.stderr)
                raise SystemExit(1) from None
            show(report)
            print(f"written: {report.write(options.out)}", flush=True)
    paths = [options.out / f"{suite}.json" for suite in options.suites]
    try:
        reports = [Report.read(path) for path in paths if path.exists()]
    except (ValueError, OSError) as error:
        refuse(PROGRAM, f"--out {options.out}: {error}")
    if not reports:
        refuse(PROGRAM, f"--out {options.out}: nothing was measured there")
    small = [x.suite for x in reports if x.about.get("size") != "full"]
    if options.publish and small:
        refuse(PROGRAM, f"--publish: {' and '.join(small)} were measured in small")
    folder = publish.DOCS if options.publish else options.out
    if options.publish:
        reports = [publish.with_published(report, folder) for report in reports]
    for report in reports:
        for path in publish.draw(report, folder):
            print(f"written: {path}")
        if options.publish:
            report.write(folder)
    if options.publish:
        publish.rewrite(publish.PAGE, reports)
        print(f"written: {publish.PAGE}")


if __name__ == "__main__":
    main()
