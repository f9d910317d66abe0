"""Look after the folders that --latent_cache_dir names: what is in them, what is damaged, what nobody needs.

    python scripts/cache.py list runs
    python scripts/cache.py verify cache --repair
    python scripts/cache.py gc cache --older_than 30d --delete

list    shows each cache folder: latents and captions, bytes, when it was last used, and by which runs.
verify  reads every entry and names the damaged ones. With --repair it deletes them, and the next run makes them again.
gc      finds the entries that no run needs, because the output folders of the runs that used them are gone. With
        --older_than, runs that were not started for so long count as gone. It deletes nothing without --delete, and
        never an entry that a running process uses.

DIR is a cache folder, an output folder of a run, or a folder that holds some of these.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.errors import Problem, UserError, counted, listing, printable, refuse, shell_word
from trainkit.process import own_settings, say
from trainkit.tools.checks import text_problems

if TYPE_CHECKING:
    from trainkit.data.cache_folders import CacheContents, EntryGroup, Garbage
    from trainkit.data.cache_uses import KnownUse

UNITS = {"h": 3600, "d": 86_400, "w": 7 * 86_400}  # seconds
SHOWN_FORMS = 6  # sizes of latents in a line


@own_settings()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    refuse(text_problems(args))
    refuse(folder_problems(args.DIR))

    say("looking for cache folders")
    from trainkit.data.cache_folders import find_caches

    folders = list({path.resolve(): path for folder in args.DIR for path in find_caches(folder)}.values())
    if not folders:
        refuse([Problem("no cache folder", ", ".join(map(str, args.DIR)), "no folder there holds entries of a cache",
                        "name the folder that you gave as --latent_cache_dir", "data")])
    args.command(args, folders)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="Show a traceback with every error message.")
    commands = parser.add_subparsers(required=True, metavar="list|verify|gc")
    found = {}
    for name, command, summary in (("list", show_list, "show what the folders hold"),
                                   ("verify", verify, "read every entry and name the damaged ones"),
                                   ("gc", gc, "find, and with --delete remove, what no run needs")):
        found[name] = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.",
                                          allow_abbrev=False)
        found[name].set_defaults(command=command)
        found[name].add_argument("DIR", type=Path, nargs="+",
                                 help="A cache folder, an output folder, or a folder that holds some of these.")
        found[name].add_argument("--debug", action="store_true", help="Show a traceback with every error message.")
    found["list"].add_argument("--json", action="store_true", help="Print everything as JSON.")
    found["verify"].add_argument("--repair", action="store_true", help="Delete the damaged entries. The next run that "
                                 "needs them makes them again.")
    found["gc"].add_argument("--older_than", type=seconds_of, metavar="AGE", help="Also remove what was not used for "
                             "this time: 12h, 30d or 8w.")
    found["gc"].add_argument("--delete", action="store_true", help="Delete what was found. Without this flag, it is "
                             "only listed.")
    found["gc"].add_argument("--dry_run", action="store_true", help="Delete nothing, also with --delete.")
    return parser.parse_args(argv)


def seconds_of(text: str) -> float:
    """30d -> seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hdw])", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write for instance 12h, 30d or 8w")
    return float(match[1]) * UNITS[match[2]]


def folder_problems(folders: Sequence[Path]) -> Iterator[Problem]:
    for folder in folders:
        if not folder.is_dir():
            why = "it is a file, not a folder" if folder.exists() else "there is no such folder"
            yield Problem("the folder cannot be read", f"{folder}", why, "name a cache folder, or the folder of a run",
                          "data")


# ----------------------------------------------------------------------------------------------------------------------
# list


def show_list(args: argparse.Namespace, folders: Sequence[Path]) -> None:
    from trainkit.data.cache_folders import CacheContents, kinds
    from trainkit.runtime.progress import watched

    found = []
    for folder in folders:
        contents = CacheContents.of(folder)
        with watched(f"{folder}: reading headers", len(contents.entries)) as show:
            found.append((contents, kinds(contents.entries, show)))
    if args.json:
        print(json.dumps([as_json(*each) for each in found], indent=1))
        return
    for contents, groups in found:
        for line in lines(contents, groups):
            print(printable(line))


def lines(contents: CacheContents, groups: dict[str, EntryGroup]) -> Iterator[str]:
    from trainkit.files import size_text

    last = contents.last_used
    yield (f"{contents.folder}: {counted(len(contents.entries), 'entry', 'entries')}, {size_text(contents.size)}"
           + (f", last used {day(last)}" if last else ""))
    for name, kind in sorted(groups.items()):
        forms = [f"{number:,} {form}".strip() for form, number in kind.forms.most_common(SHOWN_FORMS)]
        more = f", and {len(kind.forms) - SHOWN_FORMS} more" if len(kind.forms) > SHOWN_FORMS else ""
        yield f"  {name:<12} {kind.entries:,}, {size_text(kind.size)}: {', '.join(forms)}{more}"
    for run, use in runs_of(contents).items():
        yield f"  {run}: {state(use)}{base_of(run)}, {counted(used(contents, run), 'entry', 'entries')}"
    if number := unused(contents):
        yield f"  used by no run that is known here: {counted(number, 'entry', 'entries')}"


