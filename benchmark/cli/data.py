"""`sleeperbench data`: which data sets there are, getting one, adding one's own."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeperbench.data.errors import DataError

if TYPE_CHECKING:
    from sleeperbench.data.source import Source

# The readers import numpy, which `--help` must not: each function imports what it uses.


def add_parser(subparsers: Any) -> None:
    """Add `data` to the command's parsers."""
    parser = subparsers.add_parser("data", help="data sets: list them, get one, add your own")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    rooted = argparse.ArgumentParser(add_help=False)
    rooted.add_argument("--data-root", type=Path, help="where data sets lie; default: SLEEPERBENCH_DATA")

    lister = actions.add_parser("list", parents=[rooted], help="what there is and where it was found")
    lister.add_argument("--json", action="store_true", help="one JSON array of rows")

    getter = actions.add_parser("get", parents=[rooted], help="download what is missing, decode, and check")
    getter.add_argument("id", metavar="ID")
    getter.add_argument("--again", action="store_true", help="delete the decoded copy and decode anew")

    adder = actions.add_parser("add", parents=[rooted], help="copy a data set of your own below the data root")
    adder.add_argument("id", metavar="ID")
    given = adder.add_mutually_exclusive_group(required=True)
    given.add_argument("--images", type=Path, metavar="DIR", help="DIR/{train,test}/<class>/*.png and the like")
    given.add_argument("--arrays", type=Path, metavar="DIR", help="DIR/{train,test}.npz: images uint8, labels int64")
    adder.add_argument("--size", type=int, metavar="N", help="with --images: resize all pictures to N x N")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """List, get or add.

    Raises:
        DataError: Unknown id, missing or damaged data, or a folder that cannot be written.
    """
    from sleeperbench.data.roots import data_root

    root = data_root(args.data_root)
    if args.action == "list":
        _list(root, as_json=args.json)
    elif args.action == "get":
        _get(root, args.id, again=args.again)
    else:
        _add(root, args)
    return 0


def _list(root: Path, *, as_json: bool) -> None:
    from sleeperbench.data.find import names

    rows = [_row(name, root) for name in names(root)]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print(f"data root: {root}")
    for r in rows:
        if r["shape"] is None:
            print(f"{r['id']:<16} {r['todo']}")
            continue
        size = "x".join(str(n) for n in r["shape"])
        counts = " / ".join("?" if n is None else f"{n:,}" for n in (r["train"], r["test"]))
        print(f"{r['id']:<16} {size:<8} {r['classes']:>3} classes  {counts:<16}  {r['found'] or r['todo']}")
        print(f"{'':<16} {r['title']}; licence: {r['licence']}")


def _row(name: str, root: Path) -> dict[str, Any]:
    from sleeperbench.data.find import find_source

    row: dict[str, Any] = dict.fromkeys(
        ("id", "title", "shape", "classes", "train", "test", "found", "todo", "download_bytes", "licence", "cite")
    )
    row["id"] = name
    try:
        source = find_source(name, root)
    except DataError as e:
        return row | {"todo": str(e)}
    place = _place(source, root)
    return row | {
        "title": source.title,
        "shape": list(source.shape),
        "classes": len(source.classes),
        "train": source.train,
        "test": source.test,
        "found": place,
        "todo": None if place else _todo(source, root),
        "download_bytes": source.download_bytes,
        "licence": source.licence,
        "cite": source.cite,
    }


def _place(source: Source, root: Path) -> str | None:
    from sleeperbench.data.locate import locate

    found = locate(source, root)
    if found is None:
        return None
    return f"{found.layout}: {found.files[0].parent}" if found.files else "needs no file"


def _todo(source: Source, root: Path) -> str:
    from sleeperbench.data.locate import missing

    if source.download is None:
        return missing(source, root)
    return f"not here: sleeperbench data get {source.name} ({source.download_bytes:,} bytes)"


def _get(root: Path, name: str, *, again: bool) -> None:
    from sleeperbench.data.cache import prepare
    from sleeperbench.data.find import find_source
    from sleeperbench.data.locate import locate, missing

    source = find_source(name, root)
    if locate(source, root) is None:
        if source.download is None:
            raise DataError(missing(source, root))
        print(f"downloading {source.download_bytes:,} bytes to {root}; licence: {source.licence}", file=sys.stderr)
        source.download(root)
    prepared = prepare(source, root, again=again)
    for split, rows in prepared.counts.items():
        prepared.arrays(split), prepared.ids(split)  # compared with their checksums
        print(f"{name} {split}: {rows:,} rows, sha256 {prepared.digests[split]}")
    print(f"{name}: equals the release" if prepared.canonical else f"{name}: not canonical: {prepared.note}")


def _add(root: Path, args: argparse.Namespace) -> None:
    from sleeperbench.data.added import add_arrays, add_images
    from sleeperbench.data.find import names

    if args.id in names(root):
        raise DataError(f"there is a data set `{args.id}` already: take another id")
    if args.images is not None:
        source = add_images(root, args.id, args.images, args.size)
    elif args.size is not None:
        raise DataError("--size goes with --images only: arrays are taken as they are")
    else:
        source = add_arrays(root, args.id, args.arrays)
    size = "x".join(str(n) for n in source.shape)
    print(f"added {args.id}: {size}, {len(source.classes)} classes, below {root / args.id}")
