"""The English prose in every Python: the help topics of the language reference and the standard library's docstrings.

About two million characters without a download, enough for minutes of training. The text differs between Python
versions, so losses on it compare only on one version: tests and documents must not expect a certain one.
"""

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from .documents import Document

# From a fragment such as "Internal support module." a model learns where documents end, and little else.
MIN_DOCUMENT_CHARACTERS = 200

# Installed packages are not the standard library, and the docstrings of tests are not prose.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@lru_cache(maxsize=1)  # parsing takes seconds, and the text is read twice, once to train a tokenizer
def python_prose_documents() -> list[Document]:
    """The help topics, then one document a module, in an order that is fixed for one Python version.

    Ids are "topic:NAME" and "module:package.name". A docstring that appears twice is kept where it appears first.

    Raises:
        ValueError: If this Python has neither topics nor sources.
    """
    texts = (*_topics(), *_module_docstrings())
    documents = [Document(name, text) for name, text in texts if len(text) >= MIN_DOCUMENT_CHARACTERS]
    if not documents:
        raise ValueError(
            f"this Python has no pydoc_data.topics and no sources in {sysconfig.get_paths()['stdlib']}: "
            "use a Python that ships its standard library's sources, such as the one from python.org."
        )
    return documents


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions of Python leave it out
        return
    for name in sorted(topics):
        yield f"topic:{name}", topics[name].strip()


def _module_docstrings() -> Iterator[tuple[str, str]]:
    standard_library = Path(sysconfig.get_paths()["stdlib"])
    seen = set()
    for path in _source_files(standard_library):
        docstrings = [text for text in dict.fromkeys(_docstrings(path)) if text not in seen]
        seen.update(docstrings)
        parts = path.relative_to(standard_library).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield f"module:{name}", "\n\n".join(docstrings)


def _source_files(root: Path) -> list[Path]:
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]  # os.walk enters only these
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(paths, key=lambda path: path.relative_to(root).parts)


def _docstrings(path: Path) -> list[str]:
    """The cleaned docstrings of a source file in the order of its lines; none if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on invalid escapes: DeprecationWarning, since Python 3.12 SyntaxWarning
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates, other encodings, null bytes
            return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # the module comes first: it has no line
    return [text for node in nodes if (text := ast.get_docstring(node))]
