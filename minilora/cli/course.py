"""The command `course`: exercises listed, handed out, checked, and packed for Gradescope."""

from __future__ import annotations

import argparse
import os
from typing import Any

from minilora.cli.commands import write_figures
from minilora.errors import MiniloraError

ACTIONS = ("list", "new", "check", "autograder")


def course_command(args: argparse.Namespace) -> int:
    from minilora.course.puzzles import ALL

    unknown = [name for name in args.only or () if name not in ALL]
    if unknown:
        raise MiniloraError(
            f"--only {unknown[0]}: no such exercise; `minilora course list` names them all"
        )
    if (args.action == "list") != (args.path is None):
        wanted = {"list": "no path", "autograder": "the name of a zip"}
        raise MiniloraError(
            f"course {args.action}: expected {wanted.get(args.action, 'a folder')} after it"
        )
    if args.timeout <= 0:
        raise MiniloraError(f"--timeout {args.timeout:g}: expected more than 0 seconds")
    chosen = [ALL[name] for name in ALL if not args.only or name in args.only]
    figures: dict[str, Any] = {"max_points": sum(len(e.gradients()) for e in chosen)}
    status = {"list": _list, "new": _new, "check": _check, "autograder": _autograder}[args.action](
        args, chosen, figures
    )
    write_figures(args, figures)
    return status


def _list(args: argparse.Namespace, chosen: list[Any], figures: dict[str, Any]) -> int:
    kinds = {"exercise": "Exercises, in the order of the course", "puzzle": "Puzzles"}
    for kind, title in kinds.items():
        rows = [e for e in chosen if e.kind == kind]
        if rows:
            print(f"{title}\n{'name':21}{'points':>6}{'minutes':>9}  what, and after which")
        for e in rows:
            after = f" ({', '.join(e.needs)})" if e.needs else ""
            print(f"{e.name:21}{len(e.gradients()):6}{e.minutes:9}  {e.title}{after}")
        if rows:
            minutes = sum(e.minutes for e in rows)
            print(f"{'together':21}{sum(len(e.gradients()) for e in rows):6}{minutes:9}\n")
    return 0


def _new(args: argparse.Namespace, chosen: list[Any], figures: dict[str, Any]) -> int:
    from minilora.course.skeleton import write_skeletons

    written = write_skeletons(args.path, chosen, args.hints)
    for name, is_new in written.items():
        print(f"{args.path / f'{name}.py'}{'' if is_new else ': there already, left as it is'}")
    return 0


def _check(args: argparse.Namespace, chosen: list[Any], figures: dict[str, Any]) -> int:
    from minilora.course.check import Failure, Verdict, refused
    from minilora.course.results import gradescope, printed
    from minilora.course.runner import check_folder
    from minilora.formats.files import write_json

    if not args.path.is_dir() and args.gradescope is None:
        raise MiniloraError(f"{args.path} is not a folder; `minilora course new` makes one")
    waiting = Failure("error", "It was not graded: the grader was stopped before.")
    verdicts: list[Verdict] = [refused(exercise, waiting) for exercise in chosen]
    if args.gradescope is not None:  # a valid file from the start, whatever happens
        write_json(args.gradescope, gradescope(verdicts))
    for i, verdict in enumerate(check_folder(args.path, chosen, timeout=args.timeout)):
        verdicts[i] = verdict
        print(printed(verdict), flush=True)
        if args.gradescope is not None:
            write_json(args.gradescope, gradescope(verdicts))
    figures["points"] = sum(verdict.points for verdict in verdicts)
    figures["exercises"] = {v.name: v.document() for v in verdicts}
    print(f"{figures['points']} of {figures['max_points']} points")
    return 0 if all(verdict.failure is None for verdict in verdicts) else 1


def _autograder(args: argparse.Namespace, chosen: list[Any], figures: dict[str, Any]) -> int:
    from minilora.course.results import write_autograder

    write_autograder(args.path, chosen, timeout=args.timeout, every=not args.only)
    print(f"{args.path}: {os.path.getsize(args.path):,} bytes")
    print(f"Enter {figures['max_points']} as the assignment's points on Gradescope.")
    return 0
