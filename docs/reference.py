"""`make docs`: the Python reference, made from the docstrings, as HTML pages."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pdoc

import resprune

PACKAGES = ["evaluation", "exporter", "graphs", "method", "runtime"]
# The command line and the server have guides; for the inside of the export there is the code.
LEFT_OUT = [
    r"resprune\..*cli$",
    r"resprune\.evaluation\.lmms",
    r"resprune\.exporter\.(?!export$|options$|components$|tensorrt)",
]


def build(out: Path) -> None:
    """Write the pages, of which the first is `index.html`, into the directory `out`."""
    for name in resprune.__all__:  # imported on first use, which pdoc does not see
        setattr(resprune, name, getattr(resprune, name))
    resprune.__all__ += PACKAGES  # pdoc goes down into what `__all__` names
    pdoc.render.configure(docformat="markdown", show_source=False)
    # What is left out is imported all the same, and lmms-eval is not there for this.
    warnings.filterwarnings("error", "Couldn't import")
    warnings.filterwarnings("ignore", r"Couldn't import resprune\.evaluation\.lmms")
    pdoc.pdoc("resprune", *(f"!{pattern}" for pattern in LEFT_OUT), output_directory=out)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
