"""The command line: ``pyroboost demo`` and ``pyroboost reproduce``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyroboost", description="Boost Pyro model/guide pairs, and measure the result."
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="boost a model on real data and show what each stage added",
        description="Boost RBM -> RBM -> VAE -> GMM on images of digits, compare it with single "
        "models trained as long, and write pictures and ArviZ data to a folder.",
    )
    demo.add_argument("--data", choices=("digits", "mnist"), default="digits", help="the images")
    demo.add_argument(
        "--scale",
        choices=("smoke", "full"),
        default="full",
        help="smoke: seconds, numbers of no use",
    )
    _common(demo, out="pyroboost-demo")
    reproduce = commands.add_parser(
        "reproduce",
        help="run a paper's table or figure again",
        description="Run a paper's table or figure again and write a JSON with every setting and "
        "a figure. An interrupted run goes on where it stopped when it is started again.",
    )
    reproduce.add_argument("name", nargs="?", help="such as cascade.table1; see --list")
    reproduce.add_argument("--list", action="store_true", help="name the experiments and stop")
    reproduce.add_argument(
        "--scale",
        choices=("smoke", "cpu", "paper"),
        default="cpu",
        help="smoke: seconds; cpu: under an hour on two cores; paper: the paper's settings",
    )
    reproduce.add_argument("--seeds", type=int, metavar="N", help="how many seeds, from --seed on")
    reproduce.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="cpu", help="where the models run"
    )
    reproduce.add_argument(
        "--readme",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print the committed results as Markdown, or put them between the marks of FILE",
    )
    _common(reproduce, out="pyroboost-results")
    return parser


def _common(parser: argparse.ArgumentParser, *, out: str) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path(out), metavar="FOLDER", help="where to write"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed")
    parser.add_argument(
        "--data-folder", type=Path, metavar="FOLDER", help="where data lie (else PYROBOOST_DATA)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch")
    parser.add_argument("--quiet", action="store_true", help="print the result only")


def _version() -> str:
    from pyroboost import __version__

    return f"pyroboost {__version__}"


def _demo(options: argparse.Namespace) -> None:
    from pyroboost.experiments.demo import demo

    demo(
        data=options.data,
        out=options.out,
        seed=options.seed,
        data_folder=options.data_folder,
        smoke=options.scale == "smoke",
        quiet=options.quiet,
    )


def _readme(target: str) -> None:
    from pyroboost.experiments import readme

    if target == "-":
        print(readme.markdown(readme.committed()), end="")
    else:
        readme.update(Path(target), readme.committed())


def _reproduce(options: argparse.Namespace) -> None:
    from pyroboost.experiments import record, registry
    from pyroboost.experiments.readme import markdown
    from pyroboost.experiments.runner import run_experiment

    if options.list:
        print(registry.listing())
        return
    if options.readme:
        _readme(options.readme)
        return
    if options.name is None:
        raise ValueError(
            "reproduce needs the name of an experiment; see `pyroboost reproduce --list`."
        )
    path = run_experiment(
        registry.find(options.name),
        scale=options.scale,
        out=options.out,
        seed=options.seed,
        seeds=options.seeds,
        data_folder=options.data_folder,
        device=options.device,
        say=(lambda line: None) if options.quiet else (lambda line: print(line, flush=True)),
        progress=False if options.quiet else None,
    )
    print(markdown([record.read(path)]))
    print(f"written: {path} and {path.with_suffix('.png')}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what stands behind ``pyroboost``; the process's own when left out.

    Returns:
        0; 2 for what the user can mend, said in one sentence; 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    from pyroboost.data import DataError
    from pyroboost.infer import FitError

    try:
        if options.threads is not None:
            _set_threads(options.threads)
        _demo(options) if options.command == "demo" else _reproduce(options)
    except (ValueError, OSError, DataError, FitError) as error:
        print(f"pyroboost: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyroboost: interrupted; the same command goes on where it stopped.", file=sys.stderr)
        return 130
    return 0


def _set_threads(threads: int) -> None:
    if threads < 1:
        raise ValueError(f"--threads is {threads}; take 1 or more.")
    import torch

    torch.set_num_threads(threads)
