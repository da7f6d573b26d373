from __future__ import annotations

import hashlib
import itertools
import re

import pytest
from synthetic import JS_LINK, LONG, RTL, SCRIPT

from sleeperbench.leaderboard.names import clean, digest12, file_name, https, linked, plugin_id


def test_a_colon_becomes_a_hyphen_and_plain_ids_stay() -> None:
    assert file_name("unlearn:neural_cleanse") == "unlearn-neural_cleanse"
    assert file_name("ft_sam") == "ft_sam"


def test_no_two_ids_share_a_file() -> None:
    ids = ["".join(p) for n in (1, 2, 3, 4) for p in itertools.product("aA:-_./~", repeat=n)]
    ids += [
        "unlearn:ft",
        "unlearn-ft",
        "unlearn/ft",
        "Unlearn:ft",
        SCRIPT,
        RTL,
        LONG,
        JS_LINK,
        "",
        "..",
        "con",
        "nul.x",
    ]
    ids += [file_name(i) for i in ids]
    names = {file_name(i).lower() for i in set(ids)}
    assert len(names) == len(set(ids))
    assert all(re.fullmatch(r"[a-z0-9_-][a-z0-9_.-]{0,99}", n) for n in names)
    assert not {n for n in names if n in ("con", "nul.x") or n.startswith(".")}


def test_the_digest_is_the_sha256() -> None:
    assert digest12("digits/a") == hashlib.sha256(b"digits/a").hexdigest()[:12]


def test_the_variant_is_no_part_of_the_id() -> None:
    assert plugin_id("badnets~a1b2c3") == "badnets"
    assert plugin_id("unlearn:ft~0123ab") == "unlearn:ft"
    assert plugin_id("odd~name") == "odd~name"


@pytest.mark.parametrize("url", ["https://arxiv.org/abs/1708.06733", "https://a-b.example.org/x?y=1&z=%20#f"])
def test_https_addresses_are_links(url: str) -> None:
    assert https(url) == url


@pytest.mark.parametrize(
    "url",
    [
        JS_LINK,
        "http://example.org",
        "HTTPS:example.org",
        "https://",
        "https://user:pw@example.org",
        "https://example.org:8443/x",
        "https://localhost/x",
        "https://127.0.0.1/x",
        "https://exa mple.org",
        'https://example.org/"onclick="x',
        "https://example.org/<script>",
        "https://example.org/\u202e",
        "//example.org",
        "data:text/html,x",
        "https://example.org/" + "a" * 2000,
        "https://[::1",
    ],
)
def test_everything_else_is_not(url: str) -> None:
    assert https(url) is None


def test_links_are_found_in_text_without_their_full_stop() -> None:
    assert linked("See https://a.org/x, or http://b.org.") == [
        ("See", None),
        (" ", None),
        ("https://a.org/x", "https://a.org/x"),
        (",", None),
        (" ", None),
        ("or", None),
        (" ", None),
        ("http://b.org.", None),
    ]


def test_control_and_direction_marks_are_replaced_and_letters_stay() -> None:
    assert clean(RTL) == "\u05e9\u05dc\u05d5\u05dd \ufffdevil\ufffd \ufffdbell"
    assert clean("a\r\nb\tc\x00\ud800") == "a\nb\tc\ufffd\ufffd"
