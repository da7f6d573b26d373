"""A small reader of pages: tags with their attributes and text, and what is not closed properly."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "img", "input", "br", "hr"}


@dataclass
class Tag:
    name: str
    attrs: dict[str, str]
    children: list[Tag] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def all(self, name: str) -> list[Tag]:
        found = [self] if self.name == name else []
        for c in self.children:
            found += c.all(name)
        return found

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@dataclass
class Page:
    root: Tag
    tags: list[Tag]
    wrong: list[str]
    text: str

    def by_id(self, name: str) -> Tag:
        return next(t for t in self.tags if t.attrs.get("id") == name)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Tag("", {})
        self.stack = [self.root]
        self.tags: list[Tag] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [k for k, _ in attrs]
        if len(set(names)) < len(names):
            self.wrong.append(f"<{tag}> has an attribute twice")
        made = Tag(tag, {k: v or "" for k, v in attrs})
        self.tags.append(made)
        self.stack[-1].children.append(made)
        if tag not in VOID:
            self.stack.append(made)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        if self.stack[-1].name != tag:
            self.wrong.append(f"</{tag}> closes <{self.stack[-1].name}> at {self.getpos()}")
        else:
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        for tag in self.stack:
            tag.words.append(data)


def read(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    reader = _Reader()
    reader.feed(text)
    reader.close()
    left = [t.name for t in reader.stack[1:]]
    return Page(reader.root, reader.tags, reader.wrong + [f"<{t}> is never closed" for t in left], text)


def board_rows(page: Page) -> list[Tag]:
    return [r for r in page.by_id("board").all("tr") if "data-cell" in r.attrs]


def figures(row: Tag) -> dict[str, Tag]:
    return {t.attrs["data-metric"]: t for t in row.all("td") if "data-metric" in t.attrs}
