"""Report on a run, running or finished, on one page: what was trained, its curve, samples, HellaSwag, time and faults.

    python -m modeling_gpt2repro.runs.report runs/quickstart
    python -m modeling_gpt2repro.runs.report runs/quickstart --html
    python -m modeling_gpt2repro.runs.report runs/gpt2-124m --html --output gpt2-124m.html

The first writes report.md and its pictures into the run's folder. The second writes report.html, one file with
everything in it, to attach to a mail. Nothing but the run's own files is read, so it may still be running.
"""

import argparse
import sys
from pathlib import Path

from modeling_gpt2repro.runs.config import make_writable
from modeling_gpt2repro.runs.folder import REPORT_FILE, find_run
from modeling_gpt2repro.runtime.command_line import end
from modeling_gpt2repro.runtime.progress import escape_controls
from modeling_gpt2repro.storage.atomic import atomic_write

from .markdown import Report
from .page import html_page
from .sections import write_report


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m modeling_gpt2repro.runs.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="The --output_dir of a training, or a model's folder.")
    parser.add_argument("--html", action="store_true", help="Write one HTML file with the pictures in it.")
    parser.add_argument("--output", type=Path, help="The file to write (default: report.md or report.html in RUN).")
    args = parser.parse_args(argv)
    suffix = ".html" if args.html else ".md"
    try:
        folder = find_run(args.run)
        output = args.output or folder / f"{REPORT_FILE}{suffix}"
        if output.suffix != suffix or output.is_dir():
            raise ValueError(f"output ({output}) must be a file that ends in {suffix}; --html writes HTML.")
        make_writable(output.absolute().parent, "output")
        report = write_report(folder)
    except (OSError, ValueError) as error:
        end(error)
    for remark in report.remarks:
        print(escape_controls(remark), file=sys.stderr)
    try:
        for path, content in files_of(report, output).items():
            with atomic_write(path) as file:
                file.write(content)
    except OSError as error:
        end(f"{output} cannot be written ({error.strerror}): give another --output.")
    print(output)


def files_of(report: Report, output: Path) -> dict[Path, bytes]:
    """Path -> content of the page and, if it is Markdown, of its pictures, which lie beside it."""
    if output.suffix == ".html":
        return {output: html_page(report).encode()}
    places = {name: output.with_name(f"{output.stem}-{name}.png") for name in report.pictures}
    text = report.markdown({name: place.name for name, place in places.items()})
    return {**{places[name]: content for name, content in report.pictures.items()}, output: text.encode()}


if __name__ == "__main__":
    main()
