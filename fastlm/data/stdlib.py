"""The corpus `stdlib`: the documentation of the standard library of the Python that runs.

The text is the documentation strings of every module, class and function, and the help topics of `help()`, read from
the source files; no module is imported. Test suites and installed packages are left out, and so is a string that
occurred before and a paragraph that is an interactive session.

A paragraph is a line. Words are lower case; a token is a run of letters (with inner apostrophes), a run of digits, or a
run of one punctuation character: `os.path_join(x, y)` is `os . path _ join ( x , y )`.

A module belongs to the training text, to validation or to test (about 80, 10 and 10 %) by a hash of its name, so that
a module that Python gains or loses does not move the others.
"""

import ast
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from fastlm.errors import DataError

NAME = "stdlib"
MIN_COUNT = 2  # words that occur once are `<unk>`: 1 % of the text, a third of the words
VERSION = 1  # goes into the digest: another number for another text from the same sources
SALT = "fastlm-0"
SKIPPED = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
TOPICS = "pydoc_data.topics"
TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|([^\w\s]|_)\1*")


def texts() -> dict[str, bytes]:
    """The three texts `"train"`, `"valid"`, `"test"`, one paragraph a line, tokens separated by spaces."""
    lines: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    seen = set()
    for module, path in sources():
        for string in documentation(module, path.read_bytes()):
            if string not in seen:
                seen.add(string)
                lines[split_of(module)] += paragraphs(string)
    return {split: "".join(line + "\n" for line in text).encode() for split, text in lines.items()}


def digest() -> str:
    """SHA-256 of everything that the texts depend on."""
    state = hashlib.sha256(f"{NAME} {VERSION}\n".encode())
    for module, path in sources():
        contents = path.read_bytes()
        state.update(f"{module} {len(contents)}\n".encode())
        state.update(contents)
    return state.hexdigest()


def split_of(module: str) -> str:
    """The split that a module belongs to, from a hash of its name: the same on every machine and version."""
    place = hashlib.sha256(f"{SALT} {module}".encode()).digest()[0] / 256
    return "train" if place < 0.8 else "valid" if place < 0.9 else "test"


def sources() -> Iterator[tuple[str, Path]]:
    """The modules of the standard library with their source files, by name.

    Raises:
        DataError: this Python comes without the sources of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            found[".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = path
    if not found:
        raise DataError(f"{NAME}: this Python has no library sources under {root}")
    yield from sorted(found.items())


def documentation(module: str, source: bytes) -> list[str]:
    """The documentation strings of a source file in the order they stand; of `TOPICS`, its help texts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # the library holds a few files that are broken on purpose
            return []
    if module == TOPICS:
        tables = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
        return [text for table in tables for text in table.values()]
    strings, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            strings.append(ast.get_docstring(node) or "")
        # Statements only: ten times fewer nodes than ast.walk() visits.
        inner = [getattr(node, name, []) for name in ("body", "handlers", "orelse", "finalbody")]
        waiting += [child for block in reversed(inner) if isinstance(block, list) for child in reversed(block)]
    return strings


def paragraphs(string: str) -> Iterator[str]:
    """The paragraphs of a documentation string, tokenised, without interactive sessions."""
    for paragraph in re.split(r"\n\s*\n", string.lower()):
        tokens = [match.group() for match in TOKEN.finditer(paragraph)]
        if tokens and tokens[0] != ">>>":
            yield " ".join(tokens)
