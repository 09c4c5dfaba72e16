"""Prints the running Python's standard-library docstrings as JSON lines. A script: run it, don't import it.

Owns the list of modules and the choice of what is public. It runs in a process of its own, because
importing a hundred modules leaves traces (registered handlers, warnings, memory) that a driver does not
want. It refuses everything private, everything deprecated on one of the supported Pythons, and modules
that act when they are imported (`this`, `antigravity`, `idlelib`).
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

BARE = "builtins"  # its members go by their own names: `len`, `str.split`
LISTED = """
    abc argparse array asyncio atexit base64 binascii bisect builtins bz2 cProfile calendar cmath cmd code
    codecs codeop collections collections.abc colorsys compileall concurrent.futures configparser
    contextlib contextvars copy copyreg csv dataclasses datetime dbm decimal difflib dis email
    email.charset email.encoders email.generator email.header email.headerregistry email.message
    email.mime.text email.parser email.policy email.utils enum faulthandler fcntl filecmp fileinput
    fnmatch fractions functools gc getopt getpass gettext glob graphlib grp gzip hashlib heapq hmac html
    html.parser http http.client http.cookies http.server importlib importlib.abc importlib.machinery
    importlib.metadata importlib.util inspect io ipaddress itertools json json.decoder json.encoder
    keyword linecache locale logging logging.config logging.handlers lzma marshal math mimetypes mmap
    multiprocessing.managers multiprocessing.pool multiprocessing.process multiprocessing.shared_memory
    netrc numbers operator optparse os os.path pathlib pickle pickletools pkgutil platform plistlib pprint
    profile pty pwd py_compile pyclbr queue quopri random re reprlib resource runpy sched secrets select
    selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3 ssl stat statistics
    string struct subprocess sys sysconfig tarfile tempfile textwrap threading time timeit tokenize
    tomllib trace traceback types typing unicodedata unittest unittest.mock urllib.error urllib.parse
    urllib.request urllib.robotparser uuid venv warnings wave weakref webbrowser wsgiref.headers
    wsgiref.simple_server wsgiref.util xml.dom.minidom xml.etree.ElementTree xml.sax.saxutils
    xmlrpc.client xmlrpc.server zipapp zipfile zipimport zlib zoneinfo
"""
MODULES = tuple(LISTED.split())
# Objects of these say where they are defined, which is not where users import them from.
ALIASES = {"posixpath": "os.path", "genericpath": "os.path", "posix": "os"}
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
NOISE = re.compile(r"Alias for field number \d+$|partial\(func, \*args")


class Entry(NamedTuple):
    """One documented object under its public name."""

    name: str
    value: Any


def main() -> None:
    rows = {row["name"]: row for row in _rows()}
    for name in sorted(rows):
        sys.stdout.write(json.dumps(rows[name], sort_keys=True) + "\n")


def _rows() -> Iterator[dict[str, str]]:
    seen: set[int] = set()
    keep = []  # holds bound descriptors alive, so that an id in `seen` is never used twice
    for module in MODULES:
        for entry in _entries(module):
            if id(entry.value) in seen:
                continue
            seen.add(id(entry.value))
            keep.append(entry.value)
            doc = _doc(entry.value)
            if doc:
                yield {"name": entry.name, "content": f"{entry.name}{_signature(entry.value)}\n\n{doc}"}


def _entries(module: str) -> Iterator[Entry]:
    """Functions and classes that `module` owns, each class followed by its own public members."""
    try:
        namespace = importlib.import_module(module)
    except ImportError:  # built without sqlite3, lzma, ...
        return
    prefix = "" if module == BARE else module + "."
    listed = getattr(namespace, "__all__", None) or dir(namespace)
    for name in sorted({name for name in listed if name[0] != "_"}):
        value = getattr(namespace, name, None)
        if not _is_owned(value, module):
            continue
        yield Entry(prefix + name, value)
        if inspect.isclass(value):
            yield from (Entry(f"{prefix}{name}.{key}", member) for key, member in _members(value))


def _is_owned(value: Any, module: str) -> bool:
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return False
    home = getattr(value, "__module__", None) or module
    home = ALIASES.get(home, home)
    return module in {BARE, home} or home not in MODULES


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    for key, raw in sorted(vars(cls).items()):
        value = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
        is_documentable = inspect.isroutine(value) or isinstance(value, property)
        if key[0] != "_" and is_documentable:
            yield key, value


def _doc(value: Any) -> str:
    """The object's own docstring, never an inherited one; empty for noise made by the interpreter."""
    doc = getattr(value, "__doc__", None)
    if not isinstance(doc, str) or NOISE.match(doc):
        return ""
    return ADDRESS.sub("", inspect.cleandoc(doc)).strip()


def _signature(value: Any) -> str:
    try:
        text = str(inspect.signature(value))
    except (TypeError, ValueError, AttributeError, NameError):
        return ""  # written in C: none, or defaults that name what does not exist
    return ADDRESS.sub("", text)


if __name__ == "__main__":
    main()