def runs_of(contents: CacheContents) -> dict[Path, KnownUse]:
    """The use of each run that counts: that of a living process before others."""
    return {use.run: use for use in sorted(contents.uses, key=lambda use: (bool(use.alive), use.last))}


def used(contents: CacheContents, run: Path) -> int:
    return sum(entry.key in contents.keys[run] for entry in contents.entries)


def unused(contents: CacheContents) -> int:
    known = set[str]().union(*contents.keys.values())
    return sum(entry.key not in known for entry in contents.entries)


def state(use: KnownUse) -> str:
    if use.alive:
        return f"in use by process {use.pid} on {use.host}"
    return f"last started {day(use.last)}" + ("" if use.run_exists else ", its folder is gone")


def base_of(run: Path) -> str:
    """Base model and sizes of a run, as far as its run.json is there."""
    from trainkit.data.cache_folders import setting

    base, resolution = setting(run, "pretrained_model_name_or_path"), setting(run, "resolution")
    size = f", {setting(run, 'resolutions') or resolution} px" if resolution else ""
    return (f", {base}" if base else "") + size + (" in buckets" if setting(run, "enable_bucket") else "")


def day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def as_json(contents: CacheContents, groups: dict[str, EntryGroup]) -> dict[str, object]:
    runs = [{"run": str(run), "last_used": use.last, "alive": use.alive, "pid": use.pid, "host": use.host,
             "folder_exists": use.run_exists, "entries": used(contents, run)} for run, use in runs_of(contents).items()]
    return {"folder": str(contents.folder), "entries": len(contents.entries), "bytes": contents.size,
            "last_used": contents.last_used, "unused_entries": unused(contents), "runs": runs,
            "kinds": {name: {"entries": kind.entries, "bytes": kind.size, "forms": dict(kind.forms)}
                      for name, kind in groups.items()}}


# ----------------------------------------------------------------------------------------------------------------------
# verify


def verify(args: argparse.Namespace, folders: Sequence[Path]) -> None:
    faults = {path: why for folder in folders for path, why in faults_in(folder)}
    if not faults:
        print("every entry is whole")
        return
    named = listing(f"{path}: {why}" for path, why in faults.items())
    if not args.repair:
        words = " ".join(shell_word(folder) for folder in args.DIR)
        refuse([Problem(f"{counted(len(faults), 'entry is', 'entries are')} damaged", ", ".join(map(str, folders)),
                        named, f"lora-tools cache verify {words} --repair deletes them, and the next run makes them "
                        "again", "data")])
    stuck = {path: why for path in faults if (why := removed(path))}
    refuse(Problem("a damaged entry cannot be deleted", f"{path}", why, "delete it yourself", "disk")
           for path, why in stuck.items())
    print(printable(f"deleted {counted(len(faults), 'damaged entry', 'damaged entries')}; the next run that needs them "
                    "makes them again:"))
    for path, why in faults.items():
        print(printable(f"  {path}: {why}"))


def faults_in(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every damaged entry, and why it is; an entry that another process deletes meanwhile is none."""
    from trainkit.data.cache import entry_paths
    from trainkit.data.cache_folders import fault
    from trainkit.runtime.progress import watched

    paths = [*entry_paths(folder)]
    with watched(f"{folder}: reading entries", len(paths)) as show:
        for done, path in enumerate(paths, 1):
            if why := fault(path):
                yield path, why
            show(done)
    print(printable(f"{folder}: {counted(len(paths), 'entry', 'entries')} read"))


def removed(path: Path) -> str:
    """Delete a file -> why that cannot be done."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return f"{error.strerror}"
    return ""


# ----------------------------------------------------------------------------------------------------------------------
# gc


def gc(args: argparse.Namespace, folders: Sequence[Path]) -> None:
    from trainkit.data.cache_folders import collect
    from trainkit.files import disk_errors

    delete = args.delete and not args.dry_run
    found = 0
    for folder in folders:
        with disk_errors(folder), one_at_a_time(folder):
            contents, garbage = collect(folder, older_than=args.older_than, delete=delete)
        found += len(garbage.entries)
        print(printable(result_line(contents, garbage, delete)))
        for use in contents.uses:
            if use.alive:
                print(printable(f"  kept: what {use.run} uses, {state(use)}"))
    if found and not delete:
        print("nothing was deleted; the same command with --delete deletes this")


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    from filelock import Timeout

    try:
        yield
    except Timeout as error:
        raise UserError(Problem("another process is deleting entries", f"{folder}", f"it holds {error.lock_file}",
                                "wait until it has ended, and start again", "disk")) from error


def result_line(contents: CacheContents, garbage: Garbage, delete: bool) -> str:
    from trainkit.files import size_text

    if not garbage.entries:
        return f"{contents.folder}: all {counted(len(contents.entries), 'entry is', 'entries are')} needed"
    verb = "deleted" if delete else "would delete"
    return (f"{contents.folder}: {verb} {len(garbage.entries):,} of "
            f"{counted(len(contents.entries), 'entry', 'entries')}, {size_text(garbage.size)} of "
            f"{size_text(contents.size)}")
